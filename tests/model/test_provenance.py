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


class Outer(nn.Module):
    """Contains a transformed model."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)


class Setup(Outer):
    """Has a public name for what it wraps, as a wrapper of Lightning Fabric."""

    @property
    def module(self):
        return self.inner[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, folder: biofx.attach(model, torch.optim.SGD(model.parameters(), 0.1)),
        lambda model, folder: biofx.fold(model),
        lambda model, folder: biofx.save(model, folder),
        lambda model, folder: biofx.export(model, folder / "model.pt2", torch.ones(2, 3)),
        lambda model, folder: biofx.summary(model),
        lambda model, folder: biofx.verify(model),
        lambda model, folder: biofx.detach(torch.compile(model)),
    ],
)
def test_a_model_around_it_is_refused_with_its_path(bio, use, tmp_path):
    with pytest.raises(biofx.ArgumentError, match=r"instance of Outer; its submodule inner\.0 is one, so give that$"):
        use(Outer(bio), tmp_path)
    with pytest.raises(biofx.ArgumentError, match=r"its submodule inner\.0 is one, so give that, or inner\.1$"):
        use(Outer(bio, copy.deepcopy(bio)), tmp_path)
    with pytest.raises(biofx.ArgumentError, match="an instance of Setup; its submodule module is one, so give that$"):
        use(Setup(bio), tmp_path)
