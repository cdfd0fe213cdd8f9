"""Rules against the papers' published code, restated in NumPy; and what a non-finite norm does."""

import copy
import doctest
import gc
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import parameters
from torch import nn

import fastclip
from fastclip import AutoClip, ZClip, _ops, rules


def norms_of_a_run(steps: int, seed: int = 0) -> list[float]:
    """Norms that fall, with spikes."""
    generator = np.random.default_rng(seed)
    norms = 3 * np.exp(-np.arange(steps) / 80) * generator.lognormal(0, 0.3, steps)
    norms[generator.random(steps) < 0.05] *= 30
    return [float(np.float32(n)) for n in norms]


def autoclip(norms: list[float], percentile: float, history: int) -> list[float]:
    return [
        float(np.percentile(norms[max(0, i + 1 - history) : i + 1], percentile))
        for i in range(len(norms))
    ]


def zclip(norms: list[float], alpha: float, z_threshold: float, warmup: int) -> list[float]:
    found, first = [], []
    mean = variance = 0.0
    for norm in norms:
        if len(first) < warmup:
            first.append(norm)
            mean, variance = np.mean(first), np.var(first)
            found.append(math.inf)
            continue
        deviation = math.sqrt(variance)
        z = (norm - mean) / (deviation + 1e-6)
        threshold = mean + z_threshold * deviation / (z / z_threshold) if z > z_threshold else None
        effective = norm if threshold is None else threshold
        mean = alpha * mean + (1 - alpha) * effective
        variance = alpha * variance + (1 - alpha) * (effective - mean) ** 2
        found.append(math.inf if threshold is None else threshold)
    return found


RULES = {
    "autoclip": (AutoClip, dict(percentile=10, history=1000), autoclip),
    "autoclip-short": (AutoClip, dict(percentile=37.5, history=7), autoclip),
    "autoclip-one": (AutoClip, dict(percentile=100, history=1), autoclip),
    "zclip": (ZClip, dict(alpha=0.97, z_threshold=2.5, warmup_steps=25), zclip),
    "zclip-short": (ZClip, dict(alpha=0.5, z_threshold=1.0, warmup_steps=1), zclip),
}


@pytest.fixture(params=RULES)
def rule(request):
    kind, arguments, formula = RULES[request.param]
    return kind(**arguments), lambda norms: formula(norms, *arguments.values())


def called(rule, norms, device="cpu", dtype=torch.float32):
    return [float(rule(torch.tensor(n, dtype=dtype, device=device))) for n in norms]


def test_defaults_are_the_papers():
    assert vars(AutoClip()).items() >= {"percentile": 10, "history": 1000}.items()
    assert (ZClip().alpha, ZClip().z_threshold, ZClip().warmup_steps) == (0.97, 2.5, 25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thresholds_are_those_of_the_published_code(rule, device, dtype):
    ours, formula = rule
    norms = norms_of_a_run(120)
    found, expected = called(ours, norms, device, dtype), formula(norms)
    np.testing.assert_allclose(found, expected, rtol=3e-7 if dtype == torch.float32 else 1e-12)


def test_a_norm_that_is_not_finite_never_enters_the_state(rule):
    ours, formula = rule
    norms = norms_of_a_run(60)
    found = []
    for i, norm in enumerate(norms):
        if i % 7 == 3:
            called(ours, [math.inf, math.nan])
        found += called(ours, [norm])
    np.testing.assert_allclose(found, formula(norms), rtol=3e-7)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("steps", [0, 3, 60])
def test_a_norm_that_is_not_finite_spoils_the_gradients_as_in_torch(rule, bad, steps):
    ours, _ = rule
    called(ours, norms_of_a_run(60)[:steps])
    made = parameters([torch.tensor([1.0, bad, 2.0])])
    fastclip.clip_grad_norm_(made, ours)
    assert made[0].grad.isnan().any()


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


def test_ten_thousand_steps_take_no_memory(rule):
    ours, _ = rule
    called(ours, [1.0])
    sizes = {name: value.numel() for name, value in ours.state_dict().items()}
    gc.collect()
    norm = torch.tensor(1.5)
    before = sum(type(o) is torch.Tensor for o in gc.get_objects())
    for _ in range(10_000):
        ours(norm)
    assert {name: value.numel() for name, value in ours.state_dict().items()} == sizes
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) <= before


def test_a_rule_is_the_threshold_of_a_clip(rule, device):
    ours, formula = rule
    norms = norms_of_a_run(60)
    for norm, threshold in zip(norms, formula(norms), strict=True):
        made = parameters([torch.tensor([0.6 * norm, 0.8 * norm], device=device)])
        total = fastclip.clip_grad_norm_(made, ours)
        assert float(total) == pytest.approx(norm, rel=1e-6)
        after = float(fastclip.get_total_norm([made[0].grad]))
        assert after == pytest.approx(min(norm, threshold), rel=1e-5)


def test_any_callable_is_a_rule():
    made = parameters([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_(made, lambda norm: norm / 2) == 5
    torch.testing.assert_close(made[0].grad, torch.tensor([1.5, 2.0]))
    fastclip.clip_grad_norm_(made, lambda norm: 0.25)
    torch.testing.assert_close(made[0].grad, torch.tensor([0.15, 0.2]))
    with pytest.raises(ValueError, match="max_norm: expected a threshold >= 0, got -1"):
        fastclip.clip_grad_norm_(made, lambda norm: -1)
    torch.testing.assert_close(made[0].grad, torch.tensor([0.15, 0.2]))


@pytest.mark.parametrize(
    "answer",
    [2, True, np.float32(2), "2", torch.tensor([2.0]), nn.Parameter(torch.tensor(2.0))],
    ids=lambda answer: type(answer).__name__,
)
def test_a_rule_is_asked_once_whatever_it_answers(answer):
    asked = []
    made = parameters([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_(made, lambda norm: asked.append(norm) or answer) == 5
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8]) * float(answer))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [("two", TypeError), (None, TypeError), (-1.0, ValueError), (torch.ones(2), ValueError)],
)
def test_an_answer_that_is_no_threshold_raises_before_anything_changes(answer, error):
    made = parameters([torch.tensor([3.0, 4.0])])
    with pytest.raises(error, match="max_norm"):
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
    ],
)
def test_arguments_out_of_range_raise(make, name):
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        make()


