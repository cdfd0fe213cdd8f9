"""Checks of what the public functions take: each once, with what it got and the way out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer

from ._ranks import value_of

Threshold = float | Tensor | Callable[[Tensor], float | Tensor]
NormType = float | Literal["inf"]
Nonfinite = Literal["propagate", "error", "zero", "skip"]
Source = nn.Module | Optimizer | Iterable[Any] | Tensor


class _Params(TypedDict):
    params: Source


class Group(_Params, total=False):
    """The type of one of the `groups` of a `GradClipper`, a dict."""

    max_norm: Threshold | None
    coef_of: str
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


def positive(name: str, value: float | Tensor) -> float | Tensor | None:
    """A factor, a number > 0 or a 0-d tensor; None for 1."""
    if isinstance(value, Tensor):
        return scalar(name, value)
    checked = number(name, value)
    if not 0 < checked < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return None if checked == 1 else checked


def order(norm_type: NormType) -> float:
    p = number("norm_type", norm_type)
    if p != p:
        raise ValueError("norm_type: expected a number or 'inf', got nan")
    return p


def positive_order(norm_type: NormType) -> float:
    p = order(norm_type)
    if not p > 0:
        raise ValueError(
            f"norm_type: expected an order > 0, in which infinities show, got {norm_type}"
        )
    return p


def scalar(name: str, value: Tensor) -> Tensor:
    value = value_of(value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(value.shape)}")
    return value.reshape(()) if value.dim() else value


def threshold(max_norm: Any) -> Any:
    """A number >= 0, a 0-d tensor, or a rule."""
    if isinstance(max_norm, type):
        raise TypeError(
            f"max_norm: expected a number, a 0-d tensor or a rule, got the class "
            f"{max_norm.__name__}; pass one that is made, as {max_norm.__name__}()"
        )
    return max_norm if callable(max_norm) else fixed_threshold(max_norm)


def fixed_threshold(max_norm: Any) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        return scalar("max_norm", max_norm)
    value = number("max_norm", max_norm)
    if not value >= 0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {max_norm}")
    return value


def policy(nonfinite: Nonfinite, error_if_nonfinite: bool = False) -> Nonfinite:
    if nonfinite not in ("propagate", "error", "zero", "skip"):
        raise ValueError(
            f"nonfinite: expected 'propagate', 'error', 'zero' or 'skip', got {nonfinite!r}"
        )
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(
            f"nonfinite: {nonfinite!r} and error_if_nonfinite=True are two answers; pass one"
        )
    return "error" if error_if_nonfinite else nonfinite


def checked_groups(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The groups that are measured, with names and thresholds."""
    found: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        if not isinstance(group, dict):
            raise TypeError(
                f"groups[{i}]: expected a dict such as "
                f'{{"params": module, "max_norm": 1.0}}, got {type(group).__name__}'
            )
        name = str(group.get("name", i))
        known_keys = {"params", "max_norm", "coef_of", "name", "process_group"}
        if unknown := set(group) - known_keys:
            raise ValueError(
                f"groups[{i}]: expected only {', '.join(sorted(known_keys))}, got {unknown}"
            )
        if "params" not in group or ("max_norm" in group) == ("coef_of" in group):
            raise ValueError(
                f"groups[{i}]: expected params and one of max_norm and coef_of, got {list(group)}"
            )
        if any(name == other["name"] for other in found):
            raise ValueError(f"groups[{i}]: a group before it is named {name!r} too")
        if group.get("max_norm", math.inf) is None:
            continue
        known = {**group, "name": name}
        if "coef_of" in group:
            known["coef_of"] = str(group["coef_of"])
        if "max_norm" in group:
            known["max_norm"] = threshold(group["max_norm"])
        found.append(known)
    own = [group["name"] for group in found if "max_norm" in group]
    for group in found:
        if group.get("coef_of", own[0] if own else None) not in own:
            raise ValueError(
                f"groups: {group['name']!r} has coef_of {group['coef_of']!r}, which is no group "
                f"with a max_norm; those are {own}"
            )
    return found
