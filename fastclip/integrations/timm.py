"""timm: its `adaptive_clip_grad` calls fastclip's `clip_grad_agc_`."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor

from .._redirect import Undo, rename
from ..per_tensor import clip_grad_agc_

MODULE = "timm.utils.agc"


def adapt(module: ModuleType, wrap: Callable[..., Any]) -> list[Undo]:
    """Replace `adaptive_clip_grad` wherever it was imported."""
    theirs: Any = getattr(module, "adaptive_clip_grad", None)

    def adaptive_clip_grad(
        parameters: Tensor | Iterable[Tensor],
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        norm_type: float = 2.0,
    ) -> Any:
        if norm_type != 2:
            return theirs(parameters, clip_factor, eps, norm_type)
        clip_grad_agc_(parameters, clip_factor, eps)
        return None

    return [rename(theirs, wrap(adaptive_clip_grad))] if theirs else []
