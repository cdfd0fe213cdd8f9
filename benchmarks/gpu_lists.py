"""Whole calls: on gradients of models, on lists that others have measured, in a training step."""

import time
from typing import TYPE_CHECKING

import torch
from gpu_clock import Call, race, race_walls
from gpu_contest import Contest
from models import Shape, carriers, gpt2, gradients, llama, llama_7b, matrices, parameters, table
from steps import SCALE, TORCH, step_of
from torch.nn import utils

import fastclip

if TYPE_CHECKING:
    from gpu_rows import Bench

COMPILED = {"default": "default", "autotuned": "max-autotune-no-cudagraphs"}
TINY: list[Shape] = [(300, 70), (70,), (3, 3), ()] * 3
PUBLISHED = "NVIDIA-NeMo/Automodel pull request 3685, H100"


def models(bench: "Bench") -> None:
    """clip_grad_norm_ on the gradients of models."""
    lists = {
        "Llama 2 7B": (llama_7b(), "bf16"),
        "GPT-2": (gpt2(), "fp32"),
        "Llama 1B / 4": (llama(), "mixed"),
    }
    if bench.quick:
        lists = {"quick": (TINY, "fp32"), "quick mixed": (TINY, "mixed")}
    for name, (shapes, dtype) in lists.items():
        for clips in (False, True):
            model(bench, name, shapes, dtype, clips)


def model(bench: "Bench", name: str, shapes: list[Shape], dtype: str, clips: bool) -> None:
    contest = Contest(bench, name, dtype, shapes, clips)
    ms = contest.run(contest.everyone())
    least = {"fp32": 1.1, "bf16": 1.2, "mixed": 1.0} if clips else {"mixed": 4.0}
    enough = least.get(dtype, 3.0)
    if {"foreach", "fastclip"} <= set(ms):
        ratio = ms["foreach"] / ms["fastclip"]
        what = f"{contest.work}, {dtype}: x foreach >= {enough}"
        bench.target(what, ratio, ratio >= enough)


def published(bench: "Bench") -> None:
    """The two lists for which others have published times, norm and clip, on an H100."""
    for name, shapes, dtype, engine_ms, triton_ms, most in (
        ("6 000 261 x 256", table(), "bf16", 7.89, 7.32, 3.4),
        ("500 matrices", matrices(), "in turn", 3.93, 3.73, 1.2),
    ):
        contest = Contest(bench, name, dtype, TINY if bench.quick else shapes, clips=True)
        theirs = {"TransformerEngine": engine_ms, "Triton": triton_ms}
        cited = {f"{who}, published ({PUBLISHED})": ms for who, ms in theirs.items()}
        ms = contest.run(contest.everyone(), published=cited)
        # Elsewhere the row says what there is to say.
        if bench.is_h100 and "fastclip" in ms:
            what = f"{contest.work}, on an H100: ms <= {most}"
            bench.target(what, ms["fastclip"], ms["fastclip"] <= most)


def compiled(bench: "Bench") -> None:
    """torch's clip under torch.compile, warm, beside ours and torch's eager one.

    Last and shortest first: to compile 300 tensors may take longer than there is time.
    """
    lists = {
        "Llama 1B / 4": (llama(), "mixed"),
        "GPT-2": (gpt2(), "fp32"),
        "Llama 2 7B": (llama_7b(), "bf16"),
        "500 matrices": (matrices(), "in turn"),
    }
    if bench.quick:
        lists = {"quick": (TINY[:2], "fp32")}
    for name, (shapes, dtype) in lists.items():
        beside_compiled(bench, name, shapes, dtype)
        torch._dynamo.reset()


def beside_compiled(bench: "Bench", name: str, shapes: list[Shape], dtype: str) -> None:
    contest = Contest(bench, f"{name}, beside torch.compile", dtype, shapes, clips=True)
    seconds: dict[str, float] = {}

    def make(mode: str) -> Call:
        start = time.perf_counter()
        call = contest.compiled(COMPILED[mode])
        seconds[mode] = round(time.perf_counter() - start, 1)
        return call

    both = contest.everyone()
    makers = {n: both[n] for n in ("fastclip", "foreach", "fastclip, replayed")}
    makers |= {f"torch.compile, {mode}": lambda mode=mode: make(mode) for mode in COMPILED}
    contest.run(makers, compile_s=seconds)


def small(bench: "Bench") -> None:
    """Wall time of a call on a thousand small tensors."""
    grads = gradients([(1024,)] * (20 if bench.quick else 1000), "fp32", bench.device)
    made = carriers(grads)
    contestants = {
        "fastclip": lambda: fastclip.clip_grad_norm_(made, 1e9),
        "foreach": lambda: utils.clip_grad_norm_(made, 1e9, foreach=True),
    }
    for cold in (True, False):
        ms = race_walls(bench.clock, contestants, cold)
        work = f"1000 x 1024, wall, {'cold' if cold else 'warm'}"
        bench.row(work, "fp32", ms)
        ratio = ms["foreach"] / ms["fastclip"]
        bench.target(f"{work}: x foreach >= 15", ratio, ratio >= 15)


def optimizers(bench: "Bench") -> None:
    """A training step with a scaler, in torch's sequence and in ours; and what it moves."""
    for clips in (False, True):
        optimizer(bench, f"a step of GPT-2, clip {'active' if clips else 'not active'}", clips)


def optimizer(bench: "Bench", work: str, clips: bool) -> None:
    made = parameters(TINY if bench.quick else gpt2(), "fp32", bench.device)
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

    ms, late = race(bench.clock, {**step.ways, "copy": lambda: target.copy_(flat)}, before)
    bench.row(work, "fp32", ms, bytes=4 * flat.numel(), late=late)
    for name, passes in step.passes.items():
        ratio, seen = ms[TORCH] / ms[name], 2 * ms[name] / ms["copy"]
        if name != TORCH:
            bench.target(f"{work}, {name}: x torch >= 1.25", ratio, ratio >= 1.25)
        what = f"{work}, {name}: N at the speed of a copy, {passes} within 10 %"
        bench.target(what, seen, abs(seen / passes - 1) <= 0.1)
