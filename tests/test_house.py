"""The rules of the house: layering, sizes, names, and that README keeps its promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "fastclip").glob("**/*.py"))
BUILD = [ROOT / "setup.py", ROOT / "csrc/nvcc.py"]
SOURCES = sorted(
    p for p in (ROOT / "csrc").glob("**/*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")
)
TESTED = sorted(p for d in ("tests", "benchmarks") for p in (ROOT / d).glob("**/*.py"))
MEASURING = [path for path in TESTED if path.parent.name == "benchmarks"]
EVERY = PYTHON + BUILD + SOURCES + TESTED

ROOMS = sorted(p.parent for p in (ROOT / "fastclip").glob("_*/__init__.py"))
TOP_LEVEL = {"csrc", "fastclip", "tests", "benchmarks", "pyproject.toml", "setup.py", "README.md"}


def imported(path: Path) -> set[str]:
    """The rooms and files of this package that a file imports, by their paths below it."""
    above = path.relative_to(ROOT / "fastclip").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = above[: len(above) + 1 - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"/".join((*start, *name.split("."))) for name in names}
    return {name for name in found if not name.split("/")[-1].startswith("__")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "fastclip").with_suffix("")).removesuffix("/__init__")


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """What imports each other, directly or through others."""
    left = dict(graph)
    while done := [name for name, others in left.items() if not others & left.keys()]:
        for name in done:
            del left[name]
    return set(left)


def says(text: str, *words: str) -> list[str]:
    return [word for word in words if re.search(rf"(?<![\w.]){re.escape(word)}\b", text)]


def test_no_imports_go_round():
    assert not cycle({name_of(path): imported(path) for path in PYTHON})


def test_imports_that_go_round_are_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.name)
def test_a_room_imports_the_rooms_that_it_names(room):
    named = re.findall(
        r"`(_\w+)`", ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    )
    for path in room.glob("*.py"):
        others = {name for name in imported(path) if not name.startswith(room.name)}
        assert others <= set(named), path.name


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_a_room_is_entered_by_its_door(path):
    room = "" if path.parent.name == "fastclip" else path.parent.name
    for name in imported(path):
        assert "/" not in name or name.split("/")[0] == room, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_imports_what_users_start(path):
    above = {"__main__": set(), "_demo": {"__main__"}, "_run": {"__main__"}}
    above |= {"integrations": {"patching"}, "patching": {"__init__", "__main__", "_run"}}
    for name, by in above.items():
        assert name not in imported(path) or path.stem in by


def test_frameworks_are_not_imported_with_fastclip():
    names = ["apex", "lightning", "megatron", "pytorch_lightning", "timm", "transformers"]
    code = f"import sys; import fastclip; print([n for n in {names} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_only_ops_says_torch_ops(path):
    found = says(path.read_text(), "torch.ops", "_C", "fastclip._C")
    assert not found or path.parent.name == "_ops"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_only_ranks_knows_dtensors_and_collectives(path):
    code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
    assert path.parent.name == "_ranks" or not says(code, "DTensor", "torch.distributed")
    assert path.parent.name == "_ranks" or "all_reduce(" not in code


def test_words_that_are_forbidden_are_seen():
    assert says("x = torch.ops.fastclip", "torch.ops") == ["torch.ops"]
    assert says("from . import _C", "_C") == ["_C"]
    assert says("torch._C._dispatch()", "_C") == []


def test_the_host_asks_a_tensor_once():
    """`.item()` and truth of a tensor: under `error_if_nonfinite`, and where no device waits."""
    for path in PYTHON:
        assert ".item()" not in path.read_text() or path.stem == "__main__"
    assert (ROOT / "fastclip/_decide.py").read_text().count("not norms.isfinite()") == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_keep_apart(path):
    includes = re.findall(r'#include [<"](.+?)[>"]', path.read_text())
    assert "torch/extension.h" not in includes
    if path.suffix in (".cu", ".cuh"):
        assert not [i for i in includes if re.match(r"(torch|ATen|c10)/", i)]
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        if path.parent.name == here:
            assert not [i for i in includes if f"{there}/" in i]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_macros_of_our_own(path):
    assert not re.findall(r"^\s*#\s*define", path.read_text(), re.M)


@pytest.mark.parametrize("path", EVERY, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_opens_with_what_it_holds(path):
    first = path.read_text().lstrip().splitlines()[0]
    assert first.startswith(('"""', "// "))


