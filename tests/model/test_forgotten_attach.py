"""Forgotten attachments: whoever trains without the rules that a model needs is told so, once."""

import copy
import warnings

import pytest

import biofx
from biofx import passes
from training_runs import GAINS, OPTIMIZERS, network, start, train

FORGOTTEN = {
    "gains cancel": (GAINS, "adamw", "fuzzy-learning-rates"),
    "gains act on gradients": (GAINS, "momentum", None),
    "split": ([passes.SplitSynapses(2)], "adam", "split-synapses"),
    "updates": ([passes.ExponentiatedGradient()], "sgd", "exponentiated-gradient"),
    "rules at steps": ([*GAINS, passes.Crystallize()], "sgd", "crystallize"),
    "nothing to do": ([passes.GroupUnits(2)], "adam", None),
}


@pytest.mark.parametrize(("pipeline", "name", "told"), FORGOTTEN.values(), ids=FORGOTTEN)
@pytest.mark.parametrize("copied", [False, True])
def test_whoever_forgets_to_attach_is_told_once(pipeline, name, told, copied):
    bio = biofx.transform(network(), pipeline)
    bio = copy.deepcopy(bio) if copied else bio
    optimizer = OPTIMIZERS[name](bio.parameters())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(bio, optimizer, 2)
        if told is None:
            train(bio, optimizer, 1)
    messages = [str(w.message) for w in seen if "biofx.attach" in str(w.message)]
    assert len(messages) == (told is not None)
    assert told is None or f"trains a model of biofx without its rules ({told})" in messages[0]


def test_whoever_attaches_is_told_nothing():
    bio, optimizer, _ = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(bio, optimizer, 2)
