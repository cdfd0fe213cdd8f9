"""Local gradients that the extension does not read itself, with the verbs of those it does.

Any layout and any mix of devices: sparse, jagged, complex, with gaps, lazily negated, what wrappers
hold; and opaque tensors, whose class alone can read them, by the calls that torch makes of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from .._ops import (
    clip_coef,
    count_rows,
    is_differentiated,
    is_fake,
    is_known,
    means_zeros,
    result_dtype,
)
from .._private import attribute, private

_is_traceable = private("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
_neg_view = private("torch._neg_view")


class LocalGrads:
    """Gradients of any layout and any mix of devices, with the verbs of those read in C++.

    Norms are float64; `result` makes of them what is returned, as precise as the gradients.
    """

    def __init__(self, tensors: list[Tensor], slots: list[int], wrappers: list[Tensor]) -> None:
        self.tensors, self.slots_, self.wrappers = tensors, slots, wrappers

    def __len__(self) -> int:
        return len(self.tensors)

    def groups(self) -> list[int]:
        return self.slots_

    def devices(self) -> list[torch.device]:
        return list(_by_device(self.tensors))

    def norm(self, p: float) -> Tensor:
        with torch.set_grad_enabled(is_differentiated()):
            if len(_by_device(self.tensors)) > 1 and p > 0:
                return self.norms(p)[0]
            return _ops.norm([_measured(t, p) for t in self.tensors], p, True)

    def has(self, dtype: torch.dtype) -> bool:
        return any(t.dtype == dtype for t in self.tensors)

    def is_wide(self) -> bool:
        return result_dtype(self.tensors) == torch.float64

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return norms.to(dtype or result_dtype(self.tensors))

    def norms(self, p: float) -> Tensor:
        """The norm of each slot, up to the last slot that holds a gradient."""
        with torch.set_grad_enabled(is_differentiated()):
            tensors = [_measured(t, p) for t in self.tensors]
            if len(_by_device(tensors)) > 1:
                tensors = list(self.each_norms(p).unbind())
            return _ops.norms(tensors, p, self.slots_, True)

    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """The norm of each gradient, or of each row: 0 where a sparse one has none."""
        with torch.set_grad_enabled(is_differentiated()):
            grads = [t.coalesce() if t.is_sparse else t for t in self.tensors]
            tensors = [_measured(t, p, rows) for t in grads]
            devices, gaps = _by_device(tensors), _gaps(grads, rows)
            if len(devices) < 2 and not gaps:
                return _ops.norms(tensors, p, None, True, rows)
            each = list(tensors)
            for positions in devices.values():
                some = [tensors[i] for i in positions]
                norms = _ops.norms(some, p, None, True, rows).to(tensors[0].device)
                for i, norm in zip(positions, norms.split(_sizes(some, rows)), strict=True):
                    each[i] = norm
            for i in gaps:
                index = _indices(grads[i])[0].to(each[i].device)
                each[i] = each[i].new_zeros(len(grads[i])).index_copy_(0, index, each[i])
            return torch.cat(each)

    def scale_(self, coef: Tensor) -> None:
        """By one coefficient, or one for each slot."""
        with torch.set_grad_enabled(is_differentiated()):
            scaled = [_scaled(t) for t in self.tensors]
            for device, positions in _by_device(scaled).items():
                slots = [self.slots_[i] for i in positions] if coef.dim() else None
                _scale_([scaled[i] for i in positions], coef.to(device), slots)
            self._bump_versions()

    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        """By one coefficient for each gradient, or for each row."""
        with torch.set_grad_enabled(is_differentiated()):
            scaled = [_scaled(t, rows) for t in self.tensors]
            devices, gaps = _by_device(scaled), _gaps(self.tensors, rows)
            several = len(devices) > 1 or gaps
            each = list(coefs.split(_sizes(self.tensors, rows))) if several else []
            for i in gaps:
                each[i] = each[i][_indices(self.tensors[i])[0].to(coefs.device)]
            for device, positions in devices.items():
                here = torch.cat([each[i] for i in positions]).to(device) if each else coefs
                _scale_([scaled[i] for i in positions], here, None, rows)
            self._bump_versions()

    def clamp_(self, bound: float) -> None:
        with torch.set_grad_enabled(is_differentiated()):
            clamped = [_clamped(t) for t in self.tensors]
            for opaque in filter(_is_opaque, clamped):
                opaque.clamp_(-bound, bound)
            clamped = [t for t in clamped if not _is_opaque(t)]
            for positions in _by_device(clamped).values():
                _ops.clamp_([clamped[i] for i in positions], bound)
            self._bump_versions()

    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        stored = all(t.layout == torch.strided and _stored(t) is t for t in self.tensors)
        if stored and not any(map(_is_opaque, self.tensors)) and len(_by_device(self.tensors)) < 2:
            with torch.set_grad_enabled(is_differentiated()):
                return _ops.clip_norm_(self.tensors, max_norm, p)
        total_norm = self.norm(p)
        self.scale_(clip_coef(total_norm, max_norm, self.is_wide()))
        return self.result(total_norm)

    def _bump_versions(self) -> None:
        """The ops bump what they are given, which wrappers do not share."""
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Of each device the positions of its tensors."""
    devices: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        devices.setdefault(tensor.device, []).append(i)
    return devices


