"""From parameters to `Gradients`.

The extension reads a list of plain gradients in C++. Where it returns None, as some are sparse,
complex, on several devices, with gaps, of a subclass or wrong, look.py reads them one by one.
Gradients over ranks, or in groups, are read in the same two ways, by a plan of the parameters.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._private import private
from .._ranks import (
    NONE,
    Asked,
    Kind,
    Plan,
    as_groups,
    find_plan,
    follow,
    is_spread,
    plan_of_plain,
)
from .._warnings import warn
from .local import LocalGrads
from .look import describe, look, look_at_once
from .protocol import Gradients, GradientsHere
from .spread import SpreadGrads
from .traced import read_in_graph

_has_foreach = private("torch.utils._foreach_utils._device_has_foreach_support")
Tensors = Tensor | Iterable[Tensor]


def read(
    parameters: Tensors,
    foreach: bool | None = None,
    process_group: Any = None,
    kind: Kind = Kind.TOTAL,
    agree: bool = False,
) -> Gradients:
    """Read the gradients of `parameters` to change them, without None, of each parameter once.

    With `agree`, a norm over ranks that is not finite on one rank is so on all.

    Raises:
        TypeError: no tensors, or a gradient's dtype or layout that cannot be clipped.
        ValueError: two groups of `process_group` share more than this rank.
        RuntimeError: elements of a gradient share memory; or `foreach` is True on a device for
            which torch has no foreach kernels.
    """
    items = as_list(parameters, "parameters")
    grads = _read(items, foreach, _asked(process_group), True, kind, agree)
    # Parameters without gradients are no mistake: a mesh or a stage may have none this time.
    is_empty = getattr(grads, "failure", None) is None and not len(grads)
    if is_empty and items and not any(map(_may_have_grad, items)):
        warn(
            "fastclip: no parameter has a gradient, and nothing was changed; pass the parameters "
            "whose .grad is to be clipped, not the gradients themselves"
        )
    return grads


def clip_at_once_(parameters: list[Tensor], max_norm: Any, norm_type: Any) -> Tensor | None:
    """Do as `clip_grad_norm_` does, in one call of C++: after backward all of Python is cold.

    None, and nothing is done, where anything has to be looked at.
    """
    extension = _extension()
    if extension is None:
        return None
    total_norm: Tensor | None = extension.clip_grad_norm_(parameters, max_norm, norm_type)
    return total_norm


def take(
    tensors: Tensors,
    foreach: bool | None = None,
    process_group: Any = None,
    kind: Kind = Kind.TOTAL,
    agree: bool = False,
) -> Gradients:
    """Take the tensors themselves, to measure them, with the checks of `read`."""
    items = as_list(tensors, "tensors")
    return _read(items, foreach, _asked(process_group), False, kind, agree)


def take_weights(parameters: list[Tensor], kind: Kind) -> Gradients:
    """Take the parameters themselves, as `take` does: those that `read` finds gradients of."""
    # Over ranks all weights are measured, as any may have a gradient on another rank; else only
    # those that have one here.
    positions = present(parameters if is_spread(parameters) else (), parameters)
    weights = [parameters[i] for i in positions]
    return _read(
        weights, None, NONE, False, kind, False, lambda i: f"the weight parameters[{positions[i]}]"
    )


@torch.compiler.disable
def read_by(
    plan: Plan | None,
    parameters: list[Tensor],
    asked: Asked,
    group_of: Sequence[int],
    p: float,
    agree: bool,
) -> SpreadGrads:
    """As `read`, by the group of each parameter, and by the plan of the last time if it fits."""
    plan, grads = follow(plan, parameters, asked, True, Kind.of_order(p), group_of)
    return _spread(plan, grads, None, agree, lambda: look(parameters, True, plan))


def _read(
    items: list[Tensor],
    foreach: bool | None,
    asked: Asked,
    write: bool,
    kind: Kind,
    agree: bool,
    name_of: Callable[[int], str] | None = None,
) -> Gradients:
    reader = _extension()
    if reader is None:
        grads = look_at_once(items, write)
    else:
        grads = reader.read_grads(items) if write else reader.take_tensors(items)
    if asked is NONE and (grads is not None or not is_spread(items)):
        grads = look(items, write, None, name_of) if grads is None else grads
        _check_foreach(grads, foreach)
        return grads
    if torch.compiler.is_compiling() and asked is NONE and kind is Kind.TOTAL and not agree:
        found: Gradients | None = read_in_graph(items, write)
        if found is not None:
            return found
    spread: Gradients = _read_spread(items, grads, foreach, asked, write, kind, agree, name_of)
    return spread


@torch.compiler.disable
def _read_spread(
    items: list[Tensor],
    grads: Any,
    foreach: bool | None,
    asked: Asked,
    write: bool,
    kind: Kind,
    agree: bool,
    name_of: Callable[[int], str] | None,
) -> SpreadGrads:
    if grads is not None and kind is Kind.TOTAL:
        plan = plan_of_plain(items, asked)
    else:
        plan, grads = find_plan(items, asked, write, kind)
    return _spread(plan, grads, foreach, agree, lambda: look(items, write, plan, name_of))


def _spread(
    plan: Plan,
    grads: Any,
    foreach: bool | None,
    agree: bool,
    read_all: Callable[[], LocalGrads],
) -> SpreadGrads:
    """Make SpreadGrads; keep an error in them, if other ranks wait for the sums of this one."""
    try:
        if plan.reduction.crossing is not None:
            raise ValueError(plan.reduction.crossing)
        grads = read_all() if grads is None else grads
        _check_foreach(grads, foreach)
        return SpreadGrads(grads, plan, agree)
    except Exception as error:
        if not plan.reduction.sends:
            raise
        return SpreadGrads(LocalGrads([], [], []), plan, agree, error)


def _may_have_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)


def _asked(process_group: Any) -> Asked:
    return NONE if process_group is None else (as_groups(process_group),)


def present(norms: Sequence[Any] | Tensor, parameters: list[Tensor]) -> list[int]:
    """The positions of the parameters whose norms these are: all, or those with a gradient."""
    if len(norms) == len(parameters):
        return list(range(len(parameters)))
    found = {id(item): i for i, item in reversed(list(enumerate(parameters)))}
    return sorted(i for i in found.values() if parameters[i].grad is not None)


def aligned(norms: Tensor, parameters: list[Tensor]) -> Tensor:
    """A norm for each parameter: 0 for one without a gradient, or one that is there before."""
    if len(norms) == len(parameters):
        return norms
    found = [norms.new_zeros(())] * len(parameters)
    for i, norm in zip(present(norms, parameters), norms.unbind(), strict=True):
        found[i] = norm
    return torch.stack(found)


def _extension() -> Any:
    """The extension, unless the compiler looks at everything."""
    return None if torch.compiler.is_compiling() else _ops.extension


def _check_foreach(grads: GradientsHere, foreach: bool | None) -> None:
    for device in grads.devices() if foreach else ():
        if not _has_foreach(device):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {device.type} tensors"
            )


def as_list(tensors: Tensors, name: str) -> list[Tensor]:
    if isinstance(tensors, list):
        return tensors
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        items = list(tensors)
    except TypeError:
        raise TypeError(
            f"{name}: expected a tensor or an iterable of tensors, got {describe(tensors)}; "
            "of a module pass module.parameters()"
        ) from None
    # A list of gradients may be empty; no parameters are a mistake.
    if not items and name == "parameters" and isinstance(tensors, types.GeneratorType):
        warn("`parameters` is an empty generator, no gradient clipping will occur.")
    return items
