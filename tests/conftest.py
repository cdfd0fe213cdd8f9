"""Fixtures, the float64 oracle, and the tolerances, derived once from eps and the sizes."""

import functools
import itertools
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from ranks import World, join_gloo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip import _ops
from fastclip._ops import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = [1.0, 2.0, math.inf, 3.0, 0.5, 20.0]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "emulated: runs the CUDA kernels on the CPU")
    config.addinivalue_line("markers", "slow: left out unless `-m ''` is given, as CI does")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in as many processes as there are cores, four at most, file by file.

    One file alone runs in this process. Not in pyproject.toml, which holds for benchmarks too.
    """
    option, is_whole = config.option, config.args_source is config.ArgsSource.TESTPATHS
    can_start = config.pluginmanager.hasplugin("xdist") and not option.usepdb
    # A worker of pytest-xdist comes here too, and must start no workers of its own.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    cores = min(4, len(os.sched_getaffinity(0)))
    if is_whole and can_start and not is_worker and option.numprocesses is None and cores > 1:
        # The ranks of a file start once if one process runs all of it. pytest-xdist would reorder
        # the files so that those with few tests come last, and these tests are the long ones.
        option.numprocesses, option.dist, option.loadscopereorder = cores, "loadfile", False


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow" and not hasattr(config, "workerinput"):
        line = "Slow tests were left out; `pytest -m ''` runs all, in some 10 minutes on two cores."
        config.get_terminal_writer().line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out repeated tests, and of each product of parameters all but a covering array."""
    functions: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.slow)
        place = "cuda" if item.get_closest_marker("cuda") else "emulated" in item.keywords
        spec = getattr(item, "callspec", None)
        ops = spec.params.get("ops") if spec else None
        # The default ops are no other on an emulated device than on the CPU.
        if not (ops is reference and place is True):
            key = item.parent, item.originalname, place, id(ops)
            functions.setdefault(key, []).append(item)
    kept = {item for cases in functions.values() for item in covering(cases)}
    items[:] = [item for item in items if item in kept]


def covering(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Choose cases of one test in which every pair of values of two parameters appears."""
    pairs = {}
    for case in cases:
        values = case.callspec.params if hasattr(case, "callspec") else {}
        named = [(name, id(value)) for name, value in sorted(values.items())]
        pairs[case] = {*itertools.combinations(named, 2)}
    missing = set().union(*pairs.values())
    if not missing:
        return cases
    chosen = []
    while missing:
        case = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[case]
        chosen.append(case)
    return chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Autograd counts devices at its first backward: an emulated one has to be there by then."""
    if any(item.get_closest_marker("emulated") for item in session.items) and not emulation.MISSING:
        emulated(emulation_folder(session.config))


@functools.cache
def emulation_folder(config: pytest.Config) -> Path:
    """Where it is built; without a cache of pytest's that can be written, anew for each process."""
    try:
        folder = config.cache.mkdir("emulation")
        (folder / "lock").touch()
    except (AttributeError, OSError):
        return Path(tempfile.mkdtemp("emulation"))
    return folder


@functools.cache
def emulated(cache: Path) -> Any:
    return emulation.load(emulation.build(cache))


# Few blocks, so that each has several spans. Small parameters make several launches of a list of
# more than 250 tensors.
MACHINES = {
    "emulated-fused": {"multiprocessors": 1, "threads_per_multiprocessor": 1536, "driver": 13000},
    "emulated-apart": {"multiprocessors": 5, "threads_per_multiprocessor": 1024, "driver": 12000},
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
EMULATED = [
    pytest.param(
        name,
        marks=[
            pytest.mark.emulated,
            pytest.mark.skipif(bool(emulation.MISSING), reason=str(emulation.MISSING)),
        ],
    )
    for name in MACHINES
]
# For tests of what the emulated device does not have (sparse and complex tensors, speed).
without_emulation = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.fixture(params=DEVICES + EMULATED)
def device(request: pytest.FixtureRequest) -> str:
    if request.param not in MACHINES:
        return request.param
    machine = emulated(emulation_folder(request.config)).machine
    for key, value in MACHINES[request.param].items():
        setattr(machine, key, value)
    machine.cooperative = request.param == "emulated-fused"
    machine.seed = zlib.crc32(request.node.nodeid.encode())
    return "emulated"


@pytest.fixture(params=DTYPES, ids=name_of)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[_ops, reference], ids=["op", "default"])
def ops(request: pytest.FixtureRequest):
    """The dispatched ops (kernels where they are built) and the plain-PyTorch defaults."""
    return request.param


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def oracle(tensors: list[Tensor], p: float) -> float:
    """The p-norm of all elements as one vector, in float64, relative to the largest, blockwise."""
    blocks = [
        b.double().abs() for t in tensors for b in t.detach().cpu().reshape(-1).split(1 << 22)
    ]
    most = max((float(b.max()) for b in blocks if b.numel()), default=0.0)
    if any(bool(b.isnan().any()) for b in blocks):
        return math.nan
    if most == 0 or math.isinf(most) or math.isinf(p):
        return most
    return most * math.fsum(float(((b / most) ** p).sum()) for b in blocks) ** (1 / p)


def ulps(value: Tensor, expected: float) -> float:
    """Distance in units of the last float32 place, whatever the dtype of `value`."""
    rounded = torch.tensor(expected, dtype=torch.float32)
    step = torch.nextafter(rounded, torch.tensor(math.inf)) - rounded
    return abs(float(value) - expected) / float(step)


def precision(ops: Any, kernels: float) -> float:
    """How near to float64 norms of float32 are: by the kernels, and by the plain-PyTorch defaults,
    which sum `measure.ROW` elements in float32."""
    return 1e-6 if ops is reference or not _ops.has_kernels("cpu") else kernels


class Reads(TorchDispatchMode):
    """How many gradients are measured in here, not counting the norms that take their place."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        known = name.startswith("fastclip.clip_norm_") and len(args) > 3 and args[3] is not None
        if name.startswith(("fastclip.norm", "fastclip.clip_norm_")) and not known:
            self.count += sum(t.numel() > 1 for t in args[0])
        return func(*args, **(kwargs or {}))


def parameters(grads: list[Tensor | None]) -> list[torch.nn.Parameter]:
    """Parameters that carry these gradients (copies of them)."""
    made = []
    for grad in grads:
        like = torch.zeros(1) if grad is None else grad
        parameter = torch.nn.Parameter(torch.zeros_like(like))
        parameter.grad = None if grad is None else grad.clone()
        made.append(parameter)
    return made


def awkward(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Sizes round every border of the kernels: lanes, buffers, tiles; 0-d and empty; any order."""
    sizes = [(), (0,), (1,), (31,), (32,), (33,), (127, 3), (2048,), (2049,), (16383,), (16385, 2)]
    return [(torch.randn(size) * (1 + i)).to(dtype).to(device) for i, size in enumerate(sizes)]


def python(*command: str, cwd: Path | None = None, input: str | None = None, **variables: str):
    """Run a Python that finds this fastclip, with these variables; return what it has said."""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment | variables,
            input=input,
            capture_output=True,
            text=True,
            timeout=300,
        )
        # Torch's gloo threads may abort a process that ends (pytorch/pytorch#190489).
        if "terminate called without an active exception" not in result.stderr:
            break
    return result


