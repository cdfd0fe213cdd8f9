"""DTensors in a graph of `torch.compile`: whole graphs with the numbers that there are without."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World

import fastclip

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    made = World(2, tmp_path_factory.mktemp("stores"))
    yield made
    made.stop()


def made(kinds: str, mesh: Any, lacks: bool = False) -> list[torch.nn.Parameter]:
    """A parameter for each letter: sharded by rows, by columns, replicated, or plain."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = {"s": [Shard(0)], "c": [Shard(1)], "r": [Replicate()]}
    torch.manual_seed(0)
    found = []
    for i, kind in enumerate(kinds):
        weight, grad = torch.zeros(3, 5), torch.randn(3, 5) * (i + 1)
        if kind != "p":
            weight = distribute_tensor(weight, mesh, placements[kind])
            grad = distribute_tensor(grad, mesh, placements[kind])
        parameter = torch.nn.Parameter(weight)
        parameter.grad = grad
        found.append(parameter)
    if lacks:
        found[0].grad = None
    return found


def plain(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


CALLS = {
    "clip": lambda ps: fastclip.clip_grad_norm_(ps, 1.5),
    "1": lambda ps: fastclip.clip_grad_norm_(ps, 1.5, 1.0),
    "inf": lambda ps: fastclip.clip_grad_norm_(ps, 1.5, math.inf),
    "3": lambda ps: fastclip.clip_grad_norm_(ps, 1.5, 3.0),
    "-inf": lambda ps: fastclip.clip_grad_norm_(ps, 1e-3, -math.inf),
    "-1": lambda ps: fastclip.clip_grad_norm_(ps, 1e-3, -1.0),
    "value": lambda ps: fastclip.clip_grad_value_(ps, 0.5),
    "total": lambda ps: fastclip.get_total_norm([p.grad for p in ps if p.grad is not None]),
    "scaled": lambda ps: fastclip.clip_grad_norm_(ps, 1.5, grad_scale=0.5),
    "with norm": lambda ps: fastclip.clip_grads_with_norm_(ps, 1.5, torch.tensor(20.0)),
}


def whole_graphs(
    backend: str, kinds: str, names: list[str], lacks: bool = False, spoiled: float = 0.0
) -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    for name in names:
        call = CALLS[name]
        torch._dynamo.reset()
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        for _ in range(2):
            ours, theirs = made(kinds, mesh, lacks), made(kinds, mesh, lacks)
            if spoiled != 0:
                for ps in (ours, theirs):
                    inner = ps[-1].grad
                    inner = inner.to_local() if hasattr(inner, "to_local") else inner
                    if dist.get_rank() == 0:
                        inner.view(-1)[0] = spoiled
            found, expected = compiled(ours), call(theirs)
            if expected is not None:
                assert type(found) is type(expected), name
                torch.testing.assert_close(
                    plain(found), plain(expected), rtol=1e-6, atol=0, equal_nan=True, msg=name
                )
            for one, other in zip(ours, theirs, strict=True):
                if other.grad is not None:
                    torch.testing.assert_close(
                        plain(one.grad), plain(other.grad), rtol=2e-6, atol=0, equal_nan=True
                    )


def partial_sums() -> None:
    from torch.distributed.tensor import DTensor, Partial

    mesh = dist.init_device_mesh("cpu", (2,))
    (weight,) = made("r", mesh)
    weight.grad = DTensor.from_local(torch.ones(3, 5), mesh, [Partial()])
    torch._dynamo.reset()
    norm = torch.compile(CALLS["clip"], backend="aot_eager")([weight])
    assert plain(norm).item() == pytest.approx(2 * 15**0.5)


def test_dtensors_are_in_whole_graphs(world):
    world.run(whole_graphs, "aot_eager", "src", list(CALLS), seconds=120)


def test_a_rank_without_a_gradient_takes_part(world):
    world.run(whole_graphs, "aot_eager", "sp", ["clip", "inf", "-inf", "total"], True, seconds=120)


@pytest.mark.parametrize("spoiled", [math.inf, math.nan])
def test_what_is_not_finite_on_one_rank_is_so_on_all(world, spoiled):
    names = ["clip", "inf", "3"]
    world.run(whole_graphs, "aot_eager", "ss", names, False, spoiled, seconds=120)


def test_inductor(world):
    world.run(whole_graphs, "inductor", "sr", ["clip"], seconds=240)


def test_partial_sums_break_the_graph(world):
    world.run(partial_sums, seconds=120)


def kept_on_all() -> None:
    """A replicated gradient that is infinite on one rank only: no sum over shards tells of it."""
    mesh = dist.init_device_mesh("cpu", (2,))
    parameters = made("sr", mesh)
    before = plain(parameters[0].grad).clone()
    if dist.get_rank() == 0:
        parameters[1].grad.to_local()[0, 0] = math.inf
    torch._dynamo.reset()
    keep = torch.compile(fastclip.clip_grad_norm_, backend="aot_eager")
    keep(parameters, 0.1, nonfinite="keep")
    assert torch.equal(plain(parameters[0].grad), before)


def test_a_policy_is_that_of_all_ranks(world):
    world.run(kept_on_all, seconds=120)
