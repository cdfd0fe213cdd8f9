"""What there is once in a process, however often this package is imported or reloaded in it."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def once(name: str, make: Callable[[], T]) -> T:
    """What `make` returned when the first import asked for `name`."""
    # Notebooks and tests drop modules and import them anew; torch stays.
    kept: dict[str, T] = vars(torch.ops.fastclip).setdefault("_kept", {})
    if name not in kept:
        kept[name] = make()
    return kept[name]
