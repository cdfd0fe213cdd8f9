"""Random layouts over four ranks, against what every rank can work out: it knows all gradients.

All ranks draw the same numbers. What counts on a rank is said in `Case.counted` alone.
"""

import math
import random
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import oracle
from test_mesh import here as local
from test_random_clipper import coefficient, is_scaled
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fastclip
from fastclip import GradClipper, _ops

pytestmark = pytest.mark.slow

ORDERS = [0.5, 1.0, 2.0, 2.0, 3.0, 8.0, math.inf, 0.0, -1.0, -math.inf]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
POLICIES = ["propagate", "keep", "zero", "error"]
CALLS = ["clip", "clip", "clipper", "groups", "groups", "measure", "each", "units"]
# The meshes of each name, by their ranks; of "plain" the ranks that may hold a tensor each.
GRIDS: dict[str, list[Any]] = {
    "all": [[0, 1, 2, 3]],
    "shuffled": [[2, 0, 3, 1]],
    "square": [[[0, 1], [2, 3]]],
    "twisted": [[[0, 3], [1, 2]]],
    "tall": [[[0], [1], [2], [3]]],
    "columns": [[0, 2], [1, 3]],
    "rows": [[0, 1], [2, 3]],
    "a": [[0, 2], [1, 3]],
    "b": [[0, 1], [2, 3]],
    "corners": [[0, 3], [1, 2]],
    "alone": [[0], [1], [2], [3]],
    "plain": [[0], [1], [2], [3]],
}
# Rows and corners cross, so fastclip refuses them together.
FAMILIES = [
    [name for name in GRIDS if name != "corners"],
    ["all", "shuffled", "twisted", "tall", "corners", "alone", "plain"],
    # What people have: a mesh and its slices, and meshes of its lines that were made apart.
    ["square", "a", "b", "plain"],
    ["all", "rows", "columns", "plain"],
]
# What may be asked for, and the ranks it puts together.
ASKED: dict[str, tuple[list[Any], Callable[[dict[str, Any]], Any]]] = {
    "none": (GRIDS["plain"], lambda meshes: None),
    "world": (GRIDS["all"], lambda meshes: dist.group.WORLD),
    "square": (GRIDS["all"], lambda meshes: meshes["square"]),
    "groups": (GRIDS["all"], lambda meshes: [meshes[name].get_group() for name in "ba"]),
    "slices": (GRIDS["all"], lambda meshes: (meshes["square"]["a"], meshes["square"]["b"])),
    "columns": (GRIDS["a"], lambda meshes: meshes["columns"]),
    "a": (GRIDS["a"], lambda meshes: meshes["square"]["a"]),
    "b": (GRIDS["b"], lambda meshes: [meshes["square"]["b"].get_group()]),
    "corners": (GRIDS["corners"], lambda meshes: meshes["corners"].get_group()),
}


