"""Time `get_total_norm`, for aligned and misaligned gradients."""

from models import parameters
from torch.nn import utils

import fastclip
from fastclip._ops import reference


def contestants(grads):
    return {
        "fastclip": lambda: fastclip.get_total_norm(grads),
        "default": lambda: reference.norm(grads, 2.0),
        "foreach": lambda: utils.get_total_norm(grads, foreach=True),
        "loop": lambda: utils.get_total_norm(grads, foreach=False),
    }


def bench_norm(race, name, shapes, dtype, device):
    grads = [p.grad for p in parameters(shapes, dtype, device)]
    race(f"{name}, norm", dtype, grads, contestants(grads))


def bench_misaligned_norm(race, quick, device):
    """Time views that begin at the second element, so that no 16-byte load is aligned."""
    whole = parameters([(1000 if quick else (1 << 26) + 1,)] * 4, "bf16", device)
    grads = [p.grad[1:] for p in whole]
    race("4 x 64 Mi, misaligned, norm", "bf16", grads, contestants(grads))
