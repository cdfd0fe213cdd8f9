"""Unscaling, clipping and stepping in one pass: equal to torch's sequence, step by step."""

import copy
import doctest
import functools
import math
import pickle

import pytest
import torch
from conftest import Reads, oracle, parameters
from torch import nn
from torch.nn import utils

import fastclip
from fastclip import AutoClip, NormAccumulator, _ops, optim

KINDS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=0.01, amsgrad=True, **how),
    "adagrad": lambda p, **how: torch.optim.Adagrad(p, lr=0.1, **how),
    "rmsprop": lambda p, **how: torch.optim.RMSprop(p, lr=0.01, **how),
}
FUSED = list(KINDS)[:4]
HOW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}
ALL = [(kind, how) for kind in KINDS for how in HOW if (kind, how) != ("rmsprop", "fused")]
OVERFLOWS = (7, 8, 30)


def device_types():
    marks = [pytest.mark.cuda]
    marks.append(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
    return ["cpu", pytest.param("cuda", marks=marks)]


@pytest.fixture(params=device_types())
def place(request):
    return request.param


def network(place: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1)).to(place)


@functools.cache
def missing(kind: str, place: str, divides: bool) -> str:
    """Why this torch has no fused step there, or none that divides. In 2.11 Adagrad on CUDA has no
    step, and none of its steps divides."""
    weight = nn.Parameter(torch.ones(2, device=place))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = KINDS[kind]([weight], fused=True)
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    takes = getattr(optimizer, "_step_supports_amp_scaling", False)
    return "" if takes or not divides else f"{kind} of this torch divides no gradients"


def twins(kind: str, how: str, place: str, divides: bool = False):
    if why := missing(kind, place, divides) if how == "fused" else "":
        pytest.skip(why)
    nets = [network(place) for _ in range(2)]
    return [(net, KINDS[kind](net.parameters(), **HOW[how])) for net in nets]


def scalers(place: str, on: bool):
    return [
        torch.amp.GradScaler(place, init_scale=1024.0, growth_interval=10, enabled=on)
        for _ in range(2)
    ]


def backward(net: nn.Module, scaler, step: int) -> None:
    """Gradients that do not depend on the parameters, so that no rounding grows with the steps."""
    generator = torch.Generator().manual_seed(step)
    loss = 0
    for parameter in net.parameters():
        grad = torch.randn(parameter.shape, generator=generator) * (1 + step % 3)
        loss = loss + (parameter * grad.to(parameter.device)).sum()
    net.zero_grad()
    scaler.scale(loss).backward()
    if step in OVERFLOWS:
        net[2].weight.grad[0, 0] = math.inf if step % 2 else math.nan


