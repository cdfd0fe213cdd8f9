"""A list of gradients and all that can clip it: ours, torch's, peers'; eager, replayed, compiled.

Every contestant first shows on the list that it clips, or leaves alone, what it should; one that
does not, or cannot, is a line with its reason.
"""

import contextlib
import importlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from gpu_budget import said
from gpu_clock import Call, race
from models import Shape, carriers, gradients
from torch.nn import utils

import fastclip
from fastclip import _ops

if TYPE_CHECKING:
    from gpu_rows import Bench

# What a clip leaves of the norm.
SHARE = 0.9
COMPILE_S = 45


class Contest:
    """A list and its contestants, by name: each is made where it is first called.

    One threshold for all, a number, for torch takes no other; so a list that is clipped is as it
    was before the next turn.
    """

    def __init__(self, bench: "Bench", work: str, dtype: str, shapes: list[Shape], clips: bool):
        self.bench, self.dtype = bench, dtype
        self.work = f"{work}, {'clipped' if clips else 'unclipped'}"
        self.grads = gradients(shapes, dtype, bench.device)
        self.originals = [g.clone() for g in self.grads] if clips else []
        self.made = carriers(self.grads)
        self.bytes = sum(g.numel() * g.element_size() for g in self.grads)
        self.norm = oracle(bench, self.work, self.grads)
        self.limit = SHARE * self.norm if clips else 2 * self.norm
        self.failed: dict[str, str] = {}

    def before(self, name: str) -> None:
        if self.originals:
            torch._foreach_copy_(self.grads, self.originals)

    def eager(self, function: Callable[..., Any]) -> Call:
        return lambda: function(self.made, self.limit)

    def replayed(self, function: Callable[..., Any]) -> Call:
        return self.bench.clock.replay(self.eager(function))

    def compiled(self, mode: str) -> Call:
        # Whole or not at all: what falls back to eager halfway is not torch.compile.
        call = torch.compile(
            lambda: utils.clip_grad_norm_(self.made, self.limit, foreach=True),
            mode=mode,
            fullgraph=True,
            dynamic=False,
        )
        with time_limit(COMPILE_S):
            call()
        return call

    def prove(self, name: str, make: Callable[[], Call]) -> Call | None:
        """The contestant, once its first call has left the norm it should have."""
        try:
            self.before(name)
            call = make()
            self.before(name)
            call()
            left, right = float(_ops.norm(self.grads, 2.0)), min(self.norm, self.limit)
            # torch's norm of bf16 gradients is bf16 itself.
            if abs(left / right - 1) > (1 - SHARE) / 4:
                raise RuntimeError(f"left a norm of {left:.6g}, not of {right:.6g}")
        except Exception as error:
            self.failed[name] = said(error)
            return None
        return call

    def run(self, makers: dict[str, Callable[[], Call]], **facts: Any) -> dict[str, float]:
        proved = {name: self.prove(name, make) for name, make in makers.items()}
        contestants = {name: call for name, call in proved.items() if call}
        ms, late = race(self.bench.clock, contestants, self.before)
        how = {"bytes": self.bytes, "late": late, "failed": self.failed}
        self.bench.row(self.work, self.dtype, ms, **how, **facts)
        for name in self.failed.keys() & {"fastclip", "fastclip, replayed"}:
            self.bench.target(f"{self.work}, {name}: {self.failed[name]}", "", None)
        return ms

    def everyone(self) -> dict[str, Callable[[], Call]]:
        """Contestants but those that are compiled."""
        functions: dict[str, Callable[..., Any]] = {
            "fastclip": fastclip.clip_grad_norm_,
            "foreach": lambda *args: utils.clip_grad_norm_(*args, foreach=True),
            "loop": lambda *args: utils.clip_grad_norm_(*args, foreach=False),
        }
        eager = {n: lambda f=f: self.eager(f) for n, f in {**functions, **peers()}.items()}
        replayed = {
            f"{name}, replayed": lambda f=f: self.replayed(f) for name, f in functions.items()
        }
        return eager | replayed


def peers() -> dict[str, Callable[..., Any]]:
    """clip_grad_norm_ of the other libraries that this Python can import."""
    found: dict[str, Callable[..., Any]] = {}
    # A library built for another torch fails to import in ways of its own.
    with contextlib.suppress(Exception):
        found["apex"] = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_
    with contextlib.suppress(Exception):
        kernels = importlib.import_module("transformer_engine.pytorch.optimizers")
        found["TransformerEngine"] = lambda *args: engine(kernels, *args)
    return found


def engine(kernels: Any, made: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """As Megatron calls it: the host waits for the norm, then scales if it must."""
    lists: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in made:
        lists.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    overflow = torch.zeros(1, dtype=torch.int32, device=made[0].grad.device)
    apply = kernels.multi_tensor_applier
    norms = [
        apply(kernels.multi_tensor_l2norm, overflow, [grads], False)[0].reshape(())
        for grads in lists.values()
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    coef = max_norm / (norm.item() + 1e-6)
    for grads in lists.values() if coef < 1 else ():
        apply(kernels.multi_tensor_scale, overflow, [grads, grads], coef)
    return norm


def oracle(bench: "Bench", work: str, grads: list[torch.Tensor]) -> float:
    """The norm in float64, blockwise; a target says how far ours is off."""
    blocks = (b.double() for g in grads for b in g.reshape(-1).split(1 << 26))
    norm = math.sqrt(math.fsum(float(b.dot(b)) for b in blocks))
    error = abs(float(_ops.norm(grads, 2.0)) - norm) / norm
    bench.target(f"{work}: relative error of the norm <= 2.4e-7", error, error <= 2.4e-7)
    return norm


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in here. Again and again: a callback may swallow the first."""

    def stop(*how: Any) -> None:
        raise TimeoutError(f"no end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
