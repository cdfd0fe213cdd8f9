"""Lightning: a callback that clips with a `GradClipper` for each optimizer."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
except ImportError:
    from pytorch_lightning import Callback
    from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy
import torch

from .._arguments import Group, Nonfinite, NormType
from .._optimizers import divides
from .._ranks import value_of
from ..clipper import GradClipper


class GradClip(Callback):
    """Clip the gradients before every optimizer step, log their norm, and save what rules keep.

    Instead of the trainer's `gradient_clip_val`. The norm is logged as a tensor, for any logger,
    without a wait for the device. Checkpoints hold the state of rules and of the recorded norms;
    another `fit` of the same module goes on from it, that of another module begins anew.

    Args:
        max_norm: a number, a 0-d tensor or a rule, as in `GradClipper`; of several optimizers each
            has its own copy of a rule.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: what an infinite or NaN norm does, as in `GradClipper`. The trainer steps all the
            same, unless its scaler does not: after `"keep"` by gradients that are not finite.
        groups: instead of `max_norm`, a function of the module that returns `GradClipper`'s groups.
        log_name: what norms are logged as, of groups with their names added; None to log none.

    `clippers` are the `GradClipper`s, in the order of the optimizers: `clippers[0].stats()`.

    Raises:
        ValueError: with `gradient_clip_val`, FSDP1 or DeepSpeed, when training begins.
        RuntimeError: then too, with a scaler and a fused optimizer, whose gradients nobody divides
            before its step; README has the plugin that clips in it.
    """

    def __init__(
        self,
        max_norm: Any = None,
        norm_type: NormType = 2.0,
        *,
        nonfinite: Nonfinite = "propagate",
        groups: Callable[[torch.nn.Module], Sequence[Group]] | None = None,
        log_name: str | None = "grad_norm",
    ) -> None:
        if (max_norm is None) == (groups is None):
            raise TypeError("max_norm, groups: expected one of the two")
        self.max_norm, self.groups, self.log_name = max_norm, groups, log_name
        self.how: dict[str, Any] = {"norm_type": norm_type, "nonfinite": nonfinite}
        self.clippers: list[GradClipper] = []
        self._saved: list[dict[str, Any]] = []
        self._has_state = hasattr(max_norm, "load_state_dict")
        self._fresh = max_norm.state_dict() if self._has_state else None
        self._module: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """There are optimizers now, which are others in every fit."""
        self._check(trainer)
        saved, is_same = self.state_dict()["clippers"], self._module in (None, pl_module)
        if self._has_state and not is_same:
            self.max_norm.load_state_dict(self._fresh)
        optimizers = trainer.optimizers
        if self.groups is None:
            is_copied = self._has_state and len(optimizers) > 1
            copied: Callable[[Any], Any] = copy.deepcopy if is_copied else (lambda rule: rule)
            self.clippers = [GradClipper(o, copied(self.max_norm), **self.how) for o in optimizers]
        elif len(optimizers) > 1:
            raise ValueError("groups: expected one optimizer; with several pass max_norm")
        else:
            self.clippers = [GradClipper(groups=self.groups(pl_module), **self.how)]
        for clipper, state in zip(self.clippers, saved if is_same else [], strict=False):
            clipper.load_state_dict(state)
        self._module = pl_module

    def _check(self, trainer: Any) -> None:
        if trainer.gradient_clip_val:
            raise ValueError("GradClip: gradient_clip_val is set, and clips too; leave it out")
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"GradClip: {type(trainer.strategy).__name__} hides which rank has which part of a "
                "gradient; use DDPStrategy or ModelParallelStrategy, or gradient_clip_val"
            )
        if (
            any(map(divides, trainer.optimizers))
            and getattr(trainer.precision_plugin, "scaler", None) is not None
        ):
            raise RuntimeError(
                "GradClip: the scaled gradients of a fused optimizer are divided in its step; use "
                "fused=False, or clip in the step with clipped_step"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        number = [id(own) for own in trainer.optimizers].index(id(optimizer))
        norms = value_of(self.clippers[number].clip_())
        if self.log_name is None:
            return
        if self.groups is not None:
            names = [f"{self.log_name}/{name}" for name in self.clippers[0].names]
        else:
            names = [f"{self.log_name}/{number}" if len(self.clippers) > 1 else self.log_name]
        pl_module.log_dict(dict(zip(names, norms.reshape(-1).unbind(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [c.state_dict() for c in self.clippers] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self.clippers, self._module = state_dict["clippers"], [], None
