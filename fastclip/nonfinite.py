"""Which gradients hold infinities or NaN."""

from typing import Any

import torch
from torch import Tensor

from ._gradients import SpreadGrads, aligned, held, named, read
from ._ops import widest
from ._ranks import Kind, local_of


@torch.no_grad()
def find_nonfinite(parameters_or_module: Any) -> dict[str, int]:
    """Return how many elements of each gradient are infinite or NaN, by the parameter's name.

    Only of gradients that have any. One read of all, a second of those; waits for the device. A
    DTensor's are those of the full gradient, for which every rank calls this.

    Args:
        parameters_or_module: a module, an optimizer, tensors, (name, tensor) pairs, or several
            modules or optimizers.

    Raises:
        TypeError: something that holds no parameters, or a gradient that has no norm.

    Reference: `torch.isfinite`.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.weight.grad = torch.tensor([[1.0, float("nan")]])
    >>> find_nonfinite(layer)
    {'weight': 1}
    """
    pairs = named(parameters_or_module)
    items = [parameter for _, parameter in pairs]
    if not items:
        return {}
    grads = read(items, kind=Kind.EACH)
    norms = aligned(grads.each_norms(float("inf")), items)
    counts = norms.new_zeros(len(items), dtype=widest(norms.device))
    for i in (~norms.isfinite()).nonzero().flatten().tolist():
        if items[i].grad is not None:
            counts[i] = _count(local_of(items[i].grad))
    if isinstance(grads, SpreadGrads):
        counts = grads.added(counts)
    each = zip(pairs, counts.tolist(), strict=True)
    return {name: int(count) for (name, _), count in each if count}


def _count(tensor: Tensor) -> Tensor:
    values = held(tensor.coalesce() if tensor.is_sparse else tensor)
    return (~values.isfinite()).sum()
