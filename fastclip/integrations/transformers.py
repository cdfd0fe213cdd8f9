"""transformers: a callback of its Trainer that clips with a `GradClipper`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .._warnings import warn
from ..clipper import GradClipper


class GradClip(TrainerCallback):
    """Clip the gradients before every optimizer step, log their norm, and save what rules keep.

    Instead of the `max_grad_norm` of `TrainingArguments`, which is to be 0. Every checkpoint gets a
    file, from which a run that is resumed from one in `output_dir` goes on.

    Args:
        max_norm: a number, a 0-d tensor or a rule, as in `GradClipper`.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: what an infinite or NaN norm does, as in `GradClipper`.
        groups: instead of `max_norm`, a function of the model that returns `GradClipper`'s groups,
            whose norms are logged as `grad_norm/` and their name: for a logger to see them, let it
            come after this one, `report_to="none", callbacks=[GradClip(...), WandbCallback()]`.

    `clipper` is the `GradClipper`, from the beginning of the training on: `clipper.stats()`.

    Raises:
        TypeError, ValueError: when the training begins, as `GradClipper`.
    """

    FILE = "fastclip.pt"

    def __init__(
        self,
        max_norm: Any = None,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        *,
        groups: Callable[[torch.nn.Module], Sequence[dict[str, Any]]] | None = None,
    ) -> None:
        if (max_norm is None) == (groups is None):
            raise TypeError("max_norm, groups: expected one of the two")
        self.max_norm, self.groups = max_norm, groups
        self.how = {"norm_type": norm_type, "nonfinite": nonfinite}
        self.clipper: GradClipper | None = None
        self._norms: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise ValueError(
                f"GradClip: max_grad_norm is {args.max_grad_norm}, by which the Trainer clips too; "
                "pass max_grad_norm=0"
            )
        if self.groups is not None:
            self.clipper = GradClipper(groups=self.groups(kwargs["model"]), **self.how)
        else:
            self.clipper = GradClipper(kwargs["model"], self.max_norm, **self.how)
        if state.global_step:
            file = self._file(args, state)
            if file.exists():
                self.clipper.load_state_dict(torch.load(file))
            else:
                warn(f"GradClip: {file} is not there; rules and numbers begin anew")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._norms = self.clipper.clip_()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.groups is not None and self._norms is not None and "loss" in logs:
            names = [f"grad_norm/{name}" for name in self.clipper.names]
            norms = dict(zip(names, self._norms.tolist(), strict=True))
            logs.update(norms)
            state.log_history[-1].update(norms)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            torch.save(self.clipper.state_dict(), self._file(args, state))

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", self.FILE)
