"""A mixed-precision step, torch's sequence beside ours: unscale, clip, fused AdamW. And a norm that
is gathered during backward."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from models import QUICK, gpt2, parameters
from torch.nn import utils

import fastclip


def turns(calls: dict[str, Callable[[], object]], before, rounds: int) -> dict[str, float]:
    """Medians in milliseconds of single calls in turn; `before` is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            before(name)
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
def bench_step(benchmark, where, request, clips):
    quick = request.config.getoption("--quick")
    max_norm = 1e-3 if clips else 1e9
    made = parameters(QUICK["quick"][0] if quick else gpt2(), "fp32", "cpu")
    for parameter in made:
        parameter.data.normal_()
    originals = [p.grad.mul_(1024) for p in made]
    start = [p.detach().clone() for p in made]
    names = "torch", "unscaled", "stepped"
    scalers = {name: torch.amp.GradScaler("cpu", init_scale=1024.0) for name in names}
    optimizers = {name: torch.optim.AdamW(made, fused=True) for name in names}
    for scaler in scalers.values():
        scaler.scale(torch.ones(()))
    grads = [g.clone() for g in originals]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad

    def restore(name: str) -> None:
        torch._foreach_copy_(grads, originals)

    def as_torch() -> None:
        scaler, optimizer = scalers["torch"], optimizers["torch"]
        scaler.unscale_(optimizer)
        utils.clip_grad_norm_(made, max_norm)
        scaler.step(optimizer)
        scaler.update()

    def unscaled() -> None:
        scaler, optimizer = scalers["unscaled"], optimizers["unscaled"]
        fastclip.unscale_and_clip_(scaler, optimizer, max_norm)
        scaler.step(optimizer)
        scaler.update()

    def stepped() -> None:
        fastclip.clipped_step(optimizers["stepped"], max_norm, scalers["stepped"])
        scalers["stepped"].update()

    calls = {"torch": as_torch, "unscaled": unscaled, "stepped": stepped}
    ends = []
    for name, call in calls.items():
        restore(name)
        with torch.no_grad():
            torch._foreach_copy_(made, start)
        call()
        ends.append([p.detach().clone() for p in made])
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)
    found: dict[str, float] = {}
    benchmark.pedantic(lambda: found.update(turns(calls, restore, 2 if quick else 15)), rounds=1)
    line = (
        f"Unscale, clip ({'active' if clips else 'not active'}) and fused AdamW on GPT-2's list, "
        f"fp32: torch's sequence {found['torch']:.1f} ms, unscale_and_clip_ and step "
        f"{found['unscaled']:.1f} ms, {found['torch'] / found['unscaled']:.2f} times, clipped_step "
        f"{found['stepped']:.1f} ms, {found['torch'] / found['stepped']:.2f} times."
    )
    benchmark.extra_info.update(where=where, host=line, step=found, correct=True)
    print(line)


def bench_accumulator(benchmark, where, request):
    from fastclip._demo import CharacterModel

    quick = request.config.getoption("--quick")
    torch.manual_seed(0)
    model = CharacterModel(100)
    text = torch.randint(100, (32, 65))
    norms = fastclip.NormAccumulator(model)
    hooked, times = norms._measure, {"plain": [], "hooked": [], "clip": [], "whole": []}

    def backward(name: str) -> None:
        model.zero_grad()
        loss = model(text)
        start = time.perf_counter()
        loss.backward()
        times[name].append(time.perf_counter() - start)

    def both() -> None:
        for hook in norms._hooks:
            hook.remove()
        leaves = list(model.parameters())
        backward("plain")
        start = time.perf_counter()
        fastclip.clip_grad_norm_(leaves, 1e9)
        times["whole"].append(time.perf_counter() - start)
        norms._hooks = [p.register_post_accumulate_grad_hook(hooked) for p in leaves]
        backward("hooked")
        start = time.perf_counter()
        norms.clip_(1e9)
        times["clip"].append(time.perf_counter() - start)

    benchmark.pedantic(both, rounds=3 if quick else 200)
    found = {name: 1e6 * statistics.median(some) for name, some in times.items()}
    line = (
        f"NormAccumulator on the demo's model, {len(list(model.parameters()))} parameters: "
        f"backward {found['hooked'] / 1e3:.2f} ms, without hooks {found['plain'] / 1e3:.2f} ms, so "
        f"{100 * (found['hooked'] / found['plain'] - 1):.1f} % longer; the clip after it "
        f"{found['clip']:.1f} µs, clip_grad_norm_ {found['whole']:.1f} µs."
    )
    benchmark.extra_info.update(where=where, host=line, accumulator=found)
    print(line)
