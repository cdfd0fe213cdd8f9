"""Gradients of this rank that the extension does not read, with the methods of `PlainGrads`.

They have any layout and any mix of devices: sparse, jagged, complex, lazily negated, with gaps in
memory, or inside wrapper subclasses. For an opaque tensor (see `is_opaque`) torch's own functions
are called. If `are_plain` is true, methods pass the whole list to an op without a loop over it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from .._ops import (
    clip_coef,
    count_rows,
    is_differentiated,
    is_host_readable,
    is_transformed,
    means_zeros,
    result_dtype,
)
from .stored import as_clamped, as_measured, as_real, held, indices_of, is_opaque

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LocalGrads:
    """Gradients of any layout and any mix of devices; C++ has the same methods in `PlainGrads`.

    Norms are float64; `result` casts them to the dtype that users get.
    """

    def __init__(self, tensors: list[Tensor], groups: list[int], wrappers: list[Tensor]) -> None:
        self.tensors, self.groups_, self.wrappers = tensors, groups, wrappers
        self.are_plain = _are_plain(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def groups(self) -> list[int]:
        return self.groups_

    def devices(self) -> list[torch.device]:
        return list(_by_device(self.tensors))

    def norm(self, p: float) -> Tensor:
        with torch.set_grad_enabled(is_differentiated()):
            if _are_on_several_devices(self.tensors) and p > 0:
                return self.norms(p)[0]
            return _ops.norm(self._measured(p), p, True)

    def has(self, dtype: torch.dtype) -> bool:
        return any(t.dtype == dtype for t in self.tensors)

    def is_wide(self) -> bool:
        return result_dtype(self.tensors) == torch.float64

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return norms.to(dtype or result_dtype(self.tensors))

    def norms(self, p: float) -> Tensor:
        """Return the norm of each group, up to the last group that holds a gradient."""
        with torch.set_grad_enabled(is_differentiated()):
            tensors = self._measured(p)
            if _are_on_several_devices(tensors):
                tensors = list(self.each_norms(p).unbind())
            return _ops.norms(tensors, p, self.groups_, True)

    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """Return the norm of each gradient or row; 0 for rows that a sparse gradient lacks."""
        with torch.set_grad_enabled(is_differentiated()):
            grads = [t.coalesce() if t.is_sparse else t for t in self.tensors]
            tensors = self.tensors if self.are_plain else [as_measured(t, p, rows) for t in grads]
            gaps = _sparse_positions(grads, rows)
            if not gaps and not _are_on_several_devices(tensors):
                return _ops.norms(tensors, p, None, True, rows)
            each = list(tensors)
            for positions in _by_device(tensors).values():
                some = [tensors[i] for i in positions]
                norms = _ops.norms(some, p, None, True, rows).to(tensors[0].device)
                for i, norm in zip(positions, norms.split(_sizes(some, rows)), strict=True):
                    each[i] = norm
            for i in gaps:
                index = indices_of(grads[i])[0].to(each[i].device)
                each[i] = each[i].new_zeros(len(grads[i])).index_copy_(0, index, each[i])
            return torch.cat(each)

    def scale_(self, coef: Tensor) -> None:
        """Multiply by one coefficient, or by one for each group."""
        with torch.set_grad_enabled(is_differentiated()):
            scaled = self._scaled()
            for device, positions in _by_device(scaled).items():
                groups = [self.groups_[i] for i in positions] if coef.dim() else None
                self._scale_([scaled[i] for i in positions], coef.to(device), groups)
            self._bump_versions()

    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        """Multiply by one coefficient for each gradient, or for each row."""
        with torch.set_grad_enabled(is_differentiated()):
            scaled = self._scaled(rows)
            devices, gaps = _by_device(scaled), _sparse_positions(self.tensors, rows)
            several = len(devices) > 1 or gaps
            each = list(coefs.split(_sizes(self.tensors, rows))) if several else []
            for i in gaps:
                each[i] = each[i][indices_of(self.tensors[i])[0].to(coefs.device)]
            for device, positions in devices.items():
                here = torch.cat([each[i] for i in positions]).to(device) if each else coefs
                self._scale_([scaled[i] for i in positions], here, None, rows)
            self._bump_versions()

    def clamp_(self, bound: float) -> None:
        with torch.set_grad_enabled(is_differentiated()):
            clamped = self.tensors if self.are_plain else [as_clamped(t) for t in self.tensors]
            for opaque in filter(is_opaque, clamped):
                opaque.clamp_(-bound, bound)
            clamped = [t for t in clamped if not is_opaque(t)]
            for positions in _by_device(clamped).values():
                _ops.clamp_([clamped[i] for i in positions], bound)
            self._bump_versions()

    def clip_norm_(self, max_norm: float | Tensor, p: float, norm: Tensor | None = None) -> Tensor:
        if self.are_plain or not (
            _are_on_several_devices(self.tensors) or any(map(_needs_conversion, self.tensors))
        ):
            with torch.set_grad_enabled(is_differentiated()):
                # With order infinity the op takes a given norm as it is.
                how = (p, None) if norm is None else (math.inf, [norm])
                clipped = _ops.clip_norm_(self.tensors, max_norm, *how)
                self._bump_versions()
                return clipped
        total_norm = self.norm(p) if norm is None else norm
        self.scale_(clip_coef(total_norm, max_norm, self.is_wide()))
        return self.result(total_norm)

    def _measured(self, p: float) -> list[Tensor]:
        return self.tensors if self.are_plain else [as_measured(t, p) for t in self.tensors]

    def _scaled(self, rows: bool = False) -> list[Tensor]:
        # Scaling is linear, so the values of a sparse tensor need not be coalesced first.
        return self.tensors if self.are_plain else [as_real(held(t), rows) for t in self.tensors]

    def _scale_(
        self, tensors: list[Tensor], coef: Tensor, groups: list[int] | None, rows: bool = False
    ) -> None:
        """Call the op, and torch's own multiplication for opaque tensors."""
        if self.are_plain or not any(map(is_opaque, tensors)):
            _ops.scale_(tensors, coef, groups, rows)
            return
        each: Sequence[Tensor] = [coef] * len(tensors)
        if coef.dim():
            split = coef.split(_sizes(tensors, rows)) if groups is None else ()
            each = split or [coef[group] for group in groups or ()]
        for tensor, value in zip(tensors, each, strict=True):
            if is_opaque(tensor):
                _multiply_(tensor, value)
            else:
                _ops.scale_([tensor], value, None, rows)

    def _bump_versions(self) -> None:
        """Bump the version counters of wrappers; the ops bump those of the tensors inside."""
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)


