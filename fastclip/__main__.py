"""`python -m fastclip info | demo`: what is installed, and what clipping does to a training run.

`demo` needs nothing but torch and the standard library, whose documentation is its text; tqdm and
matplotlib, if they are there, add a progress bar and a picture.
"""

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastclip

from . import _ops

INSTALL_EXTRA = 'pip install --no-build-isolation -e ".[demo]"'

# Without clipping this learning rate ends training within ten steps or so, whatever the seed; at
# half of it training survives. A higher threshold lets rounding part the two clipped runs.
LEARNING_RATE = 0.7
MOMENTUM = 0.9
MAX_NORM = 0.5
LAST = 20

Clip = Callable[..., Tensor] | None


class Run(NamedTuple):
    """One training run: loss (nats per character) and gradient norm at each step."""

    name: str
    losses: list[float]
    norms: list[float]
    clip_ms: float

    @property
    def final_loss(self) -> float:
        return sum(self.losses[-LAST:]) / len(self.losses[-LAST:])

    @property
    def diverged(self) -> int | None:
        """The first step, from 1, whose loss is not finite or twice the untrained network's."""
        steps = enumerate(self.losses, 1)
        return next((step for step, loss in steps if not loss <= 2 * self.losses[0]), None)


class CharacterModel(nn.Module):
    """Embedding, tanh recurrence, linear layer; the loss of (batch, length) text, in nats."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 64)
        self.recur = nn.RNN(64, 256, batch_first=True)
        self.head = nn.Linear(256, characters)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.recur(self.embed(text[:, :-1]))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), text[:, 1:].flatten())


def info() -> None:
    extension = _ops.extension
    built = (
        f"{extension.__file__} ({extension.built_for})" if extension else "not built for this torch"
    )
    plain = f"plain PyTorch; for compiled kernels, in the checkout: {_ops.REBUILD}"
    built_for = [
        f"{a // 100}.{a % 100 // 10}" for a in getattr(extension, "cuda_architectures", [])
    ]
    cuda = f"compiled for {', '.join(built_for)}, and for later ones" if built_for else plain
    print(
        f"fastclip   {fastclip.__version__}\n"
        f"Python     {platform.python_version()}\n"
        f"torch      {torch.__version__}\n"
        f"package    {Path(fastclip.__file__).parent}\n"
        f"extension  {built}\n"
        f"cpu        {'compiled' if _ops.has_kernels('cpu') else plain}\n"
        f"cuda       {cuda}"
    )


def demo(device: torch.device, steps: int, out: Path) -> None:
    tqdm = _optional("tqdm", "progress bar")
    matplotlib = _optional("matplotlib", "picture")
    text = _text()
    print(
        f"A recurrent network learns {len(text)} characters of Python's documentation on {device}. "
        f"Steps: {steps}, learning rate: {LEARNING_RATE}, max_norm: {MAX_NORM}."
    )
    clips = (
        ("unclipped", None),
        ("torch.nn.utils.clip_grad_norm_", nn.utils.clip_grad_norm_),
        ("fastclip.clip_grad_norm_", fastclip.clip_grad_norm_),
    )
    with tqdm.tqdm(total=3 * steps, unit="step") if tqdm else nullcontext() as bar:
        advance = bar.update if bar else int
        runs = [_train(name, clip, text.to(device), steps, advance) for name, clip in clips]
    _print_table(runs)
    print(_interpretation(*runs))
    if matplotlib:
        _draw(runs, out)
        print(f"Picture: {out.resolve()}")


def _optional(module: str, what: str) -> Any:
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


def _train(name: str, clip: Clip, text: Tensor, steps: int, advance: Callable[[], object]) -> Run:
    torch.manual_seed(0)
    model = CharacterModel(int(text.max()) + 1).to(text.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    batch, length = 32, 64
    starts = torch.randint(len(text) - length, (steps, batch, 1)).to(text.device)
    window = torch.arange(length + 1, device=text.device)
    losses, norms, seconds = [], [], 0.0
    for start in starts:
        loss = model(text[start + window])
        optimizer.zero_grad()
        loss.backward()
        if clip is None:
            norms.append(fastclip.get_total_norm(p.grad for p in parameters if p.grad is not None))
        else:
            began = _clock(text.device)
            norms.append(clip(parameters, MAX_NORM))
            seconds += _clock(text.device) - began
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
        norms = torch.tensor(run.norms)
        clipped, ms = f"{(norms > MAX_NORM).float().mean():.1%}", f"{run.clip_ms:.1f} ms"
        if run is runs[0]:
            clipped = ms = "-"
        print(f"{run.name:<31}{run.final_loss:>11.4f}{norms.max():>14.4g}{clipped:>9}{ms:>13}")
    print(
        f"final loss: mean of the last {LAST} steps or fewer, nats per character; largest norm: "
        "before clipping;\nclipped: share of the steps; clip calls: time in all of them\n"
    )


def _interpretation(unclipped: Run, torchs: Run, ours: Run) -> str:
    fate = f"Unclipped training did not diverge and ended at loss {unclipped.final_loss:.2f}"
    if unclipped.diverged:
        fate = fate.replace("did not diverge", f"diverged at step {unclipped.diverged}")
    low, high = sorted((torchs.final_loss, ours.final_loss))
    ends = f"the clipped runs ended at {torchs.final_loss:.2f} (torch) and {ours.final_loss:.2f}"
    if high <= 1.01 * low:
        ends = f"both clipped runs ended at the same loss, {ours.final_loss:.2f} (within 1 %)"
    times = torchs.clip_ms / ours.clip_ms
    speed = f"{times:.1f} times less" if times > 1 else f"{1 / times:.1f} times more"
    return f"{fate}; {ends}; fastclip's clip calls took {speed} time than torch's."


def _draw(runs: Sequence[Run], out: Path) -> None:
    # Figure alone, without pyplot, draws with Agg and leaves the process's backend as it is.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for run, color, width in zip(runs, ("tab:red", "skyblue", "navy"), (1.2, 5, 1.2), strict=True):
        style = {"color": color, "linewidth": width, "label": run.name}
        if len(run.losses) == 1:
            style["marker"] = "."
        above.plot(range(1, len(run.losses) + 1), run.losses, **style)
        below.plot(range(1, len(run.norms) + 1), run.norms, **style)
    below.axhline(MAX_NORM, color="black", linestyle="--", label=f"threshold, max_norm {MAX_NORM}")
    below.xaxis.get_major_locator().set_params(integer=True)
    above.set(yscale="log", xmargin=0.01, ylabel="loss (nats per character)")
    below.set(yscale="log", xmargin=0.01, xlabel="step", ylabel="gradient norm before clipping")
    figure.suptitle("The same network trained with and without clipping")
    if runs[0].diverged:
        figure.suptitle("Without clipping the gradients explode and training fails")
        label = f"unclipped diverges, step {runs[0].diverged}"
        for axes in (above, below):
            axes.axvline(runs[0].diverged, color="tab:red", linestyle=":", label=label)
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(out)


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
    path = Path(value)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"expected a path that ends in .png, got {value!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {value!r}: no such folder, or no right to")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip", description=fastclip.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    what = "print versions, paths, and which devices have compiled kernels"
    commands.add_parser("info", help=what, description=what)
    what = "train a recurrent network unclipped, with torch's clipping and with fastclip's"
    add = commands.add_parser("demo", help=what, description=what).add_argument
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=best, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--steps", type=_steps, default=400, help="of each of three runs (default: %(default)s)")
    add("--out", type=_out, default="fastclip-demo.png", help="picture path (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "info":
        info()
    else:
        demo(**options)


if __name__ == "__main__":
    main()
