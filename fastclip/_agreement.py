"""What ranks compare before they clip together for the first time: their sums carry no names."""

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
    """Check that the ranks that add up the gradients clip alike; wait for the device.

    `read` gives the `SpreadGrads`; it is called here, where no compiler traces it. A rank whose
    rules have seen other steps, because it did not find its checkpoint, would scale its shards by
    another threshold than the rest.

    Raises:
        ValueError: they do not clip alike; on all ranks.
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
            f"{topic} {compared[topic]} here and others elsewhere; every rank makes the "
            "GradClipper with the same groups, a group of which it holds nothing with no params, "
            "and loads its state"
        )


def _text_of(threshold: Threshold) -> str:
    """Describe a threshold; a tensor or another function by its kind, as ranks hold equal ones."""
    if isinstance(threshold, State):
        return threshold.describe()
    if isinstance(threshold, float):
        return repr(threshold)
    return str(getattr(threshold, "__qualname__", type(threshold).__qualname__))
