"""Captured modules: GraphModules that keep class, tree, attributes, hooks and provenance of a model in all copies."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from biofx.analysis.graphs import USES
from biofx.base.copying import clones
from biofx.base.derived_classes import derived_anew
from biofx.base.errors import ArgumentError, CaptureError, ExportError, SavingError
from biofx.base.references import repoint
from biofx.base.torch_internals import DERIVED, pytree, reduce_graph_module, tracer_class
from biofx.capture.tracer import HelperModule
from biofx.model.chain import number_nodes, update_chains
from biofx.model.changes import transformed
from biofx.model.checkpoints import METADATA_KEY, converted_checkpoint, other_option, passes_of
from biofx.model.definitions import written_name
from biofx.model.fingerprint import fingerprint
from biofx.model.forgotten_attach import warn_if_unattached
from biofx.model.islands import (
    GUARD,
    ORIGINAL_CLASS,
    ORIGINAL_HOOKS,
    PRESENT_FORWARD,
    WHOLE_MODEL,
    generated_class,
    is_one_island,
)
from biofx.model.owners import (
    HasSynapses,
    children_of,
    container_methods,
    install_weight_properties,
    refresh_flat_weights,
    set_class,
)
from biofx.model.provenance import RECORD, Record, is_transformed, record_of
from biofx.model.synapses import observers_in
from biofx.model.tied_weights import TiedWeights

REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))

# Their methods iterate over all children, and a captured model has more of them: synapses and helper modules.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

_OPERATOR = re.compile(r"torch\.ops\.biofx\.\w+")  # in generated code

_OF_MODULES = frozenset(vars(nn.Module()))
_OF_GRAPH_MODULES = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - _OF_MODULES
RESERVED = frozenset(
    name
    for name in {
        *dir(fx.GraphModule),
        *_OF_GRAPH_MODULES,
        WHOLE_MODEL,
        ORIGINAL_CLASS,
        ORIGINAL_HOOKS,
        "original_forward",
        PRESENT_FORWARD,
    }
    - {*dir(nn.Module)}
    if not name.startswith("__")
)
"""Attributes that a captured model has and a plain module has not, so a model must not use these names."""


class _Unsynchronized:
    """What `DistributedDataParallel` leaves to each rank: the sums of observers. `attach` reduces them."""

    def __get__(self, module: fx.GraphModule | None, cls: type) -> list[str]:
        return [] if module is None else [f"{path}.{key}" for path, key in observers_in(module.graph)]


class CapturedModule(HasSynapses, fx.GraphModule):
    """The result of `biofx.transform` and `biofx.fold`.

    It is also an instance of the model's class, so methods, properties and overrides such as `train` stay. Forward runs
    the model's Python, with the effective weights. Where a pass needs the graph, or somebody has edited it, the graph
    runs, under a guard (`guards.py`). If the model is one island, its graph calls its original forward.

    Copying or pickling a plain `torch.fx.GraphModule` loses its `meta`, the hooks and attributes of the root, which of
    its buffers are persistent, and the `meta` of nodes. This class keeps them.
    """

    _ddp_params_and_buffers_to_ignore = _Unsynchronized()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create another model of the original's class, as `type(self)(…)` does in its methods."""
        return cls.__mro__[cls.__mro__.index(fx.GraphModule) + 1](*args, **kwargs)

    @property
    def whole_model(self) -> CapturedModule:
        """The model itself, for nodes that refer to it."""
        return self

    def original_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Python forward of the original model."""
        cls: Any = vars(self).get(ORIGINAL_CLASS) or record_of(self).model_class
        for hook in vars(self)[ORIGINAL_HOOKS].values():
            hook(self, args)
        return cls.forward(_without_helpers(self, cls) if issubclass(cls, _CONTAINERS) else self, *args, **kwargs)

    def recompile(self) -> Any:
        """Generate the code of forward from the graph."""
        present, cls = type(self), generated_class(self)
        set_class(self, cls)  # of which `fully_shard` makes a subclass, where torch.fx would call itself for ever
        try:
            code = super().recompile()
        finally:
            set_class(self, present)
        signature = vars(self)[ORIGINAL_CLASS].forward if is_one_island(self) else cls.forward
        cls.forward = cls.present_forward = _guarded(cls.forward, signature, cls, TiedWeights(self))
        if GUARD in vars(self):
            vars(self)[GUARD].refresh(self)
        return code

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and value == MethodType(inspect.unwrap(type(self).forward), self):
            vars(self).pop(name, None)  # a trainer takes its wrappers off, and with them the guard
            return
        super().__setattr__(name, value)

    @property
    def __deepcopy__(self) -> Callable[[dict[int, Any]], nn.Module] | None:  # type: ignore[override]
        """None, so that `copy.deepcopy` uses `__reduce__`.

        A wrapper that passes attributes on, such as `PeftModel`, would pass on a method as well, and its copy would be
        one of the model inside.
        """
        return None if is_transformed(self) else self._deep_copy

    def _deep_copy(self, memo: dict[int, Any]) -> CapturedModule:
        memo[id(self)] = copied = _empty(generated_class(self).__name__, _model_class(self))
        copy.deepcopy(_State(self), memo)
        return copied

    def __copy__(self) -> CapturedModule:
        copied = _empty(generated_class(self).__name__, _model_class(self))
        own = {*_OF_MODULES, GUARD, ORIGINAL_HOOKS}
        shared = {name: copy.copy(x) if name in own else x for name, x in _attributes(self).items()}
        _fill(copied, shared, copy.deepcopy(self.graph))
        set_class(copied, _derived_like(self, type(copied)))
        return copied

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of this model, or of the original one; see `load_state_dict` of the model's class.

        Raises:
            ArgumentError: `strict`, and other passes, or these with other options, made the model of the checkpoint;
                names the first difference.
        """
        if is_transformed(self):
            strict = kwargs.get("strict", args[0] if args else True)
            assign = kwargs.get("assign", args[1] if len(args) > 1 else False)
            state_dict = converted_checkpoint(self, state_dict, strict, assign)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_transformed(self) and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][METADATA_KEY] = passes_of(self)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: list[str], errors: Any
    ) -> None:
        if prefix and is_transformed(self):  # a part of what loads, else `load_state_dict` has converted it
            given = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
            try:
                inside = {name.removeprefix(prefix): value for name, value in given.items()}
                assign = metadata.get("assign_to_params_buffers", False)
                converted = converted_checkpoint(self, inside, strict=False, assign=assign)
                given = {f"{prefix}{name}": value for name, value in converted.items()}
            except ArgumentError as error:
                errors.append(f"{prefix[:-1]}: {error}")
            state.update(given)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        found = other_option(self, metadata) if is_transformed(self) else None
        if found is not None:  # in a model that contains this one, which raises if it is strict
            unexpected.append(f"{prefix}: {found}")

    def __reduce__(self) -> tuple[Any, ...]:
        if not (is_transformed(self) or any(isinstance(module, HelperModule) for module in self.modules())):
            _, (_, imports) = super().__reduce__()
            if "biofx" not in imports:
                refuse_derived(self)
                # It is folded and contains nothing of biofx, so it loads as a plain graph where biofx is not installed.
                kept = _attributes(self)
                attributes = {n: x for n, x in kept.items() if n not in ("_tracer_cls", GUARD, ORIGINAL_HOOKS)}
                # Hooks may refer to the model.
                hooks: dict[str, Any] = {name: OrderedDict() for name in attributes if name.endswith("_hooks")}
                return reduce_graph_module, (attributes | hooks, imports), attributes
        return _empty, (generated_class(self).__name__, _model_class(self)), _State(self)

    def __setstate__(self, state: tuple[dict[str, Any], str, dict[str, Any], list[Any]] | None) -> None:
        if state is None:  # copy.deepcopy has filled it
            return
        # torch.fx pickles the code, not the graph. Tracing it gives the same calls, without `meta`.
        attributes, imports, reads, calls = state
        vars(self).update(attributes)  # first, because the code below is traced with this model in it
        traced = reduce_graph_module({**attributes, WHOLE_MODEL: self}, imports)
        assert isinstance(traced, fx.GraphModule)
        origins = [(node, reads.get(str(node.target))) for node in traced.graph.find_nodes(op="get_attr")]
        for node, kept in [*origins, *zip(_in_order(traced.graph), calls, strict=True)]:
            node.meta.update(kept or {})
        _fill(self, attributes, traced.graph)
        number_nodes(self)
        update_chains(self)  # the pickled model may have been attached to an optimizer


