"""Random steps of optimizers, scalers and wrappers, against torch's sequence on float64 copies."""

import copy
import math
import random
from typing import Any

import pytest
import torch
from conftest import oracle
from test_optim import KINDS, WRAPPERS, missing
from test_random_clipper import SHAPES, coefficient, is_wide, threshold
from torch import Tensor, nn

import fastclip
from fastclip import NormAccumulator

CALLS = ["step", "measured step", "unscale", "measured unscale", "accumulator"]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
WIDE = [torch.float64]
# What a few steps round, in eps.
ROUNDINGS = {torch.float32: 64, torch.float64: 64, torch.bfloat16: 12}


def options(rng: random.Random, kind: str) -> dict[str, Any]:
    """`eps` is such that no rounding of a gradient near 0 is a step of full length."""
    how = {"lr": 10 ** rng.uniform(-3, -1), "maximize": rng.random() < 0.3}
    how["weight_decay"] = rng.choice([0.0, 0.1])
    if kind == "sgd":
        momentum, dampening = rng.choice([0.0, 0.5, 0.9]), rng.choice([0.0, 0.0, 0.25])
        nesterov = momentum > 0 and not dampening and rng.random() < 0.5
        return how | {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    amsgrad = {} if kind == "adagrad" else {"amsgrad": rng.random() < 0.5}
    return how | {"eps": 1e-3} | amsgrad


def scaler_of(rng: random.Random) -> torch.amp.GradScaler | None:
    enabled, scale = rng.choice([None, False, True, True]), rng.choice([1.0, 1000.0, 65536.0])
    how = {"enabled": enabled, "growth_factor": 1.5, "backoff_factor": 0.3, "growth_interval": 2}
    return None if enabled is None else torch.amp.GradScaler("cpu", init_scale=scale, **how)


class Stepped:
    """An optimizer, in what wraps it, and one that torch steps on float64 copies."""

    def __init__(
        self, rng: random.Random, kind: str, how: dict[str, Any], dtypes: list[torch.dtype]
    ) -> None:
        # The fused SGD of torch 2.13 on the CPU steps 16 elements of bfloat16 at a time, wrongly.
        dtypes = [d for d in dtypes if (kind, d) != ("sgd", torch.bfloat16)]
        groups, copies = [], []
        for _ in range(rng.randint(1, 3)):
            items = [
                nn.Parameter(torch.randn(rng.choice(SHAPES), dtype=torch.float64).to(dtype))
                for dtype in rng.choices(dtypes, k=rng.randint(1, 3))
            ]
            given = options(rng, kind)
            copies.append({"params": [nn.Parameter(doubled(i)) for i in items], **given})
            groups.append({"params": items, **given})
        self.inner = KINDS[kind](groups, **how)
        self.reference = KINDS[kind](copies, foreach=False)
        if rng.random() < 0.2:
            self.inner = copy.deepcopy(self.inner)
        self.kind, self.eps = kind, max(torch.finfo(d).eps for d in dtypes if d != torch.bfloat16)
        wrap = rng.choice([None, None, *WRAPPERS.values()])
        self.outer = self.inner if wrap is None else wrap(self.inner)
        self.schedules = []
        if rng.random() < 0.4:
            ours = rng.choice([self.inner, self.outer])
            exponential = torch.optim.lr_scheduler.ExponentialLR
            self.schedules = [exponential(one, 0.8) for one in (ours, self.reference)]
        items = [i for group in self.inner.param_groups for i in group["params"]]
        doubles = [i for group in self.reference.param_groups for i in group["params"]]
        self.pairs = list(zip(items, doubles, strict=True))
        # The first always has a gradient; torch has no inf checks of an optimizer without.
        for item in items[1:]:
            item.requires_grad_(rng.random() < 0.8)
        self.sizes: dict[tuple[Tensor, str], float] = {}
        self.absent = [i for i in items[1:] if rng.random() < 0.2]

    def is_right(self) -> bool:
        decay = max(group["weight_decay"] for group in self.reference.param_groups)
        for item, double in self.pairs:
            if not is_close(item, double, 1.0, self.eps):
                return False
            ours, theirs = self.inner.state.get(item, {}), self.reference.state.get(double, {})
            for name in ours.keys() | theirs.keys():
                # A step that was skipped may have made the state.
                made, expected = (
                    torch.zeros(()) if state.get(name) is None else state[name]
                    for state in (ours, theirs)
                )
                # What it held a step before may have gone, but not its roundings.
                size = self.sizes.get((item, name), 0.0)
                if not is_close(made, expected, decay + size, self.eps):
                    return False
                self.sizes[item, name] = max([size, *map(abs, expected.reshape(-1).tolist())])
        return True


def doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)


def is_close(found: Tensor, expected: Tensor, least: float, eps: float) -> bool:
    """`least`: the order of what was added to something small; `eps`: that of the norm."""
    expected = expected.detach()
    if not found.numel():
        return True
    info = torch.finfo(found.dtype)
    size = least + float(expected.abs().max())
    error = float((found.detach().double() - expected).abs().max())
    return error <= ROUNDINGS[found.dtype] * max(info.eps, eps) * size + info.smallest_normal


