"""How a rank that cannot take part in a sum announces that to the ranks that wait for it.

It takes part in every collective, with NaN for its norms. Two numbers follow the norms and have
sums of their own; a rank that has not failed sends 0 for both. A rank whose host can read these
sums without a wait gets the reason from the job's store, and raises too.
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

# How many ranks failed, and the sum of their marks; a mark is a failed rank's key in the store.
NUMBERS = 2
# A failed rank stores its reason right after the last sum. Other ranks wait at most this long for
# the reason, then raise without it.
PATIENCE = datetime.timedelta(seconds=5)


class Failure:
    """The error because of which this rank cannot take part in sums."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        # With marks of 28 bits, their sums are exact in float64.
        self.mark = 1 + secrets.randbits(28)

    def parts(self, count: int, device: torch.device | None) -> Tensor:
        """Return what to send instead of norms: NaN for `count` parts, then the two numbers."""
        device = device or torch.device("cpu")
        parts = torch.full((count + NUMBERS,), math.nan, dtype=widest(device), device=device)
        parts[-NUMBERS], parts[-NUMBERS + 1] = 1, self.mark
        return parts

    def announce(self) -> None:
        """Store the reason for the other ranks, then raise the error; call this after the sums.

        If the store is gone, a wait for it before the sums would hold up all ranks.
        """
        with contextlib.suppress(Exception):
            text = f"{type(self.error).__name__}: {self.error} (on rank {dist.get_rank()})"
            _store().set(_key(self.mark), text)
        raise self.error


def raise_if_failed(numbers: Tensor) -> None:
    """Raise if `numbers` say that a rank failed; do nothing if the host cannot read them yet."""
    if not is_host_readable(numbers):
        return
    failures, marks = map(int, numbers.tolist())
    if not failures:
        return
    why = "see the error that it raised"
    # If one rank failed, the sums may count it k times; `marks` is then k times its mark. If
    # several ranks failed, their marks cannot be told apart.
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
