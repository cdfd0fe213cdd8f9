"""`python -m fastclip info | check | demo | run`: the command line."""

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
from ._check import check, why_plain
from ._demo import demo
from ._run import run


def info() -> None:
    """Print the versions, and for each device whether kernels or plain PyTorch run, and why."""
    extension = _ops.extension
    facts = {
        "fastclip": fastclip.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "package": str(Path(fastclip.__file__).parent),
        "extension": f"{extension.__file__} ({extension.built_for})" if extension else "not loaded",
    }
    count = torch.cuda.device_count()
    for device in ("cpu", *(f"cuda:{i}" for i in range(count))):
        why = why_plain(torch.device(device))
        facts[device] = "compiled kernels" if why is None else f"plain PyTorch: {why}"
    if not count:
        facts["cuda"] = f"torch sees no device; {_built_for_cuda()}"
    facts["patched"] = "yes" if patching.is_patched() else "no"
    for name, fact in facts.items():
        print(f"{name:<10} {fact}")


def _built_for_cuda() -> str:
    architectures = getattr(_ops.extension, "cuda_architectures", [])
    names = ", ".join(f"{a // 100}.{a % 100 // 10}" for a in architectures)
    if names:
        return f"kernels are built for compute capability {names} and later"
    return f"no kernels are built; with nvcc ({_ops.NVCC}), in the checkout: {_ops.REBUILD}"


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


def _file(value: str) -> Path:
    path = Path(value)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"cannot write {value!r}: it is a folder or not writable, or its folder is missing"
        )
    return path


def _picture(value: str) -> Path:
    if not value.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a path that ends in .png, got {value!r}")
    return _file(value)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into those of fastclip and the command that `run` starts.

    The command begins after `--`, or at the first argument that is a path, `-`, `-m` or `-c`.
    """
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
    add(
        "--out",
        type=_picture,
        default="fastclip-demo.png",
        help="picture path (default: %(default)s)",
    )
    what = "compare every op with float64, and time a clip; under torchrun compare the ranks"
    add = commands.add_parser("check", help=what, description=what).add_argument
    add("--device", type=_device, default=best, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", type=_file, dest="json_path", metavar="FILE", help="write all results")
    what = "run a script with torch's clipping functions replaced by fastclip's"
    usage = "%(prog)s [--stats] [--plot FILE] script | -m module | -c code [arguments ...]"
    running = commands.add_parser("run", help=what, description=what, usage=usage)
    add = running.add_argument
    add("--stats", action="store_true", help="at the end, print the numbers of calls and clips")
    add("--plot", type=_picture, metavar="FILE", help="draw the norms")
    given, command = _split(sys.argv[1:] if arguments is None else list(arguments))
    options = vars(parser.parse_args(given))
    name = options.pop("name")
    if name == "run" and not command:
        running.error("expected a script, -m and a module, or -c and code")
    if options.get("plot") and importlib.util.find_spec("matplotlib") is None:
        running.error("argument --plot: needs matplotlib; to add it: pip install matplotlib")
    called: dict[str, Callable[..., None]]
    called = {"info": info, "check": check, "demo": demo, "run": partial(run, command)}
    called[name](**options)


if __name__ == "__main__":
    main()
