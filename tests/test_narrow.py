"""A device that has no float64, as Apple's: the default ops go on in float32, and never wait."""

import math
from typing import Any

import pytest
import torch
from conftest import CLIPS, ORDERS, awkward, emulated, emulation_folder, name_of, oracle, parameters
from test_subclasses import two_halves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastclip
from fastclip._ops import measure, reference

pytestmark = pytest.mark.emulated
HALF = [torch.float32, torch.bfloat16, torch.float16]


class Narrow(TorchDispatchMode):
    """Refuses float64 there, and what a host would wait for; counts the calls that reach it."""

    def __init__(self, waits: bool = False) -> None:
        super().__init__()
        self.waits = waits
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        there = [t for t in found if t.device.type == "emulated"]
        name = str(func)
        assert not any(t.dtype == torch.float64 for t in there), name
        assert self.waits or not (
            there and name.startswith(("aten._local_scalar_dense", "aten.nonzero"))
        ), name
        if there and not func.is_view and not name.startswith("prims"):
            self.names.append(name)
        return result


@pytest.fixture(autouse=True)
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    machine = emulated(emulation_folder(request.config)).machine
    # Not compiled for: every op is its default.
    monkeypatch.setattr(machine, "capability", 80)
    monkeypatch.setattr(measure, "_widest", lambda device_type: torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf, 0.0])
def test_a_clip_is_few_calls(dtype, max_norm):
    made = [t.to("emulated", dtype) for t in torch.randn(200, 33).unbind()]
    with Narrow() as ours:
        reference.clip_norm_(made, max_norm, 2.0)
    with Narrow() as theirs:
        torch.nn.utils.clip_grad_norm_(parameters(made), 0.5, foreach=True)
    assert len(ours.names) <= len(theirs.names) + 3, (ours.names, theirs.names)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_tensors_of_several_devices_are_one_list(p):
    tensors = [torch.randn(40) for _ in range(6)]
    places = ("emulated:0", "cpu", "emulated:1")
    made = [t.clone().to(places[i % 3]) for i, t in enumerate(tensors)]
    expected = oracle(tensors, p)
    norm = reference.clip_norm_(made, expected / 2, p)
    assert norm.device == made[0].device
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    for one, other in zip(made, tensors, strict=True):
        torch.testing.assert_close(one.cpu(), other / 2, rtol=2e-6, atol=0)
    reference.clamp_(made, 0.1)
    assert max(float(t.abs().amax()) for t in made) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", HALF[1:], ids=name_of)
def test_halves_are_scaled_by_a_float32_on_any_device(dtype, monkeypatch):
    def missing(*_: object) -> None:
        raise NotImplementedError

    tensors = [t.to(dtype) for t in (torch.randn(40), torch.randn(3, 5), torch.randn(()))]
    made, third = [t.to("emulated") for t in tensors], torch.tensor(1 / 3)
    monkeypatch.setattr(reference, "foreach_unscale_", missing)
    with Narrow():
        reference.scale_(made, third.to("emulated"))
    for one, other in zip(made, tensors, strict=True):
        assert torch.equal(one.cpu(), (other.float() * third).to(dtype))


# An error waits.
CALLS = {name: clip for name, clip in CLIPS.items() if name != "error"} | {
    "autoclip": lambda ps, _: fastclip.clip_grad_norm_(ps, fastclip.AutoClip(50)),
    "zclip": lambda ps, _: fastclip.clip_grad_norm_(ps, fastclip.ZClip(warmup_steps=1)),
    "norms": fastclip.clip_grad_norms_,
    "agc": fastclip.clip_grad_agc_,
    "value": lambda ps, n: fastclip.clip_grad_value_(ps, 0.1 * n),
    "known norm": lambda ps, n: two_halves(ps, ps[0].new_tensor(n)),
    "rules of groups": lambda ps, _: fastclip.GradClipper(
        groups=[{"params": p, "max_norm": fastclip.AutoClip()} for p in ps]
    ).clip_(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_runs_without_float64(call):
    grads = list(torch.randn(5, 40).unbind())
    made, plain = parameters([g.to("emulated") for g in grads]), parameters(grads)
    with Narrow():
        found = call(made, 1.0)
    close = {"rtol": 1e-6, "atol": 0, "check_device": False}
    torch.testing.assert_close(found, call(plain, 1.0), **close)
    for one, other in zip(made, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **close)


@pytest.mark.parametrize("p", [*ORDERS, 0.0, -1.0, -math.inf])
def test_no_default_asks_for_a_value(p):
    tensors = [t for dtype in HALF for t in awkward(dtype, "meta") if p > 0 or t.numel()]
    group, one = [i % 3 for i in range(len(tensors))], torch.ones((), device="meta")
    assert reference.norm(tensors, p, True).is_meta
    for how in ((None,), (group,), (None, False, True)):
        assert reference.norms(tensors, p, *how).is_meta
    for max_norm in (1.0, one):
        assert reference.clip_norm_(tensors, max_norm, p).is_meta
    rows = sum(reference.count_rows(t) for t in tensors)
    for coef, how in ((one, ()), (one.expand(3), (group,)), (one.expand(rows), (None, True))):
        reference.scale_(tensors, coef, *how)
    reference.clamp_(tensors, 1.0)
