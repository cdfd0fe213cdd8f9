"""Parameters in, local gradients out: plain strided tensors that the ops can take.

The C++ walk reads a list of ordinary gradients; what it hands back (sparse, complex, several
devices, tensors with gaps, subclasses, bad input) is read here. What is spread over ranks has a
plan, and what it holds here is read the same two ways. All results have the same verbs.
"""

import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from . import _ops
from ._plan import MeshGrads, Plan, find, is_spread
from ._reference import clip_coef, result_dtype

Tensors = Tensor | Iterable[Tensor]

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUPPORTED = (*_REAL, torch.complex64, torch.complex128)


class Grads:
    """Gradients of any layout and any mix of devices, with the verbs of the C++ walk's result."""

    def __init__(self, tensors: list[Tensor], slots: list[int], wrappers: list[Tensor]) -> None:
        self.tensors, self.slots, self.wrappers = tensors, slots, wrappers

    def __len__(self) -> int:
        return len(self.tensors)

    def norm(self, p: float) -> Tensor:
        with torch.no_grad():
            if len(_by_device(self.tensors)) > 1 and p > 0:
                return self.norms(p)[0].to(result_dtype(self.tensors))
            return _ops.norm([_measured(t, p) for t in self.tensors], p)

    def is_wide(self) -> bool:
        return result_dtype(self.tensors) == torch.float64

    def norms(self, p: float) -> Tensor:
        """The norm of each slot in float64, up to the last slot that holds a gradient."""
        with torch.no_grad():
            tensors, slots = [_measured(t, p) for t in self.tensors], self.slots
            devices = _by_device(tensors)
            if len(devices) > 1:
                slot_of = {id(t): slot for t, slot in zip(tensors, slots, strict=True)}
                slots = [slot_of[id(t)] for part in devices.values() for t in part]
                each = [_ops.norms(part, p, None, True) for part in devices.values()]
                tensors = [norm.to(tensors[0].device) for part in each for norm in part.unbind()]
            return _ops.norms(tensors, p, slots, True)

    def scale_(self, coef: Tensor) -> None:
        with torch.no_grad():
            for device, tensors in _by_device([_scaled(t) for t in self.tensors]).items():
                _ops.scale_(tensors, coef.to(device))
            self._bump_versions()

    def clamp_(self, bound: float) -> None:
        with torch.no_grad():
            for tensors in _by_device([_clamped(t) for t in self.tensors]).values():
                _ops.clamp_(tensors, bound)
            self._bump_versions()

    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        stored = all(t.layout == torch.strided and _stored(t) is t for t in self.tensors)
        if stored and len(_by_device(self.tensors)) < 2:
            with torch.no_grad():
                return _ops.clip_norm_(self.tensors, max_norm, p)
        total_norm = self.norm(p)
        self.scale_(clip_coef(total_norm, max_norm))
        return total_norm

    def _bump_versions(self) -> None:
        """The ops bump what they are given: the values of a sparse tensor, what a wrapper holds."""
        if others := [t for t in self.tensors if t.is_sparse] + self.wrappers:
            torch.autograd.graph.increment_version(others)


def read(parameters: Tensors, foreach: bool | None, process_group: Any = None) -> Any:
    """The gradients of `parameters`, to be changed; without None, and of each parameter once.

    Raises:
        TypeError: no tensors, or a gradient's dtype or layout that cannot be clipped.
        ValueError: two groups of `process_group` share more than this rank.
        RuntimeError: elements of a gradient share memory; or `foreach` is True on a device for
            which torch has no foreach kernels.
    """
    return _read(_as_list(parameters, "parameters"), foreach, process_group, write=True)


def take(tensors: Tensors, foreach: bool | None, process_group: Any) -> Any:
    """The tensors themselves, to be measured, checked as `read` checks gradients."""
    return _read(_as_list(tensors, "tensors"), foreach, process_group, write=False)


def _read(items: list[Tensor], foreach: bool | None, process_group: Any, write: bool) -> Any:
    walk = _walk(foreach)
    read_all = None if walk is None else walk.read_grads if write else walk.take_tensors
    if read_all and process_group is None and (grads := read_all(items)) is not None:
        return grads
    spread = is_spread(items, process_group)
    return (_read_spread if spread else _look)(items, foreach, write, process_group)


@torch.compiler.disable
def _read_spread(items: list[Tensor], foreach: Any, write: bool, process_group: Any) -> MeshGrads:
    plan, grads = find(items, process_group, _walk(foreach) is not None, write)
    return MeshGrads(_look(items, foreach, write, plan) if grads is None else grads, plan)


def _look(items: list[Tensor], foreach: bool | None, write: bool, plan: Plan | None) -> Grads:
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
        _check_supported(tensor, f"the gradient of {name}" if write else name, write)
        found[id(item) if write else position] = tensor, slot
    tensors = [tensor for tensor, _ in found.values()]
    _check_foreach(tensors, foreach)
    return Grads(tensors, [slot for _, slot in found.values()], wrappers)


def _walk(foreach: bool | None) -> Any:
    """The extension, unless Python looks at `foreach` or the compiler at everything."""
    return None if foreach or torch.compiler.is_compiling() else _ops.extension


def _as_list(tensors: Tensors, name: str) -> list[Tensor]:
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
    if not items and isinstance(tensors, types.GeneratorType):
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
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(
            f"{name}: layout {tensor.layout} cannot be clipped; convert it to torch.strided or "
            "torch.sparse_coo"
        )
    if write and tensor.layout == torch.strided and _overlaps(tensor):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            f"single memory location. Please clone() the tensor before performing the operation. "
            f"({name} has shape {tuple(tensor.shape)} and strides {tensor.stride()})"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride does not step over the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for tensor in tensors if foreach else ():
        if not _device_has_foreach_support(tensor.device):
            raise RuntimeError(
                "foreach=True was passed, but can't use the foreach API on "
                f"{tensor.device.type} tensors"
            )


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor)
    return devices


def _measured(tensor: Tensor, p: float) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.coalesce()._values()
    return tensor.abs() if tensor.is_complex() and p != 2 else _stored(tensor)


def _scaled(tensor: Tensor) -> Tensor:
    # Scaling is linear: uncoalesced values can be scaled one by one.
    return _stored(tensor._values() if tensor.is_sparse else tensor)


def _clamped(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise TypeError(
            "parameters: a complex gradient has no order to clip by value in; clip by norm"
        )
    if not tensor.is_sparse:
        return _stored(tensor)
    if not tensor.is_coalesced():
        tensor.copy_(tensor.coalesce())
    return tensor._values()


def _stored(tensor: Tensor) -> Tensor:
    """The stored real numbers: lazy conjugates and negatives have the same magnitudes."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
    return torch._neg_view(tensor) if _is_negated(tensor) else tensor


def _is_negated(tensor: Tensor) -> bool:
    """Whether the signs are lazily flipped, which the compiler need not and cannot ask."""
    return not torch.compiler.is_compiling() and tensor.is_neg()
