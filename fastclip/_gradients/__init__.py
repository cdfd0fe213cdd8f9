"""From parameters to `Gradients`: objects with methods that measure, scale, clamp and clip.

`read` and `take` return one of three classes: `PlainGrads`, read in C++ by the extension;
`LocalGrads`, read in Python; or `SpreadGrads`, measured together with other ranks. Imports
`_ranks`, `_ops`, `_arguments`, `_private` and `_warnings`.
"""

from .look import check_supported
from .named import NamedParameters, found_in_groups, named
from .protocol import Gradients
from .reading import aligned, as_list, clip_at_once_, present, read, read_by, take, take_weights
from .spread import SpreadGrads, each_norms_of, fail
from .stored import held
