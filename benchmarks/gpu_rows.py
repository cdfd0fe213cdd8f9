"""What a GPU is asked, step by step: rows of times, and targets, met or not.

Imports fastclip, so it is imported after the build, by the process that measures.
"""

import gc
import time
from multiprocessing.connection import Connection
from typing import Any

import gpu_kernels
import gpu_lists
import torch
from gpu_budget import Tell, said
from gpu_clock import Cpu, Cuda

CLOCKS = {"cuda": Cuda, "cpu": Cpu}


class Bench:
    """Tells rows and targets as they come. What fails is told as well and ends nothing else."""

    def __init__(self, clock: Cuda, quick: bool, tell: Tell) -> None:
        self.clock, self.quick, self.tell, self.device = clock, quick, tell, clock.name
        # Published figures are of this card.
        name = torch.cuda.get_device_name() if self.device == "cuda" else ""
        self.is_h100 = "H100 80GB HBM3" in name

    def row(self, work: str, dtype: str, ms: dict[str, float], **facts: Any) -> None:
        known = {name: value for name, value in facts.items() if value}
        self.tell("row", {"work": work, "dtype": dtype, "ms": ms, **known})

    def target(self, what: str, value: Any, met: bool | None) -> None:
        value = f"{value:.3g}" if isinstance(value, float) else value
        self.tell("target", {"target": what, "value": value, "met": met})

    def run(self, step: str) -> dict[str, Any]:
        """How the step ended, and the most memory it held."""
        self.clock.forget()
        start, state = time.perf_counter(), "done"
        try:
            STEPS[step](self)
            self.clock.wait()
        except Exception as error:
            state = f"failed: {said(error)}"
        gc.collect()
        gib = self.clock.peak() / (1 << 30)
        seconds = time.perf_counter() - start
        return {"state": state, "seconds": round(seconds, 1), "peak_gib": round(gib, 2)}


STEPS = {
    "reads": gpu_kernels.reads,
    "models": gpu_lists.models,
    "published": gpu_lists.published,
    "reuse": gpu_kernels.reuse,
    "small": gpu_lists.small,
    "launches": gpu_kernels.launches,
    "odd": gpu_kernels.odd,
    "bits": gpu_kernels.bits,
    "optimizers": gpu_lists.optimizers,
    "compiled": gpu_lists.compiled,
}


def answer(pipe: Connection, device: str, quick: bool) -> None:
    """Takes names of steps, tells what each saw and how it ended, until the pipe is closed."""
    bench = Bench(CLOCKS[device](), quick, lambda kind, value: pipe.send((kind, value)))
    while True:
        pipe.send(("end", bench.run(pipe.recv())))
