"""Measuring only: `get_total_norm`."""

import pytest
from models import DTYPES, parameters
from torch.nn import utils

import fastclip
from fastclip import _reference


@pytest.mark.parametrize("dtype", DTYPES)
def bench_norm(race, shapes, dtype, device):
    name, sizes = shapes
    grads = [p.grad for p in parameters(sizes, dtype, device)]
    contestants = {
        "fastclip": lambda: fastclip.get_total_norm(grads),
        "default": lambda: _reference.norm(grads, 2.0),
        "foreach": lambda: utils.get_total_norm(grads, foreach=True),
        "loop": lambda: utils.get_total_norm(grads, foreach=False),
    }
    race(f"{name}, norm", dtype, grads, contestants, writes=False)
