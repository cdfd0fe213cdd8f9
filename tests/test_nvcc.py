"""What the compiler says of the CUDA kernels, for every architecture: no spills, few registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parent.parent / "csrc/cuda"
# What 65 536 registers allow three blocks of 512 threads, in steps of eight.
REGISTERS_FOR_THREE_BLOCKS = 40
STRICT = "-Xptxas -v -cubin -Werror all-warnings -Xcompiler -Wall,-Wextra"
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", re.S)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc"),
]


def compiled(architecture: str, source: Path, folder: Path, flags: str = STRICT) -> str:
    """What ptxas reports; a warning of any of the compilers is an error."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = f"nvcc -std=c++20 -O3 --fmad=false --expt-relaxed-constexpr {flags} {target}"
    result = subprocess.run(
        [*command.split(), str(source), "-o", str(folder / "made")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def spilled(report: str) -> list[str]:
    """The lines of functions with a stack frame or spills."""
    return [m[0] for m in FRAME.finditer(report) if any(int(n) for n in m.groups())]


@pytest.mark.parametrize("architecture", ["80", "89", "90", "100", "120"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    report = compiled(architecture, CUDA / "launch.cu", tmp_path)
    assert not spilled(report)
    registers = dict(USED.findall(report))
    # Both tables, three sets of phases, three norms; one finish a norm; scale and clamp.
    assert len(registers) == 2 * 3 * 3 + 3 + 2 * 2
    for name, count in registers.items():
        if "clip_kernel" in name:
            assert int(count) <= REGISTERS_FOR_THREE_BLOCKS, name


def test_spills_and_warnings_are_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(double* x) {\n"
        "  double y[40];\n"
        "  for (int i = 0; i < 40; ++i) y[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 40; ++i) x[i * 1024 + threadIdx.x] = y[i] * y[39 - i];\n"
        "}\n"
    )
    report = compiled("90", source, tmp_path)
    assert spilled(report)
    assert len(USED.findall(report)) == 1
    source.write_text("__global__ void warns(int* x) { int unused = 0; }\n")
    with pytest.raises(AssertionError, match="never referenced"):
        compiled("90", source, tmp_path)


def test_the_launches_of_the_benchmarks_compile(tmp_path):
    source = CUDA.parents[1] / "benchmarks/launches.cu"
    compiled("90", source, tmp_path, "-c -Werror all-warnings")
