"""Steps that a rule drops: what DropSpikes promises, and what every way of clipping does then."""

import copy
import math
import pickle

import pytest
import torch
from conftest import parameters
from torch import nn

import fastclip
from fastclip import AutoClip, DropSpikes, GradClipper


class Promise:
    """DropSpikes in numbers."""

    def __init__(self, factor: float, alpha: float, warmup_steps: int, patience: int) -> None:
        self.factor, self.alpha, self.patience = factor, alpha, patience
        self.warmup_steps, self.first, self.mean, self.drops = warmup_steps, [], 0.0, 0

    def is_dropped(self, norm: float) -> bool:
        if not math.isfinite(norm) or not norm:
            return False
        if len(self.first) < self.warmup_steps:
            self.first.append(norm)
            self.mean = math.fsum(self.first) / len(self.first)
            return False
        if norm > self.factor * self.mean:
            if self.drops < self.patience:
                self.drops += 1
                return True
            self.mean = norm
        else:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.drops = 0
        return False


def grad_of(*values: float) -> list[nn.Parameter]:
    return parameters([torch.tensor([value]) for value in values])


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_it_promises(seed):
    generator = torch.Generator().manual_seed(seed)
    how = (2.0 + seed / 2, 0.8, 1 + seed % 4, seed % 5)
    rule, promise = DropSpikes(1.5, *how), Promise(*how)
    norms = torch.exp(1.5 * torch.randn(200, generator=generator)).tolist()
    norms[5:7], norms[90:130] = [0.0, math.inf], [n * 50 for n in norms[90:130]]
    for i, norm in enumerate(norms):
        if i == 60:
            state = rule.state_dict()
            rule = DropSpikes(1.5, *how)
            rule.load_state_dict(state)
        if i == 70:
            rule = pickle.loads(pickle.dumps(copy.deepcopy(rule)))
        limit = rule(torch.tensor(norm, dtype=torch.float64))
        assert limit.isnan() if promise.is_dropped(norm) else limit == 1.5, (i, norm)


def test_the_rule_inside_does_not_see_what_is_dropped():
    inside, alone = AutoClip(100, 50), AutoClip(100, 50)
    rule = DropSpikes(inside, warmup_steps=2)
    for norm in (1.0, 2.0, 100.0, 3.0):
        limit = rule(torch.tensor(norm, dtype=torch.float64))
        if norm == 100:
            assert limit.isnan()
        else:
            assert limit == alone(torch.tensor(norm, dtype=torch.float64))
    state = rule.state_dict()
    assert {"max_norm.norms", "max_norm.count", "mean"} <= state.keys()
    other = DropSpikes(AutoClip(100, 50), warmup_steps=2)
    other.load_state_dict(state)
    assert other.state_dict()["max_norm.count"] == 3
    assert "AutoClip" in other.describe()
    with pytest.raises(ValueError, match="state"):
        DropSpikes(1.0).load_state_dict(state)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"factor": 1.0}, "factor"),
        ({"alpha": -0.1}, "alpha"),
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"patience": -1}, "patience"),
        ({"max_norm": -1.0}, "max_norm"),
    ],
)
def test_bad_arguments_are_named(how, name):
    with pytest.raises(ValueError, match=name):
        DropSpikes(**{"max_norm": 1.0, **how})


RULES = {"tensor": lambda norm: norm.new_tensor(math.nan), "number": lambda norm: math.nan}


@pytest.mark.parametrize("answer", RULES)
@pytest.mark.parametrize("clipper", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "keep", "error"])
def test_a_dropped_step_is_what_nonfinite_says(answer, clipper, nonfinite):
    made = grad_of(3.0, 4.0)
    how = {"nonfinite": nonfinite}
    own = GradClipper(made, RULES[answer], **how)
    call = own.clip_ if clipper else lambda: fastclip.clip_grad_norm_(made, RULES[answer], **how)
    if nonfinite == "error":
        with pytest.raises(RuntimeError, match="max_norm: it is NaN"):
            call()
    else:
        assert call() == 5
    after = [float(one.grad) for one in made]
    expected = {"zero": [0.0, 0.0], "propagate": [math.nan] * 2}.get(nonfinite, [3.0, 4.0])
    assert after == pytest.approx(expected, nan_ok=True)
    if clipper and nonfinite != "error":
        assert own.last()["dropped"]
        stats = own.stats()
        assert (stats["dropped"], stats["nonfinite"], stats["clipped"]) == (
            1,
            0,
            nonfinite == "zero",
        )


def test_one_group_is_dropped_and_no_other():
    made = grad_of(3.0, 4.0)
    groups = [{"params": made[0], "max_norm": RULES["tensor"]}, {"params": made[1], "max_norm": 1}]
    clipper = GradClipper(groups=groups, nonfinite="zero")
    clipper.clip_()
    assert [float(one.grad) for one in made] == pytest.approx([0.0, 1.0])
    assert [one["dropped"] for one in clipper.last().values()] == [True, False]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_step_itself_is_skipped(scaled):
    (weight,) = grad_of(1.0)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    rule = DropSpikes(math.inf, warmup_steps=1)
    moved = []
    for value in (1.0, 100.0, 2.0):
        weight.grad = None
        before = float(weight)
        scaler.scale((weight * value).sum()).backward()
        assert fastclip.clipped_step(optimizer, rule, scaler) == pytest.approx(value)
        if scaled:
            scaler.update(4.0)
        moved.append(before - float(weight))
    assert moved == pytest.approx([1.0, 0.0, 2.0])


def test_the_scaler_skips_it():
    (weight,) = grad_of(1.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rule = DropSpikes(math.inf, warmup_steps=1)
    moved = []
    for value in (1.0, 100.0, 2.0):
        weight.grad = None
        before = float(weight)
        scaler.scale((weight * value).sum()).backward()
        assert fastclip.unscale_and_clip_(optimizer, rule, scaler) == pytest.approx(value)
        assert float(weight.grad) == pytest.approx(value)
        scaler.step(optimizer)
        scaler.update(4.0)
        moved.append(before - float(weight))
    assert moved == pytest.approx([1.0, 0.0, 2.0])


def test_it_compiles_without_a_break():
    compiled = torch.compile(fastclip.clip_grad_norm_, fullgraph=True, backend="aot_eager")
    rules = [DropSpikes(1.0, warmup_steps=2) for _ in range(2)]
    for value in (1.0, 2.0, 50.0, 1.0):
        made, twins = grad_of(value), grad_of(value)
        compiled(made, rules[0], nonfinite="keep")
        fastclip.clip_grad_norm_(twins, rules[1], nonfinite="keep")
        assert torch.equal(made[0].grad, twins[0].grad)
    assert all(rule.state_dict()["drops"] == 0 for rule in rules)


def test_a_picture_shows_it(tmp_path):
    pytest.importorskip("matplotlib")
    made = grad_of(1.0)
    clipper = GradClipper(made, DropSpikes(0.9, warmup_steps=2), nonfinite="keep")
    drawn = []
    for spike in (1.0, 50.0):
        for value in (1.0, 1.0, 1.0, spike):
            made[0].grad = torch.tensor([value])
            clipper.clip_()
        clipper.plot(tmp_path / "norms.png")
        drawn.append((tmp_path / "norms.png").read_bytes())
    assert clipper.stats()["dropped"] == 1
    assert drawn[0] != drawn[1]
