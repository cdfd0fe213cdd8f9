"""Builds the extension `fastclip._C`; everything else is in pyproject.toml.

FASTCLIP_CUDA=auto|0|1: with CUDA kernels where nvcc is; without; not without. They are compiled
for TORCH_CUDA_ARCH_LIST ("9.0 12.0") and what is newer.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CUDA = os.environ.get("FASTCLIP_CUDA", "auto")
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")
if CUDA not in ("auto", "0", "1") or (CUDA == "1" and not NVCC):
    raise SystemExit(f"FASTCLIP_CUDA={CUDA}: expected auto, 0, or 1 with nvcc on PATH")
WITH_CUDA = CUDA != "0" and NVCC is not None and torch.version.hip is None
KERNELS = "csrc/cuda/launch.cu"
FLAGS = "-std=c++20 -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"


def ask_nvcc(*options):
    return subprocess.check_output([NVCC, *options], stderr=subprocess.STDOUT, text=True)


def architectures():
    """Machine code for each, and the PTX of the newest for all that are newer still."""
    default = [a for a in ("80", "90", "100", "120") if f"sm_{a}" in ask_nvcc("--list-gpu-code")]
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(default)
    numbers = re.findall(r"\d+[af]?", re.sub(r"\.|\+PTX", "", chosen))
    numbers.sort(key=lambda number: int(number.rstrip("af")))
    codes = [(n, f"sm_{n}") for n in numbers] + [(numbers[-1], f"compute_{numbers[-1]}")]
    return [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]


class BuildWithNvcc(BuildExtension):
    """torch's own build of .cu files asks for a CUDA torch; ours need no torch at all."""

    def build_extension(self, extension):
        if WITH_CUDA:
            built = f"{self.build_temp}/launch.o"
            self.mkpath(self.build_temp)
            self.spawn([NVCC, *FLAGS.split(), "-t0", *architectures(), "-c", KERNELS, "-o", built])
            extension.extra_objects = [built]
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
            extension.library_dirs += re.findall('"-L([^"]+)"', ask_nvcc("--dryrun", KERNELS))
        super().build_extension(extension)


# OpenMP's symbols come from torch's runtime: a second one, linked here, would fight for the cores.
compiled = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
sources = sorted(str(p) for p in Path("csrc").glob("**/*.cpp") if WITH_CUDA or "cuda" not in str(p))
extension = CppExtension("fastclip._C", sources, extra_compile_args=compiled)
extension.extra_link_args = ["-Wl,--exclude-libs,ALL"]
extension.depends = [str(p) for p in Path("csrc").rglob("*.*")]
setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithNvcc})
