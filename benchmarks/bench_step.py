"""Time a training step (unscaling, clipping, fused AdamW) by torch's functions and by ours, and
NormAccumulator, which measures the norm during backward.

The memory traffic of each way is counted in N, the bytes of the float32 gradients. The optimizer
alone moves 7 N: it reads parameters, gradients and two moments, and writes all but the gradients.
If it also divides the gradients, it writes them too.
"""

import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from conftest import Call, medians, seconds
from models import QUICK, gpt2, parameters
from report import markdown
from torch import nn
from torch.nn import utils

import fastclip
from fastclip._demo import CharacterModel

SCALE = 1024.0
TORCH = "torch"


class Steps:
    """Several ways to do the same step with these parameters, given the gradients after backward.

    Call `before` before each step.
    """

    def __init__(self, made: list[nn.Parameter], max_norm: float, scaled: bool) -> None:
        self.made, self.max_norm, self.scaled = made, max_norm, scaled
        self.norms = fastclip.NormAccumulator(made)

    def before(self, name: str) -> None:
        """Run the hooks of NormAccumulator, as backward does, if the way `name` uses it."""
        self.norms.forget()
        for parameter in self.made if name.startswith("NormAccumulator") else ():
            # Without the extension, NormAccumulator has no hooks.
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)

    def by_torch(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        scaler.unscale_(optimizer)
        utils.clip_grad_norm_(self.made, self.max_norm)
        scaler.step(optimizer)

    def by_us(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        if self.scaled:
            fastclip.unscale_and_clip_(optimizer, self.max_norm, scaler)
        else:
            fastclip.clip_grad_norm_(self.made, self.max_norm)
        scaler.step(optimizer)

    def by_norms(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        if self.scaled:
            fastclip.unscale_and_clip_(optimizer, self.max_norm, scaler, measured=self.norms)
        else:
            self.norms.clip_(self.max_norm)
        scaler.step(optimizer)

    def in_step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        fastclip.clipped_step(optimizer, self.max_norm, scaler)

    def in_step_by_norms(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        fastclip.clipped_step(optimizer, self.max_norm, scaler, measured=self.norms)

    def call(self, way: Callable[..., None]) -> Call:
        """Return a function that does a step in one way, with its own optimizer and scaler."""
        device = self.made[0].device.type
        optimizer = torch.optim.AdamW(self.made, fused=True)
        scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=self.scaled)
        scaler.scale(torch.ones((), device=device))

        def run() -> None:
            way(optimizer, scaler)
            scaler.update()

        return run

    def ways(self, clips: bool) -> dict[str, tuple[Call, int]]:
        """Return for each way a function that does a step, and its memory traffic in N."""
        written = 2 * (self.scaled or clips)
        passes = {
            TORCH: (self.by_torch, 7 + 3 + 2 * self.scaled),
            "unscale_and_clip_" if self.scaled else "clip_grad_norm_": (self.by_us, 8 + written),
            "clipped_step": (self.in_step, 7 + 1 + 1),
            "NormAccumulator": (self.by_norms, 7 + written),
            "NormAccumulator, clipped_step": (self.in_step_by_norms, 7 + 1),
        }
        return {name: (self.call(way), n) for name, (way, n) in passes.items()}


def step_table(us: dict[str, float], passes: dict[str, int]) -> list[str]:
    rows = [["way", "N", "ms", "x torch"]]
    for name, time in us.items():
        rows.append([name, str(passes[name]), f"{time / 1e3:.2f}", f"{us[TORCH] / time:.2f}"])
    return markdown(rows)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
def bench_step(record_text, quick, device, clips, scaled):
    made = parameters(QUICK["quick"][0] if quick else gpt2(), "fp32", device)
    for parameter in made:
        parameter.data.normal_()
    start = [p.detach().clone() for p in made]
    grads = [p.grad.mul_(SCALE if scaled else 1.0) for p in made]
    originals, hooks = [g.clone() for g in grads], []
    steps = Steps(made, 1e-3 if clips else 1e9, scaled)
    ways = steps.ways(clips)

    def before(name: str) -> None:
        torch._foreach_copy_(grads, originals)
        ms = 1e3 * seconds(lambda: steps.before(name), 1, device)
        hooks.extend([ms] if name == "NormAccumulator" else [])

    ends = {}
    for name, (call, _) in ways.items():
        before(name)
        with torch.no_grad():
            torch._foreach_copy_(made, start)
        call()
        ends[name] = [p.detach().clone() for p in made]
        torch.testing.assert_close(ends[name], ends[TORCH], rtol=1e-5, atol=1e-6)
    ends.clear()

    def text(us: dict[str, float]) -> str:
        head = (
            f"A step of fused AdamW on GPT-2's list, fp32, {'with' if scaled else 'without'} a "
            f"scaler, clip {'active' if clips else 'not active'}{', CUDA' * (device == 'cuda')}. "
            "N: how often the bytes of the gradients move, computed. The hooks of NormAccumulator "
            f"took {statistics.median(hooks):.1f} ms before, with the gradients in memory."
        )
        return "\n".join([head, "", *step_table(us, {name: n for name, (_, n) in ways.items()})])

    calls = {name: call for name, (call, _) in ways.items()}
    record_text(lambda: medians(calls, 2 if quick else 15, 0.0, before, device), text)


def bench_accumulator(record_text, quick):
    torch.manual_seed(0)
    models = {"plain": CharacterModel(100), "hooked": CharacterModel(100)}
    batch = torch.randint(100, (32, 65))
    leaves = list(models["plain"].parameters())
    norms = fastclip.NormAccumulator(models["hooked"])
    clips = {
        "plain": lambda: fastclip.clip_grad_norm_(leaves, 1e9),
        "hooked": lambda: norms.clip_(1e9),
    }

    def measure() -> list[dict[str, float]]:
        backwards, times = ({name: [] for name in models} for _ in range(2))
        for _, (name, model) in itertools.product(range(3 if quick else 200), models.items()):
            model.zero_grad()
            backwards[name].append(seconds(model(batch).backward))
            # The clip follows at once, so that the caches are as backward has left them.
            times[name].append(seconds(clips[name]))
        return [{n: statistics.median(t) for n, t in some.items()} for some in (backwards, times)]

    def text(found: list[dict[str, float]]) -> str:
        backward, clip = found
        return (
            f"NormAccumulator on the demo's model, {len(leaves)} parameters: backward "
            f"{1e3 * backward['hooked']:.2f} ms, without hooks {1e3 * backward['plain']:.2f} ms, "
            f"so {100 * (backward['hooked'] / backward['plain'] - 1):.1f} % longer; the clip after "
            f"it {1e6 * clip['hooked']:.1f} µs, clip_grad_norm_ {1e6 * clip['plain']:.1f} µs."
        )

    record_text(measure, text)
