"""A clip that is prepared once: groups with their own norms, a policy, and numbers to look at."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ._agreement import check_agreement
from ._arguments import Group, Nonfinite, NormType, Source, Threshold, checked_groups, order, policy
from ._decide import decide, raise_if_nonfinite, resolved, spared
from ._gradients import (
    Gradients,
    NamedParameters,
    aligned,
    clipped_at_once,
    found_in_groups,
    read,
    read_by,
)
from ._history import History, Ring, draw, histories, last_of, stats_of
from ._ops import widest
from ._ranks import Kind, as_groups, is_spread, value_of
from ._state import Shared


class GradClipper:
    """Clip the gradients of a model by their global norm, or by groups, at every step.

    Each group's gradients are multiplied by min(1, max_norm / (norm + 1e-6)) of its own norm, all
    groups in one pass. Parameters are looked up once, and again when a module, an optimizer or a
    list holds others. No wait for the device, unless `nonfinite` is `"error"`.

    Args:
        parameters: a module, an optimizer, tensors, (name, tensor) pairs, or several modules or
            optimizers. Names are those of the module, or of the optimizer if it was given any.
        max_norm: a number, a 0-d tensor or a rule, as in `clip_grad_norm_`; `inf` only measures.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: what an infinite or NaN norm does to its group, as in `clip_grad_norm_`.
        groups: instead of the first two, dicts with `"params"`, as `parameters`; `"max_norm"`, None
            to leave the group out; or instead `"coef_of"`, the name of the group by whose
            coefficient to scale it; a `"process_group"` of its own; a `"name"`, else its number.
        process_group: ranks that hold other parameters, as in `clip_grad_norm_`.

    Over ranks the first `clip_`, also of a copy and after a state was loaded, compares names,
    numbers, rules and how many norms they have seen, and versions, and waits for the device.
    `torch.compile` takes `clip_` whole after that, but for groups and `process_group`.

    Call `clip_` once before a CUDA graph captures it: that call makes the tensors. A copy, also by
    `pickle`, goes on from the same state; that of a module which holds its clipper clips the copy.

    Raises:
        TypeError, ValueError: bad arguments, named; a parameter in two groups.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> clipper = GradClipper([w], max_norm=1.0)
    >>> clipper.clip_(), clipper.stats()["clipped"]
    (tensor(5.), 1)
    """

    def __init__(
        self,
        parameters: Source | None = None,
        max_norm: Threshold | None = None,
        norm_type: NormType = 2.0,
        nonfinite: Nonfinite = "propagate",
        *,
        groups: Sequence[Group] | None = None,
        process_group: Any = None,
    ) -> None:
        if {parameters is not None, max_norm is not None} != {groups is None}:
            raise TypeError("parameters, groups: expected parameters and max_norm, or groups alone")
        self.p, self.nonfinite = order(norm_type), policy(nonfinite)
        self.is_one = groups is None
        one = {"params": parameters, "max_norm": max_norm, "name": "total"}
        groups = checked_groups([one] if groups is None else groups)
        self.names = [group["name"] for group in groups]
        own = [group.get("process_group", process_group) for group in groups]
        self.asked = [Shared(as_groups(some)) for some in own]
        self.thresholds = [group.get("max_norm", math.inf) for group in groups]
        self.leaders = [self.names.index(group.get("coef_of", group["name"])) for group in groups]
        self._has_followers = self.leaders != list(range(len(groups)))
        self._is_fixed = all(isinstance(t, float) for t in self.thresholds)
        self._fixed: dict[torch.device, Tensor] = {}
        self._sources = [NamedParameters(group["params"]) for group in groups]
        self._items: list[Tensor] = []
        self._labels: list[int] = []
        self._plan: Any = None
        self._is_compared = False
        self._ring = Ring(len(groups) * (1 if self._is_fixed else 2))
        self._find()

    def clip_(self) -> Tensor:
        """Clip the gradients in place.

        Returns:
            The norm before clipping as `clip_grad_norm_` returns it; of groups one for each, 1-d.

        Raises:
            RuntimeError: a norm is not finite, on any rank, and `nonfinite` is `"error"`.
            ValueError: ranks were made otherwise, or did not load the same state; on all ranks.
            TypeError: a gradient that cannot be clipped; gradients untouched.
        """
        self._look_again()
        if self.is_one and self.nonfinite == "propagate" and not callable(self.thresholds[0]):
            given = self.thresholds[0], self.p
            # Of a threshold on the device a row holds more than the norm.
            at_once = self._is_fixed and not self.asked[0]
            how = *given, self._ring, self._is_compared
            total_norm = clipped_at_once(self._items, *how) if at_once else None
            if total_norm is None:
                total_norm = self._read().clip_norm_(*given)
                self._record(value_of(total_norm))
            return total_norm
        grads = self._read()
        norms = grads.norm(self.p).reshape(1) if self.is_one else grads.norms(self.p)
        if self.nonfinite == "error":
            raise_if_nonfinite(norms, self.p)
        limits = self._limits(norms)
        coefs = decide(norms, limits, grads.is_wide(), self.nonfinite)
        if self._has_followers:
            each = coefs.unbind()
            coefs = torch.stack([each[leader] for leader in self.leaders])
            coefs = spared(coefs, norms, self.nonfinite)
        grads.scale_(coefs[0] if self.is_one else coefs)
        total_norm = grads.result(norms[0] if self.is_one else norms)
        self._record(value_of(total_norm), limits)
        return total_norm

    def norms_by_parameter(self) -> dict[str, float]:
        """Call this on all ranks: return the norm of each parameter's gradient by its name.

        Of order `norm_type`, 0 without a gradient. A DTensor's norm is that of the full gradient,
        for which each rank waits for the others. Gradients are only read. Waits for the device.
        """
        self._look_again()
        grads = read(self._items, kind=Kind.EACH)
        norms = aligned(grads.result(grads.each_norms(self.p)), self._items)
        return dict(zip(self._item_names, norms.tolist(), strict=True))

    def stats(self) -> dict[str, Any]:
        """Return numbers of the steps so far; waits for the device, and copies what was recorded.

        Returns:
            `steps`, how many there were; of the last of them the counts `clipped` (the coefficient
            was below 1) and `nonfinite`, the lists `total_norm` and `coef`, and the `percentiles`
            of the finite norms, `"p50"` the median. Of groups one such dict each, by name.

        The last 131 072 steps, or as many as 16 MiB hold at 8 bytes for each group and, if any
        threshold is not a number, 8 more: 1 048 steps of 2 000 groups.
        """
        steps, rows = self._ring.read()
        found = {h.name: stats_of(steps, h.norms, h.coefs) for h in self._histories(rows)}
        return found["total"] if self.is_one else found

    def last(self) -> dict[str, Any]:
        """Return `total_norm`, `max_norm` and `coef` of the last step, as numbers for a logger.

        Of groups one such dict each, by name. Waits for the device, and fetches one step only.

        Raises:
            ValueError: no step was recorded.
        """
        found = {h.name: last_of(h) for h in self._histories(self._ring.read_last())}
        return found["total"] if self.is_one else found

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the norms of the recorded steps, the threshold and what was clipped, into a file.

        Raises:
            ImportError: no matplotlib.
            ValueError: no step was recorded.
        """
        steps, rows = self._ring.read()
        draw(steps, self._histories(rows), path)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, and the states of rules by their group; waits for the device.

        Tensors on the CPU, whose names and shapes follow from the arguments alone, so that
        `torch.distributed.checkpoint` restores them into any clipper made with the same.
        """
        rules = {name: rule.state_dict() for name, rule in self._stateful().items()}
        return {"rules": rules, "log": self._ring.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a clipper with the same arguments returned, on all ranks.

        Raises:
            ValueError: the rules of other groups or with other arguments, or other numbers a step.
        """
        own = self._stateful()
        if own.keys() != state["rules"].keys():
            raise ValueError(
                f"state: expected rules of {list(own)}, got rules of {list(state['rules'])}; make "
                "the clipper with the arguments the saved one had"
            )
        self._ring.load_state_dict(state["log"])
        for name, rule in own.items():
            rule.load_state_dict(state["rules"][name])
        self._is_compared = False

    def __getstate__(self) -> dict[str, Any]:
        """All but what the next step finds again, and which no other clipper could use."""
        sources = [NamedParameters(source.source) for source in self._sources]
        found: dict[str, Any] = {"_fixed": {}, "_items": [], "_labels": [], "_plan": None}
        return {**vars(self), "_sources": sources, "_is_compared": False, **found}

    def _stateful(self) -> dict[str, Any]:
        rules = zip(self.names, self.thresholds, strict=True)
        return {name: rule for name, rule in rules if hasattr(rule, "load_state_dict")}

    def _look_again(self) -> None:
        if not all(map(NamedParameters.is_unchanged, self._sources)):
            self._find()

    def _find(self) -> None:
        items, labels, names = found_in_groups(self._sources, None if self.is_one else self.names)
        same = labels == self._labels and list(map(id, items)) == list(map(id, self._items))
        # A plan is for these items in these groups.
        self._plan = self._plan if same else None
        self._items, self._labels, self._item_names = items, labels, names
        self._is_spread = is_spread(items)

    def _read(self, is_first: bool = False) -> Gradients:
        if not (self._is_compared or is_first) and (self._is_spread or any(self.asked)):
            given = self.names, self.thresholds, self.p, self.nonfinite
            check_agreement(lambda: self._read(is_first=True), *given)
            self._is_compared = True
        agree = self.nonfinite != "propagate"
        if self.is_one and not self.asked[0]:
            return read(self._items, kind=Kind.of_order(self.p), agree=agree)
        grads = read_by(self._plan, self._items, self.asked, self._labels, self.p, agree)
        self._plan = grads.plan
        return grads

    def _limits(self, norms: Tensor) -> Tensor:
        """The thresholds, one for each norm, float64 as those."""
        if self._is_fixed:
            if norms.device not in self._fixed:
                self._fixed[norms.device] = norms.new_tensor(self.thresholds)
            return self._fixed[norms.device]
        each = map(resolved, self.thresholds, norms.unbind())
        return torch.stack(
            [t.to(norms) if isinstance(t, Tensor) else norms.new_full((), t) for t in each]
        )

    def _record(self, norms: Tensor, limits: Tensor | None = None) -> None:
        if not self._is_fixed:
            norms = norms.reshape(-1).to(widest(norms.device))
            norms = torch.cat((norms, self._limits(norms) if limits is None else limits))
        self._ring.add(norms)

    def _histories(self, rows: Tensor) -> list[History]:
        fixed = self.thresholds if self._is_fixed else None
        return histories(rows, self.names, fixed, self.leaders, self.nonfinite)
