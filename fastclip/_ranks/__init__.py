"""Distributed gradients: process groups, DTensor meshes, and plans to combine norms over ranks.

No other package of fastclip uses DTensors or collectives. It imports `_ops`, `_private` and
`_warnings`.
"""

from .ddp import is_data_parallel, on_reduced_buckets
from .failure import NUMBERS, Failure, raise_if_failed
from .groups import as_groups, find_differing, is_alone, rank
from .mesh import is_dtensor, local_of, place_as, value_of
from .parts import (
    PROTOCOL,
    all_reduce_members,
    as_norms,
    as_parts,
    combine_slots,
    share_nonfinite,
)
from .plan import Plan, find_plan, follow, is_spread, plan_of_plain
from .reduction import NONE, Asked, Kind
from .traced import local_in_graph, plan_of_graph
from .trial import clip_models, differing, gather, join, leave
