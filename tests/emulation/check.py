"""A short check of the emulated kernels in a process of its own, which a fault may well end.

PYTHONPATH=.:tests python tests/emulation/check.py library.so: exit status 0 if all is right, under
several schedules.
"""

import math
import sys
from pathlib import Path

import torch

import emulation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Whole tiles, tails and vectors cut short, aligned and not."""
    made = []
    for size in (1, 7, 515, 8200, 40_000):
        for offset in (0, 1, 3):
            memory = torch.randn(size + offset).to(dtype).to("emulated")
            made.append(memory[offset:])
    return made


def check(p: float, dtype: torch.dtype) -> None:
    from fastclip import _ops

    grads = tensors(dtype)
    whole = torch.cat([g.cpu().double() for g in grads])
    expected = whole.norm(p).item()
    norm = _ops.clip_norm_(grads, expected / 2, p).item()
    assert math.isclose(norm, expected, rel_tol=3e-7), (p, dtype, norm, expected)
    clipped = torch.cat([g.cpu().double() for g in grads])
    torch.testing.assert_close(
        clipped, whole / 2, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6
    )
    norms = _ops.norms(grads, p, [i % 3 for i in range(len(grads))], True).cpu()
    assert torch.isfinite(norms).all()


if __name__ == "__main__":
    machine = emulation.load(Path(sys.argv[1])).machine
    torch.manual_seed(0)
    for seed in range(4):
        machine.seed, machine.cooperative = 1000 * seed, seed % 2
        for p in (1.0, 2.0, math.inf, 3.0):
            for dtype in DTYPES:
                check(p, dtype)
