"""The extension: found beside the package, if it is built for this torch; and why it may not serve.

Built for another torch it would not load, which is seen before it is tried. Nor is it where
FASTCLIP_KERNELS=0 is in the environment; kernels.py has the switch of a process that loaded it.
"""

import importlib
import importlib.machinery
import mmap
import os
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."
NVCC = 'pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"'
# What the environment said when this was imported.
_ASKED = os.environ.get("FASTCLIP_KERNELS", "1")


def _built_for(path: str) -> str:
    """The torch version an extension file was built for, read without loading it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"fastclip built for torch ([\w.+]+)", data)
        return found[1].decode() if found else "unknown"


def _load() -> ModuleType | None:
    """`_C`; None if it is not built, built for another minor version of torch, or does not load."""
    if _ASKED not in ("0", "1"):
        raise ValueError(f"FASTCLIP_KERNELS={_ASKED}: expected 0, for the plain-PyTorch ops, or 1")
    if _ASKED == "0":
        return None
    # In this package and nowhere else: an editable install of another checkout would be found.
    package = str(Path(__file__).parent.parent)
    spec = importlib.machinery.PathFinder.find_spec("fastclip._C", [package])
    if spec is None or spec.origin is None:
        return None
    built_for, why = _built_for(spec.origin), ""
    if built_for.split(".")[:2] == torch.__version__.split(".")[:2]:
        try:
            return importlib.import_module("fastclip._C")
        except ImportError as error:
            # As of a nightly build, which may differ from another of the same version.
            why = f" ({error})"
    warnings.warn(
        f"fastclip was built for torch {built_for} and this is torch {torch.__version__}: its "
        f"plain-PyTorch ops are in use{why}. To rebuild, in its checkout: {REBUILD}",
        stacklevel=2,
    )
    return None


extension: Any = _load()


def turned_off() -> str | None:
    """What has turned the kernels off; None if nothing has."""
    if _ASKED == "0":
        return "FASTCLIP_KERNELS=0 was set"
    if extension is not None and not extension.kernels_are_on():
        return "fastclip.use_kernels(False) was called"
    return None


def refusal(device: torch.device) -> str | None:
    """Why the kernels do not serve a CUDA device, and the way out; None if they do."""
    if why := turned_off():
        return why
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


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels serve a device type, 'cpu' or 'cuda'."""
    if extension is None or turned_off():
        return False
    return device_type == "cpu" or (device_type == "cuda" and bool(extension.cuda_architectures))
