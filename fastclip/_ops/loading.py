"""Load the extension from the package's directory, or say why its kernels are not in use.

It is not loaded if it was built for another minor version of torch, or if the environment has
FASTCLIP_KERNELS=0. Once it is loaded, kernels.py can turn the kernels off and on.
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
# The value when this module was imported; later changes have no effect.
_ASKED = os.environ.get("FASTCLIP_KERNELS", "1")


def _built_for(path: str) -> str:
    """Return the torch version an extension file was built for, without loading the file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"fastclip built for torch ([\w.+]+)", data)
        return found[1].decode() if found else "unknown"


def _load() -> ModuleType | None:
    """Return `_C`; None if turned off, not built, built for another torch, or not loadable."""
    if _ASKED not in ("0", "1"):
        raise ValueError(f"FASTCLIP_KERNELS={_ASKED}: expected 0, for plain-PyTorch ops, or 1")
    if _ASKED == "0":
        return None
    # Search only this package: a plain import could find an editable install of another checkout.
    package = str(Path(__file__).parent.parent)
    spec = importlib.machinery.PathFinder.find_spec("fastclip._C", [package])
    if spec is None or spec.origin is None:
        return None
    built_for, why = _built_for(spec.origin), ""
    if built_for.split(".")[:2] == torch.__version__.split(".")[:2]:
        try:
            return importlib.import_module("fastclip._C")
        except ImportError as error:
            # For example, nightly builds of one version may differ in their ABI.
            why = f" ({error})"
    warnings.warn(
        f"fastclip was built for torch {built_for} and this is torch {torch.__version__}: its "
        f"plain-PyTorch ops are in use{why}. To rebuild, in its checkout: {REBUILD}",
        stacklevel=2,
    )
    return None


extension: Any = _load()


def turned_off() -> str | None:
    """Return what has turned the kernels off; None if nothing has."""
    if _ASKED == "0":
        return "FASTCLIP_KERNELS=0 was set"
    if extension is not None and not extension.kernels_are_on():
        return "fastclip.use_kernels(False) was called"
    return None


def refusal(device: torch.device) -> str | None:
    """Return why the kernels do not run on a CUDA device and what to do; None if they run."""
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
    """Return whether there are compiled kernels for a device type, 'cpu' or 'cuda'."""
    if extension is None or turned_off():
        return False
    return device_type == "cpu" or (device_type == "cuda" and bool(extension.cuda_architectures))
