"""`python -m fastclip check`: whether the ops are right on this device, and how fast they are.

Every case of _check_cases.py is run. Under torchrun every rank runs them, and the ranks compare
their versions, kernels and results.
"""

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import fastclip

from . import _ops, _ranks
from ._check_cases import Canvas, Case, cases
from .clip import clip_grad_norm_

# A compiled kernel of fastclip calls no other ops of torch than these; the plain ops call others.
NEEDS = ("empty", "empty_strided", "to", "_to_copy", "copy_", "item", "_local_scalar_dense")


def uses_kernels(device: str) -> bool:
    """Whether the ops run compiled kernels: torch's profiler sees which ops each of them calls."""
    tensors = [torch.ones(n, device=device) for n in (70_000, 3)]
    coef = torch.ones((), dtype=_ops.widest(tensors[0].device), device=device)
    calls: list[Callable[[], Any]] = [
        partial(_ops.clip_norm_, tensors, 1.0, 2.0),
        partial(_ops.norm, tensors, 2.0),
        partial(_ops.norms, tensors, 2.0),
        partial(_ops.scale_, tensors, coef / 2),
        partial(_ops.clamp_, tensors, 0.5),
    ]
    profiler: Any = torch.profiler
    for call in calls:
        call()
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
            call()
        events = [e for e in profile.events() if e.name.startswith("fastclip::")]
        if not events:
            return False
        # The loop also visits the ops called by these ops: it appends them to the list.
        for event in events:
            events += event.cpu_children
            if event.name.startswith("aten::") and event.name[6:] not in NEEDS:
                return False
    return True


def _median_ms(device: str, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Time the calls in turns, so that noise of the machine affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, call) in itertools.product(range(8), calls.items()):
        count, start = 0, time.perf_counter()
        while count == 0 or (time.perf_counter() - start < 0.02 and count < 100):
            call()
            count += 1
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            times[name].append(1e3 * (time.perf_counter() - start) / count)
    return {name: statistics.median(some) for name, some in times.items()}


