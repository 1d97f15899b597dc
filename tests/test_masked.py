"""What is masked never matters, and statistics over ranks are those of the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_steppo.masked import (
    checked_mask,
    keep_valid,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    masked_whiten,
)

X = torch.tensor([1.0, math.nan, 2.0, 6.0, math.inf])
MASK = torch.tensor([True, False, True, True, False])


def test_mean_and_variance_by_hand():
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_var(X, MASK).item() == 7.0  # (4 + 1 + 9) / 2
    assert masked_var(X, MASK, unbiased=False).item() == pytest.approx(14 / 3)


def test_an_integer_mask_means_the_same():
    assert masked_mean(X, MASK.long()) == masked_mean(X, MASK)


def test_mean_of_booleans_is_a_fraction():
    assert masked_mean(torch.tensor([True, True, False]), torch.tensor([1, 0, 1])).item() == 0.5


def test_nothing_valid_has_no_mean_and_sums_to_zero():
    nothing = torch.zeros(5, dtype=torch.bool)
    assert masked_sum(X, nothing).item() == 0.0
    assert masked_mean(X, nothing).isnan()
    assert masked_var(X, nothing).isnan()


def test_one_element_has_no_unbiased_variance():
    one = torch.tensor([True, False, False, False, False])
    assert masked_var(X, one).isnan()
    assert masked_var(X, one, unbiased=False).item() == 0.0


def test_gradient_is_the_weight_in_the_mean_and_zero_where_masked():
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]) / 3)


def test_variance_survives_a_large_mean():
    x = torch.tensor([0.0, 1.0, 2.0]).double() + 1e9
    assert masked_var(x, torch.ones(3, dtype=torch.bool)).item() == 1.0


def test_whitening_float32_is_as_exact_as_float64():
    x, mask = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1e4, torch.ones(1000)
    exact = (x.double() - x.double().mean()) / x.double().std()
    torch.testing.assert_close(masked_whiten(x, mask).double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_trl_formula(shift_mean):
    expected = (torch.tensor([1.0, 0.0, 2.0, 6.0, 0.0]) - 3) / math.sqrt(7 + 1e-8) + (0 if shift_mean else 3)
    whitened = masked_whiten(X, MASK, shift_mean=shift_mean)
    torch.testing.assert_close(whitened, expected.where(MASK, 0.0))
    assert whitened.dtype == X.dtype


@pytest.mark.parametrize("num_valid", [0, 1])
def test_fewer_than_two_elements_are_returned_as_they_are(num_valid):
    mask = torch.arange(3) < num_valid
    assert masked_whiten(torch.tensor([5.0, math.nan, 7.0]), mask).tolist() == [5.0 * num_valid, 0.0, 0.0]


def test_equal_elements_are_whitened_to_zero():
    assert masked_whiten(torch.full((4,), 0.1), torch.ones(4, dtype=torch.bool)).abs().max() == 0.0


def test_shards_on_ranks_equal_the_whole():
    # Ranks are replayed one after the other: each gets from `reduce` what the whole batch got, and what the ranks
    # handed to `reduce` has to add up to exactly that. The last rank has no valid element.
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(9, generator=generator) + 5, torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0]).bool()
    global_statistics: list[Tensor] = []
    whole = masked_whiten(x, mask, reduce=lambda statistics: global_statistics.append(statistics) or statistics)
    totals = [torch.zeros_like(statistics) for statistics in global_statistics]
    for shard in (slice(0, 2), slice(2, 6), slice(6, 9)):
        replayed = iter(zip(totals, global_statistics, strict=True))

        def reduce(local: Tensor, replayed=replayed) -> Tensor:
            total, reduced = next(replayed)
            total += local
            return reduced

        torch.testing.assert_close(masked_whiten(x[shard], mask[shard], reduce=reduce), whole[shard])
    torch.testing.assert_close(totals, global_statistics)
    assert len(totals) == 2


def test_one_element_on_each_of_two_ranks_is_whitened():
    sent: list[Tensor] = []

    def reduce(local: Tensor) -> Tensor:  # the other rank holds 3.0 where this one holds 1.0
        sent.append(local)
        return local + torch.tensor([1.0, 3.0] if len(sent) == 1 else [1.0])

    whitened = masked_whiten(torch.tensor([1.0]), torch.tensor([True]), reduce=reduce)
    assert whitened.item() == pytest.approx(-1 / math.sqrt(2))
    assert [statistics.dtype for statistics in sent] == [torch.float64] * 2


def test_moments_expose_count_and_sums():
    moments = masked_moments(X, MASK)
    assert (moments.count.item(), moments.mean.item(), moments.squared_deviations.item()) == (3.0, 3.0, 14.0)


def test_keep_valid_stops_nan_on_the_way_back():
    x = torch.tensor([-1.0, 4.0], requires_grad=True)
    keep_valid(keep_valid(x, x > 0).sqrt(), x > 0)[1].backward()
    assert x.grad.tolist() == [0.0, 0.25]


def test_shapes_that_would_broadcast_raise():
    with pytest.raises(ValueError, match=r"`x` has shape \(5,\); it must have shape \(1,\)"):
        masked_mean(X, torch.ones(1))
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        checked_mask(MASK, ndim=2)
