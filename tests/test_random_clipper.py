"""Random lives of a GradClipper, against a reference that knows the formulas and float64 alone."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DTYPES, oracle
from torch import Tensor, nn

from fastclip import AutoClip, DropSpikes, GradClipper, ZClip

NUMBERS = [0.0, 0.3, 1, 20.0, 1e4, 1e300, math.inf]
ORDERS = [0.5, 1.0, 2.0, 3.0, math.inf]
POLICIES = ["propagate", "keep", "zero", "error"]
SHAPES = [(), (0,), (1,), (7,), (300,), (3, 5), (33, 9), (2, 0), (4, 3, 2)]
HUGE = {torch.float16: 1e4, torch.float64: 1e60}


class Percentile:
    """What AutoClip promises."""

    def __init__(self, percentile: float, history: int) -> None:
        self.percent, self.history, self.norms = percentile, history, []

    def __call__(self, norm: float) -> float:
        if math.isfinite(norm) and norm:
            self.norms = [*self.norms, norm][-self.history :]
        if not self.norms:
            return math.inf if math.isfinite(norm) else math.nan
        return percentile(self.norms, self.percent)


class Outliers:
    """What ZClip promises."""

    def __init__(self, alpha: float, z_threshold: float, warmup_steps: int) -> None:
        self.alpha, self.most, self.warmup = alpha, z_threshold, warmup_steps
        self.first, self.mean, self.variance = [], 0.0, 0.0

    def __call__(self, norm: float) -> float:
        if not math.isfinite(norm):
            return self.mean if math.isinf(norm) else math.nan
        if not norm:
            return math.inf
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean = math.fsum(self.first) / len(self.first)
            squares = [(n - self.mean) ** 2 for n in self.first]
            self.variance = math.fsum(squares) / len(squares)
            return math.inf
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        limit = self.mean + self.most**2 * deviation / z if z > self.most else math.inf
        clipped = limit if z > self.most else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (clipped - self.mean) ** 2
        return limit


class Spikes:
    """What DropSpikes promises: NaN for a step that is dropped."""

    def __init__(self, max_norm, factor=4.0, alpha=0.98, warmup_steps=25, patience=20) -> None:
        self.limit, self.factor, self.alpha = max_norm, factor, alpha
        self.warmup, self.patience = warmup_steps, patience
        self.first, self.mean, self.drops = [], 0.0, 0

    def __call__(self, norm: float) -> float:
        if math.isfinite(norm) and norm:
            if len(self.first) < self.warmup:
                self.first.append(norm)
                self.mean = math.fsum(self.first) / len(self.first)
            elif norm <= self.factor * self.mean:
                self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
            elif self.drops < self.patience:
                self.drops += 1
                return math.nan
            else:
                self.mean = norm
            self.drops = 0
        return math.nan if math.isnan(norm) else self.limit


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def coefficient(norm: float, limit: float, policy: str) -> float | None:
    """None where the gradients become zeros, whatever they are."""
    is_bad = not math.isfinite(norm) or math.isnan(limit)
    if is_bad and policy != "propagate":
        return 1.0 if policy == "keep" else None
    coef = 1.0 if limit == math.inf else limit / (norm + 1e-6)
    return 1.0 if coef > 1 else coef


def are_stats(found: dict[str, Any], steps: list[tuple[float, float, float | None]]) -> bool:
    """`steps`: the norms, thresholds and coefficients of a group."""
    norms, coefs = [norm for norm, _, _ in steps], [coef or 0.0 for _, _, coef in steps]
    finite = list(filter(math.isfinite, norms))
    ranks = {f"p{rank}": rank for rank in (1, 10, 25, 50, 75, 90, 99)}
    return found == {
        "steps": len(norms),
        "clipped": sum(coef < 1 for coef in found["coef"]),
        "dropped": sum(math.isfinite(norm) and math.isnan(limit) for norm, limit, _ in steps),
        "nonfinite": len(norms) - len(finite),
        "total_norm": pytest.approx(norms, rel=0, abs=0, nan_ok=True),
        "coef": pytest.approx(coefs, rel=4e-7, nan_ok=True),
        "percentiles": pytest.approx(
            {k: percentile(finite, r) if finite else math.nan for k, r in ranks.items()},
            nan_ok=True,
        ),
    }


def is_last(found: dict[str, Any], norm: float, limit: float, coef: float | None) -> bool:
    return found == {
        "total_norm": pytest.approx(norm, rel=0, abs=0, nan_ok=True),
        "max_norm": pytest.approx(limit, rel=4e-7, nan_ok=True),
        "coef": pytest.approx(coef or 0.0, rel=4e-7, nan_ok=True),
        "dropped": math.isfinite(norm) and math.isnan(limit),
    }


def dense(grad: Tensor) -> Tensor:
    return grad.detach().to_dense().clone()


def parts(grad: Tensor) -> Tensor:
    """Real and imaginary, which no product mixes."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