def test_docstring_examples_are_right():
    assert doctest.testmod(rules).failed == 0


# What a non-finite norm does.


@pytest.fixture(params=["walk", "python"])
def path(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_ops, "extension", None)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
class TestNonfinite:
    def grads(self, device, bad):
        kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        made = [torch.ones(40, 3, device=device).to(kind) for kind in kinds]
        made[1][5, 1] = bad
        return made

    def test_zero_zeroes_every_gradient(self, device, bad):
        made = parameters(self.grads(device, bad))
        norm = fastclip.clip_grad_norm_(made, 1.0, nonfinite="zero")
        assert not norm.isfinite()
        assert all((p.grad == 0).all() for p in made)

    def test_skip_leaves_them(self, device, bad):
        grads = self.grads(device, bad)
        made = parameters(grads)
        assert not fastclip.clip_grad_norm_(made, 1.0, nonfinite="keep").isfinite()
        for p, grad in zip(made, grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)

    def test_error_is_error_if_nonfinite(self, device, bad):
        grads = self.grads(device, bad)
        made = parameters(grads)
        with pytest.raises(RuntimeError, match="is non-finite"):
            fastclip.clip_grad_norm_(made, 1.0, nonfinite="error")
        for p, grad in zip(made, grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("nonfinite", ["propagate", "error", "zero", "keep"])
def test_finite_gradients_are_clipped_whatever_the_policy(device, nonfinite):
    grads = [torch.randn(20, device=device), torch.randn(3, 4, device=device)]
    plain, made = parameters(grads), parameters(grads)
    norm = fastclip.clip_grad_norm_(plain, 0.5)
    assert torch.equal(fastclip.clip_grad_norm_(made, 0.5, nonfinite=nonfinite), norm)
    for p, q in zip(made, plain, strict=True):
        assert torch.equal(p.grad, q.grad)


def test_policies_that_are_none_raise():
    made = parameters([torch.ones(2)])
    with pytest.raises(ValueError, match=r"nonfinite: expected 'propagate', .* got 'ignore'"):
        fastclip.clip_grad_norm_(made, 1.0, nonfinite="ignore")
    with pytest.raises(ValueError, match="nonfinite: 'zero' and error_if_nonfinite=True"):
        fastclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True, nonfinite="zero")
    assert torch.equal(made[0].grad, torch.ones(2))


@pytest.mark.parametrize("nonfinite", ["zero", "keep"])
def test_a_policy_compiles(nonfinite):
    made = parameters([torch.tensor([3.0, 4.0]), torch.ones(2)])
    clip = torch.compile(
        lambda ps: fastclip.clip_grad_norm_(ps, 1.0, nonfinite=nonfinite),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = parameters([p.grad for p in made])
    assert torch.equal(clip(made), fastclip.clip_grad_norm_(expected, 1.0))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(made, expected, strict=True))


def test_a_rule_compiles(rule):
    ours, _ = rule
    eager = copy.deepcopy(ours)
    made, plain = (parameters([torch.ones(2)]) for _ in range(2))
    clip = torch.compile(lambda ps: fastclip.clip_grad_norm_(ps, ours), backend="aot_eager")
    for norm in norms_of_a_run(30):
        for p in (*made, *plain):
            p.grad = torch.tensor([0.6 * norm, 0.8 * norm])
        assert torch.equal(clip(made), fastclip.clip_grad_norm_(plain, eager))
        assert torch.equal(made[0].grad, plain[0].grad)


@pytest.mark.parametrize("make", [lambda: ZClip(warmup_steps=5), lambda: AutoClip(50)])
def test_a_norm_of_0_tells_a_rule_nothing(make):
    some, other = make(), make()
    norms = [0.0] * 30 + [1.0, 1.5] + [0.0] * 3 + [2.0, 1.0, 1.2, 1.3, 50.0]
    limits = [float(some(torch.tensor(n, dtype=torch.float64))) for n in norms]
    assert limits[:30] == [math.inf] * 30
    seen = [n for n in norms if n]
    assert [limit for limit, n in zip(limits, norms, strict=True) if n] == [
        float(other(torch.tensor(n, dtype=torch.float64))) for n in seen
    ]
    (weight,) = parameters([torch.zeros(1)])
    rule = make()
    for value in norms:
        weight.grad = torch.tensor([value])
        fastclip.clip_grad_norm_([weight], rule)
        assert (weight.grad > 0) == (value > 0)


def test_a_rule_sees_no_norm_that_is_refused():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([math.inf, 1.0])
    rule = AutoClip(percentile=50)
    clipper = fastclip.GradClipper([w], rule, nonfinite="error")
    for call in (
        clipper.clip_,
        lambda: fastclip.clip_grad_norm_([w], rule, error_if_nonfinite=True),
        lambda: fastclip.clip_grad_norm_([w], lambda norm: 1 / 0, error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match="non-finite"):
            call()
    assert int(rule.state_dict()["count"]) == 0
