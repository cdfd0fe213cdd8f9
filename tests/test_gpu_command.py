"""benchmarks/gpu.py and its report, run on the CPU at tiny sizes: all of it but the GPU."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def clock(gpu):
    class Cpu(gpu.Gpu):
        name = "cpu"

        def ms(self, call, repeats):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return 1e3 * (time.perf_counter() - start) / repeats

        def wall_ms(self, call, repeats):
            return self.ms(call, repeats)

        def replay(self, call):
            return call

    return Cpu()


def test_every_step_says_what_it_saw_and_the_report_takes_it(gpu, clock, tmp_path, monkeypatch):
    import report

    bench = gpu.Bench(clock, quick=True)
    bench.run()
    times = [
        {"launch": name, "megabytes": 1.0, "us": us}
        for name, us in (("norm phase", 5.0), ("fused, nothing to clip", 7.5))
    ]
    gpu.judge_launches(bench, times)
    assert [t for t in bench.targets if t["met"] is None] == []
    right = [t["met"] for t in bench.targets if "error" in t["target"] or "bits" in t["target"]]
    assert len(right) >= 5
    assert all(right)
    assert {t["target"]: t["value"] for t in bench.targets}[
        "a call that clips nothing: us beyond the norm phase <= 3"
    ] == "2.5"
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    where = {"device": "Some GPU", "torch": "2", "commit": "abc"}
    record = {"where": where, "gpu": True, "rows": bench.rows, "targets": bench.targets}
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    report.main(str(tmp_path / "gpu.json"), "a first look")
    block = (tmp_path / "RESULTS.md").read_text()
    assert "· abc · Some GPU · torch 2" in block
    assert "a first look" in block
    assert block.count("\n|") > len(bench.rows) + len(bench.targets)
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_a_step_that_fails_is_a_row_and_ends_nothing(gpu, clock, monkeypatch):
    bench = gpu.Bench(clock, quick=True)

    def reads() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "reads", reads)
    bench.run()
    failed = [t["target"] for t in bench.targets if t["met"] is None]
    assert failed == ["reads: RuntimeError: out of memory"]
    assert bench.rows


def test_without_a_gpu_the_command_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "gpu.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_launches_compile(tmp_path):
    flags = "-std=c++20 --fmad=false --expt-relaxed-constexpr -arch=sm_90 -Werror all-warnings"
    command = ["nvcc", *flags.split(), "-c", str(BENCHMARKS / "launches.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "launches.o")], check=True)
