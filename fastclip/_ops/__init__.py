"""The ops of `torch.ops.fastclip`, and the extension that has kernels for them.

Each op has a default in plain PyTorch, which runs on every device without the extension. The
extension registers CPU and CUDA kernels, and torch's dispatcher alone chooses which code runs. No
other package of fastclip uses `torch.ops` or `_C`. This one imports only `_private`.
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
