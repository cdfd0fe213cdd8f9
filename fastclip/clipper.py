"""`GradClipper`: a clip that is configured once, with groups, a nonfinite policy, statistics."""

import copy
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ._agreement import check_agreement
from ._arguments import (
    Group,
    Nonfinite,
    NormType,
    Source,
    Threshold,
    Thresholds,
    checked_groups,
    factor,
    order,
    policy,
    positive_order,
)
from ._decide import decide, limits_of, raise_if_nonfinite
from ._gradients import clip_at_once_
from ._grouped import Grouped
from ._history import History, Ring, draw, histories, last_of, stats_of
from ._ops import refuse_transforms
from ._ranks import value_of


class GradClipper:
    """Clip the gradients of a model by their global norm, or by groups, at every step.

    The gradients of each group are multiplied by min(1, max_norm / (norm + 1e-6)) with the group's
    own norm, all groups in one pass. Parameters are looked up once, and again when those of a
    module, an optimizer or a list have changed. Waits for the device only if `nonfinite="error"`.

    Args:
        parameters: a module, an optimizer, tensors, (name, tensor) pairs, or several modules or
            optimizers. They are named as in the module, or in the optimizer if it has names.
        max_norm: a number, a 0-d tensor or a rule, as in `clip_grad_norm_`.
        norm_type: order p of the norms, any number or `'inf'`.
        nonfinite: what happens to a group whose norm is infinite or NaN, as in `clip_grad_norm_`.
        groups: instead of `parameters` and `max_norm`, dicts with `"params"`, `"max_norm"` (None to
            leave the group out) and optionally `"process_group"` and `"name"` (else its index).
        process_group: ranks that hold other parameters, as in `clip_grad_norm_`.
        each: measure each gradient by itself, and groups by these norms, which
            `norms_by_parameter` then returns; norm_type > 0, and no `process_group`.
        history: number of recorded steps, >= 1; by default 8192, or fewer to fit into 16 MiB.

    `clipper.max_norm` is the threshold, and may be changed between steps; with groups it maps names
    to thresholds: `clipper.max_norm["head"] = 0.5`. With DTensors or process groups, the first
    `clip_` (also of a copy, and after a state was loaded) waits for the device: it checks that all
    ranks have the same names, thresholds, rules, step counts of rules, and versions. After that,
    `torch.compile` traces `clip_` without a graph break, except with groups or a `process_group`.

    Call `clip_` once before a CUDA graph captures it: the first call makes tensors. A copy, also
    by `pickle`, continues from the same state; copied with a module it clips the copied one.

    Raises:
        TypeError, ValueError: bad arguments, which the message names; a parameter in two groups.

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
        *,
        nonfinite: Nonfinite = "propagate",
        groups: Sequence[Group] | None = None,
        process_group: Any = None,
        each: bool = False,
        history: int | None = None,
    ) -> None:
        if {parameters is not None, max_norm is not None} != {groups is None}:
            raise TypeError("parameters, groups: expected parameters and max_norm, or groups alone")
        if not (history is None or (isinstance(history, int) and history >= 1)):
            raise ValueError(f"history: expected a whole number >= 1, got {history!r}")
        p = positive_order(norm_type) if each else order(norm_type)
        self._nonfinite = policy(nonfinite)
        one = {"params": parameters, "max_norm": max_norm, "name": "total"}
        known = checked_groups([one] if groups is None else groups)
        self._thresholds = Thresholds({group["name"]: group["max_norm"] for group in known})
        names = None if groups is None else self.names
        asked = [group.get("process_group", process_group) for group in known]
        if each and any(some is not None for some in asked):
            raise ValueError("each: measures the parameters of this rank; leave out process_group")
        self._grouped = Grouped([group["params"] for group in known], names, asked, p, each)
        self._is_compared = False
        self._ring = Ring(len(known), history)

    def __setattr__(self, name: str, value: object) -> None:
        # A misspelt name would otherwise have no effect. Subclasses may have other attributes.
        if type(self) is GradClipper and name[0] != "_" and not hasattr(GradClipper, name):
            raise AttributeError(f"{name}: a GradClipper has no such attribute; it has max_norm")
        super().__setattr__(name, value)

    @property
    def names(self) -> list[str]:
        """The names of the groups, in order."""
        return list(self._thresholds)

    @property
    def max_norm(self) -> Any:
        """The threshold; with groups a mapping from names to thresholds."""
        return self._thresholds["total"] if self._grouped.is_one else self._thresholds

    @max_norm.setter
    def max_norm(self, value: Threshold | Mapping[str, Threshold]) -> None:
        given: Any = {"total": value} if self._grouped.is_one else value
        if not isinstance(given, Mapping):
            raise TypeError(f"max_norm: expected a dict with keys from {self.names}, got {value!r}")
        for name, one in given.items():
            self._thresholds[name] = one

    def clip_(self, *, grad_scale: float | Tensor = 1.0) -> Tensor:
        """Clip the gradients in place.

        Args:
            grad_scale: factor > 0, applied before the norm, as in `clip_grad_norm_`.

        Returns:
            The norm before clipping as `clip_grad_norm_` returns it; with groups their norms, 1-d.

        Raises:
            RuntimeError: a norm is not finite, on any rank, and `nonfinite` is `"error"`.
            ValueError: arguments or states differ between ranks; raised on all ranks.
            TypeError: a gradient cannot be clipped; all gradients are untouched.
        """
        refuse_transforms("GradClipper")
        grouped, nonfinite = self._grouped, self._nonfinite
        grouped.refresh()
        scale = factor(grad_scale, grouped.p)
        if scale is None and grouped.is_simple and nonfinite == "propagate":
            limit = self._thresholds["total"]
            total_norm = clip_at_once_(grouped.items, limit, grouped.p)
            if total_norm is not None:
                self._ring.add(total_norm, limit)
                return total_norm
        agree = nonfinite != "propagate"
        if grouped.is_over_ranks and not self._is_compared:
            how = list(self._thresholds.values()), grouped.p, nonfinite
            check_agreement(lambda: grouped.read(agree), self.names, *how)
            self._is_compared = True
        grads = grouped.read(agree)
        norms = grouped.norms(grads, scale)
        if nonfinite == "error":
            raise_if_nonfinite(norms, grouped.p)
        limits = limits_of(self._thresholds.values(), norms)
        grouped.scale_(grads, decide(norms, limits, grads.is_wide(), nonfinite, scale))
        total_norm = grads.result(norms[0] if grouped.is_one else norms)
        self._ring.add(value_of(total_norm), limits)
        return total_norm

    def norms_by_parameter(self) -> dict[str, float]:
        """Return the norm of each parameter's gradient by the parameter's name; call on all ranks.

        The norms are of order `norm_type`, and 0 without a gradient. A DTensor's norm is that of
        the full gradient, computed by a collective. With `each` nothing is read: the norms are
        those that the last `clip_` measured before it clipped, and a rank may call this alone.
        Waits for the device.

        Raises:
            ValueError: with `each`, `clip_` was not called yet, or not with these parameters.
        """
        self._grouped.refresh()
        norms = self._grouped.norms_by_item().tolist()
        return dict(zip(self._grouped.item_names, norms, strict=True))

    def stats(self, last: int | None = None) -> dict[str, Any]:
        """Return statistics of the recorded steps; waits for the device and copies the record.

        Args:
            last: use only this number of the latest steps, >= 1, to leave out a warm-up.

        Returns:
            `steps` counts all steps so far. The rest is of the recorded ones: the counts `clipped`
            (the coefficient was below 1), `dropped` (a rule returned NaN) and `nonfinite`; the
            lists `total_norm` and `coef`; and the `percentiles` of the finite norms, where `"p50"`
            is the median. With groups, one such dict for each, by name.
        """
        if not (last is None or (isinstance(last, int) and last >= 1)):
            raise ValueError(f"last: expected a whole number >= 1, got {last!r}")
        steps, rows = self._ring.read(last)
        found = {h.name: stats_of(steps, h) for h in self._histories(rows)}
        return found["total"] if self._grouped.is_one else found

    def last(self) -> dict[str, Any]:
        """Return the numbers of the last step, for a logger.

        They are `total_norm`, `max_norm`, `coef` and whether it was `dropped`; with groups, one
        such dict for each, by name. Waits for the device, and fetches one step only.

        Raises:
            ValueError: no step was recorded.
        """
        found = {h.name: last_of(h) for h in self._histories(self._ring.read_last())}
        return found["total"] if self._grouped.is_one else found

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the recorded norms and thresholds into a file, with the clipped steps marked.

        Raises:
            ImportError: no matplotlib.
            ValueError: no step was recorded.
        """
        steps, rows = self._ring.read()
        draw(steps, self._histories(rows), path)

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded steps, the state of each group's rule, and the numbers to which
        `max_norm` was set since the clipper was made; waits for the device.

        The tensors are on the CPU. Their names and shapes follow from the constructor's arguments,
        so that `torch.distributed.checkpoint` can restore them into any clipper made with the same.
        """
        rules = {name: rule.state_dict() for name, rule in self._stateful().items()}
        numbers = [self._thresholds.changed.get(name, math.nan) for name in self.names]
        changed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return {"rules": rules, "log": self._ring.state_dict(), "max_norm": changed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the `state_dict()` of a clipper made with the same arguments; call on all ranks.

        Raises:
            ValueError: the saved clipper had other groups, rules or `history`.
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
        for name, number in zip(self.names, state["max_norm"].tolist(), strict=True):
            if number == number:
                self._thresholds[name] = number
        self._is_compared = False

    def __getstate__(self) -> dict[str, Any]:
        twins = {name: copy.copy(getattr(self, name)) for name in ("_grouped", "_thresholds")}
        return {**vars(self), **twins, "_is_compared": False}

    def _stateful(self) -> dict[str, Any]:
        rules = self._thresholds.items()
        return {name: rule for name, rule in rules if hasattr(rule, "load_state_dict")}

    def _histories(self, rows: Tensor) -> list[History]:
        return histories(rows, self.names, self._nonfinite)
