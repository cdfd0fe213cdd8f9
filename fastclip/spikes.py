"""A rule that drops steps: `DropSpikes`, made as those of rules.py are."""

import math
from typing import Any

import torch
from torch import Tensor

from ._arguments import Threshold, threshold
from ._decide import resolved
from ._state import CPU, State, put
from .rules import tells


class DropSpikes(State):
    """Drop a step whose norm is far above the usual; clip all others by `max_norm`.

    Where the norm exceeds `factor` times the moving average of the norms that were not dropped, the
    threshold is NaN, which drops the step as a norm that is not finite does: `clipped_step` and the
    scaler after `unscale_and_clip_` skip it, `clip_grad_norm_` and `GradClipper` do as `nonfinite`
    says. The average begins as that of the first `warmup_steps` norms, of which none is dropped.
    After `patience` drops in a row the next norm is believed, and the average goes on from it. No
    wait for the device.

    Args:
        max_norm: what clips the other steps: a number, `inf` for nothing, a 0-d tensor, or a rule,
            which does not see the norms of dropped steps.
        factor: > 1.
        alpha: the share of the old average, 0 to 1.
        warmup_steps: >= 1.
        patience: >= 0.

    Raises:
        ValueError: an argument out of its range.

    Reference: the skipping of spikes in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section
        5.1), decided by the norm.

    >>> rule = DropSpikes(max_norm=1.0, warmup_steps=2)
    >>> [float(rule(torch.tensor(norm))) for norm in (1.0, 3.0, 10.0, 2.0)]
    [1.0, 1.0, nan, 1.0]
    """

    def __init__(
        self,
        max_norm: Threshold,
        factor: float = 4.0,
        alpha: float = 0.98,
        warmup_steps: int = 25,
        patience: int = 20,
    ) -> None:
        if not factor > 1:
            raise ValueError(f"factor: expected a number > 1, got {factor}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        for name, count, least in (("warmup_steps", warmup_steps, 1), ("patience", patience, 0)):
            if not (isinstance(count, int) and count >= least):
                raise ValueError(f"{name}: expected a whole number >= {least}, got {count}")
        self.max_norm, self.factor, self.alpha = threshold(max_norm), factor, alpha
        self.warmup_steps, self.patience = warmup_steps, patience
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=CPU)
        steps = zero.new_zeros((), dtype=torch.int64)
        return {"steps": steps, "mean": zero, "drops": steps.clone()}

    @torch.no_grad()
    def __call__(self, total_norm: Tensor) -> Tensor:
        steps, mean, drops = self._on(total_norm.device)
        norm, n, warm = total_norm.to(mean), steps.to(mean), steps >= self.warmup_steps
        is_far = norm.isfinite() & warm & (norm > self.factor * mean)
        is_believed = is_far & (drops >= self.patience)
        is_dropped = is_far & ~is_believed
        telling = tells(norm) & ~is_dropped
        old = (n / (n + 1)).masked_fill(warm, self.alpha).masked_fill(is_believed, 0)
        put(mean, torch.lerp(norm, mean, old).where(telling, mean))
        steps.add_(telling).clamp_(max=self.warmup_steps)
        # A step without a norm says nothing of the level.
        put(drops, (drops + 1).where(is_dropped, drops * ~telling))
        shown = total_norm.masked_fill(is_dropped, math.nan)
        limit = resolved(self.max_norm, shown)
        if not isinstance(limit, Tensor):
            limit = torch.full_like(shown, limit)
        return limit.to(shown).masked_fill(shown.isnan(), math.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """As of other rules, with the state of the rule inside, if `max_norm` is one."""
        inner = self.max_norm.state_dict() if isinstance(self.max_norm, State) else {}
        return super().state_dict() | {f"max_norm.{name}": inner[name] for name in inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of one made with the same arguments returned.

        Raises:
            ValueError: names or shapes that are not its own.
        """
        inner = {n.removeprefix("max_norm."): v for n, v in state.items() if "." in n}
        own = {name: value for name, value in state.items() if "." not in name}
        if isinstance(self.max_norm, State):
            self.max_norm.load_state_dict(inner)
        elif inner:
            raise ValueError(f"state: expected that of a DropSpikes without a rule, got {inner}")
        super().load_state_dict(own)
