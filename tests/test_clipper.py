"""GradClipper: against separate calls of the functions, and what it sees, counts and keeps."""

import copy
import doctest
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import oracle, parameters, ulps
from torch import nn

import fastclip
from fastclip import AutoClip, GradClipper, ZClip, _history, _ops, clipper, nonfinite

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["walk", "python"], autouse=True)
def reader(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_ops, "extension", None)
    elif _ops.extension is None:
        pytest.skip("no extension")


def grads(seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator) for n in (5, 300, 17, 40000, 1, 64)]
    return [tensor.to(device) for tensor in made]


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    return net


def same(made, twins):
    return all(torch.equal(a.grad, b.grad) for a, b in zip(made, twins, strict=True))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9, torch.tensor(0.5)], ids=["clips", "not", "tensor"])
def test_one_group_is_the_function(device, max_norm, p):
    made, twins = parameters(grads(0, device)), parameters(grads(0, device))
    clipper = GradClipper(made, max_norm, p)
    for _ in range(2):
        assert torch.equal(clipper.clip_(), fastclip.clip_grad_norm_(twins, max_norm, p))
        assert same(made, twins)


@pytest.mark.parametrize("rule", [lambda: AutoClip(50, 7), lambda: ZClip(warmup_steps=2)])
@pytest.mark.parametrize("policy", ["propagate", "keep", "zero"])
def test_a_rule_and_a_policy_are_the_functions(device, rule, policy):
    made, twins = parameters(grads(0, device)), parameters(grads(0, device))
    ours, theirs = rule(), rule()
    clipper = GradClipper(made, ours, nonfinite=policy)
    for step in range(8):
        for some in (made, twins):
            for parameter, grad in zip(some, grads(step, device), strict=True):
                parameter.grad = grad * (1 + step % 3)
        if step == 5:
            made[1].grad[3] = twins[1].grad[3] = math.nan
        norm = clipper.clip_()
        expected = fastclip.clip_grad_norm_(twins, theirs, nonfinite=policy)
        torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(made, twins, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


def test_groups_are_separate_calls_to_the_bit(device):
    made, twins = parameters(grads(1, device)), parameters(grads(1, device))
    rules = AutoClip(30, 5), AutoClip(30, 5)
    clipper = GradClipper(
        groups=[
            {"params": made[:2], "max_norm": 0.5, "name": "numbers"},
            {"params": made[2:3], "max_norm": rules[0], "name": "rule"},
            {"params": made[3:4], "max_norm": math.inf, "name": "watched"},
            {"params": made[4:], "max_norm": None, "name": "left out"},
        ]
    )
    for _ in range(3):
        norms = clipper.clip_()
        first = fastclip.clip_grad_norm_(twins[:2], 0.5)
        second = fastclip.clip_grad_norm_(twins[2:3], rules[1])
        third = fastclip.clip_grad_norm_(twins[3:4], math.inf)
        assert norms.tolist() == [float(n) for n in (first, second, third)]
        assert same(made, twins)
    assert list(clipper.stats()) == ["numbers", "rule", "watched"]
    assert clipper.stats()["watched"]["clipped"] == 0


def test_a_group_that_is_not_finite_leaves_the_others_alone():
    made = parameters([torch.ones(4), torch.tensor([1.0, math.nan]), torch.ones(4)])
    groups = [{"params": made[:1], "max_norm": 1.0}, {"params": made[1:2], "max_norm": 1.0}]
    groups.append({"params": [], "max_norm": 1.0})
    GradClipper(groups=groups, nonfinite="zero").clip_()
    assert made[0].grad.tolist() == pytest.approx([0.5] * 4)
    assert made[1].grad.tolist() == [0.0, 0.0]
    made[1].grad[0] = math.inf
    before = made[0].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        GradClipper(groups=groups, nonfinite="error").clip_()
    assert torch.equal(made[0].grad, before)


def test_a_module_is_walked_again_when_it_has_other_parameters():
    net = network()
    clipper = GradClipper(net, math.inf)
    first = float(clipper.clip_())
    net.append(nn.Linear(2, 2))
    net[3].weight.grad = torch.full((2, 2), 50.0)
    assert float(clipper.clip_()) == pytest.approx(math.hypot(first, 100.0))
    net[3].weight = nn.Parameter(torch.zeros(1))
    net[3].weight.grad = torch.tensor([7.0])
    assert float(clipper.clip_()) == pytest.approx(math.hypot(first, 7.0))
    net[3] = nn.Identity()
    assert float(clipper.clip_()) == first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "compiled",
    [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2, 4))],
    ids=["script", "trace"],
)
def test_a_scripted_module_is_walked_at_every_step(compiled):
    net = compiled(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    clipper = GradClipper(net, 0.1)
    for step in range(2):
        net.zero_grad()
        (net(torch.ones(2, 4)).sum() * (step + 1)).backward()
        expected = oracle([p.grad for p in net.parameters()], 2.0)
        assert float(clipper.clip_()) == pytest.approx(expected)
        assert oracle([p.grad for p in net.parameters()], 2.0) == pytest.approx(0.1, rel=1e-5)
    names = [name for name, _ in net.named_parameters()]
    assert list(clipper.norms_by_parameter()) == names


def test_an_optimizer_whose_groups_are_in_a_tuple_is_walked_at_every_step():
    made = parameters([torch.tensor([3.0])])
    optimizer = torch.optim.SGD(made, lr=0.1)
    optimizer.param_groups = tuple(optimizer.param_groups)
    clipper = GradClipper(optimizer, math.inf)
    assert float(clipper.clip_()) == 3
    optimizer.param_groups[0]["params"] += parameters([torch.tensor([4.0])])
    assert float(clipper.clip_()) == 5


def test_an_optimizer_is_walked_again_when_it_has_other_parameters():
    net, more = network(), parameters([torch.tensor([100.0])])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = GradClipper([optimizer, network()], math.inf)
    first = float(clipper.clip_())
    optimizer.add_param_group({"params": more})
    assert float(clipper.clip_()) == pytest.approx(math.hypot(first, 100.0))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[1]["params"] = parameters([torch.tensor([7.0])])
    assert float(clipper.clip_()) == pytest.approx(math.hypot(first, 7.0))


def test_a_list_is_walked_again_when_it_is_changed():
    made = parameters([torch.tensor([3.0])])
    clipper = GradClipper(made, math.inf)
    assert float(clipper.clip_()) == 3
    made += parameters([torch.tensor([4.0])])
    assert float(clipper.clip_()) == 5
    made[0], made[1] = made[1], parameters([torch.tensor([0.0])])[0]
    assert float(clipper.clip_()) == 4
    made.clear()
    assert float(clipper.clip_()) == 0


def test_a_parameter_that_changes_groups_counts_in_its_new_one():
    made = parameters([torch.tensor([value]) for value in (3.0, 4.0, 12.0)])
    one, two = made[:2], made[2:]
    clipper = GradClipper(groups=[{"params": one, "max_norm": 6.0}, {"params": two, "max_norm": 6}])
    assert clipper.clip_().tolist() == pytest.approx([5.0, 12.0])
    for parameter, value in zip(made, (3.0, 4.0, 12.0), strict=True):
        parameter.grad.fill_(value)
    two.insert(0, one.pop())
    both = math.hypot(4, 12)
    assert clipper.clip_().tolist() == pytest.approx([3.0, both])
    found = [float(parameter.grad) for parameter in made]
    assert found == pytest.approx([3.0, 4 * 6 / both, 12 * 6 / both])


@pytest.mark.parametrize("kind", ["number", "rule", "groups"])
def test_a_step_does_not_depend_on_the_dtype_of_those_before(device, kind):
    values = torch.tensor([3.0, 4.0], dtype=torch.float64, device=device)
    (narrow,) = parameters([values.float()])
    (wide,) = parameters([values])
    made = [narrow, wide]
    clipper = {
        "number": lambda: GradClipper(made, 0.1),
        "rule": lambda: GradClipper(made, lambda norm: norm * 0.1),
        "groups": lambda: GradClipper(groups=[{"params": made, "max_norm": 0.1}]),
    }[kind]()
    for grad in (values, values * 1e60, values):
        narrow.grad, wide.grad = values.float(), None
        clipper.clip_()
        coef = (0.5 if kind == "rule" else 0.1) / (5 + 1e-6)
        torch.testing.assert_close(narrow.grad, (values * coef).float())
        narrow.grad, wide.grad = None, grad.clone()
        clipper.clip_()
        norm = oracle([grad], 2.0)
        coef = (norm * 0.1 if kind == "rule" else 0.1) / (norm + 1e-6)
        torch.testing.assert_close(wide.grad, grad * coef, rtol=1e-14, atol=0)
    stats = clipper.stats()["0"] if kind == "groups" else clipper.stats()
    assert stats["total_norm"] == pytest.approx([5.0, 5.0, 5.0, 5e60, 5.0, 5.0], rel=1e-14)
    assert (stats["nonfinite"], stats["clipped"]) == (0, 6)
    assert all(coef > 0 for coef in stats["coef"])


def test_names_are_those_of_the_module_or_the_optimizer():
    net = network()
    expected = {n: float(p.grad.norm()) for n, p in net.named_parameters()}
    net[2].bias.grad = None
    expected["2.bias"] = 0.0
    found = [
        GradClipper(net, 1.0),
        GradClipper(net.named_parameters(), 1.0),
        GradClipper(torch.optim.SGD(net.named_parameters(), lr=0.1), 1.0),
    ]
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    for one in found:
        assert one.norms_by_parameter() == pytest.approx(expected)
    groups = [{"params": net[0], "max_norm": 1.0, "name": "a"}, {"params": net[2], "max_norm": 1}]
    assert list(GradClipper(groups=groups).norms_by_parameter())[::2] == ["a.weight", "1.weight"]
    now = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert GradClipper([], 1.0).norms_by_parameter() == {}


def test_what_is_not_finite_is_found_and_counted():
    net = network()
    assert fastclip.find_nonfinite(net) == {}
    net[0].weight.grad[0, :3] = torch.tensor([math.inf, math.nan, -math.inf])
    net[2].bias.grad[:] = math.inf
    assert fastclip.find_nonfinite(net) == {"0.weight": 3, "2.bias": 1}
    assert fastclip.find_nonfinite(net.parameters()) == {"0": 3, "3": 1}
    big = parameters([torch.full((3,), 1e308, dtype=torch.float64)])
    assert fastclip.find_nonfinite(big) == {}
    assert fastclip.find_nonfinite([]) == {}


def test_numbers_are_those_of_the_steps(device):
    (parameter,) = parameters([torch.zeros(2, device=device)])
    clipper = GradClipper([parameter], 2.0, nonfinite="keep")
    norms = [1.0, 4.0, math.inf, 8.0, 0.0]
    for norm in norms:
        parameter.grad[:] = torch.tensor([norm, 0.0])
        clipper.clip_()
    stats = clipper.stats()
    assert stats["total_norm"] == norms
    assert stats["coef"] == pytest.approx([1, 0.5, 1, 0.25, 1], rel=1e-6)
    assert (stats["steps"], stats["clipped"], stats["nonfinite"]) == (5, 2, 1)
    assert stats["percentiles"]["p50"] == 2.5
    assert clipper.stats() == stats


@pytest.mark.parametrize("policy", ["propagate", "keep", "zero"])
def test_an_infinite_norm_of_a_group_is_recorded_as_it_is(policy):
    made = parameters([torch.tensor([math.inf]), torch.tensor([math.nan]), torch.tensor([2.0])])
    groups = [
        {"params": [one], "max_norm": 1.0, "name": name}
        for one, name in zip(made, "inl", strict=True)
    ]
    clipper = GradClipper(groups=groups, nonfinite=policy)
    clipper.clip_()
    found = [clipper.stats()[name]["total_norm"] for name in "inl"]
    assert repr(found) == "[[inf], [nan], [2.0]]"


@pytest.mark.parametrize("other", [2.0, torch.tensor(2.0), lambda norm: norm / 2])
def test_a_threshold_beyond_the_dtype_of_the_norm_only_measures(other):
    made = parameters([torch.tensor([3.0]), torch.tensor([4.0])])
    limits = zip(made, (1e300, other), strict=True)
    clipper = GradClipper(groups=[{"params": [one], "max_norm": limit} for one, limit in limits])
    assert clipper.clip_().tolist() == [3.0, 4.0]
    assert [float(one.grad) for one in made] == pytest.approx([3.0, 2.0])
    assert clipper.stats()["0"]["clipped"] == 0


def test_the_ring_keeps_the_last_steps_and_counts_all(device):
    (parameter,) = parameters([torch.zeros(1, device=device)])
    clipper = GradClipper([parameter], AutoClip(100, 1), history=4)
    for step in range(1, 11):
        parameter.grad.fill_(step)
        clipper.clip_()
        stats = clipper.stats()
        assert stats["steps"] == step
        assert stats["total_norm"] == list(range(max(1, step - 3), step + 1))
        assert clipper.stats(last=2)["total_norm"] == stats["total_norm"][-2:]
        assert clipper.stats(last=2)["steps"] == step
    with pytest.raises(ValueError, match="last"):
        clipper.stats(last=0)


def test_a_ring_is_bounded_in_bytes():
    assert len(_history.Ring(1)._here["rows"]) == len(_history.Ring(128)._here["rows"]) == 8192
    assert len(_history.Ring(2000)._here["rows"]) == (16 << 20) // (16 * 2000) == 524
    assert _history.Ring(3 << 20)._here["rows"].shape == (1, 6 << 20)
    assert len(_history.Ring(2000, 20_000)._here["rows"]) == 20_000


# In a process of its own, where no memory was freed before that may be taken again.
TOUCHED = """
import resource, torch
from fastclip._history import Ring

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before = resident()
rings = [Ring(2000) for _ in range(40)]
for ring in rings:
    ring.add(torch.full((2000,), 2.0), 2.0)
    assert ring.read()[1].tolist() == [[2.0] * 4000]
print(resident() - before)
for ring in rings:
    ring._here["rows"].fill_(1)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_a_ring_touches_the_memory_of_its_steps():
    command = [sys.executable, "-c", TOUCHED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # In all they may come to 640 MiB.
    steps, everything = map(int, done.stdout.split())
    assert steps < 64 << 20
    assert everything > 600 << 20


def test_of_many_groups_the_last_steps_are_kept():
    made = parameters([torch.tensor([1.0 + i]) for i in range(500)])
    clipper = GradClipper(groups=[{"params": p, "max_norm": 250.0} for p in made])
    for _ in range(4200):
        clipper._ring.add(torch.zeros(500), 250.0)
    clipper.clip_()
    stats = clipper.stats()
    for i, one in enumerate(stats.values()):
        assert one["steps"] == 4201
        assert one["total_norm"] == [0.0] * 2096 + [1.0 + i]
        assert one["clipped"] == (1.0 + i > 250)


def test_the_log_leaves_the_cpu_and_no_other_place():
    log = _history.Ring(1)
    log.add(torch.ones(1), 1.0)
    # A device of its own to torch.Tensor.device, which every machine has.
    accelerator = torch.device("meta")
    before = log._places
    log._on(accelerator)
    assert list(log._places) == [accelerator]
    assert all(value.device == accelerator for value in log._here.values())
    log._places |= before
    log._device = torch.device("cpu")
    memory = log._places[accelerator]
    log._on(accelerator)
    assert log._places == {accelerator: memory}


def test_a_step_that_is_not_recorded_yet_is_zero_in_the_state():
    clipper = GradClipper(parameters([torch.tensor([3.0, 4.0])]), 1.0)
    clipper._ring._here["rows"].fill_(7)  # as memory may be found
    clipper.clip_()
    rows = clipper.state_dict()["log"]["rows"]
    assert rows[0].tolist() == [5, 1]
    assert not rows[1:].any()


def test_a_returned_norm_may_be_changed():
    (parameter,) = parameters([torch.ones(4)])
    clipper = GradClipper([parameter], 5.0)
    clipper.clip_().mul_(100)
    assert clipper.stats()["total_norm"] == [2.0]


@pytest.mark.parametrize("rule", [lambda: 2.0, lambda: AutoClip(0, 9)], ids=["number", "rule"])
def test_the_default_device_has_no_part_in_it(rule, tmp_path):
    pytest.importorskip("matplotlib")
    (parameter,) = parameters([torch.tensor([3.0, 4.0])])
    saved = GradClipper([parameter], rule())
    saved.clip_()
    with torch.device("meta"):
        clipper = GradClipper([parameter], rule())
        clipper.load_state_dict(saved.state_dict())
        parameter.grad.mul_(0).add_(4)
        assert float(clipper.clip_()) == pytest.approx(math.sqrt(32))
        stats = clipper.stats()
        clipper.plot(tmp_path / "norms.png")
        assert float(fastclip.clip_grad_norm_([], 1.0)) == 0
        assert fastclip.clip_grad_norms_([], 1.0).tolist() == []
        fastclip.clip_grad_value_([parameter], 1.0)
    assert stats["total_norm"] == pytest.approx([5, math.sqrt(32)])
    assert stats["percentiles"]["p50"] == pytest.approx((5 + math.sqrt(32)) / 2)
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", [AutoClip, lambda: ZClip(warmup_steps=1)], ids=["auto", "z"])
@pytest.mark.parametrize("loads", [False, True], ids=["called", "loaded"])
def test_a_first_call_in_inference_mode_leaves_a_clipper_that_trains(rule, loads):
    (parameter,) = parameters([torch.tensor([3.0, 4.0])])
    clipper = GradClipper([parameter], rule())
    with torch.inference_mode():
        if loads:
            clipper.load_state_dict(clipper.state_dict())
        clipper.clip_()
        if loads:
            clipper.load_state_dict(clipper.state_dict())
    parameter.grad = torch.tensor([6.0, 8.0])
    clipper.clip_()
    assert clipper.stats()["total_norm"] == [5.0, 10.0]


def test_the_state_goes_on_where_it_was(device):
    def make():
        made = parameters(grads(0, device))
        groups = [
            {"params": made[:3], "max_norm": AutoClip(50, 9), "name": "a"},
            {"params": made[3:], "max_norm": 1.0, "name": "b"},
        ]
        return made, GradClipper(groups=groups)

    (made, clipper), (twins, other) = make(), make()
    for step in range(6):
        if step == 3:
            other.load_state_dict(clipper.state_dict())
            assert other.stats() == clipper.stats()
        for parameter, twin, grad in zip(made, twins, grads(step, device), strict=True):
            parameter.grad, twin.grad = grad.clone(), grad.clone()
        clipper.clip_()
        if step >= 3:
            other.clip_()
            assert same(made, twins)
    assert other.stats() == clipper.stats()
    with pytest.raises(ValueError, match="state: expected rules of"):
        GradClipper(made, 1.0).load_state_dict(clipper.state_dict())
    two = GradClipper(groups=[{"params": some, "max_norm": 1.0} for some in (made, [])])
    with pytest.raises(ValueError, match="state: expected what state_dict of this Ring returns"):
        two.load_state_dict(GradClipper(made, 1.0).state_dict())
    other.load_state_dict(make()[1].state_dict())
    assert [one["steps"] for one in other.stats().values()] == [0, 0]


def test_a_long_run_takes_no_more_memory(tmp_path):
    import gc

    (parameter,) = parameters([torch.ones(3)])
    clipper = GradClipper([parameter], ZClip())
    for _ in range(10):
        clipper.clip_()
    gc.collect()
    held = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(2000):
        parameter.grad.fill_(1)
        clipper.clip_()
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= held


@pytest.mark.parametrize("steps", [1, 50, 100_000])
def test_plot_draws_any_number_of_steps(tmp_path, steps):
    pytest.importorskip("matplotlib")
    made = parameters([torch.ones(2)])
    clipper = GradClipper(made, 1.0, history=100_000)
    with pytest.raises(ValueError, match="plot"):
        clipper.plot(tmp_path / "none.png")
    norms = torch.rand(steps) * 3
    norms[steps // 2] = math.nan
    state = clipper.state_dict()
    state["log"]["steps"].fill_(steps)
    state["log"]["rows"][:steps, 0] = norms
    state["log"]["rows"][:steps, 1] = torch.where(norms > 2.5, math.nan, 1.0)
    clipper.load_state_dict(state)
    clipper.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_plot_without_matplotlib_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        GradClipper(parameters([torch.ones(2)]), 1.0).plot(tmp_path / "norms.png")


def bad(**change):
    group = {"params": parameters([torch.ones(2)]), "max_norm": 1.0} | change
    return {key: value for key, value in group.items() if value != "gone"}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(), TypeError, "groups"),
        (dict(parameters=[], groups=[]), TypeError, "groups"),
        (dict(parameters=[]), TypeError, "max_norm"),
        (dict(parameters=3, max_norm=1.0), TypeError, "parameters"),
        (dict(parameters="net", max_norm=1.0), TypeError, "parameters"),
        (dict(parameters=[3], max_norm=1.0), TypeError, r"parameters\[0\]"),
        (dict(parameters=[], max_norm=-1.0), ValueError, "max_norm"),
        (dict(parameters=[], max_norm=1.0, nonfinite="stop"), ValueError, "nonfinite"),
        (dict(parameters=[], max_norm=1.0, norm_type=math.nan), ValueError, "norm_type"),
        (dict(parameters=[], max_norm=1.0, process_group=3), TypeError, "process_group"),
        (dict(groups=[bad(norm=1)]), ValueError, r"groups\[0\].*norm"),
        (dict(groups=[bad(max_norm="gone")]), ValueError, r"groups\[0\].*max_norm"),
        (dict(groups=[bad(params="gone")]), ValueError, r"groups\[0\].*params"),
        (dict(groups=[bad(), bad(name="0")]), ValueError, "named '0'"),
        (dict(parameters=[], max_norm=1.0, history=0), ValueError, "history"),
        (dict(parameters=[], max_norm=1.0, nonfinite="skip"), ValueError, "'keep'"),
        (dict(parameters=[], max_norm=1.0, each=True, norm_type=0), ValueError, "norm_type"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        GradClipper(**arguments)


def test_a_parameter_in_two_groups_is_named():
    net = network()
    groups = [{"params": net, "max_norm": 1.0}, {"params": net[2], "max_norm": 1.0}]
    with pytest.raises(ValueError, match=r"0\.2\.weight and 1\.weight"):
        GradClipper(groups=groups)


@pytest.mark.parametrize("kind", ["number", "rule", "groups"])
def test_a_compiled_step_clips_alike(kind):
    net = network()
    twin = copy.deepcopy(net)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        b.grad = a.grad.clone()

    def make(net):
        if kind == "groups":
            return GradClipper(groups=[{"params": layer, "max_norm": 0.5} for layer in net[::2]])
        return GradClipper(net, 0.5 if kind == "number" else AutoClip(50, 4))

    ours, theirs = make(net), make(twin)
    compiled = torch.compile(lambda: ours.clip_(), backend="aot_eager", fullgraph=kind != "groups")
    for step in range(4):
        torch.testing.assert_close(compiled(), theirs.clip_())
        if step == 1 and kind != "groups":
            # What a module holds now is clipped, by a graph of its own.
            layer = torch.nn.Linear(3, 3)
            for p in layer.parameters():
                p.grad = torch.ones_like(p)
            net.append(layer)
            twin.append(copy.deepcopy(layer))
            for a, b in zip(layer.parameters(), twin[-1].parameters(), strict=True):
                b.grad = a.grad.clone()
    assert same(list(net.parameters()), list(twin.parameters()))
    assert ours.stats() == theirs.stats()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["number", "rule", "groups"])
def test_a_captured_clip_counts_its_replays(kind):
    made = parameters(grads(0, "cuda"))
    clipper = {
        "number": lambda: GradClipper(made, 0.5),
        "rule": lambda: GradClipper(made, AutoClip(50, 4), nonfinite="keep"),
        "groups": lambda: GradClipper(
            groups=[
                {"params": made[:2], "max_norm": 0.5},
                {"params": made[2:], "max_norm": ZClip()},
            ]
        ),
    }[kind]()
    clipper.clip_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipper.clip_()
    for _ in range(3):
        graph.replay()
    stats = clipper.stats()
    assert (stats["0"] if kind == "groups" else stats)["steps"] == 4


def test_the_examples_are_right():
    assert doctest.testmod(clipper).failed == 0
    assert doctest.testmod(nonfinite).failed == 0


@pytest.mark.parametrize("inside", ["itself", "list", "layer"])
def test_a_module_that_holds_its_clipper_can_be_freed(inside):
    import gc
    import weakref

    net = network()
    holder = net[0] if inside == "layer" else net
    holder.clipper = GradClipper([net] if inside == "list" else net, 1.0)
    holder.clipper.clip_()
    layer = weakref.ref(net[2])
    del net, holder
    gc.collect()
    assert layer() is None


def test_after_a_parameter_in_two_groups_the_next_call_looks_again():
    lists = [parameters([torch.tensor([3.0])]), parameters([torch.tensor([4.0])])]
    clipper = GradClipper(groups=[{"params": one, "max_norm": 1.0} for one in lists])
    (both,) = parameters([torch.tensor([5.0])])
    for one in lists:
        one.append(both)
    for _ in range(2):
        with pytest.raises(ValueError, match="one parameter"):
            clipper.clip_()
    lists[0].pop()
    assert clipper.clip_().tolist() == pytest.approx([3.0, math.hypot(4, 5)])


def test_what_cannot_be_watched_is_taken_as_it_is():
    net = network()
    values = {"a": net[0]}.values()
    clipper = GradClipper(values, math.inf)
    expected = float(fastclip.clip_grad_norm_(net[0].parameters(), math.inf))
    assert float(clipper.clip_()) == expected
    net[0].weight = nn.Parameter(torch.zeros(1))
    net[0].weight.grad = torch.tensor([100.0])
    assert float(clipper.clip_()) > 100
    assert clipper.norms_by_parameter()["0.weight"] == 100


def test_the_threshold_may_be_changed_between_steps():
    made = parameters([torch.tensor([3.0, 4.0])])
    clipper = GradClipper(made, 10.0)
    for limit in (10.0, 1, torch.tensor(2.0), lambda norm: norm / 2, AutoClip(50)):
        clipper.max_norm = limit
        assert clipper.max_norm is limit or clipper.max_norm == limit
        made[0].grad = torch.tensor([3.0, 4.0])
        assert clipper.clip_() == 5
    assert clipper.stats()["coef"] == pytest.approx([1.0, 0.2, 0.4, 0.5, 1.0])
    for bad, error in ((-1, ValueError), ("1", None), ("one", TypeError), (AutoClip, TypeError)):
        if error:
            with pytest.raises(error, match="max_norm"):
                clipper.max_norm = bad
    assert isinstance(clipper.max_norm, AutoClip)


def test_the_threshold_of_a_group_may_be_changed_by_its_name():
    made = parameters([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
    groups = [{"params": made[0], "max_norm": 1.0, "name": "a"}, {"params": made[1], "max_norm": 1}]
    clipper = GradClipper(groups=groups)
    assert dict(clipper.max_norm) == {"a": 1.0, "1": 1.0}
    clipper.max_norm["a"] = 2.5
    clipper.max_norm = {"1": 0.5}
    clipper.clip_()
    assert [float(one.grad.norm()) for one in made] == pytest.approx([2.5, 0.5])
    assert [one["max_norm"] for one in clipper.last().values()] == [2.5, 0.5]
    for bad, error in (({"b": 1.0}, ValueError), (1.0, TypeError), ({"a": -1}, ValueError)):
        with pytest.raises(error, match="max_norm"):
            clipper.max_norm = bad


def test_a_threshold_that_was_set_is_saved_and_a_copy_has_its_own():
    made = parameters([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
    groups = [{"params": q, "max_norm": n} for q, n in zip(made, (math.inf, 1.0), strict=True)]
    clipper, other = GradClipper(groups=groups), GradClipper(groups=groups)
    clipper.max_norm["0"] = 0.5
    twin = copy.copy(clipper)
    twin.max_norm["0"] = 0.25
    assert (clipper.max_norm["0"], twin.max_norm["0"]) == (0.5, 0.25)
    clipper.clip_()
    other.max_norm["1"] = 7.0
    other.load_state_dict(clipper.state_dict())
    assert dict(other.max_norm) == {"0": 0.5, "1": 7.0}
    assert dict(copy.deepcopy(other).max_norm) == dict(other.max_norm)
    assert {n: v.shape for n, v in other.state_dict().items() if n == "max_norm"} == {
        "max_norm": (2,)
    }


def test_what_is_no_attribute_cannot_be_set():
    clipper = GradClipper([], 1.0)
    for name in ("max_nrom", "norm_type", "thresholds", "names"):
        with pytest.raises(AttributeError):
            setattr(clipper, name, 1.0)

    class Logged(GradClipper):
        writer = None

    own = Logged([], 1.0)
    own.writer = own.step = 3
    assert (own.writer, own.step) == (3, 3)


def test_a_factor_is_that_of_clip_grad_norm(device):
    for scale in (0.5, torch.tensor(0.5, device=device)):
        made, twins = parameters(grads(1, device)), parameters(grads(1, device))
        clippers = [GradClipper(made, 0.5, each=each) for each in (False, True)]
        norm = fastclip.clip_grad_norm_(twins, 0.5, grad_scale=scale)
        assert clippers[0].clip_(grad_scale=scale) == norm
        assert same(made, twins)
        assert float(clippers[1].clip_(grad_scale=1 / 0.5)) == pytest.approx(1.0, rel=1e-2)
        by_name = clippers[1].norms_by_parameter().values()
        assert math.hypot(*by_name) == pytest.approx(1.0, rel=1e-2)
    for bad in (0, -1, math.inf):
        with pytest.raises(ValueError, match="grad_scale"):
            clippers[0].clip_(grad_scale=bad)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("in_groups", [False, True])
def test_the_norms_of_the_last_step_are_kept(device, p, in_groups):
    made = parameters(grads(1, device))
    without = nn.Parameter(torch.zeros(3, device=device))
    names = [(f"w{i}", item) for i, item in enumerate([made[0], without, *made[1:]])]
    parts, limits = [names], [0.5]
    clipper = GradClipper(names, 0.5, p, each=True)
    if in_groups:
        parts, limits = [names[:3], names[3:]], [0.5, 2.0]
        some = [{"params": q, "max_norm": n} for q, n in zip(parts, limits, strict=True)]
        clipper = GradClipper(groups=some, norm_type=p, each=True)
    with pytest.raises(ValueError, match="no step"):
        clipper.norms_by_parameter()
    twins = {item: item.grad.clone() if item.grad is not None else None for _, item in names}
    norms = clipper.clip_().reshape(-1)
    for part, limit, norm in zip(parts, limits, norms, strict=True):
        then = [twins[item] for _, item in part if twins[item] is not None]
        assert ulps(norm, oracle(then, p)) <= 2
        for _, item in part:
            if item.grad is not None:
                coef = min(1, limit / (oracle(then, p) + 1e-6))
                torch.testing.assert_close(item.grad, twins[item] * coef, rtol=1e-6, atol=0)
    expected = [oracle([g], p) if g is not None else 0.0 for g in twins.values()]
    made[0].grad.zero_()
    assert list(clipper.norms_by_parameter().values()) == pytest.approx(expected, rel=1e-6)


def test_each_has_no_process_group():
    with pytest.raises(ValueError, match="each"):
        GradClipper([], 1.0, each=True, process_group=object())


def test_a_gradient_that_cannot_be_measured_is_named_without_ranks():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad_dtype = None
    weight.grad = torch.ones(3, dtype=torch.int32)
    clipper = GradClipper(groups=[{"params": [weight], "max_norm": 1.0}])
    with pytest.raises(TypeError, match=r"parameters\[0\]: dtype torch.int32"):
        clipper.clip_()


def test_last_is_the_last_step_of_stats():
    made = parameters([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
    one = GradClipper(made, 1.0)
    two = GradClipper(
        groups=[
            {"params": made[0], "max_norm": lambda norm: norm / 2, "name": "a"},
            {"params": made[1], "max_norm": math.inf, "name": "b"},
        ]
    )
    for empty in (one, two):
        with pytest.raises(ValueError, match="no step was recorded"):
            empty.last()
    for _ in range(3):
        made[0].grad = torch.tensor([3.0, 4.0])
        two.clip_()
        one.clip_()
        stats = one.stats()
        assert one.last() == {
            "total_norm": stats["total_norm"][-1],
            "max_norm": 1.0,
            "coef": stats["coef"][-1],
            "dropped": False,
        }
        a, b = two.last()["a"], two.last()["b"]
        assert (a["total_norm"], a["max_norm"], a["coef"]) == (5, 2.5, pytest.approx(0.5))
        assert b == {
            "total_norm": two.stats()["b"]["total_norm"][-1],
            "max_norm": math.inf,
            "coef": 1,
            "dropped": False,
        }


def test_last_is_right_when_the_ring_is_full():
    clipper = GradClipper(parameters([torch.tensor([3.0, 4.0])]), math.inf)
    clipper._ring._here["steps"].fill_(_history.STEPS)
    clipper.clip_()
    assert clipper.last()["total_norm"] == 5 == clipper.stats()["total_norm"][-1]
