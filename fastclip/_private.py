"""Access to torch's private names: each is looked up in one file, by one of these two functions.

tests/test_private_names.py lists them, with what breaks without each. If a version of torch lacks
one, fastclip still imports and clips plain gradients; only features that need the name raise.
"""

import pkgutil
from typing import Any, NoReturn

import torch

TESTED = "2.13 and 2.14"


class Missing:
    """Stands for a name that this version of torch does not have: any use raises."""

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
    """Return the object at a path like "torch._utils._flatten", or a `Missing` if there is none."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return Missing(path)


def attribute(owner: Any, name: str) -> Any:
    """Return an attribute of a torch object; if that lacks it, raise as a `Missing` does."""
    try:
        return getattr(owner, name)
    except AttributeError:
        return Missing(f"{type(owner).__name__}.{name}")._raise()
