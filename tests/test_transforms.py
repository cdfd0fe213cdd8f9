"""Norms and clips inside `torch.vmap`, `torch.func.grad` and the other transforms of functions.

What is right is said by the formulas in float64, sample by sample, and by their derivatives.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from conftest import ORDERS
from test_subclasses import two_halves
from torch import Tensor

import fastclip

BATCH = 5
CLOSE = {"rtol": 2e-6, "atol": 0}


@pytest.fixture(autouse=True)
def _silent(reader: None) -> Iterator[None]:
    """No transform warns of anything, whoever reads the gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own in-place clamp has no rule for batches either, and says that it is slow.
        warnings.filterwarnings("ignore", "There is a performance drop.*aten::clamp_")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def norm(x: Tensor, p: float) -> Tensor:
    x = x.abs().double()
    return x.amax() if math.isinf(p) else (x**p).sum() ** (1 / p)


def coef(total_norm: Tensor, max_norm: float | Tensor = 1.0) -> Tensor:
    return (max_norm / (total_norm + 1e-6)).clamp(max=1)


def rows_by_weights(g: Tensor) -> Tensor:
    """Every row by 0.3 of the norm of its weights, which are ones."""
    rows = g.reshape(len(g), -1) if g.dim() > 1 else g.reshape(1, -1)
    limit, norms = 0.3 * math.sqrt(rows.size(1)), torch.linalg.vector_norm(rows, dim=1)
    return rows * (limit / norms).clamp(max=1)[:, None]


def flat(grads: Iterable[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads])


def clipped(call: Callable[[list[Tensor]], Any]) -> Callable[..., Tensor]:
    """What `call` makes of gradients, as a function of them: all elements as one vector."""

    def function(*grads: Tensor) -> Tensor:
        weights = [torch.ones(g.shape, dtype=g.dtype) for g in grads]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        call(weights)
        return flat(weight.grad for weight in weights)

    return function


# Each function, and the formula that it stands for, of all elements as one vector and as gradients.
CLIPS = {
    "norm": (lambda ws: fastclip.clip_grad_norm_(ws, 1.0), lambda x, _: x * coef(norm(x, 2))),
    "factor": (
        lambda ws: fastclip.clip_grad_norm_(ws, 1.0, 1.0, grad_scale=0.5),
        lambda x, _: x * 0.5 * coef(0.5 * norm(x, 1)),
    ),
    "rule": (
        lambda ws: fastclip.clip_grad_norm_(ws, lambda total: total.sqrt()),
        lambda x, _: x * coef(norm(x, 2), norm(x, 2).sqrt()),
    ),
    "known norm": (lambda ws: two_halves(ws, 1.0), lambda x, _: x * coef(norm(x, 2))),
    "normalize": (lambda ws: fastclip.normalize_grad_(ws, 2.0), lambda x, _: x * 2 / norm(x, 2)),
    "value": (lambda ws: fastclip.clip_grad_value_(ws, 0.5), lambda x, _: x.clamp(-0.5, 0.5)),
    "norms": (
        lambda ws: fastclip.clip_grad_norms_(ws, 1.0),
        lambda _, grads: flat(g * coef(norm(g, 2)) for g in grads),
    ),
    "agc": (
        lambda ws: fastclip.clip_grad_agc_(ws, 0.3),
        lambda _, grads: flat(map(rows_by_weights, grads)),
    ),
}
FUNCTIONS = {
    name: (clipped(call), lambda *grads, formula=formula: formula(flat(grads), grads))
    for name, (call, formula) in CLIPS.items()
}


