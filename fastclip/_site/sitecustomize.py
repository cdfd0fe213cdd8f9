"""Run by Python when a process starts that has this folder on its path: torch is to be patched.

Not before it is imported: most processes that a program starts never do.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import sys
from _thread import get_ident
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Every process would wait for typing to be imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Options of the process that `run` makes of itself, in `sys._xoptions`; no child has them.
RUN, STATS, PLOT = "fastclip_run", "fastclip_stats", "fastclip_plot"

# What torchrun, Slurm's srun, Open MPI and MPICH tell each process.
_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def is_first_rank() -> bool:
    """Whether the launcher of this process, if any, counts it as the first."""
    return _told(_RANK, "0") == "0"


def _told(names: tuple[str, ...], otherwise: str) -> str:
    return next(filter(None, map(os.environ.get, names)), otherwise)


class After:
    """A finder that runs `action` when a module was first imported, before it is used."""

    ran: set[str]

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.awaited, self.action = name, action
        # Threads that ask the others: another such finder may be one of them.
        self._asking: set[int] = set()

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.awaited or get_ident() in self._asking:
            return None
        self._asking.add(get_ident())
        try:
            spec = self._ask(name, path, target)
        finally:
            self._asking.remove(get_ident())
        loader = spec and spec.loader
        # One that is a class loads other modules too.
        if loader is not None and not isinstance(loader, type):
            self._follow(loader)
        return spec

    def _follow(self, loader: Any) -> None:
        run: Any = getattr(loader, "exec_module", None)

        # Whoever finds a module may only ask whether it is there.
        def exec_module(module: ModuleType) -> None:
            run(module)
            if module.__name__ == self.awaited and self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action(module)

        if run is not None:
            try:
                loader.exec_module = exec_module
            except AttributeError:
                # With slots; the module is imported all the same.
                return

    def _ask(
        self, name: str, path: object, target: object
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            # Until Python 3.12 there are finders that have but `find_module`.
            find_spec = getattr(finder, "find_spec", None)
            if finder is not self and find_spec is not None:
                spec: importlib.machinery.ModuleSpec | None = find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None


class Patching:
    """torch is patched as soon as it and fastclip are there."""

    def __init__(self) -> None:
        self.is_done = self.has_failed = False
        self.torch = After("torch", lambda _: self._patch_now_or_later())
        self.fastclip = After("fastclip", lambda _: self._patch())

    def _patch_now_or_later(self) -> None:
        # A script may import fastclip first, which imports torch before it is whole itself.
        spec = getattr(sys.modules.get("fastclip"), "__spec__", None)
        if not getattr(spec, "_initializing", False):
            self._patch()

    def _patch(self) -> None:
        if self.is_done or "torch" not in sys.modules:
            return
        try:
            # This one, and no other of its name that the script has beside it.
            if "fastclip" not in sys.modules:
                file = Path(__file__).parents[1] / "__init__.py"
                spec: Any = importlib.util.spec_from_file_location("fastclip", file)
                sys.modules["fastclip"] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            from fastclip import _run, patching

            if RUN in sys._xoptions:
                _run.start()
            else:
                patching.patch()
            self.is_done = True
        except Exception as error:
            self.has_failed = True
            why = f"fastclip run: torch is not patched in {sys.executable}: {error}"
            # Other ranks are, and would wait for what torch's own functions do not send.
            if _told(_SIZE, "1") not in ("0", "1"):
                sys.exit(why)
            # Another Python or torch among the children is no reason to stop it.
            print(why, file=sys.stderr)

    def end(self, process: int) -> None:
        """Say that nothing was patched, and end with status 1 if torch was there.

        Registered first, so that it is the last to run.
        """
        # No child that was forked.
        if self.is_done or os.getpid() != process:
            return
        is_there = "torch" in sys.modules
        if not self.has_failed and is_first_rank():
            why = "torch could not be patched" if is_there else "this process did not import torch"
            print(f"fastclip run: {why}; its children are not counted here", file=sys.stderr)
        if is_there:
            # Nothing else changes the status of a process that is ending.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)


def _run_the_next(ran: set[str]) -> None:
    """The `sitecustomize` that Python would have found without this one."""
    paths = [Path(entry).absolute() for entry in sys.path]
    here = Path(__file__).absolute().parent
    for path in paths[paths.index(here) + 1 if here in paths else 0 :]:
        spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [str(path)])
        if spec and spec.loader and spec.origin and spec.origin not in ran:
            ran.add(spec.origin)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


def _start() -> None:
    # One that ran the next may be run by that again, or by another copy of this.
    ran = next((finder.ran for finder in sys.meta_path if hasattr(finder, "ran")), None)
    if ran is None:
        patching = Patching()
        patching.torch.ran = ran = {__file__}
        sys.meta_path[:0] = [patching.torch, patching.fastclip]
        if RUN in sys._xoptions:
            atexit.register(patching.end, os.getpid())
    _run_the_next(ran)


if __name__ == "sitecustomize":
    _start()
