"""README keeps its promises: its code runs, its names are the tested ones, its numbers measured."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from test_scenarios import NAMES

import fastclip
from fastclip import _ops, clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def rows(text: str, header: str) -> list[dict[str, str]]:
    """The rows of the table that begins with this header, their cells by the names of columns."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    names, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in cells]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(code):
    for name in re.findall(r"^from fastclip.integrations.(\w+)|^from (lightning)", code, re.M):
        pytest.importorskip("".join(name))
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_code_comes_early_and_the_page_is_short():
    lines = README.splitlines()
    assert "```python" in lines[:8]
    assert len(lines) <= 250


def test_what_the_page_links_to_is_there():
    links = re.findall(r"\]\((?!http)(.+?)\)", README)
    assert len(links) >= 4
    assert all((ROOT / link).exists() for link in links)


def test_docstring_examples_are_right():
    names = [module.name for module in pkgutil.iter_modules(fastclip.__path__)]
    for name in (name for name in names if name[0] != "_"):
        module = importlib.import_module(f"fastclip.{name}")
        assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0, name
    assert all(t.examples for t in doctest.DocTestFinder().find(clip) if t.name.endswith("_"))


def test_names_from_elsewhere_are_the_tested_ones():
    found = {
        (there, ours)
        for first, _, third, *_ in map(dict.values, rows(README, "| Function |"))
        for ours in re.findall(r"`(.+?)`", first)
        for there in re.findall(r"`(.+?)`", third)
    }
    assert found == set(NAMES)


def test_numbers_are_measured():
    # In the last run that measured them all.
    blocks = [
        text for text in RESULTS.split("\n## ") if re.search(r"^\| work .*foreach ms", text, re.M)
    ]
    last, shown = rows(blocks[-1], "| work "), rows(README, "| work ")
    assert shown
    assert not [row for row in shown if not any(row.items() <= other.items() for other in last)]


def test_steps_are_measured():
    shown = re.findall(r"(\d+) N, ([\d.]+) ms", README)
    measured = re.findall(r"^\|.*\| (\d+) +\| ([\d.]+) +\| [\d.]+ +\|$", RESULTS, re.M)
    assert len(shown) == 10
    assert set(shown) <= set(measured)


def test_info_and_the_readme_install_the_same_nvcc():
    assert _ops.NVCC.removeprefix("pip install ") in README
    assert README.count("cuda-toolkit[") == 1
