"""Steps that a rule drops: what every way of clipping does then; test_rules.py has the rule."""

import math

import pytest
import torch
from conftest import parameters
from torch import nn

import fastclip
from fastclip import AutoClip, DropSpikes, GradClipper


def grad_of(*values: float) -> list[nn.Parameter]:
    return parameters([torch.tensor([value]) for value in values])


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


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("call", [fastclip.clipped_step, fastclip.unscale_and_clip_])
def test_the_step_itself_is_skipped(call, scaled):
    (weight,) = grad_of(1.0)
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
