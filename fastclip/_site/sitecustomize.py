"""Run by Python when a process starts that has this folder on its path: torch is to be patched.

Not before it is imported: most processes that a program starts never do.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Options of the process that `run` makes of itself, in `sys._xoptions`; no child has them.
RUN, STATS, PLOT = "fastclip_run", "fastclip_stats", "fastclip_plot"


class After:
    """A finder that runs `action` when a module was first imported, before it is used."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        # Whoever finds a module may only ask whether it is there.
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == self.name and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action(module)

            spec.loader.exec_module = exec_module
        return spec


def _patch(_: ModuleType) -> None:
    # After all else, should a parent have found it by its own path.
    sys.path.append(package := str(Path(__file__).parents[2]))
    try:
        import fastclip
        from fastclip import _run

        if RUN in sys._xoptions:
            _run.start()
        else:
            fastclip.patch()
    except Exception as error:
        # Another Python or torch among the children is no reason to stop it.
        print(f"fastclip run: torch is not patched in {sys.executable}: {error}", file=sys.stderr)
    finally:
        sys.path.remove(package)


def _say_if_unused(process: int) -> None:
    if "torch" not in sys.modules and os.getpid() == process:
        print("fastclip run: torch was never imported, nothing was clipped", file=sys.stderr)


def _run_the_next() -> None:
    """The `sitecustomize` that Python would have found without this one."""
    here = Path(__file__).absolute().parent
    others = [entry for entry in sys.path if Path(entry).absolute() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    if RUN in sys._xoptions:
        atexit.register(_say_if_unused, os.getpid())
    sys.meta_path.insert(0, After("torch", _patch))
    _run_the_next()
