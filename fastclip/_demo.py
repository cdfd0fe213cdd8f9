"""Train a network unclipped, clipped by torch and clipped by fastclip; print a table, draw a plot.

The network learns the text of Python's documentation in the standard library. Only the plot needs
more than torch: matplotlib.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastclip

INSTALL_EXTRA = 'pip install --no-build-isolation -e ".[demo]"'

# At this learning rate, unclipped training diverges within about ten steps, whatever the seed; at
# half the rate it does not. This threshold clips some 8 % of the steps. With a larger threshold,
# rounding makes the two clipped runs differ.
LEARNING_RATE = 0.7
MOMENTUM = 0.9
MAX_NORM = 0.75
# The final loss is the mean over this many last steps.
LAST = 20


class Run(NamedTuple):
    """One training run: loss (nats per character) and gradient norm at each step."""

    name: str
    clipped: float  # the share of steps that were clipped
    losses: list[float]
    norms: list[float]
    clip_ms: float

    @property
    def final_loss(self) -> float:
        return sum(self.losses[-LAST:]) / len(self.losses[-LAST:])

    @property
    def diverged(self) -> int | None:
        """The first step, counted from 1, with a NaN loss or one above twice the first loss."""
        steps = enumerate(self.losses, 1)
        return next((step for step, loss in steps if not loss <= 2 * self.losses[0]), None)


class CharacterModel(nn.Module):
    """Embedding, tanh recurrence, linear layer; gives the loss of (batch, length) text, in nats."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 64)
        self.recur = nn.RNN(64, 256, batch_first=True)
        self.head = nn.Linear(256, characters)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.recur(self.embed(text[:, :-1]))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), text[:, 1:].flatten())


def demo(device: torch.device, steps: int, out: Path) -> None:
    # In such small steps, threads mostly wait for each other if other jobs use the cores.
    torch.set_num_threads(1)
    text = _text()
    print(
        f"A recurrent network learns {len(text)} characters of Python's documentation on {device}. "
        f"Steps: {steps}, learning rate: {LEARNING_RATE}, max_norm: {MAX_NORM}.\n\n"
        f"{'run':<31}{'final loss':>11}{'largest norm':>14}{'clipped':>9}{'clip calls':>13}"
    )
    runs = []
    for name, clip, max_norm in (
        ("unclipped", fastclip.clip_grad_norm_, math.inf),
        ("torch.nn.utils.clip_grad_norm_", nn.utils.clip_grad_norm_, MAX_NORM),
        ("fastclip.clip_grad_norm_", fastclip.clip_grad_norm_, MAX_NORM),
    ):
        runs.append(run := _train(name, clip, max_norm, text.to(device), steps))
        shares = f"{max(run.norms):>14.4g}{run.clipped:>9.1%}{run.clip_ms:>10.1f} ms"
        print(f"{name:<31}{run.final_loss:>11.4f}{shares}", flush=True)
    print(
        f"final loss: mean of the last {LAST} steps or fewer, nats per character; largest norm: "
        "before clipping;\nclip calls: time in all of them; the unclipped run only measures\n"
    )
    step = runs[0].diverged
    print(f"Unclipped training {f'diverged at step {step}' if step else 'did not diverge'}.")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No picture: matplotlib is not installed. In the checkout: {INSTALL_EXTRA}")
    else:
        _draw(runs, out)
        print(f"Picture: {out.resolve()}")


def _text() -> Tensor:
    from pydoc_data.topics import topics

    text = "".join(topics.values())
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text], device="cpu")


def _train(
    name: str, clip: Callable[..., Tensor], max_norm: float, text: Tensor, steps: int
) -> Run:
    torch.manual_seed(0)
    model = CharacterModel(int(text.max()) + 1).to(text.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    batch, length = 32, 64
    starts = torch.randint(len(text) - length, (steps, batch, 1), device="cpu").to(text.device)
    window = torch.arange(length + 1, device=text.device)
    losses, norms, seconds = [], [], 0.0
    for start in starts:
        loss = model(text[start + window])
        optimizer.zero_grad()
        loss.backward()
        began = _clock(text.device)
        norms.append(clip(parameters, max_norm))
        seconds += _clock(text.device) - began
        optimizer.step()
        losses.append(loss.detach())
    every = torch.stack(norms)
    clipped = float((every > max_norm).float().mean())
    return Run(name, clipped, torch.stack(losses).tolist(), every.tolist(), 1e3 * seconds)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _draw(runs: Sequence[Run], out: Path) -> None:
    # A Figure without pyplot draws with Agg, and leaves the backend of the process as it is.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for run, color, width in zip(runs, ("tab:red", "skyblue", "navy"), (1.2, 5, 1.2), strict=True):
        steps = range(1, len(run.losses) + 1)
        above.plot(steps, run.losses, color=color, linewidth=width)
        below.plot(steps, run.norms, color=color, linewidth=width, label=run.name)
    below.axhline(MAX_NORM, color="black", linestyle="--", label=f"threshold, max_norm {MAX_NORM}")
    if step := runs[0].diverged:
        label = f"unclipped diverges at step {step}"
        for axes in (above, below):
            axes.axvline(step, color="tab:red", linestyle=":", label=label)
    above.set(yscale="log", xmargin=0.01, ylabel="loss (nats per character)")
    below.set(yscale="log", xmargin=0.01, xlabel="step", ylabel="gradient norm before clipping")
    figure.suptitle("The same network trained with and without clipping")
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(out)
