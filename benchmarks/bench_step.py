"""A training step, torch's sequence beside ours: unscale, clip, fused AdamW. And a norm that is
gathered during backward."""

import statistics
import time

import pytest
import torch
from conftest import medians
from models import QUICK, gpt2, parameters
from report import markdown
from steps import SCALE, TORCH, step_of

import fastclip

pytestmark = pytest.mark.parametrize("device", ["cpu"])


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
def bench_step(benchmark, where, request, clips, scaled):
    quick = request.config.getoption("--quick")
    made = parameters(QUICK["quick"][0] if quick else gpt2(), "fp32", "cpu")
    for parameter in made:
        parameter.data.normal_()
    start = [p.detach().clone() for p in made]
    grads = [p.grad.mul_(SCALE if scaled else 1.0) for p in made]
    originals = [g.clone() for g in grads]
    step = step_of(made, 1e-3 if clips else 1e9, scaled, clips)
    hooks = []

    def before(name: str) -> None:
        torch._foreach_copy_(grads, originals)
        begin = time.perf_counter()
        step.before(name)
        if name == "NormAccumulator":
            hooks.append(1e3 * (time.perf_counter() - begin))

    ends = {}
    for name, call in step.ways.items():
        before(name)
        with torch.no_grad():
            torch._foreach_copy_(made, start)
        call()
        ends[name] = [p.detach().clone() for p in made]
        torch.testing.assert_close(ends[name], ends[TORCH], rtol=1e-5, atol=1e-6)
    del ends
    found: dict[str, float] = {}
    rounds = 2 if quick else 15
    benchmark.pedantic(lambda: found.update(medians(step.ways, rounds, 0, before)), rounds=1)
    lines = [["way", "N", "ms", "x torch"]]
    for name, us in found.items():
        ratio = found[TORCH] / us
        lines.append([name, str(step.passes[name]), f"{us / 1e3:.1f}", f"{ratio:.2f}"])
    head = (
        f"A step of fused AdamW on GPT-2's list, fp32, {'with' if scaled else 'without'} a scaler, "
        f"clip {'active' if clips else 'not active'}. N: how often the bytes of the gradients "
        f"move, computed. The hooks of NormAccumulator took {statistics.median(hooks):.1f} ms "
        "before, with the gradients in memory."
    )
    text = "\n".join([head, "", *markdown(lines)])
    benchmark.extra_info.update(where=where, host=text, step=found, correct=True)
    print(text)


def bench_accumulator(benchmark, where, request):
    from fastclip._demo import CharacterModel

    quick = request.config.getoption("--quick")
    torch.manual_seed(0)
    models = {"plain": CharacterModel(100), "hooked": CharacterModel(100)}
    text = torch.randint(100, (32, 65))
    leaves = list(models["plain"].parameters())
    norms = fastclip.NormAccumulator(models["hooked"])
    clips = {
        "plain": lambda: fastclip.clip_grad_norm_(leaves, 1e9),
        "hooked": lambda: norms.clip_(1e9),
    }
    backwards, times = ({name: [] for name in models} for _ in range(2))

    def both() -> None:
        for name, model in models.items():
            model.zero_grad()
            loss = model(text)
            begin = time.perf_counter()
            loss.backward()
            backwards[name].append(1e3 * (time.perf_counter() - begin))
            # The clock, too, was cold after backward.
            begin = time.perf_counter()
            clips[name]()
            times[name].append(1e6 * (time.perf_counter() - begin))

    benchmark.pedantic(both, rounds=3 if quick else 400)
    ms = {name: statistics.median(some) for name, some in backwards.items()}
    us = {name: statistics.median(some) for name, some in times.items()}
    line = (
        f"NormAccumulator on the demo's model, {len(leaves)} parameters: backward "
        f"{ms['hooked']:.2f} ms, without hooks {ms['plain']:.2f} ms, so "
        f"{100 * (ms['hooked'] / ms['plain'] - 1):.1f} % longer; the clip after it "
        f"{us['hooked']:.1f} µs, clip_grad_norm_ {us['plain']:.1f} µs."
    )
    benchmark.extra_info.update(where=where, host=line, backward=ms, clip=us)
    print(line)
