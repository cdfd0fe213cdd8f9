"""Optimizers: which are given, what wrappers hold, and steps that divide the gradients.

Imports `_ranks` and `_ops`.
"""

from .fused import check, divides, split, step
from .wrapped import as_list, layers_of, parameters_of
