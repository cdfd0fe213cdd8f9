"""The ops and the contract once more, on a device that has no float64 and none of our kernels."""

import inspect
from types import ModuleType

import pytest
import test_contract
import test_ops
import torch
from conftest import name_of
from test_narrow import HALF, Narrow, narrow  # noqa: F401

from fastclip._ops import reference

pytestmark = pytest.mark.emulated

# What does not hold there, and why.
WEAKER = {
    "test_norm_of_finite_elements_is_finite_and_exact": "squares that are no float32",
    "test_fp64_squares_overflow_as_torchs_but_on_the_cpu": "float64",
    "test_a_total_norm_has_the_dtype_that_is_asked_for_which_may_not_hold_it": "float64",
    "test_a_threshold_is_any_number_on_any_device": "float64",
    "test_norm_over_gaps_is_as_exact": "one sum of up to 8 Ki elements is the device's own",
    "test_a_coefficient_is_the_formula_where_its_constant_shows": "float64",
    "test_what_does_not_change_keeps_its_bits": "of kernels",
}


def _of_a_device(module: ModuleType | type) -> dict[str, object]:
    tests = {k: v for k, v in vars(module).items() if k.startswith("test_") and k not in WEAKER}
    return {
        name: test
        for name, test in tests.items()
        if "device" in inspect.signature(test).parameters
        and not any("device" in mark.args for mark in getattr(test, "pytestmark", ()))
    }


globals().update(_of_a_device(test_ops), **_of_a_device(test_contract))
TestNorm = pytest.mark.usefixtures("reader")(
    type("TestNorm", (), _of_a_device(test_contract.TestNorm))
)


@pytest.fixture
def device(narrow: None) -> str:  # noqa: F811
    return "emulated"


@pytest.fixture
def ops():
    return reference


@pytest.fixture(params=HALF, ids=name_of)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _refused(narrow: None, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    # Two of what tests count in are 1e-6 there.
    def near(value: torch.Tensor, expected: float) -> float:
        return 2e6 * abs(float(value) - expected) / (expected or 1)

    for module in (test_ops, test_contract):
        monkeypatch.setattr(module, "ulps", near)
    with Narrow(waits=True):
        yield
