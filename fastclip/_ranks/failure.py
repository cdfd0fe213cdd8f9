"""How a rank that cannot take part in a sum tells the ranks that wait for it.

It sends all that it owes: NaN for what it would have measured, and after that two numbers, which
are 0 on every other rank and which no norm can swallow. What is sent alone is a NaN with a mark in
its low bits, which survives additions on a CPU. Where the host of another rank can read that, it
looks for the reason in the store of the job, and raises too.
"""

import contextlib
import datetime
import math
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import is_known, widest
from .._private import private

# How many ranks have failed, and the sum of the marks under which they leave their reasons.
NUMBERS = 2
# The bits of a NaN, and those of a mark, which no NaN has that was a float32.
_NAN, _MARKS = 0x7FF8 << 48, 2**29 - 1
# A reason is left right after the last sum. Who does not find it by then raises without it.
PATIENCE = datetime.timedelta(seconds=5)


class Failure:
    """Why this rank cannot take part."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        # Sums of them are exact in float64.
        self.mark = 1 + secrets.randbits(28)

    def parts(self, count: int, device: torch.device | None) -> Tensor:
        """What is sent for `count` parts, and the numbers."""
        device = device or torch.device("cpu")
        parts = torch.full((count + NUMBERS,), math.nan, dtype=widest(device), device=device)
        parts[-NUMBERS], parts[-NUMBERS + 1] = 1, self.mark
        return parts

    def raise_(self) -> None:
        """Leave the reason for the others, and raise: after the sums.

        The store may be gone, and a rank that waits for it would have the others wait.
        """
        with contextlib.suppress(Exception):
            text = f"{type(self.error).__name__}: {self.error} (on rank {dist.get_rank()})"
            _store().set(_key(self.mark), text)
        raise self.error


def raise_if_failed(numbers: Tensor) -> None:
    """Raise what another rank has sent in its numbers, if the host can read them without a wait."""
    if not is_known(numbers):
        return
    failures, marks = map(int, numbers.tolist())
    if failures:
        # The one rank that failed is counted by all that heard of it. Of several no mark is known.
        mark, rest = divmod(marks, failures)
        raise_reason(0 if rest else mark)


def raise_reason(mark: int) -> None:
    """Raise what another rank has left under its mark, 0 for none."""
    why = "its own error says why"
    with contextlib.suppress(Exception):
        if mark:
            _store().wait([_key(mark)], PATIENCE)
            why = _store().get(_key(mark)).decode()
    raise RuntimeError(f"another rank could not take part, and nothing was changed: {why}")


def marked(mark: int) -> Tensor:
    """What a rank that failed sends for a part that is sent alone."""
    bits = torch.full((1,), _NAN | mark, dtype=torch.int64, device="cpu")
    return bits.view(torch.float64)


def mark_of(part: Tensor) -> int:
    """The mark in a part that was sent alone; 0 if no rank has failed."""
    value = float(part)
    return int(part.view(torch.int64)) & _MARKS if value != value else 0


def _key(mark: int) -> str:
    return f"fastclip/{mark}"


def _store() -> Any:
    return private("torch.distributed.distributed_c10d._get_default_store")()