def assert_same(ours, theirs, gradients: bool = True) -> None:
    (net, optimizer), (other, reference) = ours, theirs
    close = dict(rtol=1e-5, atol=1e-6, equal_nan=True)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)
        if gradients:
            torch.testing.assert_close(a.grad, b.grad, **close)
    states = (one.state_dict()["state"] for one in (optimizer, reference))
    for a, b in zip(*(s.values() for s in states), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("max_norm", [0.5, 1e9], ids=["clips", "not"])
@pytest.mark.parametrize("on", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize(("kind", "how"), ALL)
def test_unscale_and_clip_is_torchs_sequence(place, kind, how, on, max_norm):
    ours, theirs = twins(kind, how, place)
    scaler, other = scalers(place, on)
    for step in range(40):
        if step in OVERFLOWS and not on:
            continue
        backward(ours[0], scaler, step)
        backward(theirs[0], other, step)
        norm = fastclip.unscale_and_clip_(ours[1], max_norm, scaler)
        other.unscale_(theirs[1])
        expected = utils.clip_grad_norm_(theirs[0].parameters(), max_norm)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, equal_nan=True)
        for one, optimizer in ((scaler, ours[1]), (other, theirs[1])):
            one.step(optimizer)
            one.update()
        assert scaler.state_dict() == other.state_dict()
        assert_same(ours, theirs, gradients=step not in OVERFLOWS)


@pytest.mark.parametrize("max_norm", [0.5, 1e9, "rule"], ids=["clips", "not", "rule"])
@pytest.mark.parametrize("on", [True, False, None], ids=["scaled", "disabled", "none"])
@pytest.mark.parametrize("kind", FUSED)
def test_a_clipped_step_is_torchs_sequence(place, kind, on, max_norm):
    ours, theirs = twins(kind, "fused", place, divides=True)
    rules = [AutoClip(50, 9) if max_norm == "rule" else max_norm for _ in range(2)]
    scaler, other = scalers(place, bool(on))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for _, o in (ours, theirs)]
    for step in range(50):
        backward(ours[0], scaler, step)
        backward(theirs[0], other, step)
        norm = fastclip.clipped_step(ours[1], rules[0], None if on is None else scaler)
        other.unscale_(theirs[1])
        expected = fastclip.clip_grad_norm_(theirs[0].parameters(), rules[1])
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, equal_nan=True)
        if on:
            other.step(theirs[1])
            scaler.update()
            other.update()
        elif step not in OVERFLOWS:
            theirs[1].step()
        for schedule in schedules:
            schedule.step()
        assert scaler.state_dict() == other.state_dict()
        assert_same(ours, theirs, gradients=step not in OVERFLOWS)
        assert not {"grad_scale", "found_inf"} & set(vars(ours[1]))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("on", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("call", ["unscale", "step"])
def test_what_was_measured_during_backward_is_not_measured_again(place, call, on, norm_type):
    ours, theirs = twins("adamw", "fused", place)
    scaler, other = scalers(place, on)
    norms = NormAccumulator(ours[0], norm_type)
    for step in range(32):
        backward(ours[0], scaler, step)
        backward(theirs[0], other, step)
        if step in OVERFLOWS and not on:
            continue
        how = {"norm_type": norm_type, "measured": norms}
        with Reads() as reads:
            if call == "unscale":
                norm = fastclip.unscale_and_clip_(ours[1], 0.5, scaler, **how)
            else:
                norm = fastclip.clipped_step(ours[1], 0.5, scaler, **how)
        assert reads.count == (step in OVERFLOWS) or _ops.extension is None
        if call == "unscale":
            scaler.step(ours[1])
        scaler.update()
        other.unscale_(theirs[1])
        expected = utils.clip_grad_norm_(theirs[0].parameters(), 0.5, norm_type)
        other.step(theirs[1])
        other.update()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, equal_nan=True)
        assert scaler.state_dict() == other.state_dict()
        assert_same(ours, theirs, gradients=step not in OVERFLOWS)


def test_an_accumulator_of_other_gradients_is_refused():
    (net, optimizer), (stranger, _) = twins("adam", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
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
        with pytest.raises(error, match="measured"):
            fastclip.unscale_and_clip_(optimizer, 1.0, scaler, measured=measured, **more)
        with pytest.raises(error, match="measured"):
            fastclip.clipped_step(optimizer, 1.0, scaler, measured=measured, **more)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True))
    # What the optimizer leaves out may be without a gradient.
    stranger.zero_grad()
    fastclip.clipped_step(optimizer, 1.0, scaler, measured=NormAccumulator(both))


