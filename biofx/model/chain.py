"""Chains: the nodes between the `get_attr` of a weight and the operator that consumes it.

A chain shows the links of the weight's synapses (`biofx.model.synapses`) in the graph. The links are the truth; the
nodes are generated from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from biofx.base.torch_internals import empty_like, qualified_name
from biofx.model.definitions import name_of, written_name
from biofx.model.provenance import RECORD, inserted, is_transformed, record_of
from biofx.model.synapses import State, Synapses, stored_name, stored_parameters, synapses_of

if TYPE_CHECKING:
    from biofx.model.slots import Inserted
    from biofx.model.synapses import Link


def attribute(root: nn.Module, target: str) -> Any:
    """Return the attribute that a `get_attr` node reads."""
    value: Any = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def modules_around(node: fx.Node) -> list[str]:
    """The paths of the modules whose forward made a node, from the model inwards."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def module_of(node: fx.Node) -> str:
    """The path of the innermost of them; empty for the model, and if no forward made the node."""
    return next(reversed(modules_around(node)), "")


def parameter_nodes(bio: fx.GraphModule) -> dict[str, fx.Node]:
    """The `get_attr` node of every stored parameter that the graph reads, by the name in the original model."""
    nodes = {node.target: node for node in bio.graph.find_nodes(op="get_attr")}
    targets = {name: stored_name(bio, name) for name, _ in stored_parameters(bio)}
    return {name: nodes[target] for name, target in targets.items() if target in nodes}


def original_name(bio: nn.Module, node: fx.Node) -> str:
    """Return the name that a parameter has in the original model, from the `get_attr` node that reads it."""
    path, _, _ = str(node.target).rpartition(".")
    try:
        is_stored = path != "" and isinstance(bio.get_submodule(path), Synapses)
    except AttributeError:  # the module, or its synapses, were replaced
        is_stored = is_transformed(bio) and path.removesuffix("_synapses") in record_of(bio).synapses
    return path.removesuffix("_synapses") if is_stored else str(node.target)


def chain(start: fx.Node) -> list[fx.Node]:
    """Return the chain of a parameter: its `get_attr` node, then the inserted nodes in order."""
    nodes = [start]
    while True:
        following = [n for n in nodes[-1].users if _is_link(n, nodes[-1])]
        if len(following) != 1:
            return nodes
        nodes.append(following[0])


def _is_link(node: fx.Node, previous: fx.Node) -> bool:
    origin = inserted(node)
    return origin is not None and origin.slot.on_chain and node.op != "get_attr" and node.args[0] is previous


def write_chain(start: fx.Node, target: str, links: Sequence[Link]) -> None:
    """Write links behind the `get_attr` node of a weight, in place of its present chain; it reads `target` from now."""
    start.target = target
    old = chain(start)
    readers = [user for user in old[-1].users if user not in old]
    for reader in readers:
        reader.replace_input_with(old[-1], start)
    _erase(old[1:])
    end = start
    for link in links:
        args = tuple(state_node(start, a.key, link.origin) if isinstance(a, State) else a for a in link.args)
        latest = max([end, *(arg for arg in args if isinstance(arg, fx.Node))])  # nodes compare by their position
        with start.graph.inserting_after(latest):
            end = start.graph.call_function(link.target, (end, *args))
        end.meta[RECORD] = link.origin
    for reader in readers:
        reader.replace_input_with(start, end)


def update_chains(bio: fx.GraphModule) -> None:
    """Rewrite each chain that differs from the active links, as after a copy: copies are not attached."""
    has_changed = False
    for name, start in parameter_nodes(bio).items():
        synapses = synapses_of(bio, name)
        if synapses is not None and not is_current(start, synapses):
            write_chain(start, stored_name(bio, name), synapses.active_links)
            has_changed = True
    if has_changed:
        number_nodes(bio)


def is_current(start: fx.Node, synapses: Synapses | None) -> bool:
    """Whether the chain of a weight shows its active links, with their state and their other arguments."""
    written = [
        (node.target, [str(a.target) if isinstance(a, fx.Node) else a for a in node.args[1:]], node.kwargs)
        for node in chain(start)[1:]
    ]
    return written == [
        (link.target, [_state_target(start, a.key) if isinstance(a, State) else a for a in link.args], {})
        for link in (synapses.active_links if synapses else ())
    ]


def _erase(links: list[fx.Node]) -> None:
    for node in reversed(links):
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            if source.op == "get_attr" and inserted(source) is not None and not source.users:
                source.graph.erase_node(source)


def state_node(start: fx.Node, key: str, origin: Inserted) -> fx.Node:
    """Return the `get_attr` node of a state, and insert it after the node of the weight if there is none.

    Args:
        start: the `get_attr` node of the weight.
        key: the state's name; empty for the synapses themselves.
        origin: the passes that read the state.
    """
    target = _state_target(start, key)
    found = start.next
    while inserted(found) is not None:  # what passes inserted stands side by side: state, and the links of the chain
        if found.op == "get_attr" and found.target == target:
            start.append(found)
            return found
        found = found.next
    with start.graph.inserting_after(start):
        found = start.graph.get_attr(target)
    found.meta[RECORD] = origin
    return found


def _state_target(start: fx.Node, key: str) -> str:
    return f"{str(start.target).rpartition('.')[0]}.{key}".rstrip(".")


def compute(bio: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Compute a call node, or the output node, from the values of its arguments."""
    if node.op == "call_module":
        return bio.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]


def callee(node: fx.Node) -> str:
    """Return a short name of the function that a node calls, or of the attribute that it reads."""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "overloadpacket", node.target)
    name = qualified_name(packet)  # only dispatcher operators have one
    if name is not None:
        return written_name(name).replace("::", ".").removeprefix("aten.")
    return str(getattr(node.target, "__name__", node.target))


def number_nodes(bio: fx.GraphModule) -> None:
    """Number the nodes in graph order, so that the generated code reads in order, and recompile."""
    numbered = empty_like(bio.graph)
    copies: dict[fx.Node, fx.Node] = {}
    for node in bio.graph.nodes:
        args, kwargs = (fx.map_arg(a, copies.__getitem__) for a in (node.args, node.kwargs))
        copies[node] = numbered.create_node(node.op, node.target, args, kwargs, name=_short_name(bio, node))
        copies[node].meta = dict(node.meta)
    bio.graph = numbered


def _short_name(bio: nn.Module, node: fx.Node) -> str | None:
    """Return a name for a node that reads a weight or its state, or calls biofx; None for others, which fx names."""
    if node.op == "call_function" and name_of(node.target):
        return written_name(name_of(node.target))
    name = None if node.op != "get_attr" else original_name(bio, node)
    if name is None or name == node.target:
        return None
    key = str(node.target).rpartition(".")[2]
    try:
        synapses = bio.get_submodule(str(node.target).rpartition(".")[0])
    except AttributeError:  # they were replaced
        return None
    words = name if isinstance(synapses, Synapses) and key == synapses.stored_name else f"{name}_{key}"
    return words.replace(".", "_") if words[0].isalpha() else "_" + words.replace(".", "_")
