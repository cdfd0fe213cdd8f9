"""`python -m fastclip run`: run a script with torch patched, and report its clips.

Python runs the script as usual, but with `_site` on its path. The `sitecustomize` in that folder
patches torch, in this process and in all that the script starts. The options of `run` are passed on
as `-X` options of Python, which no child inherits.
"""

import atexit
import contextlib
import functools
import inspect
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _site
from ._history import Ring, draw, histories, stats_of
from ._ops import widest
from ._ranks import rank, value_of
from .patching import patch_with

# How many of the latest clips are recorded; the record takes 2 MiB.
HISTORY = 1 << 17


def run(command: Sequence[str], stats: bool, plot: Path | None) -> None:
    """Replace this process by Python with a command: a script, -m or -c, and its arguments."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        sys.exit("python -m fastclip run: needs PYTHONPATH and site; leave out -E, -I and -S")
    options = ["-X", _site.RUN]
    options += ["-X", _site.STATS] * stats
    options += ["-X", f"{_site.PLOT}={plot.absolute()}"] if plot else []
    before = os.environ.get("PYTHONPATH")
    here = str(Path(_site.__file__).parent)
    os.environ["PYTHONPATH"] = here + os.pathsep + before if before else here
    sys.stdout.flush()
    sys.stderr.flush()
    # This function, which multiprocessing uses too, returns most of Python's own options.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    flags += ["-u"] * getattr(sys.stdout, "write_through", False) + ["-i"] * sys.flags.interactive
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        flags += [] if option in flags else ["-X", option]
    os.execv(sys.executable, [sys.executable, *flags, *options, *command])


def start() -> None:
    """Patch torch in the process of the script; `_site` calls this once torch is imported."""
    counted = Counted(_site.STATS in sys._xoptions or _site.PLOT in sys._xoptions)
    patch_with(counted.wrap)
    process = os.getpid()

    def report() -> None:
        # Forked children and all ranks run this too; only the script's process on rank 0 reports.
        if os.getpid() == process and not rank() and _site.is_first_rank():
            counted.report()

    atexit.register(report)


class Counted:
    """Wraps functions to count and record their calls, except calls in compiled code."""

    def __init__(self, keep: bool) -> None:
        self.calls: Counter[str] = Counter()
        self.ring = Ring(1, HISTORY) if keep else None

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            result = function(*args, **kwargs)
            self.calls[function.__name__] += 1
            given = signature.bind(*args, **kwargs).arguments
            if self.ring is not None and "max_norm" in given:
                # A norm that cannot be recorded, such as one in vmap, must not stop the script.
                with contextlib.suppress(Exception):
                    self._record(self.ring, given.get("total_norm", result), given["max_norm"])
            return result

        return counted

    @torch.no_grad()
    def _record(self, ring: Ring, total_norm: Tensor, max_norm: float | Tensor) -> None:
        norm = value_of(total_norm)
        # Meta tensors, and fake tensors (which have their own type), have no value to record.
        if type(norm) is not Tensor or norm.is_meta:
            return
        norm = norm.reshape(()).to(widest(norm.device))
        if isinstance(max_norm, Tensor):
            max_norm = value_of(max_norm).reshape(()).to(norm)
        ring.add(norm, max_norm)

    def report(self) -> None:
        """Print the numbers of calls and of clips, and draw the norms if `--plot` asks for it."""
        if not self.calls:
            _say(
                "this process called no clipping function of torch, timm or Megatron-core; calls "
                "in compiled code are not counted"
            )
        if self.ring is None or not self.calls:
            return
        _say(", ".join(f"{name} {count} times" for name, count in self.calls.items()))
        steps, rows = self.ring.read()
        if not steps:
            return
        (history,) = histories(rows, ["total"], "propagate")
        found = stats_of(steps, history)
        of = f"of the last {len(rows)} " if steps > len(rows) else ""
        _say(
            f"{steps} clips {of}by norm: {found['clipped']} above the threshold, "
            f"{found['nonfinite']} not finite; median norm {found['percentiles']['p50']:.4g}, "
            f"p90 {found['percentiles']['p90']:.4g}"
        )
        if path := sys._xoptions.get(_site.PLOT):
            try:
                draw(steps, [history], path)
                _say(f"drawn in {path}")
            except OSError as error:
                _say(f"no picture in {path}: {error.strerror}")


def _say(text: str) -> None:
    print(f"fastclip run: {text}", file=sys.stderr)
