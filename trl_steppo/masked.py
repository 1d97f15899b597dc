"""Sums, means, variances and whitening over the places where a mask is `True`.

The value at a masked place never matters, not even `nan`: it is replaced before any arithmetic, so it affects neither
the result nor a gradient. Statistics of a batch that is spread over ranks are exposed as sums and counts
([`masked_moments`]), which `reduce` adds up over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float64 tensor of statistics elementwise over all ranks and returns the sum."""


@dataclass(frozen=True)
class MaskedMoments:
    """
    Statistics of the valid elements, over all ranks when they were reduced. Each is a 0-d float64 tensor.

    Args:
        count (`torch.Tensor`):
            Number of valid elements.
        mean (`torch.Tensor`):
            Their mean; `nan` when there are none.
        squared_deviations (`torch.Tensor`):
            Sum of the squared distances from `mean`; 0 when there are none.
    """

    count: Tensor
    mean: Tensor
    squared_deviations: Tensor

    def variance(self, unbiased: bool = True) -> Tensor:
        """Sum of squared deviations / (count − 1), or / count when biased; `nan` where that is not positive."""
        return self.squared_deviations / (self.count - int(unbiased)).clamp(min=0)


def check_shape(expected: Sequence[int], **tensors: Tensor) -> None:
    """Raises a `ValueError` that names the first of `tensors` whose shape is not `expected`: nothing broadcasts."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; it must have shape {tuple(expected)}")


def checked_mask(mask: Tensor, *, ndim: int | None = None, **tensors: Tensor) -> Tensor:
    """
    The mask as booleans, once it is sure that `tensors` have its shape.

    Args:
        mask (`torch.Tensor` of any shape):
            Nonzero where an element counts.
        ndim (`int`, *optional*):
            Number of dimensions the mask must have; `None` for any.
        **tensors (`torch.Tensor`):
            What the mask belongs to, by the name an error shall use.

    Returns:
        `torch.Tensor`: boolean, of the mask's shape.

    Raises:
        `ValueError`: a shape differs, or the mask does not have `ndim` dimensions.
    """
    if ndim is not None and mask.ndim != ndim:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; it must have {ndim} dimensions")
    check_shape(mask.shape, **tensors)
    return mask.bool()


def keep_valid(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is `True`, 0 elsewhere; integers become floats. Gradients are 0 where masked."""
    # `where` and not a product: 0 · nan is nan.
    return torch.where(mask.bool(), x, 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of the valid elements as a 0-d tensor; 0 when there are none. Shapes as in [`masked_mean`]."""
    return keep_valid(x, checked_mask(mask, x=x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """
    Mean of the valid elements: Σ x / n.

    Args:
        x (`torch.Tensor` of any shape):
            Values; may require a gradient.
        mask (`torch.Tensor` of the same shape):
            `True` where an element counts.

    Returns:
        `torch.Tensor`: 0-d; `nan` when nothing counts.

    Raises:
        `ValueError`: the shapes differ.
    """
    return masked_sum(x, mask) / mask.bool().sum()


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """
    Variance of the valid elements: Σ (x − mean)² / (n − 1), or / n when biased.

    Args:
        x (`torch.Tensor` of any shape):
            Values.
        mask (`torch.Tensor` of the same shape):
            `True` where an element counts.
        unbiased (`bool`, *optional*, defaults to `True`):
            Whether to divide by n − 1.

    Returns:
        `torch.Tensor`: 0-d; `nan` with fewer than two valid elements (one when biased).

    Raises:
        `ValueError`: the shapes differ.
    """
    return masked_moments(x, mask).variance(unbiased).to(keep_valid(x, mask).dtype)


def masked_moments(x: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> MaskedMoments:
    """
    Count, mean and sum of squared deviations of the valid elements, in float64 and in two passes: first the mean over
    all ranks, then the distances from it. A single pass over Σx² would cancel where the mean is large.

    Args:
        x (`torch.Tensor` of any shape):
            Values of this rank; shapes may differ between ranks.
        mask (`torch.Tensor` of the same shape):
            `True` where an element counts.
        reduce (`Callable`, *optional*):
            Sums a 1-D float64 tensor over ranks. Called exactly twice whatever the data, so that ranks never wait for
            each other in vain. `None` for a single process.

    Returns:
        [`MaskedMoments`]: over all ranks, the same on each.

    Raises:
        `ValueError`: the shapes differ.
    """
    mask = checked_mask(mask, x=x)
    x = keep_valid(x, mask).double()
    count, total = _reduced(reduce, mask.sum(), x.sum())
    mean = total / count
    (squared_deviations,) = _reduced(reduce, keep_valid(x - mean, mask).square().sum())
    return MaskedMoments(count, mean, squared_deviations)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """
    Valid elements with mean 0 and unbiased variance 1 over all ranks: (x − mean) / √(var + eps).

    The form of TRL's `masked_whiten`, which `PPOTrainer` uses.

    Args:
        x (`torch.Tensor` of any shape):
            Values of this rank.
        mask (`torch.Tensor` of the same shape):
            `True` where an element counts.
        shift_mean (`bool`, *optional*, defaults to `True`):
            `False` adds the mean back, so that only the scale changes.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the variance.
        reduce (`Callable`, *optional*):
            Sums statistics over ranks, see [`masked_moments`].

    Returns:
        `torch.Tensor` of the same shape: 0 where masked. With fewer than two valid elements on all ranks together,
        they are returned as they are.

    Raises:
        `ValueError`: the shapes differ.
    """
    moments = masked_moments(x, mask, reduce=reduce)
    x = keep_valid(x, mask)
    if moments.count < 2:
        return x
    whitened = (x.double() - moments.mean) * torch.rsqrt(moments.variance() + eps)
    if not shift_mean:
        whitened = whitened + moments.mean
    return keep_valid(whitened, mask).to(x.dtype)


def _reduced(reduce: Reduce | None, *statistics: Tensor) -> tuple[Tensor, ...]:
    """The 0-d `statistics` summed over ranks in one call, as 0-d float64 tensors."""
    stacked = torch.stack([statistic.double() for statistic in statistics])
    return (stacked if reduce is None else reduce(stacked)).unbind()
