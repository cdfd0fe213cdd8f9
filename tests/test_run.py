"""`python -m fastclip run`: what a script sees of it (nothing), and what is said at the end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from fastclip.__main__ import main

ROOT = Path(__file__).parent.parent
SITE = ROOT / "fastclip" / "_site"

# It prints what a script can know of how it was started, clips, and ends as it is told.
TRAIN = """
import importlib.util, json, multiprocessing, pickle, sys
assert importlib.util.find_spec("torch")
import beside
before = list(sys.path)
import torch
from torch.nn.utils import clip_grad_norm_
path = sys.path == before

class Mine:
    pass

def dtype_of_a_norm(_=None):
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    return str(clip_grad_norm_([w], 1.0).dtype)

if __name__ == "__main__":
    main = sys.modules["__main__"]
    spec = main.__spec__ and main.__spec__.name
    mine = pickle.loads(pickle.dumps(Mine())).__class__ is Mine
    how = [sys.warnoptions, sys.flags.utf8_mode, sys.stdout.write_through, path]
    print(json.dumps([sys.argv, sys.path[0], __file__, spec, mine, main.__dict__ is globals()]))
    print(json.dumps(how))
    for way in sys.argv[1].split(","):
        if way == "here":
            print(dtype_of_a_norm())
        elif way in ("spawn", "fork", "forkserver"):
            with multiprocessing.get_context(way).Pool(1) as pool:
                print(way, pool.apply(dtype_of_a_norm))
        elif way == "python":
            import subprocess
            code = "import torch, fastclip.patching as p; print('python', p.is_patched())"
            subprocess.run([sys.executable, "-c", code], check=True)
        elif way == "raise":
            raise RuntimeError("lost")
        elif way == "exit":
            sys.exit(7)
