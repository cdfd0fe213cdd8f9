"""Measuring only: `get_total_norm`."""

from models import parameters
from torch.nn import utils

import fastclip
from fastclip._ops import reference


def bench_norm(race, name, shapes, dtype, device):
    grads = [p.grad for p in parameters(shapes, dtype, device)]
    contestants = {
        "fastclip": lambda: fastclip.get_total_norm(grads),
        "default": lambda: reference.norm(grads, 2.0),
        "foreach": lambda: utils.get_total_norm(grads, foreach=True),
        "loop": lambda: utils.get_total_norm(grads, foreach=False),
    }
    race(f"{name}, norm", dtype, grads, contestants, writes=False, restore=lambda: None)
