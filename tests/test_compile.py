"""torch.compile, torch.export and opcheck: the ops are good citizens of the compiler."""

import copy

import pytest
import torch
from conftest import awkward, parameters
from test_subclasses import two_halves
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

import fastclip
from fastclip import _ops

pytestmark = pytest.mark.slow


def fastclip_nodes(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "fastclip" in str(n.target)]


def fresh_gradients(made, scale=1.0):
    """Give them new gradients, and their twins, which it returns."""
    twins = copy.deepcopy(made)
    for parameter, twin in zip(made, twins, strict=True):
        parameter.grad = torch.randn_like(parameter) * scale
        twin.grad = parameter.grad.clone()
    return twins


@pytest.fixture(autouse=True)
def _clean_compiler():
    torch.compiler.reset()


NUMBERS = {
    "clip_grad_norm_": fastclip.clip_grad_norm_,
    "keep": lambda ps, number: fastclip.clip_grad_norm_(ps, number, nonfinite="keep"),
    "grad_scale": lambda ps, number: fastclip.clip_grad_norm_(ps, 1.0, grad_scale=number),
    "clip_grads_with_norm_": two_halves,
    "a number that stays": lambda ps, number: fastclip.clip_grad_value_(ps, 0.5),
    "clip_grad_norms_": fastclip.clip_grad_norms_,
    "clip_grad_agc_": fastclip.clip_grad_agc_,
    "normalize_grad_": fastclip.normalize_grad_,
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_changes_is_compiled_at_most_twice_more(call, backend, dynamic):
    made = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 4))]
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
    for step in range(12):
        expected = fresh_gradients(made, scale=0.01 if step == 9 else 1.0)
        held, number = [p.grad for p in made], 0.11 * (step + 1)
        norms = call(expected, number)
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            torch.testing.assert_close(compiled(made, number), norms, rtol=1e-6, atol=0)
        assert all(p.grad is g for p, g in zip(made, held, strict=True))
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_compiled_clip_is_reinplaced():
    # Without reinplacing, functionalisation would copy every gradient around the op.
    made = parameters([torch.zeros(1000), torch.zeros(1000)])
    fresh_gradients(made)
    compiled = torch.compile(lambda ps: fastclip.clip_grad_norm_(ps, 1.0), fullgraph=True)
    _, code = torch._inductor.utils.run_and_get_code(compiled, made)
    assert "fastclip.clip_norm_" in code[0]
    assert "empty_strided_cpu((1000" not in code[0].split("def call")[1]
    assert "clone" not in code[0].split("def call")[1]


def test_each_function_is_one_op_of_one_graph():
    made = parameters([torch.zeros(5), torch.zeros(3, 4)])

    def step(ps, threshold):
        fastclip.clip_grad_value_(ps, 0.5)
        norm = fastclip.get_total_norm([p.grad for p in ps], 1.0)
        fastclip.clip_grads_with_norm_(ps, 0.7, norm)
        return norm, fastclip.clip_grad_norm_(ps, threshold, "inf")

    recorder, threshold = EagerAndRecordGraphs(), torch.tensor(0.01)
    compiled = torch.compile(step, fullgraph=True, backend=recorder)
    for first in (True, False):
        expected = fresh_gradients(made)
        with torch._dynamo.config.patch(error_on_recompile=not first):
            results = compiled([*made, made[0]], threshold)
        # A parameter that is given twice counts once.
        assert all(map(torch.equal, results, step([*expected, expected[0]], threshold)))
        assert all(torch.equal(p.grad, e.grad) for p, e in zip(made, expected, strict=True))
    assert [fastclip_nodes(module.graph) for module in recorder.graphs] == [
        [f"fastclip.{name}" for name in ("clamp_", "norm", "scale_", "clip_norm_")]
    ]


def test_an_export_keeps_the_ops_and_runs_by_aotinductor(tmp_path):
    class Clip(torch.nn.Module):
        def forward(self, x, y):
            norm = fastclip.get_total_norm([x, y])
            return norm, _ops.clip_norm_([x, y], 1.0, 2.0), x + 0, y + 0

    inputs = torch.randn(4), torch.randn(2, 3)
    expected = Clip()(*(t.clone() for t in inputs))
    program = torch.export.export(Clip(), tuple(t.clone() for t in inputs))
    nodes = [node for m in program.graph_module.modules() for node in fastclip_nodes(m.graph)]
    assert sorted(nodes) == ["fastclip.clip_norm_.default", "fastclip.norm.default"]
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "c.pt2"))
    for run in (program.module(), torch._inductor.aoti_load_package(path)):
        for one, other in zip(run(*(t.clone() for t in inputs)), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def samples(dtype):
    coef = torch.tensor(0.5)
    return {
        "norm": [(awkward(dtype), 2.0), (awkward(dtype), 3.0), ([], 2.0)],
        "norms": [(awkward(dtype), 2.0), (awkward(dtype), 1.0, [0, 1] * 5 + [3], True)],
        "norms.rows": [(awkward(dtype), 2.0, None, False, True)],
        "scale_": [(awkward(dtype), coef), (awkward(dtype), coef.repeat(2), [0, 1] * 5 + [0])],
        "clamp_": [(awkward(dtype), 0.5)],
        "clip_norm_": [
            (awkward(dtype), coef, 2.0),
            (awkward(dtype), torch.tensor(1e9), 2.0),
            (awkward(dtype), coef, 2.0, [coef.double().repeat(2), coef.double()]),
        ],
    }


@pytest.mark.parametrize("name", list(samples(torch.float32)))
def test_opcheck(name, dtype):
    op = getattr(torch.ops.fastclip, name.removesuffix(".rows")).default
    for args in samples(dtype)[name]:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("stride", [(6, 2), (3, 2)], ids=["gaps", "interleaved"])
def test_a_view_is_clipped_in_one_graph(stride):
    (parameter,) = parameters([torch.zeros(2, 3)])
    memory = torch.ones(20)
    parameter.grad = memory.as_strided((2, 3), stride)
    clip = torch.compile(lambda: fastclip.clip_grad_norm_([parameter], 1.0), fullgraph=True)
    torch.testing.assert_close(clip(), torch.tensor(6.0).sqrt())
    torch.testing.assert_close(memory.sum(), torch.tensor(14 + 6**0.5))
