"""Fold: replace every chain by the one plain weight that it computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from biofx.chain import chain, evaluate, parameter_nodes
from biofx.editor import owners, replace_parameter
from biofx.errors import ArgumentError
from biofx.provenance import RECORD, Slot, inserted, inserted_nodes, record_of, unwrap


def fold(bio: nn.Module, into: nn.Module | None = None) -> nn.Module:
    """A plain model that computes what the transformed one computes, at the original's cost.

    Every chain becomes one weight with the values that its operator received; gains, signs and hooks are gone. Names,
    order and shapes in the state are the original's, so `original.load_state_dict(fold(bio).state_dict())` works. With
    a per-synapse activation the operator stays the wider one that computes it, without its training-time nodes.

    Args:
        bio: a model made by `biofx.transform`; it stays as it is.
        into: an instance of the original model to fill with the folded state, instead of building a new one.

    Returns:
        `into`, or a new `GraphModule` that shares no tensor with `bio`, in the same mode.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, or its state does not fit `into`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Linear(3, 2)
        >>> bio = biofx.transform(model, [passes.SplitSynapses(synapses=4)])
        >>> plain = biofx.fold(bio)
        >>> {name: tuple(value.shape) for name, value in plain.state_dict().items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> biofx.fold(bio, into=model) is model
        True
    """
    bio = unwrap(bio)
    record_of(bio)
    plain = copy.deepcopy(bio)
    assert isinstance(plain, fx.GraphModule)
    places = owners(plain)
    _drop_observers(plain.graph)
    for start in parameter_nodes(plain).values():
        _fold_chain(plain, chain(start), places)
    _drop_state(plain)
    plain.recompile()
    return plain if into is None else _fill(into, plain)


def _fold_chain(plain: fx.GraphModule, nodes: list[fx.Node], places: Any) -> None:
    start, *links = nodes
    if not links:
        return
    with torch.no_grad():
        weight = evaluate(plain, nodes)
    parameter = plain.get_parameter(str(start.target))
    # A chain of gradient hooks ends in a view of the parameter itself: same values, nothing to store.
    if weight.shape != parameter.shape or not torch.equal(weight, parameter):
        replace_parameter(places, parameter, weight)
    links[-1].replace_all_uses_with(start)
    for node in reversed(links):
        sources = node.all_input_nodes
        plain.graph.erase_node(node)
        for source in sources:
            if source.op == "get_attr" and inserted(source) is not None and not source.users:
                plain.graph.erase_node(source)


def _drop_observers(graph: fx.Graph) -> None:
    for node, origin in reversed(list(inserted_nodes(graph))):
        if origin.slot is Slot.OBSERVER:
            graph.erase_node(node)
    for node, _ in list(inserted_nodes(graph)):
        if node.op == "get_attr" and not node.users:  # the observers' state
            graph.erase_node(node)


def _drop_state(plain: fx.GraphModule) -> None:
    for name in record_of(plain).state:
        path, _, leaf = name.rpartition(".")
        delattr(plain.get_submodule(path), leaf)
    _keep_constants(plain)
    delattr(plain, RECORD)
    plain.meta.pop(RECORD, None)
    for node in plain.graph.nodes:
        node.meta.pop(RECORD, None)


def _keep_constants(plain: fx.GraphModule) -> None:
    """Constants of forward outlive the record that kept them."""
    for node in plain.graph.find_nodes(op="get_attr"):
        prefix, _, name = str(node.target).partition(".")
        if prefix == RECORD:
            plain.register_buffer(name, getattr(record_of(plain), name), persistent=False)
            node.target = name


def _fill(into: nn.Module, plain: nn.Module) -> nn.Module:
    state, target = plain.state_dict(), into.state_dict()
    for name in [*state, *target]:
        shapes = [f"{tuple(s[name].shape)}" if name in s else "missing" for s in (state, target)]
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"fold: {type(into).__name__} is not the model that was transformed: "
                f"{name} is {shapes[0]} in the folded model and {shapes[1]} in it"
            )
    into.load_state_dict(state)
    return into
