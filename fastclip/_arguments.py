"""Checks of the arguments of public functions; errors say what was passed and what to pass."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._ranks import value_of

Threshold = float | Tensor | Callable[[Tensor], float | Tensor]
NormType = float | Literal["inf"]
Nonfinite = Literal["propagate", "error", "zero", "keep"]
Source = nn.Module | Optimizer | Iterable[Any] | Tensor


class _Params(TypedDict):
    params: Source


class Group(_Params, total=False):
    """The type of each dict in the `groups` of a `GradClipper`."""

    max_norm: Threshold | None
    name: str
    process_group: Any


def number(name: str, value: float | str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def at_least_zero(name: str, value: float) -> float:
    if not (checked := number(name, value)) >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return checked


def thresholds(max_norm: Any, count: int) -> float | Tensor:
    """Return one threshold for all, or a 1-d tensor of `count` thresholds."""
    if not isinstance(max_norm, Tensor) or max_norm.numel() == 1:
        return fixed_threshold(max_norm)
    if max_norm.shape != (count,):
        raise ValueError(
            f"max_norm: expected one threshold, or a 1-d tensor of {count}, one for each of the "
            f"parameters, got shape {tuple(max_norm.shape)}"
        )
    return value_of(max_norm)


class Thresholds(Mapping[str, Any]):
    """The groups' thresholds by name; numbers that were set after construction are in `changed`."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self._own = dict(own)
        self.changed: dict[str, float] = {}

    def __getitem__(self, name: str) -> Any:
        return self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def __repr__(self) -> str:
        return repr(self._own)

    def __setitem__(self, name: str, max_norm: Threshold) -> None:
        if name not in self._own:
            raise ValueError(f"max_norm: no group is named {name!r}; they are {list(self._own)}")
        self._own[name] = checked = threshold(max_norm)
        self.changed.pop(name, None)
        if isinstance(checked, float):
            self.changed[name] = checked

    def __copy__(self) -> "Thresholds":
        twin = Thresholds(self._own)
        twin.changed = dict(self.changed)
        return twin


def factor(grad_scale: float | Tensor, p: float) -> float | Tensor | None:
    """Return a number > 0 or a 0-d tensor; None for the number 1."""
    if isinstance(grad_scale, Tensor):
        found: float | Tensor = scalar("grad_scale", grad_scale)
    elif not 0 < (found := number("grad_scale", grad_scale)) < math.inf:
        raise ValueError(f"grad_scale: expected a finite number > 0, got {grad_scale}")
    elif found == 1:
        return None
    if p == 0:
        raise ValueError(
            "norm_type: the norm of order 0 is a count and does not scale; leave grad_scale at 1"
        )
    return found


def order(norm_type: NormType) -> float:
    p = number("norm_type", norm_type)
    if p != p:
        raise ValueError("norm_type: expected a number or 'inf', got nan")
    return p


def positive_order(norm_type: NormType) -> float:
    p = order(norm_type)
    if not p > 0:
        raise ValueError(
            f"norm_type: expected an order > 0 (others hide infinite gradients), got {norm_type}"
        )
    return p


def scalar(name: str, value: Tensor) -> Tensor:
    value = value_of(value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(value.shape)}")
    return value.reshape(()) if value.dim() else value


def threshold(max_norm: Any) -> Any:
    """Return a number >= 0, a 0-d tensor, or a rule."""
    if isinstance(max_norm, type):
        raise TypeError(
            f"max_norm: expected a number, a 0-d tensor or a rule, got the class "
            f"{max_norm.__name__}; pass an instance, such as {max_norm.__name__}()"
        )
    return max_norm if callable(max_norm) else fixed_threshold(max_norm)


def fixed_threshold(max_norm: Any) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        return scalar("max_norm", max_norm)
    value = number("max_norm", max_norm)
    if not value >= 0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {max_norm}")
    return value


def threshold_from_rule(limit: Any) -> float | Tensor:
    """Check what a rule has returned: a threshold, or NaN (as a tensor) to drop the step."""
    if not isinstance(limit, Tensor) and math.isnan(number("max_norm", limit)):
        return torch.tensor(math.nan, dtype=torch.float64, device="cpu")
    return fixed_threshold(limit)


def policy(nonfinite: Nonfinite, error_if_nonfinite: bool = False) -> Nonfinite:
    if str(nonfinite) == "skip":
        raise ValueError(
            "nonfinite: a clip cannot skip the step; pass 'keep', which leaves the gradients as "
            "they are, and skip the step in the training loop if the norm is not finite"
        )
    if nonfinite not in ("propagate", "error", "zero", "keep"):
        raise ValueError(
            f"nonfinite: expected 'propagate', 'error', 'zero' or 'keep', got {nonfinite!r}"
        )
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(
            f"nonfinite: {nonfinite!r} and error_if_nonfinite=True contradict each other; pass one"
        )
    return "error" if error_if_nonfinite else nonfinite


def checked_groups(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the groups whose `max_norm` is not None, with checked names and thresholds."""
    found: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        if not isinstance(group, dict):
            raise TypeError(
                f"groups[{i}]: expected a dict such as "
                f'{{"params": module, "max_norm": 1.0}}, got {type(group).__name__}'
            )
        name = str(group.get("name", i))
        known = {"params", "max_norm", "name", "process_group"}
        if unknown := set(group) - known:
            raise ValueError(
                f"groups[{i}]: expected only {', '.join(sorted(known))}, got {unknown}"
            )
        if "params" not in group or "max_norm" not in group:
            raise ValueError(f"groups[{i}]: expected params and max_norm, got {list(group)}")
        if any(name == other["name"] for other in found):
            raise ValueError(f"groups[{i}]: an earlier group is named {name!r} too")
        if group["max_norm"] is not None:
            found.append({**group, "name": name, "max_norm": threshold(group["max_norm"])})
    return found
