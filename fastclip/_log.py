"""What was clipped: a ring of norms and thresholds on the device, and numbers made of it."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._state import CPU, State

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


class Log(State):
    """One row of float64 numbers a step. No addition waits.

    A ring of the last steps, with a counter on the device, so that replays of a captured addition
    add rows as well.
    """

    # 10^5 steps and some, of up to 16 numbers; of more numbers as many as the bytes hold.
    STEPS, BYTES = 1 << 17, 1 << 24

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        size = max(1, min(self.STEPS, self.BYTES // (8 * max(1, self.width))))
        # Memory that no step has come to is not touched.
        rows = torch.empty((size, self.width), dtype=torch.float64, device=CPU)
        return {"rows": rows, "steps": torch.zeros(1, dtype=torch.int64, device=CPU)}

    def add(self, row: Tensor) -> None:
        _ops.record_(*self._on(row.device), row)

    @property
    def rows(self) -> Tensor:
        """The ring as it lies there."""
        return self._here["rows"]

    def read(self) -> tuple[int, Tensor]:
        """How many steps there were, and the rows of the last of them, oldest first."""
        steps = int(self._here["steps"])
        last = self.rows[:steps].cpu()
        return steps, last.roll(-(steps % len(last)), 0) if steps > len(last) else last

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        state["rows"][int(state["steps"]) :] = 0
        return state


def summary(steps: int, norms: Tensor, coefs: Tensor) -> dict[str, Any]:
    """The numbers of one group, of the recorded steps: plain Python, ready for any logger."""
    finite = norms.isfinite()
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64, device=norms.device) / 100
    # torch.quantile takes 16 Mi elements at most, more than a ring holds.
    values = norms[finite].quantile(ranks).tolist() if finite.any() else [math.nan] * len(ranks)
    return {
        "steps": steps,
        "clipped": int((coefs < 1).sum()),
        "nonfinite": int((~finite).sum()),
        "total_norm": norms.tolist(),
        "coef": coefs.tolist(),
        "percentiles": {f"p{p}": v for p, v in zip(PERCENTILES, values, strict=True)},
    }
