"""Every public name as a user's script has it; test_types.py has mypy look at it, and runs it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastclip
from fastclip import AutoClip, GradClipper, NormAccumulator, ZClip


def fresh() -> nn.Sequential:
    """A model with gradients."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    model(torch.ones(2, 4, device="cpu")).sum().backward()
    return model


def drop_in() -> Tensor:
    model = fresh()
    total_norm: Tensor = fastclip.clip_grad_norm_(model.parameters(), 1.0)
    fastclip.clip_grad_norm_(model.parameters(), total_norm, norm_type="inf")
    fastclip.clip_grad_norm_(next(model.parameters()), 1, 3, nonfinite="keep", grad_scale=0.5)
    fastclip.clip_grad_value_(model.parameters(), 0.1)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total_norm = fastclip.get_total_norm(grads, norm_type=float("inf"), dtype=torch.float64)
    fastclip.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)
    with fastclip.patch():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    fastclip.patch()
    fastclip.unpatch()
    return total_norm


def per_tensor() -> dict[str, int]:
    model = fresh()
    limit: Tensor = fastclip.get_total_norm(p.detach() for p in model.parameters())
    norms: Tensor = fastclip.clip_grad_norms_(model.parameters(), limit, norm_type=1)
    fastclip.clip_grad_agc_(model.parameters(), clip_factor=0.02)
    fastclip.normalize_grad_(model.parameters(), norm=float(norms.max()))
    return fastclip.find_nonfinite(model)


def rules() -> None:
    def halved(total_norm: Tensor) -> float | Tensor:
        return total_norm / 2

    own: list[Callable[[Tensor], float | Tensor]] = [AutoClip(10, history=50), ZClip(), halved]
    model = fresh()
    for rule in own:
        fastclip.clip_grad_norm_(model.parameters(), rule)
        GradClipper(model, rule, nonfinite="zero").clip_()


def groups(path: str | None = None) -> float:
    model = fresh()
    own: list[fastclip.Group] = [
        {"params": model[0], "max_norm": AutoClip(), "name": "first"},
        {"params": model[2].named_parameters(), "max_norm": fastclip.DropSpikes(1.0)},
        fastclip.Group(params=[], max_norm=None, process_group=None),
    ]
    clipper = GradClipper(groups=own, norm_type="inf", nonfinite="error")
    norms: Tensor = clipper.clip_(grad_scale=0.5)
    clipper.max_norm["first"] = 0.5
    clipper.load_state_dict(clipper.state_dict())
    if path is not None:
        clipper.plot(path)
    print(clipper.stats(), clipper.last(), clipper.names)
    return float(norms.sum()) + sum(clipper.norms_by_parameter().values())


def in_the_step() -> Tensor:
    model = fresh()
    loss = model(torch.ones(2, 4, device="cpu")).sum()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with NormAccumulator(model, norm_type=2) as norms:
        with norms.pause():
            scaler.scale(loss).backward(retain_graph=True)
        scaler.scale(loss).backward(retain_graph=True)
        fastclip.clipped_step(optimizer, 1.0, scaler, measured=norms)
        scaler.update()
        fastclip.unscale_and_clip_([optimizer], ZClip(), scaler, norm_type=2)
        norms.forget()
        return norms.clip_(1.0)


def main() -> None:
    if torch.cuda.is_available():
        fastclip.use_kernels(True)
    drop_in()
    per_tensor()
    rules()
    groups()
    in_the_step()
