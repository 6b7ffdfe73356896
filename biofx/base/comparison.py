"""Whether two models compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDINGS = 4  # of the last digit: of a weight's shares, of its synapses and of their sum


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor], coarsest: torch.dtype | None = None) -> str | None:
    """How tensors differ by more than rounding, in words, or None if they do not.

    Rounding is at most √ε times the largest finite magnitude that is expected, or √ε if that is below 1, with ε the
    precision of the dtype. Other values have to be equal. Equal infinities, and NaNs, are equal.

    Args:
        expected: some tensors.
        actual: the tensors to compare with them.
        coarsest: the dtype of least precision in which they were computed (see `coarsest_dtype`); None for their own.

    Example:
        >>> import torch
        >>> from biofx.base.comparison import difference
        >>> difference([torch.tensor([1.0, torch.inf])], [torch.tensor([1.5, torch.inf])])
        'output 0 differs by 0.5 (at most 0.000345 is rounding)'
    """
    if len(expected) != len(actual):
        return f"there are {len(actual)} outputs instead of {len(expected)}"
    for index, (old, new) in enumerate(zip(expected, actual, strict=True)):
        if found := difference_of(old, new, coarsest):
            return f"output {index} {found}"
    return None


def difference_of(old: Tensor, new: Tensor, coarsest: torch.dtype | None = None) -> str | None:
    """How a tensor differs from another by more than rounding, in words, or None if it does not; see `difference`."""
    old, new = old.detach().cpu(), new.detach().cpu()
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"is {_kind(new)} instead of {_kind(old)}"
    if not old.is_nested and torch.equal(old, new):
        return None
    unequal = (old != new) & ~(old.isnan() & new.isnan())
    if not unequal.any():
        return None
    wide = torch.promote_types(old.dtype, torch.float64)
    a, b = old.to(wide), new.to(wide)
    gap = float((a - b)[unequal].abs().nan_to_num(torch.inf, torch.inf).max())
    if not (old.is_floating_point() or old.is_complex()):
        return f"differs by {gap:.3g}"
    largest = float(torch.where(a.isfinite(), a.abs(), 0).max())
    precision = max(torch.finfo(dtype).eps for dtype in (old.dtype, coarsest or old.dtype))
    tolerance = precision**0.5 * max(1.0, largest)
    return None if gap <= tolerance else f"differs by {gap:.3g} (at most {tolerance:.3g} is rounding)"


def is_rounded(old: Tensor, new: Tensor) -> bool:
    """Whether each number of a tensor differs from another's in the last digits at most, by a few roundings."""
    if (old.dtype, old.shape) != (new.dtype, new.shape) or not old.layout is new.layout is torch.strided:
        return False
    if torch.equal(old, new):
        return True
    if not old.is_floating_point():
        return False
    info = torch.finfo(old.dtype)
    return bool(((new - old).abs() <= _ROUNDINGS * info.eps * old.abs() + info.tiny).all())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
