"""What was clipped: a ring of norms and thresholds on the device, and numbers made of it."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _ops

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


class Log:
    """One row of numbers a step. No addition waits; reading is one copy.

    Rows are float32, and float64 from the first one on that is. The counter is on the device too,
    so that replays of a captured addition add rows as well.
    """

    # 10^5 steps and some; half a MiB for a number.
    CAPACITY = 1 << 17

    def __init__(self, width: int) -> None:
        self.width = width
        # Each by its device and dtype: a captured addition goes on writing into the one it knew.
        self._rings: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._use(torch.device("cpu"), torch.float32)

    def add(self, row: Tensor) -> None:
        device, dtype = self.rows.device, self.rows.dtype
        if row.device != device or row.dtype == torch.float64 != dtype:
            state = self.state_dict()
            self._use(row.device, torch.promote_types(row.dtype, dtype))
            self.load_state_dict(state)
        _ops.record_(self.rows, self.steps, row)

    # What is made in inference mode could not be changed outside.
    @torch.inference_mode(False)
    def _use(self, device: torch.device, dtype: torch.dtype) -> None:
        if (device, dtype) not in self._rings:
            # Memory that no step has come to is not touched.
            rows = torch.empty((self.CAPACITY, self.width), dtype=dtype, device=device)
            steps = torch.zeros(1, dtype=torch.int64, device=device)
            self._rings[device, dtype] = rows, steps
        self.rows, self.steps = self._rings[device, dtype]

    def read(self) -> tuple[int, Tensor]:
        """How many steps there were, and the rows of the last of them, oldest first."""
        flat = torch.cat((self.rows.flatten().double(), self.steps.double())).cpu()
        steps, rows = int(flat[-1]), flat[:-1].to(self.rows.dtype).view(self.rows.shape)
        begin = steps % self.CAPACITY
        return steps, rows[:begin] if steps < self.CAPACITY else rows.roll(-begin, 0)

    def state_dict(self) -> dict[str, Any]:
        steps, rows = self.read()
        return {"steps": steps, "rows": rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        steps, rows = state["steps"], state["rows"]
        self._use(self.rows.device, torch.promote_types(rows.dtype, self.rows.dtype))
        at = torch.arange(steps - len(rows), steps, device=self.rows.device) % self.CAPACITY
        self.rows[at] = rows.to(self.rows)
        self.steps.fill_(steps)


def summary(steps: int, norms: Tensor, coefs: Tensor) -> dict[str, Any]:
    """The numbers of one group, of the recorded steps: plain Python, ready for any logger."""
    finite = norms.isfinite()
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64, device=norms.device) / 100
    # torch.quantile takes 16 Mi elements at most, more than a ring holds.
    values = (
        norms[finite].double().quantile(ranks).tolist() if finite.any() else [math.nan] * len(ranks)
    )
    return {
        "steps": steps,
        "clipped": int((coefs < 1).sum()),
        "nonfinite": int((~finite).sum()),
        "total_norm": norms.tolist(),
        "coef": coefs.tolist(),
        "percentiles": {f"p{p}": v for p, v in zip(PERCENTILES, values, strict=True)},
    }
