"""Lightning's Trainer; the callback; the recipe for fused optimizers with a scaler."""

from typing import Any

import pytest
import torch
from loops import check_reached
from torch import nn

import fastclip

lightning = pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy  # noqa: E402

from fastclip.integrations.lightning import GradClip  # noqa: E402


class Module(LightningModule):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 1)
        self.fused = fused
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (x,) = batch
        loss = (self.last(self.first(x).tanh()) - 3 * x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)


def data(batches: int = 40) -> torch.utils.data.DataLoader:
    torch.manual_seed(0)
    values = torch.utils.data.TensorDataset(torch.randn(16 * batches, 8))
    return torch.utils.data.DataLoader(values, batch_size=16)


def trainer(steps: int, *callbacks: Callback, **how: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": -1}
    return Trainer(max_steps=steps, callbacks=[*callbacks], **{**quiet, **how})


def fitted(steps: int, *callbacks: Callback, fused: bool = False, **how: Any) -> Module:
    module = Module(fused)
    trainer(steps, *callbacks, **how).fit(module, data())
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_trainer(precision, algorithm):
    how = {"precision": precision, "gradient_clip_algorithm": algorithm, "gradient_clip_val": 0.5}
    # torch's norm of bf16 gradients is rounded to bf16, ours is not.
    rtol = 2e-2 if precision == "bf16-true" else 1e-5
    check_reached(lambda steps: fitted(steps, **how).losses, rtol=rtol)


def test_the_callback_clips_as_the_trainer_does_and_logs(tmp_path):
    clip, logger = GradClip(0.5), CSVLogger(tmp_path, name="")
    ours = fitted(20, clip, logger=logger, log_every_n_steps=1)
    theirs = fitted(20, gradient_clip_val=0.5)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=1e-7)
    stats = clip.clippers[0].stats()
    assert stats["steps"] == 20
    assert stats["clipped"] > 0
    header, *rows = next(tmp_path.glob("**/metrics.csv")).read_text().splitlines()
    column = header.split(",").index("grad_norm")
    assert [float(row.split(",")[column]) for row in rows] == pytest.approx(stats["total_norm"])


def test_another_fit_goes_on_and_that_of_another_module_begins_anew():
    rule = fastclip.AutoClip(50)
    clip, runs = GradClip(rule), []
    for _ in range(2):
        module = Module()
        for fits in (1, 2):
            trainer(10, clip).fit(module, data())
            kept = clip.clippers[0].stats()
            assert kept["steps"] == int(rule.state_dict()["count"]) == 10 * fits
        runs.append((module.losses, kept))
    assert runs[0] == runs[1]


def test_the_callback_takes_groups_and_its_state_is_in_the_checkpoint(tmp_path):
    def groups(module: Module) -> list[dict[str, Any]]:
        return [
            {"params": module.first, "max_norm": fastclip.AutoClip(50), "name": "first"},
            {"params": module.last, "max_norm": 1.0, "name": "last"},
        ]

    whole, half, rest = (Module() for _ in range(3))
    clip, resumed = GradClip(groups=groups), GradClip(groups=groups)
    trainer(20, clip).fit(whole, data(1))
    first = trainer(10, GradClip(groups=groups))
    first.fit(half, data(1))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(20, resumed).fit(rest, data(1), ckpt_path=tmp_path / "half.ckpt")
    assert half.losses + rest.losses == pytest.approx(whole.losses, rel=1e-5)
    assert resumed.clippers[0].stats()["first"]["steps"] == 20
    assert clip.clippers[0].stats() == resumed.clippers[0].stats()


class Two(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.last)]

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def test_each_optimizer_is_clipped_by_itself():
    clip = GradClip(fastclip.AutoClip(50))
    trainer(40, clip).fit(Two(), data())
    first, last = (c.stats()["total_norm"] for c in clip.clippers)
    assert len(first) == len(last) == 20
    assert first != last
    # And each has a rule of its own.
    assert [int(c.max_norm.state_dict()["count"]) for c in clip.clippers] == [20, 20]
    with pytest.raises(ValueError, match="groups: expected one optimizer"):
        trainer(2, GradClip(groups=lambda module: [])).fit(Two(), data())


def test_what_it_cannot_clip_it_refuses():
    for wrong in ({}, {"max_norm": 1.0, "groups": lambda module: []}):
        with pytest.raises(TypeError, match="max_norm, groups: expected one of the two"):
            GradClip(**wrong)
    with pytest.raises(ValueError, match=r"gradient_clip_val is set, and clips too"):
        fitted(2, GradClip(1.0), gradient_clip_val=1.0)
    for strategy in (FSDPStrategy, DeepSpeedStrategy):
        fake = trainer(2)
        fake.strategy.__class__ = type("Fake", (strategy,), {"__init__": lambda self: None})
        with pytest.raises(ValueError, match="hides which rank has which part"):
            GradClip(1.0).on_train_start(fake, Module())


class ClippedStep(MixedPrecision):
    """What a user writes in place of `precision="16-mixed"` for a fused optimizer."""

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        loss = closure()
        fastclip.clipped_step(optimizer, max_norm=1.0, scaler=self.scaler)
        self.scaler.update()
        return loss


def test_a_fused_optimizer_with_a_scaler_is_clipped_in_its_step():
    def half(*callbacks: Callback, **how: Any) -> list[float]:
        return fitted(20, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu")], **how).losses

    with pytest.raises(RuntimeError, match="are divided in its step"):
        half(GradClip(1.0), fused=True)
    plugin = ClippedStep("16-mixed", "cpu")
    fused = fitted(20, fused=True, plugins=[plugin]).losses
    plain = half(gradient_clip_val=1.0)
    assert fused == pytest.approx(plain, rel=1e-3)
    assert half(GradClip(1.0)) == pytest.approx(plain, rel=1e-3)
    assert plugin.scaler.get_scale() > 1
