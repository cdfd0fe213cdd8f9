"""Time `clip_grad_norm_` when no call clips and when every call does."""

import contextlib
import functools
import importlib
import itertools

import pytest
import torch
from models import parameters
from torch.nn import utils

import fastclip
from fastclip._ops import reference


def peers(device):
    """Return apex's function if apex is installed and runs on the device."""
    # An apex built for another version of torch may raise any exception.
    with contextlib.suppress(Exception):
        clip = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
        clip(parameters([(3,)], "fp32", device), 1.0)
        return {"apex": clip}
    return {}


def contestants(made, threshold, device):
    """Return the calls to compare. Each passes the list of parameters, as a training loop does."""
    functions = {
        "fastclip": fastclip.clip_grad_norm_,
        "default": lambda made, limit: reference.clip_norm_([p.grad for p in made], limit, 2.0),
        "foreach": functools.partial(utils.clip_grad_norm_, foreach=True),
        "loop": functools.partial(utils.clip_grad_norm_, foreach=False),
        **peers(device),
    }
    return {name: lambda c=clip: c(made, threshold()) for name, clip in functions.items()}


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
        # Each call of a turn has a threshold below the norm that the last call has left, also for
        # torch's clipping in bf16, which is off by up to 0.4 %.
        return norm * 0.98 ** next(calls)

    work = f"{name}, {'clipped' if clips else 'unclipped'}"
    threshold = shrinking if clips else lambda: 1e9
    race(work, dtype, grads, contestants(made, threshold, device), clips, restore)