def is_scaled(now: Tensor, then: Tensor, coef: float | None, wide: bool) -> bool:
    """`wide`: the coefficient is a float64 one."""
    if coef is None:
        return not now.count_nonzero()
    info = torch.finfo(then.dtype)
    close = 1e-14 if wide and then.dtype == torch.float64 else 4e-7
    how = {"rtol": close + info.eps, "atol": info.smallest_normal * info.eps}
    if coef == 1:
        how = {"rtol": 0, "atol": 0}
    exact = parts(then).double() * coef
    return torch.allclose(parts(now).double(), exact, **how, equal_nan=True)


def is_wide(grads: list[Tensor]) -> bool:
    return any(g.dtype == torch.float64 for g in grads)


def norm_of(grads: list[Tensor], p: float) -> float:
    return oracle([g.to(torch.complex128).abs() if g.is_complex() else g for g in grads], p)


def norm_is(found: float, grads: list[Tensor], p: float) -> bool:
    # float64 where all of it is, else 2 float32 ulps.
    precision = 1e-13 if all(g.dtype == torch.float64 for g in grads) else 2.4e-7
    return found == pytest.approx(norm_of(grads, p), rel=precision, abs=0, nan_ok=True)


def threshold(
    rng: random.Random, may_drop: bool = False
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """How to make one, and what it promises: the limit of a norm."""
    number, percent, count = rng.choice(NUMBERS), rng.choice([0, 30, 50, 100]), rng.randint(1, 5)
    tensor = torch.tensor(rng.random(), dtype=rng.choice(DTYPES))
    half, constant = lambda norm: norm * 0.5, lambda norm: 0.7
    kinds = [
        (lambda: number, lambda: lambda norm: float(number)),
        (lambda: tensor, lambda: lambda norm: float(tensor)),
        (lambda: AutoClip(percent, count), lambda: Percentile(percent, count)),
        (lambda: ZClip(0.9, 1.5, count), lambda: Outliers(0.9, 1.5, count)),
        (lambda: half, lambda: half),
        (lambda: constant, lambda: constant),
    ]
    if may_drop:
        how = (0.8, 1.5, 0.9, rng.randint(1, 2), rng.randint(0, 3))
        kinds += [(lambda: DropSpikes(*how), lambda: Spikes(*how))] * 2
    return rng.choice(kinds)


class Group:
    """Parameters in whatever holds them, with a threshold or none."""

    def __init__(self, rng: random.Random, name: str, may_be_left_out: bool) -> None:
        self.name, self.items = name, []
        placeholder = nn.Parameter(torch.zeros(1))
        holders = [list, nn.Module, lambda: torch.optim.SGD([placeholder], lr=1.0)]
        self.source = rng.choice(holders)()
        self.make, promise = threshold(rng, may_drop=True)
        self.limit_of = promise()
        self.is_measured = not may_be_left_out or rng.random() < 0.8

    def arguments(self) -> dict[str, Any]:
        max_norm = self.make() if self.is_measured else None
        return {"params": self.source, "max_norm": max_norm, "name": self.name}

    def put(self, items: list[nn.Parameter]) -> None:
        self.items = items
        if isinstance(self.source, list):
            self.source[:] = items
        elif isinstance(self.source, nn.Module):
            for name in list(self.source._parameters):
                delattr(self.source, name)
            for i, item in enumerate(items):
                setattr(self.source, f"p{i}", item)
        else:
            self.source.param_groups[0]["params"] = list(items)

    def once(self) -> dict[str, nn.Parameter]:
        """Each parameter by the first of its names."""
        holder = {list: "", nn.Module: "p"}.get(type(self.source), "0.")
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for i, item in enumerate(self.items):
            found.setdefault(id(item), (f"{holder}{i}", item))
        return dict(found.values())


class Life:
    """A clipper, the groups that it was made of, and what it should have recorded."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.p, self.policy = rng.choice(ORDERS), rng.choice(POLICIES)
        self.is_one = rng.random() < 0.3
        self.is_each = self.p > 0 and rng.random() < 0.3
        self.groups: list[Group] = []
        for i in range(1 if self.is_one else rng.randint(1, 4)):
            name = "total" if self.is_one else f"g{i}"
            self.groups.append(Group(rng, name, any(g.is_measured for g in self.groups)))
        self.measured = [group for group in self.groups if group.is_measured]
        self.dtypes = rng.sample([*DTYPES, torch.complex64], rng.randint(1, 3))
        for group in self.groups:
            group.put([self.parameter() for _ in range(rng.randint(0, 6))])
        # Of each step the norms, thresholds and coefficients of the groups.
        self.history: list[tuple[list[float], list[float], list[float | None]]] = []
        # Rules know norms as they were before they were rounded and returned.
        self.has_rounded = False
        self.clipper = self.fresh()
        # What the last step measured, if it is to be kept.
        self.each: dict[int, Tensor | None] | None = None

    def fresh(self) -> GradClipper:
        how = {"norm_type": self.p, "nonfinite": self.policy, "each": self.is_each}
        if self.is_one:
            (group,) = self.groups
            return GradClipper(group.source, group.make(), **how)
        return GradClipper(groups=[group.arguments() for group in self.groups], **how)

    def parameter(self) -> nn.Parameter:
        shape, dtype = self.rng.choice(SHAPES), self.rng.choice(self.dtypes)
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = self.gradient(parameter)
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        rng, dtype = self.rng, parameter.dtype
        if rng.random() < 0.1:
            return None
        size = HUGE.get(dtype, 1e19) if rng.random() < 0.05 else 10 ** rng.uniform(-3, 3)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = (torch.randn(parameter.shape, dtype=wide) * size).to(dtype)
        if values.numel() and rng.random() < 0.06:
            values.view(-1)[-1] = rng.choice([math.inf, -math.inf, math.nan])
        return self.stored(values)

    def stored(self, values: Tensor) -> Tensor:
        shape, way = values.shape, self.rng.choice(["dense"] * 3 + ["gaps", "sparse"])
        if way == "dense" or not shape:
            return values
        if way == "gaps":
            return values.new_empty(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(values)
        once = values.to_sparse()
        places, halves = once.indices(), once.values() / 2
        places, halves = torch.cat([places] * 2, 1), torch.cat([halves] * 2)
        return torch.sparse_coo_tensor(places, halves, shape, check_invariants=True)

    # What happens to it; each returns whether all was as promised.

    def backward(self) -> bool:
        """Other gradients, and other numbers in the tensors that are thresholds."""
        # Norms are float64 or float32 by the gradients that a step happens to have.
        absent = self.rng.choice([None, None, *self.dtypes])
        for item in (item for group in self.groups for item in group.items):
            item.grad = None if item.dtype == absent else self.gradient(item)
        for value in (group.make() for group in self.groups):
            if isinstance(value, Tensor):
                value.fill_(self.rng.random() * 3)
        return True

    def others(self) -> bool:
        """Parameters are added, replaced, moved, repeated, frozen, taken away."""
        rng = self.rng
        # Often one is only moved, which leaves the order of all as it was.
        for group in rng.choices(self.groups, k=rng.choice([0, 0, 2])):
            items = list(group.items)
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(items) + 1)
                items[at : at + rng.randint(0, 2)] = [self.parameter()] * rng.randint(0, 2)
            for item in items:
                item.requires_grad_(rng.random() < 0.8)
            group.put(items)
        at = rng.randrange(len(self.groups))
        a, b = self.groups[at - 1], self.groups[at]
        if a is not b and a.items:
            moved = a.items[-1]
            a.put([item for item in a.items if item is not moved])
            b.put([moved, *b.items])
        # A first step says again what is there.
        self.each = None
        return not self.is_each or self.clip()

    def retarget(self) -> bool:
        """A group has another number for a threshold from now on."""
        group, number = self.rng.choice(self.measured), self.rng.random()
        if callable(group.make()):
            # A state has no number for a rule, nor a rule for a number; other numbers it restores.
            group.make = lambda: number
        group.limit_of = lambda norm: number
        if self.is_one:
            self.clipper.max_norm = number
        else:
            self.clipper.max_norm[group.name] = number
        return True

    def clip(self) -> bool:
        held = [
            (group, item, None if item.grad is None else dense(item.grad))
            for group in self.groups
            for item in group.once().values()
        ]
        self.each = {id(item): grad for _, item, grad in held}
        grads = [
            [grad for of, _, grad in held if of is group and grad is not None]
            for group in self.measured
        ]
        wide = any(map(is_wide, grads))
        dtype = torch.float64 if wide else torch.float32
        norms = [norm_of(some, self.p) for some in grads]
        found, message = norms, ""
        try:
            total_norm = self.clipper.clip_()
            found = total_norm.reshape(-1).tolist()
        except RuntimeError as error:
            message = str(error)
        raises = self.policy == "error"
        is_refused = raises and not all(map(math.isfinite, norms))
        pairs = [] if is_refused else zip(self.measured, found, strict=True)
        limits = [group.limit_of(norm) for group, norm in pairs]
        coefs: dict[str, float | None] = {}
        if is_refused or (raises and any(map(math.isnan, limits))):
            if ("non-finite" if is_refused else "it is NaN") not in message:
                return False
        else:
            right = all(
                norm_is(norm, some, self.p) for norm, some in zip(found, grads, strict=True)
            )
            if message or total_norm.dtype != dtype or not right:
                return False
            most = torch.finfo(dtype).max
            for group, norm, limit in zip(self.measured, found, limits, strict=True):
                # A limit beyond the dtype of a finite norm is infinite.
                limit = math.inf if limit > most > norm else limit
                coefs[group.name] = coefficient(norm, limit, self.policy)
            self.history.append((found, limits, [*coefs.values()]))
            self.has_rounded |= not wide
        wide = wide and not self.has_rounded
        return all(
            item.grad is None
            if grad is None
            else is_scaled(dense(item.grad), grad, coefs.get(group.name, 1.0), wide)
            for group, item, grad in held
        )

    def stats(self) -> bool:
        stats, last = self.clipper.stats(), self.clipper.last() if self.history else {}
        if self.is_one:
            stats, last = {"total": stats}, {"total": last}
        for i, group in enumerate(self.measured):
            steps = [tuple(kind[i] for kind in step) for step in self.history]
            if not are_stats(stats[group.name], steps):
                return False
            if steps and not is_last(last[group.name], *steps[-1]):
                return False
        return list(stats) == [group.name for group in self.measured]

    def reload(self) -> bool:
        state = self.clipper.state_dict()
        self.clipper, self.each = self.fresh(), None
        self.clipper.load_state_dict(state)
        return self.stats()

    def by_parameter(self) -> bool:
        items = {
            name if self.is_one else f"{group.name}.{name}": item
            for group in self.measured
            for name, item in group.once().items()
        }
        if self.is_each and self.each is None:
            with pytest.raises(ValueError, match="no step"):
                self.clipper.norms_by_parameter()
            return True
        found = self.clipper.norms_by_parameter()
        now = {id(item): item.grad for item in items.values()}
        grads = self.each if self.is_each else now
        return list(found) == list(items) and all(
            norm_is(found[name], [dense(g) for g in [grads[id(item)]] if g is not None], self.p)
            for name, item in items.items()
        )


OTHERS = ["others", "others", "retarget", "stats", "reload", "by_parameter"]
EVENTS = ["backward"] * 3 + ["clip"] * 5 + OTHERS


@pytest.mark.parametrize("seed", range(120))
def test_any_life_of_a_clipper_is_that_of_its_formulas(reader, seed):
    life, lived = Life(seed), []
    for event in life.rng.choices(EVENTS, k=20):
        lived.append(event)
        assert getattr(life, event)(), f"seed {seed}: {lived}"
