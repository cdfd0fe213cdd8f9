"""timm, stable-baselines3, ignite and skorch."""

from functools import partial

import pytest
import torch
from loops import check_clipped, check_reached, losses_of
from torch import nn


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(16, 8), torch.randn(16, 1) * 3) for _ in range(steps)]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def distance(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize(("mode", "value"), [("norm", 0.5), ("value", 0.05), ("agc", 0.02)])
def test_timm(mode, value):
    pytest.importorskip("timm")
    from timm.utils import NativeScaler

    def train(steps: int) -> list[float]:
        model, scaler, losses = net(), NativeScaler(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches(steps):
            optimizer.zero_grad()
            loss = distance(model, batch)
            scaler(loss, optimizer, value, mode, model.parameters())
            losses.append(loss.item())
        return losses

    counted = check_reached(train)
    if mode == "norm":
        check_clipped(counted)


KINDS = {
    "A2C": {"n_steps": 8},
    "PPO": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "DQN": {"learning_starts": 0, "train_freq": 4, "buffer_size": 1000},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stable_baselines(kind):
    make = getattr(pytest.importorskip("stable_baselines3"), kind)
    how = {"seed": 0, "device": "cpu", "max_grad_norm": 0.3, **KINDS[kind]}

    def train(steps: int) -> list[float]:
        model = make("MlpPolicy", "CartPole-v1", **how)
        model.learn(steps * how.get("n_steps", 4))
        return [float(p.detach().double().norm()) for p in model.policy.parameters()]

    check_clipped(check_reached(train))


def test_ignite():
    engine = pytest.importorskip("ignite.engine")

    def train(steps: int) -> list[float]:
        model, losses = net(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 0.5)

        def update(_: object, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            losses.extend(
                losses_of(optimizer, [batch], partial(distance, model), torch.Tensor.backward, clip)
            )

        engine.Engine(update).run(batches(steps))
        return losses

    check_clipped(check_reached(train))


def test_skorch_which_holds_torchs_function():
    skorch = pytest.importorskip("skorch")
    from skorch.callbacks import GradientNormClipping

    quiet = {"max_epochs": 1, "batch_size": 16, "lr": 0.01, "train_split": None, "verbose": 0}

    def train(steps: int) -> list[float]:
        x, y = (torch.cat(part) for part in zip(*batches(steps), strict=True))
        callbacks = [GradientNormClipping(0.5)]
        regressor = skorch.NeuralNetRegressor(net(), callbacks=callbacks, **quiet)
        torch.manual_seed(1)
        regressor.fit(x, y)
        return regressor.history[:, "batches", :, "train_loss"][0]

    check_clipped(check_reached(train))
