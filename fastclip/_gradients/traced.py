"""Gradients that are DTensors, in a graph of `torch.compile`: local shards and all-reduces."""

from typing import Any

import torch
from torch import Tensor

from .. import _ranks
from .._ops import clip_coef, empty_norm, result_dtype, widest
from .._ranks import is_dtensor
from .local import LocalGrads
from .look import check_supported


class TracedGrads:
    """`Gradients` of one mesh, with the verbs that a graph holds.

    It sends what `SpreadGrads` sends, so that ranks may run compiled or not, each as it likes. In a
    graph nobody can be told that another rank failed: the norm is NaN.
    """

    def __init__(self, items: list[Tensor], write: bool, mesh: object, plan: Any) -> None:
        found: dict[int, tuple[Tensor, int]] = {}
        for i, (item, slot) in enumerate(zip(items, plan.slot_of, strict=True)):
            tensor = item.grad if write else item
            if tensor is not None:
                tensor = _ranks.local_in_graph(tensor.detach())
                check_supported(tensor, f"{'parameters' if write else 'tensors'}[{i}]", write)
                found.setdefault(id(item) if write else i, (tensor, slot))
        self.mesh, self.plan, self.device = mesh, plan, items[0].device
        self.is_replicated = all(map(is_dtensor, items))
        self.wide = result_dtype(items) == torch.float64
        self.tensors = list(found.values())

    def __len__(self) -> int:
        return len(self.tensors)

    def is_wide(self) -> bool:
        return self.wide

    def norm(self, p: float) -> Tensor:
        dtype, norms, plan = widest(self.device), [], self.plan
        none = torch.full((), empty_norm(p), dtype=dtype, device=self.device)
        for slot in range(plan.slots):
            some = [tensor for tensor, own in self.tensors if own == slot]
            norms.append(_local(some).norms(p)[0].to(none) if some else none)
        parts = torch.constant_pad_nd(_ranks.as_parts(torch.stack(norms), p), (0, plan.beside))
        for step in plan.steps:
            parts = _ranks.over_mesh(step, parts, abs(p), plan.beside, None)
        total, _ = _ranks.combined(parts, plan.members, plan.beside, abs(p))
        return _ranks.as_norm(total, p)[0]

    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        norms = norms.to(dtype or (torch.float64 if self.wide else torch.float32))
        return _ranks.replicated_in_graph(norms, self.mesh) if self.is_replicated else norms

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
    found = _ranks.cuts(items, write)
    if found is None:
        return None
    mesh, cuts = found
    plan = _ranks.constants(mesh, cuts)
    try:
        return plan and TracedGrads(items, write, mesh, plan)
    except (TypeError, RuntimeError):
        return None


def _local(tensors: list[Tensor]) -> LocalGrads:
    return LocalGrads(tensors, [0] * len(tensors), [])
