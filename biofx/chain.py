"""Chains: the nodes between the `get_attr` of a weight and the operator that consumes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from biofx.provenance import RECORD, Inserted, inserted


def attribute(root: nn.Module, target: str) -> Any:
    """The attribute that a `get_attr` node reads."""
    value: Any = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def parameter_nodes(bio: fx.GraphModule) -> dict[str, fx.Node]:
    """The one `get_attr` node of every parameter that the graph reads, by the parameter's name."""
    nodes = {node.target: node for node in bio.graph.find_nodes(op="get_attr")}
    return {name: nodes[name] for name, _ in bio.named_parameters() if name in nodes}


def chain(start: fx.Node) -> list[fx.Node]:
    """The chain that begins at the `get_attr` of a parameter: that node, and then the inserted ones in order."""
    nodes = [start]
    while True:
        following = [n for n in nodes[-1].users if _is_link(n, nodes[-1])]
        if len(following) != 1:
            return nodes
        nodes.append(following[0])


def _is_link(node: fx.Node, previous: fx.Node) -> bool:
    origin = inserted(node)
    return origin is not None and origin.slot.on_chain and node.op != "get_attr" and node.args[0] is previous


def evaluate(bio: fx.GraphModule, nodes: list[fx.Node]) -> Tensor:
    """Run a chain on the present values: the tensor that the operator receives, differentiable in the raw weight."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        return values[node] if node in values else attribute(bio, str(node.target))

    for node in nodes:
        if node.op == "get_attr":
            values[node] = value(node)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # links are functions, see `append`
    return values[nodes[-1]]  # type: ignore[no-any-return]


def compute(bio: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a call, or the output, makes of arguments."""
    if node.op == "call_module":
        return bio.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]


def append(start: fx.Node, origin: Inserted, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """Put `target(weight, *args)` into the chain at the place of its slot, behind what is there already.

    All readers of the chain read the new node, directly or through the links behind it.
    """
    nodes = chain(start)
    previous = [n for n in nodes if n is start or inserted(n).slot <= origin.slot][-1]  # type: ignore[union-attr]
    readers = list(previous.users)
    latest = max([previous, *(a for a in args if isinstance(a, fx.Node))])  # nodes compare by their place in the graph
    with start.graph.inserting_after(latest):
        node = start.graph.call_function(target, (previous, *args))
    node.meta[RECORD] = origin
    for reader in readers:
        reader.replace_input_with(previous, node)
    return node


def read(start: fx.Node, origin: Inserted, target: str) -> fx.Node:
    """A `get_attr` of state that belongs to a weight, beside the weight's own."""
    with start.graph.inserting_after(start):
        node = start.graph.get_attr(target)
    node.meta[RECORD] = origin
    return node


def callee(node: fx.Node) -> str:
    """What a node calls or reads, as a short name."""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "_qualified_op_name", None)  # of a dispatcher operator
    if name is not None:
        return str(name).replace("::", ".").removeprefix("aten.")
    return str(getattr(node.target, "__name__", node.target))
