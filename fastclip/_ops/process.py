"""Objects that exist once in a process, however often this package is imported or reloaded."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def once(name: str, make: Callable[[], T]) -> T:
    """Return the result of `make()` from the first call for `name` in this process."""
    # Kept on a module of torch: notebooks and tests import this package again, but not torch.
    kept: dict[str, T] = vars(torch.ops.fastclip).setdefault("_kept", {})
    if name not in kept:
        kept[name] = make()
    return kept[name]
