"""Build, test and measure on a GPU in one command: python benchmarks/gpu.py [--out gpu.json]

The command builds the extension for this GPU and runs `python -m fastclip check`, which compares
the kernels with float64; if one is wrong, nothing is measured. Then it runs the benchmarks on the
GPU, launches.cu, the tests that need a GPU and compute-sanitizer, all within 480 s. The JSON is
written after each step, so a run that is cut off keeps its numbers; the output of all steps is in a
log beside it. At its end the command prints which targets are met. `report.py` makes a block of
RESULTS.md from the JSON.

`--rehearse` runs, on the CPU and at tiny sizes, every step that needs no GPU.
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
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_targets import Record, targets
from report import gpu_notes, results, targets_table
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).parent.parent
SECONDS = 480


class Step(NamedTuple):
    """A command, run only if `least` seconds are left, and stopped after `most` seconds."""

    name: str
    command: list[str]
    least: float
    most: float
    needs_gpu: bool = False


def steps(folder: Path, architecture: str) -> list[Step]:
    """Return all steps in order. A step called norm may write norm.json to `folder`.

    `architecture` is nvcc's name for the GPU's architecture, such as sm_90, or "" for the CPU.
    """
    test = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--continue-on-collection-errors"]
    rows = ["-m", "cuda"] if architecture else ["-m", "not cuda", "--quick"]
    nvcc = ["nvcc", "-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-run"]
    sanitizer = ["compute-sanitizer", "--error-exitcode=9"]

    def python(name: str, least: float, most: float, *command: str) -> Step:
        return Step(name, [sys.executable, *command], least, most)

    def bench(name: str, least: float, most: float) -> Step:
        what = [f"benchmarks/bench_{name}.py", "--benchmark-only", *rows]
        return Step(name, [*test, *what, f"--benchmark-json={folder}/{name}.json"], least, most)

    device = ["--device", "cuda" if architecture else "cpu", "--json", f"{folder}/check.json"]
    launches = [f"-arch={architecture}", "benchmarks/launches.cu", "-o", f"{folder}/launches"]
    return [
        python("build", 0, 240, "setup.py", "build_ext", "--inplace", "--force"),
        python("check", 0, 90, "-m", "fastclip", "check", *device),
        bench("norm", 20, 60),
        bench("clip", 30, 120),
        bench("host", 15, 40),
        Step("launches", [*nvcc, *launches], 40, 90, needs_gpu=True),
        bench("step", 15, 40),
        bench("compile", 30, 60),
        Step("tests", [*test, "-m", "cuda"], 30, 300, needs_gpu=True),
        Step(
            "sanitizer",
            [*sanitizer, *test, "-m", "cuda", "tests/test_ops.py", "-k", "offset and not default"],
            30,
            90,
            needs_gpu=True,
        ),
    ]


def environment(architecture: str) -> dict[str, str]:
    """Return the environment of the steps: PATH has nvcc, ninja and compute-sanitizer, and the
    build compiles for this GPU alone."""
    here = [str(Path(sys.executable).parent), *([f"{CUDA_HOME}/bin"] if CUDA_HOME else [])]
    found = os.environ | {"PATH": os.pathsep.join([*here, os.environ.get("PATH", "")])}
    # TORCH_CUDA_ARCH_LIST expects 9.0 for sm_90.
    version = f"{architecture[3:-1]}.{architecture[-1:]}"
    chosen = {"FASTCLIP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": version}
    return found | (chosen if architecture else {"FASTCLIP_CUDA": "0"})


def describe_machine(commit: str, env: dict[str, str]) -> Record:
    """Return the machine and the versions that the numbers depend on."""

    def ask(*command: str) -> str:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20
            )
            return result.stdout.strip() if result.returncode == 0 else ""
        return ""

    has_gpu = torch.cuda.is_available()
    release = re.search(r"release ([\d.]+)", ask("nvcc", "--version"))
    drivers = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if has_gpu else f"{platform.machine()} CPU",
        "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size if has_gpu else 0,
        "driver": drivers.split("\n")[0] or "-",
        "torch": torch.__version__,
        "nvcc": release[1] if release else "-",
        "python": platform.python_version(),
        "commit": commit or ask("git", "rev-parse", "--short", "HEAD") or "-",
    }


def run_limited(
    command: list[str], seconds: float, log: Path, env: dict[str, str] | None = None
) -> tuple[str, str]:
    """Run a command in the repository; return its state and its output, which `log` gets too.

    After `seconds` the command is interrupted, so that pytest writes the rows it has, and then it
    is killed. All processes that the command has started are killed when it ends.
    """
    with log.open("a+") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        is_late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_late = True
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(4)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        output.seek(begin)
        said = output.read()
    if is_late:
        return f"failed: no end after {seconds:.0f} s", said
    return f"failed: exit status {process.returncode}" if process.returncode else "done", said


def run_step(step: Step, left: float, log: Path, env: dict[str, str]) -> tuple[Record, str]:
    """Run or skip a step; return its entry in the record, and its output."""
    skipped = ""
    if step.needs_gpu and env["FASTCLIP_CUDA"] == "0":
        skipped = "it needs a GPU"
    elif not shutil.which(step.command[0], path=env["PATH"]):
        skipped = f"there is no {step.command[0]}"
    elif left < step.least:
        skipped = "there is no time left"
    if skipped:
        return {"state": f"skipped: {skipped}"}, ""
    begin = time.monotonic()
    state, said = run_limited(step.command, min(step.most, left), log, env)
    # Failures are found in the lines of the tests: a killed pytest writes no summary.
    failures = re.findall(r"^(\S+::.*) (?:FAILED|ERROR)\b", said, re.M)[:20]
    last = (said.strip().splitlines() or [""])[-1].strip("= ")[:200]
    seconds = round(time.monotonic() - begin, 1)
    return {"state": state, "seconds": seconds, "last_line": last, "failures": failures}, said


def add_results(record: Record, name: str, path: Path, said: str) -> None:
    """Add to the record the numbers that a step has printed or written to `path`."""
    if name == "launches":
        lines = [line for line in said.splitlines() if line.startswith("{")]
        record["launches"] = [json.loads(line) for line in lines]
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # the step wrote nothing, or was killed while it wrote
    if name == "check":
        record["check"] = found
    else:
        for kind, values in results(found).items():
            record[kind] += values


def refusal(record: Record) -> str:
    """Return why the run must stop, or "": kernels not built, wrong or not in use are not timed."""
    for name in ("build", "check"):
        step = record["steps"].get(name, {"state": "done"})
        if step["state"] != "done":
            return f"the {name} {step['state']}: {step['last_line']}"
    kernels = record.get("check", {"facts": {"kernels": "compiled"}})["facts"]["kernels"]
    return "" if kernels.startswith("compiled") else f"the kernels are not in use: {kernels}"


def write(record: Record, out: Path) -> None:
    """Write the record by replacing the file, so that it is never half written."""
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(out)


def run(out: Path, architecture: str, commit: str) -> Record:
    """Run the steps, one after the other, and return the record of all."""
    begin, log, env = time.monotonic(), out.with_suffix(".log"), environment(architecture)
    record: Record = {"complete": False, "where": describe_machine(commit, env), "steps": {}}
    record |= {"rows": [], "texts": [], "launches": []}
    log.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(Path(folder), architecture):
            left = SECONDS - (time.monotonic() - begin)
            found, said = run_step(step, left, log, env)
            record["steps"][step.name] = found
            add_results(record, step.name, Path(folder, f"{step.name}.json"), said)
            record |= {"targets": targets(record), "refused": refusal(record)}
            record["where"]["seconds"] = round(time.monotonic() - begin)
            write(record, out)
            print(f"{record['where']['seconds']:4} s  {step.name}: {found['state']}", flush=True)
            if record["refused"]:
                raise SystemExit(f"not measured: {record['refused']} (see {log})")
    record["complete"] = all(step["state"] == "done" for step in record["steps"].values())
    write(record, out)
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--commit", default="", help="of the code, if it is here without .git")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args(arguments)
    architecture = ""
    if not args.rehearse:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: there is nothing to measure")
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    # SIGTERM does not reach a step, which has its own process group; sys.exit unwinds and kills it.
    signal.signal(signal.SIGTERM, lambda *how: sys.exit("terminated"))
    record = run(args.out.absolute(), architecture, args.commit)
    print("\n".join([*gpu_notes(record), "", *targets_table(record["targets"])]))


if __name__ == "__main__":
    main()
