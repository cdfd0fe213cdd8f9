"""Gradient clipping for PyTorch: one read, exact norms, one line to adopt."""

from ._arguments import Group
from .accumulator import NormAccumulator
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .clipper import GradClipper
from .kernels import use_kernels
from .nonfinite import find_nonfinite
from .optim import clipped_step, unscale_and_clip_
from .patching import patch, unpatch
from .per_tensor import clip_grad_agc_, clip_grad_norms_, normalize_grad_
from .rules import AutoClip, ZClip
from .spikes import DropSpikes

__all__ = [
    "AutoClip",
    "DropSpikes",
    "GradClipper",
    "Group",
    "NormAccumulator",
    "ZClip",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_norms_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clipped_step",
    "find_nonfinite",
    "get_total_norm",
    "normalize_grad_",
    "patch",
    "unpatch",
    "unscale_and_clip_",
    "use_kernels",
]
__version__ = "0.1.0"
