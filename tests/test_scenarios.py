"""Other frameworks' names for our functions, against NumPy; and forked children.

`NAMES` pairs each name with our call. The calls are run as printed, and checked against the
formula the other framework publishes, restated in NumPy float64.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import parameters, ulps
from torch import Tensor, nn

import fastclip

EPS = torch.finfo(torch.float32).eps
# A clipped element: the norm 2 eps, then half an eps for the sum, the quotient and the product.
ROUNDINGS = 4

BY_NORM = "clip_grad_norm_(parameters, max_norm)"
BY_NORM_EACH = "clip_grad_norms_(parameters, max_norm)"
BY_VALUE = "clip_grad_value_(parameters, clip_value)"
BY_WEIGHT = "clip_grad_agc_(parameters, clip_factor)"
NORMALIZED = "normalize_grad_(parameters)"
MEASURED = "get_total_norm(tensors)"


def l2(values: np.typing.ArrayLike) -> float:
    return math.sqrt(np.sum(np.square(values)))


def units(t: np.ndarray) -> np.ndarray:
    """Norms of the slices along the first dimension, or of a vector, ready to multiply."""
    axes = tuple(range(1, t.ndim)) if t.ndim > 1 else (0,)
    return np.sqrt(np.sum(np.square(t), axis=axes, keepdims=True))


def timm(t: np.ndarray, c: float, n: float, w: np.ndarray) -> np.ndarray:
    limit, norm = np.maximum(units(w), 1e-3) * c, units(t)
    return np.where(norm < limit, t, t * (limit / np.maximum(norm, 1e-6)))


# t: one tensor; c: the bound; n: the norm of all tensors in the call; w: the weights of t. The last
# column is what our denominator has and theirs has not: torch adds 1e-6 to the norm, TensorFlow,
# Keras, optax do not.
CLIPS = [
    ("torch.nn.utils.clip_grad_norm_", BY_NORM, lambda t, c, n, _: t * min(1, c / (n + 1e-6)), 0),
    ("tf.clip_by_global_norm", BY_NORM, lambda t, c, n, _: t * c / max(n, c), 1e-6),
    ("Keras global_clipnorm", BY_NORM, lambda t, c, n, _: t * (c * min(1 / n, 1 / c)), 1e-6),
    ("optax.clip_by_global_norm", BY_NORM, lambda t, c, n, _: t if n < c else t / n * c, 1e-6),
    ("tf.clip_by_norm", BY_NORM_EACH, lambda t, c, n, _: t if n <= c else t * c / n, 1e-6),
    ("Keras clipnorm", BY_NORM_EACH, lambda t, c, n, _: t * c / max(n, c), 1e-6),
    ("torch.nn.utils.clip_grad_value_", BY_VALUE, lambda t, c, *_: np.clip(t, -c, c), 0),
    ("tf.clip_by_value(t, -c, c)", BY_VALUE, lambda t, c, *_: np.maximum(np.minimum(t, c), -c), 0),
    ("Keras clipvalue", BY_VALUE, lambda t, c, *_: np.clip(t, -c, c), 0),
    ("optax.clip", BY_VALUE, lambda t, c, *_: np.sign(t) * np.minimum(abs(t), c), 0),
    ("timm.utils.adaptive_clip_grad", BY_WEIGHT, timm, 0),
    ("optax.adaptive_grad_clip", BY_WEIGHT, timm, 0),
    ("optax.normalize_by_update_norm", NORMALIZED, lambda t, c, n, _: t / n, 0),
]
NORMS = [
    ("torch.nn.utils.get_total_norm", MEASURED, lambda ts: l2([l2(t) for t in ts])),
    ("tf.linalg.global_norm", MEASURED, lambda ts: math.sqrt(sum(l2(t) ** 2 for t in ts))),
    ("optax.global_norm", MEASURED, lambda ts: math.sqrt(sum(np.vdot(t, t) for t in ts))),
]
NAMES: list[tuple[str, str]] = [(theirs, ours) for theirs, ours, *_ in [*CLIPS, *NORMS]]

SIZES = [(5, 7), (3,), (64, 4), (1,)]


def run(call: str, group: list[nn.Parameter], bound: float) -> Tensor | None:
    names = dict(parameters=group, tensors=[p.grad for p in group])
    bounds = dict.fromkeys(["max_norm", "clip_value", "clip_factor"], bound)
    return eval(call, vars(fastclip) | names | bounds)


def float64(tensors: Iterable[Tensor]) -> list[np.ndarray]:
    return [t.detach().to(torch.float64, copy=True).numpy() for t in tensors]


@pytest.mark.parametrize(("theirs", "ours", "formula", "addend"), CLIPS, ids=[r[0] for r in CLIPS])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3])
@pytest.mark.parametrize("tightness", [0.25, 1.0, 2.0])
def test_clip_name_keeps_its_published_formula(theirs, ours, formula, addend, magnitude, tightness):
    given = parameters([magnitude * torch.randn(size) for size in SIZES])
    for parameter in given:
        parameter.data = torch.randn(parameter.shape)
    rtol = {BY_VALUE: 0, BY_WEIGHT: 1e-6}.get(ours, ROUNDINGS * EPS)
    for group in [[p] for p in given] if ours == BY_NORM_EACH else [given]:
        grads, weights = float64(p.grad for p in group), float64(group)
        every = np.concatenate([t.ravel() for t in grads])
        norm = l2(every)
        most = {BY_VALUE: abs(every).max(), BY_WEIGHT: magnitude}.get(ours, norm)
        bound = float(np.float32(tightness * most))
        returned = run(ours, group, bound)
        assert returned is None if ours in (BY_VALUE, BY_WEIGHT) else ulps(returned, norm) <= 2
        for t, w, p in zip(grads, weights, group, strict=True):
            (result,) = float64([p.grad])
            published, exact = formula(t, bound, norm, w), formula(t, bound, norm + addend, w)
            np.testing.assert_allclose(result, published, rtol=addend / norm + rtol, atol=0)
            np.testing.assert_allclose(result, exact, rtol=rtol, atol=0)


@pytest.mark.parametrize(("theirs", "ours", "formula"), NORMS, ids=[r[0] for r in NORMS])
def test_norm_name_keeps_its_published_formula(theirs, ours, formula):
    given = parameters([torch.randn(size) for size in SIZES])
    assert ulps(run(ours, given, 0.0), formula(float64(p.grad for p in given))) <= 2


# The parent has used its threads, which a child does not have; the alarm ends a child that waits.
FORKED = r"""
import math, os, signal, torch, fastclip
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
if (child := os.fork()) == 0:
    signal.alarm(20)
    made = [torch.nn.Parameter(torch.zeros(30_000)) for _ in range(40)]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm, expected = fastclip.clip_grad_norm_(made, 1.0), math.sqrt(40 * 30_000 * 4)
    fastclip.clip_grad_value_(made, 0.5)
    right = math.isclose(norm, expected, rel_tol=1e-6)
    clipped = torch.full((30_000,), 2 / expected)
    os._exit(0 if right and all(torch.allclose(p.grad, clipped) for p in made) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_clips_without_its_parents_threads():
    assert subprocess.run([sys.executable, "-c", FORKED]).returncode == 0
