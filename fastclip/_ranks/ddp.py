"""`DistributedDataParallel`: the buckets in which it averages gradients, while backward runs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._private import attribute, private
from .groups import Step, all_reduce, device_of

_queue = private("torch.autograd.Variable._execution_engine.queue_callback")
_task_id = private("torch._C._current_graph_task_id")


def is_data_parallel(module: object) -> bool:
    """Whether it averages in buckets, as all do but for the reducer in Python that is compiled."""
    kind = torch.nn.parallel.DistributedDataParallel
    return isinstance(module, kind) and not attribute(module, "_use_python_reducer")


def on_reduced_buckets(
    module: Any,
    measure: Callable[[int, list[Tensor], Tensor], None],
    finish: Callable[[], None],
    forget: Callable[[], None],
) -> None:
    """Have a `DistributedDataParallel` average as it does, and call these.

    `measure(number, parameters, bucket)` is called for each averaged bucket, and `finish()` at the
    end of backward, when the gradients are in their places; `forget()` where a rank that has run
    out of batches only takes part in the averages of the others.

    Raises:
        ValueError: it has a communication hook, and cannot have two.
    """
    # The module keeps the first argument of its hook, and could not be copied with a group there.
    group = module.process_group

    # torch looks at these annotations.
    def hook(
        _: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        number, parameters = bucket.index(), bucket.parameters()
        has_joined = _task_id() == -1

        def measured(done: Any) -> Tensor:
            average: Tensor
            (average,) = done.value()
            if not has_joined:
                measure(number, parameters, average)
            return average

        if has_joined:
            forget()
        elif bucket.is_last():
            # After what the module itself has queued, which is later than this.
            _queue(lambda: _queue(finish))
        count = _sharers(module, group, has_joined)
        # To the bit what the module does without a hook.
        buffer = bucket.buffer()
        buffer = buffer.div_(count) if buffer.is_sparse else buffer.mul_(1 / count)
        future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
        averaged: torch.futures.Future[Tensor] = future.then(measured)
        return averaged

    try:
        module.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise ValueError(
            "parameters: this DistributedDataParallel has a communication hook already, and takes "
            f"no other; clip with clip_grad_norm_ ({error})"
        ) from error


def _sharers(module: Any, group: Any, has_joined: bool) -> int:
    """The number of ranks by which a `DistributedDataParallel` divides.

    If it is asked to, it divides by that of the ranks that still have batches. It finds that out by
    a collective of its own, whose result no hook sees.
    """
    join = attribute(module, "_join_config")
    may_ask = join.enable and join.is_first_joinable
    if not may_ask or attribute(module, "_divide_by_initial_world_size"):
        return int(group.size())
    device = device_of(group)
    mine = torch.tensor([not has_joined], dtype=torch.float64, device=device)
    return int(all_reduce(Step(group, device, [0]), mine, "SUM"))
