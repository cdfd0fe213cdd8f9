"""Builds the extension `fastclip._C`; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            "fastclip._C",
            sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
            # OpenMP's symbols come from the runtime torch brings along: a second one, linked
            # here, would fight it for the cores.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
