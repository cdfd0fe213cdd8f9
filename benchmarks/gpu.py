"""All there is to ask of a GPU, in one command: python benchmarks/gpu.py [--out gpu.json]

Builds if needed, runs the CUDA tests, measures against torch and whatever peer can be imported,
and ends in a table of targets, met or not. `report.py` makes a block of RESULTS.md from the JSON.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import gpt2, llama, llama_7b, parameters
from report import targets_table
from steps import SCALE, TORCH, step_of
from torch.nn import utils

HERE = Path(__file__).parent
ROOT = HERE.parent
Call = Callable[[], Any]
TESTS_S = 240
SANITIZER_S = 90
TURNS = 9
# Gradients of small lists are laid out again and again, to more than any L2 cache holds.
ROTATION = 1 << 30


class Gpu:
    """The clock of a device, and its graphs."""

    name = "cuda"

    def ms(self, call: Call, repeats: int) -> float:
        """Device time of one call, over `repeats` of them."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats

    def wall_ms(self, call: Call, repeats: int) -> float:
        """Host and device time of a call that is waited for."""
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def replay(self, call: Call) -> Call:
        """The call, captured in a graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def race(
    clock: Gpu,
    contestants: dict[str, Call],
    repeats: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Milliseconds of each, the median of turns that they take one after the other."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS + 1):
        for name, call in contestants.items():
            before(name)
            times[name].append(clock.ms(call, repeats))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def rotated(made: list[Any], call: Callable[[Any], Any]) -> Call:
    """Each call on the next of `made`."""
    turn = 0

    def next_call() -> Any:
        nonlocal turn
        turn += 1
        return call(made[turn % len(made)])

    return next_call


def size_of(made: list[torch.nn.Parameter]) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in made)


def copies(shapes: list[Any], dtype: str, device: str) -> list[list[torch.nn.Parameter]]:
    first = parameters(shapes, dtype, device)
    count = max(1, math.ceil(ROTATION / max(1, size_of(first)))) if device == "cuda" else 2
    return [first, *(parameters(shapes, dtype, device) for _ in range(min(count, 256) - 1))]


def peers() -> dict[str, Callable[..., Any]]:
    """clip_grad_norm_ of the other libraries that this Python can import."""
    found: dict[str, Callable[..., Any]] = {}
    with contextlib.suppress(ImportError):
        found["apex"] = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
    with contextlib.suppress(ImportError):
        kernels = importlib.import_module("transformer_engine.pytorch.optimizers")

        def engine(made: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
            """As Megatron calls it: the host waits for the norm, then scales if it must."""
            grads = [p.grad for p in made]
            overflow = torch.zeros(1, dtype=torch.int32, device=grads[0].device)
            apply, measure = kernels.multi_tensor_applier, kernels.multi_tensor_l2norm
            norm, _ = apply(measure, overflow, [grads], False)
            coef = max_norm / (norm.item() + 1e-6)
            if coef < 1:
                apply(kernels.multi_tensor_scale, overflow, [grads, grads], coef)
            return norm

        found["TransformerEngine"] = engine
    return found


class Bench:
    """Rows of times and the targets they meet; what fails is a row as well and ends nothing."""

    def __init__(self, clock: Gpu, quick: bool = False) -> None:
        self.clock, self.quick, self.device = clock, quick, clock.name
        self.rows: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        if quick:
            tiny = [(300, 70), (70,), (3, 3), ()] * 3
            self.lists = {"quick": (tiny, "fp32"), "quick mixed": (tiny, "mixed")}
        else:
            self.lists = {
                "Llama 2 7B": (llama_7b(), "bf16"),
                "GPT-2": (gpt2(), "fp32"),
                "Llama 1B / 4": (llama(), "mixed"),
            }

    def run(self) -> None:
        for step in (self.reads, self.models, self.steps, self.small, self.odd, self.bits):
            start = time.perf_counter()
            try:
                step()
            except Exception as error:
                self.target(f"{step.__name__}: {type(error).__name__}: {error}"[:200], "", None)
            print(f"{step.__name__}: {time.perf_counter() - start:.0f} s", flush=True)

    def row(self, work: str, ms: dict[str, float], **facts: Any) -> None:
        self.rows.append({"work": work, "ms": ms, **facts})

    def target(self, what: str, value: Any, met: bool | None) -> None:
        value = f"{value:.3g}" if isinstance(value, float) else value
        self.targets.append({"target": what, "value": value, "met": met})

    def reads(self) -> None:
        """The norm phase against the best plain read, and a clip against that and a copy."""
        for dtype in ("bf16", "fp32"):
            for size in [1e6] if self.quick else [0.5e9, 2e9, 13e9]:
                self.read(dtype, size)

    def read(self, dtype: str, size: float) -> None:
        import fastclip
        from fastclip import _ops

        width = 2 if dtype == "bf16" else 4
        elements = int(min(size, 64e6)) // width
        shapes = [(elements,)] * max(1, int(size / width / elements))
        made = parameters(shapes, dtype, self.device)
        grads = [p.grad for p in made]
        total = size_of(made)
        flat = torch.cat([g.view(torch.int32) for g in grads])
        target = torch.empty_like(flat)
        norm = float(_ops.norm(grads, 2.0))
        shrink = itertools.count(1)
        reads = {"sum": flat.view(torch.float32).sum, "amax": flat.amax, "int sum": flat.sum}
        contestants: dict[str, Call] = {
            "norm": lambda: _ops.norm(grads, 2.0),
            "unclipped": lambda: fastclip.clip_grad_norm_(made, 1e30),
            "clipped": lambda: fastclip.clip_grad_norm_(made, norm * 0.998 ** next(shrink)),
            "copy": lambda: target.copy_(flat),
        }
        ms = race(self.clock, contestants | reads, repeats=2 if size > 5e9 else 8)
        read = min(ms[name] for name in reads)
        work = f"{total / 1e9:.1f} GB"
        self.row(work, ms, dtype=dtype, bytes=total)
        share = 100 * read / ms["norm"]
        self.target(f"norm of {work} {dtype}: % of the best plain read >= 95", share, share >= 95)
        if size > 1e9:
            speed = total / ms["norm"] / 1e9
            self.target(f"norm of {work} {dtype}: TB/s >= 4.2 (H200)", speed, speed >= 4.2)
        share = 100 * (read + ms["copy"]) / ms["clipped"]
        self.target(f"clip of {work} {dtype}: % of read and copy >= 95", share, share >= 95)

    def models(self) -> None:
        """clip_grad_norm_ on the gradients of models, beside torch's and peers'."""
        for name, (shapes, dtype) in self.lists.items():
            made = copies(shapes, dtype, self.device)
            self.model(f"{name}, unclipped", dtype, made, clips=False)
            self.model(f"{name}, clipped", dtype, made[:1], clips=True)

    def model(
        self, work: str, dtype: str, made: list[list[torch.nn.Parameter]], clips: bool
    ) -> None:
        import fastclip

        grads = [p.grad for p in made[0]]
        originals = [g.clone() for g in grads]
        norm = self.oracle(grads)
        step = itertools.count()

        def restore(name: str) -> None:
            nonlocal step
            if clips:
                step = itertools.count(1)
                torch._foreach_copy_(grads, originals)

        def threshold() -> float:
            return norm * 0.98 ** next(step) if clips else 1e9

        functions: dict[str, Callable[..., Any]] = {
            "fastclip": fastclip.clip_grad_norm_,
            "foreach": lambda *args: utils.clip_grad_norm_(*args, foreach=True),
            "loop": lambda *args: utils.clip_grad_norm_(*args, foreach=False),
            **peers(),
        }
        contestants = {
            name: rotated(made, lambda m, f=f: f(m, threshold())) for name, f in functions.items()
        }
        if not clips:
            for name in ("fastclip", "foreach"):
                call = functions[name]
                captured = self.clock.replay(lambda call=call: call(made[0], 1e9))
                contestants[f"{name}, replayed"] = captured
        ms = race(self.clock, contestants, repeats=4, before=restore)
        ratio = ms["foreach"] / ms["fastclip"]
        self.row(work, ms, dtype=dtype, bytes=size_of(made[0]))
        least = {"fp32": 1.1, "bf16": 1.2, "mixed": 1.0} if clips else {"mixed": 4.0}
        enough = least.get(dtype, 3.0)
        self.target(f"{work}, {dtype}: x foreach >= {enough}", ratio, ratio >= enough)

    def steps(self) -> None:
        """A training step with a scaler, in torch's sequence and in ours; and what it moves."""
        for clips in (False, True):
            self.step(f"a step of GPT-2, clip {'active' if clips else 'not active'}", clips)

    def step(self, work: str, clips: bool) -> None:
        made = parameters(self.lists["quick" if self.quick else "GPT-2"][0], "fp32", self.device)
        for parameter in made:
            parameter.data.normal_()
        grads = [p.grad.mul_(SCALE) for p in made]
        originals = [g.clone() for g in grads]
        flat = torch.cat([g.reshape(-1) for g in grads])
        target = torch.empty_like(flat)
        step = step_of(made, 1e-3 if clips else 1e9, True, clips)

        def before(name: str) -> None:
            torch._foreach_copy_(grads, originals)
            step.before(name)

        ms = race(self.clock, {**step.ways, "copy": lambda: target.copy_(flat)}, 1, before)
        self.row(work, ms, dtype="fp32", bytes=size_of(made))
        for name, passes in step.passes.items():
            ratio, seen = ms[TORCH] / ms[name], 2 * ms[name] / ms["copy"]
            if name != TORCH:
                self.target(f"{work}, {name}: x torch >= 1.25", ratio, ratio >= 1.25)
            what = f"{work}, {name}: N at the speed of a copy, {passes} within 10 %"
            self.target(what, seen, abs(seen / passes - 1) <= 0.1)

    def small(self) -> None:
        """Wall time on a thousand tensors; what a call that clips nothing adds to the norm."""
        import fastclip

        made = copies([(1024,)] * (20 if self.quick else 1000), "fp32", self.device)
        ms = {
            "fastclip": rotated(made, lambda m: fastclip.clip_grad_norm_(m, 1e9)),
            "foreach": rotated(made, lambda m: utils.clip_grad_norm_(m, 1e9, foreach=True)),
        }
        wall = {name: self.clock.wall_ms(call, 50) for name, call in ms.items()}
        ratio = wall["foreach"] / wall["fastclip"]
        self.row("1000 x 1024, wall", wall, dtype="fp32", speedup=ratio)
        self.target("1000 x 1024: x foreach >= 15", ratio, ratio >= 15)
        microseconds = 1e3 * wall["fastclip"]
        self.target("1000 x 1024: us of wall time <= 60", microseconds, microseconds <= 60)

    def odd(self) -> None:
        """Misaligned views against aligned ones."""
        from fastclip import _ops

        size = 10_000 if self.quick else 64 << 20
        for dtype in (torch.bfloat16, torch.float32):
            memory = torch.randn(size + 8, device=self.device).to(dtype)
            views = {f"offset {k}": [memory[k : k + size]] for k in (0, 1, 2)}
            contestants = {name: lambda v=v: _ops.norm(v, 2.0) for name, v in views.items()}
            norms = {
                float(_ops.norm([v[0].clone()], 2.0)) == float(_ops.norm(v, 2.0))
                for v in views.values()
            }
            self.row(
                "norm of a view", race(self.clock, contestants, repeats=8), dtype=str(dtype)[6:]
            )
            self.target(f"same bits at any offset, {dtype}", "", norms == {True})

    def bits(self) -> None:
        """The same bits over a thousand runs, with another stream busy and under replay."""
        from fastclip import _ops

        grads = [p.grad for p in parameters([(1 << 12,), (333, 777)] * 9, "mixed", self.device)]
        noise = torch.randn(512 if self.quick else 4096, 512, device=self.device)
        captured: list[torch.Tensor] = []
        replay = self.clock.replay(lambda: captured.append(_ops.norm(grads, 2.0)))
        side = torch.cuda.Stream() if self.device == "cuda" else None
        first, same = float(_ops.norm(grads, 2.0)), True
        for _ in range(20 if self.quick else 1000):
            with torch.cuda.stream(side):
                noise @ noise.T
            replay()
            same = same and float(_ops.norm(grads, 2.0)) == first == float(captured[-1])
        self.target("same bits over 1 000 runs, another stream busy, and replays", "", same)

    def oracle(self, grads: list[torch.Tensor]) -> float:
        """The norm in float64, blockwise; a target says how far ours is off."""
        from fastclip import _ops

        blocks = (b.double() for g in grads for b in g.reshape(-1).split(1 << 26))
        norm = math.sqrt(math.fsum(float(b.dot(b)) for b in blocks))
        error = abs(float(_ops.norm(grads, 2.0)) - norm) / norm
        what = f"relative error of the norm of {len(grads)} tensors <= 2.4e-7"
        self.target(what, error, error <= 2.4e-7)
        return norm