def samples(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of a batch, of which some are clipped and some are not."""
    size = torch.tensor([0.01, 0.3, 1.0, 3.0, 100.0]).to(dtype)
    return [
        torch.randn(BATCH, *shape, dtype=dtype) * size.view(-1, *[1] * len(shape))
        for shape in [(3, 4), (7,), (), (2, 3, 2)]
    ]


@pytest.mark.parametrize("p", [*ORDERS, -1.0])
def test_per_sample_norms_of_mixed_dtypes_and_of_what_all_samples_share(p):
    half, single, shared = torch.randn(BATCH, 6).half(), torch.randn(4, BATCH), torch.randn(3)
    norms_of = torch.vmap(lambda *some: fastclip.get_total_norm([*some, shared], p), (0, 1))
    norms = norms_of(half, single)
    assert norms.dtype == torch.float32
    for found, *some in zip(norms, half, single.t(), strict=True):
        torch.testing.assert_close(found.double(), norm(flat([*some, shared]), p), **CLOSE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_per_sample_clips(name):
    call, formula = FUNCTIONS[name]
    grads = samples()
    found = torch.vmap(call)(*grads)
    for i, some in enumerate(zip(*grads, strict=True)):
        expected = formula(*(g.double() for g in some))
        torch.testing.assert_close(found[i].double(), expected, **CLOSE)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.hessian])
def test_a_norm_has_its_derivatives(p, derivative):
    x = torch.randn(6, dtype=torch.float64)
    found = derivative(lambda x: fastclip.get_total_norm([x[:2], x[2:]], p))(x)
    torch.testing.assert_close(found, derivative(lambda x: norm(x, p))(x))


@pytest.mark.parametrize("i", range(BATCH))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_clip_has_its_derivative(name, i):
    call, formula = FUNCTIONS[name]
    grads = [g[i] for g in samples(torch.float64)]
    direction = [torch.randn_like(g) for g in grads]
    value, expected = torch.func.jvp(formula, tuple(grads), tuple(direction))
    for run in (call, torch.func.functionalize(call)):
        torch.testing.assert_close(run(*grads), value)
    forward = torch.func.jvp(call, tuple(grads), tuple(direction))
    torch.testing.assert_close(forward, (value, expected))
    cotangent = torch.randn_like(expected)
    backward = torch.func.vjp(call, *grads)[1](cotangent)
    pairs = zip(backward, direction, strict=True)
    found = sum((b * d).sum() for b, d in pairs)
    torch.testing.assert_close(found, (cotangent * expected).sum())


def test_complex_gradients_too():
    x = torch.randn(2, 3, dtype=torch.float64)
    found = torch.func.grad(lambda x: fastclip.get_total_norm([torch.complex(x[0], x[1]), x[0]]))(x)
    expected = torch.stack([2 * x[0], x[1]]) / (2 * x[0] ** 2 + x[1] ** 2).sum().sqrt()
    torch.testing.assert_close(found, expected)


def test_what_is_not_to_be_seen_is_not():
    x = torch.randn(4, dtype=torch.float64)

    def scaled(x: Tensor) -> Tensor:
        with torch.no_grad():
            total_norm = fastclip.get_total_norm([x])
        return (x / total_norm).sum()

    expected = torch.ones(4, dtype=torch.float64) / x.norm()
    torch.testing.assert_close(torch.func.grad(scaled)(x), expected)
    assert not fastclip.get_total_norm([x.requires_grad_()]).requires_grad


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_compiled_transforms(transform):
    torch._dynamo.reset()
    call = FUNCTIONS["norm"][0]
    transforms = {"vmap": torch.vmap(call), "grad": torch.func.grad(lambda *some: call(*some)[0])}
    transformed = transforms[transform]
    grads = samples(torch.float64)[:2]
    found = torch.compile(transformed, backend="aot_eager")(*grads)
    torch.testing.assert_close(found, transformed(*grads))


def test_a_gradient_that_samples_share_cannot_have_many_coefficients():
    shared = torch.nn.Parameter(torch.zeros(3))
    shared.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda total: fastclip.clip_grads_with_norm_([shared], 1.0, total))(
            torch.tensor([2.0, 4.0])
        )
    assert shared.grad.tolist() == [1, 1, 1]


KEEPERS = {
    "AutoClip": lambda weights: fastclip.clip_grad_norm_(weights, fastclip.AutoClip()),
    "ZClip": lambda weights: fastclip.clip_grad_norm_(weights, fastclip.ZClip()),
    "GradClipper": lambda weights: fastclip.GradClipper(weights, 1.0).clip_(),
}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap], ids=["grad", "vmap"])
@pytest.mark.parametrize("name", KEEPERS)
def test_what_keeps_numbers_of_every_step_is_refused(name, transform):
    call = clipped(KEEPERS[name])
    with pytest.raises(RuntimeError, match=f"{name} keeps numbers"):
        transform(lambda grad: call(grad).sum())(torch.ones(2, 2))
