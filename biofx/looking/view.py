"""The view of a graph: boxes in boxes, by module. Every picture is drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import groupby
from typing import Any

from torch import Tensor, fx

from biofx.analysis.sites import find_weights
from biofx.analysis.understanding import recorded, runner
from biofx.base.errors import ArgumentError
from biofx.looking.roles import Role, role_of
from biofx.model.chain import attribute, callee, modules_around, parameter_nodes
from biofx.model.provenance import inserted, is_transformed, record_of
from biofx.recording.operations import Value

CHANGES = {"inserted": "+", "removed": "-", "changed": "~"}  # how pictures and tables of differences mark them
AT_MOST = 200  # boxes at the start and at the end of a box that holds more than twice as many


@dataclass(frozen=True)
class Box:
    """A node of the graph, or a module with all that it contains.

    Attributes:
        name: the node's name or the module's path, which nothing else in the picture has.
        label: what is written in it.
        role: what it is there for.
        facts: what is known of it, in words, by what it is.
        nodes: the names of the nodes for which it stands.
        children: its contents, in the order of the graph; empty for a node.
        count: the number of equal neighbours for which it stands.
        signs: 1, -1 or 0 for each unit that a weight reads: excitatory, inhibitory, or free.
        inserted: how many nodes of each role passes inserted inside, if it is a closed module.
    """

    name: str
    label: str
    role: Role
    facts: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    children: tuple[Box, ...] = ()
    count: int = 1
    signs: tuple[int, ...] = ()
    inserted: Mapping[Role, int] = field(default_factory=dict)

    def walk(self) -> Iterator[Box]:
        """This box and all boxes inside, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def opened(self, depth: int) -> Box:
        """This box with modules opened to a depth; closed ones contain no boxes, but say what passes inserted."""
        if depth > 0 or not self.children:
            return replace(self, children=tuple(child.opened(depth - 1) for child in self.children))
        return replace(self, children=(), inserted=self.inserted_roles())

    def inserted_roles(self) -> dict[Role, int]:
        """How many nodes of each role passes inserted inside, those of equal neighbours included."""
        if not self.children:
            return {self.role: self.count} if self.role.is_inserted else {}
        found: Counter[Role] = Counter()
        for child in self.children:
            found.update(child.inserted_roles())
        return {role: self.count * number for role, number in found.items()}


@dataclass(frozen=True)
class View:
    """What a picture shows.

    Attributes:
        root: the model.
        values: the label of the value that one node passes to another, by the names of both.
    """

    root: Box
    values: Mapping[tuple[str, str], str]

    @cached_property
    def edges(self) -> dict[tuple[str, str], str]:
        """The label of the value that one box passes to another, by the names of both; boxes without children only."""
        owner = {node: box.name for box in self.root.walk() if not box.children for node in box.nodes}
        found: dict[tuple[str, str], str] = {}
        for (source, target), label in self.values.items():
            if owner[source] != owner[target]:
                found.setdefault((owner[source], owner[target]), label)
        return found

    def opened(self, depth: int) -> View:
        """The view in which modules are opened to a depth, and those further inside are closed."""
        return replace(self, root=self.root.opened(depth))

    def opened_to_show(self, boxes: int) -> View:
        """The view in which as many levels are open as show at most a number of boxes; at least one."""
        view, depth = self.opened(1), 2
        while (deeper := self.opened(depth)) != view and len([*deeper.root.walk()]) <= boxes:
            view, depth = deeper, depth + 1
        return view


def view_of(model: fx.GraphModule, example_inputs: Any = None, changes: Mapping[str, str] | None = None) -> View:
    """The view of a graph.

    Args:
        model: a transformed model, or any other graph.
        example_inputs: arguments of the model, to show shapes; without them, only those that the graph carries.
        changes: a key of `CHANGES` for each node to be marked.
    """
    shapes = _shapes(model, example_inputs)
    signs = _signs(model) if is_transformed(model) else {}
    places = _places(model)
    leaves = {node.name: _leaf(model, node, shapes, signs) for node in model.graph.nodes}
    for name, kind in (changes or {}).items():
        leaf = leaves[name]
        leaves[name] = replace(leaf, label=f"{CHANGES[kind]} {leaf.label}", facts={**leaf.facts, "change": kind})
    names = [node.name for node in model.graph.nodes]
    values = {(a.name, n.name): shapes.get(a.name, "") for n in model.graph.nodes for a in n.all_input_nodes}
    return View(_folded(_module(model, names, leaves, places)), values)


def written_shape(shape: Sequence[int]) -> str:
    """A shape in pictures and tables."""
    return " × ".join(map(str, shape)) or "scalar"


