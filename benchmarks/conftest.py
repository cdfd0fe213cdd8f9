"""How all benchmarks measure: contestants take turns, on the same gradients, in one process.

So a slow second of the machine slows all contestants. The fixture `race` compares calls that return
the norm of a list and makes a row of the table; `record_text` keeps a text of all else. Both are
shown at the end of the run and kept in its JSON, from which report.py writes RESULTS.md.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from models import CUDA, FULL, HEADLINE, QUICK
from report import table

T = TypeVar("T")
Call = Callable[[], object]
ROWS = pytest.StashKey[list[dict[str, Any]]]()
TEXTS = pytest.StashKey[list[str]]()
# A turn repeats a short call for this many seconds, so that the caches are warm.
TURN = 4e-3
# Allows for rounding a float64 norm to float32, and for one addition in float32.
TOLERANCE = 2 * torch.finfo(torch.float32).eps


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: correctness, not speed")
    parser.addoption("--full", action="store_true", help="every row, for the record")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[TEXTS] = [], []
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "headline: is measured first")
    config.addinivalue_line("markers", "full: is measured with --full only")
    # pytest then names each row before it measures it, so that an aborted run shows where it was.
    config.option.verbose = max(1, config.option.verbose)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each benchmark on all available devices, with all lists that are measured there."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if "shapes" in metafunc.fixturenames:
        found = [row for device in devices for row in rows(device, metafunc.config)]
        metafunc.parametrize(("device", "name", "shapes", "dtype"), found)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(d, marks=marks(d)) for d in devices])


def marks(device: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if device == "cuda" else []


def rows(device: str, config: pytest.Config) -> list[Any]:
    """Return the lists that are measured on a device, each in all its dtypes."""
    by_mark = {"headline": HEADLINE, "": CUDA if device == "cuda" else {}, "full": FULL}
    if config.getoption("--quick"):
        by_mark = {"": QUICK}
    found: dict[str, Any] = {}
    for mark, lists in by_mark.items():
        chosen = [*marks(device), *([getattr(pytest.mark, mark)] if mark else [])]
        for name, (shapes, dtypes) in lists.items():
            for dtype in dtypes:
                row, key = (device, name, shapes, dtype), f"{device}-{name}-{dtype}"
                # A list may be in CUDA and in FULL; the first is kept, so a GPU always runs it.
                found.setdefault(key, pytest.param(*row, id=key, marks=chosen))
    return list(found.values())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (config.getoption("--full") or config.getoption("--quick")):
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: not item.get_closest_marker("headline"))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


def drain(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Call, repeats: int = 1, device: str = "cpu") -> float:
    """Return the mean wall time of `repeats` calls, with the device drained before and after."""
    drain(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    drain(device)
    return (time.perf_counter() - start) / repeats


def repeats_of(call: Call, device: str) -> int:
    """Return how many calls fill a turn of TURN seconds: at least 1, at most 200."""
    return min(200, max(1, round(TURN / seconds(call, 1, device))))


def medians(
    calls: dict[str, Call],
    rounds: int,
    turn: float = TURN,
    before: Callable[[str], object] = lambda name: None,
    device: str = "cpu",
) -> dict[str, float]:
    """Return each call's microseconds, the median over turns of `turn` seconds or one call.

    A turn begins with `before(name)`, which is not measured.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for number, (name, call) in itertools.product(range(rounds + 2), calls.items()):
        before(name)
        once = seconds(call, repeats[name], device)
        if number < 2:
            repeats[name] = max(1, int(turn / once))
        else:
            times[name].append(1e6 * once)
    return {name: statistics.median(found) for name, found in times.items()}


def oracle(tensors: list[torch.Tensor]) -> float:
    """Return the 2-norm in float64, summed by blocks so that no tensor is copied whole."""
    blocks = (b.double() for t in tensors for b in t.reshape(-1).split(1 << 22))
    return math.sqrt(math.fsum(float(b.dot(b)) for b in blocks))


def limit(bytes_: int, device: str, writes: bool) -> Callable[[], float]:
    """Return a function that measures how many seconds torch needs to move the same bytes.

    It adds up the fastest of three reads and, if the contestants write, an in-place multiplication.
    """
    flat = torch.zeros(bytes_ // 4, device=device)
    moves = [flat.sum, flat.amax, flat.view(torch.int32).sum]
    moves += [lambda: flat.mul_(1.0)] * writes
    repeats = [repeats_of(move, device) for move in moves]

    def measure() -> float:
        times = [seconds(*pair, device) for pair in zip(moves, repeats, strict=True)]
        return min(times[:3]) + sum(times[3:])

    return measure


def row_of(times: dict[str, list[float]], bytes_: int, writes: bool) -> dict[str, Any]:
    """Return a row of the table. Its GB/s count one read of the bytes, or two reads and a write."""
    ms = {name: 1e3 * statistics.median(found) for name, found in times.items() if found}
    return {
        "ms": ms,
        "speedup": ms["foreach"] / ms["fastclip"],
        "gbps": bytes_ * (3 if writes else 1) / ms["fastclip"] / 1e6,
        "of_limit": ms["limit"] / ms["fastclip"] if "limit" in ms else None,
    }


@pytest.fixture
def race(benchmark, request, device, quick):
    """Return a function that measures a row of the table and asserts that its norm is right.

    Its argument `restore` restores the gradients that the calls of a turn have clipped.
    """

    def run(
        work: str,
        dtype: str,
        tensors: list[torch.Tensor],
        contestants: dict[str, Call],
        writes: bool = False,
        restore: Call = lambda: None,
    ) -> None:
        bytes_, expected = sum(t.nbytes for t in tensors), oracle(tensors)
        error, repeats = {}, {}
        for name, call in contestants.items():
            restore()
            error[name] = abs(float(call()) - expected) / expected
            repeats[name] = repeats_of(call, device)
        # For small lists, the time of a plain read would be that of the call alone.
        bound = limit(bytes_, device, writes) if bytes_ > 32 << 20 else None
        times: dict[str, list[float]] = {name: [] for name in [*contestants, "limit"]}

        def turn(name: str) -> None:
            times[name].append(seconds(contestants[name], repeats[name], device))

        def others() -> None:
            for name in contestants:
                if name != "fastclip":
                    restore()
                    turn(name)
            if bound:
                times["limit"].append(bound())
            restore()

        rounds = 3 if quick else 7
        benchmark.pedantic(lambda: turn("fastclip"), setup=others, rounds=rounds, warmup_rounds=1)
        row = {"work": work, "dtype": dtype, "device": device, "error": error}
        row |= row_of(times, bytes_, writes) | {"calls_a_turn": repeats["fastclip"]}
        correct = error["fastclip"] <= TOLERANCE
        benchmark.extra_info.update(row=row, correct=correct)
        assert correct
        request.config.stash[ROWS].append(row)

    return run


@pytest.fixture
def record_text(benchmark, request):
    """Return a function that calls `measure` once and records `text` of what it returns."""

    def run(measure: Callable[[], T], text: Callable[[T], str]) -> None:
        benchmark.extra_info["text"] = text(benchmark.pedantic(measure))
        request.config.stash[TEXTS].append(benchmark.extra_info["text"])

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """Leave out a benchmark that was interrupted: without times it would fail the whole JSON."""
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark.stats.data]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add to the JSON of the run the version of torch, the number of threads and the GPU."""
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows, texts = config.stash[ROWS], config.stash[TEXTS]
    if rows or texts:
        terminalreporter.section("fastclip")
        parts = ["\n".join(table(rows))] * bool(rows) + texts
        terminalreporter.write("\n\n".join(parts) + "\n")
