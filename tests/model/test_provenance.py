"""The record of a transformed model: it travels with copies and pickles, and not to another version."""

import copy
import io

import pytest
import torch
from torch import nn

import biofx
from biofx.model.provenance import Record, record_of


@pytest.fixture
def bio():
    return biofx.transform(nn.Linear(3, 2), "split-synapses,fuzzy-learning-rates")


def test_copies_and_pickles_have_the_record(bio):
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    for other in (copy.deepcopy(bio), torch.load(file, weights_only=False)):
        assert str(record_of(other)) == str(record_of(bio)) == "split-synapses,fuzzy-learning-rates"


def test_a_model_that_another_version_pickled_is_refused(bio, monkeypatch):
    file = io.BytesIO()
    own = Record.__getstate__
    monkeypatch.setattr(Record, "__getstate__", lambda self: own(self) | {"format": 1})
    torch.save(bio, file)
    file.seek(0)
    with pytest.raises(biofx.SavingError, match="pickled by another version of biofx"):
        torch.load(file, weights_only=False)
    state = own(record_of(bio))
    del state["format"]  # as before there was one
    with pytest.raises(biofx.SavingError, match="save its state_dict"):
        Record.__new__(Record).__setstate__(state)
