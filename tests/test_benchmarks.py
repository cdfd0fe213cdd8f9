"""What `pytest benchmarks` measures, and in which order."""

import re
from pathlib import Path

import pytest
from conftest import python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def collected(*options: str) -> list[str]:
    """The benchmarks that would run, in order."""
    result = python("-m", "pytest", "benchmarks", "--collect-only", *options, cwd=ROOT)
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
