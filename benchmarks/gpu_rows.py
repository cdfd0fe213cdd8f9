"""What a GPU is asked, step by step: rows of times, and targets, met or not.

Imports fastclip, so it is imported after the build, by the process that measures.
"""

import gc
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_lists
import torch
from gpu_budget import ROOT, Tell, said
from gpu_clock import Cpu, Cuda

import fastclip
from fastclip import _ops

CLOCKS = {"cuda": Cuda, "cpu": Cpu}
# Of torch's, kernels of ours need memory for results and numbers; a default op needs much more.
ALLOCATES = {
    *("aten::empty", "aten::empty_strided", "aten::to", "aten::_to_copy", "aten::copy_"),
    "aten::contiguous",
}


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


def proof(bench: Bench, by_name: bool = True) -> None:
    """Raises unless the ops of this tree's own package run kernels of ours on this device.

    Seen by the profiler: the kernels' names. Where it sees none, because CUPTI is missing or this
    is not a GPU: that beneath the ops torch only allocates and converts, as under no default.
    """
    where = Path(fastclip.__file__).parent
    if where != ROOT / "fastclip":
        raise RuntimeError(f"fastclip was imported from {where}, not from this tree")
    if not _ops.has_kernels(bench.device):
        raise RuntimeError(f"fastclip has no compiled kernels for {bench.device} after the build")
    grads = [torch.randn(n, device=bench.device) for n in (70_000, 3)]
    coef = torch.full((), 0.5, device=bench.device)
    calls = {
        "norm": lambda: _ops.norm(grads, 2.0),
        "norms": lambda: _ops.norms(grads, 2.0),
        "scale_": lambda: _ops.scale_(grads, coef),
        "clamp_": lambda: _ops.clamp_(grads, 0.5),
        "clip_norm_": lambda: _ops.clip_norm_(grads, 0.1, 2.0),
    }
    for name, call in calls.items():
        kernels, beneath = seen(bench.clock, name, call, by_name and bench.device == "cuda")
        ours = [k for k in kernels if "fastclip" in k and "kernel" in k]
        if kernels and not ours:
            raise RuntimeError(f"{name} ran {kernels[0][:60]} and no kernel of fastclip's")
        if not kernels and beneath - ALLOCATES:
            raise RuntimeError(f"{name} ran torch's {min(beneath - ALLOCATES)}: it is the default")
        how = ours[0][:100] if ours else "no names of kernels, but nothing of torch's beneath"
        bench.target(f"{name} runs kernels of ours", how, True)


def seen(clock: Cuda, name: str, call: Any, by_name: bool) -> tuple[list[str], set[str]]:
    """Names of the kernels of a call, and of torch's ops beneath the op of ours."""
    call()
    clock.wait()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if by_name else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        clock.wait()
    events = list(profile.events())
    cuda = torch.autograd.DeviceType.CUDA
    own = {"Activity Buffer Request"}
    kernels = [e.name for e in events if e.device_type == cuda and e.name not in own]
    beneath: set[str] = set()
    below = [e for e in events if e.name == f"fastclip::{name}"]
    if not below:
        raise RuntimeError(f"the profiler saw no call of {name}")
    while below:
        event = below.pop()
        below += event.cpu_children
        beneath |= {event.name} if event.name.startswith("aten::") else set()
    return kernels, beneath


STEPS = {
    "proof": proof,
    "proof beneath the ops": lambda bench: proof(bench, by_name=False),
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