def launches(folder: Path) -> list[dict[str, Any]]:
    """Kernels alone, from launches.cu."""
    program, source = folder / "launches", HERE / "launches.cu"
    flags = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-arch=native"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True, timeout=90).stdout
    return [json.loads(line) for line in said.splitlines()]


def judge_launches(bench: Bench, times: list[dict[str, Any]]) -> None:
    us = {(t["launch"], t["megabytes"]): t["us"] for t in times}
    sizes = sorted({megabytes for _, megabytes in us})
    for megabytes in sizes:
        ms = {name: us[name, size] / 1e3 for name, size in us if size == megabytes}
        bench.row(f"launches, {megabytes:.0f} MB", ms, dtype="fp32")
    skip = max(us["fused, nothing to clip", s] - us["norm phase", s] for s in sizes)
    bench.target("a call that clips nothing: us beyond the norm phase <= 3", skip, skip <= 3)


def prepare() -> None:
    """Build the extension for this GPU unless it is there."""
    asked = "from fastclip import _ops; raise SystemExit(not _ops.has_kernels('cuda'))"
    if subprocess.run([sys.executable, "-W", "ignore", "-c", asked], cwd=ROOT).returncode:
        major, minor = torch.cuda.get_device_capability()
        environment = {
            "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
            "FASTCLIP_CUDA": "1",
            **os.environ,
        }
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


