"""Gradient clipping for PyTorch: one read, exact norms, one line to adopt."""

from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .rules import AutoClip, ZClip

__all__ = [
    "AutoClip",
    "ZClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
__version__ = "0.1.0"
