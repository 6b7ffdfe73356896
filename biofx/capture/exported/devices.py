"""Devices and dtypes: an exported graph names those of the export, but the model may move or be converted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.capture.tracer import HelperModule, unused_name
from biofx.model.control_flow import control_flow_of


class Device(HelperModule):
    """Returns the current device of the model, in place of the constant device of the export."""

    like: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, device=device), persistent=False)

    def forward(self) -> torch.device:
        """Return the device."""
        return self.like.device


def follow_device(owner: nn.Module, graph: fx.Graph, device: torch.device) -> None:
    """Replace a constant device in a graph and its subgraphs by the model's current device."""
    for module, inner in _graphs(owner, graph):
        if device not in set(_constants(inner)):
            continue
        name = unused_name(module, "device")
        module.add_module(name, Device(device).train(module.training))
        first = next(node for node in inner.nodes if node.op != "placeholder")
        with inner.inserting_before(first):
            node = inner.call_module(name)

        def named(value: Any, node: fx.Node = node) -> Any:
            return node if value == device and isinstance(value, torch.device) else value

        for user in inner.nodes:
            user.args, user.kwargs = (fx.node.map_aggregate(value, named) for value in (user.args, user.kwargs))
        if isinstance(module, fx.GraphModule):
            module.recompile()


def names_dtype(owner: nn.Module, graph: fx.Graph, dtype: torch.dtype) -> bool:
    """Whether a graph or one of its subgraphs names a dtype."""
    return any(dtype in set(_constants(inner)) for _, inner in _graphs(owner, graph))


def _graphs(owner: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """A graph and its subgraphs, each with the module that owns it."""
    yield owner, graph
    for node in graph.find_nodes(op="call_module"):
        module = control_flow_of(owner, node)
        for inner in () if module is None else module.subgraphs():
            yield from _graphs(inner, inner.graph)


def _constants(graph: fx.Graph) -> Iterator[Any]:
    found: list[Any] = []
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return (value for value in found if isinstance(value, torch.device | torch.dtype))
