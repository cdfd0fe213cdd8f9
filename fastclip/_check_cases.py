"""The cases of `python -m fastclip check`: ops on lists whose sizes lie round the borders of the
kernels, against float64 on the CPU.
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
GAP = 512


def _shapes(sizes: str, itemsize: int) -> list[tuple[int, ...]]:
    tile = 32768 // itemsize
    if sizes == "rows":
        return [(5, 7), (1, 3), (3, tile + 1), (300, 2), (4,), (2, 0), ()]
    if sizes == "many":
        return [(i % 5,) for i in range(2100)]
    ends = (0, 1, 2, 7, 31, 33, 515, tile - 1, tile, tile + 1, 2 * tile + 1)
    return [(end,) for end in ends]


class Case(NamedTuple):
    """One call of one op. `wrong()` says what is wrong with its result, and is "" if nothing is."""

    device: str
    op: str
    dtype: str
    p: float = 2.0
    sizes: str = "borders"
    offset: int = 0  # of each tensor's memory, in elements
    value: str = ""  # of some last elements: nan, inf, or the largest of the dtype

    def wrong(self) -> str:
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
            return "nothing was to be clipped, and tensors were written"
        if self.p == 2 and not self.value:
            again = Canvas(self)
            twice, _, _ = _call(self, again.tensors, again.exact)
            same = canvas.memory.equal(again.memory)
            if not same or (found is not None and not have_equal_bits(found, twice)):
                return "the same call gave other bits the second time"
        return ""


class Canvas:
    """The tensors of one list in one memory, and before, between and after them bytes that are NaN
    to whoever reads them, and are looked at afterwards."""

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
        self.exact = [_exact(self.before[at].view(d).view(shape)) for at, shape, d in places]

    def is_written(self, outside: bool) -> bool:
        differ = self.memory.cpu() != self.before
        return bool(differ[self.inside != outside].any())


def _exact(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()


def _is_close(found: Tensor, expected: Tensor, eps: float) -> bool:
    least, one, other = torch.finfo(found.dtype).smallest_normal, _exact(found), _exact(expected)
    return torch.allclose(one, other, rtol=eps + 1e-6, atol=least * (eps > 0), equal_nan=True)


def have_equal_bits(one: Tensor, other: Tensor) -> bool:
    return one.cpu().nan_to_num(-1).equal(other.cpu().nan_to_num(-1))


def _norm(xs: list[Tensor], p: float) -> Tensor:
    # The zero is for lists without elements.
    x = torch.cat(
        [*(x.reshape(-1) for x in xs), torch.zeros(1, dtype=torch.float64, device="cpu")]
    ).abs()
    unit = x.amax().clamp(1e-300, 1e300)
    norm: Tensor = torch.linalg.vector_norm(x / unit, p) * unit
    return norm


def _call(case: Case, ts: list[Tensor], xs: list[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """What an op returns, what it is to return, and what is to become of the tensors."""
    op, p, like = case.op, case.p, ts[0]

    def there(number: Any) -> Tensor:
        return torch.tensor(number, dtype=_ops.widest(like.device), device=like.device)

    if op == "norms of rows":
        rows = [row for x in xs for row in (x if x.dim() > 1 else [x])]
        return _ops.norms(ts, p, None, False, True), torch.stack([_norm([r], p) for r in rows]), xs
    if op == "clamp_":
        return _ops.clamp_(ts, 0.5), None, [x.clamp(-0.5, 0.5) for x in xs]
    if op.startswith("scale_"):
        coefs = {"scale_": 0.37, "scale_ by 1": 1.0, "scale_ to 0": -0.0}
        if op != "scale_ each":
            made = xs if coefs[op] == 1 else [x.nan_to_num() * coefs[op] for x in xs]
            return _ops.scale_(ts, there(coefs[op])), None, made
        each = [(1.0, 0.37, 0.5)[i % 3] for i in range(len(ts))]
        return _ops.scale_(ts, there(each)), None, [x * c for x, c in zip(xs, each, strict=True)]
    norms = torch.stack([_norm([x], p) for x in xs])
    if op == "norms":
        return _ops.norms(ts, p), norms, xs
    if op == "norms of groups":
        group = [i % 3 for i in range(len(ts))]
        return _ops.norms(ts, p, group), torch.stack([_norm(xs[i::3], p) for i in range(3)]), xs
    total = float(_norm(xs, p))
    if op == "norm":
        return _ops.norm(ts, p), norms.new_tensor(total), xs
    limit = 2 * total + 1 if op == "clip_norm_ idle" else 0.37 * total if total < math.inf else 1.0
    coef = limit / (total + 1e-6)
    made = xs if coef >= 1 else [x * coef for x in xs]
    if op.startswith("clip_norm_"):
        known = [_ops.norms(ts, p, None, True)] if op == "clip_norm_ known" else None
        given = there(limit) if op == "clip_norm_ tensor" else limit
        return _ops.clip_norm_(ts, given, p, known), norms.new_tensor(total), made
    parameters = [torch.nn.Parameter(torch.zeros_like(t)) for t in ts]
    for parameter, tensor in zip(parameters, ts, strict=True):
        parameter.grad = tensor
    if not total < math.inf:
        made = {"keep": list(xs), "zero": [*map(torch.zeros_like, xs)]}.get(op, made)
    policy: Any = op
    return clip_grad_norm_(parameters, limit, p, nonfinite=policy), norms.new_tensor(total), made


def cases(device: str) -> Iterator[Case]:
    """Those first that most faults would show in."""
    kinds = ["mixed", *DTYPES]
    clips = ["clip_norm_", "clip_norm_ idle", "clip_norm_ known", "clip_norm_ tensor"]
    for dtype in kinds:
        for op in ("scale_", "scale_ by 1", "scale_ to 0", "scale_ each", "clamp_"):
            yield Case(device, op, dtype, offset=dtype == "mixed")
    yield Case(device, "scale_ to 0", "float32", value="nan")
    for dtype, value in itertools.product(kinds, ("nan", "inf", "largest")):
        if value == "largest" and dtype in ("float64", "mixed"):
            continue
        for p in (math.inf, 2.0, 1.0):
            yield Case(device, "norms", dtype, p, value=value)
        for op in ("propagate", "keep", "zero"):
            yield Case(device, op, dtype, value=value)
    for op in ("norm", "norms", "scale_", "scale_ each", "clamp_", *clips):
        yield Case(device, op, "mixed", sizes="many")
    for p, offset in ((2.0, 0), (2.0, 1), (1.0, 1), (math.inf, 0)):
        for dtype in kinds:
            for op in ("norm", "norms", "norms of groups", *clips):
                yield Case(device, op, dtype, p, offset=offset)
            yield Case(device, "norms of rows", dtype, p, "rows", offset)
