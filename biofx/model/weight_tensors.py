"""Weight tensors: what a read of `module.weight` returns; a write into one takes effect or raises."""

from __future__ import annotations

import operator
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError
from biofx.base.torch_internals import ASKED_OF_LEAVES, NO_TORCH_FUNCTION, StorageWeakRef, is_intercepted
from biofx.model.weight_cache import is_active

FOLD = "fold the model first (biofx.fold), and transform the result again"
LOST = (
    "the weight is computed from its synapses, so the write would be lost; change the stored tensor "
    "(biofx.weight_sites(bio)[name].raw), assign a torch.nn.Parameter to remove the synapses, or, if forward writes, "
    "transform the model without this weight (exclude=['*name']); to parametrize it, fold the model first "
    "(biofx.fold), and transform the result again"
)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ArgumentError(LOST)


def _of_stored(name: str) -> Any:
    """A property that reads and writes the attribute of the stored tensor, or that of a detached weight itself."""
    own: Any = getattr(Tensor, name)

    def read(weight: Any) -> Any:
        return own.__get__(weight) if weight.synapses is None else getattr(weight.synapses.stored, name)

    def write(weight: Any, value: Any) -> None:
        if weight.synapses is None:
            own.__set__(weight, value)
        else:
            setattr(weight.synapses.stored, name, value)

    return property(read, write)


def _told_in_forward(name: str) -> Any:
    """A property by which code recognizes parameters. While a forward runs, it answers for the stored tensor.

    So a forward decides as in the original. Elsewhere it answers for the weight: an optimizer must refuse that.
    """
    own: Any = getattr(Tensor, name)

    def read(weight: Any) -> Any:
        acts_as_parameter = weight.synapses is not None and is_active()
        return getattr(weight.synapses.stored, name) if acts_as_parameter else own.__get__(weight)

    return property(read)


def _gradient_of_computed(weight: Any) -> Any:
    if weight.synapses is None or weight.synapses.stored.grad is None:
        return Tensor.grad.__get__(weight)  # type: ignore[union-attr]
    raise ArgumentError(
        "the weight is computed from its synapses, which have the gradients: biofx.weight_sites(bio)[name].raw.grad"
    )


class WeightTensor(Tensor):
    """A weight that shares its memory with the stored tensor, so that writes take effect."""

    # As in nn.Parameter: operators return plain tensors, and run without the overhead of __torch_function__.
    __torch_function__ = NO_TORCH_FUNCTION
    synapses: Any = None  # the synapses that the weight comes from; None once it is detached
    kept_from_swapping: Any

    # These would act on this temporary tensor only, not on the stored one.
    register_hook = register_post_accumulate_grad_hook = set_ = resize_ = _refuse
    data = _of_stored("data")
    grad = _of_stored("grad")
    requires_grad = _of_stored("requires_grad")
    is_leaf, grad_fn, _base, _is_view = map(_told_in_forward, ASKED_OF_LEAVES)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set whether the stored tensor requires gradients."""
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().clone().__reduce_ex__(protocol)

    def _plain(self) -> Tensor:
        return Tensor.detach(self).as_subclass(Tensor)


class ComputedWeight(WeightTensor):
    """A weight with memory of its own: every write raises, because it would not reach the stored tensor."""

    data = property(lambda self: self.detach(), _refuse)
    grad = property(_gradient_of_computed, _refuse)
    __setitem__ = _refuse

    def detach(self) -> Tensor:
        """Return the weight without its history; writes into it raise as well."""
        return Tensor.detach(self).as_subclass(ComputedWeight)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as a read-only array."""
        array = Tensor.numpy(self._plain() if force else self.as_subclass(Tensor), force=force)
        array.flags.writeable = False
        return array


_IN_PLACE = frozenset(f"__i{name}__" for name in dir(operator))  # such as `__iadd__`


def _writes(name: str) -> bool:
    """Whether a method of tensors changes the tensor, by PyTorch's convention for names."""
    return name in _IN_PLACE or (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")


for _name in filter(_writes, dir(Tensor)):
    setattr(ComputedWeight, _name, _refuse)


def as_weight_tensor(weight: Tensor, synapses: Any) -> Tensor:
    """Wrap a weight, unless a transform or mode runs: these do not accept subclasses of tensors."""
    if type(weight) is not Tensor or is_intercepted():
        return weight
    result = weight.as_subclass(ComputedWeight if synapses.is_computed else WeightTensor)
    vars(result).update(vars(synapses.stored))  # what forward may ask of a parameter, such as a mask that a user noted
    result.synapses = synapses
    result.kept_from_swapping = weakref.ref(result)  # `torch.utils.swap_tensors` refuses what is weakly referred to
    return result


class WriteProbe:
    """Detects writes that `ComputedWeight` cannot refuse, such as through a view or by a `torch._foreach_` operator.

    Every write increments the version counter that a tensor shares with its views. The probe is a detached view, so it
    shares this counter, and gives up its memory, so it does not keep the weight alive.
    """

    def __init__(self, weight: Tensor) -> None:
        self._counter = weight.as_subclass(Tensor).detach()  # in this order, or it would keep the memory
        self._counter.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self._version = self._counter._version
        self._memory = StorageWeakRef(weight.untyped_storage())

    @property
    def is_over(self) -> bool:
        """Whether the weight and all its views are gone, so that nobody can write to it any more."""
        return bool(self._memory.expired())

    @classmethod
    def of(cls, weight: Tensor) -> WriteProbe | None:
        """Return a probe of a computed weight; None for other weights and for inference tensors."""
        return None if not isinstance(weight, ComputedWeight) or weight.is_inference() else cls(weight)

    @property
    def is_written(self) -> bool:
        """Whether the weight was written to."""
        return self._counter._version != self._version
