"""What gradients can do, whoever has read them."""

from typing import Protocol

import torch
from torch import Tensor


class Gradients(Protocol):
    """Gradients, or other tensors, of one call: n of them on this rank, in m groups.

    Norms and coefficients are float64, on the device of the first tensor, and no verb waits for it.
    Of `PlainGrads` (csrc/python/grads.h), `LocalGrads` and `SpreadGrads` the last are those of all
    ranks together, each of which calls the same verbs.
    """

    def __len__(self) -> int:
        """n, on this rank."""

    def is_wide(self) -> bool:
        """Whether any is float64 or complex128."""

    def has(self, dtype: torch.dtype) -> bool:
        """Whether any on this rank is of this dtype."""

    def norm(self, p: float) -> Tensor:
        """The norm of all, of groups that of the first; 0-d."""

    def norms(self, p: float) -> Tensor:
        """The norm of each group, 1-d of m."""

    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """The norm of each gradient, or of each of its slices along dimension 0; 1-d."""

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Norms as they are returned to users: of `dtype`, else float32, float64 if `is_wide`."""

    def scale_(self, coef: Tensor) -> None:
        """Multiply by a coefficient, 0-d, or one for each group; 1 writes nothing, -0.0 zeros."""

    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        """Multiply each gradient, or each slice, by its own, in the order of `each_norms`."""

    def clamp_(self, bound: float) -> None:
        """Clamp each element to [-bound, bound]."""

    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        """`norm`, coefficient and `scale_` in one: return the norm before as `result` does."""


class GradientsHere(Gradients, Protocol):
    """Those on this rank, of which spread ones are made."""

    def groups(self) -> list[int]:
        """The number of the group of each, n of them."""

    def devices(self) -> list[torch.device]:
        """Where they are, each device once."""
