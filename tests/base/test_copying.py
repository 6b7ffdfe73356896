"""Models with tensors that `copy.deepcopy` refuses."""

import copy
import weakref

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.base.copying import copied
from conftest import flat, loss

IDENTITY = torch.eye(4)
UNUSUAL = {
    "coo": IDENTITY.to_sparse(),
    "csr": IDENTITY.to_sparse_csr(),
    "csc": IDENTITY.to_sparse_csc(),
    "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
}


class Unusual(nn.Module):
    """Has a parameter and a buffer that are not laid out in strides."""

    def __init__(self, kind):
        super().__init__()
        self.fixed = nn.Parameter(UNUSUAL[kind].clone())
        self.register_buffer("mask", UNUSUAL[kind].clone())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if not self.fixed.is_nested:
            x = (self.mask @ (self.fixed @ x.T)).T
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_without_strides_stay_as_they_are(kind, frontend):
    model, x = Unusual(kind), torch.randn(3, 4)
    bio = biofx.transform(model, "cortex", frontend=frontend)
    assert bio.fixed is not model.fixed
    assert isinstance(bio.fixed, nn.Parameter)
    torch.testing.assert_close(bio(x), model(x))
    assert " fixed: " in flat(biofx.summary(bio))
    loss(bio(x)).backward()
    assert biofx.units(model).readings.keys() == {"head.weight"}
    plain = biofx.fold(bio)
    torch.testing.assert_close(plain(x), model(x))
    assert plain.fixed.layout is plain.mask.layout is model.fixed.layout
    if kind != "nested":  # PyTorch cannot load those
        torch.testing.assert_close(biofx.fold(bio, into=Unusual(kind))(x), model(x))


class CarriesState(nn.Module):
    """Keeps its state in a container, with the history of the last call, as spiking neurons do."""

    def __init__(self):
        super().__init__()
        self.fc, self.memories = nn.Linear(3, 3), {"v": 0.0, "trace": []}

    def forward(self, x):
        self.memories["v"] = 0.5 * self.memories["v"] + self.fc(x)
        self.memories["trace"] = [self.memories["v"].abs()]
        return self.memories["v"]


def test_a_state_with_a_history_is_copied():
    model, x = CarriesState(), torch.randn(2, 3)
    first = model(x)
    bio = biofx.transform(model, "split-synapses", example_inputs=(x,))
    expected = model(x)
    torch.testing.assert_close(bio(x), expected)
    assert not torch.equal(expected, first)
    torch.testing.assert_close(biofx.fold(bio)(x), model(x))


def test_a_distribution_that_forward_keeps_is_copied():
    """… as policies and variational autoencoders keep the last one, with its history."""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.last = nn.Linear(3, 2), None

        def forward(self, x):
            normal = torch.distributions.Normal(self.mean(x), torch.ones(2))
            self.last = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
            return self.last.log_prob(self.last.rsample())

    bio, x = biofx.transform(Policy(), [passes.SplitSynapses()]), torch.randn(4, 3)
    loss(bio(x)).backward()
    for same in (copied(bio), biofx.fold(bio)):
        assert torch.equal(same.last.base_dist.loc, bio.last.base_dist.loc)
        assert same.last.base_dist.loc is not bio.last.base_dist.loc


def test_a_parameter_in_two_places_stays_one():
    model = Unusual("coo")
    model.tied, model.fixed.requires_grad = model.fixed, False
    copy = copied(model)
    assert copy.tied is copy.fixed
    assert copy.fixed is not model.fixed
    assert not copy.fixed.requires_grad


class Child(nn.Module):
    """Reads a weight of its parent, which it knows by a weak reference."""

    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return nn.functional.linear(x, self.parent().layer.weight)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.child = Child(self)

    def forward(self, x):
        return self.child(x)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_weak_reference_to_a_parent_is_one_to_its_copy(frontend):
    """`copy.deepcopy` keeps weak references, so the result read the weight of the original, and never learned."""
    x = torch.randn(3, 4)
    bio = biofx.transform(Parent(), "split-synapses", example_inputs=x, frontend=frontend)
    before, others = bio(x), (copy.deepcopy(bio), biofx.fold(bio))
    loss(bio(x)).backward()
    assert bio.get_parameter("layer.weight").grad.abs().sum() > 0
    with torch.no_grad():
        bio.get_parameter("layer.weight").zero_()
    assert not bio(x).any()
    for other in others:
        torch.testing.assert_close(other(x), before)
