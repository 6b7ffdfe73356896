"""Weights that are handed out: what is written into one takes effect, or raises."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError
from biofx.model.running import is_transformed

FOLD = "fold the model first (biofx.fold), and transform the result again"
LOST = (
    "the weight is computed from its synapses, so this would be lost; change what is stored "
    "(biofx.weight_sites(bio)[name].raw), assign a torch.nn.Parameter to give the synapses up, or, if forward does it, "
    "transform the model without this weight (exclude=['*name'])"
)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ArgumentError(LOST)


def _attribute(name: str, weight: Tensor) -> Any:
    return getattr(Tensor, name).__get__(weight)


def _of_stored(name: str) -> Any:
    """An attribute that is the one of what is stored."""

    def write(weight: Any, value: Any) -> None:
        setattr(weight.synapses.stored, name, value)

    return property(lambda weight: getattr(weight.synapses.stored, name), write)


class HandedOut(Tensor):
    """A weight whose numbers are those that are stored: what is written into it takes effect."""

    # As a parameter has it: operators return plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    synapses: Any  # what it is computed from

    register_hook = register_post_accumulate_grad_hook = set_ = resize_ = _refuse  # what is of this tensor alone
    data = _of_stored("data")
    grad = _of_stored("grad")
    requires_grad = _of_stored("requires_grad")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Change whether what is stored needs a gradient."""
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().clone().__reduce_ex__(protocol)

    def _plain(self) -> Tensor:
        return Tensor.detach(self).as_subclass(Tensor)


class Computed(HandedOut):
    """A weight that is computed, so that nothing may be written into it."""

    data = property(lambda self: self.detach(), _refuse)
    grad = property(lambda self: _attribute("grad", self), _refuse)
    __setitem__ = _refuse

    def detach(self) -> Tensor:
        """The weight without its history, which refuses to be written as well."""
        return Tensor.detach(self).as_subclass(Computed)

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as an array that cannot be written."""
        array = Tensor.numpy(self._plain() if force else self.as_subclass(Tensor), force=force)
        array.flags.writeable = False
        return array


_IN_PLACE = frozenset(f"__i{name}__" for name in dir(operator))  # such as `__iadd__`


def _writes(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")


for _name in filter(_writes, dir(Tensor)):
    setattr(Computed, _name, _refuse)


def handed_out(weight: Tensor, synapses: Any) -> Tensor:
    """A weight as its module hands it out, with what it is computed from."""
    if type(weight) is not Tensor or is_transformed():
        return weight
    result = weight.as_subclass(Computed if synapses.is_computed else HandedOut)
    result.synapses = synapses
    return result


class Change:
    """Whether a weight that was handed out was written, as a view of it or a list of tensors can be.

    A tensor without memory shares the counter of the weight's versions.
    """

    def __init__(self, weight: Tensor) -> None:
        self._counter = weight.detach().as_subclass(Tensor)
        self._counter.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self._version = self._counter._version

    @classmethod
    def of(cls, weight: Tensor) -> Change | None:
        """What tells of a weight whether it was written; None if nothing does."""
        return None if not isinstance(weight, Computed) or weight.is_inference() else cls(weight)

    def refuse(self) -> None:
        """Refuse that it was.

        Raises:
            ArgumentError: it was.
        """
        if self._counter._version != self._version:
            raise ArgumentError(f"a weight was written, and {LOST}")