def speed(device: str) -> list[dict[str, Any]]:
    """Return the milliseconds of a clip by fastclip and by torch, and of a read and a copy.

    All four are timed for three lists of gradients. The read and the copy are of one tensor that
    has as many bytes as the whole list.
    """
    type_ = torch.device(device).type
    size = {"cuda": 1 << 30, "cpu": 1 << 26}.get(type_, 1 << 18)
    if type_ == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 16)
    half, full = torch.bfloat16, torch.float32
    found = []
    for name, shapes in {
        "bf16, as of a model": [(size // 2 // 64, half)] * 64,
        "mixed": [(size // 6 // 32, half), (size // 6 // 32, full)] * 32,
        "1000 x 64": [(64, full)] * 1000,
    }.items():
        made = [torch.nn.Parameter(torch.zeros(n, dtype=d, device=device)) for n, d in shapes]
        for parameter in made:
            parameter.grad = torch.full_like(parameter, 1e-3)
        flat = torch.ones(sum(p.nbytes for p in made) // 4, device=device)
        calls: dict[str, Callable[[], Any]] = {
            "fastclip": partial(clip_grad_norm_, made, 1e9),
            "torch": partial(torch.nn.utils.clip_grad_norm_, made, 1e9, foreach=True),
            "read": flat.sum,
            "copy": partial(torch.empty_like(flat).copy_, flat),
        }
        found.append({"list": name, "bytes": flat.nbytes, **_median_ms(device, calls)})
    return found


def why_plain(device: torch.device) -> str | None:
    """Return why plain PyTorch runs on a device, and the remedy; None if compiled kernels run."""
    if device.type == "cuda":
        return _ops.refusal(device)
    if _ops.has_kernels(device.type):
        return None
    return _ops.turned_off() or f"not built; for kernels, in the checkout: {_ops.REBUILD}"


def _describe(device: torch.device, is_served: bool) -> dict[str, str]:
    """Return the versions, the device and its kernels, in words; ranks compare these."""
    facts = {
        "fastclip": f"{fastclip.__version__}, protocol {_ranks.PROTOCOL}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": platform.machine(),
        "kernels": "compiled, and called"
        if is_served
        else f"none: plain PyTorch ({why_plain(device) or 'though they are built'})",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        driver = collect_env.get_nvidia_driver_version(collect_env.run)
        facts["device"] = f"{name}, CUDA {torch.version.cuda}, driver {driver}"
    return facts


def _replay(device: str) -> str:
    """Compare a replayed CUDA graph of a clip with a call; say that they differ, or return ""."""
    case = Case(device, "clip_norm_", "mixed")
    called, captured = Canvas(case), Canvas(case)
    total_norm = _ops.clip_norm_(called.tensors, 1.0, 2.0)
    _ops.norm(captured.tensors, 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _ops.clip_norm_(captured.tensors, 1.0, 2.0)
    for _ in range(2):
        captured.memory.copy_(captured.before)
        graph.replay()
    same = found.equal(total_norm) and captured.memory.equal(called.memory)
    return "" if same else "a CUDA graph, replayed, gave other bits than a call"


def find_first_wrong(device: torch.device, is_alone: bool) -> tuple[int, list[str]]:
    """Return the number of right cases, and in a list the error of the first wrong one, if any."""
    every = list(cases(str(device)))
    last = torch.cuda.device_count() - 1
    if device.type == "cuda" and is_alone and last != device.index:
        # Kernels must run on the device of their tensors, even if another device is current.
        every += [case._replace(device=f"cuda:{last}") for case in every[:40]]
    streams: list[Any] = [torch.cuda.Stream(device)] if device.type == "cuda" else []
    for stream in [None, *streams]:
        with torch.cuda.stream(stream):
            for i, case in enumerate(every):
                if sys.stderr.isatty() and not _ranks.rank():
                    print(f"\rcase {i + 1} of {len(every)}", end="\r", file=sys.stderr)
                try:
                    why = case.wrong()
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                if why:
                    shown = str(case).replace("p=inf", "p=float('inf')")
                    again = f"from fastclip._check_cases import Case\n  print({shown}.wrong())"
                    return i, [f"{why[:500]}\n  to see it again:\n  {again}"]
    if streams:
        try:
            why = _replay(str(device))
        except Exception as error:
            why = f"{type(error).__name__} while a CUDA graph captured a clip: {error}"
        if why:
            return len(every), [why]
    return len(every) * (1 + len(streams)), []


def check(device: torch.device, json_path: Path | None) -> None:
    """Run all checks and print the results; exit with status 1 if anything is wrong."""
    is_many = _ranks.join(device.type)
    if is_many and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start = time.perf_counter()
    is_served = uses_kernels(str(device))
    record: dict[str, Any] = {"facts": _describe(device, is_served)}
    record["cases"], record["wrong"] = find_first_wrong(device, not is_many)
    if not is_served and why_plain(device) is None:
        record["wrong"].append("kernels are loaded, but plain PyTorch was called")
    if is_many:
        _compare_ranks(record, device.type)
    else:
        record["speed"] = speed(str(device))
    record["seconds"] = round(time.perf_counter() - start, 1)
    if not _ranks.rank():
        _print(record)
        if json_path is not None:
            json_path.write_text(json.dumps(record, indent=1) + "\n")
    if is_many:
        _ranks.leave()
    if record["wrong"]:
        sys.exit(1)


def _compare_ranks(record: dict[str, Any], device_type: str) -> None:
    """Add every rank's record and errors to `record`; if nothing is wrong, clip models as well."""
    record["ranks"] = ranks = _ranks.gather(record)
    record["wrong"] = [f"rank {i}: {why}" for i, one in enumerate(ranks) for why in one["wrong"]]
    record["wrong"] += _ranks.differing([one["facts"] for one in ranks])
    if not record["wrong"]:
        record["models"] = _ranks.clip_models(clip_grad_norm_, device_type)
        for i, models in enumerate(_ranks.gather(record["models"])):
            record["wrong"] += [f"rank {i}: {n}: {why}" for n, why in models.items() if why]


def _print(record: dict[str, Any]) -> None:
    wrong = record["wrong"]
    for name, fact in record["facts"].items():
        print(f"{name:9} {fact}")
    print(f"{'right':9} {record['cases']} cases")
    if record.get("models"):
        print(f"{'ranks':9} the same versions and kernels; clipped {', '.join(record['models'])}")
    for row in record.get("speed", ()):
        ms = {name: row[name] for name in ("fastclip", "torch", "read", "copy")}
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())
        ratio, share = ms["torch"] / ms["fastclip"], 100 * ms["read"] / ms["fastclip"]
        print(f"{'fast':9} {row['list']}: {times}: {ratio:.1f} x torch, {share:.0f}% of read speed")
    for why in wrong:
        print(f"{'WRONG':9} {why}")
    print(f"{'verdict':9} {'WRONG' if wrong else 'right'}, after {record['seconds']} s")
