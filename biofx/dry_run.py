"""Dry run: what every node of a graph computes, on example inputs or on inputs of a size that fits."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from biofx.chain import attribute, compute
from biofx.errors import ArgumentError
from biofx.operator_kinds import Kind, argument, operation
from biofx.trial import split_inputs, undisturbed
from biofx.weights.operators import BATCH, LENGTH, SIDE, TIMES, Source
from biofx.weights.paths import Use
from biofx.weights.sites import WeightSite

SEQUENCE = 8  # length of a sequence, if there are no example inputs
SIDES = (16, 32, 64, 224)  # lengths of the axes of space that are tried, if there are no example inputs


class Unknown:
    """The value of a node that could not be computed."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = Unknown()

Values = dict[fx.Node, Any]
"""What nodes compute, with a tensor on the meta device for every tensor of floating-point numbers, or `UNKNOWN`."""


def dry_run(bio: fx.GraphModule, sites: dict[str, WeightSite], example_inputs: Any = None) -> Values:
    """Run the graph in evaluation mode, node by node.

    Without example inputs, every operator on weights and every embedding says which shape its input must have, up to
    the axes of space and of time. Those get the first lengths with which the most nodes can be computed.

    Args:
        bio: a transformed model; it stays as it is.
        sites: its weight sites.
        example_inputs: arguments of the model, as for `transform`.

    Raises:
        ArgumentError: the example inputs do not fit the model.
    """
    given = None if example_inputs is None else _bind(bio, example_inputs)
    with undisturbed(bio), torch.no_grad():
        bio.eval()
        if given is not None:
            return Runner(bio, given).run()
        runs = []
        for times, side in itertools.product(((), (SEQUENCE,)), SIDES):
            runs.append(Guesser(bio, sites, {}, times, side))
            runs[-1].run()
            if not runs[-1].failures:
                break
        return min(runs, key=lambda run: run.failures).values


