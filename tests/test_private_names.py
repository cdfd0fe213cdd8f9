"""The inventory of torch's private names: where each is used, what breaks without it, what it is.

Where a torch has changed one, the test fails by that name.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip import _ops
from fastclip._private import attribute, private

FUNCTORCH = "torch._C._are_functorch_transforms_active"
MODES = "torch.utils._python_dispatch"
SPEC = "torch.distributed.tensor._dtensor_spec"
DISABLED = f"{MODES}._disable_current_modes"
C10D = "torch.distributed.distributed_c10d"
UNSCALE = "torch._amp_foreach_non_finite_check_and_unscale_"


def joined():
    """A DistributedDataParallel of one rank."""
    return torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))


def asks_inside_of_join(a) -> bool:
    module = joined()
    with module.join(divide_by_initial_world_size=False):
        return a(module) is False


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def is_what_functorch_says(path: str) -> bool:
    seen = []
    torch.vmap(lambda x: seen.append(private(path)()) or x)(torch.ones(2))
    return seen == [True] and not private(path)()


def disables_modes(path: str) -> bool:
    from torch.utils._python_dispatch import _get_current_dispatch_mode as now

    with Mode() as mode:
        seen = [now() is mode]
        with private(path)():
            seen.append(now() is None)
    return seen == [True, True] and now() is None


def foreach(path: str, *args: object) -> list[list[float]]:
    tensors = [torch.tensor([3.0, -4.0]), torch.tensor([1.0])]
    result = private(path)(tensors, *args)
    return [t.tolist() if t.dim() else [t.item()] for t in result or tensors]


def is_found_by_backward(path: str) -> bool:
    """Whether a callback that is queued in backward is called before that ends."""
    seen, x = [], torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: private(path)(lambda: seen.append(1)))
    x.sum().backward()
    return seen == [1]


def task_ids(path: str) -> bool:
    seen, x = [], torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(private(path)()))
    x.sum().backward()
    return seen[0] >= 0 and private(path)() == -1


def unscales(path: str) -> bool:
    tensors, found = [torch.tensor([2.0, float("inf")])], torch.zeros(1)
    private(path)(tensors, found, torch.tensor(0.5))
    return found.item() == 1 and tensors[0][0] == 1


def is_fake(path: str) -> bool:
    from torch._subclasses import FakeTensorMode

    return isinstance(FakeTensorMode().from_tensor(torch.ones(1)), private(path))


def is_functional(path: str) -> bool:
    seen = []

    def backend(graph, inputs):
        return graph.forward

    from torch._functorch.aot_autograd import aot_function

    aot_function(lambda x: seen.append(type(x)) or x + 1, fw_compiler=backend)(torch.ones(1))
    return any(issubclass(kind, private(path)) for kind in seen)


def reduces(path: str) -> bool:
    return private(path)(torch.ones(2), "sum", dist.group.WORLD).tolist() == [1, 1]


def makes_a_layout(path: str) -> bool:
    mesh = init_device_mesh("cpu", (1,))
    meta = private(f"{SPEC}.TensorMeta")(torch.Size(), (), torch.float32)
    spec = private(f"{SPEC}.DTensorSpec")(mesh, (Replicate(),), tensor_meta=meta)
    return dist.tensor.DTensor(torch.tensor(2.0), spec, requires_grad=False).item() == 2


def distributed() -> Tensor:
    return distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()])


def scaler() -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", init_scale=4.0)
    made.scale(torch.ones(1))
    return made


SPARSE = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,), check_invariants=False)
# The file that uses it, what breaks without it, for which there is no public way, and what it is.
PATHS = {
    FUNCTORCH: ("_ops/transforms.py", "torch.vmap and torch.func", is_what_functorch_says),
    "torch._subclasses.FakeTensor": (
        "_ops/transforms.py",
        "fake tensors, torch.compile, opaque subclasses",
        is_fake,
    ),
    "torch._subclasses.functional_tensor.FunctionalTensor": (
        "_ops/transforms.py",
        "torch.compile",
        is_functional,
    ),
    DISABLED: ("_ops/transforms.py", "all DTensors, process_group", disables_modes),
    "torch._foreach_norm": (
        "_ops/measure.py",
        "plain ops",
        lambda p: foreach(p, 2.0) == [[5], [1]],
    ),
    "torch._foreach_mul_": (
        "_ops/reference.py",
        "plain ops",
        lambda p: foreach(p, torch.tensor(2.0)) == [[6, -8], [2]],
    ),
    "torch._foreach_zero_": (
        "_ops/reference.py",
        "plain ops, nonfinite='zero'",
        lambda p: foreach(p) == [[0, 0], [0]],
    ),
    "torch._foreach_clamp_min_": (
        "_ops/reference.py",
        "plain ops, clip by value",
        lambda p: foreach(p, 2.0) == [[3, 2], [2]],
    ),
    "torch._foreach_clamp_max_": (
        "_ops/reference.py",
        "plain ops, clip by value",
        lambda p: foreach(p, 2.0) == [[2, -4], [1]],
    ),
    UNSCALE: ("_ops/reference.py", "plain ops on half gradients of a device", unscales),
    f"{MODES}.is_traceable_wrapper_subclass": (
        "_gradients/stored.py",
        "torch.compile",
        lambda p: private(p)(torch.ones(1)) is False,
    ),
    "torch._neg_view": (
        "_gradients/stored.py",
        "gradients that are lazily negated",
        lambda p: private(p)(torch.ones(1)).is_neg(),
    ),
    "torch.utils._foreach_utils._device_has_foreach_support": (
        "_gradients/reading.py",
        "foreach=",
        lambda p: private(p)(torch.device("cuda")) and not private(p)(torch.device("meta")),
    ),
    f"{SPEC}.DTensorSpec": ("_ranks/mesh.py", "the norm of DTensors as a DTensor", makes_a_layout),
    f"{SPEC}.TensorMeta": ("_ranks/mesh.py", "the norm of DTensors as a DTensor", makes_a_layout),
    f"{C10D}._world": (
        "_ranks/groups.py",
        "all DTensors over ranks",
        lambda p: dist.group.WORLD in list(private(p).pg_group_ranks),
    ),
    f"{C10D}._get_default_store": (
        "_ranks/failure.py",
        "the reason why another rank failed",
        lambda p: private(p)().set("key", "value") is None,
    ),
    "torch.distributed._functional_collectives.all_reduce": (
        "_ranks/parts.py",
        "DTensors compiled",
        reduces,
    ),
    "torch.autograd.Variable._execution_engine.queue_callback": (
        "_ranks/ddp.py",
        "NormAccumulator under DDP",
        is_found_by_backward,
    ),
    "torch._C._current_graph_task_id": (
        "_ranks/ddp.py",
        "NormAccumulator under DDP",
        task_ids,
    ),
}
ATTRIBUTES = {
    "_spec": (
        "_ranks/mesh.py",
        "DTensors",
        lambda a: a(distributed()).placements == (Replicate(),),
    ),
    "_local_tensor": ("_ranks/mesh.py", "DTensors", lambda a: a(distributed()).tolist() == [1, 1]),
    "_get_root_mesh": (
        "_ranks/mesh.py",
        "DTensors",
        lambda a: a(init_device_mesh("cpu", (1,)))().ndim == 1,
    ),
    "pg_group_ranks": (
        "_ranks/groups.py",
        "all DTensors over ranks",
        lambda a: a(private(f"{C10D}._world"))[dist.group.WORLD] == {0: 0},
    ),
    "_use_python_reducer": (
        "_ranks/ddp.py",
        "NormAccumulator under DDP",
        lambda a: a(joined()) is False,
    ),
    "_join_config": (
        "_ranks/ddp.py",
        "NormAccumulator under DDP",
        lambda a: (a(joined()).enable, a(joined()).is_first_joinable) == (False, False),
    ),
    "_divide_by_initial_world_size": (
        "_ranks/ddp.py",
        "NormAccumulator under DDP with join",
        asks_inside_of_join,
    ),
    "_indices": (
        "_gradients/stored.py",
        "sparse gradients",
        lambda a: a(SPARSE)().tolist() == [[1, 1]],
    ),
    "_values": (
        "_gradients/stored.py",
        "sparse gradients",
        lambda a: a(SPARSE)().tolist() == [2, 3],
    ),
    "_parameters": (
        "_gradients/named.py",
        "GradClipper of a module",
        lambda a: list(a(torch.nn.Linear(1, 1))) == ["weight", "bias"],
    ),
    "_modules": (
        "_gradients/named.py",
        "GradClipper of a module",
        lambda a: list(a(torch.nn.Sequential(torch.nn.ReLU()))) == ["0"],
    ),
    "_check_scale_growth_tracker": (
        "optim.py",
        "clipped_step, unscale_and_clip_ with a scaler",
        lambda a: a(scaler())("unscale_")[0].item() == 4,
    ),
    "_per_optimizer_states": (
        "optim.py",
        "clipped_step, unscale_and_clip_ with a scaler",
        lambda a: a(scaler())[0]["stage"] is OptState.READY,
    ),
}
# Without it no optimizer divides gradients: clipped_step refuses all of them.
SAID_OTHERWISE = {"_step_supports_amp_scaling": "_optimizers/fused.py"}
# Headers of C++ that torch does not promise, and what of each is used; a build says what is gone.
HEADERS = {
    "torch/csrc/autograd/python_variable.h": "csrc/python/tensors.h",  # tensors in Python
    "torch/csrc/utils/pybind.h": "csrc/python/tensors.h",  # tensors as arguments
    "c10/core/impl/VirtualGuardImpl.h": "csrc/tensor_list.h",  # streams of any device
}
# What has no underscore, or no header of its own, and is not promised either: a text, and its file.
OTHERS = {
    "FuncTorchDynamicLayerFrontMode": "fastclip/_ops/schemas.py",  # ops inside torch.func
    "vars(torch.ops.fastclip)": "fastclip/_ops/process.py",  # where torch keeps ops
    "real_obj": "fastclip/_ranks/traced.py",  # the mesh behind its stand-in in a graph
    "DTensor(value": "fastclip/_ranks/mesh.py",  # the norm of DTensors as a DTensor
    "get_backend_config": "fastclip/_ranks/groups.py",  # where a group communicates
    "group.allreduce(": "fastclip/_ranks/groups.py",  # all collectives
    "found_inf_per_device": "fastclip/optim.py",  # what a scaler keeps for its update
    "momentum_buffer": "fastclip/_optimizers/fused.py",  # a first step of SGD that is skipped
    "cpu_children": "fastclip/_check.py",  # whether kernels are called
    "co_freevars": "fastclip/_redirect.py",  # patch: the closure of torch's decorator
    "aten::_amp_foreach_non_finite": "csrc/python/unscale.h",  # NormAccumulator with a scaler
    "_unsafe_get_target": "csrc/python/measured.h",  # NormAccumulator
    "getWeakStorageImpl": "csrc/python/measured.h",  # NormAccumulator
    "autograd_meta": "csrc/python/walk.h",  # the speed of the walk
    "is_python_dispatch": "csrc/python/grads.h",  # which tensors are plain
    "unsafe_storage": "csrc/tensor_list.h",  # what is fetched ahead
    "version_counter": "csrc/tensor_list.h",  # in-place ops bump versions
    "redispatch": "csrc/tensor_list.h",  # kernels leave what they cannot do to the default
    "GOMP_parallel": "csrc/cpu/threads.h",  # torch's own threads
}
# Python's own.
PYTHONS = {
    "_xoptions",
    "_getframe",
    "_exit",
    "_args_from_interpreter_flags",
    "get_ident",
    "_replace",
}
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


@pytest.mark.parametrize(
    ("function", "inventory"),
    [("private", PATHS), ("attribute", ATTRIBUTES)],
    ids=["path", "attribute"],
)
def test_the_inventory_is_complete_and_each_name_is_used_in_one_file(function, inventory):
    assert asked_for(function) == {name: {file} for name, (file, *_) in inventory.items()}


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
    named = SAID_OTHERWISE | {name: file for name, (file, *_) in ATTRIBUTES.items()}
    for file, node in nodes(ast.Constant):
        if node.value in named:
            assert file == named[node.value], node.value


def test_each_header_is_included_in_one_file():
    found: dict[str, str] = {}
    for path in sorted((ROOT / "csrc").glob("**/*")):
        if path.suffix in SUFFIXES:
            for header in re.findall(
                r"#include <((?:torch/csrc|c10/core/impl)/.*)>", path.read_text()
            ):
                assert header not in found, f"{header} is included in {path} and {found[header]}"
                found[header] = str(path.relative_to(ROOT))
    assert found == HEADERS


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_promised_as_little_is_used_in_one_file(text):
    paths = [p for room in ("fastclip", "csrc") for p in (ROOT / room).glob("**/*.[pch]*")]
    code = {p: re.sub(r"#.*|//.*", "", p.read_text()) for p in paths if p.suffix in SUFFIXES}
    assert [str(p.relative_to(ROOT)) for p in code if text in code[p]] == [OTHERS[text]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A process group of this rank alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("path", PATHS)
def test_a_name_is_what_it_was(world, path):
    assert PATHS[path][-1](path)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_what_it_was(world, name):
    assert ATTRIBUTES[name][-1](lambda owner: attribute(owner, name))


def test_what_has_no_name_is_what_it_was():
    """The closure of the decorator that `patch` redirects, and what a fused optimizer says."""
    code = torch.nn.utils.clip_grad_norm_.__wrapped__.__code__
    outer = torch.nn.utils.clip_grad_norm_.__code__
    assert code.co_name == "clip_grad_norm_"
    assert outer.co_freevars == ("func",)
    assert hasattr(dist.ProcessGroup, "allreduce")
    weight = torch.nn.Parameter(torch.ones(1))
    assert torch.optim.SGD([weight], fused=True)._step_supports_amp_scaling
    assert not hasattr(torch.optim.SGD([weight]), "_step_supports_amp_scaling")


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
    command = [sys.executable, "-c", WITHOUT_ANY]
    environment = os.environ | {"PYTHONPATH": str(Path(ROOT))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = result.stdout.splitlines()
    if _ops.extension is not None:
        assert lines[0].startswith("5.0 0.99999"), result.stderr
        assert "has no torch.utils._foreach_utils._device_has_foreach_support" in lines[1]
        assert f"has no {FUNCTORCH}" in lines[2]
        assert f"torch {torch.__version__}" in lines[2]
