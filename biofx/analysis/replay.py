"""Replay: repeats a recorded run, shows what operators on weights receive, and may give them other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.analysis.reads import Form, WeightRead, bias_of
from biofx.base.torch_internals import pytree
from biofx.recording.operations import Recording, Value
from biofx.recording.recorder import Recorder
from biofx.recording.trees import leaves, mapped

if TYPE_CHECKING:
    from biofx.analysis.forms import Forms


@dataclass(frozen=True, eq=False)
class PendingRead:
    """An operator that is about to read a weight.

    Attributes:
        read: how it does.
        source: the activity that arrives.
        net_input: what it would return without its bias, given another weight in the shape of the parameter.
    """

    read: WeightRead
    source: Tensor
    net_input: Callable[[Tensor], Tensor]


Visitor = Callable[[PendingRead], Tensor | None]
"""Called before an operator reads a weight; returns the weight that it reads instead, or None."""


class Replay(Recorder):
    """Runs a model again on inputs on which it was recorded."""

    def __init__(self, recording: Recording, forms: Forms, seen: Mapping[WeightRead, Visitor]) -> None:
        super().__init__()
        self._seen = {recording.operations.index(read.operation): (read, see) for read, see in seen.items()}
        self._ways = {read: _way(read, forms) for read in seen}
        computed = [made.producer for way in self._ways.values() for made in way]
        self._needed = {v.index for operation in computed if operation is not None for v in operation.operands}
        self._tensors: dict[int, Tensor] = {}

    def _new(self, tensor: Tensor, kind: str, name: str = "") -> Value:
        value = super()._new(tensor, kind, name)
        if value.index in self._needed:
            self._tensors[value.index] = tensor
        return value

    def intercept(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Show an operator that reads a weight, and let it read another."""
        read, see = self._seen.get(len(self.recording.operations), (None, None))
        if read is None or see is None or read.operation.operator is not func:
            return args, kwargs
        flat, spec = pytree.tree_flatten((args, kwargs))
        recorded, _ = pytree.tree_flatten((read.operation.args, read.operation.kwargs))
        if not self._are_same(flat, recorded):  # other weights made the model go another way
            return args, kwargs
        bias = bias_of(read.operation)

        def given(new: Tensor, *, with_bias: bool) -> tuple[Any, Any]:
            own = list(flat)
            for index, value in enumerate(recorded):
                if value is read.weight:
                    own[index] = self._laid_out(read, new)
                elif value is bias and bias is not None and not with_bias:
                    own[index] = torch.zeros_like(flat[index])
            result: tuple[Any, Any] = pytree.tree_unflatten(own, spec)
            return result

        def net_input(new: Tensor) -> Tensor:
            own_args, own_kwargs = given(new, with_bias=False)
            result: Tensor = self.execute(func, own_args, own_kwargs, read.operation.args)
            return result

        source = next(leaf for leaf, value in zip(flat, recorded, strict=True) if value is read.source)
        new = see(PendingRead(read, source, net_input))
        return (args, kwargs) if new is None else given(new, with_bias=True)

    def _are_same(self, given: list[Any], recorded: list[Any]) -> bool:
        """Whether an operator receives the tensors that it received in the recorded run."""
        now = [self.value(leaf).index if isinstance(leaf, Tensor) else None for leaf in given]
        return now == [leaf.index if isinstance(leaf, Value) else None for leaf in recorded]

    def _laid_out(self, read: WeightRead, weight: Tensor) -> Tensor:
        """A weight in the shape of the parameter as an operator reads it."""
        tensors = {**self._tensors, read.parameter.index: weight}
        for made in self._ways[read]:
            operation = made.producer
            assert operation is not None
            args, kwargs = mapped(Value, lambda value: tensors[value.index], (operation.args, operation.kwargs))
            results = list(leaves(Tensor, operation.operator(*args, **kwargs)))
            tensors[made.index] = results[operation.outputs.index(made)]
        return tensors[read.weight.index]


def _way(read: WeightRead, forms: Forms) -> list[Value]:
    """The tensors that are computed from a parameter, up to the one that is read as its weight."""
    way: list[Value] = []
    made = read.weight
    while made is not read.parameter and made.producer is not None:
        way.insert(0, made)
        found = ((value, forms.found.get(value)) for value in made.producer.operands)
        made = next(v for v, form in found if isinstance(form, Form) and form.parameter is read.parameter)
    return way
