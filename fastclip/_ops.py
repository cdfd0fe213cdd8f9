"""The ops: schemas, fakes, defaults; the compiled kernels if they are there.

`norm`, `norms`, `scale_`, `clamp_`, `clip_norm_`, and the small `clip_coef`, `record_`, `autoclip_`
and `zclip_` exist on every device with nothing built; the extension adds kernels device by device.
The dispatcher is the only switch between them.
"""

import importlib
import importlib.machinery
import mmap
import os
import re
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _coef, _reference, _thresholds
from ._transforms import refused

REBUILD = "pip install --no-build-isolation -e ."
NVCC = 'pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"'


def _built_for(path: str) -> str:
    """The torch version an extension file was built for, read without loading it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"fastclip built for torch ([\w.+]+)", data)
        return found[1].decode() if found else "unknown"


def _load_extension() -> ModuleType | None:
    """`_C`, or None if it is not built, or built for a torch of another minor version."""
    # Beside this file and nowhere else: an editable install of another checkout would be found.
    spec = importlib.machinery.PathFinder.find_spec("fastclip._C", [os.path.dirname(__file__)])
    if spec is None or spec.origin is None:
        return None
    built_for = _built_for(spec.origin)
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        warnings.warn(
            f"fastclip was built for torch {built_for} and this is torch {torch.__version__}: its "
            f"plain-PyTorch ops are in use. To rebuild, in its checkout: {REBUILD}",
            stacklevel=2,
        )
        return None
    return importlib.import_module("fastclip._C")


def _define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    default: Callable[..., Any],
    transformed: Callable[..., Any] | None = None,
) -> None:
    """`transformed`: what the op is inside transforms of functions, if not its default."""
    torch.library.define(f"fastclip::{name}", schema)
    torch.library.register_fake(f"fastclip::{name}", fake)
    torch.library.impl(f"fastclip::{name}", "CompositeExplicitAutograd", default)
    torch.library.impl(
        f"fastclip::{name}", "FuncTorchDynamicLayerFrontMode", transformed or default
    )


def _announced(default: Callable[..., Any]) -> Callable[..., Any]:
    """`default`, with a warning where a GPU's gradients reach it that kernels might have served."""

    def op(tensors: Sequence[Tensor], *args: Any) -> Any:
        if tensors and tensors[0].is_cuda and (why := _refusal(tensors[0].device)):
            warnings.warn(
                f"fastclip's plain-PyTorch ops are in use for {tensors[0].device}: {why}",
                stacklevel=2,
            )
        return default(tensors, *args)

    return op


def _refusal(device: torch.device) -> str | None:
    """Why the kernels do not serve a CUDA device, and the way out; None if they do."""
    reason = extension.cuda_refusal(device.index) if extension else "not built"
    if reason == "not built":
        return f"the CUDA kernels are not built. With nvcc ({NVCC}), in a checkout: {REBUILD}"
    if reason == "no code for its architecture":
        major, minor = torch.cuda.get_device_capability(device)
        rebuild = f"TORCH_CUDA_ARCH_LIST={major}.{minor} {REBUILD}"
        return f"the CUDA kernels hold {reason}. In a checkout: {rebuild}"
    return reason and (
        f"{reason}. Update the driver, or rebuild, in a checkout, with the nvcc of a toolkit that "
        f"is not newer: {REBUILD}"
    )


