"""The definition of every op: its schema, fake implementation and default.

To add an op, call `define`, write its default in reference.py, export it in `__init__.py`, register
kernels in csrc/cpu and csrc/cuda, and declare its signature in csrc/tensor_list.h.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .coef import as_limit
from .loading import refusal, turned_off
from .measure import widest
from .process import once
from .transforms import is_active


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    default: Callable[..., Any],
) -> None:
    libraries: dict[str, torch.library.Library] = once("libraries", dict)
    # If an earlier import of this package defined the op, freeing its library undoes that.
    libraries.pop(name, None)
    libraries[name] = library = torch.library.Library("fastclip", "FRAGMENT")
    library.define(name + schema)
    torch.library.register_fake(f"fastclip::{name}", fake, lib=library)
    library.impl(name, default, "CompositeExplicitAutograd")
    library.impl(name, default if is_active else is_active, "FuncTorchDynamicLayerFrontMode")


def _with_warning(default: Callable[..., Any]) -> Callable[..., Any]:
    """Return `default` with a warning if GPU tensors reach it because CUDA kernels cannot run."""

    def op(tensors: Sequence[Tensor], *args: Any) -> Any:
        is_expected = not (tensors and tensors[0].is_cuda) or turned_off()
        if not is_expected and (why := refusal(tensors[0].device)):
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
    max_norm: Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    return _norm_fake(tensors, p)


define(
    "norm",
    "(Tensor[] tensors, float p, bool wide=False) -> Tensor",
    _norm_fake,
    _with_warning(reference.norm),
)
define(
    "norms",
    "(Tensor[] tensors, float p, int[]? group=None, bool wide=False, bool rows=False) -> Tensor",
    _norms_fake,
    _with_warning(reference.norms),
)
define(
    "scale_",
    "(Tensor(a!)[] tensors, Tensor coef, int[]? group=None, bool rows=False) -> ()",
    _in_place_fake,
    _with_warning(reference.scale_),
)
define(
    "clamp_",
    "(Tensor(a!)[] tensors, float bound) -> ()",
    _in_place_fake,
    _with_warning(reference.clamp_),
)
define(
    "clip_norm_",
    "(Tensor(a!)[] tensors, Tensor max_norm, float p, Tensor[]? norms=None) -> Tensor",
    _clip_norm_fake,
    _with_warning(reference.clip_norm_),
)


def _op(name: str) -> Callable[..., Any]:
    """Return a function that looks up the op at each call: a reload of the package redefines it."""

    def op(*args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.fastclip, name)(*args, **kwargs)

    return op


norm: Callable[..., Tensor] = _op("norm")
norms: Callable[..., Tensor] = _op("norms")
scale_, clamp_ = map(_op, ("scale_", "clamp_"))


def clip_norm_(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    """Call the op; a threshold that is a number becomes a tensor, see `as_limit`."""
    device = tensors[0].device if tensors else torch.device("cpu")
    limit = as_limit(max_norm, device)
    total_norm: Tensor = torch.ops.fastclip.clip_norm_(tensors, limit, p, norms)
    return total_norm
