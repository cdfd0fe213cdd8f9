"""A step of fused AdamW with its clip, in every way there is, and what each moves.

Counted in N, the bytes of float32 gradients. The optimizer alone moves 7: it reads parameter,
gradient and two moments, and writes three. To divide the gradients it writes them too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import utils

import fastclip

SCALE = 1024.0
TORCH = "torch"
STEPPED = "clipped_step"
Way = Callable[[], object]


class Step(NamedTuple):
    """Ways to take the same step, and N for each; `before` does what backward has done by then."""

    ways: dict[str, Way]
    passes: dict[str, int]
    before: Callable[[str], None]


def step_of(made: list[nn.Parameter], max_norm: float, scaled: bool, clips: bool) -> Step:
    """All ways to step with these parameters, whose gradients are as backward left them."""
    device = made[0].device.type
    norms = fastclip.NormAccumulator(made)

    def way(clip: Callable[..., object] | None, **how: object) -> Way:
        optimizer = torch.optim.AdamW(made, fused=True)
        scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=scaled)
        scaler.scale(torch.ones((), device=device))

        def run() -> None:
            if clip is None:
                fastclip.clipped_step(optimizer, max_norm, scaler, **how)
            else:
                clip(scaler, optimizer)
                scaler.step(optimizer)
            scaler.update()

        return run

    def by_torch(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        scaler.unscale_(optimizer)
        utils.clip_grad_norm_(made, max_norm)

    def by_us(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if scaled:
            fastclip.unscale_and_clip_(optimizer, max_norm, scaler)
        else:
            fastclip.clip_grad_norm_(made, max_norm)

    def by_norms(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if scaled:
            fastclip.unscale_and_clip_(optimizer, max_norm, scaler, measured=norms)
        else:
            norms.clip_(max_norm)

    def before(name: str) -> None:
        norms.forget()
        for parameter in made if name.startswith("NormAccumulator") else ():
            # None without the extension.
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)

    written = 2 * (scaled or clips)
    unscaled = "unscale_and_clip_" if scaled else "clip_grad_norm_"
    ways = {
        TORCH: (way(by_torch), 7 + 3 + 2 * scaled),
        unscaled: (way(by_us), 7 + 1 + written),
        STEPPED: (way(None), 7 + 1 + 1),
        "NormAccumulator": (way(by_norms), 7 + written),
        "NormAccumulator, clipped_step": (way(None, measured=norms), 7 + 1),
    }
    calls, passes = ({name: both[i] for name, both in ways.items()} for i in range(2))
    return Step(calls, passes, before)
