"""Editor: changes one weight for a pass. The pass decides what to insert; the editor knows where it belongs."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.base import randomness
from biofx.base.copying import keep_attributes
from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.gains import coded, decoded, drawn
from biofx.base.noise import Counter
from biofx.base.options import activation_function
from biofx.model import chain
from biofx.model.definitions import name_of
from biofx.model.gradient_hooks import is_hook, multiplies_entries
from biofx.model.observers import check_observer
from biofx.model.operators import defined_by
from biofx.model.owners import give_synapses
from biofx.model.provenance import RECORD, inserted, record_of
from biofx.model.slots import Inserted, Slot
from biofx.model.synapses import Link, State, Synapses, is_observed, stored, stored_name, synapses_of
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.registry import Pass

Owners = dict[int, list[tuple[nn.Module, str]]]


def owners(bio: nn.Module) -> Owners:
    """The modules and keys under which each parameter is registered, by its id; several if it is tied."""
    result: Owners = {}
    for module in bio.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(id(parameter), []).append((module, key))
    return result


def replace_parameter(places: Owners, old: nn.Parameter, value: Tensor) -> None:
    """Replace a parameter by `value` in every module that registers it. A frozen parameter stays frozen."""
    new = nn.Parameter(value.detach().contiguous(), requires_grad=old.requires_grad)
    keep_attributes(new, old)
    places[id(new)] = places.pop(id(old))
    for module, key in places[id(new)]:
        module._parameters[key] = new


_COUNTERS = ("seed", "steps")  # state of every weight whose steps are counted, which passes share


class Editor:
    """Edits the chain of one parameter on behalf of one pass.

    Attributes:
        name: the parameter's name in the original model.
        generator: a CPU generator, which depends only on the seed, the pass and the parameter's name.
        changed: whether the pass changed the chain or the parameter.
        reason: why the pass left the parameter alone, if it did.
        remarks: further notes for the user.
    """

    def __init__(
        self, bio: fx.GraphModule, name: str, start: fx.Node | None, by: Pass, seed: int, places: Owners
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
        """The parameter's synapses, which are created if it has none."""
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
            chain.write_chain(self._start, stored_name(self._bio, self.name), synapses.active_links)

    def on(self, start: fx.Node) -> Editor:
        """An editor for another parameter, given by its `get_attr` node, such as the bias of a weight's operator."""
        return Editor(self._bio, chain.original_name(self._bio, start), start, self._by, self._seed, self._places)

    def insert(self, target: Callable[..., Any], *args: Any, slot: Slot | None = None) -> None:
        """Put `target(weight, *args)` into the weight's chain, at the end of the pass's slot.

        Args:
            target: a dispatcher operator or a PyTorch function whose first argument is the weight.
            args: its other arguments: constants, or state (see `state`).
            slot: another slot than that of the pass.

        Raises:
            PipelineError: the target violates what the pass's slot promises, or an argument is a tensor.
        """
        self._refuse_function(target)
        self._refuse_tensors(args, "keep it as state, and give edit.state(key, tensor)")
        self.changed = True
        link = Link(target, args, self._origin(self._by.slot if slot is None else slot))
        synapses = self._synapses()
        synapses.insert(link)
        if is_hook(target) and not multiplies_entries(target, synapses.stored, *synapses.arguments(link)):
            raise self._error(
                f"{link.name} does not multiply every entry of a gradient by a factor that does not depend on it, so "
                "it cannot act on the update of an optimizer (biofx.attach)"
            )
        self._show()

    def _refuse_function(self, target: Any) -> None:
        """Refuse a Python function in place of the operator that it defines."""
        operator = defined_by(target)
        if operator is not None:
            raise self._error(f"{target.__name__} is the function; give its operator, torch.ops.biofx.{operator}")

    def _refuse_tensors(self, args: tuple[Any, ...], instead: str) -> None:
        """Refuse tensors among the constants of a node."""
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if tensor is not None:
            raise self._error(f"a tensor of shape {tuple(tensor.shape)} is no constant of the graph; {instead}")

    def _error(self, what: str) -> PipelineError:
        return PipelineError(f"{self._by.name}: {self.name}: {what}")

    def state(self, key: str, value: Tensor) -> State:
        """Keep a tensor for this parameter (see `keep`), and return a reference to it for the arguments of `insert`."""
        self.keep(key, value)
        return State(key)

    def keep(self, key: str, value: Tensor) -> None:
        """Keep a tensor for this parameter in the buffer `<parameter>_synapses.<key>`, on the parameter's device.

        A `torch.nn.Parameter` becomes a parameter of that name, which optimizers train.

        Raises:
            PipelineError: the name is taken, or no identifier, or `value` is not a tensor.
        """
        if not isinstance(key, str) or not key.isidentifier() or keyword.iskeyword(key):
            raise self._error(f"a name of state is a Python identifier, without dots, got {key!r}")
        if not isinstance(value, Tensor):
            raise PipelineError(f"{self._by.name}: state is a tensor, got {key}={value!r}; use torch.tensor({value!r})")
        if key in _COUNTERS:
            raise PipelineError(f"{self._by.name} cannot keep a state called {key}: biofx counts steps by that name")
        if key == "gain":  # without the hook that applies it, no rule that shares it would act
            raise self._error("gain is the state that rules share; edit.gain(value) multiplies it, or use another name")
        self.changed = True
        self._synapses().keep(key, value, self._by.name)

    def gain(self, value: Tensor | None = None) -> None:
        """Give the weight a gain for every synapse, or multiply its gain by `value`.

        All rules share one gain, in the buffer `<parameter>_synapses.gain`, and one `biofx.scale_grad` that applies it.

        Args:
            value: factors, of the shape of `raw`, in the code of their dtype (`base/gains.py`); None asks for a gain,
                which is neutral if there is none yet.

        Raises:
            PipelineError: the gain that the weight has is stored nowhere.
        """
        self.changed = True
        unstored = next((x for x in self._synapses().links if x.target is torch.ops.biofx.drawn_grad), None)
        if unstored is not None:
            raise self._not_stored(unstored.origin.by, self._by.name)
        present = self._synapses().share("gain", self._by.name, links=True)
        if present is None:
            neutral = torch.ones_like(self.raw.detach(), memory_format=torch.contiguous_format)
            self._synapses().keep("gain", neutral if value is None else value, self._by.name)
            self.insert(torch.ops.biofx.scale_grad, State("gain"))
            return
        if value is not None:
            self._synapses().gain = coded(decoded(present).to(decoded(value)) * decoded(value), value.dtype)
        self._show()

    def unstored_gain(self, distribution: str, nu: float, minimum: float, maximum: float) -> None:
        """Give the weight a gain for every synapse that is not stored, but drawn whenever it acts.

        Args:
            distribution: a name in `biofx.base.gains.QUANTILES`.
            nu: its spread.
            minimum: the lower clamp.
            maximum: the upper clamp.

        Raises:
            PipelineError: another pass changes the gain, which is stored for it.
        """
        if self._synapses().state("gain") is not None:
            raise self._not_stored(self._by.name, ", ".join(self._synapses().users["gain"]))
        self.keep_seed()
        seed = State("seed")  # in place of the number of the step as well: gains are the same at every step
        self.insert(torch.ops.biofx.drawn_grad, seed, seed, self.name, distribution, nu, minimum, maximum)

    def _not_stored(self, by: str, user: str) -> PipelineError:
        return PipelineError(
            f"{by}: {self.name}: its gain is unstored, and {user} needs one that is stored; give {by} another dtype, "
            'such as "uint8", which takes one byte for each synapse'
        )

    def drawn_gain(self, distribution: str, nu: float, minimum: float, maximum: float, *, dtype: torch.dtype) -> Tensor:
        """The gains of `unstored_gain`, in the code of a dtype."""
        raw, synapses = self.raw, synapses_of(self._bio, self.name)
        seed = None if synapses is None else synapses.state("seed")
        seed = torch.tensor(self._seed, device=raw.device) if seed is None else seed
        like = torch.empty((), dtype=dtype, device=raw.device).expand(raw.shape)
        counter = Counter(seed, seed, (name_of(torch.ops.biofx.drawn_grad), self.name))
        return drawn([like], [counter], distribution, nu, minimum, maximum)[0]

    def keep_seed(self) -> None:
        """Keep the seed, from which random numbers follow, in the buffer `<parameter>_synapses.seed`.

        It is that of the first transform in which a pass needs it.
        """
        self.changed = True
        if self._synapses().share("seed", self._by.name, links=False) is None:
            self._synapses().keep("seed", torch.tensor(self._seed, dtype=torch.int64), self._by.name)

    def count_steps(self) -> None:
        """Make `biofx.attach` count the steps that the weight's optimizer takes.

        The buffer `<parameter>_synapses.steps` holds the number. The number and the seed
        (`keep_seed`) determine the random numbers of rules.
        """
        self.changed = True
        if self._synapses().share("steps", self._by.name, links=False) is None:
            self._synapses().keep("steps", torch.zeros((), dtype=torch.int64), self._by.name)
        self.keep_seed()

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
            target: a function whose first argument is the value of the node.
            args: its other arguments: constants and nodes.
        """
        self._refuse_tensors(args, "keep it in a module of yours, and give that to edit.activate")
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
        """Record that only the graph computes the output of the parameter's operator, so its Python must not run."""
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
        """Insert an observer of the output of every use of the weight.

        Args:
            operator: an observer, `torch.ops.biofx.<name>` (see `biofx.operators.observer`).
            site: the weight, whose operator returns its units on one axis (`unmet(Need.OUTPUT)` is None).
            key: the name of the state in which it accumulates.
        """
        self._refuse_unmet(site, Need.OUTPUT)
        axes = [call.use.output_axes[0] for call in site.calls]
        self._observe(operator, site, key, site.units, [*zip(site.outputs, axes, strict=True)])

    def observe_input(self, operator: Callable[..., Any], site: WeightSite, key: str) -> None:
        """Insert an observer of what every use of the weight multiplies it by: its presynaptic units.

        Args:
            operator: an observer, `torch.ops.biofx.<name>` (see `biofx.operators.observer`).
            site: the weight, whose operator reads its units on one axis (`unmet(Need.INPUT)` is None).
            key: the name of the state that it adds to.
        """
        self._refuse_unmet(site, Need.INPUT)
        places = [(call.source, call.use.source_axes[0]) for call in site.calls]
        self._observe(operator, site, key, site.presynaptic_units, [(n, axis) for n, axis in places if n is not None])

    def _refuse_unmet(self, site: WeightSite, need: Need) -> None:
        reason = site.unmet(need)
        if reason is not None:
            raise self._error(
                f"it cannot be observed: {reason}; ask site.unmet(passes.Need.{need.name}) first, and give the reason "
                "to edit.leave"
            )

    def _observe(
        self, operator: Callable[..., Any], site: WeightSite, key: str, units: int, places: list[tuple[fx.Node, int]]
    ) -> None:
        """Insert an observer of nodes, each of which has the units on an axis."""
        raw, origin = site.raw, self._origin(Slot.OBSERVER)
        self._refuse_function(operator)
        try:
            for axis in dict.fromkeys(axis for _, axis in places):
                check_observer(operator, raw, units, axis)
        except ArgumentError as error:
            raise self._error(str(error)) from None
        dtype = torch.promote_types(raw.dtype, torch.float32)
        self.keep(key, torch.zeros((2, 2, units), device=raw.device, dtype=dtype))
        assert self._start is not None  # it has calls
        seen, synapses = (chain.state_node(self._start, each, origin) for each in (key, ""))
        for node, unit_axis in places:
            with node.graph.inserting_after(max(node, seen, synapses)):
                looks = node.graph.call_function(is_observed, (synapses, key, node))
            with node.graph.inserting_after(looks):
                observer = node.graph.call_function(operator, (node, seen, unit_axis, looks))
            looks.meta[RECORD] = observer.meta[RECORD] = origin

    def _origin(self, slot: Slot) -> Inserted:
        return Inserted((self._by.name,), self.name, slot)
