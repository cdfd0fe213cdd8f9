"""Time clips of DTensors, ours and torch's: in a group that sends nothing, on two processes, and in
the first call of a process. The shards are tiny, so that almost all time is the host's."""

import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_host import Model, Times, host_table, measured
from conftest import TOLERANCE, medians, seconds
from models import dtype_of
from torch.nn import utils

import fastclip
from fastclip import _ops

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(_ops.extension is None, reason="no extension to measure"),
]

SIZE = 64
FUNCTIONS = {"fastclip": fastclip.clip_grad_norm_, "torch": utils.clip_grad_norm_}


def join(backend: str, rank: int, shape: tuple[int, ...], folder: str) -> Any:
    """Return a mesh with this process as one rank; with backend "fake" there are no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    how = {"store": FakeStore()} if backend == "fake" else {"init_method": f"file://{folder}/ranks"}
    dist.init_process_group(backend, rank=rank, world_size=math.prod(shape), **how)
    return dist.init_device_mesh("cpu", shape)


def dtensors(count: int, mesh: Any, dtype: str = "fp32") -> list[torch.nn.Parameter]:
    """Return parameters whose gradients have SIZE elements on every rank."""
    from torch.distributed.tensor import DTensor, Shard

    made, placements, kind = [], [Shard(0)] * mesh.ndim, dtype_of((SIZE,), dtype, 0)
    for _ in range(count):
        local, grad = (torch.randn(SIZE, dtype=kind) for _ in range(2))
        parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
        parameter.grad = DTensor(grad, parameter._spec, requires_grad=False)
        made.append(parameter)
    return made


def calls_of(made: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Return our call and torch's, with a threshold so high that they clip nothing."""
    return {name: lambda clip=clip: clip(made, 1e9) for name, clip in FUNCTIONS.items()}


def check(made: list[torch.nn.Parameter], ranks: int) -> None:
    """Assert that the norm is right; if nothing is sent, it is the norm of the local shards."""
    squares = torch.stack([p.grad._local_tensor.double().square().sum() for p in made]).sum()
    if ranks > 1:
        dist.all_reduce(squares)
    found = float(fastclip.clip_grad_norm_(made, math.inf))
    assert abs(found / math.sqrt(squares) - 1) <= TOLERANCE


def in_fake_group(
    rank: int, folder: str, count: int, shape: tuple[int, ...], dtype: str, rounds: int
) -> Times:
    """Return the times of the calls in a group that sends nothing."""
    made, model = dtensors(count, join("fake", rank, shape, folder), dtype), Model(count)
    check(made, 1)

    def backward(name: str) -> None:
        for parameter in made:
            local = torch.randn(SIZE, dtype=parameter.dtype)
            parameter.grad = type(parameter.grad)(local, parameter._spec, requires_grad=False)
        model.backward(name)

    return measured(calls_of(made), backward, rounds)


def in_gloo_group(rank: int, folder: str, count: int, rounds: int) -> dict[str, float]:
    """Return the microseconds of each call on one of two processes that communicate."""
    made = dtensors(count, join("gloo", rank, (2,), folder))
    check(made, 2)
    # A turn is one call. The calls in longer turns depend on each process's clock, and a process
    # that makes one call more than the other would wait for it forever.
    return medians(calls_of(made), rounds, 0.0)


def first_call(rank: int, folder: str, name: str, count: int) -> float:
    """Return the microseconds that the first call of a process takes."""
    made = dtensors(count, join("fake", rank, (8,), folder))
    return 1e6 * seconds(lambda: FUNCTIONS[name](made, 1e9))


def _answer(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    pipe.send(function(*args))
    # Wait to be killed: threads of gloo that outlive the interpreter abort the process
    # (pytorch#179291).
    pipe.poll(None)


def spawn(function: Callable[..., Any], *args: Any, ranks: int = 1) -> Any:
    """Run the function on `ranks` new processes, and return what it returns on rank 0."""
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
            # A process that dies closes its end of the pipe, and recv raises EOFError.
            assert all(pipe.poll(300) for pipe in pipes), "a rank hangs"
            answers = [pipe.recv() for pipe in pipes]
            return answers[0]
        finally:
            for process in processes:
                process.kill()
                process.join()


def compared(work: str, us: dict[str, float]) -> str:
    ours, theirs = (f"{us[name] / 1e3:,.2f}".replace(",", " ") for name in FUNCTIONS)
    ratio = us["torch"] / us["fastclip"]
    return f"{work}: {ours} ms, torch's {theirs} ms, so {ratio:.1f} times."


@pytest.mark.parametrize(
    ("count", "ranks", "dtype"),
    [
        pytest.param(300, "8", "fp32", marks=pytest.mark.headline),
        pytest.param(300, "8", "bf16", marks=pytest.mark.headline),
        pytest.param(300, "4 x 2", "fp32", marks=pytest.mark.full),
        pytest.param(1000, "8", "fp32", marks=pytest.mark.full),
        pytest.param(1000, "4 x 2", "fp32", marks=pytest.mark.full),
    ],
)
def bench_dtensors(record_text, quick, count, ranks, dtype):
    count, rounds = (5, 2) if quick else (count, 25)
    shape = tuple(map(int, ranks.split(" x ")))
    work = f"{count} DTensors, {dtype}, mesh of {ranks}"
    record_text(
        lambda: spawn(in_fake_group, count, shape, dtype, rounds),
        lambda found: host_table([(work, found)]),
    )


def bench_two_processes(record_text, quick):
    count, rounds = (5, 2) if quick else (300, 100)
    work = f"{count} DTensors of {SIZE} on two processes, gloo"
    record_text(
        lambda: spawn(in_gloo_group, count, rounds, ranks=2), lambda found: compared(work, found)
    )


def bench_first_call(record_text, quick):
    count, repeats = (10, 1) if quick else (1000, 3)

    def measure() -> dict[str, float]:
        times = {
            name: [spawn(first_call, name, count) for _ in range(repeats)] for name in FUNCTIONS
        }
        return {name: statistics.median(found) for name, found in times.items()}

    record_text(measure, lambda found: compared(f"First call on {count} DTensors", found))
