"""All there is to ask of a GPU, in one command: python benchmarks/gpu.py [--out gpu.json]

Builds the extension for the device, refuses to measure anything but its kernels, measures them
against torch and whatever peer can be imported, and runs the CUDA tests; all within 480 s. The JSON
is written after each step, so a run that is cut off keeps what it has. Ends in a table of targets,
met or not; `report.py` makes a block of RESULTS.md from the JSON.

`--device cpu --quick` runs every step but the GPU's own, at tiny sizes.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_budget import NO_END, ROOT, Budget, Worker, limited
from report import targets_table
from torch.utils.cpp_extension import CUDA_HOME

SECONDS = 480
# An H100 has 78 GiB, and some of them are not torch's.
MOST_GIB = 70


class Step(NamedTuple):
    """Not begun with fewer than `least` seconds left, and ended after `most`."""

    name: str
    least: float
    most: float
    gpu_only: bool = False


MEASURED = [
    Step("reads", 15, 60),
    Step("models", 20, 80),
    Step("published", 10, 40),
    Step("reuse", 5, 20),
    Step("small", 5, 20),
    Step("launches", 30, 90, gpu_only=True),
    Step("odd", 5, 20),
    Step("bits", 10, 40),
    Step("optimizers", 10, 40),
    Step("compiled", 60, 100),
]
BUILD = Step("build", 0, 240)
CHECK = Step("check", 0, 90)
SUITE = Step("suite", 30, 300, gpu_only=True)
SANITIZER = Step("sanitizer", 30, 90, gpu_only=True)


class Run:
    """What was asked, what is known so far, and the file that always says it."""

    def __init__(self, out: Path, device: str, quick: bool, only: list[str], commit: str) -> None:
        self.out, self.device, self.quick, self.only = out, device, quick, only
        self.budget = Budget(SECONDS)
        self.record: dict[str, Any] = {
            "gpu": True,
            "complete": False,
            "where": where(device, commit),
            "steps": {},
            "rows": [],
            "targets": [],
        }
        self.write()

    def write(self) -> None:
        """All or nothing: a file that is replaced is never half written."""
        self.record["where"]["seconds"] = round(self.budget.used())
        draft = self.out.with_suffix(".part")
        draft.write_text(json.dumps(self.record, indent=1) + "\n")
        draft.replace(self.out)

    def tell(self, kind: str, value: dict[str, Any]) -> None:
        """A row or a target, as a worker sees it."""
        self.record[f"{kind}s"].append(value)
        self.write()

    def begin(self, step: Step) -> float | None:
        """How many seconds the step has; None, and on the record, if it is not to be."""
        left = self.budget.left()
        if step.gpu_only and self.device != "cuda":
            self.end(step, {"state": "skipped: only on a GPU"})
        elif self.only and step.name not in self.only:
            self.end(step, {"state": "skipped: not asked for"})
        elif left < step.least:
            self.end(step, {"state": "skipped: no time"})
        else:
            return min(step.most, left)
        return None

    def end(self, step: Step, found: dict[str, Any]) -> None:
        state = found["state"]
        if state.startswith("failed"):
            value = {"target": f"{step.name}: {state}", "value": "", "met": None}
            self.record["targets"].append(value)
        self.record["steps"][step.name] = found
        self.write()
        print(f"{self.budget.used():4.0f} s  {step.name}: {state}", flush=True)

    def command(self, step: Step, command: list[str], reserve: float = 0) -> bool:
        """A step that is a command; its output is beside the JSON. Whether it ended well."""
        seconds = self.begin(step)
        if seconds is None:
            return False
        log = self.out.with_suffix(f".{step.name}.log")
        begin = self.budget.used()
        last, is_well = limited(
            command, max(step.least, seconds - reserve), log, environment(self.device)
        )
        # What pytest says of a test, as it goes: a run that is ended has no summary.
        failures = re.findall(r"^(\S+::.*) (?:FAILED|ERROR)\b", log.read_text(), re.M)[:20]
        self.record["targets"].append({"target": step.name, "value": last, "met": is_well})
        state = last if last.startswith(NO_END) else "done"
        seconds = round(self.budget.used() - begin, 1)
        self.end(step, {"state": state, "seconds": seconds, "said": last, "failures": failures})
        return is_well


def environment(device: str) -> dict[str, str]:
    """Of the commands: nvcc, ninja and the sanitizer are found, and the kernels are this GPU's."""
    here = [str(Path(sys.executable).parent), *([f"{CUDA_HOME}/bin"] if CUDA_HOME else [])]
    path = os.pathsep.join([*here, os.environ.get("PATH", "")])
    if device != "cuda":
        return os.environ | {"PATH": path, "FASTCLIP_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability()
    chosen = {"FASTCLIP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return os.environ | {"PATH": path} | chosen


def where(device: str, commit: str) -> dict[str, Any]:
    """What a number means nothing without."""
    name = f"{platform.machine()} CPU, a stand-in"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    drivers = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    release = re.search(r"release ([\d.]+)", ask("nvcc", "--version"))
    return {
        "device": name,
        "driver": (drivers.splitlines() or ["-"])[0] if device == "cuda" else "-",
        "torch": torch.__version__,
        "nvcc": release[1] if release else "-",
        "python": platform.python_version(),
        "commit": commit or ask("git", "rev-parse", "--short", "HEAD") or "-",
    }


def ask(*command: str) -> str:
    """What a command says; nothing if there is no such command."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        return result.stdout.strip() if result.returncode == 0 else ""
    return ""


def pytest(device: str, *more: str) -> list[str]:
    marks = "cuda" if device == "cuda" else "not cuda and not emulated"
    quiet = ["-v", "--tb=short", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *quiet, "-m", marks, *more]


def refuse(run: Run, why: str) -> None:
    run.record["refused"] = why
    run.write()
    raise SystemExit(f"not measured: {why}")


def measure(run: Run) -> None:
    """The steps that a worker takes, and another one after it if it fails."""
    worker = None
    try:
        for step in MEASURED:
            seconds = run.begin(step)
            if seconds is None:
                continue
            worker = worker or Worker("gpu_rows", run.device, run.quick)
            found = worker.ask(step.name, seconds, run.tell)
            run.end(step, found)
            if found["state"] != "done":
                worker.close()
                worker = None
    finally:
        if worker:
            worker.close()


def check(run: Run) -> None:
    """`python -m fastclip check`: nothing else is measured if the kernels are wrong."""
    found = run.out.with_suffix(".check.json")
    options = ["--device", run.device, "--json", str(found)]
    if not run.command(CHECK, [sys.executable, "-m", "fastclip", "check", *options]):
        refuse(run, f"check: {run.record['steps']['check'].get('said')} ({found})")
    run.record["check"] = json.loads(found.read_text())
    kernels = run.record["check"]["facts"]["kernels"]
    if not kernels.startswith("compiled"):
        refuse(run, f"no kernels serve {run.device} after the build: {kernels}")


def conclude(run: Run) -> None:
    """What is true of the run as a whole."""
    steps = run.record["steps"]
    peak = max((s.get("peak_gib", 0) for s in steps.values()), default=0)
    what = f"memory: GiB held at most <= {MOST_GIB}"
    value = {"target": what, "value": f"{peak:.3g}", "met": peak <= MOST_GIB}
    run.record["targets"].append(value)
    run.record["complete"] = all(
        s["state"] in ("done", "skipped: only on a GPU") for s in steps.values()
    )
    run.write()
    print("\n".join(targets_table(run.record["targets"])))


def ask_all(run: Run) -> None:
    build = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    if not run.command(BUILD, build):
        said = run.record["steps"]["build"]["said"]
        refuse(run, f"the build failed: {said} ({run.out.stem}.build.log)")
    check(run)
    measure(run)
    run.command(SUITE, pytest(run.device), reserve=SANITIZER.least)
    sanitizer = shutil.which("compute-sanitizer", path=environment(run.device)["PATH"])
    if sanitizer or run.device != "cuda":
        some = pytest(run.device, "tests/test_ops.py", "-k", "offset and not default")
        run.command(SANITIZER, [str(sanitizer), "--error-exitcode=9", *some])
    else:
        run.end(SANITIZER, {"state": "skipped: no compute-sanitizer"})
    conclude(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: what is seen, not speed")
    steps = [step.name for step in (*MEASURED, SUITE, SANITIZER)]
    parser.add_argument("--only", nargs="+", default=[], choices=steps, help="after a build")
    parser.add_argument("--commit", default="", help="of a tree without its git")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure")
    # Who ends this ends what it has started: the groups of their own would not hear of it.
    signal.signal(signal.SIGTERM, lambda *how: sys.exit("terminated"))
    os.environ["PATH"] = environment(args.device)["PATH"]
    only = [BUILD.name, CHECK.name, *args.only] if args.only else []
    ask_all(Run(args.out.absolute(), args.device, args.quick, only, args.commit))


if __name__ == "__main__":
    main()
