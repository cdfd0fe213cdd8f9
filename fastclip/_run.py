"""`python -m fastclip run`: somebody's script in a Python where torch is patched; what was clipped.

The script is started as ever, with `_site` on the path. That patches torch, here and in each
process that the script starts in turn; options for this one are Python's own `-X`.
"""

import atexit
import contextlib
import functools
import inspect
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _site
from ._history import History, Ring, draw, stats_of
from ._ops import clip_coef, widest
from ._private import private
from ._ranks import rank, value_of
from .patching import patch_with

_current_mode = private("torch.utils._python_dispatch._get_current_dispatch_mode")


def run(command: Sequence[str], stats: bool, plot: Path | None) -> None:
    """Become `python command`: a script, `-m` and a module, or `-c` and code, and arguments."""
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
    # As multiprocessing does, which starts Python with the options it has itself; and all others.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    flags += ["-u"] * getattr(sys.stdout, "write_through", False) + ["-i"] * sys.flags.interactive
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        flags += [] if option in flags else ["-X", option]
    os.execv(sys.executable, [sys.executable, *flags, *options, *command])


def start() -> None:
    """What `_site` calls in the script's process, when torch is there."""
    counted = Counted(_site.STATS in sys._xoptions or _site.PLOT in sys._xoptions)
    patch_with(counted.wrap)
    process = os.getpid()

    # One of several ranks speaks, and no child that was forked.
    def report() -> None:
        if os.getpid() == process and _is_first():
            counted.report()

    atexit.register(report)


def _is_first() -> bool:
    own = rank()
    return _site.is_first_rank() if own is None else own == 0


# So many of the last clips are kept, 2 MiB of them.
HISTORY = 1 << 17


class Counted:
    """What was done by functions of ours that it wraps. What is compiled is not counted."""

    def __init__(self, keep: bool) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0
        self.ring = Ring(1, HISTORY) if keep else None

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            self.calls[function.__name__] += 1
            if self.ring is not None:
                given = signature.bind(*args, **kwargs).arguments
                # The script goes on, whatever cannot be recorded: a rule, a vmap's norms.
                with contextlib.suppress(Exception):
                    self._keep(given.get("total_norm", result), given["max_norm"])
            return result

        return counted

    @torch.no_grad()
    def _keep(self, total_norm: Tensor, max_norm: float | Tensor) -> None:
        norm = value_of(total_norm)
        # Fake tensors have no number, and what runs in a mode may become one.
        if type(norm) is not Tensor or norm.is_meta or _current_mode() is not None:
            return
        norm = norm.reshape(()).to(widest(norm.device))
        limit: float | Tensor = max_norm
        if isinstance(max_norm, Tensor):
            limit = value_of(max_norm).reshape(()).to(norm)
        if self.ring is not None:
            self.ring.add(norm, limit)

    def report(self) -> None:
        if not self.calls:
            _say(
                "this process called no clipping function of torch, timm or Megatron-core; what "
                "compiled code called is not counted"
            )
            return
        if self.ring is None:
            return
        calls = ", ".join(f"{name} {count} times" for name, count in self.calls.items())
        each = 1e6 * self.seconds / self.calls.total()
        _say(f"{calls}; {1e3 * self.seconds:.1f} ms on the host, {each:.0f} us a call")
        steps, rows = self.ring.read()
        if not steps:
            return
        norms, limits = rows.unbind(1)
        coefs = clip_coef(norms, limits).masked_fill(norms < 0, torch.nan)
        history = History("total", norms, limits, coefs)
        found = stats_of(steps, history)
        of = f"of the last {len(norms)} " if steps > len(norms) else ""
        _say(
            f"{steps} clips {of}by norm: {found['clipped']} above the threshold, "
            f"{found['nonfinite']} not finite; median norm {found['percentiles']['p50']:.4g}, "
            f"p90 {found['percentiles']['p90']:.4g}"
        )
        if path := sys._xoptions.get(_site.PLOT):
            try:
                draw(steps, [history], path)
            except OSError as error:
                _say(f"no picture in {path}: {error.strerror}")
            else:
                _say(f"drawn in {path}")


def _say(text: str) -> None:
    print(f"fastclip run: {text}", file=sys.stderr)
