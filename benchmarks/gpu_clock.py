"""Time on a device, call by call: from a cold cache, without the host's part.

`Cuda` measures between two events. `Cpu` stands in for it, so that all of the command but the GPU
runs anywhere.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
TURNS = 9
# In these a contestant compiles, loads its kernels, and finds how far ahead the host has to be.
WARM_UP = 4
# More than any clock runs: a delay may be longer than asked for.
CYCLES_PER_MS = 2e6


class Cuda:
    """The clock of a GPU, its cache and its graphs."""

    name = "cuda"

    def __init__(self) -> None:
        self.l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
        self.strange = torch.zeros(self.l2, dtype=torch.int32, device=self.name)

    def flush(self) -> None:
        """Fills the L2 cache with what nobody asks for.

        Read, not written: lines that have to be written back would be so in a contestant's time.
        """
        self.strange.amax()

    def ms(self, call: Call, delay: float) -> tuple[float, bool]:
        """Device time of one call, and whether the host was ahead: the first event had not yet
        happened when the last kernel was enqueued, for the stream was kept busy for `delay` ms."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        torch.cuda._sleep(int(delay * CYCLES_PER_MS))
        start.record()
        call()
        is_ahead = not start.query()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop), is_ahead

    def wall_ms(self, call: Call, cold: bool) -> float:
        """Host and device time of a call that is waited for."""
        if cold:
            self.flush()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

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

    def wait(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        """Memory back to the device, and the peak of it from here on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class Cpu(Cuda):
    """Stands in: what has no meaning here does nothing."""

    name = "cpu"
    l2 = 32 << 20

    def __init__(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def ms(self, call: Call, delay: float) -> tuple[float, bool]:
        return self.wall_ms(call, False), True

    def wall_ms(self, call: Call, cold: bool) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def replay(self, call: Call) -> Call:
        return call

    def wait(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def peak(self) -> int:
        return 0


def race(
    clock: Cuda, contestants: dict[str, Call], before: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of each, the median of turns that they take one after the other; and whose
    include the host's time, since it could not be ahead: it waits for the device, or enqueues more
    than a stream holds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    delays = dict.fromkeys(contestants, 1.0)
    late = set()
    for turn, (name, call) in itertools.product(range(WARM_UP + TURNS), contestants.items()):
        before(name)
        ms, is_ahead = clock.ms(call, delays[name])
        if turn >= WARM_UP:
            times[name].append(ms)
            late |= set() if is_ahead else {name}
        elif not is_ahead and turn > 0:
            delays[name] *= 4
    return {name: statistics.median(t) for name, t in times.items()}, sorted(late)


def race_walls(clock: Cuda, contestants: dict[str, Call], cold: bool) -> dict[str, float]:
    """Milliseconds of wall time of each, the median of turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn, (name, call) in itertools.product(range(5 * TURNS), contestants.items()):
        ms = clock.wall_ms(call, cold)
        if turn >= WARM_UP:
            times[name].append(ms)
    return {name: statistics.median(t) for name, t in times.items()}
