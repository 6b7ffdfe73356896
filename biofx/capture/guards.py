"""Guards: whether what was true when a graph was checked still is.

A graph is a specialization of a model's Python. It runs where it was checked: on arguments like those of the check, and
as long as modules, their attributes and their hooks are what they were. Otherwise the Python runs, with the same
effective weights. Where a pass needs the graph, there is an error instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as global_hooks
from torch.utils import _pytree as pytree

from biofx.base.contents import frozen, holders, is_holder, named
from biofx.base.errors import CaptureError
from biofx.capture.assignments import assign_attribute
from biofx.capture.variables import Variable, reads
from biofx.model.fingerprint import fingerprint
from biofx.model.islands import WHOLE_MODEL
from biofx.model.provenance import RECORD, inserted_nodes, record_of
from biofx.model.slots import Slot
from biofx.model.synapses import Synapses, has_synapses, replaced_weights, synapses_in

GUARD = "_biofx_guard"  # where a transformed model keeps it
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REGISTRIES = frozenset(vars(nn.Module()))
_OF_GRAPHS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
_DERIVED = frozenset({"_flat_weights", "_flat_weight_refs", "_compiled_call_impl"})
_NOT_OF_USERS = _REGISTRIES | _OF_GRAPHS | _DERIVED | {RECORD}
_GLOBAL_HOOKS = [vars(global_hooks)[f"_global{name}"] for name in HOOKS]
_DEEPEST = 4  # how far into objects inside of objects an argument is looked at

Structure = tuple[Any, ...]


class Guard:
    """What was true when a graph was checked.

    Args:
        bio: the transformed model.
        structures: those of the arguments on which it was checked; None for any.

    Attributes:
        compiles_graph: whether compilers see the graph: it was checked, or a pass needs it.
    """

    def __init__(self, bio: fx.GraphModule, structures: frozenset[Structure] | None) -> None:
        around = (accumulate(path.split("."), "{}.{}".format) for path in record_of(bio).traced)  # with containers
        self.traced = tuple(dict.fromkeys(["", *chain.from_iterable(around)]))
        self.structures = structures
        self._own = {
            (_target(node.args[0]), str(node.args[1]))
            for node in bio.graph.nodes
            if node.op == "call_function" and node.target is assign_attribute
        }
        self._saved = {path: self._state(path, bio.get_submodule(path)) for path in self.traced}
        self.look_at(bio)
        self._globals = self._global_values(bio)

    @property
    def needs_graph(self) -> bool:
        """Whether only the graph computes what the model does."""
        return self._needs is not None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_held": None, "_synapses": None, "_variables": None}

    def look_at(self, bio: fx.GraphModule) -> None:
        """Take note of the graph and the modules, which may be others now."""
        self._needs = _why_graph_is_needed(bio)
        self.compiles_graph = self._needs is not None or self.structures is None or bool(self.structures)
        self._held: tuple[list[Any], list[Any]] | None = None
        self._synapses: tuple[Synapses, ...] | None = None
        self._variables: dict[str, Variable] | None = None

    def synapses(self, bio: nn.Module) -> tuple[Synapses, ...]:
        """The synapses of all weights."""
        if self._synapses is None:
            self._synapses = tuple(synapses_in(bio).values())
        return self._synapses

    def admits(self, bio: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph runs on some arguments.

        Raises:
            CaptureError: it does not follow what changed, and a pass needs it.
        """
        changed = None if self._holds() else self._changed(bio)
        if changed is None:
            changed = self._changed_global(bio)
        if self._needs is not None:
            if changed is not None:
                raise CaptureError(
                    f"{changed} since the transform, and {self._needs}, which does not follow that; change the "
                    "original model, and transform it then"
                )
            return True
        is_autocast = torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
        if changed is not None or any(_GLOBAL_HOOKS) or is_autocast:
            return False
        return self.structures is None or structure(args, kwargs) in self.structures

    def _holds(self) -> bool:
        """Whether nothing changed since the last look, as far as a glance tells."""
        if self._held is None:
            return False
        try:
            return bool(self._held[0] == self._held[1])
        except (RuntimeError, ValueError):  # tensors and arrays are not compared
            return False

    def _changed(self, bio: fx.GraphModule) -> str | None:
        """What is not as it was, in words; if nothing is, what there is now is looked for from here on."""
        modules = {}
        for path in self.traced:
            try:
                modules[path] = module = bio.get_submodule(path)
            except AttributeError:
                return f"{path} was removed"
            for key in replaced_weights(module):
                return f"{path}.{key}".lstrip(".") + " was replaced"
            for name, value in self._saved[path].items():
                if not _is_same(self._now(module, name), value):
                    what = f"{path}.{name}".lstrip(".")
                    return f"{path or 'the model'} got hooks" if name in HOOKS else f"{what} changed"
        seen: set[int] = set()
        held = [holder for module in modules.values() for holder in _looked_at(module, seen)]
        self._held = held, [holder.copy() for holder in held]
        return None

    def _changed_global(self, bio: nn.Module) -> str | None:
        """A variable outside of the model that is not as it was, in words."""
        now = self._global_values(bio)
        if now == self._globals:
            return None
        names = (name for name in {**now, **self._globals} if now.get(name) != self._globals.get(name))
        return f"the variable {next(names)}, which forward reads, changed"

    def _global_values(self, bio: nn.Module) -> dict[str, Any]:
        """What the variables outside of the model hold that forward reads."""
        if self._variables is None:
            self._variables = reads(bio.get_submodule(path) for path in self.traced)
        values = {name: variable() for name, variable in self._variables.items()}
        return {name: frozen(value, named) for name, value in values.items()}

    def _state(self, path: str, module: nn.Module) -> dict[str, Any]:
        kept = {name: _noted(value) for name, value in _attributes(module) if (path, name) not in self._own}
        hooks = {name: len(getattr(module, name)) for name in HOOKS}
        forward = {"forward": vars(module).get("forward")}
        return {**kept, **hooks, **forward, "_modules": dict(module._modules)}

    def _now(self, module: nn.Module, name: str) -> Any:
        if name in HOOKS:
            return len(getattr(module, name))
        value = vars(module).get(name)
        return value if name == "_modules" else _noted(value)


def structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
    """The structure of arguments: their types, the dtypes and numbers of axes of tensors, and what is None."""
    return tuple(_structure((args, dict(kwargs)), _DEEPEST))


def _structure(value: Any, depth: int) -> Iterator[Any]:
    leaves, spec = pytree.tree_flatten(value)
    yield str(spec)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield type(leaf), leaf.dtype, leaf.dim()
        elif depth and hasattr(leaf, "__dict__") and not callable(leaf) and not isinstance(leaf, type):
            yield type(leaf)
            yield from _structure(dict(vars(leaf)), depth - 1)
        else:
            yield leaf if isinstance(leaf, bool | str | None) else type(leaf)


def _why_graph_is_needed(bio: fx.GraphModule) -> str | None:
    """Why only the graph computes what a model does, or None if its Python does as well."""
    record = record_of(bio)
    for _, origin in inserted_nodes(bio.graph):
        if origin.slot in (Slot.OUTPUT, Slot.OBSERVER):
            return f"{origin.by} needs the graph"
    if record.model_class is None:
        return "the model is a graph"
    return None if fingerprint(bio) == record.captured else "its graph was edited"


def _target(node: Any) -> str:
    return "" if node.target == WHOLE_MODEL else str(node.target)


def _looked_at(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    """What is compared at each call: the attributes, children and hooks of a module, and what attributes hold."""
    yield vars(module)
    yield module._modules
    if has_synapses(module):
        yield module._parameters  # `torch.func.functional_call` puts a tensor in the place of a weight there
    yield from (getattr(module, name) for name in HOOKS)
    for _, value in _attributes(module):
        yield from holders(value, seen)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are the user's."""
    for name, value in vars(module).items():
        if name not in _NOT_OF_USERS and not name.startswith("_biofx"):
            yield name, value


def _noted(value: Any) -> Any:
    """What tells of an attribute whether it is the same: its contents, or else itself."""
    return frozen(value) if is_holder(value) else value


def _is_same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor | nn.Module) or isinstance(before, Tensor | nn.Module):
        return False
    try:
        return type(now) is type(before) and bool(now == before)
    except (RuntimeError, ValueError, TypeError):
        return False
