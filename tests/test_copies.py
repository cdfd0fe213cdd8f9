"""Copies and pickles of clippers, accumulators and what holds one: each goes on by itself."""

import copy
import io
import math
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import Reads, oracle
from torch import nn

import fastclip
from fastclip import AutoClip, GradClipper, NormAccumulator, _ops


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), saved_and_loaded]


@pytest.fixture(params=COPIES, ids=["deepcopy", "pickle", "save"])
def copied(request):
    return request.param


CLIPPERS = {
    "module": lambda t: GradClipper(t.model, 2.0),
    "optimizer": lambda t: GradClipper(t.optimizer, 2.0),
    "names": lambda t: GradClipper(t.model.named_parameters(), torch.tensor(2.0)),
    "rule": lambda t: GradClipper(t.model, AutoClip(0, 2)),
    "groups": lambda t: GradClipper(
        groups=[{"params": t.model, "max_norm": AutoClip(0, 2)}, {"params": [], "max_norm": 2.0}]
    ),
}


class Trainer:
    """What frameworks copy whole."""

    def __init__(self, kind: str, steps: int = 1) -> None:
        self.kind = kind
        self.model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model.clipper = CLIPPERS[kind](self)
        self.norms: list[float] = []
        for step in range(steps):
            self.step(3.0 + step)

    def step(self, value: float) -> float:
        """Clip gradients of this norm; their norm after it."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, value / math.sqrt(size))
        self.model.clipper.clip_()
        self.norms.append(value)
        return oracle(grads_of(self.model), 2.0)

    def expected(self) -> float:
        is_rule = self.kind in ("rule", "groups")
        return min(self.norms[-1], min(self.norms[-2:]) if is_rule else 2.0)

    def check(self) -> None:
        stats = self.model.clipper.stats()
        stats = stats.get("0", stats)
        assert stats["total_norm"] == pytest.approx(self.norms)
        assert stats["steps"] == len(self.norms)


@pytest.mark.parametrize("kind", CLIPPERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_clips_what_it_holds_and_the_original_its_own(copied, kind, steps):
    ours = Trainer(kind, steps)
    twin = copied(ours)
    for one, value in ((ours, 5.0), (twin, 70.0), (twin, 8.0), (ours, 1.0), (ours, 6.0)):
        other = twin if one is ours else ours
        before = grads_of(other.model)
        assert one.step(value) == pytest.approx(one.expected(), rel=1e-5)
        assert all(map(torch.equal, grads_of(other.model), before))
    ours.check()
    twin.check()


def grads_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_a_shallow_copy_clips_the_same_parameters():
    ours = Trainer("module")
    ours.model.clipper = copy.copy(ours.model.clipper)
    assert ours.step(5.0) == pytest.approx(2.0, rel=1e-5)


def test_a_copy_looks_again_when_its_module_changes(copied):
    twin = copied(Trainer("module"))
    twin.step(3.0)
    twin.model[0].weight = nn.Parameter(torch.zeros(3))
    twin.step(4.0)
    twin.check()


def spawned(trainer: Trainer, value: float) -> list[float]:
    for step in range(3):
        trainer.step(value + step)
    return trainer.model.clipper.stats()["total_norm"]


@pytest.mark.slow
def test_spawned_processes_go_on_from_one_state_each_in_its_own_memory():
    ours, values = Trainer("rule"), (10.0, 20.0)
    with ProcessPoolExecutor(2, torch.multiprocessing.get_context("spawn")) as pool:
        found = pool.map(spawned, [ours, ours], values, timeout=120)
        for value, norms in zip(values, found, strict=True):
            assert norms == pytest.approx([3.0, value, value + 1, value + 2])
    ours.step(5.0)
    ours.check()


# NormAccumulator


def backward(module: nn.Module) -> None:
    module.zero_grad()
    module(torch.tensor([[3.0, 4.0]])).square().sum().backward()


def check(norms: NormAccumulator, module: nn.Module) -> int:
    """That it clips to half the norm of what the gradients are; how many it reads for that."""
    backward(module)
    before = grads_of(module)
    expected = oracle(before, 2.0)
    with Reads() as reads:
        assert float(norms.clip_(expected / 2)) == pytest.approx(expected, rel=1e-6)
    for grad, old in zip(grads_of(module), before, strict=True):
        torch.testing.assert_close(grad, old / 2)
    return reads.count


@pytest.mark.parametrize("is_held", [True, False], ids=["in the module", "beside it"])
def test_the_copy_of_an_accumulator_measures_in_the_clip_and_says_so(copied, is_held):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    norms = NormAccumulator(module)
    if is_held:
        module.norms = norms
    backward(module)
    twin, copy_ = copied((module, norms))
    again = copied(copy_)
    if _ops.extension is not None:
        with pytest.warns(UserWarning, match="is a copy and has no hooks"):
            check(copy_, twin)
        with pytest.warns(UserWarning, match="is a copy and has no hooks"):
            again.clip_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(copy_, twin)
        read = check(norms, module)
        assert read == 0 or _ops.extension is None
        assert check(NormAccumulator(twin), twin) == read
        backward(twin)
        expected = oracle(grads_of(twin), 2.0)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, fused=True)
        norm = fastclip.clipped_step(optimizer, 0.1, measured=copy_)
        assert float(norm) == pytest.approx(expected, rel=1e-6)
        norms.remove()
        twin, removed = copied((module, norms))
        check(removed, twin)
        with copy_.pause():
            copy_.forget()
        copy_.remove()
