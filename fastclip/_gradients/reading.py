"""From parameters to `Gradients`.

The extension reads a list of plain gradients in C++. It returns None if any is sparse, complex,
of a subclass, on a second device, invalid or has gaps in memory; look.py then reads each.
Gradients over ranks or in groups are read in the same two ways, by a `Plan` of the parameters.
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
    """Read the gradients of `parameters` to change them. Skip None and repeated parameters.

    With `agree`, a norm over ranks that is not finite on one rank is not finite on any.

    Raises:
        TypeError: an item is not a tensor, or a gradient's dtype or layout cannot be clipped.
        ValueError: two groups of `process_group` have more than this rank in common.
        RuntimeError: elements of a gradient share memory; or `foreach` is True on a device for
            which torch has no foreach kernels.
    """
    items = as_list(parameters, "parameters")
    grads = _read(items, foreach, _asked(process_group), True, kind, agree)
    # Warn only if no parameter can have a gradient; one step or pipeline stage may lack them all.
    is_empty = getattr(grads, "failure", None) is None and not len(grads)
    if is_empty and items and not any(map(_may_have_grad, items)):
        warn(
            "fastclip: no parameter has a gradient, and nothing was changed; pass the parameters "
            "whose .grad is to be clipped, not the gradients themselves"
        )
    return grads


def clip_at_once_(parameters: list[Tensor], max_norm: Any, norm_type: Any) -> Tensor | None:
    """Do all of `clip_grad_norm_` in one C++ call: after backward Python's code is in no cache.

    Return None, with nothing done, if any tensor or argument has to be checked in Python.
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
    """Read the tensors themselves, not their gradients, to measure them; checks as in `read`."""
    items = as_list(tensors, "tensors")
    return _read(items, foreach, _asked(process_group), False, kind, agree)


def take_weights(parameters: list[Tensor]) -> Gradients:
    """Read, by rows, the parameters themselves whose gradients `read` finds."""
    # Over ranks all weights are measured, as each may have a gradient on another rank; otherwise
    # only those that have a gradient here.
    positions = present(parameters if is_spread(parameters) else (), parameters)
    weights = [parameters[i] for i in positions]

    def name_of(i: int) -> str:
        return f"the weight parameters[{positions[i]}]"

    return _read(weights, None, NONE, False, Kind.ROWS, False, name_of)


@torch.compiler.disable
def read_by(
    plan: Plan | None,
    parameters: list[Tensor],
    asked: Asked,
    group_of: Sequence[int],
    kind: Kind,
    agree: bool,
) -> SpreadGrads:
    """Read gradients as `read` does, in the groups of `group_of`; reuse `plan` if it still fits."""
    plan, grads = follow(plan, parameters, asked, True, kind, group_of)
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
    """Make `SpreadGrads`; if other ranks wait for this rank's sums, keep an error for later."""
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
    """Return the indices of the parameters that `norms` are of: all, or those with gradients."""
    if len(norms) == len(parameters):
        return list(range(len(parameters)))
    found = {id(item): i for i, item in reversed(list(enumerate(parameters)))}
    return sorted(i for i in found.values() if parameters[i].grad is not None)


def aligned(norms: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return a norm for each parameter: 0 if it has no gradient or repeats an earlier one."""
    if len(norms) == len(parameters):
        return norms
    found = [norms.new_zeros(())] * len(parameters)
    for i, norm in zip(present(norms, parameters), norms.unbind(), strict=True):
        found[i] = norm
    return torch.stack(found)


def _extension() -> Any:
    """Return the extension; None in a graph of torch.compile, which cannot trace it."""
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
            "for a module pass module.parameters()"
        ) from None
    # An empty list may be meant; an empty generator was most likely used up before.
    if not items and name == "parameters" and isinstance(tensors, types.GeneratorType):
        warn("`parameters` is an empty generator, no gradient clipping will occur.")
    return items
