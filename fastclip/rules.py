"""Rules: thresholds that follow the norms of a run. Pass one as `max_norm`.

A rule is called with the total norm, a 0-d float64, and returns the threshold on the same device,
or NaN for a step that is to be dropped; its state lives there too, in a few tensors, and no call
waits for it. A norm that is 0 (a frozen start, a loss that is masked) or not finite tells a rule
nothing, and never enters the state; a rule that has seen no other does not clip. Call a rule once
before a CUDA graph captures it: that call brings the state there.

A new rule is a subclass of `State`, exported by `__init__.py`: `_start` makes the state, and
`__call__` changes it in place.
"""

import math

import torch
from torch import Tensor

from ._state import CPU, State, put
from ._warnings import warn


def tells(norm: Tensor) -> Tensor:
    """Whether it tells a rule anything."""
    return norm.isfinite() & (norm > 0)


class AutoClip(State):
    """The threshold is a percentile of the norms so far, this one included.

    Of the last `history` norms that are finite and not 0, interpolated linearly as NumPy does; inf
    before the first of them. No wait for the device.

    Args:
        percentile: 0 to 100; at 10 nine steps of ten are clipped.
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
                f"percentile: {percentile} is less than the first of a hundred; for the "
                f"{100 * percentile:g}th pass {100 * percentile:g}"
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
        # `norms` is a ring, `count` how many norms there were.
        norms, count = self._on(total_norm.device)
        norm = total_norm.to(norms)
        telling = tells(norm)
        # Where the norm tells nothing its place keeps what it holds.
        place = (count % self.history).reshape(1)
        norms.index_copy_(0, place, norm.where(telling, norms[place]))
        count += telling
        # Places not taken yet are infinite and come last.
        held = count.clamp(max=self.history)
        rank = (held - 1).clamp_(min=0).to(norms) * (self.percentile / 100)
        below = rank.floor()
        around = norms.sort().values.take(torch.stack([below, rank.ceil()]).long())
        limit: Tensor = around[0].lerp(around[1], rank - below)
        return limit.masked_fill((count == 0) & norm.isfinite(), math.inf).to(total_norm)


class ZClip(State):
    """Clip outliers from a moving average of the norms, the further ones the more.

    With mean m and standard deviation s of the norms so far, but those of 0,
    z = (norm - m) / (s + 1e-6). Where z exceeds `z_threshold` the threshold is
    m + z_threshold^2 * s / z, else there is none (inf). Then mean and variance move by 1 - alpha
    towards the norm as clipped. They begin as those of the first `warmup_steps` norms, of which
    none is clipped. No wait for the device.

    Args:
        alpha: the share of the old average, 0 to 1.
        z_threshold: in standard deviations, > 0.
        warmup_steps: >= 1.

    Raises:
        ValueError: an argument out of its range.

    Reference: Kumar et al. 2025, arXiv:2504.02507, and its published code in z-score mode with
        adaptive scaling, without that code's fixed threshold of 1 beside it, and without norms of
        0, after which that code makes every gradient 0.

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
        # In the warm-up mean and variance are those of all norms so far (Welford 1962).
        warm = steps >= self.warmup_steps
        old = (n / (n + 1)).masked_fill(warm, self.alpha)
        new = n.clamp(min=1).reciprocal().masked_fill(warm, 1 - self.alpha)
        deviation = variance.sqrt()
        z = (norm - mean) / (deviation + 1e-6)
        threshold = mean + deviation * self.z_threshold**2 / z
        # A norm that is not finite gets no pass: it spoils what it scales, as any threshold does.
        quiet = norm.isfinite() & (~warm | (z <= self.z_threshold))
        telling = tells(norm)
        clipped = norm.where(quiet, threshold)
        following = torch.lerp(clipped, mean, old)
        spread = variance * old + (clipped - following).square() * new
        put(mean, following.where(telling, mean))
        put(variance, spread.where(telling, variance))
        steps.add_(telling).clamp_(max=self.warmup_steps)
        return threshold.masked_fill(quiet, math.inf).to(total_norm)
