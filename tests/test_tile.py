"""The loops over a tile by themselves: on this processor, on older ones, and on ARM, by qemu."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", f"-isystem{INCLUDE}"]
TILE = ROOT / "csrc/cpu/tile.cpp"
ARM = "aarch64-linux-gnu-"
# A compiler, and what runs the result. The loops are cloned for three generations of x86-64.
PROCESSORS = {
    "this": ["g++"],
    "x86-64": ["g++", "qemu-x86_64", "-cpu", "qemu64"],
    "x86-64-v3": ["g++", "qemu-x86_64", "-cpu", "Haswell"],
    "aarch64": [f"{ARM}g++", "qemu-aarch64"],
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_tiles_match_plain_loops(processor, tmp_path):
    compiler, *emulator = PROCESSORS[processor]
    if missing := [tool for tool in (compiler, *emulator[:1]) if not shutil.which(tool)]:
        pytest.skip(f"no {missing[0]}")
    if processor.startswith("x86") and platform.machine() != "x86_64":
        pytest.skip("g++ compiles for another processor")
    sources = [TILE, ROOT / "tests/tile_check.cpp"]
    static = ["-static"] if emulator else []
    program = tmp_path / "tile_check"
    subprocess.run([compiler, *FLAGS, *static, *sources, "-o", program], check=True)
    done = subprocess.run([*emulator, program], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "0 failures\n"


@pytest.mark.skipif(not shutil.which(f"{ARM}g++"), reason=f"no {ARM}g++")
def test_float16_is_converted_by_vectors_on_arm(tmp_path):
    made = tmp_path / "tile.o"
    subprocess.run([f"{ARM}g++", *FLAGS, "-c", TILE, "-o", made], check=True)
    said = subprocess.check_output([f"{ARM}objdump", "-dC", made], text=True)
    functions = dict(re.findall(r"<fastclip::cpu::(\w+)\(.*?>:\n(.*?)(?:\n\n|$)", said, re.S))
    widen, narrow = r"fcvtl\s+v\d+\.4s, v\d+\.4h", r"fcvtn\s+v\d+\.4h, v\d+\.4s"
    assert re.search(widen, functions["measure"])
    assert re.search(widen, functions["scale"])
    assert re.search(narrow, functions["scale"])
