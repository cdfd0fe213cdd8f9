"""The law of collectives: what a rank sends in a call depends on the arguments, on how the
parameters are laid out and on the process groups, and on nothing else that one rank may have alone.

One process stands for a rank of a world of any size: its groups write down what they are asked to
send, and send nothing. The same call is made as it is, and with something different; what was sent
has to be the same. Two other stand-ins for ranks are at the end: torch's fake groups, and threads.
"""

import contextlib
import functools
import itertools
import math
import random
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from test_mesh import here, spread
from test_mesh_disagreement import raises_oddly
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastclip
from fastclip import GradClipper, _ops

pytestmark = pytest.mark.slow

# What was sent: over which ranks, by which of the groups of these ranks, how, and how much.
Sent = tuple[tuple[int, ...], int, str, str, torch.dtype, int]
_sent: list[Sent] = []
_made: list[tuple[int, ...]] = []

# Worlds: the meshes of each, by their dimensions, and whether the groups' names rise or fall, as
# names of groups do that are hashes of what else a rank is in.
WORLDS: dict[str, tuple[dict[str, int], bool]] = {
    "line": ({"dp": 2}, True),
    "square": ({"dp": 2, "tp": 2}, True),
    "renamed square": ({"dp": 2, "tp": 2}, False),
    "cube": ({"pp": 2, "dp": 2, "tp": 2}, True),
    "large": ({"dp": 512, "tp": 8}, True),
}
ORDERS = [1.0, 2.0, 2.0, 3.0, 8.0, math.inf, 0.0, 0.5, -1.0, -math.inf]
POLICIES = ["propagate", "propagate", "zero", "keep", "error"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def join_recorded(rank: int, size: int, store: str, *, name: str) -> None:
    """Make this process the last rank but one of the world."""

    class Group(dist.ProcessGroup):
        def __init__(self, rank: int, ranks: tuple[int, ...]) -> None:
            super().__init__(rank, len(ranks))
            self.ranks, self.number = ranks, _made.count(ranks)
            _made.append(ranks)

        @property
        def group_name(self) -> str:
            return dist.distributed_c10d._world.pg_names[self]

        def getBackendName(self) -> str:  # noqa: N802
            return "recorded"

        def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
            (one,) = tensors
            how = str(options.reduceOp.op)
            _sent.append((self.ranks, self.number, "all-reduce", how, one.dtype, one.numel()))
            done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            done.set_result(tensors)
            return torch._C._distributed_c10d._create_work_from_future(done)

    def create(opts: Any, _: Any) -> dist.ProcessGroup:
        ranks = opts.global_ranks_in_group or range(opts.group_size)
        return Group(opts.group_rank, tuple(ranks))

    dimensions, is_rising = WORLDS[name]
    names = iter(range(10**6)) if is_rising else iter(range(2 * 10**6, 10**6, -1))
    dist.distributed_c10d._process_group_name = lambda ranks, use_hashed_name: f"{next(names):07}"
    dist.Backend.register_backend("recorded", create, extended_api=True, devices=["cpu"])
    size = math.prod(dimensions.values())
    store = dist.HashStore()
    dist.init_process_group("recorded", store=store, rank=max(0, size - 2), world_size=size)


@functools.cache
def meshes(name: str) -> list[Any]:
    """The meshes on which parameters lie: within a stage all of it, slices, and one made anew."""
    dimensions, _ = WORLDS[name]
    names = tuple(dimensions)
    root = init_device_mesh("cpu", tuple(dimensions.values()), mesh_dim_names=names)
    if "pp" in names:
        root = root[names[1:]]
        names = names[1:]
    found = [root]
    if len(names) > 1:
        found += [root[name] for name in names]
        # Experts on a mesh of their own, of the same ranks as a line of the other.
        lines = root["tp"].mesh.tolist()
        found.append(DeviceMesh("cpu", lines))
    return found


class Call:
    """A list of parameters and what is called with it, drawn from a seed; made anew each time."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng = rng = random.Random(f"{name.split()[-1]} {seed}")
        some = rng.sample(meshes(name), rng.randint(1, min(2, len(meshes(name)))))
        self.specs = [self.spec(some) for _ in range(rng.randint(1, 6))]
        self.p, self.policy = rng.choice(ORDERS), rng.choice(POLICIES)
        self.function = rng.choice(list(CALLS))
        asked = [dist.group.WORLD]
        if name == "cube":
            asked.append(meshes(name)[0]._get_root_mesh()["pp"])
        self.group = rng.choice([None] * 4 + asked)
        self.labels = [rng.randrange(2) for _ in self.specs]

    def spec(self, some: list[Any]) -> tuple[Any, list[Any], tuple[int, ...], torch.dtype]:
        rng = self.rng
        mesh = rng.choice([*some, *some, None])
        shape = tuple(rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randint(1, 3)))
        ways = [Replicate(), *map(Shard, range(len(shape)))]
        placements = [rng.choice(ways) for _ in range(mesh.ndim)] if mesh is not None else []
        return mesh, placements, shape, rng.choice(DTYPES)

    def parameters(self) -> list[nn.Parameter]:
        made = []
        for mesh, placements, shape, dtype in self.specs:
            tensor = torch.ones(shape, dtype=dtype)
            if mesh is not None:
                tensor = DTensor.from_local(tensor, mesh, placements, run_check=False)
            parameter = nn.Parameter(tensor)
            parameter.grad = torch.ones_like(parameter)
            made.append(parameter)
        return made

    def sent(self, parameters: list[nn.Parameter]) -> list[Sent]:
        _sent.clear()
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CALLS[self.function](self, parameters)
        return list(_sent)


def clip_twice(made: GradClipper) -> Tensor:
    with contextlib.suppress(Exception):
        made.clip_()
    return made.clip_()


def groups(call: Call, parameters: list[nn.Parameter]) -> Tensor:
    some = [[q for q, of in zip(parameters, call.labels, strict=True) if of == i] for i in (0, 1)]
    given = [{"params": qs, "max_norm": 1.0, "process_group": call.group} for qs in some]
    return clip_twice(GradClipper(groups=given, norm_type=call.p, nonfinite=call.policy))


def stepped(
    call: Call, parameters: list[nn.Parameter], in_step: bool, measured: bool = False
) -> Tensor:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.AdamW(parameters, fused=in_step)
    p = abs(call.p) or 2.0
    norms = fastclip.NormAccumulator(parameters, p) if measured else None
    how = dict(norm_type=p, process_group=None if measured else call.group, measured=norms)
    step = fastclip.clipped_step if in_step else fastclip.unscale_and_clip_
    return step(optimizer, 1.0, scaler, **how)


CALLS: dict[str, Callable[[Call, list[nn.Parameter]], object]] = {
    "clip": lambda call, qs: fastclip.clip_grad_norm_(
        qs, 1.0, call.p, nonfinite=call.policy, process_group=call.group
    ),
    "clip by 2": lambda call, qs: fastclip.clip_grad_norm_(qs, 1.0),
    "rule": lambda call, qs: fastclip.clip_grad_norm_(qs, lambda norm: norm / 2),
    "scaled": lambda call, qs: fastclip.clip_grad_norm_(qs, 1.0, grad_scale=0.5),
    "total": lambda call, qs: fastclip.get_total_norm(
        [q.detach() if q.grad is None else q.grad for q in qs], call.p, process_group=call.group
    ),
    "halves": lambda call, qs: fastclip.clip_grads_with_norm_(
        qs, 1.0, fastclip.get_total_norm([q.detach() for q in qs])
    ),
    "norms": lambda call, qs: fastclip.clip_grad_norms_(qs, 1.0, call.p),
    "agc": lambda call, qs: fastclip.clip_grad_agc_(qs),
    "normalize": lambda call, qs: fastclip.normalize_grad_(qs),
    "value": lambda call, qs: fastclip.clip_grad_value_(qs, 1.0),
    "nonfinite": lambda call, qs: fastclip.find_nonfinite(qs),
    "by parameter": lambda call, qs: GradClipper(qs, 1.0, call.p).norms_by_parameter(),
    "clipper": lambda call, qs: clip_twice(
        GradClipper(qs, 1.0, call.p, nonfinite=call.policy, process_group=call.group)
    ),
    "each": lambda call, qs: GradClipper(
        qs, 1.0, abs(call.p) or 2.0, nonfinite=call.policy, each=True
    ).clip_(),
    "groups": groups,
    "unscaled": lambda call, qs: stepped(call, qs, False),
    "stepped": lambda call, qs: stepped(call, qs, True),
    "measured": lambda call, qs: stepped(call, qs, call.policy == "keep", True),
    "accumulated": lambda call, qs: fastclip.NormAccumulator(qs).clip_(1.0),
}


# What may be different on a rank, of some of the parameters.


def replaced(parameter: nn.Parameter, local: Tensor) -> None:
    """Have another gradient of the same layout."""
    parameter.grad_dtype = None
    if isinstance(parameter, DTensor):
        local = DTensor(local, parameter._spec, requires_grad=False)
    parameter.grad = local


def lacks(parameter: nn.Parameter) -> None:
    parameter.grad = None


def laid_out_anew(parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor):
        how = parameter.device_mesh, parameter.placements
        parameter.grad = DTensor.from_local(here(parameter.grad), *how, run_check=False)


DIFFERENCES: dict[str, Callable[[nn.Parameter], object]] = {
    "nothing": lambda q: None,
    "lacks": lacks,
    "frozen": lambda q: lacks(q.requires_grad_(False)),
    "nan": lambda q: here(q.grad).fill_(math.nan),
    "inf": lambda q: here(q.grad).fill_(math.inf),
    "integer": lambda q: replaced(q, torch.ones(here(q).shape, dtype=torch.int32)),
    "expanded": lambda q: replaced(q, torch.ones((), dtype=q.dtype).expand(here(q).shape)),
    "half": lambda q: replaced(q, torch.ones(here(q).shape, dtype=torch.float16)),
    "laid out anew": laid_out_anew,
}


def law(name: str, seeds: range) -> tuple[int, int, list[Any]]:
    """How many calls were compared, how many of them sent anything, and which sent other things."""
    compared, sending, odd = 0, 0, []
    for seed in seeds:
        call = Call(name, seed)
        usual, found = call.sent(call.parameters()), {}
        sending += bool(usual)
        for (difference, change), kept in itertools.product(DIFFERENCES.items(), (False, True)):
            made, rng = call.parameters(), random.Random(seed)
            if kept:
                call.sent(made)
            for parameter in rng.sample(made, rng.randint(1, len(made))):
                change(parameter)
            found[f"{difference}, {'plan kept' * kept}"] = call.sent(made)
        # Where each tensor has a norm of its own, or its group, the order of the list counts.
        if call.function not in ("norms", "agc", "by parameter", "groups"):
            made = call.parameters()
            random.Random(seed).shuffle(made)
            found["another order"] = call.sent(made)
        # Also with an op that raises what nobody expects.
        for broken in ("norm", "norms", None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_ops, "extension", None)
                if broken:
                    patch.setattr(_ops, broken, raises_oddly)
                found[f"no extension, broken: {broken}"] = call.sent(call.parameters())
        compared += len(found)
        odd += [
            (seed, call.function, call.p, call.policy, difference, usual, sent)
            for difference, sent in found.items()
            if sent != usual
        ]
    return compared, sending, odd


def usual(name: str, seeds: range) -> list[list[Sent]]:
    """What is sent, among others over ranks that have two groups, and by which of them."""
    calls = [Call(name, seed) for seed in seeds]
    return [call.sent(call.parameters()) for call in calls]


@pytest.fixture(scope="module")
def recorded(world) -> Callable[[str], World]:
    join = functools.cache(lambda name: functools.partial(join_recorded, name=name))
    return lambda name: world(1, join(name))


@pytest.mark.parametrize("name", ["line", "square", "cube", "large"])
def test_what_is_sent_depends_on_arguments_layouts_and_groups_alone(recorded, name):
    ((compared, sending, odd),) = recorded(name).run(law, name, range(100), seconds=120)
    assert not odd, f"{len(odd)} of {compared}: {odd[0]}"
    assert compared > 2000
    assert sending >= 50


def test_of_two_groups_of_the_same_ranks_all_take_the_same(recorded):
    names = "square", "renamed square"
    (one,), (other,) = (recorded(name).run(usual, name, range(60)) for name in names)
    assert one == other
    assert any(number for calls in one for _, number, *_ in calls)


def join_fake(rank: int, size: int, store: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)


def clip_without_data() -> None:
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
    for p, group in ((2.0, None), (3.0, dist.group.WORLD), (math.inf, mesh)):
        call = SimpleNamespace(p=p, policy="keep", group=group, labels=[0, 1] * 2)
        # What returns numbers of Python has none.
        for name in CALLS.keys() - {"nonfinite", "by parameter"}:
            with FakeTensorMode():
                model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
                fully_shard(model, mesh=mesh)
                model(torch.randn(2, 8)).sum().backward()
                weights = list(model.parameters())
                norm = CALLS[name](call, weights)
            is_silent = name in ("halves", "agc", "normalize", "value")
            assert is_silent or isinstance(here(norm), FakeTensor), name
            assert all(isinstance(here(weight.grad), FakeTensor) for weight in weights), name


def test_gradients_without_data_on_ranks_that_are_not_there_are_clipped(world):
    world(1, join_fake).run(clip_without_data, seconds=120)


def join_threads(rank: int, size: int, store: str) -> None:
    from torch.testing._internal.distributed import multi_threaded_pg

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()


def clip_in_threads() -> list[list[float]]:
    store, found = dist.HashStore(), {}

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
        weight = spread((4,), init_device_mesh("cpu", (2,)), Shard(0))
        here(weight.grad).copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]])[rank])
        norms = [fastclip.clip_grad_norm_([weight], math.inf, p) for p in (1.0, 2.0, 3.0, math.inf)]
        found[rank] = [norm.full_tensor().item() for norm in norms]

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(2)]


def test_groups_written_in_python_add_up(world):
    (found,) = world(1, join_threads).run(clip_in_threads)
    assert found == [pytest.approx([9.0, 5.0, 81 ** (1 / 3), 4.0])] * 2
