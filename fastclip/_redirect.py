"""Replace functions of other libraries by fastclip's, and undo it."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.utils import clip_grad

Undo = Callable[[], object]


def _is_decorated_by_torch(function: Any) -> bool:
    """Whether torch's decorator `_no_grad` made a function; its closure then is one cell `func`."""
    code = getattr(function, "__code__", None)
    made = code and (code.co_filename, code.co_freevars)
    return made == (clip_grad.__file__, ("func",))


def redirect(theirs: Any, ours: Callable[..., Any]) -> Undo | None:
    """Let `theirs`, which torch's decorator `_no_grad` has made, call `ours` inside.

    `theirs` may also be a wrapper of such a function. The function stays the same object, so this
    reaches all its names and callers. Return None if no `_no_grad` has made it.
    """
    theirs = inspect.unwrap(theirs, stop=_is_decorated_by_torch)
    if not _is_decorated_by_torch(theirs):
        return None
    (cell,) = theirs.__closure__
    undo = partial(setattr, cell, "cell_contents", cell.cell_contents)
    cell.cell_contents = ours
    return undo


def rename(theirs: Any, ours: Any) -> Undo:
    """Assign `ours` to every name in an imported module that refers to `theirs`.

    Undoing assigns `theirs` to every name that refers to `ours`. So `ours` must be a function to
    which nothing else refers, such as one made for this call.
    """

    def change(old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is old:
                    setattr(module, name, new)

    change(theirs, ours)
    return partial(change, ours, theirs)
