"""Measure the norm during backward, so that a clip need not read the gradients to measure it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from . import _ops
from ._arguments import NormType, Threshold, positive_order, threshold
from ._decide import clip_by_norm_
from ._gradients import Gradients, NamedParameters, read
from ._ranks import is_alone, is_data_parallel, is_dtensor, is_spread, on_reduced_buckets
from ._warnings import warn


class NormAccumulator:
    """Measure each gradient when backward has made it, and clip by the norm of all afterwards.

    Each gradient is read while it is still in the cache. `clip_` only combines these norms, then
    scales as `clip_grad_norm_` does. Under `DistributedDataParallel` the averaged buckets are
    measured as they arrive. A gradient that has been changed in place or replaced since then is
    measured again. Changes that do not bump the version counter go unnoticed: writes through
    `.data`, collectives of `torch.distributed`, replays of a CUDA graph. Call `forget` after them.
    After `scaler.unscale_` all gradients are measured again. Instead of it call `unscale_and_clip_`
    or `clipped_step`, with this accumulator as `measured`.

    `clip_` measures all gradients itself in three cases: the extension is not built; there are
    several ranks without `DistributedDataParallel`, where collectives would go unnoticed; or a
    gradient is a DTensor (FSDP2), complex, sparse, or on another device than the rest.

    Args:
        parameters: a module, also `DistributedDataParallel`, an optimizer, tensors, or several
            modules or optimizers; when their parameters change, `clip_` starts to measure new ones.
        norm_type: order p > 0 of the norm, or `'inf'`.

    With gradient accumulation every backward measures the gradients, and the last result counts:
    run all micro-batches but the last inside `with norms.pause():`, where nothing is measured. A
    copy, also by `pickle`, has no hooks: `clip_` warns once, and measures all gradients.

    Raises:
        TypeError, ValueError: bad arguments, which the message names.

    Reference: `torch.Tensor.register_post_accumulate_grad_hook`,
        `DistributedDataParallel.register_comm_hook`.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> norms = NormAccumulator([w])
    >>> (w * torch.tensor([3.0, 4.0])).sum().backward()
    >>> norms.clip_(max_norm=1.0), w.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """

    def __init__(self, parameters: Any, norm_type: NormType = 2.0) -> None:
        self.p = positive_order(norm_type)
        self._is_averaged = is_data_parallel(parameters)
        self._source = NamedParameters(parameters.module if self._is_averaged else parameters)
        self._items = self._find_items()
        self._measured: Any = None
        self._hooks: list[Any] = []
        self._is_removed = self._has_lost_hooks = False
        self._attach(parameters if self._is_averaged else None)

    def clip_(self, max_norm: Threshold) -> Tensor:
        """Clip the gradients in place by the norm of all, as `clip_grad_norm_` does.

        Args:
            max_norm: a number, a 0-d tensor or a rule.

        Returns:
            The norm before clipping, as `clip_grad_norm_` returns it.

        Raises:
            TypeError, ValueError: bad input, which the message names; gradients are untouched.
        """
        max_norm = threshold(max_norm)
        self._refresh()
        return clip_by_norm_(self._take(), max_norm, self.p)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Return a context in which nothing is measured, for all micro-batches but the last."""
        before = self._set_paused(True)
        try:
            yield
        finally:
            self._set_paused(before or self._is_removed)

    def take(self, parameters: list[Tensor], norm_type: float) -> Gradients:
        """Return the gradients of these parameters with the measured norms, and forget the norms.

        Called by `unscale_and_clip_` and `clipped_step`.

        Raises:
            ValueError: different gradients were measured, or norms of a different order.
        """
        self._refresh()
        # DTensors are never measured in backward; which of them have gradients may vary by rank.
        if is_spread(parameters) and norm_type == self.p:
            return read(parameters, agree=True)
        ours, theirs = (
            {id(i) for i in some if i.grad is not None} for some in (self._items, parameters)
        )
        if ours != theirs or norm_type != self.p:
            raise ValueError(
                f"measured: expected norms of order {norm_type} of the {len(theirs)} gradients of "
                f"the optimizer, got norms of order {self.p} of {len(ours)} gradients; make the "
                f"accumulator with the optimizer's parameters and norm_type={norm_type}"
            )
        return self._take()

    def forget(self) -> None:
        """Discard the measured norms: the next `clip_` measures all gradients."""
        if self._measured is not None:
            self._measured.forget()

    def remove(self) -> None:
        """Remove the hooks, but not that of `DistributedDataParallel`, which then only averages."""
        self._detach()
        self._is_removed = True
        self._set_paused(True)
        self.forget()

    def __enter__(self) -> "NormAccumulator":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without hooks and measured norms: parameters of a copy have no hooks."""
        lost = self._has_lost_hooks or (bool(self._hooks) and not self._is_removed)
        source = NamedParameters(self._source.source)
        found = {"_source": source, "_measured": None, "_has_lost_hooks": lost}
        return {**vars(self), **found, "_hooks": []}

    def _find_items(self) -> list[Tensor]:
        return list({id(item): item for _, item in self._source.find()}.values())

    def _refresh(self) -> None:
        """If parameters have changed, attach to the new; if there are other ranks now, detach."""
        if not self._source.is_unchanged():
            before, self._items = self._items, self._find_items()
            if list(map(id, before)) != list(map(id, self._items)):
                self._detach()
                self._measured = None
                if not (self._is_averaged or self._is_removed or self._has_lost_hooks):
                    self._attach(None)
        if self._measured is not None and not (self._is_averaged or is_alone()):
            self._detach()
            self._measured = None

    def _attach(self, averaged: Any) -> None:
        """Add hooks, if they can measure; `averaged` is a `DistributedDataParallel` or None."""
        changes_show = averaged is not None or is_alone()
        if not changes_show or _ops.extension is None or any(map(_is_unsupported, self._items)):
            return
        if averaged is None:
            self._measured = _ops.extension.MeasuredGrads(self._items, self.p)
            hook = self._measured.see
        else:
            self._measured = measured = _ops.extension.MeasuredBuckets(self._items, self.p)
            hook = measured.touch
            settle = partial(measured.settle, self._items)
            on_reduced_buckets(averaged, measured.see_bucket, settle, measured.forget)
        leaves = [item for item in self._items if item.requires_grad]
        self._hooks = [leaf.register_post_accumulate_grad_hook(hook) for leaf in leaves]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _take(self) -> Gradients:
        if self._has_lost_hooks:
            self._has_lost_hooks = False
            warn(
                "this NormAccumulator is a copy and has no hooks: it measures all gradients when "
                "it clips; make a new one with the copied parameters"
            )
        grads = None if self._measured is None else self._measured.take(self._items)
        if grads is None:
            self.forget()
        return read(self._items) if grads is None else grads

    def _set_paused(self, is_paused: bool) -> bool:
        """Pause or resume; return whether measuring was paused before."""
        if self._measured is None:
            return False
        before: bool = self._measured.is_paused
        self._measured.is_paused = is_paused
        return before


def _is_unsupported(item: Tensor) -> bool:
    return is_dtensor(item) or item.is_complex()
