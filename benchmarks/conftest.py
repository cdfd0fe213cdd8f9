"""A race: all contestants on the same gradients, in turns, inside one process.

pytest-benchmark times fastclip; before each of its rounds every other contestant takes its turn,
so that a slow second of the machine slows all of them.
"""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import QUICK, SHAPES
from report import table

ROWS = pytest.StashKey[list[dict[str, Any]]]()
# A turn of tiny work is repeated to this length, warm as in a training loop.
TURN_MS = 4.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: correctness, not speed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shapes" in metafunc.fixturenames:
        chosen = QUICK if metafunc.config.getoption("--quick") else SHAPES
        works = [(name, shapes, d) for name, (shapes, dtypes) in chosen.items() for d in dtypes]
        ids = [f"{name}-{d}" for name, _, d in works]
        metafunc.parametrize(("name", "shapes", "dtype"), works, ids=ids)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Wall time of one call, over `repeats` of them, the device drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def medians(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    turn: float = 4e-3,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Microseconds of a call, in turns of `turn` seconds or one call, after `before(name)`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for i in range(rounds + 2):
        for name, call in calls.items():
            before(name)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            once = (time.perf_counter() - start) / repeats[name]
            if i < 2:
                repeats[name] = max(1, int(turn / once))
            else:
                times[name].append(1e6 * once)
    return {name: statistics.median(found) for name, found in times.items()}


def oracle(tensors: list[torch.Tensor]) -> float:
    """The 2-norm in float64, blockwise."""
    blocks = (b.double() for t in tensors for b in t.reshape(-1).split(1 << 22))
    return math.sqrt(math.fsum(float(b.dot(b)) for b in blocks))


def limit(bytes_: int, device: str, writes: bool) -> Callable[[], float]:
    """Seconds for the bytes that must move: the fastest plain read, and a read and write."""
    flat = torch.zeros(bytes_ // 4, device=device)
    reads = [flat.sum, flat.amax, flat.view(torch.int32).sum]

    def measure() -> float:
        read = min(seconds(r, 1, device) for r in reads)
        return read + (seconds(lambda: flat.mul_(1.0), 1, device) if writes else 0.0)

    return measure


@pytest.fixture
def where(device: str) -> dict[str, str]:
    """What a number means nothing without."""
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if device == "cpu" else ():
        if line.startswith("model name"):
            processor = f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    name = torch.cuda.get_device_name() if device == "cuda" else processor
    return {"device": name, "torch": torch.__version__, "commit": commit.stdout.strip() or "-"}


@pytest.fixture
def race(benchmark, request, device, where):
    """One row of the table, asserted correct; `restore` undoes what a turn has clipped."""

    def run(
        work: str,
        dtype: str,
        tensors: list[torch.Tensor],
        contestants: dict[str, Callable[[], torch.Tensor]],
        writes: bool,
        restore: Callable[[], None],
    ) -> None:
        bytes_ = sum(t.numel() * t.element_size() for t in tensors)
        error, repeats = {}, {}
        for name, call in contestants.items():
            restore()
            expected = oracle(tensors)
            error[name] = abs(float(call()) - expected) / expected
            repeats[name] = min(200, max(1, round(TURN_MS / 1e3 / seconds(call, 1, device))))
        # A plain read of next to nothing measures its own call.
        bound = limit(bytes_, device, writes) if bytes_ > 32 << 20 else None
        times: dict[str, list[float]] = {name: [] for name in [*contestants, "limit"]}

        def others() -> None:
            for name, call in contestants.items():
                if name != "fastclip":
                    restore()
                    times[name].append(seconds(call, repeats[name], device))
            if bound:
                times["limit"].append(bound())
            restore()

        def ours() -> None:
            call = contestants["fastclip"]
            times["fastclip"].append(seconds(call, repeats["fastclip"], device))

        rounds = 3 if request.config.getoption("--quick") else 7
        benchmark.pedantic(ours, setup=others, rounds=rounds, warmup_rounds=1)
        ms = {name: 1e3 * statistics.median(t) for name, t in times.items() if t}
        row = {
            "work": work,
            "dtype": dtype,
            "ms": ms,
            "speedup": ms["foreach"] / ms["fastclip"],
            "gbps": bytes_ * (3 if writes else 1) / ms["fastclip"] / 1e6,
            "of_limit": ms["limit"] / ms["fastclip"] if bound else None,
            "error": error,
            "calls_a_turn": repeats["fastclip"],
        }
        correct = error["fastclip"] <= 2 * torch.finfo(torch.float32).eps
        benchmark.extra_info.update(row=row, where=where, correct=correct)
        assert correct
        request.config.stash[ROWS].append(row)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("fastclip")
        terminalreporter.write("\n".join(table(config.stash[ROWS])) + "\n")
