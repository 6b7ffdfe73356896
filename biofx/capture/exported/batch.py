"""A batch of one: whether a graph is right for it, too, although `torch.export` takes it for a case of its own.

Its guards say what was decided while the graph was made, such as whether memory is contiguous, and not whether it made
a difference. So it is exported with a batch of one as well: where both graphs have the same calls, it made none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biofx.capture.exported.program import Export

_aten = torch.ops.aten
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NUMBERS = (*_SYMBOLIC, int, float)


Place = tuple[int, int]
"""An axis of an input: the number of the input, and that of the axis."""


def batch_places(export: Export, leaves: Sequence[Tensor]) -> set[Place]:
    """Where the batch is: the first axes that may be longer or shorter and are as long as the first of them."""
    lengths = _lengths(export)
    first = [leaf for leaf, axis in lengths if axis == 0]
    batch = {lengths[leaf, 0] for leaf in first if leaves[leaf].shape[0] == leaves[first[0]].shape[0]}
    return {place for place, length in lengths.items() if length in batch}


def resized(leaves: Sequence[Tensor], places: set[Place]) -> list[Tensor]:
    """Example inputs with a batch of one, or of two if it is one."""
    result = list(leaves)
    for leaf, axis in places:
        rows = torch.zeros(2 if leaves[leaf].shape[axis] == 1 else 1, dtype=torch.long, device=leaves[leaf].device)
        result[leaf] = result[leaf].detach().index_select(axis, rows).requires_grad_(leaves[leaf].requires_grad)
    return result


def same_for_one(many: Export, one: Export, places: set[Place]) -> bool:
    """Whether two graphs do the same for a batch of one, in the same order, and return it in the same form."""
    if (many.watcher.outputs, many.watcher.assigned) != (one.watcher.outputs, one.watcher.assigned):
        return False
    constants, others = many.program.constants, one.program.constants
    if constants.keys() != others.keys() or not all(torch.equal(constants[name], others[name]) for name in constants):
        return False
    sizes = {place: 1 if place in places else length for place, length in _lengths(many).items()}
    if sizes.keys() != _lengths(one).keys():
        return False
    calls = [
        _calls(export.program.graph_module, {length: sizes[place] for place, length in _lengths(export).items()})
        for export in (many, one)
    ]
    return calls[0] == calls[1]


def _lengths(export: Export) -> dict[Place, Any]:
    """The axes that may be longer or shorter, each with what torch.export calls its length."""
    shapes = [node.meta["val"].shape for node in export.inputs]
    lengths = {(leaf, axis): length for leaf, shape in enumerate(shapes) for axis, length in enumerate(shape)}
    return {place: length.node.expr for place, length in lengths.items() if isinstance(length, torch.SymInt)}


def _calls(module: fx.GraphModule, sizes: dict[Any, Any]) -> list[Any]:
    """What a graph does for some sizes, in a form that can be compared: tensors by number, numbers by value."""
    calls: list[Any] = []
    tensors: dict[fx.Node, Any] = {}

    def known(value: Any) -> Any:
        if isinstance(value, fx.Node):
            number = value.meta.get("val")
            return known(number) if isinstance(number, _NUMBERS) else tensors[value]
        if isinstance(value, tuple | list):
            return tuple(map(known, value))
        if isinstance(value, dict):
            return tuple((key, known(item)) for key, item in value.items())
        return str(value.node.expr.subs(sizes)) if isinstance(value, _SYMBOLIC) else repr(value)

    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensors[node] = _calls(getattr(module, str(node.target)), sizes)
        elif node.op == "placeholder":
            tensors[node] = node.name
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), _NUMBERS):
            if _returns_operand(node, known):
                tensors[node] = known(node.args[0])
            else:
                tensors[node] = len(calls)
                calls.append((str(node.target), known(node.args), known(node.kwargs)))
        elif node.op == "output":
            calls.append(known(node.args))
    return calls


def _returns_operand(node: fx.Node, known: Callable[[Any], Any]) -> bool:
    """Whether a call returns its operand, or decides at run time whether to do so."""
    if node.target is _aten.contiguous.default:
        return True
    if node.target not in (_aten.expand.default, _aten.slice.Tensor):
        return False
    operand: Any = node.args[0]
    before, after = ([*map(known, x.meta["val"].shape)] for x in (operand, node))
    return before == after
