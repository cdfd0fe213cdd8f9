"""`clip_grad_norm_`, with nothing to clip and with every call clipping."""

import itertools

import pytest
import torch
from models import parameters
from torch.nn import utils

import fastclip
from fastclip._ops import reference


def contestants(made, threshold):
    """Each takes the list of parameters, as a training loop passes it."""
    return {
        "fastclip": lambda: fastclip.clip_grad_norm_(made, threshold()),
        "default": lambda: reference.clip_norm_([p.grad for p in made], threshold(), 2.0),
        "foreach": lambda: utils.clip_grad_norm_(made, threshold(), foreach=True),
        "loop": lambda: utils.clip_grad_norm_(made, threshold(), foreach=False),
    }


@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
def bench_clip(race, name, shapes, dtype, clips, device):
    made = parameters(shapes, dtype, device)
    grads = [p.grad for p in made]
    originals = [g.clone() for g in grads]
    norm = float(reference.norm(grads, 2.0))
    calls = itertools.count()

    def restore() -> None:
        nonlocal calls
        torch._foreach_copy_(grads, originals)
        calls = itertools.count(1)

    def shrinking() -> float:
        # Every call of a turn finds a norm above its threshold; torch's in bf16, which overshoots
        # by up to 0.4 %, included.
        return norm * 0.98 ** next(calls)

    work = f"{name}, {'clipped' if clips else 'unclipped'}"
    threshold = shrinking if clips else lambda: 1e9
    race(work, dtype, grads, contestants(made, threshold), writes=clips, restore=restore)
