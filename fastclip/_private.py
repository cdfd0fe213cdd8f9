"""torch's private names, each of which is asked for in one file by one of these two functions.

tests/test_private_names.py lists them, with what breaks without each. Where a torch has lost one,
fastclip is imported all the same, and so is a plain gradient clipped; what needs the name raises.
"""

import pkgutil
from typing import Any, NoReturn

import torch

TESTED = "2.13 and 2.14"


class Missing:
    """What stands for a name that this torch does not have: any use raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _raise(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"torch {torch.__version__} has no {self._name}, which this needs; fastclip was tested "
            f"with torch {TESTED}: use one of those, or a newer fastclip"
        )

    __call__ = __getattr__ = __instancecheck__ = _raise

    def __bool__(self) -> bool:
        return False


def private(path: str) -> Any:
    """What `path` names, as "torch._utils._flatten"; a `Missing` where this torch has it not."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return Missing(path)


def attribute(owner: Any, name: str) -> Any:
    """An attribute of something of torch's; raises as a `Missing` where it has it not."""
    try:
        return getattr(owner, name)
    except AttributeError:
        return Missing(f"{type(owner).__name__}.{name}")._raise()
