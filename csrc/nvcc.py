"""Finds nvcc and compiles the CUDA kernels with it, for setup.py.

torch compiles .cu files only if torch itself was built with CUDA. The kernels include no torch
header, so nvcc can be called directly; its object file and libraries go to the linker.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

KERNELS = "csrc/cuda/launch.cu"
FLAGS = "-std=c++20 -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"


def find() -> str | None:
    """Look for nvcc in CUDA_HOME, on PATH, and where pip installs it for the running Python."""
    packages = [p for d in sys.path for p in sorted(Path(d).glob("nvidia/cu*/bin"), reverse=True)]
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    return shutil.which("nvcc", path=":".join(map(str, [*folders, os.environ["PATH"], *packages])))


def ask(nvcc: str, *options: str) -> str:
    return subprocess.check_output([nvcc, *options], stderr=subprocess.STDOUT, text=True)


def architectures(nvcc: str) -> list[str]:
    """Return the flags: machine code of all architectures; PTX of the newest, for later GPUs.

    TORCH_CUDA_ARCH_LIST ("9.0 12.0") replaces the default architectures.
    """
    known = ask(nvcc, "--list-gpu-code")
    default = [a for a in ("80", "90", "100", "120") if f"sm_{a}" in known]
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(default)
    # The suffix of 9.0a or 10.0f is dropped: code built with it runs on no later architecture.
    numbers = sorted({int(number) for number in re.findall(r"\d+", chosen.replace(".", ""))})
    codes = [(n, f"sm_{n}") for n in numbers] + [(numbers[-1], f"compute_{numbers[-1]}")]
    return [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]


def command(nvcc: str, built: str) -> list[str]:
    """Return the command that compiles the kernels to `built`, all architectures in parallel."""
    Path(built).parent.mkdir(parents=True, exist_ok=True)
    return [nvcc, *FLAGS.split(), "-t0", *architectures(nvcc), "-c", KERNELS, "-o", built]


def add(nvcc: str, kernels: str, extension: Any) -> None:
    """Link the compiled kernels, and the CUDA runtime with them, into the extension."""
    folders = re.findall('"-L([^"]+)"', ask(nvcc, "--dryrun", KERNELS))
    # nvcc always names lib64, but if pip has installed it, the libraries are in lib.
    folders += [str(Path(folder).parent / "lib") for folder in folders]
    extension.extra_objects.append(kernels)
    extension.library_dirs += folders
    extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
