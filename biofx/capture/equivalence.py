"""Equivalence: whether a graph computes the same as the Python from which it was traced.

A tracer cannot foresee every way in which Python inspects or remembers a value. So both run on the same inputs with the
same random numbers: twice in each mode, because remembered values only show in the second call, and once without
gradients. Training mode is skipped for a forward that neither reads the mode nor recomputes activity in the backward
pass. The outputs of submodules are compared as well, because silent units may hide a difference from the output of the
model. A module whose graph differs becomes an island.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from biofx.base.comparison import difference, difference_of
from biofx.base.contents import tensors_in
from biofx.base.generators import seed_global
from biofx.base.isolation import gradients, parameters_kept, tensors_in_attributes, undisturbed
from biofx.base.lazy_copies import lazy_copy
from biofx.base.precision import coarsest_dtype
from biofx.base.torch_internals import is_transformed_by_functions, pytree
from biofx.model.chain import attribute, compute
from biofx.model.islands import WHOLE_MODEL

if TYPE_CHECKING:
    from biofx.capture.tracing import Trace

MORE, FEW = 1.5, 1024  # autograd may save MORE times as many numbers for a graph as for Python, plus FEW

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
    submodules: Collection[str] = (),
    outside: Sequence[Tensor] = (),
) -> str | None:
    """Describe how a graph differs from the Python from which it was traced; None if it does not.

    Args:
        model: the model; it does not change.
        run: runs the model.
        graph: creates a forward that runs the graph.
        python: a forward that runs the Python; None for the model's own.
        by_mode: whether forward reads the mode.
        submodules: paths of submodules to compare; `graph` has to call their forward hooks.
        outside: tensors outside of the model, into which forward may write.
    """
    saves_more = False
    for training in (False, True):
        if training and not (by_mode or saves_more):
            continue
        try:
            with replaced_forward(model, python):
                expected = _behaviour(model, run, training, submodules, outside)
        except Exception:  # noqa: BLE001 - the model cannot run in this mode, as batch norm on one sample
            continue
        where = f"in {'training' if training else 'evaluation'} mode"
        try:
            with replaced_forward(model, graph()):
                actual = _behaviour(model, run, training, submodules, outside)
        except Exception as error:  # noqa: BLE001 - forward is anybody's code
            return f"its graph fails {where}: {' '.join(str(error).split())[:120]}"
        found = _difference(expected, actual)
        if found is not None and _computes_in_single(model, run, python):
            found = _difference(expected, actual, torch.float32)
        if found is not None:
            return f"its graph computes something else {where}: {found}"
        # If Python recomputes activity, it may update its state twice, which only shows in training mode.
        saves_more = actual.saved > expected.saved
        if actual.saved > MORE * expected.saved + FEW:
            return (
                "its forward recomputes activity in the backward pass, to save memory, which a graph cannot represent"
            )
    return None


def first_calls(model: nn.Module, paths: Iterator[str], run: Run) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run a model in evaluation mode, and return the arguments of the first call of each module, by path."""
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


class _Behaviour(NamedTuple):
    """The effects of three calls of a model, the last without gradients.

    Attributes:
        tensors: the outputs, with and without gradients.
        state: afterwards, the buffers and the tensors in attributes, by name.
        writes: how often each tensor outside of the model was written to.
        slopes: sketches of the gradients of parameters, by call; None if they cannot be computed.
        saved: the number of values that autograd saves for the backward pass.
        inside: the outputs of submodules in the last call, in order, each with the path.
    """

    tensors: list[Tensor]
    state: list[tuple[str, Tensor]]
    writes: list[int]
    slopes: list[dict[str, Tensor] | None]
    saved: int
    inside: list[tuple[str, list[Tensor]]]


