"""How a rank that cannot take part in a sum tells the ranks that wait for it.

It sends all that it owes: NaN for what it would have measured, and after that two numbers, which
are 0 on every other rank and which no norm can swallow. Where the host of another rank can read
them, it looks for the reason in the store of the job, and raises too.
"""

import contextlib
import datetime
import math
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import is_host_readable, widest
from .._private import private

# How many ranks have failed, and the sum of the marks under which they leave their reasons.
NUMBERS = 2
# A reason is left right after the last sum. Who does not find it by then raises without it.
PATIENCE = datetime.timedelta(seconds=5)


class Failure:
    """Why this rank cannot take part."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        # Sums of them are exact in float64.
        self.mark = 1 + secrets.randbits(28)

    def parts(self, count: int, device: torch.device | None) -> Tensor:
        """What this rank sends instead of `count` parts, and the numbers."""
        device = device or torch.device("cpu")
        parts = torch.full((count + NUMBERS,), math.nan, dtype=widest(device), device=device)
        parts[-NUMBERS], parts[-NUMBERS + 1] = 1, self.mark
        return parts

    def announce(self) -> None:
        """Leave the reason for the others, and raise: after the sums.

        The store may be gone, and a rank that waits for it would have the others wait.
        """
        with contextlib.suppress(Exception):
            text = f"{type(self.error).__name__}: {self.error} (on rank {dist.get_rank()})"
            _store().set(_key(self.mark), text)
        raise self.error


def raise_if_failed(numbers: Tensor) -> None:
    """Raise what another rank has sent in its numbers, if the host can read them without a wait."""
    if not is_host_readable(numbers):
        return
    failures, marks = map(int, numbers.tolist())
    if not failures:
        return
    why = "its own error says why"
    # The one rank that failed is counted by all that heard of it. Of several no mark is known.
    mark, rest = divmod(marks, failures)
    with contextlib.suppress(Exception):
        if not rest:
            _store().wait([_key(mark)], PATIENCE)
            why = _store().get(_key(mark)).decode()
    raise RuntimeError(f"another rank could not take part, and nothing was changed: {why}")


def _key(mark: int) -> str:
    return f"fastclip/{mark}"


def _store() -> Any:
    return private("torch.distributed.distributed_c10d._get_default_store")()
