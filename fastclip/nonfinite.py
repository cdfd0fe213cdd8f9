"""Which gradients hold infinities or NaN."""

from typing import Any

import torch
from torch import Tensor

from ._gradients import check_supported, held, named, take
from ._ranks import local_of


@torch.no_grad()
def find_nonfinite(parameters: Any) -> dict[str, int]:
    """Return how many elements of each gradient are infinite or NaN, by the parameter's name.

    Gradients without such elements are left out. All gradients are read once, and those with such
    elements again; waits for the device. Only this rank's elements are counted (those of a
    DTensor's local shard), so that a rank may call this alone.

    Args:
        parameters: a module, an optimizer, tensors, (name, tensor) pairs, or several
            modules or optimizers.

    Raises:
        TypeError: `parameters` holds none, or a gradient has an unsupported dtype or layout.

    Reference: `torch.isfinite`.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.grad = torch.tensor([[1.0, float("nan")]])
    >>> find_nonfinite(layer)
    {'weight': 1}
    """
    names: dict[Tensor, str] = {}
    for name, item in named(parameters):
        names.setdefault(item, name)
    found = [(name, local_of(item.grad)) for item, name in names.items() if item.grad is not None]
    if not found:
        return {}
    for name, grad in found:
        check_supported(grad, f"the gradient of {name}", write=False)
    norms = take([grad for _, grad in found]).each_norms(float("inf"))
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    return {name: _count(grad) for name, grad in (found[i] for i in bad)}


def _count(tensor: Tensor) -> int:
    values = held(tensor.coalesce() if tensor.is_sparse else tensor)
    return int((~values.isfinite()).sum())
