"""What clipping does to a training run: unclipped, clipped by torch and by fastclip, or by a rule.

Needs nothing but torch and the standard library, whose documentation is its text; tqdm and
matplotlib, if they are there, add a progress bar and a picture.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastclip

INSTALL_EXTRA = 'pip install --no-build-isolation -e ".[demo]"'

# Without clipping this learning rate ends training within ten steps or so, whatever the seed; at
# half of it training survives. Above this threshold, which clips some 8 % of the steps, rounding
# parts the two clipped runs.
LEARNING_RATE = 0.7
MOMENTUM = 0.9
MAX_NORM = 0.75
LAST = 20
COLORS = ("tab:red", "skyblue", "navy", "tab:green")

Clip = Callable[..., Tensor] | None
RULES = ("autoclip", "zclip", "agc")


def _agc_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    total_norm = fastclip.get_total_norm([p.grad for p in parameters if p.grad is not None])
    fastclip.clip_grad_agc_(parameters)
    return total_norm


def _by(rule: Callable[[Tensor], Tensor]) -> Clip:
    return lambda parameters, max_norm: fastclip.clip_grad_norm_(parameters, rule)


def _clip_of(rule: str) -> Clip:
    """One of RULES, none of which is tuned to this run."""
    if rule == "agc":
        return _agc_
    return _by(fastclip.AutoClip() if rule == "autoclip" else fastclip.ZClip())


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


def demo(device: torch.device, steps: int, rule: str | None, out: Path) -> None:
    tqdm = _optional("tqdm", "progress bar")
    matplotlib = _optional("matplotlib", "picture")
    text = _text()
    print(
        f"A recurrent network learns {len(text)} characters of Python's documentation on {device}. "
        f"Steps: {steps}, learning rate: {LEARNING_RATE}, max_norm: {MAX_NORM}."
    )
    clips: list[tuple[str, Clip]] = [
        ("unclipped", None),
        ("torch.nn.utils.clip_grad_norm_", nn.utils.clip_grad_norm_),
        ("fastclip.clip_grad_norm_", fastclip.clip_grad_norm_),
    ]
    if rule:
        clips.append((f"fastclip, {rule}", _clip_of(rule)))
    progress = tqdm.tqdm(total=len(clips) * steps, unit="step") if tqdm else nullcontext()
    with progress as bar, _on_one_thread():
        advance = bar.update if bar else int
        runs = [_train(name, clip, text.to(device), steps, advance) for name, clip in clips]
    _print_table(runs)
    print(_interpretation(*runs[:3]))
    if rule:
        fate = f"diverged at step {runs[3].diverged}" if runs[3].diverged else "did not diverge"
        print(
            f"By {rule}, with no threshold chosen, training {fate}; loss {runs[3].final_loss:.2f}."
        )
    if matplotlib:
        _draw(runs, out)
        print(f"Picture: {out.resolve()}")


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Threads of such small steps wait for each other where other jobs hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    return torch.tensor([index[character] for character in text], device="cpu")


def _train(name: str, clip: Clip, text: Tensor, steps: int, advance: Callable[[], object]) -> Run:
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
        norms = torch.tensor(run.norms, device="cpu")
        clipped, ms = f"{(norms > MAX_NORM).float().mean():.1%}", f"{run.clip_ms:.1f} ms"
        clipped = clipped if run in runs[1:3] else "-"
        ms = "-" if run is runs[0] else ms
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
    for run, color, width in zip(runs, COLORS, (1.2, 5, 1.2, 1.2), strict=False):
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
