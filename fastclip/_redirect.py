"""Functions of other libraries, replaced by ours and given back."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch.nn.utils import clip_grad

Undo = Callable[[], object]


def _made_by_a_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    def calls(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return calls


def _is_torchs(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    made = code and (code.co_filename, code.co_freevars)
    return made == (clip_grad.__file__, ("func",))


def redirect(theirs: Any, ours: Callable[..., Any]) -> Undo | None:
    """Let what torch's `_no_grad` decorator made of a function `func` call `ours` and nothing else.

    It stays the same object, whoever holds or wraps it, with its name and signature. None if it was
    not made so.
    """
    theirs = inspect.unwrap(theirs, stop=_is_torchs)
    if not _is_torchs(theirs):
        return None
    code = theirs.__code__
    (cell,) = theirs.__closure__
    func = cell.cell_contents

    # What runs meanwhile in other threads is never `func` without its decorator.
    def undo() -> None:
        theirs.__code__ = code
        cell.cell_contents = func

    cell.cell_contents = ours
    theirs.__code__ = _made_by_a_decorator(ours).__code__
    return undo


def rename(theirs: Any, ours: Any) -> Undo:
    """Let every name for `theirs` in the modules that are imported be for `ours`.

    That nobody else may have a name for: undone, its names are for `theirs` again.
    """

    def change(old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is old:
                    setattr(module, name, new)

    change(theirs, ours)
    return lambda: change(ours, theirs)