@cache
def my_meshes() -> dict[str, Any]:
    """Of each name the mesh that this rank is in."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    found = {"square": square, "a": square["a"], "b": square["b"]}
    for name, grids in GRIDS.items():
        # All ranks make all meshes.
        made = [DeviceMesh("cpu", grid) for grid in grids if name not in (*found, "plain")]
        for mesh in made:
            if dist.get_rank() in mesh.mesh:
                found[name] = mesh
    return found


def part(whole: Tensor, grid: Tensor, places: list[Any], rank: int) -> Tensor:
    """What of a tensor is on a rank of a mesh."""
    where = (grid == rank).nonzero()[0].tolist()
    for place, at, size in zip(places, where, grid.shape, strict=True):
        if place.is_shard():
            slices = whole.chunk(size, place.dim)
            whole = slices[at] if at < len(slices) else whole.narrow(place.dim, 0, 0)
        elif place.is_partial():
            whole = torch.full_like(whole, 3) if at else whole - 3 * (size - 1)
    return whole


def joined(ranks: set[int], links: list[set[int]]) -> set[int]:
    for _ in links:
        ranks = ranks.union(*(link for link in links if link & ranks))
    return ranks


def norm_of(values: list[Tensor], p: float) -> float | None:
    """None where there is no answer: of a negative order, of nothing."""
    if p > 0:
        return oracle(values, p)
    every = torch.cat([torch.zeros(0), *(v.flatten() for v in values)]).double()
    return torch.linalg.vector_norm(every, p).item() if len(every) or p == 0 else None


class Piece:
    """A parameter and its gradient, whole, as all ranks know them: a tensor of one mesh or rank."""

    def __init__(self, rng: random.Random, name: str, grid: Any, label: int) -> None:
        self.name, self.grid, self.label = name, torch.tensor(grid), label
        self.is_plain, self.ranks = name == "plain", set(self.grid.flatten().tolist())
        shape = [rng.choice([1, 2, 3, 4, 5, 7]) for _ in range(rng.randint(0, 3))]
        if rng.random() < 0.05:
            shape = [0, *shape]
        self.ways = [Replicate()] + [Shard(d) for d in range(len(shape))] * (not self.is_plain)
        self.places = [rng.choice(self.ways) for _ in self.grid.shape]
        self.weight = torch.randn(shape).to(rng.choice(DTYPES))

    def draw(self, rng: random.Random, may_lack: bool) -> None:
        """A new gradient, where it is None, and how it is placed."""
        shape, dtype = self.weight.shape, self.weight.dtype
        way = rng.choice(["placed", "placed", "placed", "none", "lacking", "moved"])
        self.given, self.lacking = self.places, set[int]()
        self.grad = (torch.randn(shape) * 10 ** rng.uniform(-2, 2)).to(dtype)
        # Whoever has the same as others is there if they are.
        is_cut = all(p.is_shard() or n == 1 for p, n in zip(self.places, self.grid.shape))  # noqa: B905
        if way == "none":
            self.lacking = self.ranks
        elif way == "lacking" and is_cut and may_lack:
            self.lacking = {rng.choice(sorted(self.ranks))}
        elif way == "moved" and not self.is_plain and self.grad.numel():
            self.grad = torch.randint(1, 9, shape).to(dtype)
            # torch gathers shards in the order of the ranks, whatever that of their mesh.
            ways = [Partial(), *([] if self.name in ("shuffled", "twisted") else self.ways)]
            ways = [[place] if place.is_shard() else ways for place in self.places]
            self.given = [rng.choice(some) for some in ways]

    @property
    def is_given(self) -> bool:
        return self.lacking != self.ranks

    def here(self, rank: int, places: list[Any] | None = None) -> Tensor:
        return part(self.grad, self.grid, places or self.places, rank)

    def values(self) -> list[Tensor]:
        """All that there is of the gradient, once."""
        twins = [i for i, place in enumerate(self.places) if not place.is_shard()]
        where = {rank: (self.grid == rank).nonzero()[0] for rank in self.ranks - self.lacking}
        return [self.here(rank) for rank in where if not where[rank][twins].any()]

    def senders(self, rank: int, rows: bool) -> set[int]:
        """The ranks with which this one adds up parts of the norm, or of those of rows."""
        found = {rank}
        for d, place in enumerate(self.places):
            if place.is_shard() and not (rows and place.dim == 0 and self.weight.dim() > 1):
                lines = self.grid.movedim(d, -1).reshape(-1, self.grid.shape[d]).tolist()
                found.update(*(line for line in lines if rank in line))
        return found

    def placed(self, whole: Tensor, places: list[Any]) -> Tensor:
        """A tensor on this rank."""
        return self.made_of(part(whole, self.grid, places, dist.get_rank()).clone(), places)

    def made_of(self, local: Tensor, places: list[Any]) -> Tensor:
        if self.is_plain:
            return local
        like = dict(shape=self.weight.shape, stride=self.weight.stride(), run_check=False)
        return DTensor.from_local(local, my_meshes()[self.name], places, **like)


class Case:
    """A layout, and a call on it: with the same parameters twice, of other gradients."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.rank, self.call, self.p = dist.get_rank(), rng.choice(CALLS), rng.choice(ORDERS)
        self.policy = rng.choice(POLICIES)
        if self.call == "units":
            self.p = 2.0
        # Of other orders, an infinity is no reason for a norm that is none.
        if self.call in ("each", "units") or self.p <= 0:
            self.policy = "propagate"
        if self.call == "measure" and self.policy != "error":
            self.policy = "propagate"
        labels = range(rng.randint(1, 3) if self.call == "groups" else 1)
        self.asked = [rng.choice(["none", "world", *ASKED]) for _ in labels]
        if self.call in ("each", "units"):
            self.asked = ["none"]
        self.limits = [self._limit() for _ in labels]
        self.pieces: list[Piece] = []
        # Of few names, so that each meets the others often.
        names = rng.sample(rng.choice(FAMILIES), rng.randint(1, 3))
        for _ in range(rng.randint(1, 6)):
            name, label = rng.choice(names), rng.choice(labels)
            for grid in GRIDS[name]:
                # Meshes that are no whole grid do not join their ranks, which a policy needs.
                if rng.random() < 0.8 or (self.policy != "propagate" and name != "plain"):
                    self.pieces.append(Piece(rng, name, grid, label))
        self.pieces.sort(key=lambda piece: piece.label)
        mine = [piece for piece in self.pieces if self.rank in piece.ranks]
        self.held = [(q, nn.Parameter(q.placed(q.weight, q.places))) for q in mine]
        self.clipper: GradClipper | None = None
        is_asked = any(asked != "none" for asked in self.asked)
        self.is_each = self.call in ("clipper", "groups") and self.p > 0 and not is_asked
        self.is_each = self.is_each and rng.random() < 0.5

    def _limit(self) -> Any:
        number = 10 ** self.rng.uniform(-2, 2)
        rule = 0.7 if self.call == "each" else lambda norm: norm * 0.5
        return self.rng.choice([number, number, 0.0, math.inf, rule])

    def draw(self) -> None:
        rng = self.rng
        for piece in self.pieces:
            piece.draw(rng, self.call != "measure")
        for piece, parameter in self.held:
            lacks = self.rank in piece.lacking
            parameter.grad = None if lacks else piece.placed(piece.grad, piece.given)
        self.spoilt: Piece | None = None
        self.wrong: int | None = None
        usual = [q for q in self.pieces if q.given is q.places and not q.lacking]
        usual = [q for q in usual if q.grad.numel() > 1]
        chance = rng.random()
        may_spoil = self.p > 0 and self.call not in ("each", "units")
        if usual and chance < 0.3 and may_spoil:
            self._spoil(rng.choice(usual))
        elif usual and 0.3 < chance < 0.5:
            self._mistake(rng.choice(usual))
        grads = [parameter.grad for _, parameter in self.held]
        self.before = [None if grad is None else local(grad).clone() for grad in grads]

    def _spoil(self, piece: Piece) -> None:
        """One infinity or NaN; for a policy on one rank, where others may have the same tensor."""
        self.spoilt, value = piece, self.rng.choice([math.inf, math.nan])
        owner = self.rng.choice([rank for rank in sorted(piece.ranks) if piece.here(rank).numel()])
        self.spoilt_on = {owner}
        if self.policy == "propagate":
            piece.grad.view(-1)[self.rng.randrange(piece.grad.numel())] = value
        for other, parameter in self.held:
            if other is piece and self.policy == "propagate":
                parameter.grad = piece.placed(piece.grad, piece.places)
            elif other is piece and owner == self.rank:
                local(parameter.grad).view(-1)[0] = value

    def _mistake(self, piece: Piece) -> None:
        """A gradient that cannot be clipped, on one rank."""
        wrong, kind = self.rng.choice(sorted(piece.ranks)), self.rng.choice(["integer", "expanded"])
        if kind == "expanded" and (self.call == "measure" or piece.here(wrong).numel() < 2):
            return
        self.wrong = wrong
        for other, parameter in self.held:
            if other is piece and wrong == self.rank:
                parameter.grad_dtype = None
                inner = local(parameter.grad)
                made = inner.int() if kind == "integer" else inner.new_ones(1).expand(inner.shape)
                parameter.grad = piece.made_of(made, piece.places)

    def run(self) -> Any:
        parameters = [parameter for _, parameter in self.held]
        groups = [ASKED[asked][1](my_meshes()) for asked in self.asked]
        if self.call == "clip":
            how = dict(process_group=groups[0], nonfinite=self.policy)
            return fastclip.clip_grad_norm_(parameters, self.limits[0], self.p, **how)
        if self.call == "measure":
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            return fastclip.get_total_norm(
                grads, self.p, self.policy == "error", process_group=groups[0]
            )
        if self.call == "each":
            return fastclip.clip_grad_norms_(parameters, self.limits[0], self.p)
        if self.call == "units":
            return fastclip.clip_grad_agc_(parameters, 0.1, 1e-3)
        how = dict(nonfinite=self.policy, each=self.is_each)
        if self.clipper is None and self.call == "clipper":
            one = parameters, self.limits[0], self.p
            self.clipper = GradClipper(*one, process_group=groups[0], **how)
        elif self.clipper is None:
            dicts = [
                {"params": [q for piece, q in self.held if piece.label == label]}
                | {"max_norm": self.limits[label], "process_group": group}
                for label, group in enumerate(groups)
            ]
            self.clipper = GradClipper(norm_type=self.p, groups=dicts, **how)
        return self.clipper.clip_()

    # What is right.

    def line(self, label: int, rank: int) -> set[int]:
        return next(set(ranks) for ranks in ASKED[self.asked[label]][0] if rank in ranks)

    def counted(self, label: int) -> list[Piece]:
        """A DTensor once for each mesh that holds it among the ranks summed over; a plain gradient
        of each of those ranks.
        """
        reach = self.line(label, self.rank)
        own = [piece for piece in self.pieces if piece.label == label]
        return [piece for piece in own if piece.ranks & reach and piece.is_given]

    def norm(self, label: int) -> float | None:
        each = [piece.values() for piece in self.counted(label)]
        if self.p == 0:
            return float(sum(norm_of(values, 0) > 0 for values in each))
        return norm_of([value for values in each for value in values], self.p)

    def links(self, label: int | None) -> list[set[int]]:
        """Ranks that hold something together, or ask for each other; of a label, or of any."""
        some = range(len(self.asked)) if label is None else [label]
        shown = [q for q in self.pieces if q.is_given or self.call != "measure"]
        shown = [q for q in shown if q.label in some]
        asked = [set(ranks) for i in some for ranks in ASKED[self.asked[i]][0]]
        return [q.ranks for q in shown] + asked

    def told(self) -> set[int]:
        """The ranks that share a sum with the one whose gradient cannot be clipped."""
        rank, found = self.wrong, {self.wrong}
        for piece in self.pieces:
            if rank in piece.ranks and (piece.is_given or self.call != "measure"):
                found |= piece.senders(rank, self.call == "units")
        return found.union(*(self.line(label, rank) for label in range(len(self.asked))))

    def is_right(self, norms: Tensor | None, error: Exception | None) -> bool:
        if self.wrong is not None and self.rank in joined({self.wrong}, self.links(None)):
            # Who shares no sum with it may not know.
            if error is None:
                return self.rank not in self.told()
            return self.is_untouched()
        if self.spoilt is not None and self.policy != "propagate":
            label = self.spoilt.label
            if self.rank not in joined(self.spoilt_on, self.links(label)):
                if self.rank in joined(self.spoilt_on, self.links(None)):
                    return True
            elif self.policy == "error":
                return "non-finite" in str(error) and self.is_untouched()
        if error is not None:
            return False
        if self.call == "units":
            return self.are_units_right()
        if self.call == "each":
            return self.is_each_right(norms)
        return all(self.is_label_right(label, n) for label, n in enumerate(norms.reshape(-1)))

    def alike(self, norms: Tensor | None) -> dict[Any, str]:
        """Norms by what they are of: whoever measures the same has the same bits."""
        is_apart = self.spoilt is not None and self.policy != "propagate"
        if norms is None or is_apart or self.call == "units":
            return {}
        if self.call == "each":
            # They are float64 where any of them is.
            keys, norms = [self.pieces.index(piece) for piece, _ in self.held], norms.float()
        else:
            keys = []
            for label, asked in enumerate(self.asked):
                over = () if asked == "none" else self.line(label, self.rank)
                keys.append((*map(self.pieces.index, self.counted(label)), "over", *over))
        return dict(zip(keys, map(str, norms.reshape(-1).tolist()), strict=True))

    def is_label_right(self, label: int, found: Tensor) -> bool:
        expected, limit = self.norm(label), self.limits[label]
        bad = self.spoilt if self.policy != "propagate" else None
        if bad and bad.label == label and self.rank in joined(self.spoilt_on, self.links(label)):
            expected = math.nan if found.isnan() else math.inf
        counted = self.counted(label)
        if not is_near(found, expected, counted):
            return False
        # A parameter without a gradient may make it wide too.
        is_wide = any(piece.grad.dtype == torch.float64 for piece in counted)
        if is_wide and found.dtype != torch.float64:
            return False
        if self.call == "measure":
            return self.is_untouched()
        if expected is None:
            return True
        limit = limit(expected) if callable(limit) else limit
        return self.is_scaled_by(coefficient(expected, limit, self.policy), label)

    def is_scaled_by(self, coef: float | None, label: int) -> bool:
        return all(
            is_scaled(local(parameter.grad), self.then(i), coef, False)
            for i, (piece, parameter) in enumerate(self.held)
            if piece.label == label and self.rank not in piece.lacking
        )

    def then(self, i: int) -> Tensor:
        """What a gradient was, placed as its parameter."""
        piece = self.held[i][0]
        return self.before[i] if piece.given is piece.places else piece.here(self.rank)

    def is_untouched(self) -> bool:
        return all(
            any(is_same(local(parameter.grad), then) for then in (self.before[i], self.then(i)))
            for i, (piece, parameter) in enumerate(self.held)
            if self.rank not in piece.lacking
        )

    def is_each_right(self, norms: Tensor) -> bool:
        for i, ((piece, parameter), found) in enumerate(zip(self.held, norms, strict=True)):
            expected = norm_of(piece.values(), self.p)
            if self.rank in piece.lacking or expected is None:
                continue
            coef = coefficient(expected, self.limits[0], "propagate")
            is_right = is_scaled(local(parameter.grad), self.then(i), coef, False)
            if not (is_right and is_near(found, expected, [piece])):
                return False
        return True

    def are_units_right(self) -> bool:
        for piece, parameter in self.held:
            if self.rank in piece.lacking:
                continue
            whole = piece.grad.double()
            for rank in piece.lacking:
                part(whole, piece.grid, piece.places, rank).zero_()
            weights = piece.weight.double()
            pairs = zip(whole, weights, strict=True) if whole.dim() > 1 else [(whole, weights)]
            for grad, weight in pairs:
                limit, norm = 0.1 * max(norm_of([weight], 2), 1e-3), norm_of([grad], 2)
                grad.mul_(1 if norm <= limit else limit / norm)
            expected = part(whole, piece.grid, piece.places, self.rank)
            now = local(parameter.grad)
            if not is_scaled(now, expected.to(now.dtype), 1 - 1e-16, False):
                return False
        return True


