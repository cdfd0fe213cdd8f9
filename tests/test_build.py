"""What is built and installed, and what happens without the extension or with another torch's."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import setuptools
import torch
from conftest import parameters, python

import fastclip
from fastclip import _ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# What each copy of the package does, in a child that is forked before one is imported.
COPIES = """
import json, multiprocessing, sys, warnings, torch
def use(folder):
    sys.path.insert(0, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import fastclip
        from fastclip import _ops
        w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
        norm = fastclip.clip_grad_norm_([w], 1.0)
    assert fastclip.__file__.startswith(folder) and _ops.extension is None
    assert norm == 5 and torch.allclose(w.grad, torch.tensor([0.6, 0.8]))
    said = [str(warning.message) for warning in caught]
    print(json.dumps([text for text in said if "fastclip" in text]), flush=True)
for folder in sys.argv[1:]:
    child = multiprocessing.get_context("fork").Process(target=use, args=(folder,))
    child.start()
    child.join()
"""


def copied(folder: Path, name: str = "", extension: bytes = b"") -> str:
    """A folder with a copy of the package that has no extension, or this one."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(fastclip.__file__).parent, folder / "fastclip", ignore=ignore)
    if extension:
        (folder / "fastclip" / name).write_bytes(extension)
    return str(folder)


def test_an_extension_that_is_missing_or_does_not_load_is_left_alone_with_one_warning(tmp_path):
    folders = [copied(tmp_path / "missing")]
    if _ops.extension is not None:
        path = Path(_ops.extension.__file__)
        data, version = path.read_bytes(), torch.__version__.split("+")[0]
        major, minor, patch = version.split(".", 2)
        other = f"{major}.{minor[:-1]}{9 - int(minor[-1])}.{patch}"
        old, new = (f"fastclip built for torch {v}".encode() for v in (version, other))
        assert data.count(old) == 1
        folders.append(copied(tmp_path / "other", path.name, data.replace(old, new)))
        # As one for another nightly build of the same minor version.
        broken = f"fastclip built for torch {torch.__version__} ".encode()
        folders.append(copied(tmp_path / "broken", path.name, broken))
    ran = python("-c", COPIES, *folders)
    none, *warned = map(json.loads, ran.stdout.splitlines())
    assert (none, len(warned)) == ([], len(folders) - 1), ran.stderr
    if warned:
        (of_other,), (of_broken,) = warned
        assert f"built for torch {other} and this is torch {torch.__version__}" in of_other
        assert "plain-PyTorch ops are in use (" in of_broken
        assert all(_ops.REBUILD in text for text in (of_other, of_broken))


@pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
def test_the_walk_serves_ordinary_gradients(monkeypatch):
    # A guard against a fast path that silently stops being taken.
    spy = Mock(wraps=_ops.extension)
    monkeypatch.setattr(_ops, "extension", spy)
    (w,) = parameters([torch.ones(2)])
    fastclip.clip_grad_norm_([w], 1.0)
    fastclip.clip_grad_norm_((p for p in [w]), torch.tensor(1.0))
    fastclip.GradClipper([w], 1.0).clip_()
    assert [name for name, *_ in spy.method_calls] == ["clip_grad_norm_"] * 3
    w.grad = torch.ones(2).to_sparse()
    fastclip.clip_grad_norm_([w], 1.0)
    assert [name for name, *_ in spy.method_calls[3:]] == ["clip_grad_norm_", "read_grads"]


def test_the_ops_are_seen_by_the_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastclip.clip_grad_norm_(parameters([torch.ones(2)]), 1.0)
    assert "fastclip::clip_norm_" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("refusal", "cause", "way_out"),
    [
        (None, "", ""),
        ("not built", "not built", _ops.NVCC),
        ("no code for its architecture", "no code for its arch", "TORCH_CUDA_ARCH_LIST=7.5 pip "),
        ("CUDA driver version is insufficient", "driver version", "Update the driver, or"),
    ],
)
def test_a_gpu_without_kernels_warns_of_the_cause_and_names_the_way_out(
    refusal, cause, way_out, monkeypatch
):
    # Stand-ins for a CUDA tensor, which this machine may not have, and for what was built.
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    extension = SimpleNamespace(kernels_are_on=lambda: True, cuda_refusal={1: refusal}.__getitem__)
    monkeypatch.setattr(_ops.loading, "extension", extension)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    default = _ops.schemas._with_warning(lambda tensors: len(tensors))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert default([tensor]) == 1
    assert len(caught) == (refusal is not None)
    for part in ("for cuda:1", cause, way_out, _ops.REBUILD):
        assert all(part in str(warning.message) for warning in caught)
    monkeypatch.setattr(_ops.loading, "extension", None)
    assert "not built" in _ops.loading.refusal(torch.device("cuda:0"))


