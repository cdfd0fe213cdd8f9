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


def final_losses(printed: str) -> list[float]:
    """The second column of the table: unclipped, with torch's function, with fastclip's."""
    names = r"unclipped|torch.nn.utils.clip_grad_norm_|fastclip.clip_grad_norm_"
    return [float(loss) for loss in re.findall(rf"^(?:{names}) +(\S+)", printed, re.M)]


def info(capsys) -> dict[str, str]:
    main(["info"])
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_info_names_versions_and_devices(capsys):
    rows = info(capsys)
    assert rows["fastclip"] == fastclip.__version__
    assert rows["torch"] == torch.__version__
    assert rows["patched"] == "no"
    assert rows["package"] == str(Path(fastclip.__file__).parent)
    built = _ops.extension is not None
    assert rows["cpu"] == "compiled kernels" if built else _ops.REBUILD in rows["cpu"]
    assert "_C." in rows["extension"] if built else "not loaded" in rows["extension"]
    assert _ops.has_kernels("cpu") == built


def test_info_says_what_serves_each_cuda_device_and_why(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for architectures in ([800, 900], []):
        extension = SimpleNamespace(
            cuda_architectures=architectures, __file__="_C", built_for="torch 2"
        )
        monkeypatch.setattr(_ops, "extension", extension)
        told = info(capsys)["cuda"]
        assert told.startswith("torch sees no device")
        assert (_ops.NVCC in told) == (not architectures)
        assert ("8.0, 9.0 and later" in told) == bool(architectures)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    why = [None, "no code for its architecture"]
    monkeypatch.setattr(_ops, "refusal", lambda device: why[device.index])
    rows = info(capsys)
    assert (rows["cuda:0"], rows["cuda:1"]) == ("compiled kernels", f"plain PyTorch: {why[1]}")


def demo(picture: Path, steps: int) -> None:
    before = torch.get_num_threads()
    main(["demo", "--device", "cpu", "--steps", str(steps), "--out", str(picture)])
    # It computes on one thread.
    torch.set_num_threads(before)


def test_demo_draws_and_the_clipped_runs_agree(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    demo(tmp_path / "demo.png", 3)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    _, torchs, ours = final_losses(printed)
    assert ours == pytest.approx(torchs, rel=1e-4)
    assert str(tmp_path / "demo.png") in printed


def test_demo_runs_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    demo(tmp_path / "demo.png", 1)
    out, err = capsys.readouterr()
    assert re.search(rf"^No picture: matplotlib .+{re.escape(INSTALL_EXTRA)}$", out, re.M)
    assert len(final_losses(out)) == 3
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
    ("command", "told"),
    [
        ("demo --steps 0", "argument --steps: expected a whole number >= 1"),
        ("demo --device abacus", "argument --device: expected cpu, cuda or cuda:N"),
        ("demo --device cuda:99", "argument --device: cannot use"),
        ("demo --out no/such/folder/demo.png", "argument --out: cannot write"),
        ("demo --out demo.txt", "argument --out: expected a path that ends in .png"),
        ("run --stats", "expected a script, -m and a module, or -c and code"),
        ("run --all train.py", "unrecognized arguments: --all"),
        ("run --plot no/such/a.png train.py", "argument --plot: cannot write"),
        ("run --plot", "argument --plot: expected one argument"),
    ],
)
def test_a_bad_option_is_named_before_anything_runs(command, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_version_is_said(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastclip {fastclip.__version__}\n"
