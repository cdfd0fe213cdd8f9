"""Types, as mypy --strict sees them: of the package, of a script that uses it, and of typos."""

import re
from pathlib import Path

import pytest
import typed_use

import fastclip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TYPOS = """
from collections.abc import Callable

from torch import Tensor, nn

from fastclip import GradClipper, NormAccumulator, clip_grad_norm_, clip_grad_norms_

model = nn.Linear(2, 2)
clip_grad_norm_(model.parameters(), 1.0, nonfinite="skipp")  # arg-type
clip_grad_norm_(model.parameters(), 1.0, norm_type="infinity")  # arg-type
clip_grad_norm_(model, 1.0)  # arg-type
clip_grad_norms_(model.parameters(), 1.0, "infinity")  # arg-type
NormAccumulator(model, "infinity")  # arg-type
GradClipper(model, 1.0, nonfinite="skipp")  # arg-type
GradClipper(model, 1.0, norm_type="infinity")  # arg-type
GradClipper(groups=[{"params": model, "max_nrom": 1.0}])  # typeddict-unknown-key
GradClipper(groups=[{"max_norm": 1.0}])  # typeddict-item
GradClipper(model, "1.0")  # arg-type
"""


def test_types_of_the_package_and_of_a_script_agree_and_know_typos(tmp_path):
    api = pytest.importorskip("mypy.api")
    typos = tmp_path / "typos.py"
    typos.write_text(TYPOS)
    settings = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={tmp_path / 'cache'}"]
    out, *_ = api.run(["--strict", *settings, f"{ROOT}/fastclip", typed_use.__file__, str(typos)])
    found = re.findall(r"^(.+?):(\d+): error: .*\[(.+)\]$", out, re.M)
    assert f"Found {len(found)} errors" in out
    lines = enumerate(TYPOS.splitlines(), 1)
    expected = [("typos.py", str(i), line.split("# ")[1]) for i, line in lines if "# " in line]
    assert [(Path(path).name, line, code) for path, line, code in found] == expected


def test_typed_script_uses_every_public_name_and_runs():
    text = Path(typed_use.__file__).read_text()
    assert not [name for name in fastclip.__all__ if f"{name}(" not in text]
    typed_use.main()
