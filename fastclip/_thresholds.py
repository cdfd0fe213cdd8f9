"""The rules' formulas in plain PyTorch: a norm in, state changed in place, a threshold out.

All of them 0-d or 1-d tensors on one device; nothing waits for it.
"""

import math

import torch
from torch import Tensor


def autoclip_(norms: Tensor, count: Tensor, total_norm: Tensor, percentile: float) -> Tensor:
    """A percentile of the last norms: `norms` is a ring of float64, `count` how many there were."""
    history = len(norms)
    finite = total_norm.isfinite()
    # Where the norm is not finite its place keeps what it holds.
    place = (count % history).reshape(1)
    norms.index_copy_(0, place, torch.where(finite, total_norm.double(), norms[place]))
    count += finite
    # Places not taken yet are infinite and come last.
    rank = (count.clamp(max=history) - 1).clamp_(min=0).double() * (percentile / 100)
    below = rank.floor()
    around = norms.sort().values.take(torch.stack([below, rank.ceil()]).long())
    return around[0].lerp(around[1], rank - below).to(total_norm.dtype)


def zclip_(
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
    n = steps.double()
    old = (n / (n + 1)).masked_fill(warm, alpha)
    new = n.clamp(min=1).reciprocal().masked_fill(warm, 1 - alpha)
    norm = total_norm.double()
    deviation = variance.sqrt()
    z = (norm - mean) / (deviation + 1e-6)
    threshold = mean + deviation * z_threshold**2 / z
    # A norm that is not finite gets no pass: it spoils what it scales, as any threshold does.
    finite = norm.isfinite()
    quiet = finite & (~warm | (z <= z_threshold))
    clipped = norm.where(quiet, threshold)
    following = torch.lerp(clipped, mean, old)
    spread = variance * old + (clipped - following).square() * new
    mean.copy_(following.where(finite, mean))
    variance.copy_(spread.where(finite, variance))
    steps.add_(finite).clamp_(max=warmup_steps)
    return threshold.masked_fill(quiet, math.inf).to(total_norm.dtype)
