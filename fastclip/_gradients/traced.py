"""Gradients that are DTensors, in a graph of `torch.compile`: local shards and all-reduces."""

from typing import Any

import torch
from torch import Tensor

from .._ops import clip_coef, empty_norm, result_dtype, widest
from .._ranks import cuts, is_dtensor, joined, local_in_graph, replicated_in_graph
from .local import LocalGrads
from .look import check_supported


class TracedGrads:
    """`Gradients` of one mesh, with the verbs that a graph holds."""

    def __init__(
        self, items: list[Tensor], write: bool, mesh: object, dims: list[tuple[int, ...]]
    ) -> None:
        found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        # Every rank takes part in all sums that it owes, with a gradient or without one.
        self.cut = dict.fromkeys(dims)
        for i, (item, cut) in enumerate(zip(items, dims, strict=True)):
            tensor = item.grad if write else item
            if tensor is not None:
                tensor = local_in_graph(tensor.detach())
                check_supported(tensor, f"{'parameters' if write else 'tensors'}[{i}]", write)
                found.setdefault(id(item) if write else i, (tensor, cut))
        self.mesh, self.device = mesh, items[0].device
        self.is_replicated = all(map(is_dtensor, items))
        self.wide = result_dtype(items) == torch.float64
        self.tensors = list(found.values())

    def __len__(self) -> int:
        return len(self.tensors)

    def is_wide(self) -> bool:
        return self.wide

    def norm(self, p: float) -> Tensor:
        dtype, norms = widest(self.device), {}
        none = torch.full((), empty_norm(p), dtype=dtype, device=self.device)
        for cut in self.cut:
            some = [tensor for tensor, own in self.tensors if own == cut]
            norms[cut] = _local(some).norms(p)[0].to(none) if some else none
        return joined(norms, p, self.mesh)

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        norms = norms.to(dtype or (torch.float64 if self.wide else torch.float32))
        return replicated_in_graph(norms, self.mesh) if self.is_replicated else norms

    def scale_(self, coef: Tensor) -> None:
        _local([tensor for tensor, _ in self.tensors]).scale_(coef)

    def clamp_(self, bound: float) -> None:
        _local([tensor for tensor, _ in self.tensors]).clamp_(bound)

    def clip_norm_(self, max_norm: float | Tensor, p: float, norm: Tensor | None = None) -> Tensor:
        total_norm = self.norm(p) if norm is None else norm
        self.scale_(clip_coef(total_norm, max_norm, self.wide))
        return self.result(total_norm)


def traced(items: list[Tensor], write: bool) -> Any:
    """None if a graph cannot hold them, or if one is such that all ranks are to be told."""
    found = cuts(items, write)
    try:
        return found and TracedGrads(items, write, *found)
    except (TypeError, RuntimeError):
        return None


def _local(tensors: list[Tensor]) -> LocalGrads:
    return LocalGrads(tensors, [0] * len(tensors), [])