class _State:
    """The state of a captured model in `__reduce__`: `copy.deepcopy` copies its graph, and pickle writes its code."""

    def __init__(self, model: CapturedModule) -> None:
        self._model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        model, copied = self._model, memo[id(self._model)]
        memo.update({key: clone for key, clone in clones(model).items() if key not in memo})
        _fill(copied, copy.deepcopy(_attributes(model), memo), copy.deepcopy(model.graph))
        set_class(copied, _derived_like(model, type(copied)))
        repoint(copied, memo, is_copy=True)
        update_chains(copied)  # no optimizer is attached to a copy

    def __reduce__(self) -> tuple[Any, ...]:
        model = self._model
        refuse_derived(model)
        if is_transformed(model):
            transformed(model)  # so that the graph reads what is there now
        _, (_, imports) = fx.GraphModule.__reduce__(model)
        attributes = _attributes(model)
        attributes["_code"] = _OPERATOR.sub(lambda found: written_name(found[0]), attributes["_code"])
        return tuple, ([attributes, imports, *_origins(model.graph)],)


def captured(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any], *, is_one_island: bool = False
) -> CapturedModule:
    """Create a captured model with its record; it shares the submodules, tensors and attributes of `model`.

    It gets the constants of forward, which the graph reads, as buffers. The graph of a model that is one island calls
    the model's own forward.

    Raises:
        CaptureError: the class of the model does not allow subclasses.
    """
    module = _empty(type(model).__name__, _model_class(model), tracer_class(graph))
    _fill(module, _kept(model) | ({ORIGINAL_CLASS: type(model)} if is_one_island else {}), graph)
    repoint(module, {id(model): module})
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    vars(module)[RECORD] = Record(model, fingerprint(module), constants)
    return module


