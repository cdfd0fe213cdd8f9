"""Gradients that are DTensors, read in a graph of `torch.compile`."""

from typing import Any

from torch import Tensor

from .. import _ranks
from .local import LocalGrads
from .look import check_supported
from .spread import SpreadGrads


def read_in_graph(items: list[Tensor], write: bool) -> Any:
    """Return `SpreadGrads`, or None if a graph cannot hold them or a check fails. The caller then
    reads them outside of the graph, where a failure can be announced to all ranks."""
    plan = _ranks.plan_of_graph(items, write)
    if plan is None:
        return None
    found: dict[int, tuple[Tensor, int]] = {}
    try:
        for i, (item, slot) in enumerate(zip(items, plan.reduction.slot_of, strict=True)):
            tensor = item.grad if write else item
            if tensor is not None:
                tensor = _ranks.local_in_graph(tensor.detach())
                check_supported(tensor, f"{'parameters' if write else 'tensors'}[{i}]", write)
                found.setdefault(id(item) if write else i, (tensor, slot))
    except (TypeError, RuntimeError):
        return None
    tensors, slots = [t for t, _ in found.values()], [slot for _, slot in found.values()]
    return SpreadGrads(LocalGrads(tensors, slots, []), plan, is_in_graph=True)
