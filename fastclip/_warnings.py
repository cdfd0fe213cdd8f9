"""Warnings that name the line of the user's code that caused them."""

import sys
import warnings
from pathlib import Path

import torch

# fastclip's own files, and torch's, since decorators of torch call functions of fastclip.
_NOT_OF_USERS = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    level = 2
    # While torch.compile traces, there are no frames to walk.
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_OF_USERS):
            frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
