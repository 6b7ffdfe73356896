"""Editor: the hands of a pass. A pass decides what becomes of a weight; the editor inserts it in the right place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx import chain, randomness
from biofx.errors import PipelineError
from biofx.provenance import RECORD, Inserted, RunnablePass, Slot, record_of

Owners = Mapping[int, Sequence[tuple[nn.Module, str]]]


def owners(bio: nn.Module) -> Owners:
    """All places in the module tree where a parameter is registered, by the parameter's id; several if it is tied."""
    result: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in bio.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(id(parameter), []).append((module, key))
    return result


def replace_parameter(places: Owners, old: nn.Parameter, value: Tensor) -> None:
    """Store `value` in every place of a parameter. The old parameter is left as it is; a frozen one stays frozen."""
    new = nn.Parameter(value.detach().contiguous(), requires_grad=old.requires_grad)
    for module, key in places[id(old)]:
        module._parameters[key] = new


class Editor:
    """Edits the chain of one parameter on behalf of one pass.

    Attributes:
        name: the parameter's name in the original model.
        generator: random numbers that depend on the seed, the pass and the parameter's name only. A CPU generator.
        changed: whether the pass changed the chain or the parameter.
        reason: why the pass left the parameter alone, if it did.
    """

    def __init__(self, bio: fx.GraphModule, start: fx.Node, by: RunnablePass, seed: int, places: Owners) -> None:
        self.name = str(start.target)
        self.generator: torch.Generator = randomness.generator(seed, by.name, self.name)
        self.changed = False
        self.reason: str | None = None
        self._bio = bio
        self._start = start
        self._by = by
        self._seed = seed
        self._places = places

    @property
    def raw(self) -> nn.Parameter:
        """The stored parameter."""
        return self._bio.get_parameter(self.name)

    def on(self, start: fx.Node) -> Editor:
        """An editor for another parameter, given by its `get_attr` node, such as the bias that goes with a weight."""
        return Editor(self._bio, start, self._by, self._seed, self._places)

    def insert(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Put `target(weight, *args)` into the chain, in the pass's slot, behind what is there already.

        Args:
            target: a dispatcher operator or a PyTorch function whose first argument is the weight.
            args: its other arguments: constants, or nodes from `state`.
        """
        self.changed = True
        return chain.append(self._start, self._origin(self._by.slot), target, args)

    def state(self, key: str, value: Tensor) -> fx.Node:
        """Keep a tensor for this parameter in a buffer named `<parameter>_<key>`, and return the node that reads it.

        Raises:
            PipelineError: the model already has an attribute of that name.
        """
        name = f"{self.name}_{key}"
        path, _, leaf = name.rpartition(".")
        owner = self._bio.get_submodule(path)
        if hasattr(owner, leaf):
            raise PipelineError(
                f"{self._by.name} keeps its {key} in {name}, but the model has an attribute of that name"
            )
        owner.register_buffer(leaf, value)
        record_of(self._bio).state[name] = self._by.name
        return chain.read(self._start, self._origin(self._by.slot), name)

    def replace_raw(self, value: Tensor) -> None:
        """Store another tensor as the parameter, under all names that it is tied to."""
        self.changed = True
        replace_parameter(self._places, self.raw, value)

    def leave(self, reason: str) -> None:
        """Leave the parameter alone; `summary` shows the reason."""
        self.reason = reason

    def after(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert `target(node, *args)` behind a node; all readers of the node read the new one.

        Args:
            node: a node of the graph, such as one of a site's `uses`.
            target: a function whose first argument is what the node computes.
            args: its other arguments.
        """
        self.changed = True
        readers = list(node.users)
        with node.graph.inserting_after(node):
            new = node.graph.call_function(target, (node, *args))
        new.meta[RECORD] = self._origin(Slot.OUTPUT)
        for reader in readers:
            reader.replace_input_with(node, new)
        return new

    def _origin(self, slot: Slot) -> Inserted:
        return Inserted(self._by.name, self.name, slot)
