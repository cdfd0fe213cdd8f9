"""Time clipping by tensor and by unit, compared with handwritten loops, and clipping by groups."""

import itertools

import pytest
import torch
from conftest import TURN, Call, medians
from models import QUICK, gpt2, parameters, resnet50
from torch import nn

import fastclip
from fastclip import _ops

pytestmark = pytest.mark.skipif(_ops.extension is None, reason="no extension to measure")
MODELS = {"ResNet-50": resnet50(), "GPT-2": gpt2()}


def rows_norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.norm()


def agc_loop(made: list[nn.Parameter], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Clip as in Brock et al. 2021, in a loop over the parameters, as timm does."""
    for parameter in made:
        shape = [-1] + [1] * (parameter.dim() - 1) if parameter.dim() > 1 else []
        limit = rows_norm(parameter.detach()).clamp_(min=eps).mul_(clip_factor).view(shape)
        norm = rows_norm(parameter.grad).view(shape)
        clipped = parameter.grad * (limit / norm.clamp(min=1e-6))
        parameter.grad.copy_(torch.where(norm < limit, parameter.grad, clipped))


def norms_loop(made: list[nn.Parameter], max_norm: float) -> None:
    """Divide each gradient by max(1, norm / max_norm), as Keras and optax do."""
    for parameter in made:
        parameter.grad.div_((parameter.grad.norm() / max_norm).clamp_(min=1))


def calls_of(kind: str, made: list[nn.Parameter], strength: float) -> dict[str, Call]:
    """Return calls of our function `kind` and of the handwritten loop."""
    ours, loop = {
        "clip_grad_norms_": (fastclip.clip_grad_norms_, norms_loop),
        "clip_grad_agc_": (fastclip.clip_grad_agc_, agc_loop),
    }[kind]
    return {"fastclip": lambda: ours(made, strength), "loop": lambda: loop(made, strength)}


@pytest.mark.parametrize("name", ["GPT-2", pytest.param("ResNet-50", marks=pytest.mark.full)])
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", ["clip_grad_norms_", "clip_grad_agc_"])
def bench_each(record_text, quick, name, kind, clips):
    made = parameters(QUICK["quick"][0] if quick else MODELS[name], "fp32", "cpu")
    for parameter in made:
        parameter.data.normal_()
    grads = [p.grad for p in made]
    originals = [g.clone() for g in grads]
    calls = calls_of(kind, made, 1e-2 if clips else 1e9)

    def restore(name: str) -> None:
        torch._foreach_copy_(grads, originals)

    results = []
    for who, call in calls.items():
        restore(who)
        call()
        results.append([g.clone() for g in grads])
    for ours, theirs in zip(*results, strict=True):
        # torch's float32 norm of GPT-2's embedding, which the loop uses, is off by 1e-3.
        torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=1e-30)

    def measure() -> dict[str, float]:
        # Gradients are restored before every turn. If calls clip, a turn is one call: a second call
        # would find nothing to clip.
        found = medians(calls, 3 if quick else 15, 0.0 if clips else TURN, restore)
        return found | medians({"clip": lambda: fastclip.clip_grad_norm_(made, 1e9)}, 3)

    reach = "every one clipped" if clips else "nothing clipped"
    record_text(
        measure,
        lambda us: (
            f"{kind}, {name}, fp32, {reach}: {us['fastclip'] / 1e3:.2f} ms, a loop over the "
            f"parameters {us['loop'] / 1e3:.2f} ms, so {us['loop'] / us['fastclip']:.1f} times; "
            f"{us['fastclip'] / us['clip']:.1f} times an unclipped clip_grad_norm_."
        ),
    )


def bench_groups(record_text, quick):
    made = parameters(QUICK["quick"][0] if quick else gpt2(), "fp32", "cpu")
    cuts = [len(made) * i // 5 for i in range(6)]
    groups = [
        {"params": made[begin:end], "max_norm": 1e9} for begin, end in itertools.pairwise(cuts)
    ]
    calls = {
        "five": fastclip.GradClipper(groups=groups).clip_,
        "one": fastclip.GradClipper(made, 1e9).clip_,
    }
    norms = calls["five"]()
    torch.testing.assert_close(norms.norm(), calls["one"]())
    record_text(
        lambda: medians(calls, 3 if quick else 40),
        lambda us: (
            f"Five groups of GPT-2's gradients in one pass: {us['five'] / 1e3:.2f} ms, one group "
            f"{us['one'] / 1e3:.2f} ms, so {us['five'] / us['one']:.2f} times."
        ),
    )
