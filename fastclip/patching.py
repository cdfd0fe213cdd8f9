"""torch's clipping functions replaced by fastclip's, for callers that know nothing of fastclip.

torch decorates each of its clipping functions. The function inside the decorator is exchanged, so
that all callers are reached, however they imported it; `unpatch` puts torch's back. If a program
has put a function of its own in the place of torch's, that function stays as it is, and fastclip's
is assigned to all its names in imported modules. Functions of another library are replaced when it
is imported: each library has a file in `integrations`, and `_LIBRARIES` lists them.
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

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
# torch.nn.utils has functions of the same names.
_FUNCTIONS = (clip_grad_norm_, clip_grad_value_, get_total_norm, clip_grads_with_norm_)
_LIBRARIES = (megatron, timm)


class Patch:
    """One call of `patch()`: the end of its `with` block undoes it, a new `with` patches again."""

    def __init__(self, wrap: Wrap) -> None:
        self.wrap = wrap
        self._was_entered = False

    def __enter__(self) -> "Patch":
        # The first `with` takes over the call of `patch()`, if nobody has undone that.
        if self._was_entered or self not in _patches.held:
            _patches.add(self)
        self._was_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        _patches.remove(self)


def patch() -> Patch:
    r"""Replace torch's clipping functions by fastclip's, for every caller in this process.

    These are `clip_grad_norm_`, `clip_grad_value_`, `get_total_norm` and `clip_grads_with_norm_`
    of `torch.nn.utils`, whenever and however they were imported, in compiled code too. timm's
    `adaptive_clip_grad` and the two functions by which Megatron-core measures and scales are
    replaced too, now or when these libraries are imported. Each call of `patch` needs a call of
    `unpatch`, in any order and from any thread.

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
    """Undo the latest `patch()` that is in effect; do nothing if none is.

    Reference: `torch.nn.utils.clip_grad_norm_`.

    >>> held = patch(); unpatch()
    >>> torch.nn.utils.clip_grad_norm_.__module__
    'torch.nn.utils.clip_grad'
    """
    _patches.remove()


def patch_with(wrap: Wrap) -> Patch:
    """Patch with `wrap(f)` for each function f of fastclip; if already patched, ignore `wrap`."""
    # Wait until libraries that another thread is importing are complete; not under the lock, which
    # such an import may need.
    for library in _LIBRARIES:
        if library.MODULE in sys.modules:
            with suppress(ImportError):
                importlib.import_module(library.MODULE)
    _patches.add(new := Patch(wrap))
    return new


def is_patched() -> bool:
    """Whether a `patch()` is in effect."""
    return bool(_patches.held)


class _Patches:
    """The patches in effect: one object for the process, because torch's functions are global."""

    def __init__(self) -> None:
        self.held: list[Patch] = []
        self._lock = threading.RLock()
        self._undo: list[Undo] = []

    def add(self, new: Patch) -> None:
        with self._lock:
            if not self.held:
                self._replace(new.wrap)
            self.held.append(new)

    def remove(self, one: Patch | None = None) -> None:
        """Remove a patch, by default the latest; if none is left, restore the originals."""
        with self._lock:
            one = one or (self.held[-1] if self.held else None)
            if one not in self.held:
                return
            self.held.remove(one)
            if not self.held:
                for undo in reversed(self._undo):
                    undo()
                self._undo = []

    def _replace(self, wrap: Wrap) -> None:
        for function in _FUNCTIONS:
            theirs, ours = getattr(torch.nn.utils, function.__name__), wrap(function)
            self._undo.append(redirect(theirs, ours) or rename(theirs, partial(ours)))
        for library in _LIBRARIES:
            adapt = partial(library.adapt, wrap=wrap)
            if library.MODULE in sys.modules:
                self._undo += adapt(sys.modules[library.MODULE])
            else:
                self._adapt_at_import(library.MODULE, adapt)

    def _adapt_at_import(self, name: str, adapt: Callable[[ModuleType], list[Undo]]) -> None:
        def adapt_if_patched(module: ModuleType) -> None:
            with self._lock:
                if self.held:
                    self._undo += adapt(module)

        after = After(name, adapt_if_patched)
        after.install()
        self._undo.append(after.remove)


_patches = once("patches", _Patches)
