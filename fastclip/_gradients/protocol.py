"""The interface of all classes of gradients."""

from typing import Protocol

import torch
from torch import Tensor


class Gradients(Protocol):
    """The gradients, or other tensors, of one call: n on this rank, in m groups with a norm each.

    Norms and coefficients are float64, on the first tensor's device; no method waits for it.
    `PlainGrads` (csrc/python/grads.h) and `LocalGrads` hold this rank's gradients. The norms of
    `SpreadGrads` are those of all ranks together; all must call the same methods in the same order.
    """

    def __len__(self) -> int:
        """Return n, the number of tensors on this rank."""

    def is_wide(self) -> bool:
        """Return whether any tensor is float64 or complex128."""

    def has(self, dtype: torch.dtype) -> bool:
        """Return whether any tensor on this rank has this dtype."""

    def norm(self, p: float) -> Tensor:
        """Return the norm of all tensors, or of the first group if there are several; 0-d."""

    def norms(self, p: float) -> Tensor:
        """Return the norm of each group, of shape [m]."""

    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """Return the norm of each tensor, or of each of its slices along dimension 0; 1-d."""

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return norms for users in `dtype`; by default float64 if `is_wide`, else float32."""

    def scale_(self, coef: Tensor) -> None:
        """Multiply by a 0-d coefficient or one per group: 1 writes nothing, -0.0 writes zeros."""

    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        """Multiply each tensor or slice by its coefficient; their order is that of `each_norms`."""

    def clamp_(self, bound: float) -> None:
        """Clamp each element to [-bound, bound]."""

    def clip_norm_(self, max_norm: float | Tensor, p: float, norm: Tensor | None = None) -> Tensor:
        """Scale to a norm of at most `max_norm`; return the norm before, converted by `result`.

        The norm before is measured unless it is given.
        """


class GradientsHere(Gradients, Protocol):
    """The gradients of this rank alone, from which `SpreadGrads` are made."""

    def groups(self) -> list[int]:
        """Return the index of the group of each tensor: a list of n."""

    def devices(self) -> list[torch.device]:
        """Return the devices of the tensors, each once."""
