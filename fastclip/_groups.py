"""Groups of parameters, as a clipper is told of them."""

import math
from collections.abc import Sequence
from typing import Any

from ._arguments import threshold


def checked(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups that are measured, with names and thresholds."""
    found: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
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
