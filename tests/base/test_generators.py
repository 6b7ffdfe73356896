"""Random number generators: their states are read and set, whatever library they are of."""

import random

import numpy
import pytest
import torch

from biofx.base.generators import is_generator, set_state, state_of

GENERATORS = {
    "torch": (torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
    "python": (random.Random(1), lambda g: g.random()),
    "numpy": (numpy.random.default_rng(1), lambda g: g.random()),
    "philox": (numpy.random.Generator(numpy.random.Philox(1)), lambda g: g.random()),
    "legacy": (numpy.random.RandomState(1), lambda g: g.normal()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_state_comes_back(kind):
    generator, draw = GENERATORS[kind]
    assert is_generator(generator)
    before = state_of(generator)
    first = draw(generator)
    assert state_of(generator) != before
    assert draw(generator) != first
    set_state(generator, before)
    assert state_of(generator) == before
    assert draw(generator) == first


def test_what_has_no_state_is_none():
    assert not any(map(is_generator, (random.SystemRandom(), random, numpy.random, torch, 1)))
