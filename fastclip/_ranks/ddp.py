"""A hook on the buckets in which `DistributedDataParallel` averages gradients during backward."""

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
    """Return whether this is a DDP module whose C++ reducer averages in buckets."""
    kind = torch.nn.parallel.DistributedDataParallel
    return isinstance(module, kind) and not attribute(module, "_use_python_reducer")


def on_reduced_buckets(
    module: Any,
    measure: Callable[[int, list[Tensor], Tensor], None],
    finish: Callable[[], None],
    forget: Callable[[], None],
) -> None:
    """Register a hook that averages as `DistributedDataParallel` does, and calls these functions.

    `measure(number, parameters, bucket)` is called for each averaged bucket, and `finish()` at the
    end of backward, when every `.grad` is set. `forget()` is called instead if this rank has run
    out of batches (`module.join()`) and only takes part in the averages of the others.

    Raises:
        ValueError: the module already has a communication hook, and cannot have two.
    """
    # Not passed as the hook's state: a module that keeps a process group there cannot be copied.
    group = module.process_group

    # register_comm_hook checks these annotations.
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
            # Queued twice: `finish` must follow the callback that the module queues later.
            _queue(lambda: _queue(finish))
        count = _divisor(module, group, has_joined)
        # Bit for bit what the module computes without a hook.
        buffer = bucket.buffer()
        buffer = buffer.div_(count) if buffer.is_sparse else buffer.mul_(1 / count)
        future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
        averaged: torch.futures.Future[Tensor] = future.then(measured)
        return averaged

    try:
        module.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise ValueError(
            "parameters: this DistributedDataParallel has a communication hook already; torch "
            f"allows only one; clip with clip_grad_norm_ ({error})"
        ) from error


def _divisor(module: Any, group: Any, has_joined: bool) -> int:
    """Return the number of ranks by which a `DistributedDataParallel` divides.

    In `module.join()` the module may divide by the number of ranks that still have batches. A hook
    cannot read the module's count of these ranks, so this counts them in a second collective.
    """
    join = attribute(module, "_join_config")
    may_ask = join.enable and join.is_first_joinable
    if not may_ask or attribute(module, "_divide_by_initial_world_size"):
        return int(group.size())
    device = device_of(group)
    mine = torch.tensor([not has_joined], dtype=torch.float64, device=device)
    return int(all_reduce(Step(group, device, [0]), mine, "SUM"))
