"""torch's functions replaced for every caller, and given back, whatever else goes on."""

import functools
import importlib
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
import torch.nn.utils.clip_grad as torchs
from torch import Tensor
from torch.nn import utils
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip import patching
from fastclip._site import After


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    assert not patching.is_patched()


class Seen(TorchDispatchMode):
    """Whether an op of fastclip is called."""

    is_ours = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_ours |= str(func).startswith("fastclip")
        return func(*args, **(kwargs or {}))


def parameters() -> list[torch.nn.Parameter]:
    return conftest.parameters([torch.tensor([3.0, 4.0, 0.0])] * 2)


def is_ours(call: Callable[[], Any]) -> bool:
    with Seen() as seen:
        call()
    return seen.is_ours


CALLS = {
    "clip_grad_norm_": lambda f: f(
        parameters(), max_norm=1.0, norm_type=2.0, error_if_nonfinite=True, foreach=None
    ),
    "clip_grad_value_": lambda f: f(parameters(), 1.0, foreach=False),
    "get_total_norm": lambda f: f([p.grad for p in parameters()], 2.0),
    "clip_grads_with_norm_": lambda f: f(parameters(), max_norm=1.0, total_norm=torch.tensor(7.0)),
}
HELD = {name: getattr(utils, name) for name in CALLS}
WAYS = {
    "by name": lambda name: getattr(utils, name),
    "held": lambda name: HELD[name],
    "private": lambda name: getattr(torchs, f"_{name}", HELD[name]),
}
held_norm = HELD["clip_grad_norm_"]