def original_form(bio: CapturedModule, model_class: type[nn.Module]) -> nn.Module:
    """Create a model of the original class; it shares the submodules and tensors of `bio`."""
    model: nn.Module = object.__new__(_derived_like(bio, model_class))
    vars(model).update(_kept(bio))
    vars(model).pop(ORIGINAL_CLASS, None)
    model._forward_pre_hooks.update(vars(model).pop(ORIGINAL_HOOKS))
    for module in model.modules():
        for name in [name for name, child in module._modules.items() if isinstance(child, HelperModule)]:
            del module._modules[name]
    refresh_flat_weights(model)
    repoint(model, {id(bio): model})
    return model


def _kept(model: nn.Module) -> dict[str, Any]:
    """Return the attributes that carry over between a model and its captured form, with copied registries."""
    kept = {name: value for name, value in vars(model).items() if name not in {*_OF_GRAPH_MODULES, GUARD, *DERIVED}}
    return {name: copy.copy(value) if name in _OF_MODULES else value for name, value in kept.items()}


def _without_helpers(bio: CapturedModule, container: type[nn.Module]) -> nn.Module:
    """Return a container with only the children of the original model."""
    children = {name: child for name, child in children_of(bio).items() if not isinstance(child, HelperModule)}
    if len(children) == len(bio._modules):
        return bio
    shell: nn.Module = object.__new__(container)
    vars(shell).update(vars(bio))
    vars(shell)["_modules"] = children
    return shell


def _present_forward(model: nn.Module, cls: Any) -> Callable[..., Any]:
    """The forward in place of one of `cls` that a wrapper kept, in a model that was folded or transformed since."""
    forward: Callable[..., Any] = cls.present_forward if isinstance(model, cls) else type(model).forward
    return forward


def _uncompiled(bio: CapturedModule, *args: Any, **kwargs: Any) -> Any:
    """Run a model whose forward asks about weights what torch.compile does not answer as for parameters."""
    run = torch.compiler.disable(type(bio).forward)  # not by a decorator, which would import the compiler
    return run(bio, *args, **kwargs)


def _guarded(
    forward: Callable[..., Any], signature: Callable[..., Any], cls: Any, tied: TiedWeights
) -> Callable[..., Any]:
    """Return a forward of `cls` that runs the model's Python, or the graph if something needs it."""

    def guarded(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, cls) or cls.present_forward is not own:
            return _present_forward(self, cls)(self, *args, **kwargs)
        guard = vars(self).get(GUARD)
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):  # it is traced again
            return forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if not _compiles(self, guard, tied, args, kwargs):
                return _uncompiled(self, *args, **kwargs)
            runs_graph = guard is None or not guard.is_idle
            return (forward if runs_graph else type(self).original_forward)(self, *args, **kwargs)
        with tied.computed_once(self):
            if guard is not None and not guard.is_idle and "_is_replica" not in vars(self):
                guard.check(self, args, kwargs)
            runs_graph = guard is None or guard.needs is not None
            return (forward if runs_graph else type(self).original_forward)(self, *args, **kwargs)

    # torch.compile limits recompilations per code object, so each model needs a code object of its own.
    code = guarded.__code__.replace()
    own = functools.wraps(signature)(FunctionType(code, guarded.__globals__, closure=guarded.__closure__))
    return own


def _compiles(bio: CapturedModule, guard: Any, tied: TiedWeights, args: Any, kwargs: Any) -> bool:
    """Whether torch.compile may compile a model: its forward asks about weights nothing that is answered otherwise."""
    is_asked = is_transformed(bio) and record_of(bio).asked
    return not is_asked and (guard is None or guard.holds_while_compiling(bio, args, kwargs)) and not tied.replaced(bio)


