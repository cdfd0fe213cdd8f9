"""The inventory of torch's private names: what breaks without each, and what it is.

Where a torch has changed one, the test fails by that name.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import python
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.amp.grad_scaler import OptState
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip import _ops
from fastclip._private import attribute, private

FUNCTORCH = "torch._C._are_functorch_transforms_active"
MODES = "torch.utils._python_dispatch"
SPEC = "torch.distributed.tensor._dtensor_spec"
C10D = "torch.distributed.distributed_c10d"


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def is_what_functorch_says(is_active) -> bool:
    seen = []
    torch.vmap(lambda x: seen.append(is_active()) or x)(torch.ones(2))
    return seen == [True] and not is_active()


def disables_modes(disabled) -> bool:
    from torch.utils._python_dispatch import _get_current_dispatch_mode as now

    with Mode() as mode:
        seen = [now() is mode]
        with disabled():
            seen.append(now() is None)
    return seen == [True, True] and now() is None


def foreach(function, *args: object) -> list[list[float]]:
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([1.0])]
    result = function(tensors, *args)
    return [t.tolist() if t.dim() else [t.item()] for t in result or tensors]


def in_backward(function) -> list:
    """What a hook gets from the function, and all that has been noted when backward ends."""
    seen, x = [], torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(function(seen)))
    x.sum().backward()
    return seen


def unscales(function) -> bool:
    tensors, found = [torch.tensor([2.0, float("inf")])], torch.zeros(1)
    function(tensors, found, torch.tensor(0.5))
    return found.item() == 1 and tensors[0][0] == 1


def is_functional(kind) -> bool:
    from torch._functorch.aot_autograd import aot_function

    seen = []
    compiled = aot_function(lambda x: seen.append(type(x)) or x + 1, lambda graph, _: graph.forward)
    compiled(torch.ones(1))
    return any(issubclass(one, kind) for one in seen)


def makes_a_layout(_) -> bool:
    meta = private(f"{SPEC}.TensorMeta")(torch.Size(), (), torch.float32)
    spec = private(f"{SPEC}.DTensorSpec")(mesh(), (Replicate(),), tensor_meta=meta)
    return dist.tensor.DTensor(torch.tensor(2.0), spec, requires_grad=False).item() == 2


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def distributed() -> Tensor:
    return distribute_tensor(torch.ones(2), mesh(), [Replicate()])


def joined() -> torch.nn.Module:
    """A DistributedDataParallel of one rank."""
    return torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))


def asks_inside_of_join(a) -> bool:
    module = joined()
    with module.join(divide_by_initial_world_size=False):
        return a(module) is False


def scaler() -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=4.0)
    made.scale(torch.ones(1))
    return made


SPARSE = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,), check_invariants=False)
# The paths and attributes that are asked for: what breaks without them, for which there is no
# public way, and whether what is found is what it was.
PATHS = {
    # torch.vmap and torch.func
    FUNCTORCH: is_what_functorch_says,
    # torch.compile, and fake tensors and opaque subclasses
    "torch._subclasses.FakeTensor": lambda kind: isinstance(
        FakeTensorMode().from_tensor(torch.ones(1)), kind
    ),
    "torch._subclasses.functional_tensor.FunctionalTensor": is_functional,
    f"{MODES}.is_traceable_wrapper_subclass": lambda f: f(torch.ones(1)) is False,
    # plain ops: norms, clips, nonfinite="zero", clip by value, half gradients of a device
    "torch._foreach_norm": lambda f: foreach(f, 2.0) == [[5], [1]],
    "torch._foreach_mul_": lambda f: foreach(f, torch.tensor(2.0)) == [[6, -8], [2]],
    "torch._foreach_zero_": lambda f: foreach(f) == [[0, 0], [0]],
    "torch._foreach_clamp_min_": lambda f: foreach(f, 2.0) == [[3, 2], [2]],
    "torch._foreach_clamp_max_": lambda f: foreach(f, 2.0) == [[2, -4], [1]],
    "torch._amp_foreach_non_finite_check_and_unscale_": unscales,
    # gradients that are lazily negated
    "torch._neg_view": lambda f: f(torch.ones(1)).is_neg(),
    # foreach=
    "torch.utils._foreach_utils._device_has_foreach_support": lambda f: (
        f(torch.device("cuda")) and not f(torch.device("meta"))
    ),
    # all DTensors over ranks, process_group
    f"{MODES}._disable_current_modes": disables_modes,
    f"{C10D}._world": lambda it: dist.group.WORLD in list(it.pg_group_ranks),
    # the norm of DTensors as a DTensor
    f"{SPEC}.DTensorSpec": makes_a_layout,
    f"{SPEC}.TensorMeta": makes_a_layout,
    # DTensors compiled
    "torch.distributed._functional_collectives.all_reduce": lambda f: (
        f(torch.ones(2), "sum", dist.group.WORLD).tolist() == [1, 1]
    ),
    # the reason why another rank failed
    f"{C10D}._get_default_store": lambda f: f().set("key", "value") is None,
    # NormAccumulator under DDP: a callback that backward calls before it ends, and which one it is
    "torch.autograd.Variable._execution_engine.queue_callback": lambda f: (
        in_backward(lambda seen: f(lambda: seen.append(1))) == [None, 1]
    ),
    "torch._C._current_graph_task_id": lambda f: (
        in_backward(lambda seen: f())[0] >= 0 and f() == -1
    ),
}
ATTRIBUTES = {
    # DTensors
    "_spec": lambda a: a(distributed()).placements == (Replicate(),),
    "_local_tensor": lambda a: a(distributed()).tolist() == [1, 1],
    "_get_root_mesh": lambda a: a(mesh())().ndim == 1,
    "pg_group_ranks": lambda a: a(private(f"{C10D}._world"))[dist.group.WORLD] == {0: 0},
    # NormAccumulator under DDP, and with join
    "_use_python_reducer": lambda a: a(joined()) is False,
    "_join_config": lambda a: (a(joined()).enable, a(joined()).is_first_joinable) == (False, False),
    "_divide_by_initial_world_size": asks_inside_of_join,
    # sparse gradients
    "_indices": lambda a: a(SPARSE)().tolist() == [[1, 1]],
    "_values": lambda a: a(SPARSE)().tolist() == [2, 3],
    # GradClipper of a module
    "_parameters": lambda a: list(a(torch.nn.Linear(1, 1))) == ["weight", "bias"],
    "_modules": lambda a: list(a(torch.nn.Sequential(torch.nn.ReLU()))) == ["0"],
    # clipped_step, unscale_and_clip_ with a scaler
    "_check_scale_growth_tracker": lambda a: a(scaler())("unscale_")[0].item() == 4,
    "_per_optimizer_states": lambda a: a(scaler())[0]["stage"] is OptState.READY,
}
# Without it no optimizer divides gradients: clipped_step refuses all of them.
SAID_OTHERWISE = "_step_supports_amp_scaling"
# Headers of C++ that torch does not promise, and what of each is used; a build says what is gone.
HEADERS = {
    "torch/csrc/autograd/python_variable.h",  # tensors in Python
    "torch/csrc/utils/pybind.h",  # tensors as arguments
    "c10/core/impl/VirtualGuardImpl.h",  # streams of any device
}
# What has no underscore, or no header of its own, and is not promised either.
OTHERS = {
    "FuncTorchDynamicLayerFrontMode",  # ops inside torch.func
    "vars(torch.ops.fastclip)",  # where torch keeps ops
    "real_obj",  # the mesh behind its stand-in in a graph
    "DTensor(value",  # the norm of DTensors as a DTensor
    "get_backend_config",  # where a group communicates
    "group.allreduce(",  # all collectives
    "found_inf_per_device",  # what a scaler keeps for its update
    "momentum_buffer",  # a first step of SGD that is skipped
    "cpu_children",  # whether kernels are called
    "co_freevars",  # patch: the closure of torch's decorator
    "aten::_amp_foreach_non_finite",  # NormAccumulator with a scaler
    "_unsafe_get_target",  # NormAccumulator
    "getWeakStorageImpl",  # NormAccumulator
    "autograd_meta",  # the speed of the walk
    "is_python_dispatch",  # which tensors are plain
    "unsafe_storage",  # what is fetched ahead
    "version_counter",  # in-place ops bump versions
    "redispatch",  # kernels leave what they cannot do to the default
    "GOMP_parallel",  # torch's own threads
}
# Python's own.
PYTHONS = {"_xoptions", "_getframe", "_exit", "get_ident", "_replace"}
PYTHONS |= {"_args_from_interpreter_flags"}
ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
SOURCES = sorted((ROOT / "fastclip").glob("**/*.py"))
TREES = {str(p.relative_to(ROOT / "fastclip")): ast.parse(p.read_text()) for p in SOURCES}


def nodes(kind):
    return [
        (file, n) for file, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, kind)
    ]


def asked_for(function: str) -> dict[str, set[str]]:
    """The names that calls of `private` or `attribute` give, and the files with those calls."""
    found: dict[str, set[str]] = {}
    constants = {
        n.targets[0].id: n.value.value
        for _, n in nodes(ast.Assign)
        if isinstance(n.targets[0], ast.Name) and isinstance(n.value, ast.Constant)
    }
    loops = {"kind": ("_parameters", "_modules")}
    for file, node in nodes(ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == function and file != "_private.py":
            name = node.args[-1]
            names = [name.value] if isinstance(name, ast.Constant) else loops.get(name.id)
            for one in names or [constants[name.id]]:
                found.setdefault(one, set()).add(file)
    return found


def test_the_inventory_is_complete_and_each_name_is_used_in_one_file():
    for function, inventory in (("private", PATHS), ("attribute", ATTRIBUTES)):
        found = asked_for(function)
        assert found.keys() == inventory.keys()
        assert not {name: files for name, files in found.items() if len(files) > 1}


def own_names() -> set[str]:
    names = {n.name for _, n in nodes(ast.FunctionDef | ast.ClassDef)}
    names |= {n.attr for _, n in nodes(ast.Attribute) if isinstance(n.ctx, ast.Store)}
    return names | {n.id for _, n in nodes(ast.Name) if isinstance(n.ctx, ast.Store)}


def test_no_private_name_is_used_in_another_way():
    own = own_names() | PYTHONS
    used = [(file, n.attr) for file, n in nodes(ast.Attribute)]
    for file, node in nodes(ast.ImportFrom):
        parts = (node.module or "").split(".")
        is_private = not node.level and any(re.match("_[^_]", part) for part in parts)
        is_ours = node.level or parts[0] == "fastclip"
        used += [(file, a.name) for a in node.names if not is_ours]
        assert not is_private or {a.name for a in node.names} <= PYTHONS, (file, node.module)
    assert not [(f, name) for f, name in used if re.match("_[^_]", name) and name not in own]
    named = {name: set() for name in (*ATTRIBUTES, SAID_OTHERWISE)}
    for file, node in nodes(ast.Constant):
        if node.value in named:
            named[node.value].add(file)
    assert not {name: files for name, files in named.items() if len(files) != 1}


def test_what_is_promised_as_little_is_used_in_one_file():
    paths = [p for room in ("fastclip", "csrc") for p in (ROOT / room).glob("**/*.[pch]*")]
    texts = [p.read_text() for p in paths if p.suffix in SUFFIXES]
    headers = re.findall(r"#include <((?:torch/csrc|c10/core/impl)/.*)>", "\n".join(texts))
    assert sorted(headers) == sorted(HEADERS)
    code = [re.sub(r"#.*|//.*", "", text) for text in texts]
    assert {name: sum(name in text for text in code) for name in OTHERS} == dict.fromkeys(OTHERS, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A process group of this rank alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("path", PATHS)
def test_a_name_is_what_it_was(world, path):
    assert PATHS[path](private(path))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_what_it_was(world, name):
    assert ATTRIBUTES[name](lambda owner: attribute(owner, name))


def test_a_fused_optimizer_says_that_it_divides():
    weight = torch.nn.Parameter(torch.ones(1))
    assert getattr(torch.optim.SGD([weight], fused=True), SAID_OTHERWISE)
    assert not hasattr(torch.optim.SGD([weight]), SAID_OTHERWISE)


WITHOUT_ANY = """
import pkgutil

def lost(path):
    raise AttributeError(path)

found, pkgutil.resolve_name = pkgutil.resolve_name, lost
import torch, fastclip
pkgutil.resolve_name = found
w = torch.nn.Parameter(torch.zeros(2))
w.grad = torch.tensor([3.0, 4.0])
print(fastclip.clip_grad_norm_([w], 1.0).item(), w.grad.norm().item())
w.grad = w.grad.to_sparse()
for call in (
    lambda: fastclip.clip_grad_norm_([w], 1.0, foreach=True),
    lambda: torch.vmap(lambda g: fastclip.get_total_norm([g]))(torch.ones(2, 3)),
):
    try:
        print(call())
    except RuntimeError as error:
        print(error)
"""


def test_a_torch_without_any_of_them_clips_plain_gradients_and_says_what_is_gone():
    result = python("-c", WITHOUT_ANY)
    lines = result.stdout.splitlines()
    if _ops.extension is not None:
        assert lines[0].startswith("5.0 0.99999"), result.stderr
        assert "has no torch.utils._foreach_utils._device_has_foreach_support" in lines[1]
        assert f"has no {FUNCTORCH}" in lines[2]
        assert f"torch {torch.__version__}" in lines[2]
