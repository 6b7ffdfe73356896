"""Trees: arguments and results of operators, in which tensors are looked for at each of them.

Most are flat, so that `torch.utils._pytree`, which takes a tree apart and builds it again, would take longer than the
operator. It takes over where there is something other than tuples, lists and dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from biofx.base.torch_internals import pytree

Leaf = TypeVar("Leaf")


def mapped(kind: type[Leaf], function: Callable[[Leaf], Any], tree: Any) -> Any:
    """A tree with something else in the place of leaves of a kind."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)([mapped(kind, function, part) for part in tree])
    if type(tree) is dict:
        return {key: mapped(kind, function, part) for key, part in tree.items()}
    return tree if type(tree) in _ATOMS else _rebuilt(kind, function, tree)


def _rebuilt(kind: type[Leaf], function: Callable[[Leaf], Any], tree: Any) -> Any:
    """What becomes of another container: a list of its leaves if its class takes nothing but tensors."""
    found, structure = pytree.tree_flatten(tree)
    new = [function(leaf) if isinstance(leaf, kind) else leaf for leaf in found]
    try:
        return pytree.tree_unflatten(new, structure)
    except Exception:  # noqa: BLE001 - the class is a user's, or PackedSequence, and raises what it wants
        return new


def leaves(kind: type[Leaf], tree: Any) -> Iterator[Leaf]:
    """The leaves of a kind, in order."""
    if isinstance(tree, kind):
        yield tree
    elif type(tree) in (tuple, list):
        for part in tree:
            yield from leaves(kind, part)
    elif type(tree) is dict:
        for part in tree.values():
            yield from leaves(kind, part)
    elif type(tree) not in _ATOMS:
        yield from (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, kind))


_ATOMS = frozenset((bool, int, float, str, type(None)))