def _bind(bio: fx.GraphModule, example_inputs: Any) -> dict[str, Any]:
    """Example inputs by the name of the placeholder."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    try:
        signature = inspect.signature(bio.forward, follow_wrapped=False)  # that of the graph
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"example_inputs do not fit {type(bio).__name__}.forward: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


class Runner:
    """Runs a graph on given inputs.

    Attributes:
        values: what the nodes computed.
        env: the tensors themselves, as long as some node will read them.
        kept: the nodes whose tensors stay there.
    """

    def __init__(self, bio: fx.GraphModule, given: dict[str, Any]) -> None:
        self.values: Values = {}
        self.env: dict[fx.Node, Any] = {}
        self._bio = bio
        self._given = given
        self.kept: set[fx.Node] = set()

    def run(self) -> Values:
        """Compute all nodes.

        Raises:
            ArgumentError: one of them fails.
        """
        waiting = Counter(source for node in self._bio.graph.nodes for source in node.all_input_nodes)
        for node in self._bio.graph.nodes:
            self.env[node] = self._value(node)
            self.values[node] = pytree.tree_map_only(Tensor, _without_values, self.env[node])
            for source in node.all_input_nodes:
                waiting[source] -= 1
                if not waiting[source] and source not in self.kept:
                    del self.env[source]  # free the memory
        return self.values

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._given[str(node.target).lstrip("*")]
        if node.op == "get_attr":
            return attribute(self._bio, str(node.target))
        try:
            return self._call(node)
        except Exception as error:
            path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
            where = f"{operation(node, self._bio).name} in {path}" if path else operation(node, self._bio).name
            raise ArgumentError(f"{type(self._bio).__name__} fails on example_inputs, at {where}: {error}") from error

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        return compute(self._bio, node, args, kwargs)


class Guesser(Runner):
    """Runs as far as it can, with zeros of the shape that its readers ask for in place of what is not known.

    Attributes:
        failures: the number of nodes that could not be computed, and of inputs that do not fit an operator on weights.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        sites: dict[str, WeightSite],
        given: dict[str, Any],
        times: tuple[int, ...] = (),
        side: int = SIDES[0],
    ) -> None:
        super().__init__(bio, given)
        self.failures = 0
        self._uses = {use.node: (site, use) for site in sites.values() for use in site.calls}
        self._times = times
        self._side = side
        self._device = next((parameter.device for parameter in bio.parameters()), None)
        self._asked = self._all_asked()

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._bio, str(node.target))
        value: Any = UNKNOWN
        if node.op == "placeholder":
            value = self._given.get(str(node.target).lstrip("*"), node.args[0] if node.args else UNKNOWN)
        elif not any(self.env[source] is UNKNOWN for source in node.all_input_nodes):
            self.before(node)
            try:
                value = self._call(node)
            except Exception:  # noqa: BLE001 - whatever a node says to an input of a shape that it was not made for
                value = UNKNOWN
        if value is not UNKNOWN:
            return value
        self.failures += node.op not in ("placeholder", "output")
        return self._asked.get(node, UNKNOWN)

    def before(self, node: fx.Node) -> None:
        """Make what arrives at an operator on weights fit; called before every node that can be computed."""
        if node in self._uses:
            site, use = self._uses[node]
            for source in _read_by(use):
                if not _fits(self.env[source.node], source):
                    self.failures += 1
                    self.env[source.node] = self.input_of(site, source)

    def input_of(self, site: WeightSite, source: Source) -> Tensor:
        """An input that a weight's operator takes."""
        free = {BATCH: (2,), TIMES: self._times, SIDE: (self._side,), LENGTH: (SEQUENCE,)}
        shape = itertools.chain.from_iterable((n,) if isinstance(n, int) else free[n] for n in source.like)
        dtype = torch.int64 if source.is_tokens else site.raw.dtype
        return torch.zeros(tuple(shape), dtype=dtype, device=site.raw.device)

    def _all_asked(self) -> dict[fx.Node, Tensor]:
        """What the first reader of each node asks for, through operators that act on each value by itself."""
        asked: dict[fx.Node, Tensor] = {}
        for node in reversed(self._bio.graph.nodes):
            if node in self._uses:
                site, use = self._uses[node]
                asked.update({source.node: self.input_of(site, source) for source in _read_by(use)})
            elif self._looks_up(node):
                asked[node.all_input_nodes[0]] = torch.zeros(2, SEQUENCE, dtype=torch.int64, device=self._device)
            elif node in asked and node.op.startswith("call_") and self._keeps_shape(node):
                asked.update(dict.fromkeys(node.all_input_nodes, asked[node]))
        return asked

    def _keeps_shape(self, node: fx.Node) -> bool:
        """Whether a node may return what it is given, as flattening does what is flat."""
        call = operation(node, self._bio)
        return call.kind in (Kind.KEEP, Kind.NORM, Kind.MERGE) or call.key in ("flatten", "view", "reshape")

    def _looks_up(self, node: fx.Node) -> bool:
        """Whether a node is an embedding, whose input are integers."""
        if node.op == "call_module":
            return isinstance(self._bio.get_submodule(str(node.target)), nn.Embedding | nn.EmbeddingBag)
        return node.target is F.embedding and isinstance(argument(node, self._bio, 0, "input"), fx.Node)


def _read_by(use: Use) -> list[Source]:
    """The activations that an operator on a weight reads."""
    return [source for source in use.call.sources if isinstance(source.node, fx.Node)]


def _fits(value: Any, source: Source) -> bool:
    """Whether a value can be what an operator on a weight reads."""
    if not isinstance(value, Tensor) or value.is_floating_point() is source.is_tokens:
        return False
    for axis in source.axes:
        length = source.like[axis]
        has_axis = -value.dim() <= axis < value.dim()
        stretches = len(source.axes) > 1 and (not has_axis or value.shape[axis] == 1)
        is_vector = value.dim() == 1 and axis == -2 and value.shape[0] == length
        if not stretches and not is_vector and not (has_axis and value.shape[axis] == length):
            return False
    return True


def _without_values(tensor: Tensor) -> Tensor:
    return tensor.to("meta") if tensor.is_floating_point() else tensor.cpu()
