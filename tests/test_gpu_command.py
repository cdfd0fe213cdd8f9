"""benchmarks/gpu.py and its report, run on the CPU at tiny sizes: all of it but the GPU."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
# It writes C++ and has it compiled: a test of its own.
SLOW = "compiled"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def told():
    return {"row": [], "target": []}


@pytest.fixture
def bench(told):
    import gpu_clock
    import gpu_rows

    return gpu_rows.Bench(gpu_clock.Cpu(), True, lambda kind, value: told[kind].append(value))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The tree as a machine gets it that has never seen it: no built file."""
    tree = tmp_path_factory.mktemp("bare") / "tree"
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with all of this one's packages but those installed as links to a checkout."""
    home = tmp_path_factory.mktemp("python")
    venv.create(home, symlinks=True)
    place = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    # Links are .pth files, and those of a folder that a .pth file adds are not read.
    Path(place, "packages.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin/python"


def command(python: Path, tree: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """gpu.py with the stand-in; the tools that come with packages are still found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
    line = [python, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", "gpu.json", *more]
    return subprocess.run(line, cwd=tree, env=env, capture_output=True, text=True)


def test_every_step_says_what_it_saw(bench, told):
    import gpu_rows

    for step in gpu_rows.STEPS:
        if step not in (SLOW, "launches"):
            assert bench.run(step)["state"] == "done", step
    right = [t["met"] for t in told["target"] if "error" in t["target"] or "bits" in t["target"]]
    assert len(right) >= 10
    assert all(right)
    for row in told["row"]:
        assert "failed" not in row
        assert all(ms > 0 for ms in row["ms"].values())


def test_torch_compile_takes_part(bench, told):
    assert bench.run(SLOW)["state"] == "done"
    (row,) = told["row"]
    took_part = set(row["ms"]) | set(row.get("failed", {}))
    assert {"torch.compile, default", "torch.compile, autotuned", "fastclip"} <= took_part


def test_the_command_refuses_to_measure_anything_but_its_kernels(bare, python, tmp_path):
    tree = shutil.copytree(bare, tmp_path / "tree")
    imported = subprocess.run([python, "-c", "import fastclip"], cwd=tmp_path, capture_output=True)
    assert imported.returncode != 0
    for setup, why in (
        ("", "no kernels serve cpu after the build: none: plain PyTorch (not built"),
        ("raise SystemExit('no compiler')", "the build failed: no compiler"),
    ):
        (tree / "setup.py").write_text(setup)
        result = command(python, tree)
        assert result.returncode == 1
        (line,) = [s for s in result.stderr.splitlines() if s.startswith("not measured: ")]
        assert why in line
        record = json.loads((tree / "gpu.json").read_text())
        assert why in record["refused"]
        assert not record["complete"]
        assert record["rows"] == []


def test_the_command_builds_a_bare_tree_and_measures_its_kernels(bare, python):
    import gpu

    asked = [step.name for step in gpu.MEASURED]
    only = [name for name in asked if name != SLOW]
    result = command(python, bare, "--commit", "abc", "--only", *only)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((bare / "gpu.json").read_text())
    states = {name: step["state"] for name, step in record["steps"].items()}
    gpus_own = {"launches", "suite", "sanitizer"}
    assert list(states) == ["build", "check", *asked, "suite", "sanitizer"]
    assert {states.pop(name) for name in gpus_own} == {"skipped: only on a GPU"}
    assert states.pop(SLOW) == "skipped: not asked for"
    assert set(states.values()) == {"done"}
    assert not record["complete"]
    assert record["where"]["commit"] == "abc"
    assert record["rows"]
    met = {t["target"]: t["met"] for t in record["targets"]}
    assert met["build"]
    assert met["check"]
    assert record["check"]["facts"]["kernels"] == "compiled, and called"
    assert list((bare / "fastclip").glob("_C*.so"))


FAKE = """
import os, time

def answer(pipe, folder):
    while True:
        step = pipe.recv()
        pipe.send(("row", {"work": step}))
        if step == "dies":
            os._exit(7)
        if step == "hangs":
            open(folder + "/child", "w").write(str(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")))
            time.sleep(60)
        pipe.send(("end", {"state": "done"}))
"""


def test_a_step_that_dies_or_hangs_takes_nothing_with_it(tmp_path, monkeypatch):
    from gpu_budget import Worker

    (tmp_path / "fake_rows.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen, states = [], []
    for step in ("good", "dies", "hangs"):
        worker = Worker("fake_rows", str(tmp_path))
        seconds = 6 if step == "hangs" else 60
        states.append(worker.ask(step, seconds, lambda kind, value: seen.append(value["work"])))
        worker.close()
    assert seen == ["good", "dies", "hangs"]
    assert [s["state"] for s in states] == [
        "done",
        "failed: its process ended, code 7",
        "failed: no end after 6 s",
    ]
    # What the step had started is gone with it.
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def is_gone(process: int) -> bool:
    for _ in range(50):
        status = Path(f"/proc/{process}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False


def test_a_worker_that_cannot_begin_says_why(monkeypatch):
    from gpu_budget import Worker

    worker = Worker("no_such_module")
    found = worker.ask("reads", 30, print)
    worker.close()
    assert "No module named 'no_such_module'" in found["state"]


def test_a_command_ends_at_its_limit_with_all_it_started(tmp_path):
    from gpu_budget import limited

    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    last, is_well = limited([sys.executable, "-c", f"{code}; p.wait()"], 2, tmp_path / "log")
    assert not is_well
    assert last.startswith("no end after 2 s")
    assert is_gone(int((tmp_path / "log").read_text().split()[0]))
    assert limited([sys.executable, "-c", "print('5 passed')"], 30, tmp_path / "log") == (
        "5 passed",
        True,
    )


def test_what_does_not_fit_the_time_is_skipped_and_on_record(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "SECONDS", 1)
    run = gpu.Run(tmp_path / "gpu.json", "cpu", True, [], "abc")
    gpu.measure(run)
    gpu.conclude(run)
    record = json.loads((tmp_path / "gpu.json").read_text())
    states = {name: step["state"] for name, step in record["steps"].items()}
    assert states.pop("launches") == "skipped: only on a GPU"
    assert set(states.values()) == {"skipped: no time"}
    assert not record["complete"]


def test_the_report_takes_the_record(bench, told, tmp_path, monkeypatch):
    import gpu
    import gpu_kernels
    import report

    run = gpu.Run(tmp_path / "gpu.json", "cpu", True, [], "abc")
    run.record["where"] |= {"device": "Some GPU", "driver": "1.2", "nvcc": "13.0", "torch": "2"}
    bench.tell = run.tell
    bench.run("published")
    gpu_kernels.judge(
        bench,
        [
            {"launch": name, "megabytes": 1.0, "us": us, "late": late}
            for name, us, late in (
                ("norm phase", 5.0, 0),
                ("fused, nothing to clip", 7.5, 3),
                ("fused, clips", 10.0, 0),
                ("apart, nothing to clip", 8.5, 0),
                ("apart, clips", 11.0, 0),
            )
        ],
    )
    run.tell("row", {"work": "w", "dtype": "bf16", "ms": {}, "failed": {"apex": "TypeError: no"}})
    run.end(gpu.SUITE, {"state": "failed: no end after 3 s"})
    gpu.conclude(run)
    values = {t["target"]: t["value"] for t in run.record["targets"]}
    assert values["a call that clips nothing: us beyond the norm phase <= 5"] == "2.5"
    assert values["clip of 1 MB: two launches over one, in time >= 1"] == "1.1"
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    report.main(str(tmp_path / "gpu.json"), "a first look")
    block = (tmp_path / "RESULTS.md").read_text()
    for part in (
        "· abc · Some GPU · torch 2",
        "a first look",
        "Driver 1.2, nvcc 13.0",
        "suite: failed: no end after 3 s.",
        "The run is not complete.",
        "published (NVIDIA-NeMo/Automodel pull request 3685, H100)",
        "fused, nothing to clip, the host's time included",
        "apex: TypeError: no",
    ):
        assert part in block
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_contestant_that_fails_or_does_not_clip_is_a_line_with_its_reason(bench, told):
    import gpu_contest

    contest = gpu_contest.Contest(bench, "a list", "fp32", [(300,)] * 3, clips=True)

    def fails(*how: object) -> None:
        raise RuntimeError("no kernel image")

    makers = contest.everyone() | {
        "fails": lambda: contest.eager(fails),
        "idle": lambda: contest.eager(lambda *how: None),
    }
    contest.run(makers)
    failed = told["row"][0]["failed"]
    assert failed.pop("fails") == "RuntimeError: no kernel image"
    assert failed.pop("idle").startswith("RuntimeError: left a norm of ")
    assert not failed
    assert "fails" not in told["row"][0]["ms"]


def test_a_step_that_fails_says_so(bench, monkeypatch):
    import gpu_rows

    monkeypatch.setitem(gpu_rows.STEPS, "reads", lambda bench: 1 / 0)
    assert bench.run("reads")["state"] == "failed: ZeroDivisionError: division by zero"


def test_a_late_host_gets_a_longer_delay_and_is_told():
    import gpu_clock

    delays = {"soon": [], "never": []}

    class Clock(gpu_clock.Cpu):
        def ms(self, call, delay):
            delays[call()].append(delay)
            return 1.0, call() == "soon" and delay >= 4

    calls = {name: lambda name=name: name for name in delays}
    _, late = gpu_clock.race(Clock(), calls)
    assert late == ["never"]
    assert delays["soon"][-1] == 4
    assert delays["never"][-1] == 64


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return False

    def elapsed_time(self, stop: "Event") -> float:
        return 1.5


@pytest.fixture
def cuda(monkeypatch):
    """The clock of a GPU, over a torch whose CUDA does nothing: every name it uses is there."""
    import gpu_clock

    done = SimpleNamespace(wait_stream=lambda stream: None, replay=lambda: None)
    for name, stand_in in {
        "Event": Event,
        "_sleep": lambda cycles: list(range(cycles, cycles + 1)),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 16),
        "synchronize": lambda: None,
        "Stream": lambda: done,
        "current_stream": lambda: done,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: done,
        "graph": lambda graph: nullcontext(),
        "max_memory_allocated": lambda: 3 << 30,
        "reset_peak_memory_stats": lambda: None,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpu_clock.Cuda, "name", "cpu")
    return gpu_clock.Cuda()


def test_the_clock_of_a_gpu_runs(cuda, bench, told):
    bench.clock = cuda
    # What is captured is not replayed here, so a replayed clip is seen not to clip.
    for step in ("reads", "small", "published"):
        assert bench.run(step) | {"seconds": 0} == {"state": "done", "seconds": 0, "peak_gib": 3}
    assert set(told["row"][0]["ms"].values()) == {1.5}
    assert set(told["row"][-1]["failed"]) == {
        f"{n}, replayed" for n in ("fastclip", "foreach", "loop")
    }


def test_launches_are_built_for_this_gpu_and_what_they_said_before_a_failure_is_kept(
    cuda, bench, told, monkeypatch
):
    import gpu_kernels

    names = [
        "norm phase",
        *(f"{a}, {b}" for a in ("fused", "apart") for b in ("clips", "nothing to clip")),
    ]
    said = [json.dumps({"launch": n, "megabytes": 1.0, "us": 2.0, "late": 0}) for n in names]
    ran = []

    def run(line, **how):
        ran.append(line)
        failed = len(ran) > 1
        return SimpleNamespace(returncode=int(failed), stdout="\n".join(said), stderr="an error")

    monkeypatch.setattr(gpu_kernels.subprocess, "run", run)
    assert bench.run("launches")["state"] == "failed: RuntimeError: launches ended with 1: an error"
    assert "-arch=sm_90" in ran[0]
    assert len(told["row"]) == 1


def test_on_a_gpu_all_is_asked_in_this_order(cuda, tmp_path, monkeypatch):
    import gpu

    commands = {}

    def limited(line, seconds, log, env):
        commands[log.name] = (line, seconds, env)
        log.write_text("tests/test_a.py::test_b[x y] FAILED [ 3%]\n4 passed\n")
        if "check" in log.name:
            facts = {"facts": {"kernels": "compiled, and called"}}
            (tmp_path / "gpu.check.json").write_text(json.dumps(facts))
        return ("no end after 9 s; 4 passed", False) if "suite" in log.name else ("4 passed", True)

    class Worker:
        def __init__(self, *how):
            assert how == ("gpu_rows", "cuda", False)

        def ask(self, step, seconds, tell):
            tell("row", {"work": step, "dtype": "fp32", "ms": {}})
            return {"state": "done" if step != "odd" else "failed: no", "peak_gib": 71}

        def close(self): ...

    monkeypatch.setattr(gpu, "limited", limited)
    monkeypatch.setattr(gpu, "Worker", Worker)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: f"/bin/{name}")
    gpu.ask_all(gpu.Run(tmp_path / "gpu.json", "cuda", False, [], "abc"))
    record = json.loads((tmp_path / "gpu.json").read_text())
    order = "build check reads models published reuse small launches odd bits"
    assert list(record["steps"]) == [*order.split(), "optimizers", "compiled", "suite", "sanitizer"]
    assert not record["complete"]
    assert record["steps"]["suite"]["state"] == "no end after 9 s; 4 passed"
    assert record["steps"]["suite"]["failures"] == ["tests/test_a.py::test_b[x y]"]
    assert {t["target"]: t["met"] for t in record["targets"]}[
        "memory: GiB held at most <= 70"
    ] is False
    env = commands["gpu.build.log"][2]
    assert (env["FASTCLIP_CUDA"], env["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")
    assert "cuda" in commands["gpu.suite.log"][0]
    assert commands["gpu.sanitizer.log"][0][0] == "/bin/compute-sanitizer"
    assert set(record["where"]) == {
        *("device", "driver", "torch", "nvcc", "python", "commit", "seconds"),
    }


def test_a_limit_interrupts():
    import gpu_contest

    with pytest.raises(TimeoutError, match="no end after"), gpu_contest.time_limit(0.2):
        time.sleep(5)


def test_the_published_lists_have_their_sizes():
    import math

    import models

    assert sum(math.prod(shape) for shape in models.matrices()) == 225_181_696
    assert len(models.matrices()) == 500
    assert models.table() == [(6_000_261, 256)]


def test_without_a_gpu_the_command_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "gpu.json")]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_launches_compile(tmp_path):
    flags = "-std=c++20 --fmad=false --expt-relaxed-constexpr -arch=sm_90 -Werror all-warnings"
    line = ["nvcc", *flags.split(), "-c", str(BENCHMARKS / "launches.cu")]
    subprocess.run([*line, "-o", str(tmp_path / "launches.o")], check=True)
