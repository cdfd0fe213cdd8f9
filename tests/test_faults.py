"""`python -m fastclip check` on the emulated device: right as it is, wrong with a planted fault.

The faults show that the emulation and the check would notice theirs: each is one small edit. All
are compiled at once, and one acts at a time, or none.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import emulation
import pytest
from conftest import emulation_folder

pytestmark = pytest.mark.skipif(bool(emulation.MISSING), reason=str(emulation.MISSING))

# A fault each: (file, what stands there, what stands there if the fault acts).
FAULTS = {
    "no barrier before the write": (
        "cuda/reduce.cuh",
        "  __syncthreads();  // an earlier call may still be read",
        "  if (!PLANTED) __syncthreads();",
    ),
    "no barrier after the write": (
        "cuda/reduce.cuh",
        "= value;\n  __syncthreads();",
        "= value;\n  if (!PLANTED) __syncthreads();",
    ),
    "a barrier not all reach": (
        "cuda/reduce.cuh",
        "  return reduce_lanes<Op, kWarps>",
        "  if (PLANTED && threadIdx.x < 500) __syncthreads();\n  return reduce_lanes<Op, kWarps>",
    ),
    "no grid barrier": (
        "cuda/launch.cu",
        "    cooperative_groups::this_grid().sync();",
        "    if (!PLANTED) cooperative_groups::this_grid().sync();",
    ),
    "a vector beyond the end": (
        "cuda/tile.cuh",
        "left >= kVector",
        "left >= (PLANTED ? 1 : kVector)",
    ),
    "a misaligned vector": (
        "cuda/tile.cuh",
        "tile.aligned() && left",
        "(PLANTED || tile.aligned()) && left",
    ),
    "a word beyond the end": (
        "cuda/tile.cuh",
        "(k + 1) * kBits <= 8 * left",
        "(k + !PLANTED) * kBits <= 8 * left",
    ),
    "four vectors of any tile": (
        "cuda/tile.cuh",
        "tile.left(j) > 0 ? __ldcg",
        "PLANTED || tile.left(j) > 0 ? __ldcg",
    ),
    "a write beyond the end": (
        "cuda/tile.cuh",
        "if (tile.left(j) > 0) *tile",
        "if (PLANTED || tile.left(j) > 0) *tile",
    ),
    "four vectors at any address": (
        "cuda/tile.cuh",
        "if (tile.aligned() && tile.bytes",
        "if ((PLANTED || tile.aligned()) && tile.bytes",
    ),
    "one thread short": (
        "cuda/tile.cuh",
        "j * kThreads + threadIdx.x",
        "j * (kThreads - PLANTED) + threadIdx.x",
    ),
    "the wrong end of a last tile": ("cuda/tile.cuh", "last ? entry", "last && !PLANTED ? entry"),
    "a span left out": (
        "cuda/norm.cuh",
        "int span = blockIdx.x;",
        "int span = blockIdx.x + PLANTED;",
    ),
    "a forgotten NaN": (
        "cuda/reduce.cuh",
        "a > b || a != a ? a : b",
        "a > b || (!PLANTED && a != a) ? a : b",
    ),
    "squares that overflow": (
        "cuda/norm.cuh",
        "if (!in_range && bits != 0)",
        "if (!PLANTED && !in_range && bits != 0)",
    ),
    "zeros that stay NaN": (
        "cuda/scale.cuh",
        "means_zeros(coef) ? 0",
        "!PLANTED && means_zeros(coef) ? 0",
    ),
    "a coefficient in half precision": (
        "cuda/scale.cuh",
        ": x * coef;",
        ": x * (PLANTED ? static_cast<acc_t>(__half2float(__float2half(coef))) : coef);",
    ),
    "the coefficient of another tensor": (
        "cuda/launch.cu",
        "work.groups > 1 ? group : 0",
        "work.groups > 1 ? group - (PLANTED && group > 1) : 0",
    ),
}


@pytest.fixture
def planted(request, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.CSRC, csrc)
    for number, (file, old, new) in enumerate(FAULTS.values(), 1):
        source = (csrc / file).read_text()
        assert source.count(old) == 1, old
        (csrc / file).write_text(
            source.replace(old, new.replace("PLANTED", f"emulation::planted({number})"))
        )
    return emulation.build(emulation_folder(request.config), csrc)


def checked(library: Path, folder: Path, numbers: Iterable[int]) -> dict[int, tuple[int, str]]:
    """The wait status of each check, 0 if nothing was found, and what it wrote."""
    folder.mkdir()
    script = Path(emulation.__file__).with_name("check.py")
    result = subprocess.run(
        [sys.executable, script, library, folder, *map(str, numbers)],
        env=os.environ | {"PYTHONPATH": f"{emulation.CSRC.parent}:{script.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    statuses = dict(line.split() for line in result.stdout.splitlines())
    return {
        int(number): (int(status), (folder / number).read_text())
        for number, status in statuses.items()
    }


def test_check_of_the_kernels_finds_nothing(planted, tmp_path):
    ((status, output),) = checked(planted, tmp_path / "out", [0]).values()
    assert status == 0, output
    assert "compiled, and called" in output
    assert "verdict   right" in output


@pytest.mark.slow
def test_check_finds_every_planted_fault(planted, tmp_path):
    found = checked(planted, tmp_path / "out", range(1, len(FAULTS) + 1))
    for name, (status, output) in zip(FAULTS, found.values(), strict=True):
        # A case was wrong, the sanitizer ended the process, or a signal did.
        has_words = "WRONG" in output or "runtime error" in output
        assert has_words or os.WIFSIGNALED(status), (name, output)
