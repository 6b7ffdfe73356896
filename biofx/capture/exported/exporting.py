"""The front end `"export"`: `torch.export` on example inputs gives a graph module that takes over the module tree.

torch.export runs forward on the example inputs and records the dispatcher operators that it calls, so it follows any
Python. It runs once in training mode and, if forward reads the mode, once in evaluation mode; `both_modes` merges the
two graphs. Its assumptions about the shapes of inputs are checked in every call (`CheckInputs`).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.analysis.understanding import call
from biofx.base.errors import ArgumentError, CaptureError
from biofx.base.isolation import arguments_kept, split_inputs
from biofx.base.references import repoint
from biofx.base.torch_internals import HOOKS, has_global_hooks, pytree
from biofx.capture.captured_module import CapturedModule, captured
from biofx.capture.equivalence import disagreement
from biofx.capture.explanation import lines_of
from biofx.capture.exported.both_modes import Merged
from biofx.capture.exported.conditions import INSTEAD, CheckInputs
from biofx.capture.exported.devices import follow_device, names_dtype
from biofx.capture.exported.program import Program, export
from biofx.capture.exported.structure import CONSTANTS, Structure, describe, leaf_names, packed, unpacked
from biofx.capture.modes import ModeSelect
from biofx.capture.outside_variables import OutsideVariables
from biofx.capture.reparametrized import pop_computing_hooks
from biofx.capture.tracer import HelperModule, KeywordOnly, NotTraceable, Tracer, unused_name
from biofx.model.islands import ORIGINAL_HOOKS
from biofx.model.provenance import record_of

_LIBRARIES = ("torch", "biofx", "sympy", "contextlib")  # packages whose lines are not the user's


def capture(model: nn.Module, example_inputs: Any) -> CapturedModule:
    """Export a model into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check_model`); its submodules become those of the result.
        example_inputs: arguments of forward.

    Returns:
        A graph module with the class, tree, state, mode and attributes of the model, and the hooks of its root.

    Raises:
        ArgumentError: the example inputs are missing, or do not fit.
        CaptureError: the model cannot be exported; says why, and what to try instead.
    """
    if example_inputs is None:
        raise ArgumentError('frontend="export" runs the model: it needs example_inputs, such as example_inputs=(x,)')
    _refuse_hooks(model)
    given = _bind(model, example_inputs)
    leaves: list[Tensor] = []
    inputs = describe((given.args, given.kwargs), leaves)
    given.apply_defaults()
    arguments = {name: describe(value, []) for name, value in given.arguments.items()}
    with arguments_kept((given.args, given.kwargs)):
        training = _export(model, inputs, leaves, training=True)
        evaluation = _export(model, inputs, leaves, training=False) if training.reads else training
    graph, constants = _assembled(model, arguments, leaves, training, evaluation)
    names = {name: unused_name(model, name) for name in constants}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in names:
            node.target = names[node.target]
    bio = captured(model, graph, {names[name]: constant for name, constant in constants.items()})
    vars(bio)[ORIGINAL_HOOKS] = pop_computing_hooks(bio)
    modules = model.named_modules()
    record_of(bio).traced = tuple(path for path, module in modules if not isinstance(module, HelperModule))
    try:
        _check(bio, example_inputs)
    except BaseException:  # nobody else knows `bio` yet
        repoint(model, {id(bio): model})
        raise
    return bio


def _check(bio: CapturedModule, example_inputs: Any) -> None:
    """Raise if the exported graph differs from the model, also on inputs with other strides that require gradients."""
    inputs, outside = split_inputs(example_inputs), OutsideVariables(dict(bio.named_modules())).tensors
    graph = MethodType(type(bio).forward, bio)
    for given, where in (
        (inputs, ""),
        (pytree.tree_map_only(Tensor, _held_otherwise, inputs), " for inputs that need gradients or are transposed"),
    ):
        found = disagreement(bio, call(*given), lambda: graph, bio.original_forward, outside=outside)
        if found is not None:
            why = (
                "Its forward takes decisions, draws random numbers, has side effects, or has gradients of its own "
                "(a torch.autograd.Function, a hook on a tensor)"
            )
            raise CaptureError(
                f"{type(bio).__name__} cannot be exported: {found}{where}. {_on_nested(bio) or why}, or {INSTEAD}"
            )


def _held_otherwise(tensor: Tensor) -> Tensor:
    """Return the same numbers in a tensor that has other strides, and requires gradients if it can."""
    with torch.no_grad():
        other = tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor.clone()
    return other.requires_grad_() if other.is_floating_point() or other.is_complex() else other


def _on_nested(model: nn.Module) -> str | None:
    """Advice on a module that computes with nested tensors; None if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            return (
                f"{name or 'It'} is a torch.nn.TransformerEncoder, which returns zeros for padding when no "
                "gradients are needed; build it with enable_nested_tensor=False"
            )
    return None


def _refuse_hooks(model: nn.Module) -> None:
    if has_global_hooks():
        raise CaptureError(
            "hooks for all modules are registered, which run when a module is called, and torch.export calls "
            f"operators; remove them, or {INSTEAD}"
        )
    for name, module in model.named_modules():
        hooks = [hook for registry in HOOKS for hook in getattr(module, registry).values()]
        kept = [hook for hook in hooks if not type(hook).__module__.startswith("torch.nn.utils")]
        if name and kept:
            raise CaptureError(
                f"{name} ({type(module).__name__}) has hooks, which only run when the module itself is called, and "
                f"torch.export calls operators; remove them, or {INSTEAD}"
            )


def _bind(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """Bind example inputs to the arguments of forward."""
    args, kwargs = split_inputs(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:  # but the model runs on them, so a decorator or a hook passes others
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: a decorator or a hook calls forward{signature} with "
            f"arguments other than example_inputs ({error}); {INSTEAD}"
        ) from error


def _export(model: nn.Module, inputs: Structure, leaves: list[Tensor], training: bool) -> Program:
    try:
        return export(model, inputs, leaves, training)
    except CaptureError:
        raise
    except (Exception, NotTraceable) as error:
        raise CaptureError(_explain(model, error, "training" if training else "evaluation")) from error


def _explain(model: nn.Module, error: BaseException, mode: str) -> str:
    """Summarize why torch.export failed, at which line of the user's code, and what to do."""
    if isinstance(error, NotTraceable):
        ((path, why),) = error.reasons.items()
        why = why.replace("its forward", f"the forward of {path}", 1) if path else why
        return f"{type(model).__name__} cannot be exported: {why}; {INSTEAD}"
    message = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:3])[:500]
    name = "" if type(error).__name__ in ("RuntimeError", "Exception") else f"{type(error).__name__}: "
    if name == "GuardOnDataDependentSymNode: ":
        name = "it decides by the values of a tensor, or makes a Python number of them: "
        message = message.partition(" (unhinted")[0]
    of_user = [line for line in lines_of(error) if line.text and line.module.partition(".")[0] not in _LIBRARIES]
    return "\n".join(
        [
            f"{type(model).__name__} cannot be exported in {mode} mode: {name}{message}",
            *(f"  in {where}" for where in _running_modules(model, error)[-1:]),
            *(f"  at {line.file}:{line.number}: {line.text}" for line in of_user[-1:]),
            *(f"  {advice}." for advice in [_on_nested(model)] if advice and "nested_tensor" in message),
            f"  {INSTEAD[0].upper()}{INSTEAD[1:]}.",
        ]
    )


def _running_modules(model: nn.Module, error: BaseException) -> list[str]:
    """Return the submodules whose methods are in the traceback of an error, the innermost last."""
    names = {id(module): f"{path} ({type(module).__name__})" for path, module in model.named_modules() if path}
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return [names[id(owner)] for owner in owners if id(owner) in names]


def _assembled(
    model: nn.Module, arguments: dict[str, Structure], leaves: list[Tensor], training: Program, evaluation: Program
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph for both modes, with the signature and the result of forward, and its constants."""
    merged = Merged(model, training, evaluation)
    graph = fx.Graph(tracer_cls=Tracer)

    def add_module(name: str, module: HelperModule) -> str:
        name = unused_name(model, name)
        model.add_module(name, module.train(model.training))
        return name

    placeholders = _placeholders(graph, model.forward)
    names = [leaf for name, structure in arguments.items() for leaf in leaf_names(structure, name)]
    check = CheckInputs(arguments, names, leaves, training.conditions, evaluation.conditions)
    graph.call_module(add_module("check_inputs", check), tuple(placeholders[name] for name in arguments))
    sources: list[fx.Node] = []
    for name, structure in arguments.items():
        sources += unpacked(graph, structure, placeholders[name], add_module)
    copies = dict(zip(merged.graph.find_nodes(op="placeholder"), sources, strict=True))
    graph.graph_copy(merged.graph, copies)
    returned = [fx.map_arg(tuple(values), copies.__getitem__) for values in merged.results]
    if training.outputs == evaluation.outputs:
        selected = [_select(graph, t, e, add_module) for t, e in zip(*returned, strict=True)]
        graph.output(packed(graph, training.outputs, iter(selected), add_module))
    else:
        values = [
            packed(graph, program.outputs, iter(found), add_module)
            for program, found in zip((training, evaluation), returned, strict=True)
        ]
        graph.output(_select(graph, values[0], values[1], add_module))
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if like is not None:
        follow_device(model, graph, like.device)
        check.follow_dtype(like, names_dtype(model, graph, like.dtype))
    return graph, merged.constants


def _select(graph: fx.Graph, t: Any, e: Any, add_module: Callable[[str, HelperModule], str]) -> Any:
    """Return a result that is the same in both modes, or a node that selects it by mode."""
    if t is e or (type(t) is type(e) and isinstance(t, CONSTANTS) and t == e):
        return t
    return graph.call_module(add_module("mode_select", ModeSelect()), (t, e))


def _placeholders(graph: fx.Graph, forward: Callable[..., Any]) -> dict[str, fx.Node]:
    """Create placeholders for the arguments of forward, with defaults, in the order in which torch.fx traces them."""
    result = {}
    keyword_only = []
    parameters = inspect.signature(forward).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].kind in variadic):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else stars
        if parameter.kind is parameter.KEYWORD_ONLY:
            keyword_only.append(name)
        default = () if parameter.default is parameter.empty else (parameter.default,)
        if default and not isinstance(default[0], CONSTANTS):
            raise CaptureError(
                f"the default of the argument {name} of forward is a {type(default[0]).__name__}, "
                f"which the signature of a graph cannot have; {INSTEAD}"
            )
        node = graph.create_node("placeholder", f"{stars}{name}", args=default, name=name)
        node.meta["nn_module_stack"] = {}
        result[name] = node
    if keyword_only:
        graph.set_codegen(KeywordOnly(keyword_only))
    return result
