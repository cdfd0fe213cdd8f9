"""timm, stable-baselines3, ignite and skorch."""

from functools import partial

import pytest
import torch
from loops import batches, check_reached, distance, losses_of, net, sgd
from torch import nn


@pytest.mark.parametrize(("mode", "value"), [("norm", 0.5), ("value", 0.05), ("agc", 0.02)])
def test_timm(mode, value):
    pytest.importorskip("timm")
    from timm.utils import NativeScaler

    def train(steps: int) -> list[float]:
        model, scaler, losses = net(), NativeScaler(), []
        optimizer = sgd(model)
        for batch in batches(steps):
            optimizer.zero_grad()
            loss = distance(model, batch)
            scaler(loss, optimizer, value, mode, model.parameters())
            losses.append(loss.item())
        return losses

    check_reached(train)


def test_stable_baselines():
    sb3 = pytest.importorskip("stable_baselines3")
    how = {"seed": 0, "device": "cpu", "max_grad_norm": 0.3, "n_steps": 8}

    def train(steps: int) -> list[float]:
        model = sb3.A2C("MlpPolicy", "CartPole-v1", **how)
        model.learn(steps * how["n_steps"])
        return [float(p.detach().double().norm()) for p in model.policy.parameters()]

    check_reached(train)


def test_ignite():
    engine = pytest.importorskip("ignite.engine")

    def train(steps: int) -> list[float]:
        model, losses = net(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 0.5)

        def update(_: object, batch: torch.Tensor) -> None:
            losses.extend(losses_of(optimizer, [batch], partial(distance, model), clip))

        engine.Engine(update).run(batches(steps))
        return losses

    check_reached(train)


def test_skorch_which_holds_torchs_function():
    skorch = pytest.importorskip("skorch")
    from skorch.callbacks import GradientNormClipping

    quiet = {"max_epochs": 1, "batch_size": 4, "lr": 0.01, "train_split": None, "verbose": 0}

    def train(steps: int) -> list[float]:
        x, callbacks = torch.cat(batches(steps)), [GradientNormClipping(0.5)]
        regressor = skorch.NeuralNetRegressor(net(), callbacks=callbacks, **quiet)
        torch.manual_seed(1)
        regressor.fit(x, torch.full((len(x), 4), 3.0))
        return regressor.history[:, "batches", :, "train_loss"][0]

    check_reached(train)
