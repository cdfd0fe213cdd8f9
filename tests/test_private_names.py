"""The inventory of torch's private names, and what breaks without each."""

import ast
import re
from pathlib import Path

import torch
from conftest import python

from fastclip import _ops

FUNCTORCH = "torch._C._are_functorch_transforms_active"
FOREACH = "torch.utils._foreach_utils._device_has_foreach_support"
# The paths and attributes that are asked for, and what breaks without them, for which there is no
# public way. The tests of these features say what each is; without it, they say its name.
PATHS = {
    FUNCTORCH,  # torch.vmap and torch.func
    "torch._subclasses.FakeTensor",  # fake tensors, torch.compile, opaque subclasses
    "torch._subclasses.functional_tensor.FunctionalTensor",  # torch.compile
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",  # torch.compile
    "torch.utils._python_dispatch._disable_current_modes",  # all DTensors, process_group
    "torch._foreach_norm",  # plain ops
    "torch._foreach_mul_",  # plain ops
    "torch._foreach_zero_",  # plain ops, nonfinite="zero"
    "torch._foreach_clamp_min_",  # plain ops, clip by value
    "torch._foreach_clamp_max_",  # plain ops, clip by value
    "torch._amp_foreach_non_finite_check_and_unscale_",  # plain ops on half gradients of a device
    "torch._neg_view",  # gradients that are lazily negated
    FOREACH,  # foreach=
    "torch.distributed.tensor._dtensor_spec.DTensorSpec",  # the norm of DTensors as a DTensor
    "torch.distributed.tensor._dtensor_spec.TensorMeta",  # the norm of DTensors as a DTensor
    "torch.distributed.distributed_c10d._world",  # all DTensors over ranks
    "torch.distributed.distributed_c10d._get_default_store",  # why another rank failed
    "torch.distributed._functional_collectives.all_reduce",  # DTensors compiled
    "torch.autograd.Variable._execution_engine.queue_callback",  # NormAccumulator under DDP
    "torch._C._current_graph_task_id",  # NormAccumulator under DDP
}
ATTRIBUTES = {
    "DTensors": "_spec _local_tensor _get_root_mesh",
    "NormAccumulator under DDP": "_use_python_reducer _join_config _divide_by_initial_world_size",
    "sparse gradients": "_indices _values",
    "GradClipper of a module": "_parameters _modules",
    "steps with a scaler": "_check_scale_growth_tracker _per_optimizer_states",
    "clipped_step, which then refuses all optimizers": "_step_supports_amp_scaling",
    "the norm in the log of transformers": "_get_grad_norm",
    "whether kernels are called": "_to_copy _local_scalar_dense",
}
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
    "pg_group_ranks",  # all DTensors over ranks
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
# Python's own, and the name under which ours are kept on a module of torch.
PYTHONS = {"_xoptions", "_getframe", "_exit", "_replace", "_thread", "_initializing", "_kept"}
PYTHONS |= {"_args_from_interpreter_flags"}
ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
SOURCES = sorted((ROOT / "fastclip").glob("**/*.py"))
TREES = {str(p.relative_to(ROOT / "fastclip")): ast.parse(p.read_text()) for p in SOURCES}


def nodes(kind):
    return [
        (file, n) for file, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, kind)
    ]


def own_names() -> set[str]:
    names = {n.name for _, n in nodes(ast.FunctionDef | ast.ClassDef)}
    names |= {n.attr for _, n in nodes(ast.Attribute) if isinstance(n.ctx, ast.Store)}
    return names | {n.id for _, n in nodes(ast.Name) if isinstance(n.ctx, ast.Store)}


def test_each_name_is_listed_and_is_asked_for_in_one_file():
    files: dict[str, set[str]] = {}
    for file, node in nodes(ast.Constant):
        if re.fullmatch(r"torch[\w.]*\._[\w.]+|_[a-z]\w+", str(node.value)):
            files.setdefault(node.value, set()).add(file)
    listed = PATHS | {*" ".join(ATTRIBUTES.values()).split()}
    assert not files.keys() - listed - own_names() - PYTHONS
    assert {name: len(files.get(name, ())) for name in listed} == dict.fromkeys(listed, 1)


def test_no_private_name_is_used_in_another_way():
    known = own_names() | PYTHONS
    used = [(file, n.attr) for file, n in nodes(ast.Attribute)]
    for file, node in nodes(ast.ImportFrom):
        if not node.level and not node.module.startswith("fastclip"):
            used += [(file, name) for a in node.names for name in (*node.module.split("."), a.name)]
    assert not [(f, name) for f, name in used if re.match("_[^_]", name) and name not in known]


def test_what_is_promised_as_little_is_used_in_one_file():
    paths = [p for room in ("fastclip", "csrc") for p in (ROOT / room).glob("**/*.[pch]*")]
    texts = [p.read_text() for p in paths if p.suffix in SUFFIXES]
    headers = re.findall(r"#include <((?:torch/csrc|c10/core/impl)/.*)>", "\n".join(texts))
    assert sorted(headers) == sorted(HEADERS)
    code = [re.sub(r"#.*|//.*", "", text) for text in texts]
    assert {name: sum(name in text for text in code) for name in OTHERS} == dict.fromkeys(OTHERS, 1)


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
        assert f"has no {FOREACH}" in lines[1]
        assert f"has no {FUNCTORCH}" in lines[2]
        assert f"torch {torch.__version__}" in lines[2]
