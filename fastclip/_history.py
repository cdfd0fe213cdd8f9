"""The norms and thresholds of the last steps, kept on the device; their statistics and plots."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._decide import apply_policy, limit_on
from ._state import CPU, State

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
# A plot of more steps than this shows medians of equally long runs of steps.
COLUMNS = 800
# By default this number of steps is kept, or with many groups as many as fit into these bytes.
STEPS, BYTES = 8192, 1 << 24


class Ring(State):
    """The norms and thresholds of some groups in the last steps, a row of float64 for each step.

    `add` does not wait for the device. The counter of steps is on the device too, so that each
    replay of a CUDA graph that has captured `add` adds a row.
    """

    def __init__(self, groups: int, history: int | None = None) -> None:
        self.groups = groups
        most = max(1, min(STEPS, BYTES // (16 * max(1, groups))))
        self.history = most if history is None else history
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        # Not zeros: rows that were never written to then take no physical memory.
        rows = torch.empty((self.history, 2 * self.groups), dtype=torch.float64, device=CPU)
        return {"rows": rows, "steps": torch.zeros(1, dtype=torch.int64, device=CPU)}

    def add(self, norms: Tensor, limits: float | Tensor) -> None:
        """Add a step: the norm of each group, and their thresholds, or one number for all."""
        rows, steps = self._on(norms.device)
        if not isinstance(limits, Tensor) or limits.dim() == 0:
            limits = limit_on(rows, limits).expand_as(norms)
        row = torch.cat([some.detach().to(rows).reshape(1, -1) for some in (norms, limits)], 1)
        rows.index_copy_(0, steps.remainder(self.history), row)
        steps.add_(1)

    def read(self, last: int | None = None) -> tuple[int, Tensor]:
        """Return the number of all steps, and the recorded rows (the `last` ones), oldest first."""
        steps = int(self._here["steps"])
        rows = self._here["rows"][:steps].cpu()
        rows = rows.roll(-(steps % len(rows)), 0) if steps > len(rows) else rows
        return steps, rows if last is None else rows[-last:]

    def read_last(self) -> Tensor:
        """Return the row of the last step, of shape (1, columns); (0, columns) before the first."""
        rows, steps = self._here.values()
        return rows[(steps - 1) % len(rows)].cpu()[: int(steps)]

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        state["rows"][int(state["steps"]) :] = 0
        return state


def stats_of(steps: int, history: "History") -> dict[str, Any]:
    """Return the statistics of one group over the recorded steps, as numbers of plain Python."""
    norms, coefs = history.norms, history.coefs
    finite = norms.isfinite()
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64, device=norms.device) / 100
    # torch.quantile refuses more than 16 Mi elements; a ring of the default length holds fewer.
    values = norms[finite].quantile(ranks).tolist() if finite.any() else [math.nan] * len(ranks)
    return {
        "steps": steps,
        "clipped": int((coefs < 1).sum()),
        "dropped": int(history.dropped.sum()),
        "nonfinite": int((~finite).sum()),
        "total_norm": norms.tolist(),
        "coef": coefs.tolist(),
        "percentiles": {f"p{p}": v for p, v in zip(PERCENTILES, values, strict=True)},
    }


class History(NamedTuple):
    """The norms, thresholds and coefficients of one group, one element for each recorded step."""

    name: str
    norms: Tensor
    limits: Tensor
    coefs: Tensor

    @property
    def dropped(self) -> Tensor:
        """Whether each step was dropped: its norm is finite and its threshold NaN."""
        return self.norms.isfinite() & self.limits.isnan()


def histories(rows: Tensor, names: Sequence[str], nonfinite: str) -> list[History]:
    """Return a History for each name, from rows of all norms followed by all thresholds."""
    norms, limits = rows[:, : len(names)], rows[:, len(names) :]
    # The clip computed the coefficients of float32 norms in float32, and the others in float64.
    coefs, wide = _ops.clip_coef(norms, limits, False), _ops.clip_coef(norms, limits)
    coefs = coefs.where(norms == norms.float(), wide)
    coefs = apply_policy(coefs, norms, limits, nonfinite).clamp(min=0)
    each = zip(names, norms.unbind(1), limits.unbind(1), coefs.unbind(1), strict=True)
    return [History(*one) for one in each]


def last_of(history: History) -> dict[str, Any]:
    """Return the numbers of one group at its last step."""
    if not len(history.norms):
        raise ValueError("last: no step was recorded; call clip_() first")
    names = "total_norm", "max_norm", "coef"
    found = {name: float(values[-1]) for name, values in zip(names, history[1:], strict=True)}
    return {**found, "dropped": bool(history.dropped[-1])}


def draw(steps: int, histories: Sequence[History], path: str | PathLike[str]) -> None:
    """Draw the norms, thresholds and clipped steps of each group, one below the other."""
    try:
        # A Figure without pyplot draws with Agg, and leaves the backend of the process as it is.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot: needs matplotlib; to add it: pip install matplotlib") from None
    if not steps:
        raise ValueError("plot: no step was recorded; call clip_() first")
    figure = Figure(figsize=(9, 3.2 * len(histories) + 0.6), dpi=110, layout="constrained")
    rows = figure.subplots(len(histories), sharex=True, squeeze=False)[:, 0]
    for axes, history in zip(rows, histories, strict=True):
        _draw_one(axes, steps, history)
        if len(histories) > 1:
            axes.set_title(history.name, loc="left")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    rows[-1].set_xlabel("step")
    figure.savefig(path)


def _draw_one(axes: Any, steps: int, history: History) -> None:
    norms, limits = history.norms, history.limits
    size = -(-len(norms) // COLUMNS)
    x = torch.arange(steps - len(norms) + 1, steps + 1, device=norms.device)
    middle = [float(part.double().mean()) for part in x.split(size)]
    label = "norm before clipping" if size == 1 else f"median norm of {size} steps"
    axes.plot(middle, _medians(norms, size), "tab:blue", linewidth=1, label=label)
    axes.plot(middle, _medians(limits, size), "k--", linewidth=1, label="threshold")
    bad = ~norms.isfinite()
    for label, at, mark, color in (
        ("clipped", (history.coefs < 1) & ~bad & ~history.dropped, ".", "tab:orange"),
        ("dropped", history.dropped, "x", "tab:red"),
    ):
        if at.any():
            axes.plot(x[at], norms[at], mark, markersize=5, color=color, label=label)
    if bad.any():
        # A norm that is not finite has no place on the axis: it is drawn as a vertical line.
        top = axes.get_xaxis_transform()
        axes.vlines(x[bad], 0, 1, "tab:red", transform=top, linewidth=0.8, label="not finite")
    axes.set(yscale="log", xmargin=0.01, ylabel="gradient norm")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _medians(values: Tensor, size: int) -> list[float]:
    """Return the median of every `size` values, without those a logarithmic axis cannot show."""
    shown = values.where(values.isfinite() & (values > 0), torch.nan)
    return [float(part.nanmedian()) for part in shown.split(size)]
