"""The kernels against the memory they run at: bandwidth, cache, launches, alignment, bits.

Bandwidths are shares of the best plain read and copy of torch's in the same run, on every card.
"""

import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_clock import Call, race
from models import carriers, gradients

import fastclip
from fastclip import _ops

if TYPE_CHECKING:
    from gpu_rows import Bench

SOURCE = Path(__file__).parent / "launches.cu"
CHUNK = 1 << 26


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 / 4 else f"{size / 1e6:.0f} MB"


def reads(bench: "Bench") -> None:
    """The norm phase against the best plain read, and a clip against that and a copy."""
    for dtype, size in itertools.product(
        (torch.bfloat16, torch.float32), [1 << 20] if bench.quick else [1 << 29, 1 << 31, 3 << 32]
    ):
        work, name, share_of_read, share_of_both = against_plain(bench, dtype, size)
        what = f"norm of {work} {name}: % of the best plain read >= 95"
        bench.target(what, share_of_read, share_of_read >= 95)
        what = f"clip of {work} {name}: % of read and copy >= 95"
        bench.target(what, share_of_both, share_of_both >= 95)


def reuse(bench: "Bench") -> None:
    """A clip whose second read may find in the L2 cache what the first has left there."""
    for megabytes in [1] if bench.quick else [20, 40, 80, 160]:
        size = megabytes * 1_000_000 // 4096 * 4096
        work, name, _, share = against_plain(bench, torch.bfloat16, size, 1 << 20)
        # The second read is free, and what is written last stays in the cache.
        least = 110 if size <= bench.clock.l2 * 2 / 3 else 95
        what = f"clip of {work} {name}, from a cold cache: % of read and copy >= {least}"
        bench.target(what, share, share >= least)


