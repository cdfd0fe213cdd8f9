"""Parameters with their names, from modules, optimizers, lists or (name, tensor) pairs."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._private import attribute


def named(source: Any) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs in order; in a list of modules, names begin with an index.

    Raises:
        TypeError: `source` or one of its items is of a type that holds no parameters.
    """
    if isinstance(source, nn.Module):
        return list(source.named_parameters())
    if isinstance(source, Optimizer):
        return [
            (name, parameter)
            for g, group in enumerate(source.param_groups)
            for name, parameter in zip(_names(g, group), group["params"], strict=True)
        ]
    if isinstance(source, Tensor):
        return [("0", source)]
    if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
        raise TypeError(
            f"parameters: expected a module, an optimizer, tensors or (name, tensor) pairs, got "
            f"{type(source).__name__}"
        )
    found: list[tuple[str, Tensor]] = []
    for i, item in enumerate(source):
        if isinstance(item, Tensor):
            found.append((str(i), item))
        elif isinstance(item, nn.Module | Optimizer):
            found += [(f"{i}.{name}", parameter) for name, parameter in named(item)]
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            found.append(item)
        else:
            raise TypeError(
                f"parameters[{i}]: expected a tensor, a (name, tensor) pair, a module or an "
                f"optimizer, got {type(item).__name__}"
            )
    return found


def _names(g: int, group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]


class NamedParameters:
    """The named parameters of a source, looked up again only when they have changed."""

    def __init__(self, source: Any) -> None:
        lasting = isinstance(source, nn.Module | Optimizer | Tensor | list | tuple)
        self.source = list(source) if isinstance(source, Iterable) and not lasting else source
        self._held: list[Any] | None = None

    def is_unchanged(self) -> bool:
        """Return whether `find` would return the same as last time; False if that is unknown."""
        # In a graph `find` keeps nothing to compare with.
        if torch.compiler.is_compiling() or self._held is None:
            return False
        now = self._contents()
        return len(now) == len(self._held) and all(map(operator.is_, now, self._held))

    def forget(self) -> None:
        """Make `is_unchanged` return False until the next `find`."""
        self._held = None

    def find(self) -> list[tuple[str, Tensor]]:
        if not torch.compiler.is_compiling():
            own = [self.source] if isinstance(self.source, list) else []
            several = isinstance(self.source, list | tuple)
            holders = self.source if several else [self.source]
            modules = [m for h in holders if isinstance(h, nn.Module) for m in h.modules()]
            self._optimizers = [h for h in holders if isinstance(h, Optimizer)]
            kinds = "_parameters", "_modules"
            dicts = [attribute(module, kind) for module in modules for kind in kinds]
            self._containers = own + dicts
            # A scripted module's containers are not dicts, and their contents cannot be compared.
            can_look = all(isinstance(c, list | dict) for c in self._containers)
            self._held = self._contents() if can_look else None
        return named(self.source)

    def _contents(self) -> list[Any]:
        """Return the contents of all lists and dicts that determine the parameters, in one list."""
        groups = [optimizer.param_groups for optimizer in self._optimizers]
        lists = groups + [group["params"] for some in groups for group in some]
        found: list[Any] = []
        for container in self._containers + lists:
            # A None after each container shows when an item moves to the next container.
            found += container.values() if isinstance(container, dict) else container
            found.append(None)
        return found


def found_in_groups(
    sources: Sequence[NamedParameters], names: Sequence[str] | None
) -> tuple[list[Tensor], list[int], list[str]]:
    """Return three lists: all parameters, each once; the index of each one's source; its name.

    If the sources have `names`, each parameter's name begins with that of its source.

    Raises:
        ValueError: a parameter is in two sources.
    """
    owners: dict[int, tuple[str, int]] = {}
    items, group_of, found = [], [], []
    for group, source in enumerate(sources):
        for name, parameter in source.find():
            name = name if names is None else f"{names[group]}.{name}"
            other, owner = owners.setdefault(id(parameter), (name, group))
            if owner != group:
                for each in sources:
                    each.forget()
                raise ValueError(
                    f"groups: {other} and {name} are one parameter; remove it from one group"
                )
            if other == name:
                items.append(parameter)
                group_of.append(group)
                found.append(name)
    return items, group_of, found
