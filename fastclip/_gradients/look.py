"""Read, check and convert the tensors that C++ does not read."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._ranks import Plan, place_as
from .local import REAL, LocalGrads
from .stored import held

_SUPPORTED = (*REAL, torch.complex32, torch.complex64, torch.complex128)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.jagged)


def look(
    items: list[Tensor],
    write: bool,
    plan: Plan | None,
    name_of: Callable[[int], str] | None = None,
) -> LocalGrads:
    """Return the gradients if they will be written (`write`), else the items; check each."""
    # Keyed by parameter: a compiled graph can guard on its id, but a gradient is new in each step.
    found: dict[int, tuple[Tensor, int]] = {}
    wrappers: list[Tensor] = []
    errors = []
    for position, item in enumerate(items):
        name = f"parameters[{position}]" if write else f"tensors[{position}]"
        _check_tensor(item, name)
        tensor, slot = item.grad if write else item, 0
        if tensor is None:
            continue
        name = f"the gradient of {name}" if write else name_of(position) if name_of else name
        try:
            if plan is None:
                tensor = place_as(tensor, None, name)
            else:
                wrapper, tensor = plan.local(item, tensor, name, write)
                wrappers += [wrapper] * (wrapper is not tensor)
                slot = plan.reduction.slot_of[position]
            check_supported(tensor, name, write)
        except Exception as error:
            # Go on: other ranks may wait for this one to redistribute the next tensors.
            errors.append(error)
        found.setdefault(id(item) if write else position, (tensor, slot))
    if errors:
        raise errors[0]
    tensors, slots = [t for t, _ in found.values()], [slot for _, slot in found.values()]
    return LocalGrads(tensors, slots, wrappers)


def look_at_once(items: list[Tensor], write: bool) -> LocalGrads | None:
    """If all are plain, return the gradients (if `write`) or the items, without checking each.

    Return None if any is not plain or cannot be clipped; `look` then reads them or raises.
    """
    if torch.compiler.is_compiling() or not {*map(type, items)} <= {Tensor, torch.nn.Parameter}:
        return None
    tensors = items
    if write:
        once = {id(item): item for item in items}.values()
        tensors = [grad for item in once if (grad := item.grad) is not None]
    grads = LocalGrads(tensors, [0] * len(tensors), [])
    if not grads.are_plain:
        return None
    may_overlap = write and not all(map(Tensor.is_contiguous, tensors))
    return None if may_overlap and any(map(_overlaps, tensors)) else grads


def describe(value: object) -> str:
    return (
        f"{value!r} of type {type(value).__name__}"
        if isinstance(value, int | float | str | tuple)
        else type(value).__name__
    )


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {describe(value)}; for a module pass "
            "module.parameters()"
        )


def check_supported(tensor: Tensor, name: str, write: bool) -> None:
    if tensor.dtype not in _SUPPORTED:
        raise TypeError(
            f"{name}: dtype {tensor.dtype} cannot be clipped; cast it to one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in _SUPPORTED)}"
        )
    jagged = tensor.layout == torch.jagged
    has_holes = jagged and tensor.lengths() is not None  # type: ignore[attr-defined]
    if tensor.layout not in _LAYOUTS or has_holes:
        raise TypeError(
            f"{name}: layout {tensor.layout}{' with holes' * has_holes} cannot be clipped; convert "
            "it to torch.strided or torch.sparse_coo"
        )
    stored = held(tensor)
    if write and _overlaps(stored):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            f"single memory location. Please clone() the tensor before performing the operation. "
            f"({name} has shape {tuple(stored.shape)} and strides {stored.stride()})"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Return whether torch refuses in-place writes because elements share memory.

    Like torch's own check, this looks for dimensions of stride 0. It misses some overlaps in views
    made by `as_strided`.
    """
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return bool(tensor.numel()) and any(size > 1 and stride == 0 for size, stride in dims)
