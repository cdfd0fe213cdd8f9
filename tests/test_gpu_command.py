"""benchmarks/gpu.py and its report where there is no GPU: its steps on the CPU, or stand-ins."""

import json
import os
import re
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
FACTS = '{"facts": {"kernels": "%s"}}'


@pytest.fixture(autouse=True)
def _runs_alone(monkeypatch):
    """Have pytest-benchmark measure in the steps, also where this test is run beside others."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def only(gpu, monkeypatch, *names: str, build: str = "", kernels: str = "compiled") -> None:
    """Takes these steps alone, after stand-ins for the build and for the check."""
    every = gpu.steps

    def steps(folder: Path, architecture: str):
        first, check, *others = every(folder, architecture)
        code = f"open({str(folder / 'check.json')!r}, 'w').write({FACTS % kernels!r})"
        yield first._replace(command=[sys.executable, "-c", build])
        yield check._replace(command=[sys.executable, "-c", code])
        yield from (step for step in others if step.name in names)

    monkeypatch.setattr(gpu, "steps", steps)


def row(work: str, dtype: str = "bf16", ms: float = 1.0, **facts: float) -> dict:
    facts = {"device": "cuda", "speedup": 20.0, "gbps": 4e3, "of_limit": 0.97, **facts}
    error = {"fastclip": 0.0, "foreach": 1e-3}
    ms = {"fastclip": ms, "foreach": 2.0, "apex": 3.0}
    return {"work": work, "dtype": dtype, "ms": ms, "error": error, **facts}


def launches(apart: float = 10.0, fused: float = 10.0) -> list[dict]:
    """What launches.cu prints, under the names that its source has."""
    names = re.findall(r'\{"([^"]+)",\s+\[&\]', (BENCHMARKS / "launches.cu").read_text())
    us = {"apart": apart, "fused": fused}
    return [
        {"launch": name, "megabytes": size, "us": us.get(name.split(",")[0], 10.0), "late": 1}
        for size in (1.0, 20.0, 160.0)
        for name in names
    ]


def record(**facts: object) -> dict:
    where = {"device": "Some H100 80GB HBM3", "l2_bytes": 50 << 20, "torch": "2", "commit": "abc"}
    where |= {"driver": "1.2", "nvcc": "13.0", "python": "3.11"}
    known = {"rows": [], "texts": [], "launches": [], "steps": {}, "refused": "", "complete": True}
    return known | {"where": where} | facts


def test_a_rehearsal_checks_and_measures(gpu, monkeypatch, tmp_path, capsys):
    only(gpu, monkeypatch, "norm", "launches")
    gpu.main(["--rehearse", "--out", str(tmp_path / "gpu.json"), "--commit", "abc"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    states = {name: step["state"] for name, step in found["steps"].items()}
    skipped = "skipped: it needs a GPU"
    assert states == {"build": "done", "check": "done", "norm": "done", "launches": skipped}
    assert (found["complete"], found["where"]["commit"]) == (False, "abc")
    assert "quick, norm" in {row["work"] for row in found["rows"]}
    assert re.search(r"^\| norm +\| \d+ passed .*\| met", capsys.readouterr().out, re.M)
    assert "bench_norm[cpu-quick-fp32] PASSED" in (tmp_path / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("stand_ins", "why"),
    [
        ({"kernels": "none"}, "the kernels are not in use: none"),
        ({"build": "exit('no compiler')"}, "the build failed: exit status 1: no compiler"),
    ],
)
def test_nothing_is_measured_but_the_kernels(gpu, monkeypatch, tmp_path, stand_ins, why):
    only(gpu, monkeypatch, "norm", **stand_ins)
    with pytest.raises(SystemExit, match=re.escape(f"not measured: {why}")):
        gpu.main(["--rehearse", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["refused"][: len(why)], found["complete"]) == (why, False)
    assert "norm" not in found["steps"]


def test_on_a_gpu_all_is_asked_in_this_order(gpu, monkeypatch, tmp_path):
    taken = []

    def run_limited(command, seconds, log, env):
        taken.append((command, env))
        for argument in command:
            if "check.json" in argument:
                Path(argument).write_text(FACTS % "compiled")
        said = "tests/test_a.py::test_b[x y] FAILED [ 3%]\n4 passed\n"
        if "launches.cu" in " ".join(command):
            said = "\n".join(map(json.dumps, launches()))
        return "done", said

    cuda = Mock()
    cuda.get_device_capability.return_value = (9, 0)
    cuda.get_device_name.return_value = "NVIDIA H100 80GB HBM3"
    cuda.get_device_properties.return_value.L2_cache_size = 50 << 20
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(gpu, "run_limited", run_limited)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: name)
    gpu.main(["--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    order = "build check norm clip host launches step compile tests sanitizer"
    assert list(found["steps"]) == order.split()
    assert found["complete"]
    assert found["steps"]["tests"]["failures"] == ["tests/test_a.py::test_b[x y]"]
    assert len(found["launches"]) == len(launches()) > 0
    for command, _ in taken[1:]:
        assert {"cuda", "-arch=sm_90"} & {*command}
    assert taken[0][1]["FASTCLIP_CUDA"] == "1"
    assert taken[0][1]["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_a_step_that_cannot_be_taken_says_why(gpu, tmp_path):
    for program, why in ((sys.executable, "time left"), ("no-program", "no-program")):
        step = gpu.Step("a", [program], least=30, most=60)
        found, _ = gpu.run_step(step, 10, tmp_path / "log", {"PATH": os.environ["PATH"]})
        assert found == {"state": f"skipped: there is no {why}"}


def test_a_command_ends_at_its_limit_with_all_it_started(gpu, tmp_path):
    # What it has started does not hear of the interrupt.
    beat = tmp_path / "beat"
    child = f"trap '' INT; while :; do touch {beat}; sleep 0.1; done"
    command = ["sh", "-c", f"echo well; ({child}) & wait"]
    assert gpu.run_limited(command, 2, tmp_path / "log") == ("failed: no end after 2 s", "well\n")
    time.sleep(0.2)
    beat.unlink()
    time.sleep(1)
    assert not beat.exists()
    died = gpu.run_limited(["sh", "-c", "exit 7"], 30, tmp_path / "log")
    assert died == ("failed: exit status 7", "")


def test_benchmarks_that_are_interrupted_keep_their_rows(gpu, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, signal\n"
        "def test_first(benchmark):\n"
        "    benchmark.extra_info['row'] = 'a row'\n"
        "    benchmark.pedantic(int)\n"
        "def test_hangs(benchmark):\n"
        "    benchmark.pedantic(os.kill, (os.getpid(), signal.SIGINT))\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path / "test_some.py"), "--benchmark-only"]
    command += ["-p", "conftest", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(ROOT)])}
    command += [f"--benchmark-json={tmp_path}/some.json"]
    state, said = gpu.run_limited(command, 60, tmp_path / "log", env)
    assert state == "failed: exit status 2", said
    found = record()
    gpu.add_results(found, "some", tmp_path / "some.json", said)
    assert found["rows"] == ["a row"]


def test_targets_are_met_or_not(gpu):
    good = [row("4 x 64 Mi, norm"), row("6 000 261 x 256, clipped", ms=3.3)]
    good += [row("1000 x 1024, unclipped", "fp32", of_limit=0.1)]
    bad = [row("4 x 64 Mi, norm", of_limit=0.94), row("6 000 261 x 256, clipped", ms=3.5)]
    bad += [row("1000 x 1024, unclipped", "fp32", speedup=14.0)]
    for rows, is_met in ((good, True), (bad, False)):
        assert [t["met"] for t in gpu.targets(record(rows=rows))] == [is_met] * 3
    assert all(t["met"] for t in gpu.targets(record(launches=launches())))
    slow = gpu.targets(record(launches=launches(apart=9.0, fused=20.0)))
    assert [t["met"] for t in slow] == [False, False, False, True, False]


def test_targets_are_of_lists_that_are_measured(gpu):
    import gpu_targets
    from models import CUDA, HEADLINE

    works = [*gpu_targets.BANDWIDTH, *gpu_targets.H100_MS, *(w for w, _ in gpu_targets.SPEEDUPS)]
    assert {work.rsplit(", ", 1)[0] for work in works} <= {*CUDA, *HEADLINE}


def test_the_report_takes_the_record_and_what_pytest_writes(gpu, monkeypatch, tmp_path):
    import report

    step = {"state": "failed: exit status 1", "last_line": "1 failed", "failures": ["test_a"]}
    found = record(rows=[row("w")], launches=launches(), texts=["a text"], steps={"tests": step})
    found |= {"complete": False, "targets": gpu.targets(found)}
    measured = row("w", "fp32", device="cpu", of_limit=None, gbps=1.0, speedup=2.0)
    measured["ms"] = {"fastclip": 1.0, "default": 4.0, "foreach": 2.0, "loop": 3.0}
    machine = {"machine": "x86_64", "threads": 2, "gpu": None, "torch": "2"}
    run = {
        "machine_info": {**machine, "cpu": {"brand_raw": "A CPU"}},
        "commit_info": {"id": "0123456789"},
        "benchmarks": [{"extra_info": {"row": measured}}, {"extra_info": {"text": "a text"}}],
    }
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    for some in (found, found, run):
        (tmp_path / "run.json").write_text(json.dumps(some))
        report.main(str(tmp_path / "run.json"), "what changed")
    _, _, gpus, block = (tmp_path / "RESULTS.md").read_text().split("\n## ")
    for part in (
        "· abc · Some H100 80GB HBM3 · torch 2\n\nwhat changed\n\nDriver 1.2, nvcc 13.0",
        "tests: failed: exit status 1; test_a.",
        "The run is not complete.",
        *("| NOT met |", "apex ms", "| w, CUDA |", "160 MB", "10.0 *", "\n\na text\n"),
    ):
        assert part in gpus
    assert "· 0123456 · A CPU, 2 threads · torch 2\n\nwhat changed\n\n| work" in block
    assert "| w    | fp32  | 1.000       | 4.000      | 2.000      | 3.000   | 2.00      |" in block
    assert block.endswith("\n\na text\n")
    # A name begins with a date.
    kept = {path.name[10:]: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert sorted(kept) == ["-0123456.json", "-abc-gpu-2.json", "-abc-gpu.json"]
    assert json.loads(kept["-0123456.json"])["rows"] == [measured]
