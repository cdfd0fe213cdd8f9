"""What was clipped: a ring of norms and thresholds on the device, numbers and pictures of it."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._decide import apply_policy
from ._state import CPU, State

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
# More steps than a picture has columns are drawn as bands.
COLUMNS = 800
# What is kept: so many steps, or, of many groups, as many as so many bytes hold.
STEPS, BYTES = 8192, 1 << 24


class Ring(State):
    """The norms of some groups and their thresholds, a row of float64 a step. No addition waits.

    A ring of the last steps, with a counter on the device, so that replays of a captured addition
    add rows as well.
    """

    def __init__(self, groups: int, history: int | None = None) -> None:
        self.groups = groups
        most = max(1, min(STEPS, BYTES // (16 * max(1, groups))))
        self.history = most if history is None else history
        super().__init__()

    def _start(self) -> dict[str, Tensor]:
        # Memory that no step has come to is not touched.
        rows = torch.empty((self.history, 2 * self.groups), dtype=torch.float64, device=CPU)
        return {"rows": rows, "steps": torch.zeros(1, dtype=torch.int64, device=CPU)}

    def add(self, norms: Tensor, limits: float | Tensor) -> None:
        """Numbers are the threshold of all."""
        rows, steps = self._on(norms.device)
        if not isinstance(limits, Tensor):
            limits = rows.new_full(norms.shape, limits)
        row = torch.cat([some.detach().to(rows).reshape(1, -1) for some in (norms, limits)], 1)
        rows.index_copy_(0, steps.remainder(self.history), row)
        steps.add_(1)

    def read(self, last: int | None = None) -> tuple[int, Tensor]:
        """How many steps there were, and the rows of the last of them, oldest first."""
        steps = int(self._here["steps"])
        rows = self._here["rows"][:steps].cpu()
        rows = rows.roll(-(steps % len(rows)), 0) if steps > len(rows) else rows
        return steps, rows if last is None else rows[-last:]

    def read_last(self) -> Tensor:
        """The row of the last step, as `read` returns them."""
        rows, steps = self._here.values()
        return rows[(steps - 1) % len(rows)].cpu()[: int(steps)]

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        state["rows"][int(state["steps"]) :] = 0
        return state


def stats_of(steps: int, history: "History") -> dict[str, Any]:
    """The numbers of one group, of the recorded steps: plain Python, ready for any logger."""
    norms, coefs = history.norms, history.coefs
    finite = norms.isfinite()
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64, device=norms.device) / 100
    # torch.quantile takes 16 Mi elements at most, more than a ring holds.
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
    """Of one group, for each recorded step: its norm, its threshold, its coefficient."""

    name: str
    norms: Tensor
    limits: Tensor
    coefs: Tensor

    @property
    def dropped(self) -> Tensor:
        """Where a finite norm met a threshold of NaN."""
        return self.norms.isfinite() & self.limits.isnan()


def histories(rows: Tensor, names: Sequence[str], nonfinite: str) -> list[History]:
    """Of each group: `rows` hold a norm of each, then a threshold of each."""
    norms, limits = rows[:, : len(names)], rows[:, len(names) :]
    # As they were: of norms that are float32, in float32.
    coefs, wide = _ops.clip_coef(norms, limits, False), _ops.clip_coef(norms, limits)
    coefs = coefs.where(norms == norms.float(), wide)
    coefs = apply_policy(coefs, norms, limits, nonfinite).clamp(min=0)
    each = zip(names, norms.unbind(1), limits.unbind(1), coefs.unbind(1), strict=True)
    return [History(*one) for one in each]


def last_of(history: History) -> dict[str, Any]:
    """The numbers of one group at its last step."""
    if not len(history.norms):
        raise ValueError("last: no step was recorded; call clip_() first")
    names = "total_norm", "max_norm", "coef"
    found = {name: float(values[-1]) for name, values in zip(names, history[1:], strict=True)}
    return {**found, "dropped": bool(history.dropped[-1])}


def draw(steps: int, histories: Sequence[History], path: str | PathLike[str]) -> None:
    try:
        # Figure alone, without pyplot, draws with Agg and leaves the process's backend as it is.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot: needs matplotlib; to add it: pip install matplotlib") from None
    if not steps:
        raise ValueError("plot: no step was recorded; call clip_() first")
    figure = Figure(figsize=(9, 3.2 * len(histories) + 0.6), dpi=110, layout="constrained")
    for row, (axes, history) in enumerate(
        zip(
            figure.subplots(len(histories), sharex=True, squeeze=False)[:, 0],
            histories,
            strict=True,
        )
    ):
        _draw_one(axes, steps, history)
        if len(histories) > 1:
            axes.set_title(history.name, loc="left")
        if row == 0:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    axes.set_xlabel("step")
    figure.savefig(path)


def _draw_one(axes: Any, steps: int, history: History) -> None:
    _, norms, limits, coefs = history
    size = -(-len(norms) // COLUMNS)
    x = torch.arange(steps - len(norms) + 1, steps + 1, device=norms.device)
    middle = [float(part.double().mean()) for part in x.split(size)]
    shown = norms.where(norms.isfinite() & (norms > 0), torch.nan)
    clipped = (coefs < 1) & norms.isfinite()
    if size > 1:
        _draw_bands(axes, middle, shown.split(size), clipped.split(size))
    label = "norm before clipping" if size == 1 else "median norm"
    mark = "." if len(norms) == 1 else None
    axes.plot(
        middle, _medians(shown, size), color="tab:blue", linewidth=1, marker=mark, label=label
    )
    shown = limits.where(limits.isfinite(), torch.nan)
    style = {"color": "black", "linewidth": 1, "linestyle": "--", "marker": mark}
    axes.plot(middle, _medians(shown, size), **style, label="threshold")
    if size == 1:
        axes.plot(x[clipped], norms[clipped], "o", ms=3, color="tab:orange", label="clipped")
    if history.dropped.any():
        at = x[history.dropped], norms[history.dropped]
        axes.plot(*at, "x", ms=5, color="tab:red", label="dropped")
    for i, step in enumerate(x[~norms.isfinite()].tolist()[:COLUMNS]):
        own = None if i else "norm not finite"
        axes.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6, label=own)
    axes.set(yscale="log", xmargin=0.01, ylabel="gradient norm")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_bands(
    axes: Any, middle: list[float], norms: Sequence[Tensor], clipped: Sequence[Tensor]
) -> None:
    """From the least to the largest norm of some steps, and below the share that was clipped."""
    low = [float(part.nan_to_num(torch.inf).amin()) for part in norms]
    high = [float(part.nan_to_num(-1).amax()) for part in norms]
    style = {"color": "tab:blue", "alpha": 0.3, "linewidth": 0}
    kept = [a <= b for a, b in zip(low, high, strict=True)]
    label = f"least to largest of {len(norms[0])} steps"
    axes.fill_between(middle, low, high, where=kept, **style, label=label)
    share = [float(part.float().mean()) for part in clipped]
    other = axes.twinx()
    other.fill_between(middle, share, step="mid", color="tab:orange", alpha=0.4, linewidth=0)
    other.set(ylim=(0, 6), yticks=(0, 1), yticklabels=("0", "all"))
    other.set_ylabel("share clipped", loc="bottom")
    axes.fill_between([], [], color="tab:orange", alpha=0.4, label="share clipped")


def _medians(values: Tensor, size: int) -> list[float]:
    return [float(part.nanmedian()) for part in values.split(size)]
