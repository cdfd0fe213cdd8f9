"""Optimizers: wrappers around them, and fused ones, which can divide gradients in their step.

Imports `_ranks` and `_ops`.
"""

from .fused import check, divides, split, step
from .wrapped import as_list, layers_of, parameters_of
