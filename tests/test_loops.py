"""The training loops of tests/loops, which README offers to copy, run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

LOOPS = Path(__file__).parent / "loops"
ROOT = LOOPS.parent.parent
SAID = {
    "amp_accumulation": "step 10: gradient norm",
    "gan": "last gradient norm of the generator",
    "groups": "50 {'trunk.weight': ",
    "skip_and_stop": "2 steps were skipped",
    "fsdp2_resume": "resumed: ",
}


@pytest.mark.parametrize("name", SAID)
def test_a_loop_runs_and_says_what_it_did(name, tmp_path):
    command = [sys.executable]
    if name == "fsdp2_resume":
        if not dist.is_available():
            pytest.skip("torch without distributed")
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, LOOPS / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert SAID[name] in ran.stdout


def test_every_loop_is_run():
    assert {path.stem for path in LOOPS.glob("*.py")} == set(SAID)