@pytest.fixture(params=["walk", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients read by the extension, and without it."""
    if request.param == "python":
        monkeypatch.setattr(_ops, "extension", None)
    elif _ops.extension is None:
        pytest.skip("the extension is not built")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    """Processes by their number: those of a file start when first needed, and end with it."""
    folder = tmp_path_factory.mktemp("ranks")
    made: list[World] = []

    @functools.cache
    def world_of(size: int, join: Callable[..., None] = join_gloo) -> World:
        made.append(World(size, folder, join))
        return made[-1]

    yield world_of
    for one in made:
        one.stop()


# Every function and class that clips by the norm of all, here to `n` and from above it.
CLIPS: dict[str, Callable[[list[torch.nn.Parameter], float], Any]] = {
    "number": lambda items, n: fastclip.clip_grad_norm_(items, n),
    "tensor": lambda items, n: fastclip.clip_grad_norm_(items, items[0].new_tensor(n)),
    "rule": lambda items, n: fastclip.clip_grad_norm_(items, lambda norm: norm / norm * n),
    "keep": lambda items, n: fastclip.clip_grad_norm_(items, n, nonfinite="keep"),
    "zero": lambda items, n: fastclip.clip_grad_norm_(items, n, nonfinite="zero"),
    "error": lambda items, n: fastclip.clip_grad_norm_(items, n, error_if_nonfinite=True),
    "factor": lambda items, n: fastclip.clip_grad_norm_(items, n, grad_scale=0.9),
    "clipper": lambda items, n: fastclip.GradClipper(items, n).clip_(),
    "clipper, keep": lambda items, n: fastclip.GradClipper(items, n, nonfinite="keep").clip_(),
    "group": lambda items, n: fastclip.GradClipper(
        groups=[{"params": items, "max_norm": n}]
    ).clip_()[0],
    "accumulator": lambda items, n: fastclip.NormAccumulator(items).clip_(n),
    "accumulator, rule": lambda items, n: fastclip.NormAccumulator(items).clip_(
        lambda norm: norm / norm * n
    ),
    "normalize": lambda items, n: fastclip.normalize_grad_(items, n),
    "unscale": lambda items, n: fastclip.unscale_and_clip_(
        torch.optim.SGD(items, lr=1.0), n, torch.amp.GradScaler("cpu", enabled=False)
    ),
}
