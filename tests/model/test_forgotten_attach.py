"""Forgotten attachments: whoever trains without the rules that a model needs is told so, once."""

import copy
import warnings

import pytest
from torch.nn import functional as F

import biofx
from biofx import passes
from training_runs import GAINS, IMAGES, LABELS, OPTIMIZERS, network, start, train

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


def other(bio, name):
    return OPTIMIZERS[name](bio.parameters())


def warned(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in seen if "without its rules" in str(w.message)]


def test_an_optimizer_that_is_not_the_attached_one_is_told():
    """Hooks sleep, as another optimizer is attached, so nothing acted, and without a word."""
    bio = biofx.transform(network(), "split-synapses,fuzzy-learning-rates")
    attached, later = other(bio, "adam"), other(bio, "sgd")
    biofx.attach(bio, attached)
    assert not warned(lambda: train(bio, attached, 2))
    (message,) = warned(lambda: train(bio, later, 2))
    assert "SGD trains a model of biofx without its rules (fuzzy-learning-rates, split-synapses)" in message


def test_an_optimizer_whose_weights_were_taken_over_is_told():
    bio = biofx.transform(network(), GAINS)
    first, second = other(bio, "adam"), other(bio, "adam")
    biofx.attach(bio, first)
    train(bio, first, 1)
    attachment = biofx.attach(bio, second)
    assert len(warned(lambda: train(bio, first, 2))) == 1
    assert not warned(lambda: train(bio, second, 2))
    attachment.detach()
    assert len(warned(lambda: train(bio, second, 2))) == 1


def test_an_optimizer_that_lost_some_of_its_weights_is_told():
    bio = biofx.transform(network(), GAINS)
    first = other(bio, "adam")
    second = OPTIMIZERS["adam"]([bio.get_parameter("0.weight")])
    biofx.attach(bio, first)
    biofx.attach(bio, second)
    assert len(warned(lambda: train(bio, first, 2))) == 1
    assert not warned(lambda: train(bio, second, 2))


@pytest.mark.parametrize("cleared", [False, True])
def test_a_gradient_that_outlives_its_attachment_is_told(cleared):
    """It has the scale of an attached optimizer: split weights moved √Γ times as far, and others without gains."""
    bio, optimizer, attachment = start("split-synapses,fuzzy-learning-rates", "sgd")
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    attachment.detach()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if cleared:
            optimizer.zero_grad()
            F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        optimizer.step()
        optimizer.step()
    messages = [w for w in seen if "its gradient was computed while an optimizer was attached" in str(w.message)]
    assert len(messages) == (not cleared)
