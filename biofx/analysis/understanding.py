"""Understanding: what one recorded run shows about a model, put together."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.analysis.activity import Activity
from biofx.analysis.flow import Flow
from biofx.analysis.forms import Forms
from biofx.analysis.graphs import annotate, as_recorded, shown
from biofx.analysis.readings import PresynapticUnits, UnitReadings
from biofx.analysis.unit_analysis import UnitAnalysis
from biofx.base.contents import tensors_in
from biofx.base.errors import ArgumentError
from biofx.base.isolation import arguments_kept, is_function, parameters_kept, refuse_misfit, split_inputs, undisturbed
from biofx.base.randomness import fixed_defaults
from biofx.model.islands import is_one_island
from biofx.model.provenance import record_of
from biofx.model.synapses import stored_parameters
from biofx.recording import inputs as guesses
from biofx.recording.catalog import Kind
from biofx.recording.questions import Questions
from biofx.recording.recorder import Recorder, recording_of
from biofx.weights.declared import declared, why_unfit
from biofx.weights.facts import NOT_A_SYNAPSE, Need, WeightFacts

if TYPE_CHECKING:
    from biofx.analysis.numbers import Population
    from biofx.analysis.reads import WeightRead
    from biofx.recording.operations import Operation, Recording

NOT_USED = "not used in forward"
BY_FUNCTION = "given by a function"
Run = Callable[[nn.Module], Any]
"""Runs a model, once or several times."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class UnitFacts:
    """What a run shows about the units of a model.

    Attributes:
        populations: the populations whose units reach a weight; the first is nobody.
        owner: the index in `populations` of each unit, by its number; 0 for numbers that no unit has any more.
        classes: the number that stands for all units that need one sign with a unit, by its number.
        readings: what each weight reads, by the weight's name.
        scales: the parameters that multiply units on their way to a weight, such as γ of a batch norm, each with the
            weights that they lead to.
        others: why other parameters are not weights.
        acting: which of these act on units all the same, so that they may excite and inhibit.
        inputs: the inputs with which the model ran, in words.
        notes: remarks about that run.
    """

    populations: tuple[Population, ...]
    owner: Tensor
    classes: Tensor
    readings: dict[str, PresynapticUnits]
    scales: dict[str, set[str]]
    others: dict[str, str]
    acting: frozenset[str]
    inputs: str
    notes: list[str]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Understanding(UnitFacts):
    """What a run shows about a model.

    Attributes:
        recording: the run.
        forms: the parameters in it.
        unit_readings: the numbers of units, and what each weight reads by them.
        flow: which weights a signal passes before others.
        weights: the facts of every parameter that is made of synapses, by its name.
        run: runs the model on the same inputs.
        is_one_call: whether that is one call, and no function of the user's.
    """

    recording: Recording
    forms: Forms
    unit_readings: UnitReadings
    flow: Flow
    weights: dict[str, WeightFacts]
    run: Run
    is_one_call: bool

    @property
    def arguments(self) -> Any:
        """The arguments of the model's first call, as example inputs."""
        args, kwargs = self.recording.first_call or ((), {})
        return kwargs if kwargs and not args else args


def understand(model: nn.Module, example_inputs: Any = None) -> Understanding | None:
    """What one run of a model shows about it; None if it runs with none of the inputs that are tried.

    The run is in evaluation mode. If it leaves weights unused, one in training mode follows.

    Args:
        model: any module, transformed or not.
        example_inputs: arguments of the model, as for `transform`: a tuple, a dict, one argument, or a function that
            runs the model, once or several times. None: arguments that fit are guessed.

    Raises:
        ArgumentError: the example inputs do not fit the model.
    """
    found = runner(model, example_inputs)
    if found is None:
        return None
    run, words = found
    return read_off(model, recorded(model, run), run, words)


def understand_again(model: nn.Module, understood: Understanding) -> Understanding:
    """What a run on the same inputs shows about a model that has changed since."""
    return read_off(model, recorded(model, understood.run), understood.run, understood.inputs)


def runner(model: nn.Module, example_inputs: Any) -> tuple[Run, str] | None:
    """How a model is run, and its inputs in words."""
    if is_function(example_inputs):
        return example_inputs, BY_FUNCTION
    if example_inputs is not None:
        return call(*split_inputs(example_inputs)), "given"
    guess = guesses.guess(model)
    return None if guess is None else (call(guess.args, guess.kwargs), guess.description)


