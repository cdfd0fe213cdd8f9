"""Ordinary gradients of one device, read in Python where the extension, which reads them, is not
built: `csrc/python/walk.h` and `grads.h` once more, for lists of thousands.

None where anything else is among them; then each is looked at.
"""

import torch
from torch import Tensor

from .. import _ops
from .._ops import is_transformed, result_dtype
from .look import REAL, overlaps


class PlainGrads:
    """As the extension's."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def groups(self) -> list[int]:
        return [0] * len(self.tensors)

    def devices(self) -> list[torch.device]:
        return [t.device for t in self.tensors[:1]]

    def has(self, dtype: torch.dtype) -> bool:
        return any(t.dtype == dtype for t in self.tensors)

    def is_wide(self) -> bool:
        return result_dtype(self.tensors) == torch.float64

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return norms.to(dtype or result_dtype(self.tensors))

    @torch.no_grad()
    def norm(self, p: float) -> Tensor:
        return _ops.norm(self.tensors, p, True)

    @torch.no_grad()
    def norms(self, p: float) -> Tensor:
        return _ops.norms(self.tensors, p, self.groups(), True)

    @torch.no_grad()
    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        return _ops.norms(self.tensors, p, None, True, rows)

    @torch.no_grad()
    def scale_(self, coef: Tensor) -> None:
        _ops.scale_(self.tensors, coef, self.groups() if coef.dim() else None)

    @torch.no_grad()
    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        _ops.scale_(self.tensors, coefs, None, rows)

    @torch.no_grad()
    def clamp_(self, bound: float) -> None:
        _ops.clamp_(self.tensors, bound)

    @torch.no_grad()
    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        return _ops.clip_norm_(self.tensors, max_norm, p)


def read_grads(parameters: list[Tensor]) -> PlainGrads | None:
    if not _are_tensors(parameters):
        return None
    if len({*map(id, parameters)}) < len(parameters):
        parameters = list({id(p): p for p in parameters}.values())
    return _plain([g for p in parameters if (g := p.grad) is not None], True)


def take_tensors(tensors: list[Tensor]) -> PlainGrads | None:
    return _plain(tensors, False)


def _plain(tensors: list[Tensor], write: bool) -> PlainGrads | None:
    plain = (
        _are_tensors(tensors)
        and {t.dtype for t in tensors} <= set(REAL)
        and len({t.device for t in tensors}) < 2
        and {t.layout for t in tensors} <= {torch.strided}
        and not is_transformed()
        and not any(map(Tensor.is_neg, tensors))
        and (all(map(Tensor.is_contiguous, tensors)) or not (write and any(map(overlaps, tensors))))
    )
    return PlainGrads(tensors) if plain else None


def _are_tensors(items: list[Tensor]) -> bool:
    return {*map(type, items)} <= {Tensor, torch.nn.Parameter}
