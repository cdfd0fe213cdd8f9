"""`python -m fastclip info | check | demo | run`: what is installed, and what clipping does."""

import argparse
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import fastclip

from . import _ops, patching
from ._check import check
from ._demo import RULES, demo
from ._run import run


def info() -> None:
    extension = _ops.extension
    built = f"{extension.__file__} ({extension.built_for})" if extension else "not built"
    if extension is None and (off := _ops.turned_off()):
        built = f"not loaded: {off}"
    cpu = "compiled kernels"
    if off := _ops.turned_off():
        cpu = f"plain PyTorch: {off}"
    elif not _ops.has_kernels("cpu"):
        cpu = f"plain PyTorch; for compiled kernels, in the checkout: {_ops.REBUILD}"
    print(
        f"fastclip   {fastclip.__version__}\n"
        f"Python     {platform.python_version()}\n"
        f"torch      {torch.__version__}\n"
        f"package    {Path(fastclip.__file__).parent}\n"
        f"extension  {built}\n"
        f"cpu        {cpu}\n"
        f"{_of_cuda()}\n"
        f"patched    {'yes' if patching.is_patched() else 'no'}"
    )
    for name in ("FASTCLIP_CPU", "FASTCLIP_CUDA"):
        if name in os.environ:
            print(f"{name} is set: it says what the build compiles, and changes nothing here")


def _of_cuda() -> str:
    """What serves each CUDA device, and why."""
    if count := torch.cuda.device_count():
        each = [torch.device("cuda", i) for i in range(count)]
        refusals = [(device, _ops.refusal(device)) for device in each]
        lines = [
            f"{device!s:<11}" + ("compiled kernels" if why is None else f"plain PyTorch: {why}")
            for device, why in refusals
        ]
        return "\n".join(lines)
    architectures = getattr(_ops.extension, "cuda_architectures", [])
    names = ", ".join(f"{a // 100}.{a % 100 // 10}" for a in architectures)
    built = f"kernels are built for compute capability {names} and later"
    if not names:
        built = f"no kernels are built; with nvcc ({_ops.NVCC}), in the checkout: {_ops.REBUILD}"
    return f"cuda       torch sees no device; {built}"


def _steps(value: str) -> int:
    if not (value.isdecimal() and int(value) >= 1):
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {value!r}")
    return int(value)


def _device(value: str) -> torch.device:
    if value.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {value!r}")
    try:
        return torch.empty(1, device=value).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {value!r}: {reason}") from None


def _out(value: str) -> Path:
    if not value.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a path that ends in .png, got {value!r}")
    return _file(value)


def _file(value: str) -> Path:
    path = Path(value)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {value!r}: no such folder, or no right to")
    return path


def _picture(value: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib; to add it: pip install matplotlib")
    return _out(value)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is for `run`, and the command that it runs: after `--`, or from a name, `-`, `-m` or
    `-c` on."""
    end = 1 if arguments[:1] == ["run"] else len(arguments)
    while end < len(arguments) and re.match("-(?!m|c|-?$)", arguments[end]):
        end += 2 if arguments[end] == "--plot" else 1
    return arguments[:end], arguments[end + (arguments[end : end + 1] == ["--"]) :]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=fastclip.__doc__)
    version = f"fastclip {fastclip.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="name", metavar="command", required=True)
    what = "print versions, paths, and which devices have compiled kernels"
    commands.add_parser("info", help=what, description=what)
    what = "train a recurrent network unclipped, with torch's clipping and with fastclip's"
    add = commands.add_parser("demo", help=what, description=what).add_argument
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=best, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--steps", type=_steps, default=400, help="steps per run (default: %(default)s)")
    what = "add a run by this rule, which finds the threshold itself"
    add("--rule", choices=RULES, help=what)
    add("--out", type=_out, default="fastclip-demo.png", help="picture path (default: %(default)s)")
    what = "see whether what is installed is right and how fast it is; under torchrun on all ranks"
    add = commands.add_parser("check", help=what, description=what).add_argument
    add("--device", type=_device, default=best, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", type=_file, dest="json_path", metavar="FILE", help="write all that was found")
    what = "run a script with torch's clipping functions replaced by fastclip's"
    usage = "%(prog)s [--stats] [--plot FILE] script | -m module | -c code [arguments ...]"
    running = commands.add_parser("run", help=what, description=what, usage=usage)
    add = running.add_argument
    add("--stats", action="store_true", help="at the end, say what was called and clipped")
    add("--plot", type=_picture, metavar="FILE", help="draw the norms and what was clipped")
    given, command = _split(sys.argv[1:] if arguments is None else list(arguments))
    options = vars(parser.parse_args(given))
    name = options.pop("name")
    if name == "run" and not command:
        running.error("expected a script, -m and a module, or -c and code")
    called: dict[str, Callable[..., None]]
    called = {"info": info, "check": check, "demo": demo, "run": partial(run, command)}
    called[name](**options)


if __name__ == "__main__":
    main()
