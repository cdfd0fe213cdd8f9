"""The host's time of a call on small gradients, torch's beside it: in a loop, after a backward
pass, and with cold caches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_mesh import SIZE, alone, dtensors, join
from conftest import medians
from report import markdown
from torch import Tensor, nn
from torch.nn import utils

import fastclip
from fastclip import _ops

pytestmark = [
    pytest.mark.skipif(_ops.extension is None, reason="the walk is part of the extension"),
    pytest.mark.parametrize("device", ["cpu"]),
]
HEADER = ["work", "when", "fastclip µs", "op µs", "beyond it", "torch µs", "x torch"]
Calls = dict[str, Callable[[], object]]


class Model:
    """`count` parameters, and the backward pass that a training loop has before a clip."""

    def __init__(self, count: int) -> None:
        self.module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(count // 2)])
        self.made = list(self.module.parameters())
        self.optimizer = torch.optim.SGD(self.made, lr=0.0)
        self.input = torch.randn(4, 8)
        self.backward("op")

    def backward(self, name: str) -> None:
        """What is read here is in the cache for the call that follows: only for the op alone."""
        self.module.zero_grad()
        self.module(self.input).square().sum().backward()
        self.grads = _ops.extension.read_grads(self.made) if name == "op" else None


def sweep(memory: Tensor = torch.zeros(16 << 20)) -> None:  # noqa: B008
    memory.add_(1)


def measured(calls: Calls, backward: Callable[[str], None], rounds: int) -> dict[str, Any]:
    """Microseconds of each call, by when."""
    warm, cold = medians(calls, rounds), medians(calls, rounds, 0.0, lambda _: sweep())
    after = medians(calls, rounds, 0.0, backward)
    return {"in a loop": warm, "after backward": after, "cold caches": cold}


def lines(name: str, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for who in [*found["in a loop"]][:-1]:
        for when, us in found.items():
            op, torchs = us.get("op"), us["torch"]
            beyond = ["-", "-"] if op is None else [f"{op:.1f}", f"{us[who] - op:.1f}"]
            rows.append([name.format(who), when, f"{us[who]:.1f}", *beyond])
            rows[-1] += [f"{torchs:.0f}", f"{torchs / us[who]:.1f}"]
    return rows


def calls_of(model: Model) -> Calls:
    made = model.made
    clipper = fastclip.GradClipper(model.module, 1e9)
    rule = fastclip.AutoClip(100)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))

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


def gathered(model: Model) -> Calls:
    norms = fastclip.NormAccumulator(model.module)
    return {
        "op": lambda: model.grads.clip_norm_(1e9, 2.0),
        "NormAccumulator": lambda: norms.clip_(1e9),
        "torch": lambda: utils.clip_grad_norm_(model.made, 1e9),
    }


def over_meshes(rank: int, folder: str, works: list[tuple[int, tuple]], rounds: int) -> list[Any]:
    join("fake", rank, 8, folder)
    model, found = Model(300), []
    for count, shape in works:
        made = dtensors(count, dist.init_device_mesh("cpu", shape))

        def backward(name: str, made: list[nn.Parameter] = made) -> None:
            for parameter in made:
                parameter.grad = type(parameter.grad)(
                    torch.randn(SIZE), parameter._spec, requires_grad=False
                )
            model.backward(name)

        calls = {
            "fastclip": lambda made=made: fastclip.clip_grad_norm_(made, 1e9),
            "torch": lambda made=made: utils.clip_grad_norm_(made, 1e9),
        }
        found.append(measured(calls, backward, rounds))
    return found


def report(benchmark: Any, where: dict[str, str], rows: list[list[str]]) -> None:
    table = "\n".join(markdown([HEADER, *rows]))
    benchmark.extra_info.update(where=where, host=table, correct=True)
    print("", table, sep="\n")


@pytest.mark.parametrize("count", [300, 1000])
def bench_parameters(benchmark, where, request, count):
    rounds = 2 if request.config.getoption("--quick") else 40
    rows = []

    def run() -> None:
        for of in (calls_of, gathered):
            model = Model(count)
            rows.extend(
                lines(f"{count} parameters, {{}}", measured(of(model), model.backward, rounds))
            )

    benchmark.pedantic(run, rounds=1)
    report(benchmark, where, [row for row in rows if not row[0].endswith(", op")])


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def bench_dtensors(benchmark, where, request):
    quick = request.config.getoption("--quick")
    counts, rounds = ([5], 2) if quick else ([300, 1000], 25)
    works = [(count, shape) for count in counts for shape in ((8,), (4, 2))]
    found = []
    benchmark.pedantic(lambda: found.extend(alone(over_meshes, works, rounds)), rounds=1)
    rows = []
    for (count, shape), times in zip(works, found, strict=True):
        rows += lines(f"{count} DTensors, mesh of {' x '.join(map(str, shape))}", times)
    report(benchmark, where, rows)
