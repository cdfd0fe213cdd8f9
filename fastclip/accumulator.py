"""The norm gathered during backward, so that the clip is a decision and at most one write."""

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

    A gradient is read when it is in the cache anyway, and `clip_` only puts the norms that were
    measured together, then scales as `clip_grad_norm_` does. Under `DistributedDataParallel` the
    averaged buckets are measured as they arrive. A gradient that was changed since, by in-place
    operations or a new object, is measured again. What changes a gradient without its version
    counter is not seen: writes through `.data`, collectives of `torch.distributed`, replays of a
    CUDA graph. After those call `forget`. Where a scaler has unscaled them, all are measured again:
    pass this as `measured` to `unscale_and_clip_` or `clipped_step` instead.

    `clip_` measures all gradients itself where the extension is not built; on several ranks without
    `DistributedDataParallel`, whose collectives would not be seen; and where a gradient is a
    DTensor (FSDP2), complex, sparse, or on another device than the rest.

    Args:
        parameters: a module, also `DistributedDataParallel`, an optimizer, tensors, or several
            modules or optimizers; when one holds others, those are measured from the next `clip_`.
        norm_type: order p > 0 of the norm, or `'inf'`.

    Gradients that accumulate are measured after every backward, and the last one counts; inside
    `with norms.pause():` nothing is measured, which saves that for all micro-batches but the last.
    A copy, also by `pickle`, has no hooks: its first `clip_` says so, and measures all gradients.

    Raises:
        TypeError, ValueError: bad arguments, named.

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
        self._items = self._found()
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
            TypeError, ValueError: bad input, named; gradients untouched.
        """
        max_norm = threshold(max_norm)
        self._look_again()
        return clip_by_norm_(self._take(), max_norm, self.p)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Measure nothing in here: for the micro-batches before the last."""
        before = self._pause(True)
        try:
            yield
        finally:
            self._pause(before or self._is_removed)

    def take(self, parameters: list[Tensor], norm_type: float) -> Gradients:
        """The gradients of these parameters, with what was measured of them, which is forgotten.

        For `unscale_and_clip_` and `clipped_step`.

        Raises:
            ValueError: they are not those that were measured, or it was another norm.
        """
        self._look_again()
        # Each rank may have others; of DTensors nothing was measured.
        if is_spread(parameters) and norm_type == self.p:
            return read(parameters, agree=True)
        ours, theirs = (
            {id(i) for i in some if i.grad is not None} for some in (self._items, parameters)
        )
        if ours != theirs or norm_type != self.p:
            raise ValueError(
                f"measured: expected norms of order {norm_type} of the {len(theirs)} gradients of "
                f"the optimizer, got some of order {self.p} of {len(ours)}; make the accumulator "
                f"of what it steps, with norm_type={norm_type}"
            )
        return self._take()

    def forget(self) -> None:
        """Drop what was measured: the next `clip_` measures all gradients."""
        if self._measured is not None:
            self._measured.forget()

    def remove(self) -> None:
        """Take the hooks away; that of `DistributedDataParallel`, for good, then only averages."""
        self._detach()
        self._is_removed = True
        self._pause(True)
        self.forget()

    def __enter__(self) -> "NormAccumulator":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to hooks, of which the parameters of a copy have none."""
        lost = self._has_lost_hooks or (bool(self._hooks) and not self._is_removed)
        source = NamedParameters(self._source.source)
        found = {"_source": source, "_measured": None, "_has_lost_hooks": lost}
        return {**vars(self), **found, "_hooks": []}

    def _found(self) -> list[Tensor]:
        return list({id(item): item for _, item in self._source.find()}.values())

    def _look_again(self) -> None:
        """What was measured counts of the same parameters, where no other rank changes them."""
        if not self._source.is_unchanged():
            before, self._items = self._items, self._found()
            if list(map(id, before)) != list(map(id, self._items)):
                self._detach()
                self._measured = None
                if not (self._is_averaged or self._is_removed or self._has_lost_hooks):
                    self._attach(None)
        if self._measured is not None and not (self._is_averaged or is_alone()):
            self._detach()
            self._measured = None

    def _attach(self, averaged: Any) -> None:
        """Measure from now on, if that can be; what is `averaged`, in buckets."""
        seen = averaged is not None or is_alone()
        if not seen or _ops.extension is None or any(map(_is_odd, self._items)):
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
                "it clips; make one of the copy's parameters"
            )
        grads = None if self._measured is None else self._measured.take(self._items)
        if grads is None:
            self.forget()
        return read(self._items) if grads is None else grads

    def _pause(self, is_paused: bool) -> bool:
        """Whether it was paused before."""
        if self._measured is None:
            return False
        before: bool = self._measured.is_paused
        self._measured.is_paused = is_paused
        return before


def _is_odd(item: Tensor) -> bool:
    return is_dtensor(item) or item.is_complex()
