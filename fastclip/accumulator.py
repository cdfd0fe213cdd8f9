"""The norm gathered during backward, so that the clip is a decision and at most one write."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._arguments import Threshold, positive_order, resolved, threshold
from ._grads import read
from ._mesh import is_dtensor
from ._named import named
from ._ops import clip_coef, norm, norms
from ._plan import Kind
from ._ranks import is_data_parallel, on_reduced_buckets
from ._reference import result_dtype


class NormAccumulator:
    r"""Measure each gradient when backward has made it, and clip by the norm of all afterwards.

    A gradient is read when it is in the cache anyway, and `clip_` only combines what was measured:
    $(\sum_i \lVert g_i \rVert_p^p)^{1/p}$, then scales as `clip_grad_norm_` does. Under
    `DistributedDataParallel` the averaged buckets are measured as they arrive. A gradient that was
    changed since, by in-place operations or a new object, is measured again. What leaves the
    version counter as it was is not seen: writing through `.data`, and `GradScaler.unscale_`
    (torch 2.13), after which call `forget`, or call `unscale_and_clip_` instead of both.

    Args:
        parameters: a module, also `DistributedDataParallel`, an optimizer, tensors, or several
            modules or optimizers. DTensors (FSDP2), whose gradients no such hook sees, are
            measured by `clip_`.
        norm_type: order p > 0 of the norm, or `'inf'`.

    Gradients that accumulate are measured after every backward, and the last one counts; inside
    `with norms.pause():` nothing is measured, which saves that for all micro-batches but the last.

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

    def __init__(self, parameters: Any, norm_type: float = 2.0) -> None:
        self.p = positive_order(norm_type)
        self._items = list({id(item): item for _, item in named(parameters)}.values())
        self._index = {id(item): i for i, item in enumerate(self._items)}
        # Norms of one gradient or a bucket of them, valid while all of those are as they were seen.
        self._parts: dict[Any, tuple[list[int], Tensor]] = {}
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._touched: set[int] = set()
        self._is_paused = False
        self._is_removed = False
        hook = self._measure
        if is_data_parallel(parameters):
            hook = self._touch
            on_reduced_buckets(parameters, self._measure_bucket, self._finish)
        leaves = [i for i in self._items if i.requires_grad and not is_dtensor(i)]
        self._hooks = [leaf.register_post_accumulate_grad_hook(hook) for leaf in leaves]

    @torch.no_grad()
    def clip_(self, max_norm: Threshold) -> Tensor:
        """Clip the gradients in place by the norm of all, as `clip_grad_norm_` does.

        Args:
            max_norm: a number, a 0-d tensor or a rule.

        Returns:
            The norm before clipping, 0-d: float32, float64 if any gradient is.

        Raises:
            TypeError, ValueError: bad input, named; gradients untouched.
        """
        max_norm = threshold(max_norm)
        parts, counted = [], set()
        for indices, part in self._parts.values():
            if all(map(self._is_as_seen, indices)):
                parts.append(part)
                counted.update(indices)
        rest = [item for i, item in enumerate(self._items) if i not in counted]
        if any(item.grad is not None or is_dtensor(item) for item in rest):
            parts.append(read(rest, kind=Kind.EACH).each_norms(self.p).double())
        grads = read(self._items)
        if not parts:
            return grads.norm(self.p)
        first = parts[0].device
        if any(part.device != first for part in parts):
            parts = [part.to(first) for part in parts]
        held = [item.grad for item in self._items if item.grad is not None]
        total_norm = norm(parts, self.p).to(result_dtype(held))
        grads.scale_(clip_coef(total_norm, resolved(max_norm, total_norm)))
        self.forget()
        return total_norm

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Measure nothing in here: for the micro-batches before the last."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def forget(self) -> None:
        """Drop what was measured: the next `clip_` measures all gradients."""
        self._parts, self._seen, self._touched = {}, {}, set()

    def remove(self) -> None:
        """Take the hooks away; that of `DistributedDataParallel`, for good, then only averages."""
        for hook in self._hooks:
            hook.remove()
        self._is_removed = True
        self.forget()

    def __enter__(self) -> "NormAccumulator":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _is_as_seen(self, i: int) -> bool:
        grad, version = self._seen.get(i, (None, 0))
        return grad is not None and self._items[i].grad is grad and grad._version == version

    @torch.no_grad()
    def _measure(self, parameter: Tensor) -> None:
        i = self._index[id(parameter)]
        if self._is_paused:
            self._parts.pop(i, None)
            return
        self._parts[i] = [i], read([parameter]).each_norms(self.p, False, True)
        self._seen[i] = parameter.grad, parameter.grad._version

    def _touch(self, parameter: Tensor) -> None:
        # Under `no_sync` too: the next buckets average what has accumulated.
        self._touched.add(self._index[id(parameter)])

    @torch.no_grad()
    def _measure_bucket(self, number: int, parameters: list[Tensor], bucket: Tensor) -> None:
        self._parts.pop(number, None)
        # A bucket of complex gradients holds their parts, and a sparse one is for `read`.
        plain = bucket.layout == torch.strided and not any(p.is_complex() for p in parameters)
        if plain and not (self._is_paused or self._is_removed):
            indices = [self._index[id(parameter)] for parameter in parameters]
            self._parts[number] = indices, norms([bucket], self.p, None, True)

    def _finish(self) -> None:
        """Backward is over: what it touched is now as its bucket was when that was measured."""
        if self._is_paused or self._is_removed:
            self._parts.clear()
        grads = {i: self._items[i].grad for i in self._touched}
        self._seen = {i: (g, g._version) for i, g in grads.items() if g is not None}
        self._touched.clear()
