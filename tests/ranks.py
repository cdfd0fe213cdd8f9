"""Real processes, one a rank, that run functions together, and a time limit on each function."""

import functools
import inspect
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def join_gloo(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


class World:
    """Processes of one group. They live until a function fails in one, or hangs."""

    def __init__(self, size: int, folder: Path, join: Callable[..., None] = join_gloo) -> None:
        self.size, self.folder, self.join = size, folder, join
        self.ranks: list[tuple[Any, Connection]] = []
        self.started = 0

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
        """What `function(*args)` returns on each rank; an error of any, or a hang, is raised."""
        if not self.ranks:
            self._start()
        for _, pipe in self.ranks:
            pipe.send((function, args))
        answers, errors = {}, []
        deadline = time.monotonic() + seconds
        while len(answers) < self.size and not errors and time.monotonic() < deadline:
            for rank, (_, pipe) in enumerate(self.ranks):
                if rank not in answers and pipe.poll(0.002):
                    try:
                        answers[rank], error = pipe.recv()
                    except EOFError:
                        error = "its process has ended"
                    errors += [f"rank {rank}: {error}"] if error else []
        if errors or len(answers) < self.size:
            self.stop()
            waiting = sorted({*range(self.size)} - {*answers})
            raise AssertionError("\n".join(errors) or f"ranks {waiting} hang after {seconds} s")
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process, _ in self.ranks:
            process.kill()
            process.join()
        self.ranks = []

    def _start(self) -> None:
        self.started += 1
        store = f"file://{self.folder / f'{self.size}-{self.started}'}"
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, self.join, theirs)
            )
            process.daemon = True
            process.start()
            self.ranks.append((process, ours))
        for _, pipe in self.ranks:
            if not pipe.poll(120):
                self.stop()
                raise AssertionError("the ranks did not start in 120 s")
            pipe.recv()


def on_ranks(*sizes: int, seconds: float = 60) -> Callable[[Callable[..., None]], Any]:
    """Run a test on every rank of a world of each of these sizes, which it may ask for as `size`.

    The fixture `world` is in conftest.py.
    """

    def decorate(function: Callable[..., None]) -> Any:
        wanted = inspect.signature(function).parameters

        @functools.wraps(function)
        def test(world: Callable[[int], World], size: int, **given: Any) -> None:
            given["size"] = size
            world(size).run(test, *(given[name] for name in wanted), seconds=seconds)

        own = list(inspect.signature(test, follow_wrapped=False).parameters.values())[:2]
        others = [value for name, value in wanted.items() if name != "size"]
        test.__signature__ = inspect.Signature([*own, *others])
        marks = {size: [pytest.mark.slow] if size > 2 else [] for size in sizes}
        params = [pytest.param(size, marks=marks[size]) for size in sizes]
        return pytest.mark.parametrize("size", params)(test)

    return decorate


def _serve(rank: int, size: int, store: str, join: Callable[..., None], pipe: Connection) -> None:
    torch.set_num_threads(1)
    join(rank, size, store)
    pipe.send("ready")
    while True:
        function, args = pipe.recv()
        # Of a test with `on_ranks`, what it wraps.
        function = inspect.unwrap(function)
        torch.manual_seed(0)
        try:
            pipe.send((function(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
