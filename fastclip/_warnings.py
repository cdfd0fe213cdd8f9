"""Warnings that name the line of the user's code from which they come."""

import sys
import warnings
from pathlib import Path

import torch

# The frames of torch are those of its decorators.
_OURS = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    level = 2
    # The compiler knows no frames, and gives warnings as it traces.
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
            frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
