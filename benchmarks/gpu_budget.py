"""Processes within the time there is: each a group of its own, ended with all it started.

What measures a GPU may hang in a kernel or be taken down by one; here it takes nothing with it.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NO_END = "no end after"
Tell = Callable[[str, Any], None]


class Budget:
    """So many seconds, and what is left of them."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.monotonic()
        self.seconds = seconds

    def used(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> float:
        return self.seconds - self.used()


def signal_group(group: int, what: signal.Signals) -> None:
    """To all of a process group that there still are."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, what)


def limited(
    command: list[str], seconds: float, log: Path, env: dict[str, str] | None = None
) -> tuple[str, bool]:
    """Runs a command in the tree, its output in a file; its last line, and whether it ended well.

    Interrupted at its limit, so that pytest says what has failed so far, and then killed.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        is_late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_late = True
            signal_group(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(4)
        finally:
            signal_group(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1].strip("= ") if lines else ""
    last = f"{NO_END} {seconds:.0f} s; {last}" if is_late else last
    return last[:200], process.returncode == 0 and not is_late


def work(pipe: Connection, module: str, *how: Any) -> None:
    """A worker's whole life. What it measures is imported here, from the tree, for the first time.

    The module's `answer(pipe, *how)` takes names of steps from the pipe and tells what it sees.
    """
    os.setsid()
    sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module(module).answer(pipe, *how)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("end", {"state": f"failed: {said(error)}"}))


def said(error: Exception) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


class Worker:
    """A process that takes steps, one at a time, each within its limit."""

    def __init__(self, module: str, *how: Any) -> None:
        fresh = multiprocessing.get_context("spawn")
        self.pipe, other = fresh.Pipe()
        self.process = fresh.Process(target=work, args=(other, module, *how))
        self.process.start()
        other.close()

    def ask(self, step: str, seconds: float, tell: Tell) -> dict[str, Any]:
        """How the step ended; `tell` gets what it saw on the way."""
        limit = time.monotonic() + seconds
        try:
            self.pipe.send(step)
            while self.pipe.poll(max(0.0, limit - time.monotonic())):
                kind, value = self.pipe.recv()
                if kind == "end":
                    return value
                tell(kind, value)
        except (EOFError, OSError):
            self.process.join(5)
            return {"state": f"failed: its process ended, code {self.process.exitcode}"}
        return {"state": f"failed: {NO_END} {seconds:.0f} s"}

    def close(self) -> None:
        signal_group(self.process.pid, signal.SIGKILL)
        # It may not have had the time to be a group.
        self.process.kill()
        self.process.join(5)
