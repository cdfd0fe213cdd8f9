"""What happens when the extension is missing, or was built for another torch."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip import _ops

SCRIPT = """
import torch, fastclip
from fastclip import _ops
w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
norm = fastclip.clip_grad_norm_([w], 1.0)
print(norm.item(), [round(g, 4) for g in w.grad.tolist()], _ops.extension)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its extension, in a folder of its own."""
    source = Path(fastclip.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(source, tmp_path / "fastclip", ignore=ignore)
    return tmp_path


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)


def test_a_missing_extension_is_no_error(copy):
    result = run(copy)
    assert result.stdout.startswith("5.0 [0.6, 0.8]")
    assert result.stdout.endswith("None\n")
    assert "fastclip" not in result.stderr


@pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
def test_an_extension_for_another_torch_is_left_alone_with_one_warning(copy):
    path = Path(_ops.extension.__file__)
    version = torch.__version__.split("+")[0]
    data = path.read_bytes()
    old, new = (f"fastclip built for torch {v}".encode() for v in (version, "0" + version[1:]))
    assert data.count(old) == 1
    (copy / "fastclip" / path.name).write_bytes(data.replace(old, new))
    result = run(copy)
    assert result.stdout.endswith("None\n")
    assert result.stderr.count("UserWarning") == 1
    for part in (f"torch 0{version[1:]}", f"torch {torch.__version__}", _ops.REBUILD):
        assert part in result.stderr


@pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")
def test_the_walk_serves_ordinary_gradients(monkeypatch):
    # A guard against a fast path that silently stops being taken.
    calls = []
    read_grads = _ops.extension.read_grads

    class Spy:
        def read_grads(self, items):
            calls.append(read_grads(items))
            return calls[-1]

    monkeypatch.setattr(_ops, "extension", Spy())
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    fastclip.clip_grad_norm_([w], 1.0)
    assert isinstance(calls[0], sys.modules["fastclip._C"].Grads)
    w.grad = torch.ones(2).to_sparse()
    fastclip.clip_grad_norm_([w], 1.0)
    assert calls[1] is None


def test_the_ops_are_seen_by_the_profiler():
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastclip.clip_grad_norm_([w], 1.0)
    assert "fastclip::clip_norm_" in {event.key for event in profile.key_averages()}


def test_the_ops_are_seen_by_modes():
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    with Mode():
        fastclip.clip_grad_norm_([w], 1.0)
    assert "fastclip.clip_norm_.default" in seen


def test_fake_gradients_give_a_fake_norm():
    with torch._subclasses.FakeTensorMode():
        w = torch.nn.Parameter(torch.zeros(2))
        w.grad = torch.ones(2)
        norm = fastclip.clip_grad_norm_([w], 1.0)
    assert isinstance(norm, torch._subclasses.FakeTensor)
    assert norm.shape == ()


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
    # A stand-in for a CUDA tensor, which this machine may not have.
    class Cuda:
        is_cuda = True
        device = torch.device("cuda:1")

    class Extension:
        def cuda_refusal(self, device):
            assert device == 1
            return refusal

    monkeypatch.setattr(_ops, "extension", Extension())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    default = _ops._announced(lambda tensors: len(tensors))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert default([Cuda()]) == 1
    said = [str(w.message) for w in caught]
    assert len(said) == (0 if refusal is None else 1)
    assert all("for cuda:1" in s and cause in s for s in said)
    assert all(way_out in s and _ops.REBUILD in s for s in said)


def test_without_an_extension_the_kernels_are_not_built(monkeypatch):
    monkeypatch.setattr(_ops, "extension", None)
    assert "not built" in _ops._refusal(torch.device("cuda:0"))


def dry_run(**environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py would build, or why it does not."""
    code = (
        "import runpy, setuptools; setuptools.setup = lambda ext_modules, cmdclass: print("
        "ext_modules[0].sources); scope = runpy.run_path('setup.py');"
        "print(scope['architectures']() if scope['WITH_CUDA'] else 'no CUDA')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_the_build_variable_switches_the_kernels():
    assert "cuda/ops.cpp" not in dry_run(FASTCLIP_CUDA="0").stdout
    path = str(Path(sys.executable).parent)
    without_nvcc = dry_run(PATH=path, CUDA_HOME="")
    assert "cuda/ops.cpp" not in without_nvcc.stdout
    assert "cpu/norm.cpp" in without_nvcc.stdout
    for wrong in ({"FASTCLIP_CUDA": "1", "PATH": path, "CUDA_HOME": ""}, {"FASTCLIP_CUDA": "yes"}):
        result = dry_run(**wrong)
        assert result.returncode != 0
        assert f"FASTCLIP_CUDA={wrong['FASTCLIP_CUDA']}: expected auto, 0, or 1" in result.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_architectures_are_chosen_and_the_newest_keeps_its_ptx():
    said = dry_run(TORCH_CUDA_ARCH_LIST="10.0;9.0a+PTX 8.0").stdout
    assert "cuda/ops.cpp" in said
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    codes.append("-gencode=arch=compute_100,code=compute_100")
    assert str(codes) in said
