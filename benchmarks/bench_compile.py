"""Time `clip_grad_norm_` under `torch.compile`: ours as one op, ours as torch ops, and torch's.

The contestant *default* shows how fast a decomposition of our op into torch ops would be.
"""

import pytest
import torch
from models import HEADLINE, QUICK, parameters
from torch.nn import utils

import fastclip
from fastclip._ops import clip_coef


def decomposed(grads, max_norm):
    each = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]
    total_norm = torch.linalg.vector_norm(torch.stack(each))
    torch._foreach_mul_(grads, clip_coef(total_norm, max_norm).float())
    return total_norm.float()


# Compiling torch's clip of 1 000 tensors takes minutes.
@pytest.mark.parametrize("name", ["GPT-2", pytest.param("1000 x 64", marks=pytest.mark.full)])
def bench_compiled(race, name, device, quick):
    shapes, _ = QUICK["quick"] if quick else HEADLINE[name]
    made = parameters(shapes, "fp32", device)
    grads = [p.grad for p in made]
    torch.compiler.reset()
    ours, default, theirs = map(
        torch.compile, (fastclip.clip_grad_norm_, decomposed, utils.clip_grad_norm_)
    )
    contestants = {
        "fastclip": lambda: ours(made, 1e9),
        "default": lambda: default(grads, 1e9),
        "foreach": lambda: theirs(made, 1e9, foreach=True),
    }
    race(f"{name}, unclipped, compiled", "fp32", grads, contestants)
