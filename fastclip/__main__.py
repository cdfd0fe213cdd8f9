"""`python -m fastclip info | demo`: what is installed, and what clipping does to a training run.

`demo` needs nothing but torch and the standard library, whose documentation is its text; tqdm and
matplotlib, if they are there, add a progress bar and a picture.
"""

import argparse
import importlib
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastclip

from . import _ops

INSTALL_EXTRA = 'pip install --no-build-isolation -e ".[demo]"'

# At this learning rate the gradients of a tanh network explode within ten steps or so, whatever
# the seed; at half of it training survives unclipped.
LEARNING_RATE = 0.5
MOMENTUM = 0.9
MAX_NORM = 1.0
SEED = 0
BATCH = 32
LENGTH = 64
HIDDEN = 256
LAST = 20


class Run(NamedTuple):
    """One training run: its loss (nats per character) and gradient norm at each step."""

    name: str
    losses: list[float]
    norms: list[float]
    clip_ms: float

    @property
    def final_loss(self) -> float:
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    @property
    def largest_norm(self) -> float:
        return math.nan if any(map(math.isnan, self.norms)) else max(self.norms)

    @property
    def clipped(self) -> float:
        return sum(norm > MAX_NORM for norm in self.norms) / len(self.norms)

    def diverged(self, guess: float) -> int | None:
        """The first step with a loss not finite or twice that of guessing; steps count from 1."""
        bad = (step for step, loss in enumerate(self.losses, 1) if not loss <= 2 * guess)
        return next(bad, None)


class CharacterModel(nn.Module):
    """Embedding, tanh recurrence, linear layer."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 64)
        self.recur = nn.RNN(64, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss, in nats, of each character given those before it; (batch, length)."""
        states, _ = self.recur(self.embed(text[:, :-1]))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), text[:, 1:].flatten())


def info() -> None:
    extension = _ops.extension
    rows = {
        "fastclip": fastclip.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "package": Path(fastclip.__file__).parent,
        "extension": "not built for this torch",
        "cpu": "compiled kernels",
        "cuda": "compiled kernels for " + ", ".join(getattr(extension, "cuda_architectures", [])),
    }
    if extension is not None:
        rows["extension"] = f"{extension.__file__} ({extension.built_for})"
    if not _ops.has_kernels("cpu"):
        rows["cpu"] = f"plain PyTorch; for compiled kernels, in the checkout: {_ops.REBUILD}"
    if not _ops.has_kernels("cuda"):
        rows["cuda"] = (
            "plain PyTorch; this version has no CUDA kernels, CUDA gradients go through the "
            "plain-PyTorch ops"
        )
    for name, value in rows.items():
        print(f"{name:<11}{value}")


def demo(device: torch.device, steps: int, out: Path) -> None:
    tqdm = _optional("tqdm", "progress bar")
    matplotlib = _optional("matplotlib", "picture")
    text = _text()
    print(
        f"A recurrent network reads {len(text)} characters of Python's documentation on {device}, "
        f"{steps} steps at learning rate {LEARNING_RATE}, max_norm {MAX_NORM}."
    )
    bar = tqdm.tqdm(total=3 * steps, unit="step") if tqdm else None
    runs = []
    for name, clip in (
        ("unclipped", None),
        ("torch.nn.utils.clip_grad_norm_", nn.utils.clip_grad_norm_),
        ("fastclip.clip_grad_norm_", fastclip.clip_grad_norm_),
    ):
        if bar:
            bar.set_description_str(name.split(".")[0])
        runs.append(_train(name, clip, text, device, steps, bar.update if bar else int))
    if bar:
        bar.close()
    guess = math.log(_characters(text))
    _print_table(runs)
    print(_interpretation(runs, guess))
    if matplotlib:
        _draw(runs, guess, out)
        print(f"Picture: {out.resolve()}")


def _optional(module: str, what: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"No {what}: {module} is not installed. To add it, in the checkout: {INSTALL_EXTRA}")
        return None


def _text() -> Tensor:
    from pydoc_data.topics import topics

    text = "".join(topics.values())
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text])


def _characters(text: Tensor) -> int:
    return int(text.max()) + 1


