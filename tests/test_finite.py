"""What is a number, what is one that cannot be computed with, and what is none."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from trl_steppo.finite import LARGEST, NotANumberError, NotFiniteError, as_number, as_reward, not_finite_in


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(0, 0.0), (True, 1.0), (-2.5, -2.5), (Decimal("0.25"), 0.25), (Fraction(1, 4), 0.25), (1e18, 1e18)],
        *[(np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.bool_(True), 1.0), (np.array([2.0]), 2.0)],
        *[(torch.tensor(0.5), 0.5), (torch.tensor([[3]]), 3.0), (torch.tensor(1.5, dtype=torch.bfloat16), 1.5)],
    ],
)
def test_numbers_of_every_kind(value, number):
    found = as_number(value, "it")
    assert type(found) is float
    assert found == number


@pytest.mark.parametrize(
    "value",
    [
        *[math.nan, math.inf, -math.inf, 1e300, 1e20, -1e20, 10**400, -(10**400), 10**5000],
        *[Decimal("NaN"), Decimal("1e999"), Fraction(10**400), np.float32("inf"), np.array(1e30), torch.tensor(1e38)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_beyond_float32_are_refused(value):
    with pytest.raises(NotFiniteError, match=r"^it is .*finite"):
        as_number(value, "it")


class Odd:
    """Raises when it is read."""

    def __float__(self):
        raise KeyError("no")

    def __repr__(self):
        raise OSError("no")


@pytest.mark.parametrize(
    "value",
    [
        *[
            None,
            "1.0",
            b"1",
            [1.0],
            (1.0,),
            {},
            1 + 2j,
            np.complex64(1),
            np.array(["1"]),
            np.zeros(2),
            object(),
            Odd(),
        ],
        *[torch.zeros(2), torch.zeros(0), Decimal("sNaN"), (one for one in (1.0,))],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_not_numbers_are_refused(value):
    with pytest.raises(NotANumberError, match=r"^it is .*must be a number"):
        as_number(value, "it")


def test_the_largest_number_has_a_square_in_float32():
    assert torch.tensor(LARGEST).square().isfinite()
    assert not torch.tensor(LARGEST * 1.03).square().isfinite()
    assert as_number(LARGEST, "it") == LARGEST


def test_numbers_that_json_does_not_know_are_found_however_deep():
    assert not_finite_in({"a": [1, {"b": (2.0, "nan", None)}], "c": 10**400}) is None
    assert not_finite_in({"a": [1, {"b": (2.0, math.inf)}]}) == math.inf


def test_a_reward_that_is_nan_is_told_from_none():
    assert as_reward(None, "it") is None
    assert as_reward(1, "it") == 1.0
    for value in (math.nan, Decimal("NaN"), np.float32("nan"), torch.tensor([math.nan])):
        with pytest.raises(NotFiniteError, match="it is nan; it must be finite; return None where it does not apply"):
            as_reward(value, "it")
    with pytest.raises(NotFiniteError, match=r"it is inf; it must be finite$"):
        as_reward(math.inf, "it")