def is_near(found: Tensor, expected: float | None, counted: list[Piece]) -> bool:
    is_wide = all(piece.grad.dtype == found.dtype == torch.float64 for piece in counted)
    close = {"rel": 1e-12 if is_wide else 2.4e-7, "abs": 0, "nan_ok": True}
    return expected is None or float(found) == pytest.approx(expected, **close)


def is_same(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.allclose(one.double(), other.double(), 0, 0, equal_nan=True)


def live(seed: int) -> tuple[str, dict[Any, str]]:
    """What is wrong, and what other ranks have to have alike."""
    case, wrong, alike = Case(seed), "", {}
    for time in range(2):
        case.draw()
        norms, error = None, None
        try:
            norms = case.run()
        except (RuntimeError, TypeError, ValueError) as caught:
            error = caught
        norms = norms.to_local() if isinstance(norms, DTensor) else norms
        if not case.is_right(norms, error):
            wrong += f"call {time}: {case.call} of order {case.p}: {norms}, {error!r}\n"
        alike |= {(time, key): value for key, value in case.alike(norms).items()}
    return wrong, alike


def work(seeds: range) -> dict[int, tuple[str, dict[Any, str]]]:
    found = {}
    for seed in seeds:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.filterwarnings("ignore", "the gradient of|tensors")
            if seed % 4 == 3:
                patch.setattr(_ops, "extension", None)
            try:
                found[seed] = live(seed)
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise
    return found


@pytest.mark.parametrize("start", range(0, 600, 40))
def test_any_layout_is_that_of_the_full_gradients(world, start):
    answers = world(4).run(work, range(start, start + 40), seconds=60)
    for rank, found in enumerate(answers):
        wrong = {seed: why for seed, (why, _) in found.items() if why}
        assert not wrong, f"rank {rank}, by seed: {wrong}"
    for seed in answers[0]:
        norms = {pair for found in answers for pair in found[seed][1].items()}
        assert len(norms) == len(dict(norms)), f"seed {seed}, ranks have other bits: {norms}"
