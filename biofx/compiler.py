"""Compiler: `biofx.transform` captures a model and runs passes on its graph."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import fx, nn

from biofx.analysis.sites import find_weights
from biofx.analysis.understanding import Run, Understanding, remember, understand
from biofx.base.contents import slots_of
from biofx.base.copying import copied, has_strides
from biofx.base.errors import ArgumentError, CaptureError
from biofx.base.isolation import is_function, run_in_mode
from biofx.base.modules import why_without_modes
from biofx.base.precision import outputs_differ
from biofx.base.references import enclosed, held_parameters, listed_by_classes, repoint
from biofx.base.torch_internals import has_hooks, memory_of
from biofx.capture import symbolic
from biofx.capture.call_structure import CallStructure, kinds, placeholders, structure
from biofx.capture.captured_module import REGISTRIES
from biofx.capture.exported import exporting
from biofx.capture.guards import Guard
from biofx.capture.outside_variables import OutsideVariables
from biofx.capture.preconditions import check_model, refuse_replaced_forward, refuse_sharded, refuse_shared_memory
from biofx.model.changes import run_python, transformed
from biofx.model.islands import GUARD, ORIGINAL_CLASS, is_one_island
from biofx.model.owners import obstacle_to_synapses, restore_class
from biofx.model.provenance import Request, is_transformed, record_of
from biofx.model.synapses import Synapses, stored_parameters, synapses_in
from biofx.rewrite import pipeline
from biofx.rewrite.python_checks import refuse_other
from biofx.rewrite.registry import Pass, as_passes
from biofx.training.hook_switch import switch_hooks_on
from biofx.weights.declared import declared

HOOKED = "has a hook of yours on its gradient (register_hook)"

DIFFERENT_CALLS = "two calls on the same inputs return different outputs, so passes were not checked on outputs"

FRONTENDS: dict[str, Callable[[nn.Module, Any, Collection[str], Run | None], fx.GraphModule]] = {
    "symbolic": symbolic.capture,
    "module": lambda model, example_inputs, synapses, run: symbolic.capture_as_island(model),
    "export": lambda model, example_inputs, synapses, run: exporting.capture(model, example_inputs),
}


def transform(
    model: nn.Module,
    passes: Sequence[Pass] | str,
    *,
    example_inputs: Any = None,
    frontend: str = "symbolic",
    exclude: str | Collection[str] = (),
    seed: int = 0,
    inplace: bool = False,
    verify: bool = True,
    print_between: pipeline.Printer | bool | None = None,
) -> fx.GraphModule:
    """Compile a model into one with biological synapses.

    The result is a `GraphModule` that trains in any PyTorch loop. The model is traced, each pass rewrites every weight
    (see `biofx.weight_sites`), and the graph is verified after each pass. Mode, dtype and device do not change.

    A module whose forward cannot be traced (it decides by values, iterates over them, has hooks …), or whose graph has
    other outputs, becomes an *island*: the graph calls the module's own Python forward, and passes rewrite the weights
    inside. `biofx.summary` names each island with the reason. Passes that need an operator's output, such as
    `GroupUnits`, leave weights in islands alone.

    The model's Python is the truth, and runs with the effective weights. Its graph is checked against it in two calls,
    on the example inputs or on guessed ones, in each mode that forward distinguishes. The graph runs where a pass needs
    it, or after somebody has edited it; what it does not follow is an error then.

    Args:
        model: a module with values (not lazy, not on the meta device), or a model that was transformed before.
        passes: pass objects; a pipeline string such as `"split-synapses{synapses=4},fuzzy-learning-rates"`; or the
            name of a recipe. The order does not matter: passes run from the operator inwards.
        example_inputs: positional arguments (a tuple), keyword arguments (a dict) or one tensor for `model.forward`; or
            a function that runs the model, once or several times, with state carried from call to call. The model runs
            on them to find the units that each weight reads. The graph, and every pass that preserves the function, are
            checked on them. Without them, arguments are guessed, as `summary` shows; if none fit, nothing is checked.
        frontend: how the graph is captured. `"symbolic"`: symbolic tracing, with islands.
            `"module"`: the whole model is one island, which keeps all of its Python code and changes only weights, as
            for models of transformers and their `generate`. `"export"`: `torch.export` on the example inputs, which
            follows any Python whose decisions do not depend on values. The graph consists of dispatcher operators; it
            accepts other batch sizes, and checks its other assumptions about its arguments. Arguments that are not
            tensors, and dtypes that forward queries, are fixed to those of the example inputs.
        exclude: glob patterns over parameter names; matching weights are left alone.
        seed: seed of all random draws. Each also depends on the pass and the weight's name, so adding a layer changes
            no other layer's draw. The global random number generators are neither read nor moved.
        inplace: use the parameters and submodules of `model` instead of copies. They belong to the result, so `model`
            must not be used afterwards. Build the optimizer afterwards: a pass may replace parameters.
        verify: check all invariants after each pass (`biofx.verify`).
        print_between: a function that gets the graph as text after each pass; `True` prints it.

    Returns:
        The transformed model. `biofx.summary` shows every weight; `meta["biofx"]` lists the passes that ran, with their
        options and times.

    Raises:
        ArgumentError: an invalid argument, or a model without weights.
        CaptureError: the model cannot be copied, or its class cannot have subclasses; or `torch.export` cannot capture
            it; or it has other outputs when captured. The message says what else to try.
        PipelineError: unknown passes or options, or passes that exclude each other.
        VerificationError: a pass broke an invariant.
        If it raises, `model` has not changed.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> bio = biofx.transform(model, [passes.SplitSynapses(synapses=4), passes.FuzzyLearningRates(nu=0.16)])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(bio(x), model(x), atol=1e-6)
        True
    """
    chosen = as_passes(passes)
    if frontend not in FRONTENDS:
        raise ArgumentError(f"frontend must be one of {', '.join(map(repr, FRONTENDS))}, got {frontend!r}")
    request = Request((*chosen,), frontend, _patterns(exclude), _seed(seed), example_inputs is not None)
    printer = _printer(print_between)
    return build(model, request, example_inputs, inplace=inplace, verify=verify, printer=printer)


def build(
    model: nn.Module,
    request: Request,
    example_inputs: Any,
    *,
    inplace: bool,
    verify: bool,
    printer: pipeline.Printer | None = None,
    values_will_be_loaded: bool = False,
) -> fx.GraphModule:
    """Compile a model as a valid request says; errors as of `transform`.

    Args:
        model: the model.
        request: the passes, the front end, the seed …
        example_inputs: as for `transform`.
        inplace: as for `transform`.
        verify: as for `transform`.
        printer: called with the graph's text after each pass.
        values_will_be_loaded: whether the caller replaces all values, so that passes may skip computing them.
    """
    again = is_transformed(model)
    _check(model, inplace=inplace)
    outside = OutsideVariables(dict(model.named_modules()))
    made: list[nn.Module] = []
    restored = _restored_on_error(model, made) if inplace else nullcontext()
    with torch.inference_mode(False), ExitStack() as after, restored:
        after.callback(outside.restore_generators)
        source = model if inplace else _copy(model)
        _follow_attributes(source)
        expected = None if example_inputs is None else _outputs(source, example_inputs)
        understood = understand(source, example_inputs)
        if not again:
            refuse_shared_memory(model, () if understood is None else understood.recording.attributes_read())
        repeats = outside.random() is None
        if source is not model and understood is not None:
            _refuse_reads_of_original(model, understood)
        old = vars(source).pop(GUARD, None)
        vars(source).pop("forward", None)  # it is that of the class
        bio = source if again else _captured(source, request.frontend, example_inputs, understood)
        assert isinstance(bio, fx.GraphModule)
        made.append(bio)
        remember(bio, understood)
        record_of(bio).notes += filter(None, [outside.note, None if inplace else _note_on_lists(model)])
        if not record_of(bio).by_hand:
            switch_hooks_on(bio)  # a copy of an attached model has no optimizer
        excluded = _excluded(bio, request.exclude)
        _check_weights(bio, excluded)
        outputs = pipeline.run(
            bio,
            request.passes,
            excluded,
            request.seed,
            understood,
            None if inplace else model,
            outputs=_checked_outputs(bio, example_inputs, expected) if repeats and bio is not source else None,
            check=verify,
            repeats=repeats,
            print_between=printer,
            values_will_be_loaded=values_will_be_loaded,
        )
        record_of(bio).requests.append(request)
        _note_questions(bio, understood)
        guard = _guard(bio, request.frontend, understood, old)
        if guard is not None:
            vars(bio)[GUARD] = guard
        if understood is not None and repeats:
            refuse_other(bio, understood.run, outputs, runs_python=guard is None or guard.needs is None)
    return bio


def _follow_attributes(source: nn.Module) -> None:
    """Let the Python run of a model that was transformed before, and whose graph no longer does what it does."""
    guard: Guard | None = vars(source).get(GUARD)
    if guard is None or not isinstance(source, fx.GraphModule):
        return
    changed = guard.change(source)
    if changed is not None:
        run_python(source, f"{changed} since the transform")


def _captured(source: nn.Module, frontend: str, inputs: Any, understood: Understanding | None) -> fx.GraphModule:
    """A model as a graph."""
    if understood is None:
        return FRONTENDS[frontend](source, inputs, declared(source)[0], None)
    concrete = understood.arguments if is_function(inputs) else inputs
    return FRONTENDS[frontend](source, concrete, understood.weights, understood.run)


def _guard(bio: fx.GraphModule, frontend: str, understood: Understanding | None, old: Guard | None) -> Guard | None:
    """The guard of a captured model, which may have an old one; None if its graph is a call of its Python."""
    if is_one_island(bio):
        return None
    if old is not None:
        return Guard(bio, old.structures, old.kinds)
    call = None if frontend == "export" or understood is None else understood.recording.first_call
    known = {} if call is None else kinds(placeholders(bio.graph), *call)
    return Guard(bio, _checked(frontend, understood), known)


def _checked(frontend: str, understood: Understanding | None) -> frozenset[CallStructure] | None:
    """The structures of the arguments on which a graph was checked; None if the graph checks its arguments itself."""
    if frontend == "export" or (understood is not None and not understood.is_one_call):
        return None
    call = None if understood is None else understood.recording.first_call
    return frozenset() if call is None else frozenset({structure(*call)})


def _seed(seed: Any) -> int:
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= int(seed) < 2**63:
        raise ArgumentError(f"seed must be a 64-bit integer, got {seed!r}")
    return int(seed)


def _patterns(exclude: Any) -> tuple[str, ...]:
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(f"exclude must be a glob pattern or a list of them, got {exclude!r}")
    return tuple(patterns)


def _printer(print_between: Any) -> pipeline.Printer | None:
    if print_between is None or isinstance(print_between, bool):
        return print if print_between else None
    if not callable(print_between):
        raise ArgumentError(f"print_between must be True or a function of one string, got {print_between!r}")
    return print_between  # type: ignore[no-any-return]


def _check(model: nn.Module, *, inplace: bool) -> None:
    """Refuse what cannot be transformed, whatever the inputs."""
    if is_transformed(model):
        refuse_sharded(transformed(model))
        refuse_replaced_forward(transformed(model))
        if inplace and record_of(model).attached:
            raise ArgumentError("model is attached to an optimizer; detach() it before transforming it in place")
    else:
        check_model(model)
    for name in slots_of(type(model)) if inplace else ():
        if hasattr(model, name):
            raise ArgumentError(
                f"model.{name} is in __slots__; keep it in a plain attribute: the result is another object, which only "
                "shares those"
            )
    for name, module in model.named_modules():
        if module is not model and is_transformed(module):
            raise ArgumentError(
                f"{name} was already transformed separately; transform the whole model at once, or fold {name} first"
            )


def _copy(model: nn.Module) -> nn.Module:
    found = enclosed(model)
    if found is not None:
        raise CaptureError(
            f"{found[0]} of {type(model).__name__} is or holds a function that refers to {found[1]}, and its copy "
            "would refer to it as well; transform it with inplace=True, or make the function a method"
        )
    hooked = next((name for name, parameter in model.named_parameters() if has_hooks(parameter)), None)
    if hooked is not None:
        raise CaptureError(
            f"{hooked} {HOOKED}, and copies of parameters lose it; transform the model with inplace=True, which leaves "
            "this weight alone, or remove the hook and register it on the result's parameter"
        )
    try:
        return copied(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}; transform it with inplace=True"
        ) from error


def _note_on_lists(model: nn.Module) -> str | None:
    """What `summary` says if a class lists modules of a model that was copied."""
    listed = listed_by_classes(model)
    return listed and (
        f"{listed} lists modules of the original, not their copies in this model; what acts on all that it lists, such "
        "as a reset of their states, does not reach this model: transform with inplace=True for that"
    )


def _refuse_reads_of_original(model: nn.Module, understood: Understanding) -> None:
    """Refuse a model whose copy reads tensors of the original, which the result would not train."""
    recording = understood.recording
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_read = id(tensor) in recording.strangers
        if is_read or (has_strides(tensor) and memory_of(tensor) in recording.strange_memory):
            instead = "transform it with inplace=True" if is_read else f"read self.{name} there"
            raise CaptureError(
                f"the copy of {type(model).__name__} reads {name} of the original model, through a weak reference or a "
                f"variable outside of the model; {instead}"
            )


@contextmanager
def _restored_on_error(model: nn.Module, made: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the tensors, children, classes and graph of a model that is changed in place, if the block raises.

    Args:
        model: the model.
        made: the models that the block makes of it, to which attributes of modules refer then.
    """
    saved = [(m, {r: copy.copy(getattr(m, r)) for r in REGISTRIES}, m.training) for m in model.modules()]
    # Passes replace weights, so the old tensors are intact, but they write into biases, scales and statistics.
    values = [(x, x.detach().clone()) for x in (*model.parameters(), *model.buffers()) if _is_vector(x)]
    classes = [(m, type(m)) for m in model.modules()]
    synapses = [(s, s.links, dict(s.users), s.output_rewritten_by) for s in synapses_in(model).values()]
    graph: fx.Graph | None = None
    guard = vars(model).get(GUARD)
    if is_transformed(model) and isinstance(model, fx.GraphModule):
        graph, record, was_island = model.graph, record_of(model), is_one_island(model)
        fields = {k: copy.copy(v) for k, v in vars(record).items()}
        model.graph = copy.deepcopy(graph)
    try:
        yield
    except BaseException:
        repoint(model, {id(other): model for other in made})
        for module, contents, mode in saved:
            for registry, content in contents.items():
                getattr(module, registry).clear()
                getattr(module, registry).update(content)
            module.training = mode
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for each, links, users, rewritten_by in synapses:
            each.links, each.users, each.output_rewritten_by = links, users, rewritten_by
        for module, cls in classes:
            if type(module) is not cls:
                restore_class(module)
        if graph is not None and isinstance(model, fx.GraphModule):
            vars(record).update(fields)
            if guard is not None:
                vars(model)[GUARD] = guard
            if not was_island:
                vars(model).pop(ORIGINAL_CLASS, None)
            model.graph = graph
        raise