def _train(
    name: str,
    clip: Callable[..., Tensor] | None,
    text: Tensor,
    device: torch.device,
    steps: int,
    advance: Callable[[], object],
) -> Run:
    torch.manual_seed(SEED)
    model = CharacterModel(_characters(text)).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    starts = torch.randint(len(text) - LENGTH, (steps, BATCH, 1))
    losses, norms, seconds = [], [], 0.0
    for start in starts:
        loss = model(text[start + torch.arange(LENGTH + 1)].to(device))
        optimizer.zero_grad()
        loss.backward()
        if clip is None:
            norms.append(fastclip.get_total_norm([p.grad for p in parameters]))
        else:
            began = _clock(device)
            norms.append(clip(parameters, MAX_NORM))
            seconds += _clock(device) - began
        optimizer.step()
        losses.append(loss.detach())
        advance()
    return Run(name, torch.stack(losses).tolist(), torch.stack(norms).tolist(), 1e3 * seconds)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _print_table(runs: Sequence[Run]) -> None:
    print(f"\n{'run':<31}{'final loss':>11}{'largest norm':>14}{'clipped':>9}{'clip calls':>13}")
    for run in runs:
        clipped, ms = f"{run.clipped:.1%}", f"{run.clip_ms:.1f} ms"
        if run is runs[0]:
            clipped = ms = "-"
        print(f"{run.name:<31}{run.final_loss:>11.4f}{run.largest_norm:>14.4g}{clipped:>9}{ms:>13}")
    print(
        f"final loss: mean of the last {min(LAST, len(runs[0].losses))} steps, nats per character; "
        "largest norm: before clipping;\nclipped: share of the steps; clip calls: time in all of "
        "them\n"
    )


def _interpretation(runs: Sequence[Run], guess: float) -> str:
    unclipped, torchs, ours = runs
    step = unclipped.diverged(guess)
    fate = (
        "Unclipped training did not diverge in so few steps"
        if step is None
        else f"Unclipped training diverged at step {step} and ended at {unclipped.final_loss:.2f}"
    )
    low, high = sorted((torchs.final_loss, ours.final_loss))
    ends = (
        f"both clipped runs ended at the same loss, {ours.final_loss:.2f} (within 1 %)"
        if high <= 1.01 * low
        else f"the clipped runs ended at {torchs.final_loss:.2f} (torch) and {ours.final_loss:.2f}"
    )
    times = torchs.clip_ms / ours.clip_ms
    speed = f"{times:.1f} times less" if times > 1 else f"{1 / times:.1f} times more"
    return f"{fate}; {ends}; fastclip's clip calls took {speed} time than torch's."


def _draw(runs: Sequence[Run], guess: float, out: Path) -> None:
    # Figure alone, without pyplot, draws with Agg and leaves the process's backend as it is.
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, sharex=True)
    styles = (("tab:red", 1.0), ("skyblue", 5.0), ("navy", 1.2))
    for run, (color, width) in zip(runs, styles, strict=True):
        x = range(1, len(run.losses) + 1)
        marker = "." if len(x) == 1 else None
        for axes, values in ((loss_axes, run.losses), (norm_axes, run.norms)):
            finite = [v if math.isfinite(v) else math.nan for v in values]
            axes.plot(x, finite, color=color, linewidth=width, marker=marker, label=run.name)
    norm_axes.axhline(MAX_NORM, color="black", linestyle="--", label=f"max_norm = {MAX_NORM:g}")
    for axes in (loss_axes, norm_axes):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    loss_axes.set_ylabel("loss (nats per character)")
    norm_axes.set(xlabel="step", ylabel="gradient norm before clipping")
    step = runs[0].diverged(guess)
    if step:
        for axes in (loss_axes, norm_axes):
            axes.axvline(step, color="tab:red", linestyle=":")
    figure.suptitle("Without clipping the gradients explode and training fails")
    figure.legend(*norm_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(out)


def _steps(value: str) -> int:
    if not (value.isdecimal() and int(value) >= 1):
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {value!r}")
    return int(value)


def _device(value: str) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {value!r}: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {value!r}")
    return device


def _out(value: str) -> Path:
    path = Path(value)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"expected a path that ends in .png, got {value!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {value!r}: no such folder, or no right to")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=fastclip.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    what = "print versions, paths, and which devices have compiled kernels"
    commands.add_parser("info", help=what, description=what)
    what = "train a recurrent network unclipped, with torch's clipping and with fastclip's"
    add = commands.add_parser("demo", help=what, description=what).add_argument
    add(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda, or cuda:1 (default: %(default)s)",
    )
    add("--steps", type=_steps, default=400, help="steps of each run (default: %(default)s)")
    add(
        "--out",
        type=_out,
        default="fastclip-demo.png",
        help="where to save the picture (default: %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "info":
        info()
    else:
        demo(**options)


if __name__ == "__main__":
    main()
