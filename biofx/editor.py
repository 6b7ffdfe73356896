"""Editor: the hands of a pass. A pass decides what becomes of a weight; the editor inserts it in the right place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx import chain, randomness
from biofx.capture.modes import is_training
from biofx.chain import attribute
from biofx.errors import PipelineError
from biofx.islands import WHOLE
from biofx.options import activation_function
from biofx.provenance import RECORD, Inserted, RunnablePass, Slot, inserted, record_of

Owners = dict[int, list[tuple[nn.Module, str]]]


def owners(bio: nn.Module) -> Owners:
    """All places in the module tree where a parameter is registered, by the parameter's id; several if it is tied."""
    result: Owners = {}
    for module in bio.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(id(parameter), []).append((module, key))
    return result


def replace_parameter(places: Owners, old: nn.Parameter, value: Tensor) -> None:
    """Store `value` in every place of a parameter. The old parameter is left as it is; a frozen one stays frozen."""
    new = nn.Parameter(value.detach().contiguous(), requires_grad=old.requires_grad)
    places[id(new)] = places.pop(id(old))
    for module, key in places[id(new)]:
        module._parameters[key] = new


class Editor:
    """Edits the chain of one parameter on behalf of one pass.

    Attributes:
        name: the parameter's name in the original model.
        generator: random numbers that depend on the seed, the pass and the parameter's name only. A CPU generator.
        changed: whether the pass changed the chain or the parameter.
        reason: why the pass left the parameter alone, if it did.
        remarks: what else the user should know of the parameter.
    """

    def __init__(self, bio: fx.GraphModule, start: fx.Node, by: RunnablePass, seed: int, places: Owners) -> None:
        self.name = str(start.target)
        self.generator: torch.Generator = randomness.generator(seed, by.name, self.name)
        self.changed = False
        self.reason: str | None = None
        self.remarks: list[str] = []
        self._bio = bio
        self._start = start
        self._by = by
        self._seed = seed
        self._places = places
        self._activation: str | None = None  # name of the child that is this weight's activation

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
        """Keep a tensor for this parameter (see `keep`), and return the node that reads it."""
        self.keep(key, value)
        return self.read(key)

    def read(self, key: str) -> fx.Node:
        """The node that reads a tensor that was kept for this parameter."""
        return chain.read(self._start, self._origin(self._by.slot), f"{self.name}_{key}")

    def keep(self, key: str, value: Tensor) -> None:
        """Keep a tensor for this parameter in a buffer named `<parameter>_<key>`, on the parameter's device.

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
        owner.register_buffer(leaf, value.to(self.raw.device).contiguous())
        record_of(self._bio).state[name] = self._by.name

    def gain(self, value: Tensor | None = None) -> None:
        """Let the weight have a gain c for every synapse, and multiply it by `value`.

        All rules share one gain, in the buffer `<parameter>_gain`, and one node `biofx.scale_grad` that applies it.

        Args:
            value: factors, of the shape of `raw`; None asks for a gain, neutral if there is none yet.
        """
        present = self._shared("gain")
        if present is None:
            neutral = torch.ones_like(self.raw.detach(), memory_format=torch.contiguous_format)
            self.insert(torch.ops.biofx.scale_grad, self.state("gain", neutral if value is None else value))
        elif value is not None:
            path, _, leaf = f"{self.name}_gain".rpartition(".")
            setattr(self._bio.get_submodule(path), leaf, present.to(value) * value)

    def count_steps(self) -> None:
        """Let `biofx.attach` count the steps that the weight's optimizer takes, in the buffer `<parameter>_steps`.

        With the seed, in `<parameter>_seed`, that is the position of all random numbers that rules draw at steps. The
        seed is that of the first transform in which a pass needs it.
        """
        self.changed = True
        if self._shared("steps") is None:
            self.keep("steps", torch.zeros((), dtype=torch.int64))
            self.keep("seed", torch.tensor(self._seed, dtype=torch.int64))

    def _shared(self, key: str) -> Tensor | None:
        """State that several passes use: note that this pass does, too."""
        name, state = f"{self.name}_{key}", record_of(self._bio).state
        if name not in state:
            return None
        self.changed = True
        state[name] = ", ".join(dict.fromkeys([*state[name].split(", "), self._by.name]))
        for node in self._start.graph.find_nodes(op="get_attr", target=name):
            # The node that applies the gain is shared like the gain; others that read shared state are one pass's own.
            for sharing in (node, *(node.users if key == "gain" else ())):
                origin = inserted(sharing)
                if origin is not None:
                    sharing.meta[RECORD] = replace(origin, by=state[name])
        return attribute(self._bio, name)  # type: ignore[no-any-return]

    def replace_raw(self, value: Tensor) -> None:
        """Store another tensor as the parameter, under all names that it is tied to."""
        self.changed = True
        replace_parameter(self._places, self.raw, value)

    def leave(self, reason: str) -> None:
        """Leave the parameter alone; `summary` shows the reason."""
        self.reason = reason

    def remark(self, text: str) -> None:
        """Tell the user something about the parameter; `summary` shows it."""
        self.remarks.append(text)

    def after(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert `target(node, *args)` behind a node; all readers of the node read the new one.

        Args:
            node: a node of the graph, such as one of a site's `uses`.
            target: a function whose first argument is what the node computes.
            args: its other arguments.
        """
        with node.graph.inserting_after(node):
            return self._put_behind(node, node.graph.call_function(target, (node, *args)))

    def activate(self, node: fx.Node, activation: Any) -> fx.Node:
        """Insert an activation behind a node; all readers of the node read the activation's value.

        Args:
            node: a node of the graph.
            activation: a function's name (see `options.check_activation`), a function or a module.
        """
        if isinstance(activation, str):
            activation = activation_function(activation)
        if not isinstance(activation, nn.Module):
            return self.after(node, activation)
        if self._activation is None:
            self._activation = f"{self.name.replace('.', '_')}_activation"
            if hasattr(self._bio, self._activation):
                raise PipelineError(
                    f"{self._by.name} keeps its activation in {self._activation}, but the model has that attribute"
                )
            self._bio.add_module(self._activation, copy.deepcopy(activation).to(self.raw.device, self.raw.dtype))
        child = self._activation
        with node.graph.inserting_after(node):
            return self._put_behind(node, node.graph.call_module(child, (node,)))

    def _put_behind(self, node: fx.Node, new: fx.Node) -> fx.Node:
        self.changed = True
        new.meta[RECORD] = self._origin(Slot.OUTPUT)
        for reader in list(node.users):
            origin = inserted(reader)
            if reader is not new and (origin is None or origin.slot is not Slot.OBSERVER):
                reader.replace_input_with(node, new)
        return new

    def observe(self, operator: Callable[..., Any], uses: Sequence[fx.Node], unit_axis: int, state: fx.Node) -> None:
        """Let an observer look at what every use of the weight returns.

        Args:
            operator: an observer, `torch.ops.biofx.<name>` (see `biofx.operators.observer`).
            uses: the site's uses.
            unit_axis: axis of their output that runs over units.
            state: the node of the buffer that it adds to.
        """
        self.changed = True
        origin = self._origin(Slot.OBSERVER)
        for use in uses:
            after = max(use, state)
            with use.graph.inserting_after(after):
                mode = use.graph.call_function(is_training, (self._whole_model(origin), use))
            with use.graph.inserting_after(mode):
                node = use.graph.call_function(operator, (use, state, unit_axis, mode))
            mode.meta[RECORD] = node.meta[RECORD] = origin

    def _whole_model(self, origin: Inserted) -> fx.Node:
        """The node that reads the model itself, before all that may use it."""
        graph = self._start.graph
        first = next(node for node in graph.nodes if node.op != "placeholder")
        present: fx.Node | None = next(iter(graph.find_nodes(op="get_attr", target=WHOLE)), None)
        if present is None:
            with graph.inserting_before(first):
                present = graph.get_attr(WHOLE)
            present.meta[RECORD] = origin
        elif present is not first:
            first.prepend(present)
        return present

    def _origin(self, slot: Slot) -> Inserted:
        return Inserted(self._by.name, self.name, slot)
