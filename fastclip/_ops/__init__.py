"""The ops of `torch.ops.fastclip`, and the extension that has kernels for them.

Each exists on every device with nothing built, as its default in plain PyTorch; the extension adds
kernels device by device, and the dispatcher is the only switch between them. Nothing but this room
says `torch.ops` or `_C`, and it imports `_private` alone.
"""

from .coef import EPSILON, ZEROS, clip_coef, means_zeros
from .loading import NVCC, REBUILD, extension, has_kernels, refusal, turned_off
from .measure import empty_norm, norm_of, widest
from .process import once
from .reference import count_rows, result_dtype
from .schemas import clamp_, clip_norm_, norm, norms, scale_
from .transforms import (
    is_differentiated,
    is_fake,
    is_host_readable,
    is_transformed,
    refuse_transforms,
    without_modes,
)
