"""Before the first clip, check that ranks clip alike: their sums carry no names to compare."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._arguments import Threshold
from ._ops import has_kernels
from ._ranks import PROTOCOL
from ._state import State


@torch.compiler.disable
def check_agreement(
    read: Callable[[], Any],
    names: Sequence[str],
    thresholds: Sequence[Threshold],
    p: float,
    nonfinite: str,
) -> None:
    """Check that ranks with a common norm have the same arguments and states; wait for the device.

    `read` returns `SpreadGrads` (gradients spread over ranks); it is called in here, where
    torch.compile does not trace it. A rank whose rules are in another state, for example because it
    has found no checkpoint, would scale its shards by another threshold than the rest.

    Raises:
        ValueError: the ranks differ; raised on all ranks.
    """
    version = sys.modules["fastclip"].__version__
    kernels = {device: has_kernels(device) for device in ("cpu", "cuda")}
    compared: dict[str, Any] = {
        "names": list(names),
        "thresholds and rules": [_text_of(threshold) for threshold in thresholds],
        "norm_type and nonfinite": [p, nonfinite],
        "versions and kernels": [version, PROTOCOL, torch.__version__, kernels],
    }
    differing = read().find_differing([str(value) for value in compared.values()])
    if differing is not None:
        topic = list(compared)[differing]
        raise ValueError(
            "groups: expected the same on all ranks, in the same order, got "
            f"{topic} {compared[topic]} here and others on another rank; make the GradClipper with "
            "the same groups on every rank (with empty params where it holds none of a group), and "
            "load the same state"
        )


def _text_of(threshold: Threshold) -> str:
    """Describe a threshold as text: a tensor by its type alone, a function by its name."""
    if isinstance(threshold, State):
        return threshold.describe()
    if isinstance(threshold, float):
        return repr(threshold)
    return str(getattr(threshold, "__qualname__", type(threshold).__qualname__))
