"""Changes: what a user ties, replaces or removes in a transformed model, and how its record and graph follow.

A user may assign weights and modules of the result, as in any model. The modules are right at once. The record and the
graph follow when a function of biofx, or pickle, next asks for them: weights that lost their synapses are left alone
from then on, and a graph that reads what is gone gives way to the model's Python. Where a pass needs the graph, that is
an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from biofx.base.errors import ArgumentError
from biofx.base.torch_internals import tracer_class
from biofx.model.chain import attribute
from biofx.model.fingerprint import fingerprint
from biofx.model.islands import GUARD, ORIGINAL_CLASS, is_one_island, island_graph
from biofx.model.provenance import Record, inserted_nodes, record_of, shapes, unwrapped
from biofx.model.slots import Slot
from biofx.model.synapses import CHILD, child_of, stored_parameters, synapses_in, synapses_of

if TYPE_CHECKING:
    from biofx.model.provenance import PassRun

ASSIGNED = "it was assigned after the transform; transform the model again to give it synapses"
INSTEAD = (
    "prune, parametrize, resize, wrap or replace modules of the original model, or of biofx.fold(bio) before that, and "
    "then transform it"
)


def transformed(model: nn.Module) -> fx.GraphModule:
    """Return the transformed model, without `torch.compile` or a data-parallel wrapper around it.

    Raises:
        ArgumentError: the model was not made by `biofx.transform`, or it was changed since in a way that it cannot
            follow.
    """
    bio = unwrapped(model)
    for problem in filter(None, chain([follow(bio)], lost_parts(bio))):
        raise ArgumentError(f"{problem}; {INSTEAD}")
    return bio


def lost_parts(bio: fx.GraphModule) -> Iterator[str]:
    """Describe each part of the synapses of a transformed model that was replaced or removed since the transform."""
    record = record_of(bio)
    parameters = shapes(stored_parameters(bio, remove_duplicate=False))
    for name, shape in record.shapes.items():
        if name not in parameters:
            yield f"{name}, which has synapses since the transform, is no parameter of the model any more"
        elif name in record.synapses and synapses_of(bio, name) is None:
            yield f"{name}, which has synapses since the transform, is a plain parameter now"
        elif parameters[name] != shape:
            now = tuple(parameters[name])
            yield f"{name}, which has synapses since the transform, was {tuple(shape)} then and is {now} now"
    yield from moved_synapses(bio)
    for name, synapses in synapses_in(bio).items():
        if not isinstance(synapses.stored, nn.Parameter):
            yield (
                f"{name} has a tensor in place of its parameter, as torch.func.functional_call leaves it that is given "
                "a tied weight under two names; give it one"
            )
        for key, by in synapses.users.items():
            if key not in synapses._buffers and key not in synapses._parameters:
                yield f"{key} of {name}, which {', '.join(by)} keeps, was removed"


def moved_synapses(bio: fx.GraphModule) -> Iterator[str]:
    """Describe synapses that are no longer where they were created, as in a layer that another module wraps now."""
    record = record_of(bio)
    known = {synapses_of(bio, name) for name in record.synapses | record.ties.keys()}
    for name, synapses in synapses_in(bio).items():
        if synapses not in known:
            yield f"{name} has synapses that were made for another weight; move them back"


def follow(bio: fx.GraphModule) -> str | None:
    """Update the record and the graph of a transformed model to what was assigned since.

    Returns:
        The change that they cannot follow, with the reason; nothing was done then. None if there is none.

    Raises:
        ArgumentError: a weight was written to, and the write is lost.
    """
    for synapses in synapses_in(bio).values():
        synapses.refuse_lost_writes()
    moved = next(moved_synapses(bio), None)
    if moved is not None:
        return moved
    record, lost, ties = record_of(bio), _lost_weights(bio), _new_ties(bio)
    unfit = next(_why_graph_is_unfit(bio, lost, ties), None)
    if unfit is not None:
        needs = reason_for_graph(bio)
        if needs is not None:
            return f"{unfit} since the transform, and {needs}, which does not follow that"
    for first, others in ties.items():
        _tie(bio, first, others)
    _forget(record, lost)
    if record.changed:
        _list_new_parameters(bio)
    if unfit is not None:
        run_python(bio, f"{unfit} since the transform")
    return None


def reason_for_graph(bio: fx.GraphModule) -> str | None:
    """Return the reason why the model's Python cannot replace the graph, or None if it can."""
    record = record_of(bio)
    for _, origin in inserted_nodes(bio.graph):
        if origin.slot in (Slot.OUTPUT, Slot.OBSERVER):
            return f"{origin.by} needs the graph"
    if record.model_class is None:
        return "the model is a graph"
    return None if fingerprint(bio) == record.captured else "its graph was edited"


def _lost_weights(bio: nn.Module) -> dict[str, str]:
    """The parameters that are not what the record says, each with what became of it: replaced, or removed."""
    record, lost = record_of(bio), dict[str, str]()
    present = shapes(stored_parameters(bio, remove_duplicate=False))
    known = {name: None for name in record.original if name not in record.changed} | record.weights
    own = {name for name, _ in stored_parameters(bio)}
    for name, facts in known.items():
        if _is_hidden(bio, name):
            continue
        if name not in present:
            is_needed = facts is None or name in record.synapses
            if not is_needed or not _is_deleted(bio, name, known):
                lost[name] = "removed"
        elif name in record.synapses or name in record.ties:
            # A tied name that has a tensor of its own again, or a weight that has lost its synapses.
            if name in own if name in record.ties else synapses_of(bio, name) is None:
                lost[name] = "replaced"
        elif name not in record.shapes and facts is not None and facts.axes is not None:
            lost |= {name: "replaced"} if facts.axes.shape != tuple(present[name]) else {}
    return lost


