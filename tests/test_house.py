"""The rules of the house: layering, sizes, names, and that README keeps its promises."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fastclip

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "fastclip").glob("**/*.py"))
BUILD = [ROOT / "setup.py", ROOT / "csrc/nvcc.py"]
SOURCES = sorted(
    p for p in (ROOT / "csrc").glob("**/*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")
)
TESTED = sorted(p for d in ("tests", "benchmarks") for p in (ROOT / d).glob("**/*.py"))
MEASURING = [path for path in TESTED if path.parent.name == "benchmarks"]
IN_ROOMS = sorted((ROOT / "fastclip").glob("_*/*.py"))


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


def test_no_imports_go_round():
    assert not cycle({name_of(path): imported(path) for path in PYTHON})
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def unnamed_rooms(path: Path) -> set[str]:
    """The rooms that a file of a room imports, and that the docstring of the room does not name."""
    room = path.parent
    door = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    others = {name for name in imported(path) if not name.startswith(room.name)}
    return others - set(re.findall(r"`(_\w+)`", door))


def entered_elsewhere(path: Path) -> list[str]:
    """The files that are imported from another room, and not by that room's door."""
    room = "" if path.parent.name == "fastclip" else path.parent.name
    return [name for name in imported(path) if "/" in name and name.split("/")[0] != room]


def too_long(path: Path) -> list[str]:
    """The file, and its functions, that are longer than what is read at once."""
    text = path.read_text()
    # 250 lines is the guide; a few more is an answer, a lot more is another file.
    found = ["all of it"] if len(text.splitlines()) > 260 else []
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and body[-1].end_lineno - body[0].lineno >= 40:
                found.append(node.name)
    return found


def unplaced(text: str) -> list[str]:
    """Calls that make a tensor where torch.set_default_device says."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    made = [call for call in calls if re.fullmatch(MAKERS, ast.unparse(call.func))]
    return [ast.unparse(c) for c in made if "device" not in {word.arg for word in c.keywords}]


def saying(pattern: str) -> Callable[[Path], list[str]]:
    """What the code of a file says, outside of comments and docstrings, that has this pattern."""

    def found(path: Path) -> list[str]:
        text = path.read_text()
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", text) if path.suffix == ".py" else text
        return [match[0] for match in re.finditer(pattern, code, re.M)]

    return found


def outside(room: str) -> list[Path]:
    return [path for path in PYTHON if path.parent.name != room]


def compiled(*kinds: str) -> list[Path]:
    return [path for path in SOURCES if {path.suffix, path.parent.name} & {*kinds}]


MAKERS = r"torch\.(tensor|arange|zeros|ones|empty|full|linspace|eye|rand\w*|\w+_tensor)"
# The module's variables that hold what changes. Plans are kept with the layouts that they are for.
MUTABLE = r'^(?!__all__|_plans)\w+(: .+)? = .*(?<![\w\]\[".])(\[|{|\w*(?i:dict|list|set)\()'
OPS = r"(?<![\w.])(torch\.ops|_C|fastclip\._C)\b"
RANKS = r"(?<![\w.])(DTensor|torch\.distributed)\b|\ball_reduce\("
TORCHS = r'#include [<"](torch|ATen|c10)/'
# What breaks a rule in a file, and the files that it is for.
RULES = {
    "a file opens with what it holds": (
        lambda path: path.read_text().lstrip()[:3] not in ('"""', "// "),
        PYTHON + BUILD + SOURCES + TESTED,
    ),
    "a room imports the rooms that it names": (unnamed_rooms, IN_ROOMS),
    "a room is entered by its door": (entered_elsewhere, PYTHON),
    "nothing imports what users start": (
        saying(r"^ *from \.+(integrations|_demo|_run) "),
        [path for path in PYTHON if path.stem not in ("__main__", "patching")],
    ),
    "files and functions have a size": (too_long, PYTHON + SOURCES + MEASURING),
    "setup is not a program": (lambda path: len(path.read_text().splitlines()) > 60, BUILD),
    "tensors are made on a named device": (lambda path: unplaced(path.read_text()), PYTHON),
    "no mutable module state": (saying(MUTABLE), PYTHON),
    "one room has the ops": (saying(OPS), outside("_ops")),
    "one room has ranks": (saying(RANKS), outside("_ranks")),
    # Of a tensor it waits for the device; the command line may.
    "no item": (saying(r"\.item\(\)"), [path for path in PYTHON if path.stem != "__main__"]),
    "not all of torch": (saying(r'#include [<"]torch/extension\.h'), SOURCES),
    "no torch in kernels": (saying(TORCHS), compiled(".cu", ".cuh")),
    "no cuda in cpu": (saying(r'#include [<"].*cuda/'), compiled("cpu")),
    "no cpu in cuda": (saying(r'#include [<"].*cpu/'), compiled("cuda")),
    "no macros of our own": (saying(r"^\s*#\s*define"), SOURCES),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule):
    broken_by, files = RULES[rule]
    assert len(files) > 1
    assert not {str(path): found for path in files if (found := broken_by(path))}


def test_what_breaks_a_rule_is_seen():
    assert re.search(OPS, "x = torch.ops.fastclip")
    assert re.search(OPS, "from . import _C")
    assert not re.search(OPS, "torch._C._dispatch()")
    assert re.search(TORCHS, '#include "ATen/ops/mul.h"')
    assert unplaced("torch.zeros(3) + torch.zeros(3, device=d)") == ["torch.zeros(3)"]
    made = ("a = []", "b = (dict(), 1)", "c: dict[str, int] = defaultdict(int)")
    assert all(re.search(MUTABLE, line) for line in made)
    assert not re.search(MUTABLE, "d: list[int] = (1, b[2])")


def test_every_public_function_is_documented():
    functions = [getattr(fastclip, name) for name in fastclip.__all__ if name.islower()]
    assert len(functions) > 9
    for function in functions:
        arguments = ("Args:", "Raises:") if inspect.signature(function).parameters else ()
        for section in (*arguments, "Reference:", ">>>"):
            assert section in function.__doc__, f"{function.__name__}: {section}"
