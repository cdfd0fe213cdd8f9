"""transformers: a callback of its Trainer that clips with a `GradClipper`."""

import base64
import io
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .._arguments import Group, Nonfinite, NormType
from .._warnings import warn
from ..clipper import GradClipper


class GradClip(TrainerCallback, ExportableState):
    """Clip the gradients before every optimizer step, log their norm, and save the state of rules.

    It replaces the `max_grad_norm` of `TrainingArguments`, which must be 0. The state of rules and
    the recorded norms are in the `trainer_state.json` of every checkpoint. A resumed run continues
    from them (leave `restore_callback_states_from_checkpoint` False); other runs start afresh.

    Args:
        max_norm: a number, a 0-d tensor or a rule, as in `GradClipper`.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: the policy for an infinite or NaN norm, as in `GradClipper`. The Trainer takes
            the step anyway (with `"keep"`, on bad gradients), unless its scaler skips it.
        groups: instead of `max_norm`, a function of the model that returns `GradClipper`'s groups.
            Their norms are logged as `grad_norm/name`, which only later callbacks see: put loggers
            after this one, `report_to="none", callbacks=[GradClip(...), WandbCallback()]`.

    `clippers` holds the one `GradClipper`, once training has begun: `clippers[0].stats()`.

    Raises:
        ValueError: when training begins, with `max_grad_norm`, FSDP1, DeepSpeed, or fp16 in
            transformers 4.
    """

    def __init__(
        self,
        max_norm: Any = None,
        norm_type: NormType = 2.0,
        *,
        nonfinite: Nonfinite = "propagate",
        groups: Callable[[torch.nn.Module], Sequence[Group]] | None = None,
    ) -> None:
        if (max_norm is None) == (groups is None):
            raise TypeError("max_norm, groups: expected one of the two")
        self.max_norm, self.groups = max_norm, groups
        self.how: dict[str, Any] = {"norm_type": norm_type, "nonfinite": nonfinite}
        self._fresh = max_norm.state_dict() if hasattr(max_norm, "load_state_dict") else None
        self.clippers: list[GradClipper] = []
        self._norms: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The checkpoint of a run without this callback has no entry for it.
        exported = state.stateful_callbacks.setdefault(type(self).__name__, {})
        _check(args, exported)
        if self._fresh is not None:
            self.max_norm.load_state_dict(self._fresh)
        if self.groups is not None:
            self.clippers = [GradClipper(groups=self.groups(kwargs["model"]), **self.how)]
        else:
            self.clippers = [GradClipper(kwargs["model"], self.max_norm, **self.how)]
        if state.global_step and "state" in exported.get("attributes", {}):
            saved = zlib.decompress(base64.b64decode(exported["attributes"]["state"]))
            self.clippers[0].load_state_dict(torch.load(io.BytesIO(saved)))
        elif state.global_step:
            warn("GradClip: this checkpoint was saved without it; rules and statistics begin anew")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._norms = self.clippers[0].clip_()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.groups is not None and self._norms is not None and "loss" in logs:
            names = [f"grad_norm/{name}" for name in self.clippers[0].names]
            norms = dict(zip(names, self._norms.tolist(), strict=True))
            logs.update(norms)
            state.log_history[-1].update(norms)

    def state(self) -> dict[str, Any]:
        """Return the state of the clipper as text, for the JSON file of the Trainer."""
        attributes = {}
        if self.clippers:
            torch.save(self.clippers[0].state_dict(), file := io.BytesIO())
            attributes["state"] = base64.b64encode(zlib.compress(file.getvalue())).decode()
        return {"args": {}, "attributes": attributes}


def _check(args: Any, exported: Any) -> None:
    accelerator = AcceleratorState()
    kind = accelerator.distributed_type.name
    if args.max_grad_norm:
        problem = (
            f"the Trainer clips by max_grad_norm {args.max_grad_norm} too; pass max_grad_norm=0"
        )
    elif isinstance(exported, list):
        problem = "the Trainer has two of these callbacks; pass groups to one"
    elif kind == "DEEPSPEED" or (kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False)):
        problem = f"{kind} hides which rank has which part of a gradient; use DDP or FSDP2"
    elif args.fp16 and not hasattr(Trainer, "_get_grad_norm"):
        problem = "fp16 gradients are still scaled in this transformers; use bf16 or transformers 5"
    else:
        return
    raise ValueError(f"GradClip: {problem}")
