"""What is spread over ranks: process groups, meshes of DTensors, and plans to put norms together.

Nothing but this room knows DTensors and collectives. It imports `_ops`, `_private` and
`_warnings`.
"""

from .ddp import is_data_parallel, on_reduced_buckets
from .failure import NUMBERS, Failure, mark_of, raise_if_failed, raise_reason
from .groups import as_groups, find_differing, is_alone, rank
from .mesh import is_dtensor, local_of, placed, value_of
from .parts import PROTOCOL, as_norm, as_parts, combined, over, over_line, over_mesh, spoiled
from .plan import Plan, find, follow, is_spread, of_plain, planned
from .reduction import NONE, Asked, Kind
from .traced import constants, cuts, local_in_graph, replicated_in_graph
from .trial import clip_models, differing, gather, join, leave
