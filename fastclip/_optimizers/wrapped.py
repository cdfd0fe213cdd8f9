"""Optimizers, and wrappers that hold one, such as those of accelerate and Lightning."""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def as_list(optimizer: Any) -> list[Optimizer]:
    """Return the given optimizers, each once, where an optimizer and its wrapper count as one."""
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer)
    optimizers = list(optimizer) if several else [optimizer]
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer or several, got "
                f"{type(one).__name__}; the arguments are (optimizer, max_norm, scaler)"
            )
    found: dict[int, Optimizer] = {}
    for one in optimizers:
        found.setdefault(id(layers_of(one)[-1]), one)
    return list(found.values())


def parameters_of(optimizers: list[Optimizer]) -> list[Tensor]:
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def layers_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer, and if it is a wrapper the optimizers in it, the innermost last."""
    layers = [optimizer]
    while not steps_as_torch(layers[-1]):
        values = vars(layers[-1]).values()
        held = {id(one): one for one in values if isinstance(one, Optimizer)}
        others = [one for one in held.values() if all(one is not layer for layer in layers)]
        # ZeroRedundancyOptimizer is no wrapper: its inner optimizer has only some parameters.
        if len(others) != 1 or not _have_same_parameters(layers[-1], others[0]):
            break
        layers += others
    return layers


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether its `step` is the method of a class of `torch.optim`."""
    return str(type(optimizer).step.__module__).startswith("torch.optim.")


def _have_same_parameters(one: Optimizer, other: Optimizer) -> bool:
    ours, theirs = (parameters_of([o]) for o in (one, other))
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
