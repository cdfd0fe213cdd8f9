"""Host time over DTensors, torch beside ours: with a group that sends nothing, with a real one, and
of a first call. Tiny shards, so that it is all host time."""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import utils

import fastclip
from fastclip import _gradients

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.parametrize("device", ["cpu"]),
]

SIZE = 64
# Calls of torch's in a turn; of ours, which take a twentieth of the time, 20 times as many.
TURN = 5
FUNCTIONS = {"fastclip": fastclip.clip_grad_norm_, "torch": utils.clip_grad_norm_}


def join(backend: str, rank: int, size: int, folder: str) -> Any:
    """A mesh of `size` ranks, of which this process is one; a fake group is alone with itself."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    how = {"store": FakeStore()} if backend == "fake" else {"init_method": f"file://{folder}/ranks"}
    dist.init_process_group(backend, rank=rank, world_size=size, **how)
    return dist.init_device_mesh("cpu", (size,))


def dtensors(count: int, mesh: Any) -> list[torch.nn.Parameter]:
    """Parameters whose gradients have SIZE elements on every rank."""
    from torch.distributed.tensor import DTensor, Shard

    made = []
    for _ in range(count):
        local, placements = torch.randn(SIZE), [Shard(0)] * mesh.ndim
        parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
        parameter.grad = DTensor(torch.randn(SIZE), parameter._spec, requires_grad=False)
        made.append(parameter)
    return made


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def race(made: list[torch.nn.Parameter], rounds: int) -> dict[str, float]:
    """Medians in microseconds of turns of equal length; nothing reaches the threshold."""
    calls = {name: (lambda clip=clip: clip(made, 1e9)) for name, clip in FUNCTIONS.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {"fastclip": 20 * TURN, "torch": TURN}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return {name: 1e6 * statistics.median(t) for name, t in times.items()}


def check(made: list[torch.nn.Parameter], ranks: int) -> None:
    squares = torch.stack([p.grad._local_tensor.double().square().sum() for p in made]).sum()
    if ranks > 1:
        dist.all_reduce(squares)
    found = float(fastclip.clip_grad_norm_(made, math.inf))
    assert abs(found / math.sqrt(squares) - 1) <= 2 * torch.finfo(torch.float32).eps


def in_fake_group(rank: int, folder: str, counts: list[int], rounds: int) -> dict[str, Any]:
    mesh = join("fake", rank, 8, folder)
    found: dict[str, Any] = {}
    for count in counts:
        made = dtensors(count, mesh)
        check(made, 1)
        found[str(count)] = race(made, rounds)
        read = [
            1e6 * seconds(lambda made=made: _gradients.read(made, None)) for _ in range(50 * rounds)
        ]
        found[str(count)]["extraction"] = statistics.median(read)
    return found


def in_gloo_group(rank: int, folder: str, count: int, rounds: int) -> dict[str, float]:
    made = dtensors(count, join("gloo", rank, 2, folder))
    check(made, 2)
    return race(made, rounds)


def first_call(rank: int, folder: str, name: str, count: int) -> float:
    made = dtensors(count, join("fake", rank, 8, folder))
    return 1e3 * seconds(lambda: FUNCTIONS[name](made, 1e9))


def _answer(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    pipe.send(function(*args))
    # Until it is killed: threads of gloo that outlive the interpreter abort the process
    # (pytorch#179291).
    pipe.poll(None)


def alone(function: Callable[..., Any], *args: Any, ranks: int = 1) -> Any:
    """What the function returns in a process of its own; of several, the first answer."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                work = (theirs, function, rank, folder, *args)
                processes.append(context.Process(target=_answer, args=work))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            # A process that dies closes its end: EOFError.
            assert all(pipe.poll(300) for pipe in pipes), "a rank hangs"
            answers = [pipe.recv() for pipe in pipes]
            return answers[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def compared(work: str, found: dict[str, float], unit: str = "µs") -> str:
    ratio = found["torch"] / found["fastclip"]
    ours, theirs = (f"{found[name]:,.1f}".replace(",", " ") for name in ("fastclip", "torch"))
    return f"{work}: {ours} {unit} a call, torch's {theirs} {unit}, so {ratio:.1f} times."


def scaled(found: dict[str, Any], count: int) -> str:
    """What a clip would take on more ranks: the host's time and a tree's steps up and down."""
    host = found[str(count)]
    step = (found["gloo"]["fastclip"] - host["fastclip"]) / 2
    lines = []
    for ranks in (8, 64, 1024, 16384):
        steps = 2 * round(math.log2(ranks))
        ours, theirs = ((host[name] + steps * step) / 1e3 for name in FUNCTIONS)
        lines.append(f"{ranks} ranks: {steps} steps, {ours:.1f} against {theirs:.1f} ms")
    return (
        f"On paper, for {count} DTensors: one all-reduce of 8 bytes against one of {4 * count}, "
        f"{step:.0f} µs a step, half of what gloo added above. {'; '.join(lines)}."
    )


def bench_mesh(benchmark, where, request):
    quick = request.config.getoption("--quick")
    counts, rounds = ([5, 10], 2) if quick else ([300, 1000], 25)
    few, many = counts
    found: dict[str, Any] = {}

    def run() -> None:
        found.update(alone(in_fake_group, counts, rounds))
        found["gloo"] = alone(in_gloo_group, few, rounds, ranks=2)
        repeats = 1 if quick else 3
        found["first"] = {
            name: statistics.median(alone(first_call, name, many) for _ in range(repeats))
            for name in FUNCTIONS
        }

    benchmark.pedantic(run, rounds=1)
    lines = [compared(f"{c} DTensors of {SIZE}, nothing sent", found[str(c)]) for c in counts]
    extraction = found[str(few)]["extraction"]
    lines += [
        f"Of that, {extraction:.1f} µs for {few} are the plan found and the shards taken.",
        compared(f"{few} DTensors of {SIZE} on two processes, gloo", found["gloo"]),
        scaled(found, few),
        compared(f"First call on {many} DTensors", found["first"], "ms"),
    ]
    benchmark.extra_info.update(where=where, host="\n\n".join(lines), mesh=found, correct=True)
    print(*lines, sep="\n")
