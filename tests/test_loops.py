"""The training loops of tests/loops, which README offers to copy, run as they stand."""

import runpy
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import python

LOOPS = Path(__file__).parent / "loops"
SAID = {
    "amp_accumulation": "step 10: gradient norm",
    "gan": "last gradient norm of the generator",
    "groups": "50 {'trunk.weight': ",
    "skip_and_stop": "2 steps were skipped",
    "fsdp2_resume": "resumed: ",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in LOOPS.glob("*.py")))
def test_a_loop_runs_and_says_what_it_did(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = str(LOOPS / f"{name}.py")
    if name != "fsdp2_resume":
        runpy.run_path(path, run_name="__main__")
        assert SAID[name] in capfd.readouterr().out
    elif dist.is_available():
        ran = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path)
        assert SAID[name] in ran.stdout, ran.stderr
        assert ran.returncode == 0
