"""The cases of `python -m fastclip check`: each op on lists of tensors, against float64 on the CPU.

The tensors have the sizes at which kernels change to another code path, and sizes one off.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from .clip import clip_grad_norm_

DTYPES = ("float32", "bfloat16", "float16", "float64")
GAP = 512  # bytes before and after each tensor, at least


def _shapes(sizes: str, itemsize: int) -> list[tuple[int, ...]]:
    tile = 32768 // itemsize
    if sizes == "rows":
        return [(5, 7), (1, 3), (3, tile + 1), (300, 2), (4,), (2, 0), ()]
    if sizes == "many":
        return [(i % 5,) for i in range(2100)]
    ends = (0, 1, 2, 7, 31, 33, 515, tile - 1, tile, tile + 1, 2 * tile + 1)
    return [(end,) for end in ends]


class Case(NamedTuple):
    """One call of one op."""

    device: str
    op: str
    dtype: str
    p: float = 2.0
    sizes: str = "borders"
    offset: int = 0  # elements from an aligned address to each tensor
    value: str = ""  # the last element of some tensors: "nan", "inf", "largest" (of its dtype)

    def wrong(self) -> str:
        """Call the op, and return in words what is wrong with its result; "" if nothing is."""
        canvas = Canvas(self)
        found, expected, exact = _call(self, canvas.tensors, canvas.exact)
        if found is not None and not _is_close(found, expected.to(found.dtype), 0.0):
            return f"expected the norms {expected}, got {found}"
        for i, (tensor, x) in enumerate(zip(canvas.tensors, exact, strict=True)):
            if not _is_close(tensor, x, torch.finfo(tensor.dtype).eps):
                return f"expected tensors[{i}] to become {x}, got {tensor}"
        if canvas.is_written(outside=True):
            return "memory outside of the tensors was written"
        if exact is canvas.exact and canvas.is_written(outside=False):
            return "nothing was to be clipped, but tensors were written"
        if self.p == 2 and not self.value:
            again = Canvas(self)
            twice, _, _ = _call(self, again.tensors, again.exact)
            same = found is None or found.nan_to_num(-1).equal(twice.nan_to_num(-1))
            if not same or not canvas.memory.equal(again.memory):
                return "the same call gave other bits the second time"
        return ""


class Canvas:
    """All tensors of one list, in one block of memory.

    The bytes before, between and after them are 255, which makes NaN in every dtype. A kernel that
    reads outside of a tensor returns NaN, and one that writes there changes these bytes.
    """

    def __init__(self, case: Case) -> None:
        names = DTYPES if case.dtype == "mixed" else (case.dtype,)
        kinds: list[torch.dtype] = [getattr(torch, name) for name in names]
        random, places, end = torch.Generator().manual_seed(0), [], 0
        shapes = _shapes(case.sizes, kinds[0].itemsize)
        for shape, dtype in zip(shapes, itertools.cycle(kinds), strict=False):
            start = (end // GAP + 2) * GAP + case.offset * dtype.itemsize
            end = start + math.prod(shape) * dtype.itemsize
            places.append((slice(start, end), shape, dtype))
        self.before = torch.full((end + 2 * GAP,), 255, dtype=torch.uint8, device="cpu")
        self.inside = torch.zeros(end + 2 * GAP, dtype=torch.bool, device="cpu")
        for i, (place, shape, dtype) in enumerate(places):
            self.inside[place] = True
            values = torch.randn(math.prod(shape), generator=random, device="cpu").to(dtype)
            if len(values) and i % 5 == 3 and case.value:
                largest = torch.finfo(dtype).max
                values[-1] = largest if case.value == "largest" else float(case.value)
            self.before[place].view(dtype).copy_(values)
        self.memory = self.before.to(case.device, copy=True)
        self.tensors = [self.memory[at].view(d).view(shape) for at, shape, d in places]
        self.exact = [self.before[at].view(d).view(shape).double() for at, shape, d in places]

    def is_written(self, outside: bool) -> bool:
        differ = self.memory.cpu() != self.before
        return bool(differ[self.inside != outside].any())


def _is_close(found: Tensor, expected: Tensor, eps: float) -> bool:
    least = torch.finfo(found.dtype).smallest_normal * (eps > 0)
    pair = found.cpu().double(), expected.cpu().double()
    return torch.allclose(*pair, rtol=eps + 1e-6, atol=least, equal_nan=True)


def _norms(lists: list[list[Tensor]], p: float) -> Tensor:
    # amax needs an element, and a list may have none.
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    found = []
    for tensors in lists:
        x = torch.cat([zero, *(tensor.reshape(-1) for tensor in tensors)]).abs()
        unit = x.amax().clamp(1e-300, 1e300)
        found.append(torch.linalg.vector_norm(x / unit, p) * unit)
    return torch.stack(found)


def _call(case: Case, ts: list[Tensor], xs: list[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """Call an op on tensors `ts`, whose float64 copies are `xs`.

    Return the op's result, the right result, and the right values of the tensors after the call.
    """
    op, p = case.op, case.p
    like, wide = ts[0], _ops.widest(ts[0].device)
    if op == "clamp_":
        return _ops.clamp_(ts, 0.5), None, [x.clamp(-0.5, 0.5) for x in xs]
    if op == "scale_ each":
        each = [(1.0, 0.37, 0.5)[i % 3] for i in range(len(ts))]
        scaled = [x * c for x, c in zip(xs, each, strict=True)]
        return _ops.scale_(ts, like.new_tensor(each, dtype=wide)), None, scaled
    if op.startswith("scale_"):
        coef = {"scale_": 0.37, "scale_ by 1": 1.0, "scale_ to 0": -0.0}[op]
        scaled = xs if coef == 1 else [x.nan_to_num() * coef for x in xs]
        return _ops.scale_(ts, like.new_tensor(coef, dtype=wide)), None, scaled
    if op == "norms of rows":
        rows = [row for x in xs for row in (x if x.dim() > 1 else [x])]
        return _ops.norms(ts, p, None, False, True), _norms([[row] for row in rows], p), xs
    if op == "norms of groups":
        group = [i % 3 for i in range(len(ts))]
        return _ops.norms(ts, p, group), _norms([xs[i::3] for i in range(3)], p), xs
    if op == "norms":
        return _ops.norms(ts, p), _norms([[x] for x in xs], p), xs
    (total,) = _norms([xs], p)
    if op == "norm":
        return _ops.norm(ts, p), total, xs
    if op in ("propagate", "keep", "zero"):
        return _clip_by_policy(op, ts, xs, total)
    limit = 2 * float(total) + 1 if op == "clip_norm_ idle" else 0.37 * float(total)
    clipped = xs if op == "clip_norm_ idle" else [x * limit / (total + _ops.EPSILON) for x in xs]
    known = [_ops.norms(ts, p, None, True)] if op == "clip_norm_ known" else None
    given = like.new_tensor(limit, dtype=wide) if op == "clip_norm_ tensor" else limit
    return _ops.clip_norm_(ts, given, p, known), total, clipped


def _clip_by_policy(
    policy: Any, ts: list[Tensor], xs: list[Tensor], total: Tensor
) -> tuple[Any, Any, list[Tensor]]:
    """Call `clip_grad_norm_` with a policy for norms that are not finite."""
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in ts]
    for parameter, tensor in zip(parameters, ts, strict=True):
        parameter.grad = tensor
    limit = 0.37 * float(total) if total.isfinite() else 1.0
    clipped = [x * limit / (total + _ops.EPSILON) for x in xs]
    if not total.isfinite():
        clipped = {"keep": list(xs), "zero": [x * 0 for x in map(torch.nan_to_num, xs)]}.get(
            policy, clipped
        )
    return clip_grad_norm_(parameters, limit, nonfinite=policy), total, clipped


def cases(device: str) -> Iterator[Case]:
    """Yield the cases; those that are most likely to show a fault come first."""
    kinds = ["mixed", *DTYPES]
    clips = ["clip_norm_", "clip_norm_ idle", "clip_norm_ known", "clip_norm_ tensor"]
    for dtype in kinds:
        for op in ("scale_", "scale_ by 1", "scale_ to 0", "scale_ each", "clamp_"):
            yield Case(device, op, dtype, offset=dtype == "mixed")
    for dtype, value in itertools.product(kinds, ("nan", "inf", "largest")):
        if value == "largest" and dtype in ("float64", "mixed"):
            continue
        for p in (math.inf, 2.0, 1.0):
            yield Case(device, "norms", dtype, p, value=value)
        for op in ("scale_ to 0", "propagate", "keep", "zero"):
            yield Case(device, op, dtype, value=value)
    for op in ("norm", "norms", "scale_", "scale_ each", "clamp_", *clips):
        yield Case(device, op, "mixed", sizes="many")
    for p, offset in ((2.0, 0), (2.0, 1), (1.0, 1), (math.inf, 0)):
        for dtype in kinds:
            for op in ("norm", "norms", "norms of groups", *clips):
                yield Case(device, op, dtype, p, offset=offset)
            yield Case(device, "norms of rows", dtype, p, "rows", offset)