class Case:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = rng = random.Random(seed)
        self.call = rng.choice(CALLS)
        self.p = rng.choice([1.0, 2.0, 2.0, 3.0, math.inf])
        self.dtypes = rng.choice([DTYPES, DTYPES, DTYPES, WIDE])
        self.stepped = [self.optimizer() for _ in range(rng.choice([1, 1, 2, 3]))]
        self.scaler = scaler_of(rng)
        if "unscale" in self.call and self.scaler is None:
            self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.reference = copy.deepcopy(self.scaler)
        self.is_scaled = self.scaler is not None and self.scaler.is_enabled()
        make, promise = threshold(rng)
        self.max_norm, self.limit = make(), promise()
        self.pairs = [pair for one in self.stepped for pair in one.pairs]
        self.norms = None
        if self.call in ("accumulator", "measured step", "measured unscale"):
            outer = [one.outer for one in self.stepped]
            held = outer if rng.random() < 0.5 else [item for item, _ in self.pairs]
            self.norms = NormAccumulator(held, self.p)

    def optimizer(self) -> Stepped:
        ways = [{"fused": True}, {"foreach": True}, {"foreach": False}]
        how = ways[0] if "step" in self.call else self.rng.choice(ways)
        kinds = [k for k in KINDS if not (how.get("fused") and missing(k, "cpu", divides=True))]
        return Stepped(self.rng, self.rng.choice(kinds), how, self.dtypes)

    def backward(self, step: int) -> None:
        """Gradients of any size, one of which may be changed after it."""
        rng, losses, size = self.rng, [], 10 ** self.rng.uniform(-2, 2)
        bad = rng.choice([math.inf, -math.inf, math.nan])
        skips = self.may_skip(step) and rng.random() < 0.3
        for one in self.stepped:
            for item, _ in one.pairs:
                item.grad = None
                late = rng.random() < 0.1 and one.kind != "sgd" and item is not one.pairs[0][0]
                if any(item is a for a in one.absent) or late:
                    continue
                grad = (torch.randn(item.shape, dtype=torch.float64) * size).to(item.dtype)
                if skips and grad.numel():
                    grad.view(-1)[0], skips = bad, False
                if item.requires_grad:
                    losses.append((item * grad).sum().double())
                else:
                    item.grad = grad
        loss = torch.stack(losses).sum()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        present = [item for item, _ in self.pairs if item.grad is not None]
        if rng.random() < 0.2:
            rng.choice(present).grad.mul_(0.5)

    def may_skip(self, step: int) -> bool:
        """torch's sequence skips by optimizer, and leaves buffers of a first step as they were."""
        if "step" in self.call:
            return True
        alone = self.call != "accumulator" or len(self.stepped) == 1
        return self.is_scaled and step > 0 and alone

    def ours(self) -> Tensor:
        outer, scaler = [one.outer for one in self.stepped], self.scaler
        given = outer[0] if len(outer) == 1 else outer
        measured = {} if self.norms is None else {"measured": self.norms}
        if "step" in self.call:
            norm = fastclip.clipped_step(given, self.max_norm, scaler, norm_type=self.p, **measured)
        elif "unscale" in self.call:
            norm = fastclip.unscale_and_clip_(
                given, self.max_norm, scaler, norm_type=self.p, **measured
            )
        else:
            for one in self.stepped if scaler is not None else ():
                scaler.unscale_(one.inner)
            norm = self.norms.clip_(self.max_norm)
        # The foreach step of SGD writes gradients.
        self.clipped = [i.grad.clone() for i, _ in self.pairs if i.grad is not None]
        for one in self.stepped if "step" not in self.call else ():
            one.outer.step() if scaler is None else scaler.step(one.inner)
        if scaler is not None:
            scaler.update()
        return norm

    def theirs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients before and after they are clipped."""
        scaler = self.reference
        for one in self.stepped if self.is_scaled else ():
            scaler.unscale_(one.reference)
        held = [(item, double.grad) for item, double in self.pairs if double.grad is not None]
        if self.call == "accumulator":
            # It gets them as `unscale_` has rounded them.
            for item, grad in held:
                grad.copy_(grad.to(item.dtype))
        grads = [grad for _, grad in held]
        before = [grad.clone() for grad in grads]
        norm = oracle(grads, self.p)
        coef = coefficient(norm, self.limit(norm), "propagate")
        for grad in grads:
            grad.mul_(coef)
        for one in self.stepped if math.isfinite(norm) else ():
            one.reference.step()
        if self.is_scaled:
            scaler.update()
        return before, grads

    def step(self, step: int) -> str:
        """What is wrong."""
        self.backward(step)
        if self.is_scaled:
            self.reference.scale(torch.ones(()))
        for item, double in self.pairs:
            double.grad = None if item.grad is None else doubled(item.grad)
        wide = is_wide([item.grad for item, _ in self.pairs if item.grad is not None])
        norm, (before, after) = self.ours(), self.theirs()
        if norm.dtype != (torch.float64 if wide else torch.float32):
            return "dtype"
        expected = oracle(before, self.p)
        close = 1e-13 if self.dtypes is WIDE else 3e-7
        if norm.item() != pytest.approx(expected, rel=close, abs=0, nan_ok=True):
            return f"norm {norm.item()}, not {expected}"
        if math.isfinite(expected) and not all(
            is_close(grad, expected, 0.0, self.stepped[0].eps)
            for grad, expected in zip(self.clipped, after, strict=True)
        ):
            return "gradients"
        if self.is_scaled and self.scaler.state_dict() != self.reference.state_dict():
            return "scaler"
        for one in self.stepped:
            if not one.is_right():
                return f"parameters or state of {one.kind}"
            for schedule in one.schedules:
                schedule.step()
            if self.rng.random() < 0.1:
                one.inner.load_state_dict(one.inner.state_dict())
        return ""


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("seed", range(90))
def test_any_steps_are_those_of_torchs_sequence(seed):
    case = Case(seed)
    for step in range(case.rng.randint(3, 6)):
        wrong = case.step(step)
        assert not wrong, f"seed {seed}, step {step}, {case.call}: {wrong}"
