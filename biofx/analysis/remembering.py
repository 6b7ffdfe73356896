"""Remembering: what is understood of a model is kept with the transformed one, and with the nodes of its graph."""

from __future__ import annotations

from torch import fx

from biofx.analysis.activity import Activity
from biofx.analysis.forms import Forms
from biofx.analysis.graphs import annotate
from biofx.analysis.understanding import Understanding, changed_in_training, recorded
from biofx.base.randomness import fixed_defaults
from biofx.model.islands import is_one_island
from biofx.model.provenance import record_of
from biofx.weights.declared import declared


def remember(bio: fx.GraphModule, understood: Understanding | None) -> None:
    """Keep the facts of weights with a captured model, and how nodes of its graph use them.

    Args:
        bio: the captured model.
        understood: what a run told of the model; None if it could not be run.
    """
    record = record_of(bio)
    if understood is None:
        if not record.weights:  # else it is known from an earlier transform
            record.weights, record.others = declared(bio)
        return
    record.weights, record.others = dict(understood.weights), dict(understood.others)
    record.inputs, record.notes = understood.inputs, list(understood.notes)
    for name, reason in changed_in_training(bio, understood.run).items():
        if record.weights.pop(name, None) is not None:
            record.others[name] = reason
    if is_one_island(bio):  # one node uses all of them
        return
    recording = understood.recording
    if not recording.nodes:
        recording = recorded(bio, understood.run)
    with fixed_defaults():
        activity = Activity(recording)
        forms = Forms(recording, lambda value: not activity.of(value))
        annotate(bio, recording, forms, record.weights)