def _sizes(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    return [count_rows(t) if rows else 1 for t in tensors]


def held(tensor: Tensor) -> Tensor:
    """The strided tensor in which the elements are stored."""
    if tensor.is_sparse:
        values: Tensor = attribute(tensor, "_values")()
        return values
    return tensor.values() if tensor.layout == torch.jagged else tensor


def _indices(tensor: Tensor) -> Tensor:
    """Of a sparse tensor, coalesced or not."""
    indices: Tensor = attribute(tensor, "_indices")()
    return indices


def _measured(tensor: Tensor, p: float, rows: bool = False) -> Tensor:
    _check_rows(tensor, rows)
    tensor = held(tensor.coalesce() if tensor.is_sparse else tensor)
    if _is_opaque(tensor):
        if not rows or tensor.dim() < 2:
            norm: Tensor = torch.linalg.vector_norm(tensor, p)
            return norm
        norms: Tensor = torch.linalg.vector_norm(tensor, p, dim=tuple(range(1, tensor.dim())))
        return norms.reshape(-1, 1)
    if not tensor.is_complex() or p == 2:
        return _stored(tensor, rows)
    # Half numbers hold the parts of an element that has a magnitude beyond them.
    return (tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor).abs()


def _scaled(tensor: Tensor, rows: bool = False) -> Tensor:
    # Scaling is linear: uncoalesced values can be scaled one by one.
    return _stored(held(tensor), rows)


def _gaps(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    """Which of them may lack rows."""
    return [i for i, t in enumerate(tensors) if rows and t.is_sparse and t.dim() > 1]


def _is_opaque(tensor: Tensor) -> bool:
    """Whether only its class can read it, and not what stands for a plain tensor in a graph."""
    if torch.compiler.is_compiling():
        return bool(_is_traceable(tensor))
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    return not is_fake(tensor)


def _scale_(
    tensors: list[Tensor], coef: Tensor, slots: list[int] | None, rows: bool = False
) -> None:
    """As the op, opaque tensors among the others."""
    if not any(map(_is_opaque, tensors)):
        _ops.scale_(tensors, coef, slots, rows)
        return
    each: Sequence[Tensor] = [coef] * len(tensors)
    if coef.dim():
        split = coef.split(_sizes(tensors, rows)) if slots is None else ()
        each = split or [coef[slot] for slot in slots or ()]
    for tensor, value in zip(tensors, each, strict=True):
        if _is_opaque(tensor):
            _multiply_(tensor, value)
        else:
            _ops.scale_([tensor], value, None, rows)


def _multiply_(tensor: Tensor, coef: Tensor) -> None:
    """An opaque tensor. Where the host does not know the coefficient, torch's call is all there is:
    zeros are asked for by a product, which leaves a NaN."""
    if is_known(coef) and bool((coef == 1).all()):
        return
    if is_known(coef) and bool(means_zeros(coef).all()):
        tensor.zero_()
        return
    per_row = coef.numel() != 1
    tensor.mul_(coef.view(-1, *[1] * (tensor.dim() - 1)) if per_row else coef.reshape(()))


def _check_rows(tensor: Tensor, rows: bool) -> None:
    """Whether the slices along the first dimension of what is stored are rows."""
    by_row = tensor.is_sparse and (tensor.dim() < 2 or tensor.sparse_dim() == 1)
    if rows and tensor.layout != torch.strided and not by_row:
        raise TypeError(
            f"parameters: a gradient of layout {tensor.layout} and shape {tuple(tensor.shape)} is "
            "not stored by rows; make it dense, or leave its parameter to clip_grad_norms_"
        )


def _clamped(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise TypeError(
            "parameters: a complex gradient has no order to clip by value in; clip by norm"
        )
    if tensor.is_sparse and not tensor.is_coalesced():
        tensor.copy_(tensor.coalesce())
    return _stored(held(tensor))


def _stored(tensor: Tensor, rows: bool = False) -> Tensor:
    """The stored real numbers: lazy conjugates and negatives have the same magnitudes."""
    if tensor.is_complex():
        real = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
        real = _neg_view(real) if _is_negated(real) else real
        return real[None] if rows and tensor.dim() < 2 else real
    return _neg_view(tensor) if _is_negated(tensor) else tensor


def _is_negated(tensor: Tensor) -> bool:
    """Whether the signs are lazily flipped, which the compiler need not and cannot ask."""
    return not torch.compiler.is_compiling() and tensor.is_neg()