def _is_hidden(bio: nn.Module, name: str) -> bool:
    """Whether the synapses of a weight lie behind something else, as under `functional_call` or `prune`."""
    owner, key = _owner(bio, name)
    return owner is not None and child_of(owner, key) is None and CHILD.format(key) in owner._modules


def _is_deleted(bio: nn.Module, name: str, known: Iterable[str]) -> bool:
    """Whether a parameter was taken from a module that keeps others, so that its forward fails."""
    owner, key = _owner(bio, name)
    if owner is None or any(key in names for names in (owner._parameters, owner._buffers, vars(owner))):
        return False  # it is None, or another attribute took its place, as `prune` leaves it
    if hasattr(type(owner), key) and name not in record_of(bio).synapses:  # it is parametrized
        return False
    path = name.rpartition(".")[0]
    return any(each.rpartition(".")[0] == path and each.rpartition(".")[2] in owner._parameters for each in known)


def _owner(bio: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    path, _, key = name.rpartition(".")
    try:
        return bio.get_submodule(path), key
    except AttributeError:
        return None, key


def _new_ties(bio: nn.Module) -> dict[str, list[str]]:
    """The parameters of the original model that others were tied to since, each with these."""
    first = {id(parameter): name for name, parameter in stored_parameters(bio)}
    record, ties = record_of(bio), dict[str, list[str]]()
    for name, parameter in stored_parameters(bio, remove_duplicate=False):
        is_new = first[id(parameter)] not in (name, record.ties.get(name))
        if is_new and name in record.original and first[id(parameter)] in record.original:
            ties.setdefault(first[id(parameter)], []).append(name)
    return ties


def _why_graph_is_unfit(bio: fx.GraphModule, lost: Mapping[str, str], ties: Mapping[str, list[str]]) -> Iterator[str]:
    """Describe each change after which the graph cannot show what the modules compute."""
    record = record_of(bio)
    if is_one_island(bio):
        return
    yield from (f"{name} was {what}" for name, what in lost.items() if name in record.synapses)
    for first, others in ties.items():
        yield from (f"{name} was tied to {first}" for name in others if {first, name} & record.synapses)
    for node in bio.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            try:
                found = attribute(bio, str(node.target))
            except AttributeError:
                found = None
            if found is None:
                yield f"{node.target} was removed"


def _forget(record: Record, lost: Mapping[str, str]) -> None:
    """Remove lost parameters from the record and from each of its passes."""
    record.changed |= lost
    record.synapses -= lost.keys()
    _drop(lost, record.ties, record.weights, record.others, record.shapes, record.nonnegative)
    record.passes = [
        replace(
            run,
            weights=run.weights - lost.keys(),
            left=run.left | dict.fromkeys(run.weights & lost.keys(), ASSIGNED),
            remarks={name: remark for name, remark in run.remarks.items() if name not in lost},
        )
        for run in record.passes
    ]


def _drop(names: Iterable[str], *notes: dict[str, Any]) -> None:
    for each in notes:
        for name in names:
            each.pop(name, None)


def _list_new_parameters(bio: nn.Module) -> None:
    """List the parameters of which nothing is known as left alone."""
    record, present = record_of(bio), [name for name, _ in stored_parameters(bio)]
    others = {name: why for name, why in record.others.items() if why != ASSIGNED}
    known = {*record.weights, *others, *(record.original.keys() - record.changed.keys())}
    record.others = others | {name: ASSIGNED for name in present if name not in known}


def _tie(bio: nn.Module, first: str, others: list[str]) -> None:
    """Keep, of tied parameters, the facts of the first, and what passes did to the synapses that they now share."""
    record, synapses = record_of(bio), synapses_of(bio, first)
    links = () if synapses is None else synapses.links
    kept = next((link.origin.parameter for link in links), first)
    facts = {name: record.weights[name] for name in (kept, first, *others) if name in record.weights}
    if facts:
        uses = sum(each.uses for each in facts.values())
        record.weights[first] = next(iter(facts.values())).shared_with(others, uses)
    for pass_, run in enumerate(record.passes):
        record.passes[pass_] = _renamed(run, {first, *others}, kept, first)
    record.ties |= dict.fromkeys(others, first)
    _drop(others, record.changed, record.weights, record.others, record.shapes, record.nonnegative)
    if synapses is not None:
        record.synapses = record.synapses - {*others} | {first}
        record.shapes[first] = synapses.stored.shape


def _renamed(run: PassRun, tied: set[str], kept: str, first: str) -> PassRun:
    """Record what a pass did to `kept` under the name of the first, and drop what it did to the other tied weights."""

    def of_first(notes: dict[str, str]) -> dict[str, str]:
        others = {name: text for name, text in notes.items() if name not in tied}
        return others | ({first: notes[kept]} if kept in notes else {})

    weights = run.weights - tied | ({first} if kept in run.weights else frozenset[str]())
    return replace(run, weights=weights, left=of_first(run.left), remarks=of_first(run.remarks))


def run_python(bio: fx.GraphModule, reason: str) -> None:
    """Replace the graph of a model by a call of its Python."""
    record = record_of(bio)
    vars(bio)[ORIGINAL_CLASS] = record.model_class
    vars(bio).pop(GUARD, None)
    record.islands, record.traced = {"": reason}, ()
    bio.graph = island_graph(tracer_class(bio.graph))
    record.captured = fingerprint(bio)
