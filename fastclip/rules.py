"""Rules: thresholds that follow the norms of a run. Pass one as `max_norm`.

A rule is called with the total norm, a 0-d float64, and returns the threshold on the same device,
or NaN for a step that is to be dropped; its state lives there too, in a few tensors, and no call
waits for it. A norm that is 0 (a frozen start, a loss that is masked) or not finite tells a rule
nothing, and never enters the state; a rule that has seen no other does not clip. Call a rule once
before a CUDA graph captures it: that call brings the state there.

Each is a class, a formula in plain PyTorch, and an op that makes one call of it. The formula takes
the norm and the state, which it changes in place, and returns the threshold, all on one device;
csrc/cpu/rules.cpp has it again, as one call of C++ for some twenty of torch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _ops
from ._state import CPU, State
from ._warnings import warn


def tells(norm: Tensor) -> Tensor:
    """Whether it tells a rule anything."""
    return norm.isfinite() & (norm > 0)


def _autoclip_of(norms: Tensor, count: Tensor, total_norm: Tensor, percentile: float) -> Tensor:
    """A percentile of the last norms: `norms` is a ring of float64, `count` how many there were."""
    history = len(norms)
    telling = tells(total_norm)
    # Where the norm tells nothing its place keeps what it holds.
    place = (count % history).reshape(1)
    norms.index_copy_(0, place, torch.where(telling, total_norm.to(norms), norms[place]))
    count += telling
    # Places not taken yet are infinite and come last.
    rank = (count.clamp(max=history) - 1).clamp_(min=0).to(norms) * (percentile / 100)
    below = rank.floor()
    around = norms.sort().values.take(torch.stack([below, rank.ceil()]).long())
    limit = around[0].lerp(around[1], rank - below)
    return limit.masked_fill((count == 0) & total_norm.isfinite(), math.inf).to(total_norm.dtype)


_autoclip: Callable[..., Tensor] = _ops.define(
    "autoclip_",
    "(Tensor(a!) norms, Tensor(b!) count, Tensor total_norm, float percentile) -> Tensor",
    lambda norms, count, total_norm, percentile: torch.empty_like(total_norm),
    _autoclip_of,
    _ops.refused("AutoClip"),
)


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

    def __call__(self, total_norm: Tensor) -> Tensor:
        return _autoclip(*self._on(total_norm.device), total_norm, self.percentile)


def _zclip_of(
    steps: Tensor,
    mean: Tensor,
    variance: Tensor,
    total_norm: Tensor,
    alpha: float,
    z_threshold: float,
    warmup_steps: int,
) -> Tensor:
    """What stands out of the averages; in the warm-up those of all norms so far (Welford 1962)."""
    warm = steps >= warmup_steps
    n = steps.to(mean)
    old = (n / (n + 1)).masked_fill(warm, alpha)
    new = n.clamp(min=1).reciprocal().masked_fill(warm, 1 - alpha)
    norm = total_norm.to(mean)
    deviation = variance.sqrt()
    z = (norm - mean) / (deviation + 1e-6)
    threshold = mean + deviation * z_threshold**2 / z
    # A norm that is not finite gets no pass: it spoils what it scales, as any threshold does.
    quiet = norm.isfinite() & (~warm | (z <= z_threshold))
    telling = tells(norm)
    clipped = norm.where(quiet, threshold)
    following = torch.lerp(clipped, mean, old)
    spread = variance * old + (clipped - following).square() * new
    mean.copy_(following.where(telling, mean))
    variance.copy_(spread.where(telling, variance))
    steps.add_(telling).clamp_(max=warmup_steps)
    return threshold.masked_fill(quiet, math.inf).to(total_norm.dtype)


_zclip: Callable[..., Tensor] = _ops.define(
    "zclip_",
    "(Tensor(a!) steps, Tensor(b!) mean, Tensor(c!) variance, Tensor total_norm, float alpha, "
    "float z_threshold, int warmup_steps) -> Tensor",
    lambda steps, mean, variance, total_norm, *how: torch.empty_like(total_norm),
    _zclip_of,
    _ops.refused("ZClip"),
)


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

    def __call__(self, total_norm: Tensor) -> Tensor:
        how = self.alpha, self.z_threshold, self.warmup_steps
        return _zclip(*self._on(total_norm.device), total_norm, *how)
