"""What two models compute, and whether it is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from biofx.capture import split_inputs
from biofx.capture.tracer import unchanged


def run_in_eval_mode(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors that a model returns in evaluation mode.

    Neither the model's mode and buffers, nor the inputs, nor the global random number generators change.

    Args:
        model: any module.
        example_inputs: arguments of the model, as for `transform`.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    with undisturbed(model), torch.no_grad():
        return _tensors(model.eval()(*args, **kwargs))


def run_from_seed(model: nn.Module, example_inputs: Any, buffers: Sequence[str]) -> list[Tensor]:
    """The tensors that a model returns in the mode that it is in, with random numbers from one seed, and some buffers.

    Neither the model's buffers, nor the inputs, nor the global random number generators change.

    Args:
        model: any module.
        example_inputs: arguments of the model, as for `transform`.
        buffers: the buffers whose values afterwards are returned as well, by name.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        outputs = _tensors(model(*args, **kwargs))
        return [*outputs, *(model.get_buffer(name) for name in buffers)]


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model compute on copies of its buffers while the block runs; restore its attributes and random numbers."""
    saved = [(module, dict(module._buffers), module.training) for module in model.modules()]
    copies = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for module, buffers, _ in saved:
        module._buffers.update({name: copies[id(b)] for name, b in buffers.items() if b is not None})
    try:
        with unchanged(model), torch.random.fork_rng():
            yield
    finally:
        for module, buffers, mode in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            module.training = mode


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str | None:
    """How tensors differ by more than rounding, in words, or None if they do not.

    Rounding is at most √ε times the largest finite magnitude that is expected, or √ε if that is below 1, with ε the
    precision of the dtype. What is not a floating-point number has to be equal. Equal infinities, and NaNs, are equal.

    Example:
        >>> import torch
        >>> from biofx.compare import difference
        >>> difference([torch.tensor([1.0, torch.inf])], [torch.tensor([1.5, torch.inf])])
        'output 0 differs by 0.5 (at most 0.000345 is rounding)'
    """
    if len(expected) != len(actual):
        return f"there are {len(actual)} outputs instead of {len(expected)}"
    for index, (old, new) in enumerate(zip(expected, actual, strict=True)):
        if found := _difference(old.detach().cpu(), new.detach().cpu()):
            return f"output {index} {found}"
    return None


def _difference(old: Tensor, new: Tensor) -> str | None:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"is {_kind(new)} instead of {_kind(old)}"
    unequal = (old != new) & ~(old.isnan() & new.isnan())
    if not unequal.any():
        return None
    wide = torch.promote_types(old.dtype, torch.float64)
    a, b = old.to(wide), new.to(wide)
    gap = float((a - b)[unequal].abs().nan_to_num(torch.inf, torch.inf).max())
    if not (old.is_floating_point() or old.is_complex()):
        return f"differs by {gap:.3g}"
    largest = float(torch.where(a.isfinite(), a.abs(), 0).max())
    tolerance = torch.finfo(old.dtype).eps ** 0.5 * max(1.0, largest)
    return None if gap <= tolerance else f"differs by {gap:.3g} (at most {tolerance:.3g} is rounding)"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
