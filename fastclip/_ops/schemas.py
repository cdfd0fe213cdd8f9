"""What every op is: its schema, its fake, its default, and what it is inside transforms.

A new op is one call of `define`, here or beside the one feature that it serves; a kernel for it is
registered in a file of csrc/cpu or csrc/cuda. `Dtype` in csrc/formulas.h says what a new dtype
takes.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import coef, reference
from .loading import refusal
from .process import once
from .rows import widest
from .transforms import refused


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    default: Callable[..., Any],
    transformed: Callable[..., Any] | None = None,
) -> Any:
    """Return the op. `transformed`: what it is inside transforms, if not its default."""
    libraries: dict[str, torch.library.Library] = once("libraries", dict)
    # One that an earlier import of this package has defined goes with its library.
    libraries.pop(name, None)
    libraries[name] = library = torch.library.Library("fastclip", "FRAGMENT")
    library.define(name + schema)
    torch.library.register_fake(f"fastclip::{name}", fake, lib=library)
    library.impl(name, default, "CompositeExplicitAutograd")
    library.impl(name, transformed or default, "FuncTorchDynamicLayerFrontMode")
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.fastclip, packet), overload or "default")


def _announced(default: Callable[..., Any]) -> Callable[..., Any]:
    """`default`, with a warning where a GPU's gradients reach it that kernels might have served."""

    def op(tensors: Sequence[Tensor], *args: Any) -> Any:
        if tensors and tensors[0].is_cuda and (why := refusal(tensors[0].device)):
            warnings.warn(
                f"fastclip's plain-PyTorch ops are in use for {tensors[0].device}: {why}",
                stacklevel=2,
            )
        return default(tensors, *args)

    return op


def _result(tensors: Sequence[Tensor], shape: tuple[int, ...], wide: bool) -> Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = widest(device) if wide else reference.result_dtype(tensors)
    return torch.empty(shape, dtype=dtype, device=device)


def _norm_fake(tensors: Sequence[Tensor], p: float, wide: bool = False) -> Tensor:
    return _result(tensors, (), wide)


def _norms_fake(
    tensors: Sequence[Tensor],
    p: float,
    group: Sequence[int] | None = None,
    wide: bool = False,
    rows: bool = False,
) -> Tensor:
    reference.check_groups(len(tensors), group, rows)
    count = sum(reference.count_rows(t) for t in tensors) if rows else len(tensors)
    groups = count if group is None else max(group, default=-1) + 1
    return _result(tensors, (groups,), wide)


def _in_place_fake(*args: Any) -> None:
    return None


def _clip_norm_fake(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    return _norm_fake(tensors, p)


define(
    "norm",
    "(Tensor[] tensors, float p, bool wide=False) -> Tensor",
    _norm_fake,
    _announced(reference.norm),
)
define(
    "norms",
    "(Tensor[] tensors, float p, int[]? group=None, bool wide=False, bool rows=False) -> Tensor",
    _norms_fake,
    _announced(reference.norms),
)
define(
    "scale_",
    "(Tensor(a!)[] tensors, Tensor coef, int[]? group=None, bool rows=False) -> ()",
    _in_place_fake,
    _announced(reference.scale_),
)
define(
    "clamp_",
    "(Tensor(a!)[] tensors, float bound) -> ()",
    _in_place_fake,
    _announced(reference.clamp_),
)
define(
    "clip_norm_",
    "(Tensor(a!)[] tensors, float max_norm, float p, Tensor[]? norms=None) -> Tensor",
    _clip_norm_fake,
    _announced(reference.clip_norm_),
)
define(
    "clip_norm_.tensor",
    "(Tensor(a!)[] tensors, Tensor max_norm, float p, Tensor[]? norms=None) -> Tensor",
    _clip_norm_fake,
    _announced(reference.clip_norm_),
)

define(
    "clip_coef",
    "(Tensor total_norm, float max_norm, bool wide=True) -> Tensor",
    lambda total_norm, *how: torch.empty_like(total_norm),
    coef.clip_coef,
)
define(
    "clip_coef.tensor",
    "(Tensor total_norm, Tensor max_norm, bool wide=True) -> Tensor",
    lambda total_norm, *how: torch.empty_like(total_norm),
    coef.clip_coef,
)
record_ = define(
    "record_",
    "(Tensor(a!) rows, Tensor(b!) steps, Tensor norms, Tensor limits) -> ()",
    _in_place_fake,
    reference.record_,
    refused("GradClipper"),
)

norm: Callable[..., Tensor] = torch.ops.fastclip.norm
norms: Callable[..., Tensor] = torch.ops.fastclip.norms
scale_ = torch.ops.fastclip.scale_
clamp_ = torch.ops.fastclip.clamp_


# The dispatcher would take a 0-d tensor for a number and wait for its value.
def clip_norm_(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    if tensors:
        max_norm = _as_traced(max_norm, tensors[0])
    ops = torch.ops.fastclip.clip_norm_
    op: Callable[..., Tensor] = ops.tensor if isinstance(max_norm, Tensor) else ops.default
    return op(tensors, max_norm, p, norms)


def clip_coef(total_norm: Tensor, max_norm: float | Tensor, wide: bool = True) -> Tensor:
    max_norm = _as_traced(max_norm, total_norm)
    ops = torch.ops.fastclip.clip_coef
    op: Callable[..., Tensor] = ops.tensor if isinstance(max_norm, Tensor) else ops.default
    return op(total_norm, max_norm, wide)


def _as_traced(number: float | Tensor, beside: Tensor) -> float | Tensor:
    """The compiler would compile an op anew for every number, but not for a tensor."""
    if isinstance(number, Tensor) or not torch.compiler.is_compiling():
        return number
    return beside.new_ones((), dtype=widest(beside.device)) * number
