"""Patch torch: Python runs this file at the start of each process with this folder on its path.

torch is patched when the process imports it. This file does not import it, because most of the
processes that a program starts never need it.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import sys
from _thread import get_ident
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

# Importing typing would take time at the start of every process.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# `run` gives these `-X` options to the process that it starts; children do not inherit them.
RUN, STATS, PLOT = "fastclip_run", "fastclip_stats", "fastclip_plot"

# The variables in which torchrun, Slurm's srun, Open MPI and MPICH tell a process its rank.
_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def is_first_rank() -> bool:
    """Whether a launcher has started this process as rank 0, or no launcher has."""
    return _first_of(_RANK, "0") == "0"


def _first_of(names: tuple[str, ...], otherwise: str) -> str:
    return next(filter(None, map(os.environ.get, names)), otherwise)


class After:
    """A finder that calls `action` when a module has been imported, before anybody uses it."""

    ran: set[str]  # the files that were run as `sitecustomize`

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.awaited, self.action = name, action
        self._asking: set[int] = set()

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return what the other finders find, with a loader that calls `action` at the end."""
        if name != self.awaited or get_ident() in self._asking:
            return None
        # While this thread asks the other finders, this finder must find nothing.
        self._asking.add(get_ident())
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.remove(get_ident())
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute: Any = getattr(loader, "exec_module", None)

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Some loaders, such as those of zip files, load other modules too.
            if module.__name__ == self.awaited and self in sys.meta_path:
                self.remove()
                self.action(module)

        # A loader that is a class loads other modules too, and one with slots takes no attribute.
        if execute is not None and not isinstance(loader, type):
            with suppress(AttributeError):
                loader.exec_module = exec_module


def _start() -> None:
    """Wait for torch, and run the `sitecustomize` that Python would find without this folder."""
    # The `sitecustomize` of another package may run the next one on the path, and so rerun this.
    ran = next((finder.ran for finder in sys.meta_path if hasattr(finder, "ran")), None)
    if ran is None:
        ran = {__file__}
        _wait_for_torch(ran)
    here = os.path.dirname(__file__)
    for path in sys.path[sys.path.index(here) + 1 if here in sys.path else 0 :]:
        spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [path])
        if spec and spec.loader and spec.origin and spec.origin not in ran:
            ran.add(spec.origin)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


def _wait_for_torch(ran: set[str]) -> None:
    def patch(_: ModuleType) -> None:
        after_fastclip.remove()
        _patch_torch()

    def patch_unless_too_early(module: ModuleType) -> None:
        # If a script imports fastclip before torch, fastclip is still incomplete here.
        spec = getattr(sys.modules.get("fastclip"), "__spec__", None)
        if not getattr(spec, "_initializing", False):
            patch(module)

    after_fastclip, after_torch = After("fastclip", patch), After("torch", patch_unless_too_early)
    after_fastclip.ran = ran
    after_fastclip.install()
    after_torch.install()
    if RUN in sys._xoptions:
        atexit.register(_announce_no_patch, os.getpid())


def _patch_torch() -> None:
    atexit.unregister(_announce_no_patch)
    try:
        # Loaded by path, because a module beside the script may have the same name.
        if "fastclip" not in sys.modules:
            file = os.path.join(os.path.dirname(os.path.dirname(__file__)), "__init__.py")
            spec: Any = importlib.util.spec_from_file_location("fastclip", file)
            sys.modules["fastclip"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        from fastclip import _run, patching

        if RUN in sys._xoptions:
            _run.start()
        else:
            patching.patch()
    except Exception as error:
        why = f"fastclip run: torch is not patched in {sys.executable}: {error}"
        # A patched rank would wait for sums that an unpatched one never sends.
        if RUN in sys._xoptions or _first_of(_SIZE, "1") not in ("0", "1"):
            sys.exit(why)
        # A child may well be run by another Python, whose torch fastclip does not know.
        print(why, file=sys.stderr)


def _announce_no_patch(process: int) -> None:
    # Forked children run this too.
    if os.getpid() == process and is_first_rank():
        done = "patch" if "torch" in sys.modules else "import"
        why = f"this process did not {done} torch; its children are not counted here"
        print(f"fastclip run: {why}", file=sys.stderr)


if __name__ == "sitecustomize":
    _start()
