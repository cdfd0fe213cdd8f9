"""The command line: `info` says what is installed, `demo` trains, draws and explains."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastclip
from fastclip import _ops
from fastclip.__main__ import main
from fastclip._demo import INSTALL_EXTRA, Run, _draw


def final_losses(printed: str) -> dict[str, str]:
    """The table's second column by its first."""
    names = ("unclipped", "torch.nn.utils.clip_grad_norm_", "fastclip.clip_grad_norm_")
    return {name: re.search(rf"^{name} +(\S+)", printed, re.M)[1] for name in names}


@pytest.mark.parametrize("built", [True, False])
def test_info_names_versions_and_devices(built, capsys, monkeypatch):
    if not built:
        monkeypatch.setattr(_ops, "extension", None)
        monkeypatch.setattr(_ops, "has_kernels", lambda device_type: False)
    elif _ops.extension is None:
        pytest.skip("the extension is not built")
    main(["info"])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["fastclip"] == fastclip.__version__
    assert rows["torch"] == torch.__version__
    assert rows["patched"] == "no"
    assert rows["package"] == str(Path(fastclip.__file__).parent)
    assert rows["cpu"] == "compiled kernels" if built else _ops.REBUILD in rows["cpu"]
    assert "_C." in rows["extension"] if built else "not loaded" in rows["extension"]


def test_info_says_what_serves_each_cuda_device_and_why(capsys, monkeypatch):
    for architectures in ([800, 900], []):
        extension = SimpleNamespace(
            cuda_architectures=architectures, __file__="_C", built_for="torch 2"
        )
        monkeypatch.setattr(_ops, "extension", extension)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        main(["info"])
        told = capsys.readouterr().out
        assert "cuda       torch sees no device" in told
        assert (_ops.NVCC in told) == (not architectures)
        assert ("8.0, 9.0 and later" in told) == bool(architectures)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    why = [None, "no code for its architecture"]
    monkeypatch.setattr(_ops, "refusal", lambda device: why[device.index])
    main(["info"])
    told = capsys.readouterr().out
    assert re.search(r"^cuda:0 +compiled kernels$", told, re.M)
    assert re.search(rf"^cuda:1 +plain PyTorch: {why[1]}$", told, re.M)


def test_has_kernels_agrees_with_the_extension():
    assert _ops.has_kernels("cpu") == (_ops.extension is not None)


@pytest.fixture(autouse=True)
def _threads():
    """The demo computes on one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_demo_draws_and_the_clipped_runs_agree(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "demo.png"
    main(["demo", "--device", "cpu", "--steps", "3", "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    _, torchs, ours = map(float, final_losses(printed).values())
    assert ours == pytest.approx(torchs, rel=1e-4)
    assert str(picture) in printed


def test_demo_runs_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "demo.png"
    main(["demo", "--device", "cpu", "--steps", "1", "--out", str(picture)])
    out, err = capsys.readouterr()
    assert re.search(rf"^No picture: matplotlib .+{re.escape(INSTALL_EXTRA)}$", out, re.M)
    assert len(final_losses(out)) == 3
    assert not picture.exists()
    assert not err


def test_a_run_that_diverges_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lost = Run("unclipped", math.inf, [4.0, math.inf, math.nan], [1.0, math.inf, math.nan], 0.0)
    kept = Run("clipped", 1.0, [4.0, 3.0, 2.0], [1.0, 1.0, 1.0], 1.0)
    assert lost.diverged == 2
    assert kept.diverged is None
    _draw([lost, kept, kept], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "many"),
        ("--device", "abacus"),
        ("--device", "cuda:99"),
        ("--out", "no/such/folder/demo.png"),
        ("--out", "demo.txt"),
    ],
)
def test_a_bad_option_is_named_before_training(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", option, value])
    assert stop.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_version_is_said(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fastclip {fastclip.__version__}\n"
