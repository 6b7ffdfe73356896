"""Differences: what distinguishes the graphs of two models, node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from biofx.base.copying import copied
from biofx.base.errors import ArgumentError
from biofx.base.tables import Table
from biofx.capture.preconditions import check_model
from biofx.capture.symbolic import capture
from biofx.looking.drawing import check_path, write
from biofx.looking.inspection import written_arguments
from biofx.looking.roles import Role
from biofx.looking.view import CHANGES, Box, View, view_of, written_shape
from biofx.model.chain import attribute, callee, module_of, original_name
from biofx.model.provenance import inserted, is_transformed, unwrapped, without_wrappers


@dataclass(frozen=True)
class Change:
    """A node that one of two graphs has, or that differs between them.

    Attributes:
        kind: `inserted`, `removed` or `changed`.
        node: the node's name.
        calls: what it calls or reads; of a changed node, in both graphs.
        arguments: its arguments, likewise.
        weight: the weight on whose way it stands, if a pass inserted it.
        passes: the passes that inserted it.
    """

    kind: str
    node: str
    calls: str
    arguments: str
    weight: str
    passes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Difference:
    """What distinguishes the graphs of two models; `biofx.diff` makes it, and as a string it is a table.

    Attributes:
        before: the first graph.
        after: the second graph.
        changes: the nodes that differ, in the order of the second graph; removed nodes stand where they were.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    changes: tuple[Change, ...]

    @property
    def inserted(self) -> tuple[Change, ...]:
        """The nodes of the second graph only."""
        return self._of("inserted")

    @property
    def removed(self) -> tuple[Change, ...]:
        """The nodes of the first graph only."""
        return self._of("removed")

    @property
    def changed(self) -> tuple[Change, ...]:
        """The nodes that call another function or have other arguments in the second graph."""
        return self._of("changed")

    def _of(self, kind: str) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.kind == kind)

    def draw(self, path: str | Path, *, depth: int | None = None) -> None:
        """Draw the second graph: `+` marks what was inserted, `~` what was changed, and `-` what was removed.

        Args:
            path: a file, with a suffix that `biofx.draw` knows.
            depth: how many levels of modules are open, as for `biofx.draw`.

        Raises:
            ArgumentError: as for `biofx.draw`.
        """
        path = check_path(path, depth)
        view = view_of(self.after, None, {change.node: change.kind for change in (*self.inserted, *self.changed)})
        removed = tuple(
            Box(f"removed {change.node}", f"- {change.node}", Role.OMITTED, {"was": change.calls})
            for change in self.removed
        )
        root = replace(view.root, children=(*view.root.children, *removed))
        write(View(root, view.values), path, depth)

    def __str__(self) -> str:
        if not self.changes:
            return "no difference"
        counts = ", ".join(f"{len(self._of(kind))} {kind}" for kind in CHANGES if self._of(kind))
        rows = [
            [f"{CHANGES[c.kind]} {c.node}", c.calls, c.arguments, c.weight, ", ".join(c.passes)] for c in self.changes
        ]
        return f"{counts}\n\n{Table(('node', 'calls', 'arguments', 'weight', 'pass'), rows)}"


def diff(before: nn.Module, after: nn.Module) -> Difference:
    """Compare the graphs of two models: which nodes were inserted, removed and changed, and by which pass.

    A node of one graph is matched with a node of the other that calls the same function in the same module, in the
    order of the graphs. It has *changed* if its arguments differ, or the shape of the tensor that it reads. Links on
    the way from a stored weight to its operator (gradient hooks, sign constraint, sum over synapses) count as inserted.
    That the operator reads the weight through them does not count as a change of the operator.

    Args:
        before: a model: transformed, or any other, whose graph is traced as `transform` does without example inputs.
        after: the other one.

    Raises:
        ArgumentError: one of them is not a model.
        CaptureError: a plain model cannot be traced.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Linear(4, 2)
        >>> print(biofx.diff(model, biofx.transform(model, [passes.FuzzyLearningRates()])))
        2 inserted
        <BLANKLINE>
        node           calls                 arguments            weight    pass
        -------------  --------------------  -------------------  --------  --------------------
        + weight_gain  weight_synapses.gain                       weight    fuzzy-learning-rates
        + scale_grad   biofx.scale_grad      weight, weight_gain  weight    fuzzy-learning-rates
    """
    first, second = _graph(before, "before"), _graph(after, "after")
    return Difference(first, second, tuple(_changes(first, second)))


def _graph(model: Any, which: str) -> fx.GraphModule:
    if is_transformed(without_wrappers(model)):
        return unwrapped(model)
    if isinstance(model, fx.GraphModule):
        return model
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"diff: {which} must be a torch.nn.Module, got an instance of {type(model).__name__}")
    check_model(model)
    return capture(copied(model))


def _changes(before: fx.GraphModule, after: fx.GraphModule) -> Iterator[Change]:
    old, new = list(before.graph.nodes), list(after.graph.nodes)
    matcher = SequenceMatcher(None, _keys(before, old), _keys(after, new), autojunk=False)
    partner: dict[fx.Node, fx.Node] = {}
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            for own, node in zip(old[a0:a1], new[b0:b1], strict=True):
                partner[node] = own  # known before a later node has it as an argument
                was, now = _arguments(own, lambda n: n), _arguments(node, lambda n: partner.get(n, n))
                shapes = _shape(before, own), _shape(after, node)
                if was != now:
                    yield _change("changed", node, f"{written_arguments(own)} → {written_arguments(node)}")
                elif shapes[0] != shapes[1]:
                    yield _change("changed", node, f"{shapes[0]} → {shapes[1]}")
        else:
            yield from (_change("removed", node, written_arguments(node)) for node in old[a0:a1])
            yield from (_change("inserted", node, written_arguments(node)) for node in new[b0:b1])


def _keys(model: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[tuple[str, ...]]:
    """What a node has in common with its partner in another graph."""
    keys = []
    for node in nodes:
        origin = inserted(node)
        name = original_name(model, node) if node.op == "get_attr" and origin is None else callee(node)
        own = (origin.parameter, origin.slot.label, origin.by) if origin else ()
        keys.append((node.op, name, module_of(node), *own))
    return keys


def _arguments(node: fx.Node, same: Callable[[fx.Node], fx.Node]) -> Any:
    """The arguments of a node; a weight that it reads through links counts as the weight."""
    origin = inserted(node)

    def read(source: fx.Node) -> fx.Node:
        while origin is None and (link := inserted(source)) is not None and link.slot.on_chain and source.args:
            source = source.args[0]  # type: ignore[assignment]  # the first argument of a link is the link before it
        return same(source)

    if origin is not None and origin.slot.on_chain:
        return ()  # where a link stands follows from the other links
    return fx.map_arg((node.args, node.kwargs), read)


def _shape(model: fx.GraphModule, node: fx.Node) -> str:
    """The shape of the tensor that a node reads; empty for other nodes."""
    value = attribute(model, str(node.target)) if node.op == "get_attr" else None
    return written_shape(value.shape) if isinstance(value, Tensor) else ""


def _change(kind: str, node: fx.Node, arguments: str) -> Change:
    origin = inserted(node)
    weight, passes = (origin.parameter, origin.passes) if origin else ("", ())
    return Change(kind, node.name, callee(node), arguments, weight, passes)
