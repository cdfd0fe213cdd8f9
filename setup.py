"""Build the extension `fastclip._C`; everything else is in pyproject.toml.

FASTCLIP_CPU=0 builds no extension. FASTCLIP_CUDA=auto, the default, builds the CUDA kernels if nvcc
is found; 0 never builds them, and 1 fails without nvcc.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    sys.exit(f"{error}. To build for the torch you have: pip install --no-build-isolation .")
sys.path.insert(0, "csrc")
import nvcc

CPU, CUDA = os.environ.get("FASTCLIP_CPU", "1"), os.environ.get("FASTCLIP_CUDA", "auto")
NVCC = nvcc.find()
if CPU not in ("0", "1"):
    raise SystemExit(f"FASTCLIP_CPU={CPU}: expected 0 or 1")
if CUDA not in ("auto", "0", "1") or (CUDA == "1" and not (NVCC and CPU == "1")):
    raise SystemExit(f"FASTCLIP_CUDA={CUDA}: expected auto, 0, or 1 with nvcc and FASTCLIP_CPU=1")
if CPU == "1" and not shutil.which(os.environ.get("CXX", "c++").split()[0]):
    raise SystemExit("No C++ compiler: install one, or set FASTCLIP_CPU=0 to do without kernels.")
WITH_CUDA = CUDA != "0" and NVCC is not None and torch.version.hip is None


class BuildWithNvcc(BuildExtension):
    def build_extension(self, extension):
        if WITH_CUDA:
            kernels = f"{self.build_temp}/launch.o"
            self.spawn(nvcc.command(NVCC, kernels))
            nvcc.add(NVCC, kernels, extension)
        super().build_extension(extension)


class WholeTree(sdist):  # adds tests, benchmarks and the sources that this build skips
    def make_release_tree(self, base_dir, files):
        found = [p for d in ("csrc", "tests", "benchmarks") for p in Path(d).rglob("*.*")]
        files = [*files, "CHANGELOG.md", ".ci/run", *(str(p) for p in found if p.suffix != ".pyc")]
        super().make_release_tree(base_dir, sorted(set(files)))


compiled = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
sources = sorted(str(p) for p in Path("csrc").glob("**/*.cpp") if WITH_CUDA or "cuda" not in str(p))
flags = {"extra_compile_args": compiled, "extra_link_args": ["-Wl,--exclude-libs,ALL"]}
extension = CppExtension("fastclip._C", sources, **flags)
minor = ".".join(torch.__version__.split(".")[:2])
setup(
    ext_modules=[extension] if CPU == "1" else [],
    # No shared CUDA library is linked, so the extension loads with any build of this torch version.
    install_requires=[f"torch=={minor}.*" if CPU == "1" else "torch>=2.11"],
    cmdclass={"build_ext": BuildWithNvcc, "sdist": WholeTree},
)
