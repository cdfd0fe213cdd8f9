"""`DropSpikes`, a rule that drops steps; rules.py says what a rule is."""

import math
from typing import Any

import torch
from torch import Tensor

from ._arguments import Threshold, threshold
from ._decide import limit_of
from ._state import CPU, State, put
from .rules import is_usable


class DropSpikes(State):
    """Drop a step whose norm is far above the usual; clip all others by `max_norm`.

    If the norm exceeds `factor` times the moving average of the norms that were not dropped, the
    threshold is NaN, and the step is treated as if its norm were not finite: `clipped_step` skips
    it, as does the scaler after `unscale_and_clip_`; in `clip_grad_norm_` and `GradClipper`
    `nonfinite` decides. The average starts as that of the first `warmup_steps` norms, none of which
    is dropped. After `patience` drops in a row the next norm is accepted, and replaces the average.
    No wait for the device.

    Args:
        max_norm: threshold of the other steps: a number (`inf` clips nothing), a 0-d tensor, or a
            rule, which gets NaN in place of the norm of a dropped step.
        factor: multiple of the average above which a norm is dropped, > 1.
        alpha: weight of the old average, 0 to 1.
        warmup_steps: number of norms before the first drop, >= 1.
        patience: the most drops in a row, >= 0.

    Raises:
        ValueError: an argument out of its range.

    Reference: PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1) skips spikes; here the
        norm decides which step is one.

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
        is_accepted = is_far & (drops >= self.patience)
        is_dropped = is_far & ~is_accepted
        usable = is_usable(norm) & ~is_dropped
        old = (n / (n + 1)).masked_fill(warm, self.alpha).masked_fill(is_accepted, 0)
        put(mean, torch.lerp(norm, mean, old).where(usable, mean))
        steps.add_(usable).clamp_(max=self.warmup_steps)
        # A norm that is 0 or not finite is no drop, and does not end a row of drops either.
        put(drops, (drops + 1).where(is_dropped, drops * ~usable))
        shown = total_norm.masked_fill(is_dropped, math.nan)
        limit = limit_of(self.max_norm, shown)
        if not isinstance(limit, Tensor):
            limit = torch.full_like(shown, limit)
        return limit.to(shown).masked_fill(shown.isnan(), math.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies on the CPU, also of the state of `max_norm` if that is a rule."""
        inner = self.max_norm.state_dict() if isinstance(self.max_norm, State) else {}
        return super().state_dict() | {f"max_norm.{name}": inner[name] for name in inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the `state_dict()` of a rule made with the same arguments.

        Raises:
            ValueError: the names or shapes of the tensors differ from those of this rule.
        """
        inner = {n.removeprefix("max_norm."): v for n, v in state.items() if "." in n}
        own = {name: value for name, value in state.items() if "." not in name}
        if isinstance(self.max_norm, State):
            self.max_norm.load_state_dict(inner)
        elif inner:
            raise ValueError(f"state: expected no state of a rule in max_norm, got {inner}")
        super().load_state_dict(own)
