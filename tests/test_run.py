"""`python -m fastclip run`: what a script sees of it (nothing), and what is said at the end."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import conftest
import pytest
import torch.distributed as dist

from fastclip._site import RUN

ROOT = Path(__file__).parent.parent
SITE = ROOT / "fastclip" / "_site"

# It prints what a script can know of how it was started, clips, and ends as it is told.
TRAIN = """
import json, multiprocessing, subprocess, sys
before = list(sys.path)
import torch
from torch.nn.utils import clip_grad_norm_
path = sys.path == before

def dtype_of_a_norm(_=None):
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    return str(clip_grad_norm_([w], 1.0).dtype)

if __name__ == "__main__":
    options = [sys.warnoptions, sys.flags.utf8_mode, sys.stdout.write_through]
    print(json.dumps([sys.argv, sys.path[0], __file__, path, options]))
    for way in sys.argv[1].split(","):
        if way == "here":
            print(dtype_of_a_norm())
        elif way in ("spawn", "fork", "forkserver"):
            with multiprocessing.get_context(way).Pool(1) as pool:
                print(way, pool.apply(dtype_of_a_norm))
        elif way == "python":
            code = "import torch, fastclip.patching as p; print('python', p.is_patched())"
            subprocess.run([sys.executable, "-c", code], check=True)
        elif way == "raise":
            raise RuntimeError("lost")
        elif way == "exit":
            sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


@pytest.fixture
def python(folder):
    return functools.partial(conftest.python, cwd=folder)


@pytest.fixture
def run(python):
    return functools.partial(python, "-m", "fastclip", "run")


@pytest.fixture
def started(python):
    """What `run` starts, without the import of torch by `run` itself."""
    path = os.pathsep.join(map(str, [SITE, ROOT]))
    return functools.partial(python, "-X", RUN, PYTHONPATH=path)


def test_a_script_runs_as_it_does_without(folder, python):
    other = folder / "site"
    other.mkdir()
    (other / "sitecustomize.py").write_text("print('another', __name__)")
    path = os.pathsep.join([str(ROOT), str(other)])
    command = ["train.py", "here,raise", "--", "-m", "--stats", ""]
    unbuffered = ["-u", "-W", "ignore::FutureWarning", "-X", "utf8"]
    plain = python(*unbuffered, *command, PYTHONPATH=path)
    ours = python(*unbuffered, "-m", "fastclip", "run", *command, PYTHONPATH=path)
    said = "another sitecustomize"
    first, known, dtype = plain.stdout.splitlines()
    assert (first, dtype) == (said, "torch.bfloat16")
    # In the process that `run` was before it became the script's, too.
    assert ours.stdout.splitlines() == [said, said, known, "torch.float32"]
    assert plain.stderr.startswith("Traceback")
    assert (ours.stderr, ours.returncode) == (plain.stderr, 1)


def test_a_module_and_the_processes_it_starts_are_patched_and_the_exit_status_is_its(folder, run):
    ways = "spawn,fork,forkserver,python,exit"
    ran = run("--stats", "-m", "train", ways, "-m", "--", "x")
    # Children write before a parent that buffers.
    known, *said = sorted(ran.stdout.splitlines(), key=lambda line: line[0] != "[")
    file = str(folder / "train.py")
    expected = [[file, ways, "-m", "--", "x"], str(folder), file, True]
    assert json.loads(known)[:4] == expected
    multiprocessed = [f"{way} torch.float32" for way in ("spawn", "fork", "forkserver")]
    assert sorted(said) == sorted([*multiprocessed, "python True"])
    assert ran.returncode == 7
    # Of itself alone it speaks.
    (line,) = ran.stderr.splitlines()
    assert line.startswith("fastclip run: this process called no clipping function of torch, timm")


CLIPS = """
import torch

ps = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
for size in (0.1, 0.2, 1.0, 3.0, 4.0, float("inf")):
    for p in ps:
        p.grad = torch.full((2,), size)
    if size == 3:
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in ps])
        torch.nn.utils.clip_grads_with_norm_(ps, torch.tensor(1.5), total_norm=total_norm)
    else:
        torch.nn.utils.clip_grad_norm_(ps, max_norm=1.5)
torch.nn.utils.clip_grad_value_(ps, 0.1)
torch.compile(lambda: torch.nn.utils.clip_grad_norm_(ps, 1.0), fullgraph=True, backend="eager")()
# No number comes of these.
with torch._subclasses.FakeTensorMode():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    torch.nn.utils.clip_grad_norm_([p], 1.0)
p = torch.nn.Parameter(torch.zeros(2, device="meta"))
p.grad = torch.ones(2, device="meta")
torch.nn.utils.clip_grad_norm_([p], 1.0)
"""


