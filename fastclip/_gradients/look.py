"""Tensors looked at one by one, with all that Python knows to check: what C++ does not read."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._ranks import Plan, placed
from .local import LocalGrads, held

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUPPORTED = (*REAL, torch.complex32, torch.complex64, torch.complex128)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.jagged)


def look(
    items: list[Tensor],
    write: bool,
    plan: Plan | None,
    name_of: Callable[[int], str] | None = None,
) -> LocalGrads:
    """The gradients, or tensors, one by one, with all that Python knows to check."""
    # By parameter: a compiled graph may depend on these, not on gradients made anew every step.
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
                tensor = placed(tensor, None, name)
            else:
                wrapper, tensor = plan.local(item, tensor, name, write)
                wrappers += [wrapper] * (wrapper is not tensor)
                slot = plan.reduction.slot_of[position]
            check_supported(tensor, name, write)
        except Exception as error:
            # The next ones may have to be placed, together with other ranks.
            errors.append(error)
        found.setdefault(id(item) if write else position, (tensor, slot))
    if errors:
        raise errors[0]
    tensors, slots = [t for t, _ in found.values()], [slot for _, slot in found.values()]
    return LocalGrads(tensors, slots, wrappers)


def describe(value: object) -> str:
    return (
        f"{value!r} of type {type(value).__name__}"
        if isinstance(value, int | float | str | tuple)
        else type(value).__name__
    )


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {describe(value)}; of a module pass "
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
    if write and overlaps(stored):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            f"single memory location. Please clone() the tensor before performing the operation. "
            f"({name} has shape {tuple(stored.shape)} and strides {stored.stride()})"
        )


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if not tensor.numel():
        return False
    dims = [(tensor.stride(i), size) for i, size in enumerate(tensor.shape) if size > 1]
    if torch.compiler.is_compiling():
        # No order of symbolic strides is known: what torch refuses.
        return any(stride == 0 for stride, _ in dims)
    reach, interleaved = 0, False
    for stride, size in sorted(dims):
        interleaved |= stride <= reach
        reach += stride * (size - 1)
    if not interleaved:
        return False
    # A stride that does not step over the smaller ones may step between them: the elements are bits
    # of a number, set along one dimension after the other, twice as many each time.
    taken = 1
    for stride, size in dims:
        done = 1
        while done < size:
            more = min(done, size - done)
            taken |= taken << more * stride
            done += more
    return taken.bit_count() < tensor.numel()