@pytest.mark.parametrize(
    "path", PYTHON + SOURCES + MEASURING, ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_and_functions_have_a_size(path):
    text = path.read_text()
    # 250 lines is the guide; a few more is an answer, a lot more is another file.
    assert len(text.splitlines()) <= 260
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 40, node.name


def unplaced(text: str) -> list[str]:
    """Calls that make a tensor where torch.set_default_device says."""
    makers = {"tensor", "arange", "zeros", "ones", "empty", "full", "linspace", "eye"}
    makers |= {"rand", "randn", "randint", "randperm", "as_tensor", "scalar_tensor"}
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{maker}" for maker in makers}
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_tensors_are_made_on_a_named_device(path):
    assert not unplaced(path.read_text())


def test_tensors_that_are_made_on_any_device_are_seen():
    assert unplaced("torch.zeros(3) + torch.zeros(3, device=d)") == ["torch.zeros(3)"]


def is_mutable(value: ast.AST) -> bool:
    """Whether an expression makes what changes, or holds it; a type says what it is of."""
    kinds = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    calls = isinstance(value, ast.Call) and re.search(
        r"(?i)dict|list|set$", ast.unparse(value.func)
    )
    inside = () if isinstance(value, ast.Subscript) else ast.iter_child_nodes(value)
    return bool(calls) or isinstance(value, kinds) or any(map(is_mutable, inside))


def mutable(text: str) -> list[str]:
    """The module's variables that hold what changes."""
    return [
        ast.unparse(node)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and is_mutable(node.value)
    ]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_mutable_module_state(path):
    # Plans are kept with the layouts that they are for, and die with them.
    allowed = ("__all__ = ", "_plans: ")
    assert not [line for line in mutable(path.read_text()) if not line.startswith(allowed)]


def test_mutable_module_state_is_seen():
    assert len(mutable("a = []\nb = (dict(), 1)\nc: dict = defaultdict(int)\nd = (1, 2)")) == 3


def test_every_public_name_is_typed_and_documented():
    public = re.findall(r'^    "(\w+)",$', (ROOT / "fastclip/__init__.py").read_text(), re.M)
    found = set()
    for path in (ROOT / "fastclip").glob("[!_]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in public:
                found.add(node.name)
                assert node.returns is not None
                assert all(a.annotation for a in node.args.args)
                docstring = ast.get_docstring(node)
                arguments = ("Args:", "Raises:") if node.args.args else ()
                for section in (*arguments, "Reference:", ">>>"):
                    assert section in docstring, f"{node.name}: {section}"
    assert found == {name for name in public if name.islower()}


def test_help_is_plain_text():
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert not re.search(r"\\[a-zA-Z]{3}", ast.get_docstring(node) or ""), path


def test_names_follow_the_house():
    for path in PYTHON + SOURCES:
        assert not re.search(r"(utils|common|helpers|misc|v\d)$", path.stem)


def test_nothing_else_stands_at_the_top():
    # The last two come with an sdist.
    allowed = TOP_LEVEL | {"LICENSE", "CHANGELOG.md", "build", "PKG-INFO", "setup.cfg"}
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    extra = {n for n in names - allowed if not n.endswith((".egg-info", ".png"))}
    assert not extra


def test_setup_is_not_a_program():
    assert all(len(path.read_text().splitlines()) <= 60 for path in BUILD)