def against_plain(
    bench: "Bench", dtype: torch.dtype, size: int, chunk: int = CHUNK
) -> tuple[str, str, float, float]:
    """Work, dtype, and what share a plain read has of a norm, and read and copy of a clip, in %.

    The gradients are views into the memory that is read and copied: large ones stand there once.
    """
    flat = torch.empty(size // 4, dtype=torch.int32, device=bench.device)
    grads = [part.view(dtype).normal_() for part in flat.split(min(size, chunk) // 4)]
    target, floats = torch.empty_like(flat), flat.view(torch.float32)
    made, norm, clips = carriers(grads), float(_ops.norm(grads, 2.0)), itertools.count(1)
    plain: dict[str, Call] = {
        "sum of floats": floats.sum,
        "sum of ints": lambda: flat.sum(dtype=torch.int32),
        "maximum of ints": flat.amax,
    }
    contestants: dict[str, Call] = plain | {
        "norm": lambda: _ops.norm(grads, 2.0),
        "unclipped": lambda: fastclip.clip_grad_norm_(made, 1e30),
        "clipped": lambda: fastclip.clip_grad_norm_(made, norm * 0.98 ** next(clips)),
        "copy": lambda: target.copy_(flat),
    }
    ms, late = race(bench.clock, contestants)
    read = min(ms[name] for name in plain)
    work, name = gigabytes(size), str(dtype).removeprefix("torch.")
    bench.row(work, name, ms, bytes=size, late=late)
    return work, name, 100 * read / ms["norm"], 100 * (read + ms["copy"]) / ms["clipped"]


def odd(bench: "Bench") -> None:
    """Misaligned views against aligned ones, mixed lists against plain ones."""
    size = 10_000 if bench.quick else 64 << 20
    for dtype in (torch.bfloat16, torch.float32):
        memory = torch.empty(size + 8, dtype=dtype, device=bench.device).normal_()
        views = {f"offset {k}": [memory[k : k + size]] for k in (0, 1, 2)}
        name = str(dtype).removeprefix("torch.")
        contestants = {work: lambda v=v: _ops.norm(v, 2.0) for work, v in views.items()}
        ms, late = race(bench.clock, contestants)
        bench.row("norm of a view", name, ms, bytes=size * dtype.itemsize, late=late)
        same = all(
            torch.equal(_ops.norm([v[0].clone()], 2.0), _ops.norm(v, 2.0)) for v in views.values()
        )
        bench.target(f"same bits at any offset, {name}", "", same)
    shapes = [(100, 7)] * 4 if bench.quick else [(1024, 1024)] * 128
    lists = {dtype: gradients(shapes, dtype, bench.device) for dtype in ("bf16", "fp32", "in turn")}
    contestants = {name: lambda g=g: _ops.norm(g, 2.0) for name, g in lists.items()}
    ms, late = race(bench.clock, contestants)
    bench.row("norm of 128 x 1 Mi, of one dtype and of two", "-", ms, late=late)
    share = 50 * (ms["bf16"] + ms["fp32"]) / ms["in turn"]
    bench.target("a list of two dtypes: % of the speed of lists of one >= 95", share, share >= 95)


def bits(bench: "Bench") -> None:
    """The same bits over a thousand runs, with another stream busy and under replay."""
    small = [(1 << 12,), (333, 777)] * 9
    large = [*small, *[(1 << 20,)] * (2 if bench.quick else 100)]
    for work, shapes in {"a small list": small, "200 MB": large}.items():
        source = gradients(shapes, "mixed", bench.device)
        grads = [g.clone() for g in source]
        first: list[torch.Tensor] = []

        def clip(grads: Any = grads, source: Any = source) -> torch.Tensor:
            torch._foreach_copy_(grads, source)
            return _ops.clip_norm_(grads, 1.0, 2.0)

        norms: list[torch.Tensor] = []
        replay = bench.clock.replay(lambda clip=clip, norms=norms: norms.append(clip()))
        noise = torch.randn(512 if bench.quick else 4096, 512, device=bench.device)
        side = torch.cuda.Stream() if bench.device == "cuda" else None
        same = True
        for run in range(20 if bench.quick else 1000):
            with torch.cuda.stream(side):
                noise @ noise.T
            if run % 2:
                replay()
            found = [norms[-1] if run % 2 else clip(), *grads]
            first = first or [t.clone() for t in found]
            same = same and all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
        what = f"{work}: same bits over 1 000 runs and replays, another stream busy"
        bench.target(what, "", same)


def launches(bench: "Bench") -> None:
    """Kernels alone, from launches.cu."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launches"
        major, minor = torch.cuda.get_device_capability()
        flags = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr"]
        command = ["nvcc", *flags, f"-arch=sm_{major}{minor}", str(SOURCE), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"launches.cu: {(built.stderr or built.stdout)[:150]}")
        result = subprocess.run([program], capture_output=True, text=True)
    # What it said before it failed, if it did, is kept.
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if lines:
        judge(bench, [json.loads(line) for line in lines])
    if result.returncode or not lines:
        raise RuntimeError(f"launches ended with {result.returncode}: {result.stderr[-150:]}")


def judge(bench: "Bench", times: list[dict[str, Any]]) -> None:
    """Rows of what launches.cu has measured, and its targets."""
    by_size: dict[float, dict[str, dict[str, Any]]] = {}
    for time in times:
        by_size.setdefault(time["megabytes"], {})[time["launch"]] = time
    costs = []
    for megabytes, found in by_size.items():
        ms = {name: time["us"] / 1e3 for name, time in found.items()}
        late = sorted(name for name, time in found.items() if time["late"])
        bench.row(f"launches, {megabytes:g} MB", "fp32", ms, bytes=megabytes * 1e6, late=late)
        # Beyond the cache both phases in one launch are not what a call does.
        is_fused = 1e6 * megabytes <= bench.clock.l2
        chosen = "fused, nothing to clip" if is_fused else "apart, nothing to clip"
        costs.append(1e3 * (ms[chosen] - ms["norm phase"]))
        if is_fused:
            ratio = ms["apart, clips"] / ms["fused, clips"]
            what = f"clip of {megabytes:g} MB: two launches over one, in time >= 1"
            bench.target(what, ratio, ratio >= 1)
    cost = max(costs)
    bench.target("a call that clips nothing: us beyond the norm phase <= 5", cost, cost <= 5)
