"""Parameters in, local gradients out: plain strided tensors that the ops can take.

The C++ walk reads a list of ordinary gradients; what it hands back (sparse, complex, several
devices, tensors with gaps, subclasses, bad input) is read here. What is spread over ranks, or in
groups, has a plan, and is read by it the same two ways. All results have the same verbs.
"""

import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from . import _ops
from ._local import Grads, held
from ._plan import Kind, Plan, find, follow, is_spread
from ._planned import PlannedGrads

Tensors = Tensor | Iterable[Tensor]

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUPPORTED = (*_REAL, torch.complex32, torch.complex64, torch.complex128)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.jagged)


def read(
    parameters: Tensors,
    foreach: bool | None = None,
    process_group: Any = None,
    kind: Kind = Kind.TOTAL,
) -> Any:
    """The gradients of `parameters`, to be changed; without None, and of each parameter once.

    Raises:
        TypeError: no tensors, or a gradient's dtype or layout that cannot be clipped.
        ValueError: two groups of `process_group` share more than this rank.
        RuntimeError: elements of a gradient share memory; or `foreach` is True on a device for
            which torch has no foreach kernels.
    """
    return _read(as_list(parameters, "parameters"), foreach, process_group, True, kind)


def take(
    tensors: Tensors,
    foreach: bool | None = None,
    process_group: Any = None,
) -> Any:
    """The tensors themselves, to be measured, checked as `read` checks gradients."""
    return _read(as_list(tensors, "tensors"), foreach, process_group, False, Kind.TOTAL)


def take_weights(parameters: list[Tensor], kind: Kind) -> Any:
    """The parameters themselves, as `take` does: those that `read` finds gradients of."""
    # Over ranks the weights tell what the gradients may be; else only those with one are measured.
    positions = list(range(len(parameters)))
    if not is_spread(parameters, None):
        found = {id(item): i for i, item in reversed(list(enumerate(parameters)))}
        positions = sorted(i for i in found.values() if parameters[i].grad is not None)
    weights = [parameters[i] for i in positions]
    return _read(
        weights, None, None, False, kind, lambda i: f"the weight parameters[{positions[i]}]"
    )


def read_by(
    plan: Plan | None,
    parameters: list[Tensor],
    asked: tuple[Any, ...],
    labels: Sequence[int],
    count: int,
) -> PlannedGrads:
    """As `read`, `count` groups by their labels, by the plan of the last time if it still fits."""
    walks = _walk(None) is not None
    plan, grads = follow(plan, parameters, asked, walks, True, Kind.TOTAL, labels, count)
    return PlannedGrads(_look(parameters, None, True, plan) if grads is None else grads, plan)


def _read(
    items: list[Tensor],
    foreach: bool | None,
    process_group: Any,
    write: bool,
    kind: Kind,
    name_of: Callable[[int], str] | None = None,
) -> Any:
    walk = _walk(foreach)
    read_all = None if walk is None else walk.read_grads if write else walk.take_tensors
    if read_all and process_group is None and (grads := read_all(items)) is not None:
        return grads
    if is_spread(items, process_group):
        return _read_spread(items, foreach, process_group, write, kind, name_of)
    return _look(items, foreach, write, None, name_of)


@torch.compiler.disable
def _read_spread(
    items: list[Tensor],
    foreach: bool | None,
    process_group: Any,
    write: bool,
    kind: Kind,
    name_of: Callable[[int], str] | None,
) -> PlannedGrads:
    plan, grads = find(items, process_group, _walk(foreach) is not None, write, kind)
    if grads is None:
        grads = _look(items, foreach, write, plan, name_of)
    return PlannedGrads(grads, plan)


def aligned(norms: Tensor, parameters: list[Tensor]) -> Tensor:
    """The norms of the gradients, with zeros where a parameter has none or was there before."""
    if len(norms) == len(parameters):
        return norms
    each, seen = iter(norms.unbind()), set()
    zero, found = norms.new_zeros(()), []
    for parameter in parameters:
        found.append(zero if parameter.grad is None or id(parameter) in seen else next(each))
        seen.add(id(parameter))
    return torch.stack(found)


def agreed(grads: Any, norms: Tensor) -> Tensor:
    """`norms`; NaN where that of any other rank is not finite."""
    return grads.agreed(norms) if isinstance(grads, PlannedGrads) else norms


def _look(
    items: list[Tensor],
    foreach: bool | None,
    write: bool,
    plan: Plan | None,
    name_of: Callable[[int], str] | None = None,
) -> Grads:
    """The gradients, or tensors, one by one, with all that Python knows to check."""
    # By parameter: a compiled graph may depend on these, not on gradients made anew every step.
    found: dict[int, tuple[Tensor, int]] = {}
    wrappers = []
    for position, item in enumerate(items):
        name = f"parameters[{position}]" if write else f"tensors[{position}]"
        _check_tensor(item, name)
        tensor, slot = item.grad if write else item, 0
        if tensor is None:
            continue
        if plan is not None:
            wrapper, tensor = plan.local(position, item, write)
            wrappers += [wrapper] * (wrapper is not tensor)
            slot = plan.slot_of[position]
        stored = f"the gradient of {name}" if write else name_of(position) if name_of else name
        _check_supported(tensor, stored, write)
        found.setdefault(id(item) if write else position, (tensor, slot))
    tensors = [tensor for tensor, _ in found.values()]
    _check_foreach(tensors, foreach)
    return Grads(tensors, [slot for _, slot in found.values()], wrappers)


def _walk(foreach: bool | None) -> Any:
    """The extension, unless Python looks at `foreach` or the compiler at everything."""
    return None if foreach or torch.compiler.is_compiling() else _ops.extension


def as_list(tensors: Tensors, name: str) -> list[Tensor]:
    if isinstance(tensors, list):
        return tensors
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        items = list(tensors)
    except TypeError:
        raise TypeError(
            f"{name}: expected a tensor or an iterable of tensors, got {_describe(tensors)}; "
            "of a module pass module.parameters()"
        ) from None
    # Gradients that are none may well be none; parameters are not.
    if not items and name == "parameters" and isinstance(tensors, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return items


def _describe(value: object) -> str:
    return (
        f"{value!r} of type {type(value).__name__}"
        if isinstance(value, int | float | str | tuple)
        else type(value).__name__
    )


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {_describe(value)}; of a module pass "
            "module.parameters()"
        )


def _check_supported(tensor: Tensor, name: str, write: bool) -> None:
    if tensor.dtype not in _SUPPORTED:
        raise TypeError(
            f"{name}: dtype {tensor.dtype} cannot be clipped; cast it to one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in _SUPPORTED)}"
        )
    has_holes = tensor.layout == torch.jagged and tensor.lengths() is not None
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


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for tensor in tensors if foreach else ():
        if not _device_has_foreach_support(tensor.device):
            raise RuntimeError(
                "foreach=True was passed, but can't use the foreach API on "
                f"{tensor.device.type} tensors"
            )
