"""The rest of the family, beside what one would write by hand: clipping by tensor and by unit,
groups."""

import itertools

import pytest
import torch
from conftest import medians
from models import QUICK, gpt2, parameters, resnet50
from torch import nn

import fastclip
from fastclip import _ops

pytestmark = [
    pytest.mark.skipif(_ops.extension is None, reason="no extension to measure"),
    pytest.mark.parametrize("device", ["cpu"]),
]
MODELS = {"ResNet-50": resnet50(), "GPT-2": gpt2()}


def rows_norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.norm()


def agc_loop(made: list[nn.Parameter], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Brock et al. 2021 as one writes it for one parameter after the other, as timm does."""
    for parameter in made:
        shape = [-1] + [1] * (parameter.dim() - 1) if parameter.dim() > 1 else []
        limit = rows_norm(parameter.detach()).clamp_(min=eps).mul_(clip_factor).view(shape)
        norm = rows_norm(parameter.grad).view(shape)
        clipped = parameter.grad * (limit / norm.clamp(min=1e-6))
        parameter.grad.copy_(torch.where(norm < limit, parameter.grad, clipped))


def norms_loop(made: list[nn.Parameter], max_norm: float) -> None:
    """As Keras and optax clip one tensor: divided by max(1, norm / max_norm)."""
    for parameter in made:
        parameter.grad.div_((parameter.grad.norm() / max_norm).clamp_(min=1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", ["norms", "agc"])
def bench_each(benchmark, where, request, name, kind, clips):
    quick = request.config.getoption("--quick")
    made = parameters(QUICK["quick"][0] if quick else MODELS[name], "fp32", "cpu")
    for parameter in made:
        parameter.data.normal_()
    grads = [p.grad for p in made]
    originals = [g.clone() for g in grads]
    strength = 1e-2 if clips else 1e9
    calls = {
        "norms": {
            "fastclip": lambda: fastclip.clip_grad_norms_(made, strength),
            "loop": lambda: norms_loop(made, strength),
        },
        "agc": {
            "fastclip": lambda: fastclip.clip_grad_agc_(made, strength),
            "loop": lambda: agc_loop(made, strength),
        },
    }[kind]

    def restore(name: str) -> None:
        torch._foreach_copy_(grads, originals)

    results = []
    for who, call in calls.items():
        restore(who)
        call()
        results.append([g.clone() for g in grads])
    for ours, theirs in zip(*results, strict=True):
        # torch's own float32 norm of GPT-2's embedding is off by 1e-3.
        torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=1e-30)
    # Restored before every turn, and turns of one call where calls clip: the next finds nothing.
    turn = 0.0 if clips else 4e-3
    found: dict[str, float] = {}
    benchmark.pedantic(
        lambda: found.update(medians(calls, 3 if quick else 25, turn, restore)), rounds=1
    )
    whole = medians({"clip": lambda: fastclip.clip_grad_norm_(made, 1e9)}, 3)["clip"]
    function = {"norms": "clip_grad_norms_", "agc": "clip_grad_agc_"}[kind]
    reach = "every one clipped" if clips else "nothing clipped"
    line = (
        f"{function}, {name}, fp32, {reach}: {found['fastclip'] / 1e3:.2f} ms, a loop over the "
        f"parameters {found['loop'] / 1e3:.2f} ms, so {found['loop'] / found['fastclip']:.1f} "
        f"times; {found['fastclip'] / whole:.1f} times an unclipped clip_grad_norm_."
    )
    benchmark.extra_info.update(where=where, host=line, each=found, correct=True)
    print(line)


def bench_groups(benchmark, where, request):
    quick = request.config.getoption("--quick")
    made = parameters(QUICK["quick"][0] if quick else gpt2(), "fp32", "cpu")
    cuts = [len(made) * i // 5 for i in range(6)]
    groups = [
        {"params": made[begin:end], "max_norm": 1e9} for begin, end in itertools.pairwise(cuts)
    ]
    calls = {
        "five": fastclip.GradClipper(groups=groups).clip_,
        "one": fastclip.GradClipper(made, 1e9).clip_,
    }
    norms = calls["five"]()
    torch.testing.assert_close(norms.norm(), calls["one"]())
    found: dict[str, float] = {}
    benchmark.pedantic(lambda: found.update(medians(calls, 3 if quick else 40)), rounds=1)
    line = (
        f"Five groups of GPT-2's gradients in one pass: {found['five'] / 1e3:.2f} ms, one group "
        f"{found['one'] / 1e3:.2f} ms, so {found['five'] / found['one']:.2f} times."
    )
    benchmark.extra_info.update(where=where, host=line, groups=found, correct=True)
    print(line)
