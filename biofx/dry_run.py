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

from biofx.capture import split_inputs
from biofx.chain import attribute
from biofx.compare import undisturbed
from biofx.errors import ArgumentError
from biofx.unit_operators import Kind, argument, operation
from biofx.weight_sites import WeightSite

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
    def __init__(self, bio: fx.GraphModule, given: dict[str, Any]) -> None:
        self.values: Values = {}
        self._bio = bio
        self._given = given
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> Values:
        waiting = Counter(source for node in self._bio.graph.nodes for source in node.all_input_nodes)
        for node in self._bio.graph.nodes:
            self.env[node] = self._value(node)
            self.values[node] = pytree.tree_map_only(Tensor, _without_values, self.env[node])
            for source in node.all_input_nodes:
                waiting[source] -= 1
                if not waiting[source]:
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
        if node.op == "call_module":
            return self._bio.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]


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
        self._uses = {use: site for site in sites.values() for use in site.calls}
        self._times = times
        self._side = side
        self._device = next((parameter.device for parameter in bio.parameters()), None)
        self._asked = self._all_asked()

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._bio, str(node.target))
        value = UNKNOWN
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
        site = self._uses.get(node)
        if site is None:
            return
        source = site.operator.argument(node, 0, "input")
        value, axis = self.env[source], site.operator.channel_axis
        if not isinstance(value, Tensor) or value.dim() < -axis or value.shape[axis] != site.presynaptic_units:
            self.failures += 1
            self.env[source] = self._input_of(site)

    def _input_of(self, site: WeightSite) -> Tensor:
        space = -1 - site.operator.channel_axis
        times = () if space else self._times
        shape = (2, *times, site.presynaptic_units, *[self._side] * space)
        return torch.zeros(shape, dtype=site.raw.dtype, device=site.raw.device)

    def _all_asked(self) -> dict[fx.Node, Tensor]:
        """What the first reader of each node asks for, through operators that act on each value by itself."""
        asked: dict[fx.Node, Tensor] = {}
        for node in reversed(self._bio.graph.nodes):
            if node in self._uses:
                site = self._uses[node]
                asked[site.operator.argument(node, 0, "input")] = self._input_of(site)
            elif self._looks_up(node):
                asked[node.all_input_nodes[0]] = torch.zeros(2, SEQUENCE, dtype=torch.int64, device=self._device)
            elif node in asked and node.op.startswith("call_"):
                if operation(node, self._bio).kind in (Kind.KEEP, Kind.NORM, Kind.MERGE):
                    asked.update(dict.fromkeys(node.all_input_nodes, asked[node]))
        return asked

    def _looks_up(self, node: fx.Node) -> bool:
        """Whether a node is an embedding, whose input are integers."""
        if node.op == "call_module":
            return isinstance(self._bio.get_submodule(str(node.target)), nn.Embedding | nn.EmbeddingBag)
        return node.target is F.embedding and isinstance(argument(node, self._bio, 0, "input"), fx.Node)


def _without_values(tensor: Tensor) -> Tensor:
    return tensor.to("meta") if tensor.is_floating_point() else tensor.cpu()
