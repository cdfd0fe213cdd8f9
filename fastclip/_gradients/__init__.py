"""From parameters to gradients that have verbs: measure, scale, clamp, clip.

`read` and `take` return `Gradients`: plain ones, whose list the extension has read in C++; local
ones, read here; or those that are spread over ranks. Imports `_ranks`, `_ops`,
`_arguments`, `_private` and `_warnings`.
"""

from .look import check_supported
from .named import NamedParameters, found_in_groups, named
from .protocol import Gradients
from .reading import aligned, as_list, clip_at_once_, present, read, read_by, take, take_weights
from .spread import SpreadGrads, each_norms_of, fail
from .stored import held