def _shapes(model: fx.GraphModule, example_inputs: Any) -> dict[str, str]:
    carried = {n.name: n.meta["val"].shape for n in model.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    found = {name: written_shape(shape) for name, shape in carried.items()}
    if example_inputs is not None:
        run = runner(model, example_inputs)
        assert run is not None  # only inputs that are guessed may fit nothing
        try:
            values = recorded(model, run[0], by_node=True).nodes
        except ArgumentError as error:
            raise ArgumentError(f"draw: {error}") from error
        found |= {node.name: written_shape(value.shape) for node, value in values.items() if isinstance(value, Value)}
    return found


def _signs(model: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """The sign of each unit that a weight reads, by the name of the weight's node."""
    found = {}
    for site in find_weights(model).sites.values():
        if site.node is not None and site.sign is not None:
            signs = site.outgoing(site.sign.expand(site.shape))[:, :1].sign()  # all connections of a unit have one
            found[site.node.name] = tuple(map(int, signs.flatten().tolist()))
    return found


def _places(model: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """The paths of the modules around each node, outermost first."""
    stacks = {n.name: tuple(filter(None, modules_around(n))) for n in model.graph.nodes}
    known = {stack[-1]: stack for stack in stacks.values() if stack}
    weights = parameter_nodes(model) if is_transformed(model) else {}
    for node in model.graph.nodes:
        origin = inserted(node)
        if stacks[node.name]:
            continue
        if origin is not None and origin.parameter in weights:
            stacks[node.name] = stacks[weights[origin.parameter].name]
        elif node.op in ("get_attr", "call_module"):
            path = str(node.target)
            while path and path not in known:
                path = path.rpartition(".")[0]
            stacks[node.name] = known.get(path, ())
    return stacks


def _leaf(model: fx.GraphModule, node: fx.Node, shapes: Mapping[str, str], signs: Mapping[str, tuple[int, ...]]) -> Box:
    origin = inserted(node)
    called = callee(node)
    facts = {"calls" if node.op.startswith("call") else "reads" if node.op == "get_attr" else "is": called}
    label = called.rpartition(".")[2]
    if node.op in ("placeholder", "output"):
        facts["is"], label = ("an input" if node.op == "placeholder" else "the output"), node.name
    elif node.op == "call_module":
        kind = type(model.get_submodule(str(node.target))).__name__
        facts["class"], label = kind, f"{label} ({kind})"
    if node.op == "get_attr":
        value = attribute(model, str(node.target))
        if isinstance(value, Tensor):
            facts["shape"] = written_shape(value.shape)
    elif node.name in shapes:
        facts["shape"] = shapes[node.name]
    if origin is not None:
        facts |= {"weight": origin.parameter, "inserted by": origin.by}
    return Box(node.name, label, role_of(node, model), facts, (node.name,), signs=signs.get(node.name, ()))


def _module(
    model: fx.GraphModule,
    names: Sequence[str],
    leaves: Mapping[str, Box],
    places: Mapping[str, tuple[str, ...]],
    path: str = "",
    depth: int = 0,
) -> Box:
    """The box of a module, given the nodes in it and the number of modules around them."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        inside = len(places[name]) > depth
        groups.setdefault((places[name][depth] if inside else name, inside), []).append(name)
    children = []
    for (key, is_module), members in groups.items():
        child = _module(model, members, leaves, places, key, depth + 1) if is_module else leaves[key]
        # A module with one node is that node.
        children.append(child.children[0] if len(child.children) == 1 else child)
    kind = _class_at(model, path)
    facts = {"module": path or "the model", **({"class": kind} if kind else {})}
    nodes = tuple(node for child in children for node in child.nodes)
    label = path.rpartition(".")[2] + (f" ({kind})" if kind else "")
    return Box(f"module {path}", label if path else _class_of(model), Role.MODULE, facts, nodes, tuple(children))


def _class_of(model: fx.GraphModule) -> str:
    """The class of the model; of a transformed one, of the original."""
    kept = record_of(model).model_class if is_transformed(model) else None
    return (kept or type(model)).__name__


def _class_at(model: fx.GraphModule, path: str) -> str:
    """The class of the module at a path; empty for the model, and for one that is called by another name."""
    try:
        return type(model.get_submodule(path)).__name__ if path else ""
    except AttributeError:
        return ""


def _folded(box: Box) -> Box:
    """The box with runs of equal neighbours drawn once, and with the middle of very many boxes left out."""
    children = [_folded(child) for child in box.children]
    folded: list[Box] = []
    for structure, run in groupby(children, lambda child: _structure(child) if child.children else None):
        first, *others = run
        if structure is None or not others:
            folded += [first, *others]
            continue
        own, last = (box.label.partition(" ")[0] for box in (first, others[-1]))
        kind = f" ({first.facts['class']})" if "class" in first.facts else ""
        count = 1 + len(others)
        folded.append(replace(reduce(_merged, others, first), count=count, label=f"{own} … {last}{kind} × {count}"))
    if len(folded) > 2 * AT_MOST:
        left = folded[AT_MOST:-AT_MOST]
        nodes = tuple(n for b in left for n in b.nodes)
        note = Box(f"left out of {box.name}", f"… {len(left)} boxes left out …", Role.OMITTED, {}, nodes)
        folded = [*folded[:AT_MOST], note, *folded[-AT_MOST:]]
    return replace(box, children=tuple(folded))


def _merged(box: Box, other: Box) -> Box:
    """A box that stands for the nodes of another one of the same structure as well."""
    children = tuple(_merged(a, b) for a, b in zip(box.children, other.children, strict=True))
    return replace(box, nodes=box.nodes + other.nodes, children=children)


def _structure(box: Box) -> Any:
    """What two modules have in common if a picture of one stands for the other."""
    own = (box.role, box.facts.get("class"), box.facts.get("shape"), box.count)
    if not box.children:
        return (*own, box.label, box.facts.get("inserted by"))
    return (*own, tuple(map(_structure, box.children)))
