"""Rules: thresholds that follow the norms of a run. Pass one as `max_norm`.

A rule is called with the total norm, a 0-d float64, and returns the threshold on the same device,
or NaN to drop the step. Its state is a few tensors on that device, and no call waits for the
device. Norms that are 0 (frozen parameters, a masked loss) or not finite never enter the state, and
a rule clips nothing before a norm has entered it. Call a rule once before a CUDA graph captures
it, because the first call moves the state to the device.

A new rule is a subclass of `State`, exported by `__init__.py`: `_start` makes the state, and
`__call__` changes it in place.
"""

import math

import torch
from torch import Tensor

from ._state import CPU, State, put
from ._warnings import warn


def is_usable(norm: Tensor) -> Tensor:
    """Whether a norm may enter the state of a rule: it is finite and not 0."""
    return norm.isfinite() & (norm > 0)


class AutoClip(State):
    """The threshold is a percentile of the norms so far, this one included.

    Only the last `history` norms that are finite and not 0 count; before the first of them the
    threshold is inf. The percentile is interpolated linearly, as by NumPy. No wait for the device.

    Args:
        percentile: 0 to 100; at 10, nine of ten steps are clipped.
        history: how many norms are kept, >= 1.

    Raises:
        ValueError: an argument out of its range.

    Reference: Seetharaman et al. 2020, arXiv:2007.14469, and its published code, whose history
        has no end and holds norms of 0 too.

    >>> rule = AutoClip(percentile=50)
    >>> [float(rule(torch.tensor(norm))) for norm in (1.0, 3.0, 8.0)]
    [1.0, 2.0, 3.0]
    """

    def __init__(self, percentile: float = 10, history: int = 1000) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile}")
        if 0 < percentile < 1:
            warn(
                f"percentile: {percentile} is below 1 on a scale from 0 to 100; for the "
                f"{100 * percentile:g}th percentile pass {100 * percentile:g}"
            )
        if not (isinstance(history, int) and history >= 1):
            raise ValueError(f"history: expected a whole number >= 1, got {history}")
        self.percentile, self.history = percentile, history
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        norms = torch.full((self.history,), math.inf, dtype=torch.float64, device=CPU)
        return {"norms": norms, "count": norms.new_zeros((), dtype=torch.int64)}

    @torch.no_grad()
    def __call__(self, total_norm: Tensor) -> Tensor:
        # `norms` is a ring buffer, and `count` the number of norms that have entered it.
        norms, count = self._on(total_norm.device)
        norm = total_norm.to(norms)
        usable = is_usable(norm)
        # If the norm is not usable, the element at `place` keeps its value.
        place = (count % self.history).reshape(1)
        norms.index_copy_(0, place, norm.where(usable, norms[place]))
        count += usable
        # Elements that are not filled yet are inf, and are sorted to the end.
        held = count.clamp(max=self.history)
        rank = (held - 1).clamp_(min=0).to(norms) * (self.percentile / 100)
        below = rank.floor()
        around = norms.sort().values.take(torch.stack([below, rank.ceil()]).long())
        limit: Tensor = around[0].lerp(around[1], rank - below)
        return limit.masked_fill((count == 0) & norm.isfinite(), math.inf).to(total_norm)


class ZClip(State):
    """Clip norms that are far above their moving average: the further above, the more strongly.

    With mean m and standard deviation s of the nonzero norms so far, z = (norm - m) / (s + 1e-6).
    Where z exceeds `z_threshold` the threshold is m + z_threshold^2 * s / z, otherwise inf. Then
    mean and variance move by 1 - alpha towards the clipped norm. They start as mean and variance of
    the first `warmup_steps` norms, none of which is clipped. No wait for the device.

    Args:
        alpha: weight of the old averages, 0 to 1.
        z_threshold: the largest z that is not clipped, > 0.
        warmup_steps: number of norms before the first clip, >= 1.

    Raises:
        ValueError: an argument out of its range.

    Reference: Kumar et al. 2025, arXiv:2504.02507, and its published code in z-score mode with
        adaptive scaling, but without that code's additional fixed threshold of 1, and without norms
        of 0, after which that code makes every gradient 0.

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

    @torch.no_grad()
    def __call__(self, total_norm: Tensor) -> Tensor:
        steps, mean, variance = self._on(total_norm.device)
        norm, n = total_norm.to(mean), steps.to(mean)
        # During the warm-up, mean and variance are those of all norms so far (Welford 1962).
        warm = steps >= self.warmup_steps
        old = (n / (n + 1)).masked_fill(warm, self.alpha)
        new = n.clamp(min=1).reciprocal().masked_fill(warm, 1 - self.alpha)
        deviation = variance.sqrt()
        z = (norm - mean) / (deviation + 1e-6)
        threshold = mean + deviation * self.z_threshold**2 / z
        # `quiet` norms are not clipped. One that is not finite is not quiet, so that its gradients
        # become NaN, as with a fixed threshold.
        quiet = norm.isfinite() & (~warm | (z <= self.z_threshold))
        usable = is_usable(norm)
        clipped = norm.where(quiet, threshold)
        following = torch.lerp(clipped, mean, old)
        spread = variance * old + (clipped - following).square() * new
        put(mean, following.where(usable, mean))
        put(variance, spread.where(usable, variance))
        steps.add_(usable).clamp_(max=self.warmup_steps)
        return threshold.masked_fill(quiet, math.inf).to(total_norm)
