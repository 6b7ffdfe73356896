"""Checks: whether a graph computes what the Python does that it was traced from.

Nothing can foresee every way in which Python looks at a value or remembers one. So both run, on the same inputs and
with the same random numbers, twice in each mode, as what forward remembers shows in the second call, and once without
gradients. A forward that neither asks for the mode nor computes activity again in the backward pass runs in one. What
modules inside return is compared as well: behind units that are silent, nothing of it may be left in what the model
returns. A module whose graph differs keeps its Python.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from biofx.base.comparison import difference, difference_of
from biofx.base.isolation import gradients, parameters_kept, tensors_in, undisturbed
from biofx.base.lazy_copies import lazy_copy
from biofx.model.chain import attribute
from biofx.model.islands import WHOLE_MODEL

if TYPE_CHECKING:
    from biofx.capture.tracing import Trace

MORE, FEW = 1.5, 1024  # a graph may save so many times as many numbers as Python, and so many more

Run = Callable[[nn.Module], Any]
"""Runs a model, once or several times."""

Forward = Callable[..., Any]
"""What a model does with its arguments."""


def disagreement(
    model: nn.Module,
    run: Run,
    graph: Callable[[], Forward],
    python: Forward | None = None,
    by_mode: bool = True,
    parts: Collection[str] = (),
) -> str | None:
    """How a graph differs from the Python that it was traced from, in words, or None if it does not.

    Args:
        model: the model; it is afterwards what it was.
        run: runs the model.
        graph: makes a forward that runs the graph.
        python: a forward that runs the Python; None for the model's own.
        by_mode: whether forward asks for the mode.
        parts: paths of modules inside, whose forward hooks the graph calls on what they return.
    """
    saves_more = False
    for training in (False, True):
        if training and not (by_mode or saves_more):
            continue
        try:
            with running(model, python):
                expected = _behaviour(model, run, training, parts)
        except Exception:  # noqa: BLE001 - such as batch norm of one sample
            continue
        where = f"in {'training' if training else 'evaluation'} mode"
        try:
            with running(model, graph()):
                actual = _behaviour(model, run, training, parts)
        except Exception as error:  # noqa: BLE001 - forward is anybody's code
            return f"its graph fails {where}: {' '.join(str(error).split())[:120]}"
        found = (
            difference(expected.tensors, actual.tensors)
            or _difference_of(expected.slopes, actual.slopes)
            or _difference_inside(expected.parts, actual.parts)
        )
        if found is not None:
            return f"its graph computes something else {where}: {found}"
        saves_more = actual.saved > expected.saved  # what Python computes again, may change its state again
        if actual.saved > MORE * expected.saved + FEW:
            return "its forward recomputes activity in the backward pass, to save memory, which a graph does not do"
    return None


def calls_of(model: nn.Module, paths: Iterator[str], run: Run) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of the first call of modules, by path, in a run in evaluation mode."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in found:
                found[path] = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))

        return hook

    with parameters_kept(model), undisturbed(model), torch.no_grad(), contextlib.ExitStack() as stack:
        model.eval()
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
            stack.callback(handle.remove)
        with contextlib.suppress(Exception):
            run(model)
    return found


def called_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """A run on some arguments, which stay as they are."""

    def run(model: nn.Module) -> Any:
        own_args, own_kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        return model(*own_args, **own_kwargs)

    return run


class _Behaviour(NamedTuple):
    """What three calls of a model do, the last without gradients.

    Attributes:
        tensors: what they return, with and without gradients, and what buffers are afterwards.
        slopes: sketches of the gradients of parameters, by call; None if they cannot be had.
        saved: how many numbers autograd saves for the backward pass.
        parts: what modules inside return in the last call, in order, each with its path.
    """

    tensors: list[Tensor]
    slopes: list[dict[str, Tensor] | None]
    saved: int
    parts: list[tuple[str, list[Tensor]]]


def _behaviour(model: nn.Module, run: Run, training: bool, parts: Collection[str]) -> _Behaviour:
    parameters = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_inference()}
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with parameters_kept(model), undisturbed(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(training)
        _seed()
        tensors, slopes = [], []
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = tensors_in(run(model))
            tensors += [x.detach().clone() for x in outputs]
            slopes.append(gradients(outputs, parameters))
        # Suppressed is the exception of, say, a forward that takes gradients itself.
        with torch.no_grad(), contextlib.suppress(Exception), _returned_by(model, parts) as returned:
            tensors += [x.detach().clone() for x in tensors_in(run(model))]
        with torch.no_grad():
            tensors += map(lazy_copy, model.buffers())
    return _Behaviour(tensors, slopes, saved, returned)


@contextlib.contextmanager
def _returned_by(model: nn.Module, paths: Collection[str]) -> Iterator[list[tuple[str, list[Tensor]]]]:
    """Copies of the tensors that modules return while the block runs: later operators may write into them."""
    found: list[tuple[str, list[Tensor]]] = []

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, result: found.append((path, [x.detach().clone() for x in tensors_in(result)]))

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(note(path)).remove)
        yield found


def _difference_of(expected: list[dict[str, Tensor] | None], actual: list[dict[str, Tensor] | None]) -> str | None:
    """How gradients differ, in words, or None if they do not."""
    for before, after in zip(expected, actual, strict=True):
        if (before is None) != (after is None):
            return "it has no gradients" if after is None else "it has gradients"
        if before is not None and after is not None:
            for name, some in {**before, **after}.items():
                none = torch.zeros_like(some)
                found = difference_of(before.get(name, none), after.get(name, none))
                if found is not None:
                    return f"gradient of {name} {found}"
    return None


def _difference_inside(expected: list[tuple[str, list[Tensor]]], actual: list[tuple[str, list[Tensor]]]) -> str | None:
    """How what modules inside return differs, in words, or None if it does not."""
    if [path for path, _ in expected] != [path for path, _ in actual]:
        return "other modules return"
    pairs = ((path, difference(old, new)) for (path, old), (_, new) in zip(expected, actual, strict=True))
    return next((f"{found} in {path}" for path, found in pairs if found is not None), None)


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        from numpy import random as numpy

        numpy.seed(0)


@contextlib.contextmanager
def running(model: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Let calls of a model run another forward; None for its own."""
    had = vars(model).get("forward")
    if forward is not None:
        vars(model)["forward"] = forward
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if had is not None:
            vars(model)["forward"] = had


