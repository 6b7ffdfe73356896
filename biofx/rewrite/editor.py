"""Editor: the hands of a pass. A pass decides what becomes of a weight; the editor inserts it in the right place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.base import randomness
from biofx.base.errors import PipelineError
from biofx.base.options import activation_function
from biofx.model import chain
from biofx.model.operators import is_hook, multiplies_entries
from biofx.model.owners import give_synapses
from biofx.model.provenance import RECORD, RunnablePass, inserted, record_of
from biofx.model.slots import Inserted, Slot
from biofx.model.synapses import Link, State, Synapses, is_observed, stored, stored_name, synapses_of

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite

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

    def __init__(
        self, bio: fx.GraphModule, name: str, start: fx.Node | None, by: RunnablePass, seed: int, places: Owners
    ) -> None:
        self.name = name
        self.generator: torch.Generator = randomness.generator(seed, by.name, self.name)
        self.changed = False
        self.reason: str | None = None
        self.remarks: list[str] = []
        self._bio = bio
        self._start = start  # None if the graph does not read it, but only Python does
        self._by = by
        self._seed = seed
        self._places = places
        self._activation: str | None = None  # name of the child that is this weight's activation

    @property
    def raw(self) -> nn.Parameter:
        """The stored parameter."""
        return stored(self._bio, self.name)

    def _synapses(self) -> Synapses:
        """The parameter's synapses, which it has from now on."""
        synapses = synapses_of(self._bio, self.name)
        if synapses is None:
            synapses = give_synapses(self._places[id(self.raw)], self.raw)
            self._places[id(synapses.stored)] = [(synapses, synapses.stored_name)]
            record_of(self._bio).synapses.add(self.name)
            self._show()
        return synapses

    def _show(self) -> None:
        synapses = synapses_of(self._bio, self.name)
        if self._start is not None and synapses is not None:
            chain.write_chain(self._start, stored_name(self._bio, self.name), synapses)

    def on(self, start: fx.Node) -> Editor:
        """An editor for another parameter, given by its `get_attr` node, such as the bias that goes with a weight."""
        return Editor(self._bio, chain.original_name(self._bio, start), start, self._by, self._seed, self._places)

    def insert(self, target: Callable[..., Any], *args: Any) -> None:
        """Put `target(weight, *args)` into the weight's chain, in the pass's slot, behind what is there already.

        Args:
            target: a dispatcher operator or a PyTorch function whose first argument is the weight.
            args: its other arguments: constants, or state (see `state`).

        Raises:
            PipelineError: the target does not do what the pass's slot promises.
        """
        self.changed = True
        link = Link(target, args, self._origin(self._by.slot))
        synapses = self._synapses()
        synapses.insert(link)
        if is_hook(target) and not multiplies_entries(target, synapses.stored, *synapses.arguments(link)):
            raise PipelineError(
                f"{self._by.name}: {self.name}: {link.name} does not multiply every entry of a gradient by a "
                "factor that does not depend on it, so it cannot act on the update of an optimizer (biofx.attach)"
            )
        self._show()

    def state(self, key: str, value: Tensor) -> State:
        """Keep a tensor for this parameter (see `keep`), and return what stands for it among arguments."""
        self.keep(key, value)
        return State(key)

    def keep(self, key: str, value: Tensor) -> None:
        """Keep a tensor for this parameter in the buffer `<parameter>_synapses.<key>`, on the parameter's device.

        Raises:
            PipelineError: there is something of that name.
        """
        self.changed = True
        self._synapses().keep(key, value, self._by.name)

    def gain(self, value: Tensor | None = None) -> None:
        """Let the weight have a gain c for every synapse, and multiply it by `value`.

        All rules share one gain, in the buffer `<parameter>_synapses.gain`, and one `biofx.scale_grad` that applies it.

        Args:
            value: factors, of the shape of `raw`; None asks for a gain, neutral if there is none yet.
        """
        self.changed = True
        present = self._synapses().share("gain", self._by.name, links=True)
        if present is None:
            neutral = torch.ones_like(self.raw.detach(), memory_format=torch.contiguous_format)
            self.insert(torch.ops.biofx.scale_grad, self.state("gain", neutral if value is None else value))
            return
        if value is not None:
            self._synapses().gain = present.to(value) * value
        self._show()

    def count_steps(self) -> None:
        """Let `biofx.attach` count the steps that the weight's optimizer takes.

        Their number is in the buffer `<parameter>_synapses.steps`. Together with the seed, in the buffer beside it, it
        decides which random numbers rules draw. The seed is that of the first transform in which a pass needs it.
        """
        self.changed = True
        if self._synapses().share("steps", self._by.name, links=False) is None:
            self.keep("steps", torch.zeros((), dtype=torch.int64))
            self.keep("seed", torch.tensor(self._seed, dtype=torch.int64))
        else:
            self._synapses().share("seed", self._by.name, links=False)

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
        self._rewire()
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
        self._rewire()
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

    def _rewire(self) -> None:
        """Note that only the graph computes what the operator of the parameter returns."""
        self._synapses().output_rewritten_by = self._by.name

    def _put_behind(self, node: fx.Node, new: fx.Node) -> fx.Node:
        self.changed = True
        new.meta[RECORD] = self._origin(Slot.OUTPUT)
        for reader in list(node.users):
            origin = inserted(reader)
            if reader is not new and (origin is None or origin.slot is not Slot.OBSERVER):
                reader.replace_input_with(node, new)
        return new

    def observe(self, operator: Callable[..., Any], site: WeightSite, key: str) -> None:
        """Let an observer look at what every use of the weight returns.

        Args:
            operator: an observer, `torch.ops.biofx.<name>` (see `biofx.model.operators.observer`).
            site: the weight, whose operator returns its units on one axis (`why_no_output` is None).
            key: the name of the state that it adds to.
        """
        raw, origin, (unit_axis,) = site.raw, self._origin(Slot.OBSERVER), site.calls[0].use.output_axes
        dtype = torch.promote_types(raw.dtype, torch.float32)
        self.keep(key, torch.zeros((2, 2, site.units), device=raw.device, dtype=dtype))
        assert self._start is not None, f"{self.name}: what its operator returns is out of reach"
        seen, synapses = (chain.state_node(self._start, each, origin) for each in (key, ""))
        for use in site.outputs:
            with use.graph.inserting_after(max(use, seen, synapses)):
                looks = use.graph.call_function(is_observed, (synapses, key, use))
            with use.graph.inserting_after(looks):
                node = use.graph.call_function(operator, (use, seen, unit_axis, looks))
            looks.meta[RECORD] = node.meta[RECORD] = origin

    def _origin(self, slot: Slot) -> Inserted:
        return Inserted((self._by.name,), self.name, slot)