"""


NOTHING = (
    "fastclip run: this process called no clipping function of torch, timm or Megatron-core; "
    "calls in compiled code are not counted\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "beside.py").write_text("import sys\n")
    return tmp_path


def python(
    folder: Path, *command: str, input: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        input=input,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_script_runs_as_it_does_without(folder):
    other = folder / "site"
    other.mkdir()
    (other / "sitecustomize.py").write_text("print('another', __name__)")
    path = os.pathsep.join([str(ROOT), str(other)])
    command = ["train.py", "here,raise", "--", "-m", "--stats", ""]
    unbuffered = ["-u", "-W", "ignore::FutureWarning", "-X", "utf8"]
    plain = python(folder, *unbuffered, *command, PYTHONPATH=path)
    ours = python(folder, *unbuffered, "-m", "fastclip", "run", *command, PYTHONPATH=path)
    said = "another sitecustomize"
    first, known, how, dtype = plain.stdout.splitlines()
    assert (first, dtype) == (said, "torch.bfloat16")
    # In the process that `run` was before it became the script's, too.
    assert ours.stdout.splitlines() == [said, said, known, how, "torch.float32"]
    assert plain.stderr.startswith("Traceback")
    assert (ours.stderr, ours.returncode) == (plain.stderr, 1)


def test_a_module_and_the_processes_it_starts_are_patched_and_the_exit_status_is_its(folder):
    ways = "spawn,fork,forkserver,python,exit"
    ran = python(folder, "-m", "fastclip", "run", "--stats", "-m", "train", ways, "-m", "--", "x")
    known, *said = sorted(ran.stdout.splitlines(), key=lambda line: not line.startswith("[["))
    said = [line for line in said if not line.startswith("[")]
    file = str(folder / "train.py")
    assert json.loads(known) == [
        [file, ways, "-m", "--", "x"],
        str(folder),
        file,
        "train",
        True,
        True,
    ]
    multiprocessed = [f"{way} torch.float32" for way in ("spawn", "fork", "forkserver")]
    # Children write before a parent that buffers.
    assert sorted(said) == sorted([*multiprocessed, "python True"])
    assert ran.returncode == 7
    # Of itself alone it speaks.
    assert ran.stderr == NOTHING


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


def test_it_says_and_draws_what_was_clipped(folder):
    pytest.importorskip("matplotlib")
    (folder / "clips.py").write_text(CLIPS)
    ran = python(folder, "-m", "fastclip", "run", "--stats", "--plot", "a.png", "clips.py")
    assert ran.returncode == 0, ran.stderr
    said = re.findall("^fastclip run: (.*)$", ran.stderr, re.M)
    assert said[0] == (
        "clip_grad_norm_ 7 times, get_total_norm 1 times, clip_grads_with_norm_ 1 times, "
        "clip_grad_value_ 1 times"
    )
    # Norms 0.2, 0.4, 2, 6, 8 and inf.
    assert said[1] == "6 clips by norm: 4 above the threshold, 1 not finite; median norm 2, p90 7.2"
    assert said[2] == f"drawn in {folder / 'a.png'}"
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_script_without_torch_is_told(folder):
    (folder / "nothing.py").write_text("print('done')")
    ran = python(folder, "-m", "fastclip", "run", "nothing.py")
    assert ran.stdout == "done\n"
    told = "this process did not import torch; its children are not counted here"
    assert ran.stderr == f"fastclip run: {told}\n"
    ran = python(folder, "-m", "fastclip", "run", "nothing.py", RANK="1")
    assert (ran.stdout, ran.stderr) == ("done\n", "")


IMPORTS = {
    "fastclip": "import fastclip, torch",
    "a name of it": "from fastclip import GradClipper\nimport torch",
    "a module of it": "import fastclip.rules\nimport torch",
    "torch": "import torch, fastclip",
    "beside": "import json, fastclip\nimport torch",
}
CLIP = """
w = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
w.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
print(torch.nn.utils.clip_grad_norm_([w], 1.0).dtype)
"""


@pytest.mark.parametrize("first", IMPORTS)
def test_torch_is_patched_whatever_a_script_imports_first(first, folder):
    (folder / "first.py").write_text(IMPORTS[first] + CLIP)
    code = "import subprocess, sys; subprocess.run([sys.executable, 'first.py'])"
    for command in (["first.py"], ["-c", "import torch\n" + code]):
        ran = python(folder, "-m", "fastclip", "run", *command)
        assert (ran.stdout, ran.returncode) == ("torch.float32\n", 0), ran.stderr


def test_the_commands_of_the_readme_do_what_it_says(folder):
    pytest.importorskip("matplotlib")
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "`run --stats` says at the end how often it clipped" in readme
    commands = {*re.findall(r"python (-m fastclip run (?!train)[^`]*?[-\w.]+)`", readme)}
    assert commands == {"-m fastclip run --plot norms.png -m fastclip demo"}
    ran = python(folder, *commands.pop().split(), "--steps", "3")
    assert ran.returncode == 0, ran.stderr
    assert (folder / "norms.png").read_bytes().startswith(b"\x89PNG")
    ran = python(folder, *["-m", "fastclip", "run", "train.py", "--epochs", "3"])
    assert json.loads(ran.stdout.splitlines()[0])[0] == ["train.py", "--epochs", "3"]


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_the_first_rank_speaks_whoever_started_it(name, folder):
    (folder / "clips.py").write_text(CLIPS)
    said = [
        python(folder, "-m", "fastclip", "run", "--stats", "clips.py", **{name: rank}).stderr
        for rank in ("0", "1")
    ]
    assert [len(text.splitlines()) for text in said] == [2, 0]


def test_a_picture_whose_folder_is_gone_is_told_in_a_sentence(folder):
    pytest.importorskip("matplotlib")
    (folder / "clips.py").write_text(CLIPS + "import os; os.rmdir('gone')")
    (folder / "gone").mkdir()
    ran = python(folder, "-m", "fastclip", "run", "--plot", "gone/a.png", "--", "clips.py")
    path = folder / "gone/a.png"
    assert ran.stderr.splitlines()[2:] == [
        f"fastclip run: no picture in {path}: No such file or directory"
    ]
    assert ran.returncode == 0


FAILS = """
import sys, types
sys.modules["fastclip"] = types.ModuleType("fastclip")
import torch
print("trained")
"""


def test_a_script_and_a_rank_that_cannot_be_patched_stop_and_another_child_goes_on(folder):
    (folder / "fails.py").write_text(FAILS)
    why = f"fastclip run: torch is not patched in {sys.executable}: cannot import name '_run'"
    child = ["-c", "import subprocess, sys; subprocess.run([sys.executable, 'fails.py'])"]
    for command, rank, trained in (
        (["fails.py"], {}, False),
        (["fails.py"], {"RANK": "1", "WORLD_SIZE": "2"}, False),
        (child, {"RANK": "1", "WORLD_SIZE": "2"}, False),
        (child, {"RANK": "0", "WORLD_SIZE": "1"}, True),
        (child, {}, True),
    ):
        ran = python(folder, "-m", "fastclip", "run", *command, **rank)
        assert ran.stderr.startswith(why)
        assert ran.stdout == ("trained\n" if trained else "")
        if command != child:
            assert (ran.stderr.count("\n"), ran.returncode) == (1, 1)


@pytest.mark.parametrize(
    "command", [["-"], ["-c", "from train import *; print(dtype_of_a_norm())"]]
)
def test_code_that_is_no_file_is_patched(command, folder):
    code = "from train import *; print(dtype_of_a_norm())"
    ran = python(folder, "-m", "fastclip", "run", *command, input=code)
    assert (ran.stdout, ran.stderr) == ("torch.float32\n", "")


def test_an_interactive_python_goes_on_after_the_script(folder):
    (folder / "value.py").write_text("import torch; value = 3")
    ran = python(folder, "-i", "-m", "fastclip", "run", "value.py", input="print('then', value)")
    assert ran.stdout == "then 3\n"


def test_what_lies_beside_a_script_is_the_scripts(folder):
    (folder / "fastclip.py").write_text("raise ImportError('of the script')")
    ran = python(folder, "train.py", "here", PYTHONPATH=os.pathsep.join([str(SITE), str(ROOT)]))
    _, how, dtype = ran.stdout.splitlines()
    assert (dtype, ran.stderr) == ("torch.float32", "")
    assert json.loads(how)[3] is True


CHAINS = """
import importlib.machinery, importlib.util, os, sys
here = os.path.dirname(os.path.abspath(__file__))
print({name!r})

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
def test_other_bootstraps_that_chain_are_run_once_and_torch_is_patched(order, folder):
    for name in ("tracer", "last"):
        (folder / name).mkdir()
    (folder / "tracer/sitecustomize.py").write_text(CHAINS.format(name="tracer"))
    (folder / "last/sitecustomize.py").write_text("print('last')")
    theirs = folder / "tracer"
    path = [*([theirs, SITE] if order == "before" else [SITE, theirs]), folder / "last", ROOT]
    ran = python(folder, "train.py", "here", PYTHONPATH=os.pathsep.join(map(str, path)))
    assert ran.stderr == ""
    assert [line for line in ran.stdout.splitlines() if line[0] != "["] == [
        "tracer",
        "last",
        "torch.float32",
    ]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_of_torchrun_are_patched_and_one_speaks(folder):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ran = python(folder, *launch, "-m", "fastclip", "run", "--stats", "train.py", "here")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("torch.float32") == 2
    assert ran.stderr.count("fastclip run: clip_grad_norm_ 1 times") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "expected a script, -m and a module, or -c and code"),
        (["--"], "expected a script, -m and a module, or -c and code"),
        (["--stats"], "expected a script, -m and a module, or -c and code"),
        (["--all", "train.py"], "unrecognized arguments: --all"),
        (["--plot", "no/such/a.png", "train.py"], "argument --plot: cannot write"),
        (["--plot"], "argument --plot: expected one argument"),
    ],
)
def test_a_bad_option_is_named(options, told, capsys):
    if "no/such/a.png" in options:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        main(["run", *options])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_what_python_cannot_run_it_says(folder):
    ran = python(folder, "-m", "fastclip", "run", "nosuch.py")
    assert "can't open file" in ran.stderr
    assert ran.returncode == 2