def parts_of(trace: Trace) -> list[str]:
    """The modules whose forward hooks `forward_of` calls, by path."""
    return list(dict.fromkeys(path for returned in _returns(trace).values() for path, _ in returned))


def _returns(trace: Trace) -> dict[fx.Node, list[tuple[str, Any]]]:
    """The modules that a trace went through, and what they return, by the node after which they do."""
    found: dict[fx.Node, list[tuple[str, Any]]] = {}
    last, *_ = nodes = dict.fromkeys(trace.graph.nodes)
    merged: set[str] = set()  # those that return what is another node by now, such as another read of a weight
    for path, kind, what in trace.tracer.steps:
        if kind == "node" and what in nodes:
            last = what
        elif kind == "exit":
            found.setdefault(last, []).append((path, what))
            fx.map_arg(what, (inside := list[fx.Node]()).append)
            if any(node not in nodes for node in inside):
                merged.add(path)
    return {node: [each for each in returned if each[0] not in merged] for node, returned in found.items()}


def forward_of(model: nn.Module, trace: Trace) -> Forward:
    """A forward that runs the graph of a model, and calls the forward hooks of the modules that it goes through."""
    signature = inspect.signature(type(model).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        return _run(model, trace.graph, own, bound.arguments, returns)

    returns = _returns(trace)
    made = {name: x.clone() if isinstance(x, Tensor) else x for name, x in trace.constants.items()}
    own: Mapping[str, Any] = {**made, **trace.tracer.refusals, WHOLE_MODEL: model}
    return forward


def _run(
    model: nn.Module,
    graph: fx.Graph,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    returns: Mapping[fx.Node, list[tuple[str, Any]]],
) -> Any:
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        values[node] = _value(model, node, own, given, values)
        for path, what in returns.get(node, ()):
            module = model.get_submodule(path)
            for hook in tuple(module._forward_hooks.values()):
                hook(module, (), fx.map_arg(what, values.__getitem__))
    return values[node]


def _value(
    model: nn.Module, node: fx.Node, own: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[fx.Node, Any]
) -> Any:
    """What a node computes; the output node, what the graph returns."""
    target = str(node.target)
    if node.op == "placeholder":
        return given[target.lstrip("*")]
    if node.op == "get_attr":
        return own[target] if target in own else attribute(model, target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        return (own[target] if target in own else model.get_submodule(target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)
