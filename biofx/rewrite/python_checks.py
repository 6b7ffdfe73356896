"""Checks of Python that runs with synapses: does it compute what it computes with parameters, and what the graph does?

While a graph was traced, what Python asked of weights was asked of parameters. Python that runs asks weights with
synapses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction

from biofx.base.comparison import difference
from biofx.base.contents import tensors_in
from biofx.base.errors import CaptureError
from biofx.base.isolation import parameters_kept, run_in_mode, seeds_of, undisturbed
from biofx.base.precision import outputs_differ
from biofx.capture.tracer import HelperModule
from biofx.model.islands import is_one_island
from biofx.model.owners import without_synapses
from biofx.model.provenance import record_of
from biofx.model.synapses import Synapses, synapses_in
from biofx.rewrite.pipeline import repeated_outputs

if TYPE_CHECKING:
    from biofx.analysis.understanding import Run


def refuse_other(bio: fx.GraphModule, run: Run, outputs: list[Tensor] | None, *, runs_python: bool) -> None:
    """Refuse a model whose Python computes something else now that its weights have synapses.

    Args:
        bio: the model.
        run: runs it.
        outputs: the outputs of its graph, if they are those of its Python with parameters.
        runs_python: whether all of its Python runs, not only its islands.
    """
    islands = _alone(bio)
    paths = [""] if runs_python else islands
    if outputs is None:
        outputs = repeated_outputs(bio, run)
        _refuse_other_values(bio, run, paths)
    elif runs_python and not is_one_island(bio):
        _refuse_other_python(bio, run, outputs)
    if islands or any(isinstance(module, HelperModule) for module in bio.modules()):  # it distinguishes the modes
        for learning in (False, True):
            _refuse_other_values(bio, run, paths, training=True, learning=learning)
    _refuse_other_gradients(bio, run, islands)


def _alone(bio: fx.GraphModule) -> list[str]:
    """The paths of the islands that alone read their weights."""
    if is_one_island(bio):
        return [""]
    read = [str(node.target) for node in bio.graph.find_nodes(op="get_attr")]
    return [path for path in record_of(bio).islands if not any(name.startswith(f"{path}.") for name in read)]


@contextmanager
def _with_parameters(bio: fx.GraphModule, paths: Sequence[str]) -> Iterator[None]:
    """Replace the synapses in islands by parameters that have the values of the weights, while the block runs."""
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(without_synapses(bio.get_submodule(path)))
        yield


def _refuse_other_values(
    bio: fx.GraphModule, run: Run, paths: Sequence[str], *, training: bool = False, learning: bool = False
) -> None:
    """Refuse modules that compute something else than with plain parameters that have the values of their weights."""
    if not paths:
        return
    try:
        with _with_parameters(bio, paths):
            expected, again = (run_in_mode(bio, run, training=training, learning=learning) for _ in range(2))
    except Exception:  # noqa: BLE001 - the model cannot run in this mode, as batch norm on one sample
        return
    if difference(expected, again) is not None:  # it draws from a random number generator that nothing restores
        return
    try:
        actual = run_in_mode(bio, run, training=training, learning=learning)
        found = outputs_differ(bio, run, expected, actual)
    except Exception as error:  # noqa: BLE001 - forward is anybody's code
        found = f"it fails: {error}"
    if found is not None:
        names = ", ".join(path or "the model" for path in paths)
        mode = f"{' in training mode' if training else ''}{' with gradients' if learning else ''}"
        raise CaptureError(
            f"{type(bio).__name__} computes something else with weights that have synapses than with parameters of the "
            f"same values{mode}: {found}. A module ({names}) decides by the types, the identity or the number of its "
            "weights or submodules, or reads weights from parameters(), get_parameter() or _parameters, which hold "
            "stored values; read weights as attributes, decide by their values or names, or exclude these weights"
        )


def _refuse_other_gradients(bio: fx.GraphModule, run: Run, paths: Sequence[str]) -> None:
    """Refuse islands in which a function that defines its own backward gives synapses other gradients than parameters.

    Such a function may be given a weight, run its module again in the backward pass, and differentiate by the weight
    that it was given. The module reads another tensor then, so the gradient would be 0.
    """
    inside = {path: bio.get_submodule(path) for path in paths}
    found = {
        child: f"{path}.{name}".lstrip(".") for path, m in inside.items() for name, child in synapses_in(m).items()
    }
    learned = {child: name for child, name in found.items() if child.stored.requires_grad}
    if not learned:
        return
    try:
        with _with_parameters(bio, paths):
            plain = _gradients(bio, run, [bio.get_parameter(name) for name in learned.values()])
    except Exception:  # noqa: BLE001 - it cannot run in training mode, or be differentiated by torch.autograd.grad
        return
    if plain is None:
        return
    try:
        actual = _gradients(bio, run, [child.stored for child in learned])
    except Exception as error:
        raise CaptureError(
            f"{type(bio).__name__} cannot be differentiated with weights that have synapses: {error}. It can with "
            f"parameters; exclude the weights of its untraced modules ({', '.join(learned.values())})"
        ) from error
    if actual is None:  # it took another way, which other checks see
        return
    for (child, name), given, expected in zip(learned.items(), actual, plain, strict=True):
        differs = difference([_of_stored(child, expected)], [given])
        if differs is not None:
            raise CaptureError(
                f"{name} gets another gradient than a parameter would: {differs.removeprefix('output 0 ')}. A function "
                "that defines its own backward was given the weight and differentiates by it; give it "
                f"module.parameters() instead, which are what is stored, or exclude the weight (exclude=[{name!r}])"
            )


def _gradients(bio: fx.GraphModule, run: Run, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The gradients of a scalar that depends on all outputs; None if no function defines its own backward."""
    with parameters_kept(bio), undisturbed(bio), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bio.train()
        ends = [output for output in tensors_in(run(bio)) if output.requires_grad]
        if not _has_own_backward(ends):
            return None
        found = torch.autograd.grad(ends, tensors, seeds_of(ends), allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(tensors, found, strict=True)]


def _has_own_backward(ends: Sequence[Tensor]) -> bool:
    """Whether a `torch.autograd.Function` takes part in the computation of some tensors."""
    waiting: list[Any] = [end.grad_fn for end in ends]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            return True
        new = {each for each, _ in getattr(node, "next_functions", ()) if each is not None} - seen
        seen |= new
        waiting += new
    return False


def _of_stored(child: Synapses, gradient: Tensor) -> Tensor:
    """The gradient of what is stored, from that of the weight."""
    with torch.enable_grad():
        weight = child()
    if weight is child.stored:
        return gradient
    (result,) = torch.autograd.grad(weight, child.stored, gradient)
    return result


def _refuse_other_python(bio: fx.GraphModule, run: Run, graph: list[torch.Tensor]) -> None:
    """Refuse a model whose Python has other outputs than its graph now that its weights have synapses."""
    try:
        found = outputs_differ(bio, run, graph, run_in_mode(bio, run))
    except Exception as error:
        raise CaptureError(_why_python_differs(bio, f"it fails: {error}")) from error
    if found is not None:
        raise CaptureError(_why_python_differs(bio, found))


def _why_python_differs(bio: fx.GraphModule, found: str) -> str:
    return (
        f"the Python of {type(bio).__name__} does not compute what its graph does, now that weights have synapses: "
        f"{found}. It may read weights with get_parameter() or from _parameters, which hold stored values, or compare "
        "type(module), which is a subclass; read weights as attributes, use isinstance, or exclude these weights"
    )
