"""The switch between kernels and plain PyTorch, and `check`, which says what is right."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import oracle, parameters, python

import fastclip
from fastclip import _check, _check_cases, _ops
from fastclip._check import check, uses_kernels
from fastclip._check_cases import Case, cases
from fastclip._ops import reference

built = pytest.mark.skipif(_ops.extension is None, reason="the extension is not built")


@pytest.fixture
def switch():
    yield
    if _ops.extension is not None:
        fastclip.use_kernels(True)


@built
def test_kernels_can_be_turned_off_and_on(switch):
    grads = [torch.randn(10_000), torch.randn(3, dtype=torch.float64)]
    expected = oracle(grads, 2.0)
    for enabled in (True, False, True):
        fastclip.use_kernels(enabled)
        assert _ops.has_kernels("cpu") == uses_kernels("cpu") == enabled
        assert _ops.turned_off() == (None if enabled else "fastclip.use_kernels(False) was called")
        made = parameters(grads)
        clipper = fastclip.GradClipper(made, 1.0)
        assert float(clipper.clip_()) == pytest.approx(expected, rel=1e-6)
        assert clipper.stats()["clipped"] == 1
        assert float(fastclip.clip_grad_norm_(made, 0.5)) == pytest.approx(1.0, rel=1e-6)
        torch.testing.assert_close(made[0].grad, grads[0] * (0.5 / expected), rtol=1e-5, atol=0)


def test_the_environment_turns_kernels_off_and_info_says_so():
    result = python("-m", "fastclip", "info", FASTCLIP_KERNELS="0")
    assert "plain PyTorch: FASTCLIP_KERNELS=0 was set" in result.stdout, result.stderr
    code = "import fastclip; print(fastclip._ops.extension); fastclip.use_kernels(True)"
    result = python("-c", code, FASTCLIP_KERNELS="0")
    assert result.stdout == "None\n"
    assert "use_kernels: no kernels were loaded: FASTCLIP_KERNELS=0 was set" in result.stderr
    result = python("-c", "import fastclip", FASTCLIP_KERNELS="off")
    assert "FASTCLIP_KERNELS=off: expected 0" in result.stderr


def test_ops_that_the_profiler_does_not_see_are_no_proof(monkeypatch):
    faulty = SimpleNamespace(**vars(_ops) | {"scale_": reference.scale_})
    monkeypatch.setattr(_check, "_ops", faulty)
    assert not uses_kernels("cpu")


@built
def test_the_extension_knows_of_process_groups(tmp_path):
    assert not _ops.extension.has_process_groups()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    assert _ops.extension.has_process_groups()
    dist.destroy_process_group()
    assert not _ops.extension.has_process_groups()


def test_check_writes_all_that_it_found(tmp_path, capsys):
    check(torch.device("cpu"), tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["cases"] == len(list(cases("cpu")))
    assert found["wrong"] == []
    assert found["facts"]["torch"] == torch.__version__
    assert all(row["fastclip"] > 0 for row in found["speed"])
    said = capsys.readouterr().out
    assert "x torch" in said
    assert "verdict   right" in said
    assert ("compiled, and called" if _ops.extension else "none: plain PyTorch") in said


def write_beyond(op, tensors, *how):
    op(tensors, *how)
    last = tensors[-1]
    last.as_strided((1,), (1,), last.storage_offset() + last.numel()).fill_(0.0)


def write_where_nothing_changes(op, tensors, *how):
    norm = op(tensors, *how)
    tensors[5].mul_(1 - 1e-7)
    return norm


count = iter(range(1, 9))
FAULTS = {
    "norm": (lambda op, ts, *how: op(ts, *how) * (1 + 1e-5), "expected the norms"),
    "norms": (lambda op, ts, *how: op(ts, *how) * (1 + next(count) * 1e-7), "other bits the secon"),
    "scale_": (lambda op, ts, *how: op(ts[:-1], *how), "expected tensors[10] to become"),
    "clamp_": (write_beyond, "outside of the tensors"),
    "clip_norm_ idle": (write_where_nothing_changes, "were written"),
}


def use_faulty(monkeypatch, op, fault):
    faulty = SimpleNamespace(**vars(_ops) | {op: fault})
    monkeypatch.setattr(_check_cases, "_ops", faulty)


@pytest.mark.parametrize("name", FAULTS)
def test_a_case_says_what_is_wrong(monkeypatch, name):
    assert Case("cpu", name, "float32").wrong() == ""
    fault, said = FAULTS[name]
    op = name.split()[0]
    use_faulty(monkeypatch, op, partial(fault, getattr(_ops, op)))
    assert said in Case("cpu", name, "float32").wrong()


def test_check_ends_with_1_and_says_how_to_see_it_again(monkeypatch, capsys):
    use_faulty(monkeypatch, "clamp_", lambda tensors, bound: None)
    with pytest.raises(SystemExit) as ended:
        check(torch.device("cpu"), None)
    said = capsys.readouterr().out
    assert ended.value.code == 1
    (again,) = re.findall(r"print\((Case\(.*\))\.wrong\(\)\)", said)
    assert eval(again).wrong()
    assert eval(again.replace("p=2.0", "p=float('inf')")).wrong()


ODD = """
import os, fastclip
if os.environ["RANK"] == os.environ["ODD"]:
    fastclip.__version__ = "0.2.0"
from fastclip.__main__ import main
main(["check", "--device", "cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "said"),
    [("none", "clipped DDP, FSDP2, a 2-d mesh"), ("1", "rank 1 has fastclip 0.2.0")],
)
def test_check_under_torchrun_names_the_odd_rank(tmp_path, odd, said):
    script = tmp_path / "odd.py"
    script.write_text(ODD)
    result = python("-m", "torch.distributed.run", "--nproc-per-node=2", str(script), ODD=odd)
    assert (result.returncode == 0) == (odd == "none")
    assert said in result.stdout, result.stderr
