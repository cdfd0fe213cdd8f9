"""GradClipper: against separate calls of the functions, and what no random life of it meets.

test_random_clipper.py has the formulas, what it records, and parameters that change groups.
"""

import copy
import gc
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import oracle, parameters
from torch import nn

import fastclip
from fastclip import AutoClip, DropSpikes, GradClipper, ZClip, _history


def grads(seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator) for n in (5, 300, 17, 40000, 1, 64)]
    return [tensor.to(device) for tensor in made]


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for i, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    return net


def assert_same(made, twins):
    for a, b in zip(made, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


def clipper_of(items, limits, **how):
    """With several thresholds each has a group: of n of them the first has every nth item."""
    if len(limits) == 1:
        return GradClipper(items, limits[0], **how)
    groups = [{"params": items[i :: len(limits)], "max_norm": n} for i, n in enumerate(limits)]
    return GradClipper(groups=groups, **how)


THRESHOLDS = {
    "number": lambda: 0.5,
    "loose": lambda: 1e9,
    "tensor": lambda: torch.tensor(0.5),
    "watched": lambda: math.inf,
    "percentile": lambda: AutoClip(50, 7),
    "outliers": lambda: ZClip(warmup_steps=2),
    "left out": lambda: None,
}


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("policy", ["propagate", "keep", "zero"])
@pytest.mark.parametrize("names", [["number"], ["tensor"], ["percentile"], [*THRESHOLDS]])
def test_clips_are_those_of_the_function_to_the_bit(reader, device, names, policy, p):
    made, twins = parameters(grads(0, device) * 2), parameters(grads(0, device) * 2)
    ours, theirs = ([THRESHOLDS[name]() for name in names] for _ in range(2))
    how = {"norm_type": p, "nonfinite": policy}
    clipper = clipper_of(made, ours, **how)
    for step in range(8):
        for some in (made, twins):
            for parameter, grad in zip(some, grads(step, device) * 2, strict=True):
                parameter.grad = grad * (1 + step % 3)
        if step == 5:
            made[1].grad[3] = twins[1].grad[3] = math.nan
            made[3].grad[3] = twins[3].grad[3] = math.inf
        norms = clipper.clip_().reshape(-1)
        expected = [
            fastclip.clip_grad_norm_(twins[i :: len(names)], limit, **how)
            for i, limit in enumerate(theirs)
            if limit is not None
        ]
        torch.testing.assert_close(norms, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
        assert_same(made, twins)


SOURCES = {
    "module": lambda net, optimizer: net,
    "optimizer": lambda net, optimizer: optimizer,
    "several": lambda net, optimizer: [optimizer, nn.Linear(2, 2)],
    "groups in a tuple": lambda net, optimizer: optimizer,
    # These cannot be watched.
    "values": lambda net, optimizer: {"a": net}.values(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_holds_parameters_is_walked_again_when_it_has_others(reader, source):
    net, more = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": net.parameters()}, {"params": []}], lr=0.1)
    if source == "groups in a tuple":
        optimizer.param_groups = tuple(optimizer.param_groups)
    clipper = GradClipper(SOURCES[source](net, optimizer), math.inf)

    def check():
        expected = oracle([p.grad for p in net.parameters() if p.grad is not None], 2.0)
        assert float(clipper.clip_()) == pytest.approx(expected)

    check()
    net.append(more)
    more.weight.grad = torch.full((2, 2), 50.0)
    if source == "groups in a tuple":
        optimizer.param_groups[-1]["params"] += more.parameters()
    else:
        optimizer.add_param_group({"params": more.parameters()})
    check()
    if source != "groups in a tuple":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    more.weight = nn.Parameter(torch.zeros(1))
    more.weight.grad = torch.tensor([7.0])
    optimizer.param_groups[-1]["params"] = list(more.parameters())
    check()
    net[3] = nn.Identity()
    optimizer.param_groups[-1]["params"] = []
    check()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "compiled",
    [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2, 4))],
    ids=["script", "trace"],
)
def test_a_scripted_module_is_walked_at_every_step(reader, compiled):
    net = compiled(network())
    clipper = GradClipper(net, 0.1)
    for _ in range(2):
        net.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
        clipper.clip_()
        assert oracle([p.grad for p in net.parameters()], 2.0) == pytest.approx(0.1, rel=1e-5)
    assert list(clipper.norms_by_parameter()) == [name for name, _ in net.named_parameters()]


def test_names_are_those_of_the_module_or_the_optimizer():
    net = network()
    net[2].bias.grad = None
    expected = {n: float(p.grad.norm()) for n, p in net.named_parameters() if p.grad is not None}
    expected["2.bias"] = 0.0
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    for source in (net, net.named_parameters(), optimizer):
        assert GradClipper(source, 1.0).norms_by_parameter() == pytest.approx(expected)
    groups = [{"params": net[0], "max_norm": 1.0, "name": "a"}, {"params": net[2], "max_norm": 1}]
    assert list(GradClipper(groups=groups).norms_by_parameter())[::2] == ["a.weight", "1.weight"]


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


def test_the_ring_keeps_the_last_steps_and_counts_all(device):
    (parameter,) = parameters([torch.zeros(1, device=device)])
    clipper = GradClipper([parameter], AutoClip(100, 1), history=4)
    with pytest.raises(ValueError, match="last: no step was recorded"):
        clipper.last()
    for step in range(1, 11):
        parameter.grad.fill_(step)
        # What is returned may be changed.
        clipper.clip_().mul_(100)
        stats = clipper.stats()
        assert stats["steps"] == step
        assert stats["total_norm"] == list(range(max(1, step - 3), step + 1))
        assert clipper.stats(last=2)["total_norm"] == stats["total_norm"][-2:]
        assert clipper.stats(last=2)["steps"] == step
        assert clipper.last()["total_norm"] == clipper.last()["max_norm"] == step
    with pytest.raises(ValueError, match="last"):
        clipper.stats(last=0)


def test_a_ring_is_bounded_in_bytes():
    for groups, steps in ((1, 8192), (128, 8192), (2000, (16 << 20) // (16 * 2000)), (3 << 20, 1)):
        assert _history.Ring(groups)._here["rows"].shape == (steps, 2 * groups)
    assert len(_history.Ring(2000, 20_000)._here["rows"]) == 20_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_a_ring_touches_the_memory_of_its_steps():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    # 128 MiB, which the allocator has from the system and not from what was freed before.
    ring = _history.Ring(1, history=1 << 23)
    ring.add(torch.ones(1), 2.0)
    assert ring.read()[1].tolist() == [[1.0, 2.0]]
    assert resident() - before < 32 << 20
    ring._here["rows"].fill_(1)
    assert resident() - before > 96 << 20


def test_the_log_leaves_the_cpu_and_no_other_place():
    # A device of its own to torch.Tensor.device, which every machine has.
    log, accelerator = _history.Ring(1), torch.device("meta")
    before = log._places
    log._on(accelerator)
    memory = log._places[accelerator]
    assert log._places == {accelerator: memory}
    log._places |= before
    log._device = torch.device("cpu")
    log._on(accelerator)
    assert log._places == {accelerator: memory}


def test_a_step_that_is_not_recorded_yet_is_zero_in_the_state():
    clipper = GradClipper(parameters([torch.tensor([3.0, 4.0])]), 1.0)
    clipper._ring._here["rows"].fill_(7)  # as memory may be found
    clipper.clip_()
    rows = clipper.state_dict()["log"]["rows"]
    assert rows[0].tolist() == [5, 1]
    assert not rows[1:].any()


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
        assert clipper.stats()["total_norm"] == pytest.approx([5, math.sqrt(32)])
        clipper.plot(tmp_path / "norms.png")
        assert float(fastclip.clip_grad_norm_([], 1.0)) == 0
        assert fastclip.clip_grad_norms_([], 1.0).tolist() == []
        fastclip.clip_grad_value_([parameter], 1.0)
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", [AutoClip, lambda: ZClip(warmup_steps=1)], ids=["auto", "z"])
def test_a_first_call_in_inference_mode_leaves_a_clipper_that_trains(rule):
    (parameter,) = parameters([torch.tensor([3.0, 4.0])])
    clipper = GradClipper([parameter], rule())
    with torch.inference_mode():
        clipper.load_state_dict(clipper.state_dict())
        clipper.clip_()
        clipper.load_state_dict(clipper.state_dict())
    parameter.grad = torch.tensor([6.0, 8.0])
    clipper.clip_()
    assert clipper.stats()["total_norm"] == [5.0, 10.0]


def test_a_state_goes_on_where_it_was_and_fits_no_other_clipper(device):
    made = parameters(grads(0, device))
    clipper = clipper_of(made, [AutoClip(50, 9), 1.0])

    def run():
        for step in range(3):
            for parameter, grad in zip(made, grads(step, device), strict=True):
                parameter.grad = grad
            clipper.clip_()
        return clipper.stats()

    runs = [(clipper.state_dict(), run()) for _ in range(2)]
    for state, expected in runs:
        clipper.load_state_dict(state)
        assert run() == expected
    other = clipper_of(made, [1.0, 1.0])
    with pytest.raises(ValueError, match="state: expected rules of"):
        other.load_state_dict(clipper.state_dict())
    with pytest.raises(ValueError, match="state: expected what state_dict of this Ring returns"):
        other.load_state_dict(clipper_of(made, [1.0]).state_dict())


@pytest.mark.parametrize("rule", [AutoClip, ZClip, lambda: DropSpikes(1.0)])
def test_a_long_run_takes_no_more_memory(rule):
    (parameter,) = parameters([torch.ones(3)])
    clipper, counts = GradClipper([parameter], rule()), []
    for steps in (10, 2000):
        for _ in range(steps):
            parameter.grad.fill_(1)
            clipper.clip_()
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] <= counts[0]


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


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(), TypeError, "groups"),
        (dict(parameters=[], groups=[]), TypeError, "groups"),
        (dict(parameters=[]), TypeError, "max_norm"),
        (dict(parameters=3, max_norm=1.0), TypeError, "parameters"),
        (dict(parameters=[3], max_norm=1.0), TypeError, r"parameters\[0\]"),
        (dict(parameters=[], max_norm=-1.0), ValueError, "max_norm"),
        (dict(parameters=[], max_norm=1.0, nonfinite="stop"), ValueError, "nonfinite"),
        (dict(parameters=[], max_norm=1.0, norm_type=math.nan), ValueError, "norm_type"),
        (dict(parameters=[], max_norm=1.0, process_group=3), TypeError, "process_group"),
        (dict(groups=[dict(params=[], max_norm=1.0, norm=1)]), ValueError, r"groups\[0\].*norm"),
        (dict(groups=[dict(params=[])]), ValueError, r"groups\[0\].*max_norm"),
        (dict(groups=[dict(max_norm=1.0)]), ValueError, r"groups\[0\].*params"),
        (dict(groups=[dict(params=[], max_norm=1.0, name=0)] * 2), ValueError, "named '0'"),
        (dict(parameters=[], max_norm=1.0, history=0), ValueError, "history"),
        (dict(parameters=[], max_norm=1.0, nonfinite="skip"), ValueError, "'keep'"),
        (dict(parameters=[], max_norm=1.0, each=True, norm_type=0), ValueError, "norm_type"),
        (dict(parameters=[], max_norm=1.0, each=True, process_group=object()), ValueError, "each"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        GradClipper(**arguments)


def test_a_parameter_in_two_groups_is_named_at_every_step():
    net = network()
    lists = [list(net.parameters()), [net[2].weight]]
    with pytest.raises(ValueError, match=r"0\.2\.weight and 1\.0"):
        GradClipper(groups=[{"params": some, "max_norm": 1.0} for some in (net, lists[1])])
    both = lists[1].pop()
    clipper = GradClipper(groups=[{"params": some, "max_norm": math.inf} for some in lists])
    lists[1].append(both)
    for _ in range(2):
        with pytest.raises(ValueError, match="one parameter"):
            clipper.clip_()
    lists[0].clear()
    assert clipper.clip_().tolist() == [0, pytest.approx(oracle([both.grad], 2.0))]


@pytest.mark.parametrize("kind", ["number", "rule", "groups"])
def test_a_compiled_step_clips_alike(kind):
    nets = [network(), network()]

    def make(net):
        if kind == "groups":
            return GradClipper(groups=[{"params": layer, "max_norm": 0.5} for layer in net[::2]])
        return GradClipper(net, 0.5 if kind == "number" else AutoClip(50, 4))

    ours, theirs = map(make, nets)
    compiled = torch.compile(lambda: ours.clip_(), backend="aot_eager", fullgraph=kind != "groups")
    for step in range(4):
        torch.testing.assert_close(compiled(), theirs.clip_())
        if step == 1 and kind != "groups":
            # What a module holds now is clipped, by a graph of its own.
            for net in nets:
                net.extend(network())
    assert_same(*(list(net.parameters()) for net in nets))
    assert ours.stats() == theirs.stats()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["propagate", "keep"])
@pytest.mark.parametrize("names", [["number"], ["percentile"], ["number", "outliers"]])
def test_a_captured_clip_counts_its_replays(names, policy):
    limits = [THRESHOLDS[name]() for name in names]
    clipper = clipper_of(parameters(grads(0, "cuda")), limits, nonfinite=policy)
    clipper.clip_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipper.clip_()
    for _ in range(3):
        graph.replay()
    stats = clipper.stats()
    assert stats.get("0", stats)["steps"] == 4


@pytest.mark.parametrize("inside", ["itself", "list", "layer"])
def test_a_module_that_holds_its_clipper_can_be_freed(inside):
    net = network()
    holder = net[0] if inside == "layer" else net
    holder.clipper = GradClipper([net] if inside == "list" else net, 1.0)
    holder.clipper.clip_()
    layer = weakref.ref(net[2])
    del net, holder
    gc.collect()
    assert layer() is None


def test_thresholds_may_be_changed_between_steps_those_of_groups_by_their_names():
    made = parameters([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
    alone = GradClipper(made[0], 10.0)
    for limit in (1, "2", torch.tensor(2.0), lambda norm: norm / 2, AutoClip(50)):
        alone.max_norm = limit
        made[0].grad = torch.tensor([3.0, 4.0])
        assert alone.clip_() == 5
    assert alone.stats()["coef"] == pytest.approx([0.2, 0.4, 0.4, 0.5, 1.0])
    groups = [{"params": made[0], "max_norm": 1.0, "name": "a"}, {"params": made[1], "max_norm": 1}]
    clipper = GradClipper(groups=groups)
    clipper.max_norm["a"] = 2.5
    twin = copy.copy(clipper)
    clipper.max_norm = {"1": 0.5}
    twin.max_norm["a"] = 0.25
    clipper.clip_()
    assert [float(one.grad.norm()) for one in made] == pytest.approx([2.5, 0.5])
    assert clipper.state_dict()["max_norm"].tolist() == [2.5, 0.5]
    assert dict(copy.deepcopy(twin).max_norm) == {"a": 0.25, "1": 1.0}
    bad = [(alone, -1, ValueError), (alone, "one", TypeError), (alone, AutoClip, TypeError)]
    bad += [(clipper, {"b": 1.0}, ValueError), (clipper, 1.0, TypeError)]
    for one, value, error in [*bad, (clipper, {"a": -1}, ValueError)]:
        with pytest.raises(error, match="max_norm"):
            one.max_norm = value
    assert alone.max_norm is limit


def test_what_is_no_attribute_can_be_set_in_a_subclass_alone():
    class Logged(GradClipper):
        writer = None

    for name in ("max_nrom", "norm_type", "thresholds", "names"):
        with pytest.raises(AttributeError):
            setattr(GradClipper([], 1.0), name, 1.0)
    own = Logged([], 1.0)
    own.writer = own.step = 3
    assert (own.writer, own.step) == (3, 3)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("limits", [[0.5], [0.5, 2.0]])
def test_factors_and_norms_of_each_gradient_clip_as_the_function(device, limits, each, scale, p):
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    made, twins = parameters(grads(1, device)), parameters(grads(1, device))
    clipper = clipper_of(made, limits, norm_type=p, each=each)
    norms = clipper.clip_(grad_scale=scale).reshape(-1)
    expected = [
        fastclip.clip_grad_norm_(twins[i :: len(limits)], limit, p, grad_scale=scale)
        for i, limit in enumerate(limits)
    ]
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-6, atol=0)
    for a, b in zip(made, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    if each:
        found = sorted(clipper.norms_by_parameter().values())
        expected = sorted(float(scale) * oracle([grad], p) for grad in grads(1))
        assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="grad_scale"):
        clipper.clip_(grad_scale=0)


def test_a_gradient_that_cannot_be_measured_is_named_without_ranks():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad_dtype = None
    weight.grad = torch.ones(3, dtype=torch.int32)
    clipper = GradClipper(groups=[{"params": [weight], "max_norm": 1.0}])
    with pytest.raises(TypeError, match=r"parameters\[0\]: dtype torch.int32"):
        clipper.clip_()
