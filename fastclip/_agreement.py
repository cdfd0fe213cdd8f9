"""What ranks compare before they clip together for the first time, since their sums are bare."""

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
    """See that the ranks that add up the gradients clip alike.

    `read` gives the `SpreadGrads`: called here, where no compiler traces it. Waits for the device.
    A rank with the rules of another step, as one that did not find its checkpoint, would scale its
    shards by another threshold than the rest.

    Raises:
        ValueError: they do not clip alike; on all ranks.
    """
    version = sys.modules["fastclip"].__version__
    kernels = {device: has_kernels(device) for device in ("cpu", "cuda")}
    told: dict[str, Any] = {
        "names": list(names),
        "thresholds and rules": [_text_of(threshold) for threshold in thresholds],
        "norm_type and nonfinite": [p, nonfinite],
        "versions and kernels": [version, PROTOCOL, torch.__version__, kernels],
    }
    differing = read().find_differing([str(value) for value in told.values()])
    if differing is not None:
        topic = list(told)[differing]
        raise ValueError(
            f"groups: expected the same on all ranks, in the same order, got {topic} "
            f"{told[topic]} here and others elsewhere; every rank makes the GradClipper with the "
            "same groups, a group of which it holds nothing with no params, and loads its state"
        )


def _text_of(threshold: Threshold) -> str:
    """Of what is no number or rule of ours the kind: ranks have equal ones of their own."""
    if isinstance(threshold, State):
        return threshold.describe()
    if isinstance(threshold, float):
        return repr(threshold)
    return str(getattr(threshold, "__qualname__", type(threshold).__qualname__))