def _result(tensors: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not tensors:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return tensors[0].new_empty(shape, dtype=dtype)


def _norm_fake(tensors: Sequence[Tensor], p: float, wide: bool = False) -> Tensor:
    return _result(tensors, (), torch.float64 if wide else _reference.result_dtype(tensors))


def _norms_fake(
    tensors: Sequence[Tensor],
    p: float,
    group: Sequence[int] | None = None,
    wide: bool = False,
    rows: bool = False,
) -> Tensor:
    _reference.check_groups(len(tensors), group, rows)
    count = sum(_reference.count_rows(t) for t in tensors) if rows else len(tensors)
    groups = count if group is None else max(group, default=-1) + 1
    return _result(tensors, (groups,), torch.float64 if wide else _reference.result_dtype(tensors))


def _in_place_fake(*args: Any) -> None:
    return None


def _clip_norm_fake(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    return _norm_fake(tensors, p)


_define(
    "norm",
    "(Tensor[] tensors, float p, bool wide=False) -> Tensor",
    _norm_fake,
    _announced(_reference.norm),
)
_define(
    "norms",
    "(Tensor[] tensors, float p, int[]? group=None, bool wide=False, bool rows=False) -> Tensor",
    _norms_fake,
    _announced(_reference.norms),
)
_define(
    "scale_",
    "(Tensor(a!)[] tensors, Tensor coef, int[]? group=None, bool rows=False) -> ()",
    _in_place_fake,
    _announced(_reference.scale_),
)
_define(
    "clamp_",
    "(Tensor(a!)[] tensors, float bound) -> ()",
    _in_place_fake,
    _announced(_reference.clamp_),
)
_define(
    "clip_norm_",
    "(Tensor(a!)[] tensors, float max_norm, float p, Tensor[]? norms=None) -> Tensor",
    _clip_norm_fake,
    _announced(_reference.clip_norm_),
)
_define(
    "clip_norm_.tensor",
    "(Tensor(a!)[] tensors, Tensor max_norm, float p, Tensor[]? norms=None) -> Tensor",
    _clip_norm_fake,
    _announced(_reference.clip_norm_),
)

_define(
    "clip_coef",
    "(Tensor total_norm, float max_norm, bool wide=True) -> Tensor",
    lambda total_norm, *how: torch.empty_like(total_norm),
    _coef.clip_coef,
)
_define(
    "clip_coef.tensor",
    "(Tensor total_norm, Tensor max_norm, bool wide=True) -> Tensor",
    lambda total_norm, *how: torch.empty_like(total_norm),
    _coef.clip_coef,
)
_define(
    "record_",
    "(Tensor(a!) rows, Tensor(b!) steps, Tensor row) -> ()",
    _in_place_fake,
    _reference.record_,
    refused("GradClipper"),
)
_define(
    "autoclip_",
    "(Tensor(a!) norms, Tensor(b!) count, Tensor total_norm, float percentile) -> Tensor",
    lambda norms, count, total_norm, percentile: torch.empty_like(total_norm),
    _thresholds.autoclip_,
    refused("AutoClip"),
)
_define(
    "zclip_",
    "(Tensor(a!) steps, Tensor(b!) mean, Tensor(c!) variance, Tensor total_norm, float alpha, "
    "float z_threshold, int warmup_steps) -> Tensor",
    lambda steps, mean, variance, total_norm, *how: torch.empty_like(total_norm),
    _thresholds.zclip_,
    refused("ZClip"),
)


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels are registered for a device type, 'cpu' or 'cuda'."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastclip::norm", device_type.upper())


extension: Any = _load_extension()

norm = torch.ops.fastclip.norm
norms = torch.ops.fastclip.norms
scale_ = torch.ops.fastclip.scale_
clamp_ = torch.ops.fastclip.clamp_
record_ = torch.ops.fastclip.record_.default
autoclip_ = torch.ops.fastclip.autoclip_.default
zclip_ = torch.ops.fastclip.zclip_.default


# The dispatcher would take a 0-d tensor for a number and wait for its value.
def clip_norm_(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    ops = torch.ops.fastclip.clip_norm_
    op = ops.tensor if isinstance(max_norm, Tensor) else ops.default
    return op(tensors, max_norm, p, norms)


def clip_coef(total_norm: Tensor, max_norm: float | Tensor, wide: bool = True) -> Tensor:
    ops = torch.ops.fastclip.clip_coef
    return (ops.tensor if isinstance(max_norm, Tensor) else ops.default)(total_norm, max_norm, wide)