def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """Runs a model on copies of some arguments."""

    def run(model: nn.Module) -> Any:
        with arguments_kept((args, kwargs)) as (own_args, own_kwargs):
            try:
                return tensors_in(model(*own_args, **own_kwargs))  # before what it keeps in arguments is undone
            except TypeError:
                refuse_misfit(model, args, kwargs)
                raise

    return run


def recorded(model: nn.Module, run: Run, *, by_node: bool = False) -> Recording:
    """A run in evaluation mode, followed by one in training mode if weights were left unused.

    Args:
        model: any module.
        run: runs it.
        by_node: run the graph of a captured model node by node, so that it is known what each node computed.
    """
    try:
        return _recorded(model, run, by_node=by_node, learning=False)
    except ArgumentError as error:
        if not isinstance(error.__cause__, RuntimeError) or "grad" not in str(error.__cause__):
            raise
    return _recorded(model, run, by_node=by_node, learning=True)  # forward needs gradients


def _recorded(model: nn.Module, run: Run, *, by_node: bool, learning: bool) -> Recording:
    recorder = Recorder()
    recording = recorder.recording
    with (
        recording_of(recorder, model),
        torch.set_grad_enabled(learning),
        as_recorded(model, recorder, by_node=by_node),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            run(model)
        except ArgumentError:
            raise
        except Exception as error:
            where = f", at {recorder.failed}" if recorder.failed else ""
            raise ArgumentError(f"{type(model).__name__} fails on example_inputs{where}: {error}") from error
        if recorder.has_unused():
            # Nodes keep what they computed in evaluation mode; the run in training mode only adds operators.
            before, nodes = len(recording.operations), dict(recording.nodes)
            of_nodes = {node: list(operations) for node, operations in recording.operations_of.items()}
            _try_in_training(model, run)
            recording.again.update(recording.operations[before:])
            recording.nodes.update(nodes)
            recording.operations_of.update(of_nodes)
    return recording


def changed_in_training(model: nn.Module, run: Run) -> dict[str, str]:
    """The parameters that a run in training mode changes, each with the reason why it is not made of synapses."""
    found: dict[str, str] = {}
    for learning in (True, False):  # a forward may change a weight in one case, and fail in the other
        changed = _changed(model, run, learning)
        if changed is None:
            continue
        recorder = Recorder()
        with (
            recording_of(recorder, model, training=True),
            torch.set_grad_enabled(learning),
            as_recorded(model, recorder),
        ):
            _try_in_training(model, run)
        # A recording does not see what an optimizer in forward does: there, `parameters()` yields copies.
        found |= dict.fromkeys(changed, "forward changes it in training mode")
        found |= {name: _change(operation) for name, operation in recorder.recording.changed.items()}
    return found


def _changed(model: nn.Module, run: Run, learning: bool) -> list[str] | None:
    """The parameters that a run in training mode writes into; None if it does not replace any either."""
    with parameters_kept(model) as kept, undisturbed(model), torch.set_grad_enabled(learning):
        before = {id(parameter): name for name, parameter in model.named_parameters()}
        _try_in_training(model, run)
        is_replaced = not before.keys() >= {*map(id, model.parameters())}
        changed = [before[id(parameter.tensor)] for parameter in kept if parameter.is_changed()]
        return changed if changed or is_replaced else None


def _try_in_training(model: nn.Module, run: Run) -> None:
    model.train()
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # such as batch norm of one sample
        warnings.simplefilter("ignore")
        run(model)


# --- reading it off ----------------------------------------------------------------------------------------------


@fixed_defaults()
def read_off(model: nn.Module, recording: Recording, run: Run, words: str) -> Understanding:
    """What a recording shows about a model."""
    activity = Activity(recording)
    forms = Forms(recording, lambda value: not activity.of(value))
    unit_readings = UnitReadings(recording, UnitAnalysis(recording, forms), activity)
    flow = Flow(recording, forms)
    parameters = dict(stored_parameters(model))
    reads: dict[str, list[WeightRead]] = {name: [] for name in parameters}
    for read in forms.reads:
        reads[read.parameter.name].append(read)
    weights: dict[str, WeightFacts] = {}
    others: dict[str, str] = {}
    for name, parameter in parameters.items():
        reason = _why_no_weight(name, parameter, recording, forms, reads[name])
        if reason is None:
            first = [read for read in reads[name] if read.operation not in recording.again]
            weights[name] = _facts(name, forms, first or reads[name], unit_readings, flow)
        else:
            others[name] = _why_not_used(model, name) if reason == NOT_USED else reason
    numbers = unit_readings.units.numbers
    readings = {name: unit_readings.of(name) for name in unit_readings.units.orientations if name in weights}
    carried = [x for reading in readings.values() for x in (reading.numbers, reading.sources)]
    populations, owner = numbers.named(carried)
    classes = numbers.classes(torch.arange(len(owner)))
    scales = {name: found & weights.keys() for name, found in flow.scales.items() if found & weights.keys()}
    return Understanding(
        populations=populations,
        owner=owner,
        classes=classes,
        readings=readings,
        scales=scales,
        others=others,
        acting=frozenset(n for n, why in others.items() if why != NOT_A_SYNAPSE and _acts(n, forms, unit_readings)),
        inputs=words,
        notes=list(_notes(recording)),
        recording=recording,
        forms=forms,
        unit_readings=unit_readings,
        flow=flow,
        weights=weights,
        run=run,
        is_one_call=words != BY_FUNCTION,
    )


def _acts(name: str, forms: Forms, unit_readings: UnitReadings) -> bool:
    """Whether an operator that multiplies units by a parameter, or is not known, reads it."""
    sources = [r.source for r in (*forms.reads, *forms.computed) if name in r.names and r.source is not None]
    unknown = (use.operation for use in forms.users.get(name, ()) if use.operation.kind is Kind.UNKNOWN)
    sources += [v for operation in unknown for v in operation.operands if v.is_activity]
    return any(map(unit_readings.units.is_of_network, sources))


def _why_not_used(model: nn.Module, name: str) -> str:
    """Why the run did not use a parameter: what a generator function uses shows when it runs."""
    for path in ("", *itertools.accumulate(name.split(".")[:-1], "{}.{}".format)):
        module = model.get_submodule(path)
        if inspect.isgeneratorfunction(module.forward):
            return (
                f"{NOT_USED}: that of {path or type(module).__name__} is a generator function, which runs when "
                "something iterates over its result; give a function that does so as example_inputs, such as "
                "lambda model: list(model(x))"
            )
    return NOT_USED


def _facts(name: str, forms: Forms, reads: list[WeightRead], readings: UnitReadings, flow: Flow) -> WeightFacts:
    depth, is_output = flow.depth.get(name, 0.0), name in flow.outputs
    if not reads:
        reason, operation = forms.mixed[name]
        return WeightFacts(shown(operation), 1, None, {Need.AXES: reason}, False, 1, None, depth, is_output)
    mixed = forms.mixed.get(name)
    orientation, reading = readings.deciding(name), readings.of(name)
    axes = orientation.axes if not mixed and not _differ(readings, name) else None
    unmet = {
        Need.AXES: _lost_axes(name, readings, reads) if axes is None else "",
        Need.UNITS: mixed[0] if mixed else reading.remark,
    }
    paddings = {read.padding for read in reads if read.source is None}
    return WeightFacts(
        operator=", ".join(dict.fromkeys(shown(read.operation) for read in reads)),
        uses=len(reads),
        axes=axes,
        unmet={need: reason for need, reason in unmet.items() if reason},
        is_free=bool(reading.is_free.all()),
        groups=reads[0].groups,
        padding=paddings.pop() if len(paddings) == 1 and len(reads) == 1 else None,
        depth=depth,
        is_output=is_output,
    )


def _differ(readings: UnitReadings, name: str) -> bool:
    """Whether uses of a weight need different axes, and it is not known which of them decide."""
    many = readings.units.orientations[name]
    return len(many) > 1 and (bool(readings.of(name).remark) or any(o.axes is None for o in many))


def _lost_axes(name: str, readings: UnitReadings, reads: list[WeightRead]) -> str:
    many = readings.units.orientations[name]
    if len(many) > 1:
        kinds = dict.fromkeys(f"{shown(o.reads[0].operation)} ({o.axes})" for o in many)
        return f"shared by operators that want different axes: {', '.join(kinds)}"
    return f"which of its axes run over units is lost on the way to {shown(reads[0].operation)}"


def _why_no_weight(
    name: str, parameter: nn.Parameter, recording: Recording, forms: Forms, reads: list[WeightRead]
) -> str | None:
    """Why a parameter is not made of synapses, or None if it is."""
    is_used = bool(reads) or (name in forms.mixed and max(parameter.shape, default=1) < parameter.numel())
    if not is_used and (parameter.dim() < 2 or name in forms.biases.values()):
        return NOT_A_SYNAPSE
    unfit = why_unfit(parameter)
    if unfit is not None:
        return unfit
    if name in recording.changed:
        return _change(recording.changed[name])
    if name in recording.listed:
        return f"forward takes it from parameters(), which lists what is stored, for {recording.listed[name].located}"
    users = forms.users.get(name, [])
    operations = [*(read.operation for read in reads), *(use.operation for use in users)]
    refusal = next((reason for operation in operations if (reason := _refusal(operation))), None)
    if refusal is not None:
        return refusal
    if is_used:
        return None
    if max(parameter.shape, default=1) == parameter.numel():
        return NOT_A_SYNAPSE
    if not users:
        return NOT_USED
    direct = [use.operation for use in users if use.made_by is None]
    if not direct:
        pairs = [(use.operation, use.made_by) for use in users if use.made_by is not None]
        ways = dict.fromkeys(f"{by.described} reads what {made.described} computes from it" for by, made in pairs)
        return f"{' and '.join(ways)}, but not as a weight"
    products = [o for o in direct if o.kind in (Kind.ATTENTION, Kind.PRODUCT, Kind.CONVOLUTION)]
    names = list(dict.fromkeys(operation.described for operation in products or direct))
    if products:
        return f"{' and '.join(names)} {'read' if names[1:] else 'reads'} it as an input, not as a weight"
    return f"used by {', '.join(names)}, which biofx does not know as an operator on weights"


def _change(operation: Operation | None) -> str:
    """Why a parameter that forward changes is not made of synapses."""
    if operation is None:
        return "forward replaces it, or its data"
    if operation.name == "embedding_renorm":
        return f"{shown(operation)} changes it in forward, as max_norm is set"
    return f"forward changes it in place, by {operation.located}"


def _refusal(operation: Operation) -> str | None:
    """Why a parameter that an operator reads cannot be made of synapses."""
    name = shown(operation)
    if operation.name == "_to_copy" and not any(v.is_activity or v.dtype is torch.bool for v in operation.outputs):
        return f"forward takes whole numbers from it, by {operation.located}, and the sum of synapses is rounded"
    if operation.kind is Kind.EMBEDDING and operation.argument("sparse"):
        return f"{name} gives it a sparse gradient, and rules act on every entry"
    if operation.kind is Kind.EMBEDDING and operation.argument("scale_grad_by_freq"):
        return f"{name} divides its gradient by the frequency of tokens, which is a learning rule of its own"
    factor = operation.argument("alpha") if operation.kind is Kind.PRODUCT else None
    if isinstance(factor, int | float) and factor <= 0:
        return f"{name} multiplies it with {factor}, not with a number above 0"
    return None


def _notes(recording: Recording) -> Iterator[str]:
    places = list(dict.fromkeys(operation.located for operation in recording.decisions))
    if places:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield (
            f"forward reads numbers that depend on its inputs ({', '.join(places[:3])}{more}); "
            "what it does with other inputs was not seen"
        )


# --- keeping it --------------------------------------------------------------------------------------------------


def remember(bio: fx.GraphModule, understood: Understanding | None) -> None:
    """Keep what a run showed of a model's weights with the captured model, and how nodes of its graph use them."""
    record = record_of(bio)
    if understood is None:
        if not record.weights:  # otherwise they are known from an earlier transform
            record.weights, record.others = declared(bio)
        return
    record.weights, record.others = dict(understood.weights), dict(understood.others)
    record.inputs, record.notes = understood.inputs, list(understood.notes)
    with Questions(bio, lambda name, _: understood.recording.asked.add(name)):
        changed = changed_in_training(bio, understood.run)
    for name, reason in changed.items():
        if record.weights.pop(name, None) is not None:
            record.others[name] = reason
    if is_one_island(bio):  # one node uses all of them
        return
    recording = recorded(bio, understood.run, by_node=True)
    with fixed_defaults():
        forms = Forms(recording, lambda value: True)  # the remarks on forms are those of the first run
        annotate(bio, recording, forms, record.weights)