def test_several_optimizers_have_one_norm_and_skip_together():
    nets = [[nn.Linear(3, 3), nn.Linear(3, 1)] for _ in range(2)]
    for a, b in zip(*nets, strict=True):
        b.load_state_dict(a.state_dict())
    made = [[KINDS["adamw"](n.parameters(), fused=True) for n in some] for some in nets]
    scaler, other = scalers("cpu", True)
    before = None
    for step in range(6):
        for some, one in zip(nets, (scaler, other), strict=True):
            for net in some:
                net.zero_grad()
            x = torch.ones(2, 3) * (step + 1)
            one.scale(some[1](some[0](x)).square().mean()).backward()
            if step == 3:
                some[1].bias.grad.fill_(math.inf)
                before = copy.deepcopy([n.state_dict() for n in nets[0]])
        if step % 2:
            fastclip.clipped_step(made[0], 0.1, scaler)
        else:
            fastclip.unscale_and_clip_(made[0], 0.1, scaler)
            for optimizer in made[0]:
                scaler.step(optimizer)
        for optimizer in made[1]:
            other.unscale_(optimizer)
        every = [p for n in nets[1] for p in n.parameters()]
        utils.clip_grad_norm_(every, 0.1)
        for optimizer in made[1]:
            if step != 3:
                other.step(optimizer)
        scaler.update()
        other.update()
        assert scaler.state_dict() == other.state_dict()
        if step == 3:
            now = [n.state_dict() for n in nets[0]]
            torch.testing.assert_close(now, before, rtol=0, atol=0)
        for a, b in zip(*nets, strict=True):
            torch.testing.assert_close(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("call", ["unscale", "step"])
def test_a_second_call_raises_as_torch_does(call):
    (net, optimizer), _ = twins("adam", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
    act = {
        "unscale": lambda: fastclip.unscale_and_clip_(optimizer, 1.0, scaler),
        "step": lambda: fastclip.clipped_step(optimizer, 1.0, scaler),
    }[call]
    backward(net, scaler, 0)
    act()
    before = [p.grad.clone() for p in net.parameters()]
    for again in (
        lambda: fastclip.unscale_and_clip_(optimizer, 1.0, scaler),
        lambda: fastclip.clipped_step(optimizer, 1.0, scaler),
        lambda: scaler.unscale_(optimizer),
    ):
        with pytest.raises(RuntimeError, match="unscale"):
            again()
    for parameter, grad in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
    if call == "unscale":
        scaler.step(optimizer)
    scaler.update()
    backward(net, scaler, 1)
    act()


def test_a_step_that_raises_leaves_nothing_behind(monkeypatch):
    (net, optimizer), _ = twins("adamw", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
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


def test_optimizer_and_scaler_are_pickled_afterwards():
    (net, optimizer), _ = twins("adam", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
    backward(net, scaler, 0)
    fastclip.clipped_step(optimizer, 1.0, scaler)
    scaler.update()
    other = pickle.loads(pickle.dumps(scaler))
    assert other.state_dict() == scaler.state_dict()
    state = pickle.loads(pickle.dumps(optimizer)).state_dict()["state"]
    torch.testing.assert_close(state, optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("kind", "how", "way"),
    [
        ("adam", "foreach", "fused=True"),
        ("sgd", "single", "fused=True"),
        ("adagrad", "single", "fused=True and torch 2.12 or newer"),
        ("rmsprop", "single", "unscale_and_clip_"),
    ],
)
def test_an_optimizer_that_cannot_is_told_the_way_out(kind, how, way):
    (net, optimizer), (_, fused) = twins(kind, how, "cpu")[0], twins("adam", "fused", "cpu")[0]
    backward(net, scalers("cpu", False)[0], 0)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=way):
        fastclip.clipped_step([fused, optimizer], 1.0)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_fused_step_that_this_torch_lacks_is_skipped(monkeypatch):
    def refuse(self: object, closure: object = None) -> None:
        raise RuntimeError("supported devices: none")

    class Undivided(torch.optim.Adagrad):
        _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)

    probe = missing.__wrapped__
    assert not probe("adam", "cpu", True)
    with monkeypatch.context() as patch:
        patch.setitem(KINDS, "adagrad", Undivided)
        assert "divides no gradients" in probe("adagrad", "cpu", True)
        assert not probe("adagrad", "cpu", False)
    # As torch does where it has no such step: when the first one is taken.
    monkeypatch.setattr(torch.optim.Adagrad, "step", refuse)
    monkeypatch.setitem(globals(), "missing", probe)
    with pytest.raises(pytest.skip.Exception, match="supported devices"):
        twins("adagrad", "fused", "cpu")


def test_bad_input_is_named_and_changes_nothing():
    (net, optimizer), _ = twins("adam", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
    backward(net, scaler, 0)
    before = [p.grad.clone() for p in net.parameters()]
    half = parameters([torch.ones(2, dtype=torch.float16)])
    halves = torch.optim.AdamW(half, fused=True)
    for call, error, match in (
        (lambda: fastclip.unscale_and_clip_(net, 1.0, scaler), TypeError, "optimizer"),
        (
            lambda: fastclip.unscale_and_clip_(scaler, optimizer, 1.0),
            TypeError,
            r"\(optimizer, max_norm, scaler\)",
        ),
        (lambda: fastclip.unscale_and_clip_(optimizer, 1.0, optimizer), TypeError, "scaler"),
        (lambda: fastclip.unscale_and_clip_(optimizer, -1.0, scaler), ValueError, "max_norm"),
        (lambda: fastclip.clipped_step(net, 1.0), TypeError, "optimizer"),
        (lambda: fastclip.clipped_step(optimizer, 1.0, scaler="x"), TypeError, "scaler"),
        (lambda: fastclip.clipped_step(optimizer, math.nan), ValueError, "max_norm"),
        (lambda: fastclip.unscale_and_clip_(halves, 1.0, scaler), ValueError, "float16"),
    ):
        with pytest.raises(error, match=match):
            call()
        for parameter, grad in zip(net.parameters(), before, strict=True):
            assert torch.equal(parameter.grad, grad)
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
    for max_norm in (1.0, math.inf):
        made = parameters([torch.ones(3)])
        fastclip.clip_grad_norm_(made, max_norm, grad_scale=torch.tensor(-1.0))
        assert made[0].grad.isnan().all()


def test_the_examples_are_right():
    assert doctest.testmod(optim).failed == 0


@pytest.mark.parametrize("p", [0.0, -1.0, -math.inf])
def test_an_order_that_hides_infinities_is_refused(p):
    (net, optimizer), _ = twins("adam", "fused", "cpu")
    scaler, _ = scalers("cpu", True)
    backward(net, scaler, 0)
    for call in (
        lambda: fastclip.unscale_and_clip_(optimizer, 1.0, scaler, norm_type=p),
        lambda: fastclip.clipped_step(optimizer, 1.0, scaler, norm_type=p),
    ):
        with pytest.raises(ValueError, match="norm_type"):
            call()
    with pytest.raises(ValueError, match="norm_type"):
        fastclip.clip_grad_norm_(net.parameters(), 1.0, 0.0, grad_scale=0.5)


def test_a_first_step_that_is_skipped_leaves_no_memory_of_it():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    weight.grad = torch.tensor([math.inf, 1.0])
    fastclip.clipped_step([optimizer, optimizer], 1e9)
    assert not optimizer.state[weight]["momentum_buffer"].any()
    for expected in (-1.0, -2.9):
        weight.grad = torch.ones(2)
        fastclip.clipped_step([optimizer, optimizer], 1e9)
        assert weight.tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_a_first_gradient_is_not_dampened_whatever_was_skipped_before(place, skipped, nesterov):
    how = {"lr": 0.5, "momentum": 0.75, "dampening": 0 if nesterov else 0.25, "nesterov": nesterov}
    weight, still = (nn.Parameter(torch.zeros(2, device=place)) for _ in range(2))
    groups = [{"params": [weight]}, {"params": [still], "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, fused=True, **how)
    expected, buffer = 0.0, None
    for grad in [math.inf] * skipped + [1.0, 2.0, math.inf, 4.0]:
        weight.grad = torch.full((2,), grad, device=place)
        still.grad = torch.zeros(2, device=place)
        fastclip.clipped_step(optimizer, 1e9)
        if grad < math.inf:
            fresh = grad if buffer is None else how["momentum"] * buffer
            buffer = fresh if buffer is None else fresh + (1 - how["dampening"]) * grad
            expected -= 0.5 * (grad + 0.75 * buffer if nesterov else buffer)
        assert weight.tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["float64", "mixed"])
@pytest.mark.parametrize("on", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("kind", FUSED)
def test_a_step_of_float64_parameters_is_as_precise_as_they_are(place, kind, on, mixed):
    if why := missing(kind, place, divides=True):
        pytest.skip(why)
    dtypes = [torch.float64, torch.float32 if mixed else torch.float64]
    values = [torch.randn(50, dtype=torch.float64).to(dtype) for dtype in dtypes]
    made, others = ([nn.Parameter(v.clone().to(place)) for v in values] for _ in range(2))
    # Not so small that a step would not depend on the coefficient.
    how = {} if kind == "sgd" else {"eps": 1.0}
    optimizer, reference = (KINDS[kind](some, fused=True, **how) for some in (made, others))
    scaler = torch.amp.GradScaler(place, init_scale=4.0, enabled=on)
    scaler.scale(torch.ones((), device=place))
    for step in range(4):
        grads = [torch.randn(50, dtype=torch.float64).to(d).to(place) for d in dtypes]
        coef = 0.1 / (oracle(grads, 2.0) + 1e-6)
        for ours, theirs, grad in zip(made, others, grads, strict=True):
            ours.grad = grad * (4 if on else 1)
            theirs.grad = grad * coef
        before = [p.detach().clone() for p in made]
        if step == 1:
            made[1].grad[0] = math.inf
        fastclip.clipped_step(optimizer, 0.1, scaler if on else None)
        if step == 1:
            assert all(torch.equal(p, b) for p, b in zip(made, before, strict=True))
        else:
            reference.step()
        scaler.update(4.0)
        rtol = 1e-6 if mixed else 1e-13
        torch.testing.assert_close(made[0], others[0], rtol=rtol, atol=rtol)
        torch.testing.assert_close(made[1], others[1])


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
        parameters = list(parameters)
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


@pytest.mark.parametrize("on", [True, False, None], ids=["scaled", "disabled", "none"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_clipped_step_goes_through_a_wrapper(wrap, on):
    weight = nn.Parameter(torch.zeros(2))
    wrapper = wrap(torch.optim.SGD([weight], lr=1.0, fused=True))
    scaler = None if on is None else scalers("cpu", on)[0]
    scale = 1024.0 if on else 1.0
    for step, grads in enumerate(([3.0, 4.0], [math.inf, 4.0], [3.0, 4.0])):
        if on:
            scaler.scale(torch.ones(()))
        weight.grad = torch.tensor(grads) * scale
        norm = fastclip.clipped_step([wrapper, wrapper], 1.0, scaler)
        assert norm * scale == math.hypot(*grads) * scale
        if on:
            scaler.update()
            scale = scaler.get_scale()
        taken = [1, 1, 2][step]
        assert weight.tolist() == pytest.approx([-0.6 * taken, -0.8 * taken], rel=1e-5)
    assert wrapper.steps == 3


@pytest.mark.parametrize("steps_inner", [True, False], ids=["inner", "wrapper"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_a_wrapper_holds_is_unscaled_once(wrap, steps_inner):
    weight = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([weight], lr=1.0)
    wrapper, (scaler, _) = wrap(inner), scalers("cpu", True)
    scaler.scale(torch.ones(()))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    assert fastclip.unscale_and_clip_(wrapper, 1.0, scaler) == 5
    for one in (wrapper, inner):
        with pytest.raises(RuntimeError, match="unscale"):
            fastclip.unscale_and_clip_(one, 1.0, scaler)
    scaler.step(inner if steps_inner else wrapper)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.parametrize("kind", ["partitioned", "overridden", "foreach", "scaling"])
def test_a_wrapper_that_cannot_is_refused_by_name(kind):
    weights = parameters([torch.tensor([3.0]), torch.tensor([4.0])])
    scaler, _ = scalers("cpu", True)
    scaler.scale(torch.ones(()))
    optimizer, error, match = {
        "partitioned": lambda: (Partitioned(weights), ValueError, "Partitioned has a step of its"),
        "overridden": lambda: (
            Overridden(weights, lr=1.0, fused=True),
            ValueError,
            "Overridden has a step of its own",
        ),
        "foreach": lambda: (
            Holding(torch.optim.SGD(weights, lr=1.0)),
            ValueError,
            "needs fused=True; got SGD in Holding without it",
        ),
        "scaling": lambda: (
            Holding(torch.optim.SGD(weights, lr=1.0, fused=True), scaler),
            RuntimeError,
            "Holding steps through a scaler of its own; pass the SGD in it",
        ),
    }[kind]()
    for given in (None, scaler):
        with pytest.raises(error, match=match):
            fastclip.clipped_step(optimizer, 1.0, given)
        assert [w.item() for w in weights] == [0, 0]
        assert [w.grad.item() for w in weights] == [3, 4]
    if kind == "scaling":
        fastclip.clipped_step(optimizer.optimizer, 1e-3, scaler)
        assert [w.item() for w in weights] == pytest.approx([-6e-4, -8e-4], rel=1e-3)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", FUSED)
def test_a_copy_of_a_fused_optimizer_steps_as_it_does(kind, way):
    if why := missing(kind, "cpu", divides=True):
        pytest.skip(why)
    optimizer = KINDS[kind]([nn.Parameter(torch.zeros(2))], fused=True)
    weights = []
    for one in (optimizer, way(optimizer)):
        flags = {"grad_scale", "found_inf", "_step_supports_amp_scaling"}
        before = flags & set(vars(one))
        weights += one.param_groups[0]["params"]
        weights[-1].grad = torch.tensor([3.0, 4.0])
        assert fastclip.clipped_step(one, 1.0) == 5
        assert flags & set(vars(one)) == before
    assert torch.equal(*weights)
    assert weights[1].any()
    torch.testing.assert_close(weights[1].grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrapper_with_its_own_scaler_is_refused_before_anything_changes(dtype, copied):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2, dtype=dtype))], lr=1.0, fused=True)
    optimizer = copy.deepcopy(optimizer) if copied else optimizer
    weight = optimizer.param_groups[0]["params"][0]
    scaler, _ = scalers("cpu", True)
    scaler.scale(torch.ones(()))
    weight.grad = torch.tensor([3.0, 4.0], dtype=dtype)
    for given in (None, scaler):
        with pytest.raises(RuntimeError, match="Holding steps through a scaler of its own"):
            fastclip.clipped_step(Holding(optimizer, scaler), 1.0, given)
        assert (weight.tolist(), weight.grad.tolist()) == ([0, 0], [3, 4])


@pytest.mark.parametrize("wide", [False, True])
def test_no_other_optimizer_steps_before_a_wrapper_is_refused(wide):
    dtypes = [torch.float32, torch.float64 if wide else torch.float32]
    weights = parameters([torch.full((2,), 3.0, dtype=dtype) for dtype in dtypes])
    plain, inner = (torch.optim.SGD([w], lr=1.0, fused=True) for w in weights)
    scaler, _ = scalers("cpu", True)
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="Holding steps through a scaler of its own"):
        fastclip.clipped_step([plain, Holding(inner, scaler)], 1.0, scaler)
    for weight in weights:
        assert (weight.tolist(), weight.grad.tolist()) == ([0, 0], [3, 3])
    fastclip.clipped_step([plain, inner], 1.0, scaler)
    assert all(weight.all() for weight in weights)
