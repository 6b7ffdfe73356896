"""Copies of islands: copied, pickled, folded or traced again, a model computes what it did."""

import copy
import io

import torch
from torch import nn

import biofx
from conftest import gradients
from island_networks import SLOW, SPLIT, X, assert_close, both, network


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_and_pickles_compute_the_same(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    expected, wanted = bio(X), gradients(bio, X)
    for other in (copy.deepcopy(bio), reloaded(bio), reloaded(copy.deepcopy(bio))):
        assert_close(other(X), expected)
        found = gradients(other, X)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n].to_dense(), wanted[n].to_dense()) for n in found)
        assert list(other.state_dict()) == list(bio.state_dict())
        assert biofx.summary(other) == biofx.summary(bio)
        assert biofx.table(other) == biofx.table(bio)
        biofx.verify(other)
        assert not any(g is not None for g in (p.grad for p in bio.parameters()))


def test_a_copy_is_independent(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    expected = bio(X)
    other = copy.deepcopy(bio)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(bio(X), expected)


def test_fold_gives_the_plain_model(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    model, plain = network(kind), biofx.fold(bio)
    assert_close(plain(X), bio(X))
    assert plain.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(plain.state_dict(), strict=True)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    again = biofx.transform(plain, SPLIT, frontend=frontend)
    assert list(biofx.weight_sites(again)) == list(biofx.weight_sites(bio))
    assert_close(again(X), model(X))
    assert_close(reloaded(plain)(X), plain(X))


def test_a_copy_of_a_module_keeps_its_synapses():
    bio = biofx.transform(network("branch"), SPLIT)
    other = copy.deepcopy(bio.inner.a)
    assert isinstance(other, nn.Linear)
    assert torch.equal(other.weight, bio.inner.a.weight)


def test_a_trace_of_a_transformed_model_keeps_layers_of_pytorch():
    bio = biofx.transform(nn.Sequential(nn.Linear(3, 4), nn.RNN(4, 3)).double(), SLOW)
    traced = torch.fx.symbolic_trace(bio)
    assert_close(traced(X), bio(X))
