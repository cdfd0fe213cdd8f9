"""What is spread over ranks: process groups, meshes of DTensors, and plans to put norms together.

Nothing but this room knows DTensors and collectives. It imports `_ops` alone.
"""

from .ddp import is_data_parallel, on_reduced_buckets
from .groups import as_groups, is_alone, is_same, raise_if_told, told
from .mesh import as_replicated, is_dtensor, local_of, placed, replicated, value_of
from .parts import as_norm, as_parts, combined, over, spoiled
from .plan import Plan, find, follow, is_spread, of_plain
from .reduction import NONE, Asked, Kind

__all__ = [
    "NONE",
    "Asked",
    "Kind",
    "Plan",
    "as_groups",
    "as_norm",
    "as_parts",
    "as_replicated",
    "combined",
    "find",
    "follow",
    "is_alone",
    "is_data_parallel",
    "is_dtensor",
    "is_same",
    "is_spread",
    "local_of",
    "of_plain",
    "on_reduced_buckets",
    "over",
    "placed",
    "raise_if_told",
    "replicated",
    "spoiled",
    "told",
    "value_of",
]
