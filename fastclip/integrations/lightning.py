"""Lightning: a callback that clips with a `GradClipper` for each optimizer."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback
import torch

from .._ranks import value_of
from ..clipper import GradClipper


class GradClip(Callback):
    """Clip the gradients before every optimizer step, log their norm, and save what rules keep.

    Instead of the trainer's `gradient_clip_val`. The norm is logged as a tensor, for any logger,
    without a wait for the device. Checkpoints hold the state of rules and of the recorded norms.

    Args:
        max_norm: a number, a 0-d tensor or a rule, as in `GradClipper`; of several optimizers each
            has its own copy of a rule.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: what an infinite or NaN norm does, as in `GradClipper`.
        groups: instead of `max_norm`, a function of the module that returns `GradClipper`'s groups.
        log_name: what norms are logged as, of groups with their names added; None to log none.

    `clippers` are the `GradClipper`s, in the order of the optimizers: `clippers[0].stats()`.

    Raises:
        TypeError, ValueError: at the first step, as `GradClipper`.
        RuntimeError: at the first step: with a scaler, a fused optimizer whose gradients nobody
            divides before its step; README has the plugin that clips in it.
    """

    def __init__(
        self,
        max_norm: Any = None,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        *,
        groups: Callable[[torch.nn.Module], Sequence[dict[str, Any]]] | None = None,
        log_name: str | None = "grad_norm",
    ) -> None:
        if (max_norm is None) == (groups is None):
            raise TypeError("max_norm, groups: expected one of the two")
        self.max_norm, self.norm_type, self.nonfinite = max_norm, norm_type, nonfinite
        self.groups, self.log_name = groups, log_name
        self.clippers: list[GradClipper] = []
        self._saved: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Another fit has other optimizers, and goes on from the same state."""
        self._saved, self.clippers = self.state_dict()["clippers"], []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._make(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise RuntimeError(
                f"GradClip: the scaled gradients of a fused {type(optimizer).__name__} are divided "
                "in its step, after this; use fused=False, or clip in the step with clipped_step"
            )
        number = [id(own) for own in trainer.optimizers].index(id(optimizer))
        norms = value_of(self.clippers[number].clip_())
        if self.log_name is None:
            return
        if self.groups is not None:
            names = [f"{self.log_name}/{name}" for name in self.clippers[0].names]
        else:
            names = [f"{self.log_name}/{number}" if len(self.clippers) > 1 else self.log_name]
        pl_module.log_dict(dict(zip(names, norms.reshape(-1).unbind(), strict=True)))

    def _make(self, trainer: Any, pl_module: Any) -> None:
        if self.clippers:
            return
        how = {"norm_type": self.norm_type, "nonfinite": self.nonfinite}
        if self.groups is None:
            self.clippers = [
                GradClipper(optimizer, copy.deepcopy(self.max_norm), **how)
                for optimizer in trainer.optimizers
            ]
        elif len(trainer.optimizers) > 1:
            raise ValueError("groups: expected one optimizer; with several pass max_norm")
        else:
            self.clippers = [GradClipper(groups=self.groups(pl_module), **how)]
        for clipper, state in zip(self.clippers, self._saved, strict=False):
            clipper.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [c.state_dict() for c in self.clippers] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning restores callbacks before there are optimizers."""
        self._saved = state_dict["clippers"]
        for clipper, state in zip(self.clippers, self._saved, strict=False):
            clipper.load_state_dict(state)
