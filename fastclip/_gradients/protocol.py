"""What gradients can do, whoever has read them."""

from typing import Protocol

from torch import Tensor


class Gradients(Protocol):
    """Gradients, or other tensors, of one call: n of them here, in m groups.

    Norms are float64 on the device of the first tensor and no verb waits for it; `result` makes of
    them what is returned. Of `PlainGrads` (csrc/python/grads.h), `LocalGrads` and `SpreadGrads` the
    last add up over ranks, and each verb of theirs but `scale_`, `scale_each_` and `clamp_` is for
    all ranks at once.
    """

    def __len__(self) -> int:
        """n: how many there are on this rank."""

    def is_wide(self) -> bool:
        """Whether any is float64 or complex128, so that norms are returned, and coefficients
        decided, in float64."""

    def norm(self, p: float) -> Tensor:
        """The norm of all, or of the first group, 0-d."""

    def norms(self, p: float) -> Tensor:
        """The norm of each group, 1-d of m."""

    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """The norm of each gradient, or of each of its slices along dimension 0, 1-d."""

    def result(self, norms: Tensor) -> Tensor:
        """Norms as they are returned: float64 if `is_wide`, else float32."""

    def scale_(self, coef: Tensor) -> None:
        """Multiply by `coef`, 0-d or one for each group; -0.0 makes zeros, 1 writes nothing."""

    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        """Multiply each gradient, or each slice, by its own of `coefs`, in the order of
        `each_norms`."""

    def clamp_(self, bound: float) -> None:
        """Clamp each element to [-bound, bound]."""

    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        """`norm`, the coefficient and `scale_` in one call: the norm before, as `result`."""
