"""Rules: thresholds that follow the norms of a run. Pass one as `max_norm`.

A rule is called with the total norm, a 0-d float64, and returns the threshold on the same device;
its state lives there too, in a few tensors, and no call waits for it. A norm that is not finite
never enters the state. Call a rule once before a CUDA graph captures it: that call brings the state
there.
"""

import math

import torch
from torch import Tensor

from . import _ops
from ._state import CPU, State


class AutoClip(State):
    r"""The threshold is a percentile of the norms so far, this one included.

    $\text{max\_norm}_t = \text{percentile}_p(\lVert g_1 \rVert, \dots, \lVert g_t \rVert)$ over the
    last `history` finite norms, interpolated linearly as NumPy does. No wait for the device.

    Args:
        percentile: p, 0 to 100; at 10 nine steps of ten are clipped.
        history: how many norms are kept, >= 1.

    Raises:
        ValueError: an argument out of its range.

    Reference: Seetharaman et al. 2020, arXiv:2007.14469, and its published code, whose history
        has no end.

    >>> rule = AutoClip(percentile=50)
    >>> [float(rule(torch.tensor(norm))) for norm in (1.0, 3.0, 8.0)]
    [1.0, 2.0, 3.0]
    """

    def __init__(self, percentile: float = 10, history: int = 1000) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile}")
        if not (isinstance(history, int) and history >= 1):
            raise ValueError(f"history: expected a whole number >= 1, got {history}")
        self.percentile, self.history = percentile, history
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        norms = torch.full((self.history,), math.inf, dtype=torch.float64, device=CPU)
        return {"norms": norms, "count": norms.new_zeros((), dtype=torch.int64)}

    def __call__(self, total_norm: Tensor) -> Tensor:
        return _ops.autoclip_(*self._on(total_norm.device), total_norm, self.percentile)


class ZClip(State):
    r"""Clip what stands out of a moving average of the norms, and the more the further.

    With mean m and standard deviation s of the norms so far, $z = (\lVert g \rVert - m) / (s +
    10^{-6})$. Where z exceeds `z_threshold` the threshold is $m + \text{z\_threshold}^2 s / z$,
    else there is none (inf). Then mean and variance move by 1 - alpha towards the norm as clipped.
    They begin as those of the first `warmup_steps` norms, of which none is clipped. No wait for
    the device.

    Args:
        alpha: the share of the old average, 0 to 1.
        z_threshold: in standard deviations, > 0.
        warmup_steps: >= 1.

    Raises:
        ValueError: an argument out of its range.

    Reference: Kumar et al. 2025, arXiv:2504.02507, and its published code in z-score mode with
        adaptive scaling, without that code's fixed threshold of 1 beside it.

    >>> rule = ZClip(warmup_steps=2)
    >>> [round(float(rule(torch.tensor(norm))), 3) for norm in (1.0, 3.0, 10.0)]
    [inf, inf, 2.781]
    """

    def __init__(
        self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        if not z_threshold > 0:
            raise ValueError(f"z_threshold: expected a number > 0, got {z_threshold}")
        if not (isinstance(warmup_steps, int) and warmup_steps >= 1):
            raise ValueError(f"warmup_steps: expected a whole number >= 1, got {warmup_steps}")
        self.alpha, self.z_threshold, self.warmup_steps = alpha, z_threshold, warmup_steps
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=CPU)
        steps = zero.new_zeros((), dtype=torch.int64)
        return {"steps": steps, "mean": zero, "variance": zero.clone()}

    def __call__(self, total_norm: Tensor) -> Tensor:
        how = self.alpha, self.z_threshold, self.warmup_steps
        return _ops.zclip_(*self._on(total_norm.device), total_norm, *how)