@pytest.fixture
def dry_run(monkeypatch):
    """What setup.py would build where something is missing: all that it tells setuptools."""

    def run(missing: str = "", **environment: str) -> dict[str, Any]:
        which, given = shutil.which, {}
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(
            shutil, "which", lambda name, **how: None if name == missing else which(name, **how)
        )
        monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
        for name in ("FASTCLIP_CPU", "FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if missing == "torch":
            monkeypatch.setitem(sys.modules, "torch", None)
        scope = runpy.run_path("setup.py")
        sources = [source for extension in given["ext_modules"] for source in extension.sources]
        flags = scope["nvcc"].architectures(scope["NVCC"]) if scope["WITH_CUDA"] else []
        return {"requires": given["install_requires"], "sources": sources, "flags": flags}

    return run


@pytest.mark.parametrize(
    "switch", [{"FASTCLIP_CUDA": "0"}, {"missing": "nvcc"}, {"FASTCLIP_CPU": "0"}], ids=str
)
def test_the_build_variables_switch_the_kernels(switch, dry_run):
    said = dry_run(**{"missing": "nvcc", **switch})
    # What is compiled serves this version of torch alone.
    major, minor = torch.__version__.split(".")[:2]
    with_cpu = "FASTCLIP_CPU" not in switch
    assert said["requires"] == [f"torch=={major}.{minor}.*" if with_cpu else "torch>=2.11"]
    assert ("csrc/cpu/norm.cpp" in said["sources"]) == with_cpu
    assert "csrc/cuda/ops.cpp" not in said["sources"]
    assert not said["flags"]


@pytest.mark.parametrize(
    ("missing", "wrong", "said"),
    [
        ("nvcc", {"FASTCLIP_CUDA": "1"}, "FASTCLIP_CUDA=1: expected auto, 0, or 1 with nvcc"),
        ("", {"FASTCLIP_CUDA": "yes"}, "FASTCLIP_CUDA=yes: expected auto, 0, or 1 with nvcc"),
        ("", {"FASTCLIP_CPU": "0", "FASTCLIP_CUDA": "1"}, "or 1 with nvcc and FASTCLIP_CPU=1"),
        ("", {"FASTCLIP_CPU": "auto"}, "FASTCLIP_CPU=auto: expected 0 or 1"),
        ("", {"CXX": "no-such-compiler -m64"}, "No C++ compiler: install one, or set"),
        ("torch", {}, "pip install --no-build-isolation ."),
    ],
)
def test_what_cannot_be_built_ends_in_one_sentence(missing, wrong, said, dry_run):
    with pytest.raises(SystemExit, match=re.escape(said)):
        dry_run(missing, **wrong)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_architectures_are_chosen_and_the_newest_keeps_its_ptx(dry_run):
    said = dry_run(TORCH_CUDA_ARCH_LIST="10.0;9.0a+PTX 8.0")
    assert "csrc/cuda/ops.cpp" in said["sources"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90", "100")]
    assert said["flags"] == [*codes, "-gencode=arch=compute_100,code=compute_100"]


def fake_nvcc(folder: Path, said: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    (folder / "nvcc").chmod(0o755)
    return folder / "nvcc"


def test_nvcc_is_taken_from_cuda_home_then_path_then_pips_packages(tmp_path, monkeypatch):
    folders = ("home/bin", "path", "packages/nvidia/cu13/bin", "packages/nvidia/cu12/bin")
    found = [fake_nvcc(tmp_path / folder) for folder in folders]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(tmp_path / "packages")])
    find = runpy.run_path(str(ROOT / "csrc/nvcc.py"))["find"]
    for nvcc in found:
        assert find() == str(nvcc)
        nvcc.unlink()
    assert find() is None


def test_the_libraries_of_a_toolkit_from_pip_are_found(tmp_path):
    top = f"{tmp_path}/bin/.."
    nvcc = fake_nvcc(tmp_path / "bin", f'#$ LIBRARIES=  "-L{top}//lib64/stubs" "-L{top}//lib64"')
    extension = SimpleNamespace(extra_objects=[], library_dirs=["before"], libraries=[])
    runpy.run_path(str(ROOT / "csrc/nvcc.py"))["add"](str(nvcc), "launch.o", extension)
    folders = [Path(folder).resolve() for folder in extension.library_dirs[1:]]
    assert extension.library_dirs[0] == "before"
    assert folders.index(tmp_path / "lib64") < folders.index(tmp_path / "lib")
    assert "cudart_static" in extension.libraries


def test_an_sdist_holds_what_builds_and_tests_the_package(tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    ran = python("-c", code, cwd=ROOT, FASTCLIP_CPU="0", PYTHONDONTWRITEBYTECODE="")
    assert ran.returncode == 0, ran.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    folders = ("csrc", "fastclip", "tests", "benchmarks")
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".json")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert {path.relative_to(ROOT) for path in files} <= names
    assert {Path(".ci/run"), Path("csrc/.clang-format"), Path("setup.py")} <= names
    assert not [name for name in names if name.suffix in (".pyc", ".so")]


def test_an_editable_install_works_beside_its_clone(tmp_path):
    # An empty folder fastclip would do for the import; pip needs what is copied.
    clone = tmp_path / "fastclip"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "fastclip"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    # Packages of the Python that runs this, but not what their own .pth files lead to.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv").glob("lib/*/site-packages"))
    (packages / "these.pth").write_text("\n".join(path for path in sys.path if "-packages" in path))
    own = tmp_path / "venv/bin/python"
    environment = os.environ | {"FASTCLIP_CPU": "0", "CXX": "no-such-compiler", "PYTHONPATH": ""}
    install = [own, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--editable", clone], env=environment, check=True)
    script = tmp_path / "script.py"
    script.write_text("import fastclip; print(fastclip.__file__, fastclip.__version__)")
    said = subprocess.check_output([own, script], cwd=tmp_path, env=environment, text=True)
    assert said.split() == [str(clone / "fastclip/__init__.py"), fastclip.__version__]


THREADS = """
import os, torch
from fastclip import _ops
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
tensor = torch.empty(1_000_000)
before = count()
_ops.norm([tensor], 2.0)
print(count() - before)
tensor.mul_(2)
print(count() - before)
"""


@pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux does")
def test_kernels_and_torch_work_on_the_same_threads():
    assert python("-c", THREADS).stdout.split() == ["3", "3"]


@pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_the_extension_is_linked_to_no_cuda_or_openmp_and_holds_no_debug_sections():
    command = ["readelf", "--wide", "--sections", "--dynamic", _ops.extension.__file__]
    said = subprocess.check_output(command, text=True)
    needed = "".join(re.findall(r"\(NEEDED\).*", said))
    assert "libtorch_cpu.so" in needed
    assert ".text" in said
    assert not re.findall("cuda|omp", needed) + re.findall(r"\.debug", said)
