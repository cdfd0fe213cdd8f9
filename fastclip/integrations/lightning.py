"""Lightning: a callback of its Trainer, with a `GradClipper` for each optimizer."""

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
    """Clip the gradients before every optimizer step, log their norm, and save the state of rules.

    It replaces the trainer's `gradient_clip_val`. The norm is logged as a tensor, for any logger,
    without a wait for the device. Checkpoints hold the state of rules and the recorded norms.
    Another `fit` of the same module continues from them, a `fit` of another module starts afresh.

    Args:
        max_norm: a number, a 0-d tensor or a rule, as in `GradClipper`; with several optimizers the
            first uses the rule, and each of the others a copy of it.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: the policy for an infinite or NaN norm, as in `GradClipper`. The trainer takes
            the step anyway (with `"keep"`, on bad gradients), unless its scaler skips it.
        groups: instead of `max_norm`, a function of the module that returns `GradClipper`'s groups.
        log_name: the name in the log, with groups `log_name/group`. None logs nothing.

    `clippers` are the `GradClipper`s, in the order of the optimizers: `clippers[0].stats()`.

    Raises:
        ValueError: when training begins, with `gradient_clip_val`, FSDP1 or DeepSpeed.
        RuntimeError: when training begins, with a scaler and a fused optimizer, which unscales the
            gradients only later, in its step; README links a plugin that clips in the step.
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
        self._fresh = max_norm.state_dict() if hasattr(max_norm, "load_state_dict") else None
        self._module: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the clippers here, because every `fit` makes new optimizers."""
        self._check(trainer)
        is_same = self._module in (None, pl_module)
        saved = self.state_dict()["clippers"] if is_same else []
        if self._fresh is not None and not is_same:
            self.max_norm.load_state_dict(self._fresh)
        if self.groups is not None:
            self.clippers = [GradClipper(groups=self.groups(pl_module), **self.how)]
        else:
            rules = [self.max_norm]
            for _ in trainer.optimizers[1:]:
                rules.append(copy.deepcopy(rules[0]) if self._fresh is not None else rules[0])
            pairs = zip(trainer.optimizers, rules, strict=False)
            self.clippers = [GradClipper(optimizer, rule, **self.how) for optimizer, rule in pairs]
        for clipper, state in zip(self.clippers, saved, strict=False):
            clipper.load_state_dict(state)
        self._module = pl_module

    def _check(self, trainer: Any) -> None:
        if self.groups is not None and len(trainer.optimizers) > 1:
            raise ValueError("groups: expected one optimizer; with several pass max_norm")
        if trainer.gradient_clip_val:
            raise ValueError("GradClip: gradient_clip_val is set, and clips too; leave it out")
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"GradClip: {type(trainer.strategy).__name__} hides which rank has which part of a "
                "gradient; use DDPStrategy or ModelParallelStrategy, or gradient_clip_val"
            )
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if is_scaled and any(map(divides, trainer.optimizers)):
            raise RuntimeError(
                "GradClip: the scaled gradients of a fused optimizer are divided in its step; use "
                "fused=False, or clip in the step with clipped_step"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        number = [id(own) for own in trainer.optimizers].index(id(optimizer))
        norms = value_of(self.clippers[number].clip_())
        if self.log_name is None:
            return
        names = [self.log_name]
        if self.groups is not None:
            names = [f"{self.log_name}/{name}" for name in self.clippers[0].names]
        elif len(self.clippers) > 1:
            names = [f"{self.log_name}/{number}"]
        pl_module.log_dict(dict(zip(names, norms.reshape(-1).unbind(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [c.state_dict() for c in self.clippers] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved, self.clippers, self._module = state_dict["clippers"], [], None
