"""What `pytest benchmarks` measures and in which order, and what the report makes of it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from test_house import cycle

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def collected(*options: str) -> list[str]:
    """The benchmarks that would run, in order."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r"<Function bench_(.+)>", result.stdout)


def test_the_headline_comes_first_and_the_rest_for_the_record():
    some, every = collected(), collected("--full")
    headline = [
        f"clip[cpu-{name}-{dtype}-{how}]"
        for name in ("GPT-2", "1000 x 64")
        for dtype in ("fp32", "bf16")
        for how in ("unclipped", "clipped")
    ]
    headline += ["dtensors[300-8-fp32]", "dtensors[300-8-bf16]"]
    assert some[: len(headline)] == every[: len(headline)] == headline
    assert set(some) < set(every)
    assert "clip[cpu-Llama 1B / 4-fp16-clipped]" in every
    assert "step[cpu-clipped-scaled]" in some


def test_files_of_benchmarks_do_not_import_each_other_in_a_circle():
    graph = {}
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        graph[path.stem] = names & {path.stem for path in FILES}
    assert graph["gpu"] == {"gpu_targets", "report"}
    assert not cycle(graph)


def test_the_report_takes_what_pytest_writes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    row = {
        **{"work": "w", "dtype": "fp32", "device": "cpu", "of_limit": None, "gbps": 1.0},
        "ms": {"fastclip": 1.0, "default": 4.0, "foreach": 2.0, "loop": 3.0},
        **{"error": {"fastclip": 1e-8, "foreach": 2e-8}, "speedup": 2.0},
    }
    run = {
        "machine_info": {"cpu": {"brand_raw": "A CPU"}, "threads": 2, "torch": "2", "gpu": None},
        "commit_info": {"id": "0123456789"},
        "benchmarks": [{"extra_info": {"row": row}}, {"extra_info": {"text": "a text"}}],
    }
    run["machine_info"]["machine"] = "x86_64"
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(report, "HERE", tmp_path)
    report.main(str(tmp_path / "run.json"), "what changed")
    block = (tmp_path / "RESULTS.md").read_text()
    assert "· 0123456 · A CPU, 2 threads · torch 2\n\nwhat changed\n\n| work" in block
    assert "| w    | fp32  | 1.000       | 4.000      | 2.000      | 3.000   | 2.00      |" in block
    assert block.endswith("\n\na text\n")
    (kept,) = (tmp_path / "results").iterdir()
    assert json.loads(kept.read_text())["rows"] == [row]
