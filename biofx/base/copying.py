"""Copies of models, also of those with tensors that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from biofx.base.contents import slots_of, values_within
from biofx.base.references import repoint
from biofx.base.torch_internals import HOOKS

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, dtype: torch.dtype | None = None, shared: Collection[Tensor] = ()) -> Model:
    """A copy of a model. It shares only the memory of the tensors in `shared`.

    Args:
        model: the model.
        dtype: the dtype of floating-point parameters and buffers in the copy; None keeps that of each.
        shared: parameters and buffers of the model whose memory, and therefore dtype, the copy shares.

    Raises:
        TypeError: a module keeps something in a slot, which `copy.deepcopy` of a module forgets, or its class leaves
            hooks out of copies.
    """
    for path, name in _slots(model):
        raise TypeError(f"{path}.{name}".lstrip(".") + " is in __slots__, which copies of a module do not have")
    kept: dict[int, Any] = {id(x): _like(x, x.detach()) for x in shared}
    memo = clones(model) | ({} if dtype is None else _converted(model, dtype, kept)) | kept
    result = copy.deepcopy(model, memo)
    repoint(result, memo, is_copy=True)
    parameters = dict(result.named_parameters())
    for name, parameter in model.named_parameters():
        if name in parameters:
            keep_attributes(parameters[name], parameter, memo)
    copies = dict(result.named_modules())
    for path, old in model.named_modules():
        if path in copies and any(len(getattr(old, name)) != len(getattr(copies[path], name)) for name in HOOKS):
            raise TypeError(f"{path or 'it'} has hooks, which copies of {type(old).__name__} lose")
    return result


def keep_attributes(new: Tensor, old: Tensor, memo: dict[int, Any] | None = None) -> None:
    """Give a parameter what a user noted on the one whose place it takes, such as a learning rate or a mask.

    Args:
        new: the parameter.
        old: the other one. `copy.deepcopy` of a parameter forgets its attributes, and so does `nn.Parameter(old.data)`.
        memo: as for `copy.deepcopy`, if the attributes are to be copied as well.
    """
    if type(old) is nn.Parameter:  # a subclass may keep its memory there
        vars(new).update(vars(old) if memo is None else copy.deepcopy(vars(old), memo))


def _converted(model: nn.Module, dtype: torch.dtype, but: Collection[int]) -> dict[int, Any]:
    """Parameters and buffers in another dtype, by id; converted one by one, so that memory never holds a third copy."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point() and x.dtype is not dtype]
    return {id(x): _clone(x, dtype) for x in tensors if id(x) not in but}


def _slots(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each attribute in `__slots__`: the path of its module, and its name."""
    for path, module in model.named_modules():
        yield from ((path, name) for name in slots_of(type(module)) if hasattr(module, name))


def clones(model: nn.Module) -> dict[int, Tensor]:
    """Copies of the tensors of a model that `copy.deepcopy` refuses, by id.

    These are tensors with a history, which hooks or forward left in attributes and in containers there, such as a state
    that the next call reads, and tensors without strides, such as sparse parameters.
    """
    seen = set[int]()
    parts = (part for m in model.modules() for value in vars(m).values() for part in values_within(value, seen))
    held = (part for part in parts if isinstance(part, Tensor))
    return {id(part): _clone(part) for part in held if not part.is_leaf or not has_strides(part)}


def has_strides(tensor: Tensor) -> bool:
    """Whether a tensor is laid out in strides."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _clone(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return _like(tensor, tensor.detach().to(dtype, copy=True))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
