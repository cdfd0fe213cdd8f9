"""The lists of gradients that are measured, and in which runs: shapes of real models, from their
published architectures, lists of many tiny tensors, and lists of a few large ones."""

import math

import torch

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """25.6 M parameters in 161 tensors (He et al. 2015, arXiv:1512.03385)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """124 M parameters in 148 tensors (Radford et al. 2019)."""
    d = 768
    block: list[Shape] = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def llama(layers: int = 4, vocabulary: int = 32064) -> list[Shape]:
    """A quarter of Llama 3.2 1B (16 layers, 128 256 tokens): 309 M parameters in 38 tensors."""
    d, kv, hidden = 2048, 512, 8192
    layer: list[Shape] = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]
    layer += [(d,), (d,)]
    return [(vocabulary, d), *layer * layers, (d,)]


def llama_7b() -> list[Shape]:
    """6.74 G parameters in 291 tensors (Touvron et al. 2023, arXiv:2307.09288)."""
    d, hidden, vocabulary = 4096, 11008, 32000
    layer: list[Shape] = [(d, d)] * 4 + [(hidden, d)] * 2 + [(d, hidden), (d,), (d,)]
    return [(vocabulary, d), *layer * 32, (d,), (vocabulary, d)]


def table() -> list[Shape]:
    """1.54 G elements in one tensor: an embedding of NVIDIA-NeMo/Automodel's pull request 3685."""
    return [(6_000_261, 256)]


def matrices() -> list[Shape]:
    """500 matrices with 225 181 696 elements together, as many as in that pull request.

    Their shapes are not published. The sum is 859 x 512 x 512: 141 such squares and 359 pairs.
    """
    return [(512, 512)] * 141 + [(512, 1024)] * 359


DTYPES = ["fp32", "bf16", "fp16", "mixed"]
# Each list is measured in each of its dtypes.
Lists = dict[str, tuple[list[Shape], list[str]]]

HEADLINE: Lists = {
    "GPT-2": (gpt2(), ["fp32", "bf16"]),
    "1000 x 64": ([(64,)] * 1000, ["fp32", "bf16"]),
}
# Measured only with --full.
FULL: Lists = {
    "ResNet-50": (resnet50(), DTYPES),
    "GPT-2": (gpt2(), ["fp16", "mixed"]),
    "Llama 1B / 4": (llama(), DTYPES),
    "150 x 1 Mi": ([(1 << 20,)] * 150, ["fp32", "bf16"]),
    "20000 x 64": ([(64,)] * 20000, ["fp32"]),
}
# Measured only on a GPU. The first three, 0.5 to 13 GB, compare kernels and memory bandwidth.
CUDA: Lists = {
    "4 x 64 Mi": ([(1 << 26,)] * 4, ["fp32", "bf16"]),
    "16 x 64 Mi": ([(1 << 26,)] * 16, ["fp32", "bf16"]),
    "48 x 64 Mi": ([(1 << 26,)] * 48, ["fp32", "bf16"]),
    "Llama 2 7B": (llama_7b(), ["bf16"]),
    "Llama 1B / 4": (llama(), ["mixed"]),
    "6 000 261 x 256": (table(), ["bf16"]),
    "500 matrices": (matrices(), ["in turn"]),
    "1000 x 1024": ([(1024,)] * 1000, ["fp32"]),
}
# Measured instead of all others with --quick, so that every benchmark takes only seconds.
QUICK: Lists = {"quick": ([(300, 70), (70,), (3, 3), (), (0,)] * 3, [*DTYPES, "in turn"])}


_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(shape: Shape, dtype: str, i: int) -> torch.dtype:
    """Return the dtype of the gradient at index `i` of a list.

    "mixed" gives bf16 matrices and fp32 vectors, as in mixed-precision training; with "in turn",
    bf16 and fp32 alternate.
    """
    if dtype == "in turn":
        return (torch.bfloat16, torch.float32)[i % 2]
    if dtype == "mixed":
        return torch.bfloat16 if len(shape) > 1 or math.prod(shape) > 1 << 16 else torch.float32
    return _TORCH[dtype]


def parameters(shapes: list[Shape], dtype: str, device: str) -> list[torch.nn.Parameter]:
    """Return parameters with uninitialised data and normally distributed gradients."""
    torch.manual_seed(0)
    made = []
    for i, shape in enumerate(shapes):
        kind = dtype_of(shape, dtype, i)
        made.append(torch.nn.Parameter(torch.empty(shape, dtype=kind, device=device)))
        made[-1].grad = torch.randn(shape, device=device).to(kind)
    return made
