"""Time the host's part of a clip of small gradients, ours and torch's.

Each call is timed in a loop, right after a backward pass, and with cold caches. A GPU is idle when
a turn begins, and the time ends when the call returns, before the GPU has done the work.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import TURN, Call, drain, medians
from report import markdown
from torch import Tensor, nn
from torch.nn import utils

import fastclip
from fastclip import _ops

HEADER = ["work", "when", "fastclip µs", "op µs", "beyond it", "torch µs", "x torch"]
Times = dict[str, dict[str, float]]


class Model:
    """A model of `count` parameters, with the backward pass that comes before each clip."""

    def __init__(self, count: int, device: str = "cpu") -> None:
        layers = [nn.Linear(8, 8, device=device) for _ in range(count // 2)]
        self.module, self.device = nn.Sequential(*layers), device
        self.made = list(self.module.parameters())
        self.optimizer = torch.optim.SGD(self.made, lr=0.0)
        self.input = torch.randn(4, 8, device=device)
        self.backward("op")

    def backward(self, name: str) -> None:
        """Run the pass. For "op", also read the gradients, which brings them into the cache."""
        self.module.zero_grad()
        self.module(self.input).square().sum().backward()
        self.grads = _ops.extension.read_grads(self.made) if name == "op" else None
        drain(self.device)


def evict_caches(memory: Tensor = torch.zeros(16 << 20)) -> None:  # noqa: B008
    memory.add_(1)


def measured(
    calls: dict[str, Call], backward: Callable[[str], None], rounds: int, device: str = "cpu"
) -> Times:
    """Return each call's microseconds in a loop, after a backward pass, and with cold caches."""

    def idle(name: str) -> None:
        drain(device)

    def cold(name: str) -> None:
        drain(device)
        evict_caches()

    warm, cold = medians(calls, rounds, TURN, idle), medians(calls, rounds, 0.0, cold)
    return {
        "in a loop": warm,
        "after backward": medians(calls, rounds, 0.0, backward),
        "cold caches": cold,
    }


def host_table(works: list[tuple[str, Times]]) -> str:
    """Return a table of our calls, compared with their op alone, if known, and with torch's."""
    rows = [HEADER]
    for work, found in works:
        names = [name for name in found["in a loop"] if name not in ("op", "torch")]
        for who, (when, us) in itertools.product(names, found.items()):
            op = [f"{us['op']:.1f}", f"{us[who] - us['op']:.1f}"] if "op" in us else ["-", "-"]
            ours, theirs = us[who], us["torch"]
            row = [work.format(who), when, f"{ours:.1f}", *op, f"{theirs:.0f}"]
            rows.append([*row, f"{theirs / ours:.1f}"])
    return "\n".join(markdown(rows))


def calls_of(model: Model) -> dict[str, Call]:
    made = model.made
    clipper = fastclip.GradClipper(model.module, 1e9)
    rule = fastclip.AutoClip(100)
    scaler = torch.amp.GradScaler(model.device)
    scaler.scale(torch.zeros(1, device=model.device))

    def unscaled() -> None:
        scaler._per_optimizer_states.clear()
        fastclip.unscale_and_clip_(model.optimizer, 1e9, scaler)

    return {
        "op": lambda: model.grads.clip_norm_(1e9, 2.0),
        "list": lambda: fastclip.clip_grad_norm_(made, 1e9),
        "module.parameters()": lambda: fastclip.clip_grad_norm_(model.module.parameters(), 1e9),
        "a rule": lambda: fastclip.clip_grad_norm_(made, rule),
        "GradClipper": clipper.clip_,
        "unscale_and_clip_": unscaled,
        "torch": lambda: utils.clip_grad_norm_(made, 1e9),
    }


def accumulator_calls(model: Model) -> dict[str, Call]:
    norms = fastclip.NormAccumulator(model.module)
    return {
        "op": lambda: model.grads.clip_norm_(1e9, 2.0),
        "NormAccumulator": lambda: norms.clip_(1e9),
        "torch": lambda: utils.clip_grad_norm_(model.made, 1e9),
    }


@pytest.mark.skipif(_ops.extension is None, reason="the walk is part of the extension")
@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.full)])
def bench_parameters(record_text, quick, device, count):
    def measure() -> list[Times]:
        found = []
        for calls in (calls_of, accumulator_calls):
            model = Model(count, device)
            rounds = 2 if quick else 40
            found.append(measured(calls(model), model.backward, rounds, device))
        return found

    where = ", CUDA" * (device == "cuda")
    work = f"{count} parameters{where}, {{}}"
    record_text(measure, lambda found: host_table([(work, times) for times in found]))
