"""Real training runs of other people's loops: with torch's clipping, patched, and torch's again."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastclip import patching
from fastclip._run import Counted


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator) for _ in range(steps)]


def distance(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - 3).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def losses_of(
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_of: Callable[[Any], torch.Tensor],
    clip: Callable[[], Any],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> list[float]:
    """The loop that a user of a library writes around its backward and its clip."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(batch)
        backward(loss)
        clip()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_reached(
    train: Callable[[int], list[float]],
    calls: int = 1,
    rtol: float = 1e-5,
    name: str | None = None,
) -> Counted:
    """`train(n)` makes n clipped steps and returns losses: the same ones whoever clips.

    Patched, it calls us `calls` times a step, and nothing once that is over.
    """
    counted = Counted(keep=True)
    theirs = train(20)
    with patching.patch_with(counted.wrap):
        ours = train(20)
    train(2)
    assert (counted.calls[name] if name else counted.calls.total()) == 20 * calls, counted.calls
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=1e-7)
    _, rows = counted.ring.read()
    # If no step was clipped, nothing was compared. Only clips by a total norm are recorded.
    assert not len(rows) or (rows[:, 0] > rows[:, 1]).any()
    return counted
