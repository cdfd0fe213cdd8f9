"""DTensors in a graph of `torch.compile`: whole graphs with the numbers that there are without."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import oracle, ulps
from ranks import on_ranks
from test_mesh import full, grads_of, here, plain, spread
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fastclip

pytestmark = pytest.mark.slow


def made(kinds: str, mesh: Any, lacks: bool = False) -> list[nn.Parameter]:
    """A parameter for each letter: sharded by rows, by columns, replicated, or plain."""
    placements = {"s": Shard(0), "c": Shard(1), "r": Replicate()}
    torch.manual_seed(0)
    found = [
        plain(3, 5) if kind == "p" else spread((3, 5), mesh, placements[kind]) for kind in kinds
    ]
    if lacks:
        found[0].grad = None
    return found


check_close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=0, equal_nan=True)
CALLS = {
    "clip": lambda ps: fastclip.clip_grad_norm_(ps, 1.5),
    "value": lambda ps: fastclip.clip_grad_value_(ps, 0.5),
    "total": lambda ps: fastclip.get_total_norm([p.grad for p in ps if p.grad is not None]),
    "scaled": lambda ps: fastclip.clip_grad_norm_(ps, 1.5, grad_scale=0.5),
    "with norm": lambda ps: fastclip.clip_grads_with_norm_(ps, 1.5, torch.tensor(20.0)),
} | {
    str(p): lambda ps, p=p: fastclip.clip_grad_norm_(ps, 1e-3, p)
    for p in (1.0, 3.0, math.inf, -math.inf, -1.0)
}


def check_graphs(
    names: Iterable[str],
    kinds: str,
    lacks: bool = False,
    spoiled: float | None = None,
    backend: str = "aot_eager",
) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        torch._dynamo.reset()
        compiled = torch.compile(CALLS[name], backend=backend, fullgraph=True)
        for _ in range(2):
            ours, theirs = made(kinds, mesh, lacks), made(kinds, mesh, lacks)
            if spoiled is not None and dist.get_rank() == 0:
                for ps in (ours, theirs):
                    here(ps[-1].grad).view(-1)[0] = spoiled
            found, expected = compiled(ours), CALLS[name](theirs)
            if expected is not None:
                assert type(found) is type(expected), name
                check_close(full(found), full(expected))
            for one, other in zip(ours, theirs, strict=True):
                if other.grad is not None:
                    check_close(full(one.grad), full(other.grad))


@pytest.mark.parametrize(
    ("names", "kinds", "how"),
    [
        (list(CALLS), "src", {}),
        # A rank without a gradient takes part.
        (["clip", "inf", "-inf", "total"], "sp", {"lacks": True}),
        # What is not finite on one rank is so on all.
        (["clip", "inf", "3.0"], "ss", {"spoiled": math.inf}),
        (["clip", "inf", "3.0"], "ss", {"spoiled": math.nan}),
        (["clip"], "sr", {"backend": "inductor"}),
    ],
)
@on_ranks(2, seconds=240)
def test_dtensors_are_in_whole_graphs(names, kinds, how):
    check_graphs(names, kinds, **how)


@on_ranks(2, seconds=120)
def test_partial_sums_and_process_groups_break_the_graph():
    mesh = init_device_mesh("cpu", (2,))
    (weight,) = made("r", mesh)
    weight.grad = DTensor.from_local(torch.ones(3, 5), mesh, [Partial()])
    torch._dynamo.reset()
    norm = torch.compile(CALLS["clip"], backend="aot_eager")([weight])
    assert full(norm).item() == pytest.approx(2 * 15**0.5)
    shards = made("p", mesh)
    expected = math.sqrt(2) * oracle(grads_of(shards), 2)
    clip = lambda ps: fastclip.clip_grad_norm_(ps, 1e9, process_group=dist.group.WORLD)  # noqa: E731
    assert ulps(torch.compile(clip, backend="aot_eager")(shards), expected) <= 2


@on_ranks(2, seconds=120)
def test_a_policy_is_that_of_all_ranks():
    """A replicated gradient that is infinite on one rank only: no sum over shards tells of it."""
    parameters = made("sr", init_device_mesh("cpu", (2,)))
    before = full(parameters[0].grad).clone()
    if dist.get_rank() == 0:
        parameters[1].grad.to_local()[0, 0] = math.inf
    torch._dynamo.reset()
    keep = torch.compile(fastclip.clip_grad_norm_, backend="aot_eager")
    keep(parameters, 0.1, nonfinite="keep")
    assert torch.equal(full(parameters[0].grad), before)
