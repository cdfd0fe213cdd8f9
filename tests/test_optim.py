"""Unscaling, clipping and stepping in one pass, on any device, in wrappers, and what is refused.

test_random_steps.py has other optimizers, thresholds and dtypes, on the CPU.
"""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
from conftest import Reads, name_of, parameters, without_emulation
from torch import nn

import fastclip
from fastclip import NormAccumulator, _ops

KINDS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=0.01, amsgrad=True, **how),
    "adagrad": lambda p, **how: torch.optim.Adagrad(p, lr=0.1, **how),
}
OVERFLOWS = (7, 8, 30)


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1))
    return net.to(device)


@functools.cache
def missing(kind: str, device: str, divides: bool) -> str:
    """Why this torch has no fused step there, or none that divides. In 2.11 Adagrad on CUDA has no
    step, and none of its steps divides."""
    weight = nn.Parameter(torch.ones(2, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = KINDS[kind]([weight], fused=True)
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    takes = getattr(optimizer, "_step_supports_amp_scaling", False)
    return "" if takes or not divides else f"{kind} of this torch divides no gradients"


def twins(kind: str = "adam", device: str = "cpu", divides: bool = False):
    if why := missing(kind, device, divides):
        pytest.skip(why)
    nets = [network(device) for _ in range(2)]
    return [(net, KINDS[kind](net.parameters(), fused=True)) for net in nets]


def a_scaler(device: str = "cpu", on: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=10, enabled=on)


def backward(net: nn.Module, scaler, step: int) -> None:
    """Gradients that do not depend on the parameters, so that no rounding grows with the steps."""
    generator = torch.Generator().manual_seed(step)
    loss = 0
    for parameter in net.parameters():
        grad = torch.randn(parameter.shape, generator=generator) * (1 + step % 3)
        loss = loss + (parameter * grad.to(parameter)).sum()
    net.zero_grad()
    scaler.scale(loss).backward()
    if step in OVERFLOWS:
        net[2].weight.grad[0, 0] = math.inf if step % 2 else math.nan


def held(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> list[object]:
    grads = [] if step in OVERFLOWS else [parameter.grad for parameter in net.parameters()]
    return [*net.parameters(), *grads, optimizer.state_dict()["state"]]


@without_emulation
@pytest.mark.parametrize("on", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("in_step", [True, False], ids=["step", "unscale"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torchs_sequence(device, kind, in_step, measured, on):
    ours, theirs = twins(kind, device, in_step)
    scaler, other = (a_scaler(device, on) for _ in range(2))
    given = {"measured": NormAccumulator(ours[0])} if measured else {}
    for step in range(32):
        if step in OVERFLOWS and not (on or in_step):
            continue
        backward(ours[0], scaler, step)
        backward(theirs[0], other, step)
        call = fastclip.clipped_step if in_step else fastclip.unscale_and_clip_
        with Reads() as reads:
            norm = call(ours[1], 0.5, scaler if on or not in_step else None, **given)
        # What was changed after it was measured is measured again.
        assert not measured or _ops.extension is None or reads.count == (step in OVERFLOWS)
        other.unscale_(theirs[1])
        expected = fastclip.clip_grad_norm_(theirs[0].parameters(), 0.5)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, equal_nan=True)
        if not in_step:
            scaler.step(ours[1])
        if on or step not in OVERFLOWS:
            other.step(theirs[1])
        for one in (scaler, other):
            one.update()
        assert scaler.state_dict() == other.state_dict()
        close = dict(rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(held(*ours, step), held(*theirs, step), **close)
        assert not {"grad_scale", "found_inf"} & set(vars(ours[1]))


def test_an_accumulator_of_other_gradients_is_refused():
    (net, optimizer), (stranger, _) = twins()
    scaler = a_scaler()
    backward(net, scaler, 0)
    backward(stranger, scaler, 0)
    before = [p.grad.clone() for p in net.parameters()]
    both = list(net.parameters()) + list(stranger.parameters())
    for measured, more, error in (
        (NormAccumulator(stranger), {}, ValueError),
        (NormAccumulator(both), {}, ValueError),
        (NormAccumulator(net, 1.0), {}, ValueError),
        (NormAccumulator(net), {"process_group": "any"}, ValueError),
        (2.0, {}, TypeError),
    ):
        for call in (fastclip.unscale_and_clip_, fastclip.clipped_step):
            with pytest.raises(error, match="measured"):
                call(optimizer, 1.0, scaler, measured=measured, **more)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))
    # What the optimizer leaves out may be without a gradient.
    stranger.zero_grad()
    fastclip.clipped_step(optimizer, 1.0, scaler, measured=NormAccumulator(both))


@pytest.mark.parametrize("call", [fastclip.unscale_and_clip_, fastclip.clipped_step])
def test_a_second_call_raises_as_torch_does(call):
    (net, optimizer), _ = twins()
    scaler = a_scaler()
    backward(net, scaler, 0)
    call(optimizer, 1.0, scaler)
    before = [p.grad.clone() for p in net.parameters()]
    for again in (
        lambda: fastclip.unscale_and_clip_(optimizer, 1.0, scaler),
        lambda: fastclip.clipped_step(optimizer, 1.0, scaler),
        lambda: scaler.unscale_(optimizer),
    ):
        with pytest.raises(RuntimeError, match="unscale"):
            again()
    assert all(map(torch.equal, before, (p.grad for p in net.parameters())))
    if call is fastclip.unscale_and_clip_:
        scaler.step(optimizer)
    scaler.update()
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == scaler.state_dict()
    backward(net, scaler, 1)
    call(optimizer, 1.0, scaler)


def test_a_step_that_raises_leaves_nothing_behind(monkeypatch):
    (net, optimizer), _ = twins()
    scaler = a_scaler()
    backward(net, scaler, 0)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fastclip.clipped_step(optimizer, 1.0, scaler)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    optimizer.grad_scale = None
    fastclip.clipped_step(optimizer, 1.0)
    assert vars(optimizer)["grad_scale"] is None
    assert "found_inf" not in vars(optimizer)


def test_bad_input_is_named_and_changes_nothing():
    (net, optimizer), _ = twins()
    scaler = a_scaler()
    backward(net, scaler, 0)
    before = [p.grad.clone() for p in net.parameters()]
    halves = torch.optim.AdamW(parameters([torch.ones(2, dtype=torch.float16)]), fused=True)
    both = fastclip.unscale_and_clip_, fastclip.clipped_step
    for calls, arguments, error, match in (
        (both, (net, 1.0, scaler), TypeError, "optimizer"),
        (both[:1], (scaler, optimizer, 1.0), TypeError, r"\(optimizer, max_norm, scaler\)"),
        (both, (optimizer, 1.0, optimizer), TypeError, "scaler"),
        (both, (optimizer, -1.0, scaler), ValueError, "max_norm"),
        (both, (optimizer, math.nan, scaler), ValueError, "max_norm"),
        (both, (halves, 1.0, scaler), ValueError, "float16"),
    ):
        for call in calls:
            with pytest.raises(error, match=match):
                call(*arguments)
    # These orders hide infinite gradients.
    for call, p in itertools.product(both, (0.0, -1.0, -math.inf)):
        with pytest.raises(ValueError, match="norm_type"):
            call(optimizer, 1.0, scaler, norm_type=p)
    assert all(map(torch.equal, before, (p.grad for p in net.parameters())))
    fastclip.unscale_and_clip_(optimizer, 1.0, scaler)


@pytest.mark.parametrize("factor", [0.25, 3.0, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e9, lambda norm: norm / 2])
def test_a_factor_is_applied_before_the_norm_is_taken(factor, max_norm):
    grads = [torch.randn(300), torch.randn(4, 5)]
    made, others = parameters(grads), parameters([g * float(factor) for g in grads])
    norm = fastclip.clip_grad_norm_(made, max_norm, grad_scale=factor)
    torch.testing.assert_close(norm, fastclip.clip_grad_norm_(others, max_norm))
    for one, other in zip(made, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_factor_that_is_none_is_refused_or_seen():
    made = parameters([torch.ones(3)])
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="grad_scale"):
            fastclip.clip_grad_norm_(made, 1.0, grad_scale=factor)
    with pytest.raises(ValueError, match="norm_type"):
        fastclip.clip_grad_norm_(made, 1.0, 0.0, grad_scale=0.5)
    for max_norm in (1.0, math.inf):
        made = parameters([torch.ones(3)])
        fastclip.clip_grad_norm_(made, max_norm, grad_scale=torch.tensor(-1.0))
        assert made[0].grad.isnan().all()


@without_emulation
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_a_first_gradient_is_not_dampened_whatever_was_skipped_before(device, skipped, nesterov):
    how = {"lr": 0.5, "momentum": 0.75, "dampening": 0 if nesterov else 0.25, "nesterov": nesterov}
    weight = nn.Parameter(torch.zeros(2, device=device))
    optimizer = torch.optim.SGD([weight], fused=True, **how)
    expected, buffer = 0.0, None
    for grad in [math.inf] * skipped + [1.0, 2.0, math.inf, 4.0]:
        weight.grad = torch.full((2,), grad, device=device)
        fastclip.clipped_step(optimizer, 1e9)
        if grad < math.inf:
            fresh = grad if buffer is None else how["momentum"] * buffer
            buffer = fresh if buffer is None else fresh + (1 - how["dampening"]) * grad
            expected -= 0.5 * (grad + 0.75 * buffer if nesterov else buffer)
        assert weight.tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 1e-3])
def test_coefficients_too_small_to_invert_clip_all_the_same(max_norm):
    made, others = parameters([torch.full((2,), 2e38)]), parameters([torch.full((2,), 2e38)])
    norm = fastclip.clipped_step(torch.optim.SGD(made, lr=1.0, fused=True), max_norm)
    torch.testing.assert_close(norm, fastclip.clip_grad_norm_(others, max_norm))
    assert (made[0].grad > 0).all() == (max_norm > 0)
    assert made[0].grad.isfinite().all()


class Delegating:
    """Claims the class of what it holds, as the optimizers of Lightning and Fabric do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        cls = type(self)
        self.__class__ = type(cls.__name__, (cls, type(optimizer)), {})
        self._optimizer, self.steps = optimizer, 0

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None):
        self.steps += 1
        return self._optimizer.step(closure=closure or (lambda: None))


class Holding(torch.optim.Optimizer):
    """Holds an optimizer and no parameters, as that of accelerate does."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler=None) -> None:
        self.optimizer, self.scaler, self.steps = optimizer, scaler, 0

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.steps += 1
        inner = self.optimizer
        return inner.step() if self.scaler is None else self.scaler.step(inner)


class Partitioned(torch.optim.Optimizer):
    """Its own one steps a part of the parameters, as in a ZeroRedundancyOptimizer."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"fused": True})
        self.optim = torch.optim.SGD(parameters[:1], lr=1.0, fused=True)

    def step(self, closure=None):
        return self.optim.step()


class Overridden(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


WRAPPERS = {
    "delegating": Delegating,
    "holding": Holding,
    "nested": lambda optimizer: Delegating(Holding(optimizer)),
}


def sgd(weights, fused: bool = True):
    return torch.optim.SGD(weights, lr=1.0, fused=fused)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_clipped_step_is_one_step_of_the_wrapper(wrap):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    wrapper = wrap(sgd([weight]))
    assert fastclip.clipped_step([wrapper, wrapper], 1.0) == 5
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
    assert wrapper.steps == 1


@pytest.mark.parametrize("steps_inner", [True, False], ids=["inner", "wrapper"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_a_wrapper_holds_is_unscaled_once(wrap, steps_inner):
    weight = nn.Parameter(torch.zeros(2))
    inner = sgd([weight], fused=False)
    wrapper, scaler = wrap(inner), a_scaler()
    scaler.scale(torch.ones(()))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    assert fastclip.unscale_and_clip_(wrapper, 1.0, scaler) == 5
    for one in (wrapper, inner):
        with pytest.raises(RuntimeError, match="unscale"):
            fastclip.unscale_and_clip_(one, 1.0, scaler)
    scaler.step(inner if steps_inner else wrapper)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


OWN_STEP, OWN_SCALER = "has a step of its own", "Holding steps through a scaler of its own"
REFUSED = {
    "foreach": (lambda ws, _: KINDS["adam"](ws, foreach=True), "needs fused=True; got Adam"),
    "adagrad": (lambda ws, _: KINDS["adagrad"](ws), "fused=True and torch 2.12 or newer"),
    "rmsprop": (lambda ws, _: torch.optim.RMSprop(ws), "unscale_and_clip_"),
    "partitioned": (lambda ws, _: Partitioned(ws), f"Partitioned {OWN_STEP}"),
    "overridden": (lambda ws, _: Overridden(ws, fused=True), f"Overridden {OWN_STEP}"),
    "holding": (lambda ws, _: Holding(sgd(ws, fused=False)), "fused=True; got SGD in Holding"),
    "scaling": (lambda ws, scaler: Holding(sgd(ws), scaler), OWN_SCALER + "; pass the SGD in"),
    "copied": (lambda ws, scaler: Holding(copy.deepcopy(sgd(ws)), scaler), OWN_SCALER),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_clip_in_its_step_is_refused_before_any_other_steps(kind, dtype):
    weights = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float32, dtype, dtype)]
    scaler, (make, match) = a_scaler(), REFUSED[kind]
    scaler.scale(torch.ones(()))
    both = plain, other = sgd(weights[:1]), make(weights[1:], scaler)
    weights = [w for one in both for group in one.param_groups for w in group["params"]]
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    error = RuntimeError if kind in ("scaling", "copied") else ValueError
    for given in (None, scaler):
        with pytest.raises(error, match=match):
            fastclip.clipped_step(both, 1.0, given)
        for weight in weights:
            assert (weight.tolist(), weight.grad.tolist()) == ([0, 0], [3, 3])
    if error is RuntimeError:
        fastclip.clipped_step([plain, other.optimizer], 1.0, scaler)
        assert all(weight.all() for weight in weights)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_a_fused_optimizer_steps_as_it_does(way):
    optimizer = sgd([nn.Parameter(torch.zeros(2))])
    for one in (optimizer, way(optimizer)):
        flags = {"grad_scale", "found_inf", "_step_supports_amp_scaling"}
        before = flags & set(vars(one))
        (weight,) = one.param_groups[0]["params"]
        weight.grad = torch.tensor([3.0, 4.0])
        assert fastclip.clipped_step(one, 1.0) == 5
        assert flags & set(vars(one)) == before
        torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