def _behaviour(
    model: nn.Module, run: Run, training: bool, submodules: Collection[str], outside: Sequence[Tensor]
) -> _Behaviour:
    parameters = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_inference()}
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with parameters_kept(model), undisturbed(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(training)
        seed_global()
        versions = _versions(outside)
        held = [*tensors_in_attributes(model)]
        tensors, slopes = [], []
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = tensors_in(run(model))
            tensors += [x.detach().clone() for x in outputs]
            slopes.append(gradients(outputs, parameters))
        # A forward that computes gradients itself fails without them; then there is nothing to compare.
        with torch.no_grad(), contextlib.suppress(Exception), _outputs_of(model, submodules) as inside:
            tensors += [x.detach().clone() for x in tensors_in(run(model))]
        with torch.no_grad():
            state = [(name, lazy_copy(tensor)) for name, tensor in (*model.named_buffers(), *held)]
    writes = [after - before for after, before in zip(_versions(outside), versions, strict=True)]
    return _Behaviour(tensors, state, writes, slopes, saved, inside)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@contextlib.contextmanager
def _outputs_of(model: nn.Module, paths: Collection[str]) -> Iterator[list[tuple[str, list[Tensor]]]]:
    """Collect the outputs of submodules while the block runs, as copies: later operators may write into them."""
    found: list[tuple[str, list[Tensor]]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if not is_transformed_by_functions():  # no tensor may leave these
                found.append((path, [x.detach().clone() for x in tensors_in(result)]))

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(note(path)).remove)
        yield found


def _computes_in_single(model: nn.Module, run: Run, python: Forward | None) -> bool:
    """Whether a model computes in float32 or less, whatever it returns.

    Graph and Python call the same operators, so parts in half precision allow no more than that: they differ by
    rounding in fused operators alone, and what half precision calls rounding may be a wrong graph.
    """
    with replaced_forward(model, python):
        return coarsest_dtype(model, run) not in (None, torch.float64, torch.complex128)


def _difference(expected: _Behaviour, actual: _Behaviour, coarsest: torch.dtype | None = None) -> str | None:
    """Describe how two behaviours differ by more than rounding; None if they do not."""
    return (
        difference(expected.tensors, actual.tensors, coarsest)
        or _difference_of_state(expected.state, actual.state, coarsest)
        or (None if expected.writes == actual.writes else "it writes into a tensor outside of the model otherwise")
        or _difference_of(expected.slopes, actual.slopes, coarsest)
        or _difference_inside(expected.inside, actual.inside, coarsest)
    )


def _difference_of_state(
    expected: list[tuple[str, Tensor]], actual: list[tuple[str, Tensor]], coarsest: torch.dtype | None
) -> str | None:
    """Describe how buffers and tensors in attributes differ; None if they do not."""
    if [name for name, _ in expected] != [name for name, _ in actual]:
        return "it has other buffers"
    pairs = ((name, difference_of(old, new, coarsest)) for (name, old), (_, new) in zip(expected, actual, strict=True))
    return next((f"{name} {found}" for name, found in pairs if found is not None), None)


_Slopes = list[dict[str, Tensor] | None]


def _difference_of(expected: _Slopes, actual: _Slopes, coarsest: torch.dtype | None) -> str | None:
    """Describe how gradients differ; None if they do not."""
    for before, after in zip(expected, actual, strict=True):
        if (before is None) != (after is None):
            return "it has no gradients" if after is None else "it has gradients"
        if before is not None and after is not None:
            for name, some in {**before, **after}.items():
                none = torch.zeros_like(some)
                found = difference_of(before.get(name, none), after.get(name, none), coarsest)
                if found is not None:
                    return f"gradient of {name} {found}"
    return None


_Inside = list[tuple[str, list[Tensor]]]


def _difference_inside(expected: _Inside, actual: _Inside, coarsest: torch.dtype | None) -> str | None:
    """Describe how the outputs of submodules differ; None if they do not."""
    if [path for path, _ in expected] != [path for path, _ in actual]:
        return "other submodules run"
    pairs = ((path, difference(old, new, coarsest)) for (path, old), (_, new) in zip(expected, actual, strict=True))
    return next((f"{found} in {path}" for path, found in pairs if found is not None), None)


@contextlib.contextmanager
def replaced_forward(model: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Replace the forward of a model while the block runs; None keeps its own."""
    had = vars(model).get("forward")
    if forward is not None:
        vars(model)["forward"] = forward
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if had is not None:
            vars(model)["forward"] = had


def compared_submodules(trace: Trace) -> list[str]:
    """Return the paths of the submodules whose forward hooks `forward_of` calls."""
    return list(dict.fromkeys(path for returned in _returns(trace).values() for path, _ in returned))


def _returns(trace: Trace) -> dict[fx.Node, list[tuple[str, Any]]]:
    """Return the traced submodules with their results, by the node after which they return."""
    found: dict[fx.Node, list[tuple[str, Any]]] = {}
    last, *_ = nodes = dict.fromkeys(trace.graph.nodes)
    merged: set[str] = set()  # submodules whose result was merged with another node, such as a read of the same weight
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
    """Return a forward that runs a graph and calls the forward hooks of the submodules in it."""
    signature = inspect.signature(type(model).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        values: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            values[node] = _value(model, node, own, bound.arguments, values)
            for path, what in returns.get(node, ()):
                module = model.get_submodule(path)
                for hook in tuple(module._forward_hooks.values()):
                    hook(module, (), fx.map_arg(what, values.__getitem__))
        return values[node]

    returns = _returns(trace)
    constants = {name: x.clone() if isinstance(x, Tensor) else x for name, x in trace.constants.items()}
    # The model does not have these attributes yet; it gets them when the graph turns out to be right.
    own: Mapping[str, Any] = {**constants, **trace.tracer.refusals, WHOLE_MODEL: model}
    return forward


def _value(
    model: nn.Module, node: fx.Node, own: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[fx.Node, Any]
) -> Any:
    """Compute a node; the value of the output node is the result of the graph."""
    target = str(node.target)
    if node.op == "placeholder":
        return given[target.lstrip("*")]
    if node.op == "get_attr":
        return own[target] if target in own else attribute(model, target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_module" and target in own:
        return own[target](*args, **kwargs)
    return compute(model, node, args, kwargs)
