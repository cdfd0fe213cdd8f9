"""How a `GradClipper` finds, reads, measures and scales the parameters of its groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._arguments import Source
from ._gradients import (
    Gradients,
    NamedParameters,
    SpreadGrads,
    aligned,
    found_in_groups,
    read,
    read_by,
)
from ._ranks import Kind, as_groups, is_spread
from ._state import Shared


class Grouped:
    """The parameters of a clipper's groups, and the plan by which they are measured.

    `asked` holds the process groups passed for each group. With `each` the norm of a group is
    computed from the norms of its gradients before clipping. These are kept in `each_norms`, one
    for each parameter. A copy looks its parameters up again.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        names: Sequence[str] | None,
        process_groups: Sequence[Any],
        p: float,
        each: bool,
    ) -> None:
        self.asked = [Shared(as_groups(some)) for some in process_groups]
        self.names, self.p, self.each = names, p, each
        self._sources = [NamedParameters(source) for source in sources]
        self._forget()
        self._find()

    def _forget(self) -> None:
        self.items: list[Tensor] = []
        self.group_of: list[int] = []
        self.each_norms: Tensor | None = None
        self._plan: Any = None

    @property
    def is_one(self) -> bool:
        return self.names is None

    @property
    def is_simple(self) -> bool:
        """Whether `clip_grad_norm_` of the items would do the same."""
        return self.is_one and not (self.each or self.asked[0])

    @property
    def is_over_ranks(self) -> bool:
        return self._is_spread or any(self.asked)

    def refresh(self) -> None:
        """Find the parameters again, if those of a module, an optimizer or a list have changed."""
        if not all(map(NamedParameters.is_unchanged, self._sources)):
            self._find()

    def _find(self) -> None:
        items, group_of, found = found_in_groups(self._sources, self.names)
        if group_of != self.group_of or list(map(id, items)) != list(map(id, self.items)):
            # The plan and the norms belong to the parameters and groups of before.
            self._forget()
        self.items, self.group_of, self.item_names = items, group_of, found
        self._is_spread = is_spread(items)

    def read(self, agree: bool) -> Gradients:
        kind = Kind.EACH if self.each else Kind.of_order(self.p)
        if self.is_simple:
            return read(self.items, kind=kind, agree=agree)
        grads: SpreadGrads = read_by(self._plan, self.items, self.asked, self.group_of, kind, agree)
        self._plan = grads.plan
        return grads

    def norms(self, grads: Gradients, scale: float | Tensor | None) -> Tensor:
        """Return the norm of each group times `scale`, 1-d, float64."""
        if self.each:
            each = grads.each_norms(self.p)
            self.each_norms = each if scale is None else each * scale
            counts = [self.group_of.count(group) for group in range(len(self.asked))]
            norms = _ops.norms(list(self.each_norms.split(counts)), self.p, None, True)
            # A flag is infinite or NaN if the norm of its group is so on another rank.
            if isinstance(grads, SpreadGrads) and len(grads.flags):
                norms = norms + grads.flags
            return norms
        norms = grads.norm(self.p).reshape(1) if self.is_one else grads.norms(self.p)
        return norms if scale is None else norms * scale

    def scale_(self, grads: Gradients, coefs: Tensor) -> None:
        """Multiply the gradients of each group by its coefficient."""
        if self.is_one:
            grads.scale_(coefs[0])
        elif self.each:
            of_group = coefs.unbind()
            each = [of_group[group] for group in self.group_of]
            grads.scale_each_(torch.stack(each) if each else coefs[:0])
        else:
            grads.scale_(coefs)

    def norms_by_item(self) -> Tensor:
        """Return the norm of each parameter's gradient; with `each`, that of the last step."""
        if not self.each:
            grads = read(self.items, kind=Kind.EACH)
            return aligned(grads.result(grads.each_norms(self.p)), self.items)
        if self.each_norms is None:
            raise ValueError("norms_by_parameter: no step measured these parameters; call clip_()")
        return self.each_norms

    def __getstate__(self) -> dict[str, Any]:
        sources = [NamedParameters(source.source) for source in self._sources]
        found: dict[str, Any] = {"items": [], "group_of": [], "each_norms": None, "_plan": None}
        return {**vars(self), "_sources": sources, **found}
