"""Rules against the papers' formulas, in plain numbers; and steps that are dropped.

What a norm does that is not finite is in test_clipper.py and test_random_clipper.py.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import parameters
from test_random_clipper import Outliers, Percentile, Spikes
from torch import nn

import fastclip
from fastclip import AutoClip, DropSpikes, ZClip


def norms_of_a_run(steps: int, seed: int = 0) -> list[float]:
    """Norms that fall, with spikes."""
    generator = np.random.default_rng(seed)
    norms = 3 * np.exp(-np.arange(steps) / 80) * generator.lognormal(0, 0.3, steps)
    norms[generator.random(steps) < 0.05] *= 30
    return [float(np.float32(n)) for n in norms]


RULES = {
    "autoclip": (AutoClip, Percentile, dict(percentile=10, history=1000)),
    "autoclip-short": (AutoClip, Percentile, dict(percentile=37.5, history=7)),
    "zclip": (ZClip, Outliers, dict(alpha=0.97, z_threshold=2.5, warmup_steps=25)),
    "zclip-short": (ZClip, Outliers, dict(alpha=0.5, z_threshold=1.0, warmup_steps=1)),
    "spikes": (DropSpikes, Spikes, dict(max_norm=1.5, factor=3.0, alpha=0.8, warmup_steps=4)),
    "spikes-often": (DropSpikes, Spikes, dict(max_norm=2, factor=1.5, patience=2)),
}


@pytest.fixture(params=RULES)
def rule(request):
    """A rule, and what it promises to answer to norms."""
    kind, promise, arguments = RULES[request.param]
    return kind(**arguments), lambda norms: list(map(promise(**arguments), norms))


def called(rule, norms, device="cpu", dtype=torch.float32):
    return [float(rule(torch.tensor(n, dtype=dtype, device=device))) for n in norms]


def test_defaults_are_the_papers():
    assert vars(AutoClip()).items() >= {"percentile": 10, "history": 1000}.items()
    assert (ZClip().alpha, ZClip().z_threshold, ZClip().warmup_steps) == (0.97, 2.5, 25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thresholds_are_those_of_the_papers_without_norms_of_0_inf_and_nan(rule, device, dtype):
    ours, formula = rule
    norms = [0.0, math.nan, math.inf, *norms_of_a_run(120)]
    norms[90:] = [50 * norm for norm in norms[90:]]
    for at, odd in ((5, 0.0), (60, math.inf), (70, math.nan), (80, 0.0)):
        norms[at:at] = [odd] * 2
    found, expected = called(ours, norms, device, dtype), formula(norms)
    np.testing.assert_allclose(found, expected, rtol=3e-7 if dtype == torch.float32 else 1e-12)


def test_state_makes_a_round_trip(rule):
    ours, formula = rule
    norms = norms_of_a_run(80)
    fresh, before = copy.deepcopy(ours), ours.state_dict()
    called(ours, norms[:40])
    fresh.load_state_dict(ours.state_dict())
    copies = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), copy.copy(ours)]
    for one in (ours, fresh, *copies):
        np.testing.assert_allclose(called(one, norms[40:]), formula(norms)[40:], rtol=3e-7)
    ours.load_state_dict(before)
    np.testing.assert_allclose(called(ours, norms), formula(norms), rtol=3e-7)
    for bad in ({}, {"mean": torch.zeros(3)}, {**before, "more": torch.zeros(1)}):
        with pytest.raises(ValueError, match="state: expected what state_dict"):
            ours.load_state_dict(bad)


def test_a_state_has_its_names_shapes_and_place_from_the_beginning(rule, device):
    ours, _ = rule

    def kinds():
        return {n: (v.shape, v.dtype, v.device.type) for n, v in ours.state_dict().items()}

    before = kinds()
    called(ours, [1.0, 2.0], device)
    assert kinds() == before
    memory = [value.data_ptr() for value in ours._here.values()]
    ours.load_state_dict(ours.state_dict())
    # What a captured graph writes into goes on being the state.
    assert [value.data_ptr() for value in ours._here.values()] == memory


@pytest.mark.parametrize(
    "answer",
    [2, 0.25, True, np.float32(2), "2", torch.tensor([2.0]), nn.Parameter(torch.tensor(2.0))],
    ids=lambda answer: type(answer).__name__,
)
def test_any_callable_is_a_rule_and_is_asked_once(answer):
    asked = []
    made = parameters([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_(made, lambda norm: asked.append(norm) or answer) == 5
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]) * float(answer))
    assert asked == [5]


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        ("two", TypeError, "max_norm"),
        (None, TypeError, "max_norm"),
        (-1, ValueError, "max_norm: expected a threshold >= 0, got -1"),
        (torch.ones(2), ValueError, "max_norm"),
    ],
)
def test_an_answer_that_is_no_threshold_raises_before_anything_changes(answer, error, match):
    made = parameters([torch.tensor([3.0, 4.0])])
    with pytest.raises(error, match=match):
        fastclip.clip_grad_norm_(made, lambda norm: answer)
    assert made[0].grad.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AutoClip(percentile=101), "percentile"),
        (lambda: AutoClip(percentile=math.nan), "percentile"),
        (lambda: AutoClip(history=0), "history"),
        (lambda: AutoClip(history=2.5), "history"),
        (lambda: ZClip(alpha=1.1), "alpha"),
        (lambda: ZClip(z_threshold=0), "z_threshold"),
        (lambda: ZClip(warmup_steps=0), "warmup_steps"),
        (lambda: DropSpikes(-1.0), "max_norm"),
        (lambda: DropSpikes(1.0, factor=1.0), "factor"),
        (lambda: DropSpikes(1.0, alpha=-0.1), "alpha"),
        (lambda: DropSpikes(1.0, warmup_steps=0), "warmup_steps"),
        (lambda: DropSpikes(1.0, patience=-1), "patience"),
    ],
)
def test_arguments_out_of_range_raise(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        make()


def test_policies_that_contradict_each_other_raise():
    with pytest.raises(ValueError, match="nonfinite: 'zero' and error_if_nonfinite=True"):
        fastclip.clip_grad_norm_([], 1.0, error_if_nonfinite=True, nonfinite="zero")


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "keep"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: 1.5,
        lambda: AutoClip(40, 3),
        lambda: ZClip(0.5, 1.0, warmup_steps=2),
        lambda: DropSpikes(1.0, warmup_steps=2),
    ],
)
def test_rules_and_policies_compile_without_a_break(make, nonfinite):
    torch.compiler.reset()
    ours, eager = make(), make()
    clip = torch.compile(fastclip.clip_grad_norm_, fullgraph=True, backend="aot_eager")
    made, plain = (parameters([torch.ones(2)]) for _ in range(2))
    for norm in (1.0, 2.0, 3.0, 50.0, math.nan, 1.0, 2.5):
        for (weight,) in (made, plain):
            weight.grad = torch.tensor([0.6, 0.8]) * norm
        found = clip(made, ours, nonfinite=nonfinite)
        expected = fastclip.clip_grad_norm_(plain, eager, nonfinite=nonfinite)
        for a, b in ((found, expected), (made[0].grad, plain[0].grad)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if callable(ours):
        assert str(ours.state_dict()) == str(eager.state_dict())


def test_a_rule_sees_no_norm_that_is_refused():
    made = parameters([torch.tensor([math.inf, 1.0])])
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(made, lambda norm: 1 / 0, error_if_nonfinite=True)


# Steps that a rule drops.


def test_the_rule_inside_does_not_see_what_is_dropped():
    rule, fresh = (DropSpikes(AutoClip(100, 50), warmup_steps=2) for _ in range(2))
    assert called(rule, [1.0, 2.0]) == [1, 2]
    state = rule.state_dict()
    fresh.load_state_dict(state)
    for one in (rule, fresh):
        np.testing.assert_equal(called(one, [100.0, 3.0]), [math.nan, 3])
    assert "AutoClip" in rule.describe()
    with pytest.raises(ValueError, match="state: expected no state of a rule"):
        DropSpikes(1.0).load_state_dict(state)


@pytest.mark.parametrize("answer", [math.nan, torch.tensor(math.nan)], ids=["number", "tensor"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "keep", "error"])
def test_a_dropped_step_is_what_nonfinite_says(answer, nonfinite):
    made = parameters([torch.tensor([3.0, 4.0])])
    if nonfinite == "error":
        with pytest.raises(RuntimeError, match="max_norm: it is NaN"):
            fastclip.clip_grad_norm_(made, lambda norm: answer, nonfinite="error")
    else:
        assert fastclip.clip_grad_norm_(made, lambda norm: answer, nonfinite=nonfinite) == 5
    expected = {"zero": [0.0, 0.0], "propagate": [math.nan] * 2}.get(nonfinite, [3.0, 4.0])
    assert made[0].grad.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("call", [fastclip.clipped_step, fastclip.unscale_and_clip_])
def test_the_step_itself_is_skipped(call, scaled):
    weight = nn.Parameter(torch.zeros(1))
    in_step = call is fastclip.clipped_step
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=in_step)
    # Without a scaler nothing skips the step after a clip.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled or not in_step)
    rule = DropSpikes(math.inf, warmup_steps=1)
    moved = []
    for value in (1.0, 100.0, 2.0):
        weight.grad = None
        before = float(weight)
        scaler.scale((weight * value).sum()).backward()
        assert call(optimizer, rule, scaler) == pytest.approx(value)
        if not in_step:
            assert float(weight.grad) == pytest.approx(value)
            scaler.step(optimizer)
        scaler.update(4.0)
        moved.append(before - float(weight))
    assert moved == pytest.approx([1.0, 0.0, 2.0])