def _are_plain(tensors: list[Tensor]) -> bool:
    """Return whether the ops can take all tensors as they are, in one list."""
    return (
        not (torch.compiler.is_compiling() or is_transformed())
        and {*map(type, tensors)} <= {Tensor, torch.nn.Parameter}
        and {t.dtype for t in tensors} <= set(REAL)
        and {t.layout for t in tensors} <= {torch.strided}
        and not _are_on_several_devices(tensors)
        and not any(map(Tensor.is_neg, tensors))
    )


def _are_on_several_devices(tensors: list[Tensor]) -> bool:
    """Return whether the tensors are on several devices."""
    return len({t.device for t in tensors}) > 1


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Return the positions of the tensors on each device."""
    devices: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        devices.setdefault(tensor.device, []).append(i)
    return devices


def _sizes(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    return [count_rows(t) if rows else 1 for t in tensors]


def _sparse_positions(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    """Return the positions of sparse tensors, which may lack rows; without `rows`, no positions."""
    return [i for i, t in enumerate(tensors) if rows and t.is_sparse and t.dim() > 1]


def _needs_conversion(tensor: Tensor) -> bool:
    """Return whether an op cannot take this tensor as it is."""
    is_stored = tensor.layout == torch.strided and as_real(tensor) is tensor
    return not is_stored or is_opaque(tensor)


def _multiply_(tensor: Tensor, coef: Tensor) -> None:
    """Multiply an opaque tensor. If the host cannot read the coefficient, -0.0 is only a factor: a
    NaN times it stays NaN and does not become 0."""
    if is_host_readable(coef) and bool((coef == 1).all()):
        return
    if is_host_readable(coef) and bool(means_zeros(coef).all()):
        tensor.zero_()
        return
    per_row = coef.numel() != 1
    tensor.mul_(coef.view(-1, *[1] * (tensor.dim() - 1)) if per_row else coef.reshape(()))
