"""Warnings that name the line of the user's code that caused them."""

import sys
import warnings
from pathlib import Path

import torch

# The files of fastclip, and those of torch, whose decorators call functions of fastclip.
_NOT_OF_USERS = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    level = 2
    # The compiler warns while it traces, where there are no frames.
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_OF_USERS):
            frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