def _is_vector(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.dim() < 2


def _outputs(model: nn.Module, example_inputs: Any) -> list[torch.Tensor]:
    try:
        return run_in_mode(model, example_inputs)
    except Exception as error:
        why = why_without_modes(model) or f"example_inputs do not fit {type(model).__name__}.forward"
        raise ArgumentError(f"{why}: {error}") from error


def _checked_outputs(
    bio: fx.GraphModule, example_inputs: Any, expected: list[torch.Tensor] | None
) -> list[torch.Tensor] | None:
    """The outputs of a captured model, which are those of the model; None if there are none, or others in each call."""
    if expected is None:
        return None
    outputs = run_in_mode(bio, example_inputs)
    found = outputs_differ(bio, example_inputs, expected, outputs)
    if found is None:
        return outputs
    if outputs_differ(bio, example_inputs, outputs, run_in_mode(bio, example_inputs)) is not None:
        record_of(bio).notes.append(DIFFERENT_CALLS)
        return None  # forward counts its calls in a variable outside of the model, for example
    why = (
        "Its forward asks for the class of the model, which is a subclass; use isinstance"
        if is_one_island(bio)
        else "Its forward takes decisions, draws random numbers or has side effects that a graph cannot express; "
        'transform it with frontend="module"'
    )
    raise CaptureError(f"{type(bio).__name__} has other outputs when traced: {found}. {why}")


def _note_questions(bio: fx.GraphModule, understood: Understanding | None) -> None:
    """Note a weight with synapses if forward asks about more than its numbers."""
    record = record_of(bio)
    asked = set() if understood is None else understood.recording.asked & set(synapses_in(bio))
    if asked and not record.asked:
        record.asked = min(asked)
        record.notes.append(
            f"torch.compile leaves the model uncompiled, as forward asks more about {record.asked} than its numbers, "
            "such as whether it is frozen"
        )


def _excluded(bio: fx.GraphModule, patterns: Sequence[str]) -> dict[str, str]:
    canonical, own = {id(p): name for name, p in stored_parameters(bio)}, synapses_in(bio)
    held = {canonical[x]: holder for x, holder in held_parameters(bio).items() if x in canonical}
    hooked = {name: HOOKED for name, parameter in stored_parameters(bio) if has_hooks(parameter)}
    result = {name: holder for name, holder in held.items() if name not in own} | hooked
    result |= {
        canonical[id(parameter)]: reason
        for owner in bio.modules()
        for key, parameter in owner._parameters.items()
        if id(parameter) in canonical
        and not isinstance(owner, Synapses)
        and (reason := obstacle_to_synapses(owner, key))
    }
    names = {name: canonical[id(p)] for name, p in stored_parameters(bio, remove_duplicate=False)}
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            known = ", ".join(find_weights(bio).sites) or "none"
            raise ArgumentError(f'exclude pattern "{pattern}" matches no weight; the model has {known}')
        result.update({names[match]: f'excluded by pattern "{pattern}"' for match in matches})
    return result


def _check_weights(bio: fx.GraphModule, excluded: dict[str, str]) -> None:
    sites, others = find_weights(bio)
    if not sites:
        reasons = "".join(f"\n  - {name}: {reason}" for name, reason in others.items()) or " it has no parameters"
        raise ArgumentError(f"{type(bio).__name__} has no weight that biofx can give synapses:{reasons}")
    if not set(sites) - set(excluded):
        reasons = "".join(f"\n  - {name}: {excluded[name]}" for name in sites)
        raise ArgumentError(f"no weight is left to transform:{reasons}")