def _model_class(model: nn.Module) -> type[nn.Module]:
    """Return the class from which a captured model inherits."""
    cls = type(model)
    if isinstance(model, fx.GraphModule):
        cls = cls.__mro__[cls.__mro__.index(fx.GraphModule) + 1]
    return cls


def refuse_derived(model: nn.Module) -> None:
    """Raise if users have derived another class from that of a captured model.

    Raises:
        SavingError: says what to do instead.
    """
    if type(model) is not generated_class(model):
        raise SavingError(
            f"{type(model).__name__} is not the class that biofx gave the model, and cannot be saved with it; save "
            "bio.state_dict(), or change the class of the original model and transform it"
        )


def _derived_like(model: nn.Module, base: Any) -> Any:
    """Return the class that derives from `base` as the class of a captured model does from the generated one."""
    generated = generated_class(model)
    return derived_anew(
        type(model), lambda each: base if each is generated else None if issubclass(each, generated) else each
    )


def _empty(name: str, model_class: type[nn.Module], tracer: type[fx.Tracer] | None = None) -> CapturedModule:
    # Libraries note classes by these names: transformers, which of them return hidden states.
    methods = {name: getattr(model_class, name) for name in ("__module__", "__qualname__")} | {PRESENT_FORWARD: None}
    methods |= container_methods(model_class)
    if issubclass(model_class, nn.Sequential):
        methods["__getitem__"] = _item
    if hasattr(model_class, "save_pretrained"):  # of transformers, diffusers and the like
        methods["save_pretrained"] = _save_folded
    try:
        cls: type[CapturedModule] = type(name, (CapturedModule, model_class), methods)
    except TypeError as error:
        raise CaptureError(
            f"{model_class.__name__} does not allow subclasses, and a captured model is one: {error}; "
            "make it an attribute of a plain torch.nn.Module and transform that"
        ) from error
    module: CapturedModule = object.__new__(cls)  # the constructor would create a model of the original's class
    type(module).__name__ = name
    vars(module).update(vars(fx.GraphModule(nn.Module(), fx.Graph(tracer_cls=tracer))))
    return module


def _save_folded(bio: CapturedModule, *args: Any, **kwargs: Any) -> Any:
    """Save the effective weights under their original names, if the original class with these computes the same."""
    from biofx.output.fold import folded_for_original  # it imports this module

    if not is_transformed(bio):
        raise ExportError(
            f"save_pretrained: this folded {type(bio).__name__} is a graph, and its class with these weights would "
            "compute something else; use torch.save(model, path)"
        )
    state = kwargs.pop("state_dict", None)  # trainers give what they gathered from all processes
    if state is not None:
        bio = copy.deepcopy(bio)
        bio.load_state_dict(state)
    model: Any = folded_for_original(bio, "save_pretrained")
    return model.save_pretrained(*args, **kwargs)


def _item(sequence: nn.Sequential, index: Any) -> nn.Module:
    """Index a sequence; a slice is a plain `nn.Sequential`, where PyTorch would create an instance of the subclass."""
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict([*children_of(sequence).items()][index]))
    layer: nn.Module = nn.Sequential.__getitem__(sequence, index)
    return layer


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in ("_graph", *DERIVED)}


def _fill(module: CapturedModule, attributes: dict[str, Any], graph: fx.Graph) -> None:
    guard = attributes.pop(GUARD, None)
    vars(module).update(attributes)
    module.graph = graph
    if guard is not None:  # as it was: the children of a copied model may have been replaced since the transform
        vars(module)[GUARD] = guard
        guard.watch(module)
    refresh_flat_weights(module)
    install_weight_properties(module)
    warn_if_unattached(module)


def _origins(graph: fx.Graph) -> tuple[dict[str, Any], list[Any]]:
    """Return the metadata of nodes: of `get_attr` nodes by target, of others in order."""
    reads = {str(node.target): _own_meta(node) for node in graph.find_nodes(op="get_attr")}
    return reads, [_own_meta(node) for node in _in_order(graph)]


def _in_order(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose order retracing keeps, followed by those that read an attribute of a result.

    It moves `get_attr` nodes, and reads an attribute when it is used.
    """
    others = [node for node in graph.nodes if node.op != "get_attr"]
    return sorted(others, key=lambda node: node.target is getattr)


def _own_meta(node: fx.Node) -> dict[str, Any]:
    """Return the metadata of biofx on a node."""
    return {key: node.meta[key] for key in (RECORD, USES) if key in node.meta}
