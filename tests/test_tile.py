"""The loops over a tile by themselves: on this processor, on older ones, and on ARM, by qemu."""

import math
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", f"-isystem{INCLUDE}"]
TILE = ROOT / "csrc/cpu/tile.cpp"
ARM = "aarch64-linux-gnu-"
# A compiler, and what runs the result. The loops are cloned for three generations of x86-64.
PROCESSORS = {
    "this": ["g++"],
    "this, by clang": ["clang++-19"],
    "x86-64": ["g++", "qemu-x86_64", "-cpu", "qemu64"],
    "x86-64-v3": ["g++", "qemu-x86_64", "-cpu", "Haswell"],
    "aarch64": [f"{ARM}g++", "qemu-aarch64"],
}
# In the order of `Dtype`, each with the integers that have its bits.
DTYPES = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
SIZES = [1, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1000, 4099]
MEASURE, SCALE, CLAMP = range(3)
VALUES = {
    MEASURE: [1.0, 2.0, math.inf],
    SCALE: [0.3, 0.0, -0.0, 1e-5, 3.0, -1.0, 2.0**-16, 2.0**100, math.inf, math.nan],
    CLAMP: [0.0, 0.1, 1.0, 65510.0, 1e9, math.inf],
}
BORDER = 32


def tiles(dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Elements, and the offset of the first one: any bits, any size, each special number."""
    info, bits = torch.finfo(dtype), torch.iinfo(DTYPES[dtype])
    for size in SIZES:
        random = torch.randint(bits.min, bits.max, (size,), dtype=DTYPES[dtype]).view(dtype)
        # Squares of float64 stay in its range.
        finite = random.nan_to_num(1, 1, 1).double()
        finite = finite.sign() * finite.abs().clamp(1e-140, 1e140) if info.bits == 64 else finite
        for offset in (0, 1, 3):
            yield offset, torch.randn(size).to(dtype)
            yield offset, finite.to(dtype)
            yield offset, torch.randn(size, dtype=torch.float64).mul(info.smallest_normal).to(dtype)
        for bad in (math.inf, -math.inf, math.nan):
            tile = torch.randn(size).to(dtype)
            tile[torch.randint(size, ())] = bad
            yield 1, tile
        yield 1, torch.full((size,), 1 / 3, dtype=dtype)
    # Each that a dtype of 16 bits has.
    every = torch.arange(-(1 << 15), 1 << 15).to(DTYPES[dtype])
    yield 0, (every if info.bits == 16 else every * every * 40_503).view(dtype)


def is_right(loop: int, value: float, before: Tensor, found: Tensor, norm: float) -> bool:
    wide = torch.promote_types(before.dtype, torch.float32)
    if loop == MEASURE:
        x = before.double().abs()
        expected = float(x.max()) if math.isinf(value) else math.fsum((x**value).tolist())
        is_near = norm == pytest.approx(expected, rel=1e-13, abs=0, nan_ok=True)
        return is_near and torch.equal(found.view(torch.uint8), before.view(torch.uint8))
    if loop == CLAMP:
        expected = before.double().clamp(-value, value).to(before.dtype)
        return bool(((found == expected) | (found.isnan() & expected.isnan())).all())
    expected = (before.to(wide) * torch.tensor(value, dtype=wide)).to(before.dtype)
    if value == 0 and math.copysign(1, value) < 0:
        expected = torch.zeros_like(before)
    same = (found == expected) & (found.signbit() == expected.signbit())
    return bool((same | (found.isnan() & expected.isnan())).all())


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
    cases, given = [], bytearray()
    for number, dtype in enumerate(DTYPES):
        for offset, tile in tiles(dtype):
            around = torch.full((offset + len(tile) + BORDER,), 0.35, dtype=dtype)
            around[offset:-BORDER] = tile
            memory = around.view(torch.uint8).numpy().tobytes()
            start = offset * dtype.itemsize
            for loop, value in [(how, value) for how in VALUES for value in VALUES[how]]:
                cases.append((loop, value, offset, around))
                given += struct.pack("5qd", loop, number, len(memory), start, len(tile), value)
                given += memory
    said = subprocess.run([*emulator, program], input=given, capture_output=True, check=True).stdout
    place = 0
    for loop, value, offset, around in cases:
        (norm,) = struct.unpack_from("d", said, place)
        place += 8
        memory = bytearray(said[place : place + around.nbytes])
        place += around.nbytes
        found = torch.frombuffer(memory, dtype=around.dtype)
        inner = slice(offset, -BORDER)
        name = f"{loop}, {value}, {around.dtype}, {len(around)}"
        assert is_right(loop, value, around[inner], found[inner], norm), name
        found[inner] = around[inner]
        # What lies round the elements has stayed.
        assert torch.equal(found.view(torch.uint8), around.view(torch.uint8)), name


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