def tested(command: list[str], seconds: int) -> tuple[str, bool]:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no end after {seconds} s", False
    print(result.stdout[-3000:] + result.stderr[-1000:], flush=True)
    last = (result.stdout or result.stderr).strip().splitlines()
    return last[-1] if last else "", result.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure")
    start = time.perf_counter()
    prepare()
    sys.path.insert(0, str(ROOT))
    bench = Bench(Gpu())
    pytest = [sys.executable, "-m", "pytest", "-q", "-rf", "-m", "cuda"]
    bench.target("pytest -m cuda", *tested(pytest, TESTS_S))
    if sanitizer := shutil.which("compute-sanitizer"):
        some = [*pytest, "tests/test_ops.py", "-k", "offset and op"]
        bench.target(
            "compute-sanitizer", *tested([sanitizer, "--error-exitcode=9", *some], SANITIZER_S)
        )
    bench.run()
    with tempfile.TemporaryDirectory() as folder:
        try:
            judge_launches(bench, launches(Path(folder)))
        except (OSError, subprocess.SubprocessError) as error:
            bench.target(f"launches.cu: {error}"[:200], "", None)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "-",
        "seconds": round(time.perf_counter() - start),
    }
    record = {"where": where, "gpu": True, "rows": bench.rows, "targets": bench.targets}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(targets_table(bench.targets)))


if __name__ == "__main__":
    main()