def held() -> Tensor:
    return held_norm(parameters(), 1.0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("way", WAYS)
def test_every_caller_is_reached_until_it_is_undone(name, way):
    def call() -> Any:
        return CALLS[name](WAYS[way](name))

    assert not is_ours(call)
    with fastclip.patch():
        assert is_ours(call)
        # It can be pickled, and has its signature and its name.
        assert getattr(torchs, HELD[name].__name__) is HELD[name]
    assert not is_ours(call)


def test_calls_are_counted_and_undone_in_any_order():
    rng = random.Random(0)
    for _ in range(80):
        # What is in effect, of all that were made, and those that a `with` was entered with.
        live, made, entered = [], [], set()
        for _ in range(rng.randrange(25)):
            move = rng.choice(["patch", "enter", "leave", "unpatch"])
            one = rng.choice(made or [None])
            if move == "patch":
                made.append(fastclip.patch())
                live.append(made[-1])
            elif move == "enter" and one:
                # The first `with` takes over the call itself.
                live += [one] if one in entered or one not in live else []
                entered.add(one)
                one.__enter__()
            elif move == "leave" and one:
                # Once more than it was entered is no error.
                live.remove(one) if one in live else None
                one.__exit__(None, None, None)
            elif move == "unpatch":
                fastclip.unpatch()
                live = live[:-1]
            assert is_ours(held) == bool(live)
        for _ in live:
            fastclip.unpatch()
        assert not is_ours(held)


# Each of the functions is run in a child that is forked before fastclip is imported.
RELOADED = """
import importlib, multiprocessing, sys, torch
def modules():
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "fastclip"}
def forget():
    for name in modules():
        del sys.modules[name]
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "fastclip.rules":
            raise KeyboardInterrupt
def narrow():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    return w
def patched(yes=True):
    assert (torch.nn.utils.clip_grad_norm_([narrow()], 1.0).dtype is torch.float32) == yes
def works(package):
    rules = package.AutoClip(), package.ZClip(), 1.0
    assert all(package.clip_grad_norm_([narrow()], rule) == 5 for rule in rules)
    clipper = package.GradClipper([narrow()], 1.0)
    assert clipper.clip_() == 5 and clipper.stats()["clipped"] == 1
    assert torch.compile(package.clip_grad_norm_, backend="eager")([narrow()], 1.0) == 5
def reloads():
    fastclip.patch()
    for name, module in sorted(modules().items()):
        if "_C" not in name:
            importlib.reload(module)
    patched(); fastclip.unpatch(); works(fastclip)
def imports_anew():
    fastclip.patch(); forget()
    import fastclip as again
    patched(); again.patch(); again.unpatch(); patched(); fastclip.unpatch(); works(again)
def imports_after_an_interrupt():
    forget()
    sys.meta_path.insert(0, Stop())
    try:
        import fastclip
    except KeyboardInterrupt as error:
        # As an interactive Python keeps it, with all that it was doing.
        sys.last_value = error
    del sys.meta_path[0]
    import fastclip as again
    works(again)
def work(how):
    global fastclip
    import fastclip
    how()
    patched(False)
for how in reloads, imports_anew, imports_after_an_interrupt:
    child = multiprocessing.get_context("fork").Process(target=work, args=(how,))
    child.start()
    child.join()
    assert child.exitcode == 0, how
"""


@pytest.mark.slow
def test_it_works_reloaded_and_imported_anew():
    ran = conftest.python("-c", RELOADED)
    assert ran.returncode == 0, ran.stderr


def test_errors_and_warnings_are_those_of_the_caller():
    with pytest.raises(ValueError, match="max_norm: expected a threshold >= 0"), fastclip.patch():
        held_norm(parameters(), -1.0)
    assert not patching.is_patched()
    with fastclip.patch(), pytest.warns(UserWarning, match="empty generator") as caught:
        held_norm((p for p in ()), 1.0)
    assert [warning.filename for warning in caught] == [__file__]
    with fastclip.patch(), pytest.warns(FutureWarning, match="clip_grad_norm_"):
        assert is_ours(lambda: utils.clip_grad_norm(parameters(), 1.0))


def test_threads_patch_and_clip_at_once():
    def work(_: int) -> None:
        for _ in range(100):
            with fastclip.patch():
                assert abs(held().item() - 50**0.5) < 1e-5
            held()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            # An error of any is raised here.
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not is_ours(held)


def test_a_patched_call_is_one_op_of_the_graph_and_patching_is_seen():
    made = parameters()
    ours: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        ours.append(sum("fastclip" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    clip = torch.compile(lambda: held_norm(made, 1.0), backend=backend, fullgraph=True)
    for is_patched, compiled in ((0, [0]), (1, [0, 1]), (1, [0, 1]), (0, [0, 1]), (1, [0, 1])):
        for parameter in made:
            parameter.grad = torch.tensor([3.0, 4.0, 0.0])
        with fastclip.patch() if is_patched else torch.no_grad():
            assert abs(clip().item() - 50**0.5) < 1e-5
        assert ours == compiled


def test_a_function_that_no_such_decorator_made_is_replaced_by_name(monkeypatch):
    # It has a closure as those that torch has decorated.
    func = str
    theirs = lambda *_: func("theirs")  # noqa: E731
    holder = SimpleNamespace(own=theirs, ours=fastclip.clip_grad_norm_)
    monkeypatch.setattr(utils, "clip_grad_norm_", theirs)
    monkeypatch.setitem(sys.modules, "holder", holder)
    with fastclip.patch():
        for function in (utils.clip_grad_norm_, holder.own):
            assert is_ours(partial(function, parameters(), 1.0))
        assert is_ours(lambda: HELD["clip_grad_value_"](parameters(), 1.0))
        holder.later = utils.clip_grad_norm_
    assert utils.clip_grad_norm_ is holder.own is holder.later is theirs
    assert holder.ours is fastclip.clip_grad_norm_


def test_a_users_wrapper_around_torchs_function_goes_on(monkeypatch):
    calls: list[float] = []

    @functools.wraps(held_norm)
    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        return held_norm(*args, **kwargs)

    monkeypatch.setattr(utils, "clip_grad_norm_", noted)
    with fastclip.patch():
        assert utils.clip_grad_norm_ is noted
        assert is_ours(lambda: utils.clip_grad_norm_(parameters(), 1.0))
        assert is_ours(held)
    assert calls == [1.0]
    assert not is_ours(held)


AGC = """
def adaptive_clip_grad(parameters, clip_factor=0.01, eps=1e-3, norm_type=2.0):
    return norm_type
"""


@pytest.mark.parametrize("is_first", [True, False], ids=["imported before", "imported after"])
def test_timms_adaptive_clipping_is_ours(is_first, tmp_path, monkeypatch):
    package = tmp_path / "timm" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "timm/__init__.py").touch()
    (package / "__init__.py").write_text("from .agc import adaptive_clip_grad\n")
    (package / "agc.py").write_text(AGC)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("timm", "timm.utils", "timm.utils.agc"):
        # At the end of the test it is again what it is here.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    finders = list(sys.meta_path)
    if is_first:
        importlib.import_module("timm.utils")
    with fastclip.patch():
        from timm.utils import adaptive_clip_grad, agc

        one, other = parameters(), parameters()
        assert adaptive_clip_grad(one, 0.5) is None
        fastclip.clip_grad_agc_(other, 0.5)
        assert torch.equal(one[0].grad, other[0].grad)
        assert agc.adaptive_clip_grad(one, norm_type=1.0) == 1.0
    from timm.utils import adaptive_clip_grad

    assert adaptive_clip_grad(one) == agc.adaptive_clip_grad(one) == 2.0
    assert sys.meta_path == finders


def test_who_asks_whether_a_module_is_there_does_not_import_it():
    sys.modules.pop("colorsys", None)
    finder = After("colorsys", lambda module: setattr(module, "seen", True))
    finder.install()
    assert importlib.util.find_spec("colorsys") is not None
    assert finder in sys.meta_path
    assert importlib.import_module("colorsys").seen
    assert finder not in sys.meta_path


def test_libraries_of_other_versions_are_left_alone(monkeypatch):
    names = ("timm.utils.agc", "megatron.core.optimizer.clip_grads")
    others = [SimpleNamespace(own=1) for _ in names]
    for name, other in zip(names, others, strict=True):
        monkeypatch.setitem(sys.modules, name, other)
    with fastclip.patch():
        assert is_ours(held)
    assert others == [SimpleNamespace(own=1)] * 2
