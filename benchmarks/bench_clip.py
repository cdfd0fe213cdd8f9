"""`clip_grad_norm_`, with nothing to clip and with every call clipping; its cost for the host."""

import itertools
import statistics
import time

import pytest
import torch
from models import parameters
from torch.nn import utils

import fastclip
from fastclip import _ops
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


def bench_host(benchmark, where):
    """Host time of a call beyond its op: 300 parameters, gradients made anew before every call."""
    if _ops.extension is None:
        pytest.skip("the walk is part of the extension")
    made = parameters([(64,)] * 300, "fp32", "cpu")
    calls, kernels = [], []

    def fresh() -> None:
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)

    def both() -> None:
        fresh()
        grads = _ops.extension.read_grads(made)
        start = time.perf_counter()
        grads.clip_norm_(1e9, 2.0)
        kernels.append(time.perf_counter() - start)
        fresh()
        start = time.perf_counter()
        fastclip.clip_grad_norm_(made, 1e9)
        calls.append(time.perf_counter() - start)

    benchmark.pedantic(both, iterations=100, rounds=5, warmup_rounds=1)
    whole, kernel = (1e6 * statistics.median(times) for times in (calls, kernels))
    host = (
        f"300 parameters of 64, gradients fresh each call: {whole:.1f} µs a call, of which the op "
        f"{kernel:.1f} µs, so {whole - kernel:.1f} µs beyond it."
    )
    benchmark.extra_info.update(where=where, host=host)