def test_it_says_what_was_clipped_and_that_the_folder_of_its_picture_is_gone(folder, run):
    pytest.importorskip("matplotlib")
    (folder / "clips.py").write_text(CLIPS + "import os; os.rmdir('gone')")
    (folder / "gone").mkdir()
    ran = run("--stats", "--plot", "gone/a.png", "--", "clips.py")
    assert ran.returncode == 0, ran.stderr
    assert re.findall("^fastclip run: (.*)$", ran.stderr, re.M) == [
        "clip_grad_norm_ 7 times, get_total_norm 1 times, clip_grads_with_norm_ 1 times, "
        "clip_grad_value_ 1 times",
        # Norms 0.2, 0.4, 2, 6, 8 and inf.
        "6 clips by norm: 4 above the threshold, 1 not finite; median norm 2, p90 7.2",
        f"no picture in {folder / 'gone/a.png'}: No such file or directory",
    ]


def test_the_command_of_the_readme_draws(folder, run):
    pytest.importorskip("matplotlib")
    readme = " ".join((ROOT / "README.md").read_text().split())
    command = "--plot norms.png -m fastclip demo"
    assert f"`python -m fastclip run {command}`" in readme
    ran = run(*command.split(), "--steps", "3")
    assert ran.returncode == 0, ran.stderr
    assert f"fastclip run: drawn in {folder / 'norms.png'}\n" in ran.stderr
    assert (folder / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_rank_speaks_whoever_started_it(started):
    told = "fastclip run: this process did not import torch; its children are not counted here\n"
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        for rank, said in (("0", told), ("1", "")):
            assert started("-c", "pass", **{name: rank}).stderr == said
    assert started("-c", "import torch", SLURM_PROCID="1").stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fastclip", "fastclip.rules"])
def test_torch_is_patched_whatever_a_program_and_its_children_import_first(first, run):
    code = f"import {first}, torch; from train import *; print(dtype_of_a_norm(), flush=True)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    ran = run("-c", f"{code}; {child}")
    assert ran.stdout == "torch.float32\n" * 2, ran.stderr


def test_a_script_and_a_rank_that_cannot_be_patched_stop_and_another_child_goes_on(folder, started):
    # Of a torch that fastclip does not know.
    (folder / "torch.py").touch()
    (folder / "fails.py").write_text("import torch\nprint('trained')")
    child = ["-c", "import subprocess, sys; subprocess.run([sys.executable, 'fails.py'])"]
    for command, size, trained in (
        (["fails.py"], "1", False),
        (child, "2", False),
        (child, "1", True),
        (child, "", True),
    ):
        ran = started(*command, WORLD_SIZE=size)
        assert ran.stderr.startswith(f"fastclip run: torch is not patched in {sys.executable}: ")
        assert ran.stdout == ("trained\n" if trained else "")
        if command != child:
            assert (ran.stderr.count("\n"), ran.returncode) == (1, 1)


def test_code_that_is_no_file_is_patched(run):
    ran = run("-", input="from train import *; print(dtype_of_a_norm())")
    assert (ran.stdout, ran.stderr) == ("torch.float32\n", "")


def test_an_interactive_python_goes_on_after_the_script(python):
    then = "print('then', dtype_of_a_norm())"
    ran = python("-i", "-m", "fastclip", "run", "train.py", "none", input=then)
    assert ran.stdout.endswith("then torch.float32\n")


CHAINS = """
import importlib.machinery, importlib.util, os, sys
here = os.path.dirname(os.path.abspath(__file__))
print("tracer")

# As tools that watch imports have: one that asks the others, and one of an older kind.
class Finder:
    asking = False

    def find_spec(self, name, path=None, target=None):
        if name != "torch" or self.asking:
            return None
        self.asking = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.asking = False

class Old:
    def find_module(self, name, path=None):
        return None

sys.meta_path[:0] = [Old(), Finder()]
others = [entry for entry in sys.path if os.path.abspath(entry) != here]
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_bootstraps_that_chain_are_run_once_and_torch_is_patched(order, folder, python):
    for name in ("tracer", "last"):
        (folder / name).mkdir()
    (folder / "tracer/sitecustomize.py").write_text(CHAINS)
    (folder / "last/sitecustomize.py").write_text("print('last')")
    # What lies beside a script is the script's.
    (folder / "fastclip.py").write_text("raise ImportError('of the script')")
    theirs = folder / "tracer"
    path = [*([theirs, SITE] if order == "before" else [SITE, theirs]), folder / "last", ROOT]
    ran = python("train.py", "here", PYTHONPATH=os.pathsep.join(map(str, path)))
    assert ran.stderr == ""
    tracer, last, known, dtype = ran.stdout.splitlines()
    assert (tracer, last, dtype) == ("tracer", "last", "torch.float32")
    assert json.loads(known)[3] is True


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_of_torchrun_are_patched_and_one_speaks(python):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ran = python(*launch, "-m", "fastclip", "run", "--stats", "train.py", "here")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("torch.float32") == 2
    assert ran.stderr.count("fastclip run: clip_grad_norm_ 1 times") == 1
