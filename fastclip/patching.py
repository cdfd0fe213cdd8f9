"""torch's own clipping functions replaced by these, for callers that know nothing of fastclip.

Each is one object that torch's decorator made, whoever holds it: what it runs is exchanged, and
given back by `unpatch`. Were it made otherwise, its names in all imported modules would be. Other
libraries' own functions are replaced once they are imported.
"""

import importlib
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ._ops import once
from ._redirect import Undo, redirect, rename
from ._site import After
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .integrations import megatron, timm

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
# Named as torch names them.
_FUNCTIONS = (clip_grad_norm_, clip_grad_value_, get_total_norm, clip_grads_with_norm_)
_LIBRARIES = (megatron, timm)


class Patch:
    """What one `patch()` did, undone where its `with` block ends; another block does it again."""

    def __init__(self, wrap: Wrap) -> None:
        self.wrap = wrap
        self._was_entered = False

    def __enter__(self) -> "Patch":
        if self._was_entered or not _patches.holds(self):
            _patches.add(self)
        self._was_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        _patches.remove(self)


def patch() -> Patch:
    r"""Let torch's clipping functions be fastclip's, for every caller in this process.

    `clip_grad_norm_`, `clip_grad_value_`, `get_total_norm` and `clip_grads_with_norm_` of
    `torch.nn.utils`, whenever and however they were imported, compiled code too; timm's
    `adaptive_clip_grad` and what Megatron-core measures and scales with, now or once they are
    imported. As often as it is called, `unpatch` has to be, in any order and from any thread.

    Returns:
        A context manager: at the end of its block this call is undone.

    Reference: `torch.nn.utils.clip_grad_norm_`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> with patch():
    ...     torch.nn.utils.clip_grad_norm_([w], max_norm=1.0)
    tensor(5.)
    """
    return patch_with(lambda function: function)


def unpatch() -> None:
    """Undo the last `patch()` that still holds; nothing if none does.

    Reference: `torch.nn.utils.clip_grad_norm_`.

    >>> held = patch(); unpatch()
    >>> torch.nn.utils.clip_grad_norm_.__module__
    'torch.nn.utils.clip_grad'
    """
    _patches.remove()


def patch_with(wrap: Wrap) -> Patch:
    """`patch`, by what `wrap` makes of each function of ours, unless torch is patched already."""
    # What another thread is importing is there before it is looked at; not under the lock, which
    # that import may need.
    for library in _LIBRARIES:
        if library.MODULE in sys.modules:
            with suppress(ImportError):
                importlib.import_module(library.MODULE)
    _patches.add(new := Patch(wrap))
    return new


def describe() -> str:
    """What is patched, for people."""
    return _patches.describe()


class _Patches:
    """Those that hold. One for the process, as torch's functions are."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: tuple[Patch, ...] = ()
        self._undo: list[Undo] = []
        self._by_name: list[str] = []

    def holds(self, one: Patch) -> bool:
        return any(held is one for held in self._held)

    def add(self, new: Patch) -> None:
        with self._lock:
            if not self._held:
                self._do(new.wrap)
            self._held += (new,)

    def remove(self, one: Patch | None = None) -> None:
        with self._lock:
            if one is None and self._held:
                one = self._held[-1]
            if one is None or not self.holds(one):
                return
            held = [*self._held]
            # Blocks of one patch may lie in each other.
            held.remove(one)
            self._held = tuple(held)
            if not self._held:
                for undo in reversed(self._undo):
                    undo()
                self._undo, self._by_name = [], []

    def describe(self) -> str:
        with self._lock:
            if not self._held:
                return "no"
            names = ", ".join(self._by_name)
            return f"yes{f', but for whoever holds {names}' if names else ''}"

    def _do(self, wrap: Wrap) -> None:
        for function in _FUNCTIONS:
            name, ours = function.__name__, wrap(function)
            theirs = getattr(torch.nn.utils, name)
            undo = redirect(theirs, ours)
            if undo is None:
                self._by_name.append(name)
                undo = rename(theirs, partial(ours))
            self._undo.append(undo)
        for library in _LIBRARIES:
            self._once_imported(library.MODULE, partial(library.adapt, wrap=wrap))

    def _once_imported(self, name: str, adapt: Callable[[ModuleType], list[Undo]]) -> None:
        """`adapt` to a module now, or as soon as it is imported."""
        if name in sys.modules:
            self._undo += adapt(sys.modules[name])
            return

        def action(module: ModuleType) -> None:
            with self._lock:
                if self._held:
                    self._undo += adapt(module)

        sys.meta_path.insert(0, after := After(name, action))

        def undo() -> None:
            if after in sys.meta_path:
                sys.meta_path.remove(after)

        self._undo.append(undo)


_patches = once("patches", _Patches)
