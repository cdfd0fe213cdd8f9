"""timm, stable-baselines3, ignite and skorch."""

import pytest
import torch
from loops import check_clipped, check_reached
from torch import nn


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(16, 8), torch.randn(16, 1) * 3) for _ in range(steps)]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


@pytest.mark.parametrize(("mode", "value"), [("norm", 0.5), ("value", 0.05), ("agc", 0.02)])
def test_timm(mode, value):
    pytest.importorskip("timm")
    from timm.utils import NativeScaler

    def train(steps: int) -> list[float]:
        model, losses = net(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = NativeScaler()
        for x, y in batches(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            scaler(loss, optimizer, clip_grad=value, clip_mode=mode, parameters=model.parameters())
            losses.append(loss.item())
        return losses

    counted = check_reached(train)
    if mode == "norm":
        check_clipped(counted)


@pytest.mark.parametrize("kind", ["A2C", "PPO", "DQN"])
def test_stable_baselines(kind):
    baselines = pytest.importorskip("stable_baselines3")
    how = {
        "A2C": {"n_steps": 8},
        "PPO": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
        "DQN": {"learning_starts": 0, "train_freq": 4, "buffer_size": 1000},
    }[kind]
    each = {"A2C": 8, "PPO": 32, "DQN": 4}[kind]

    def train(steps: int) -> list[float]:
        model = getattr(baselines, kind)(
            "MlpPolicy", "CartPole-v1", seed=0, device="cpu", max_grad_norm=0.3, **how
        )
        model.learn(steps * each)
        return [float(p.detach().double().norm()) for p in model.policy.parameters()]

    check_clipped(check_reached(train))


def test_ignite():
    engine = pytest.importorskip("ignite.engine")

    def train(steps: int) -> list[float]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def update(_: object, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
            optimizer.zero_grad()
            loss = (model(batch[0]) - batch[1]).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            return loss.item()

        trainer, losses = engine.Engine(update), []
        done = engine.Events.ITERATION_COMPLETED
        trainer.add_event_handler(done, lambda engine: losses.append(engine.state.output))
        trainer.run(batches(steps))
        return losses

    check_clipped(check_reached(train))


def test_skorch_which_holds_torchs_function():
    skorch = pytest.importorskip("skorch")
    from skorch.callbacks import GradientNormClipping

    def train(steps: int) -> list[float]:
        x, y = (torch.cat(part) for part in zip(*batches(steps), strict=True))
        torch.manual_seed(1)
        regressor = skorch.NeuralNetRegressor(
            net(),
            max_epochs=1,
            batch_size=16,
            lr=0.01,
            train_split=None,
            verbose=0,
            callbacks=[GradientNormClipping(0.5)],
        )
        regressor.fit(x, y)
        return regressor.history[:, "batches", :, "train_loss"][0]

    check_clipped(check_reached(train))
