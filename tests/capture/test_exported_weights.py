"""Weights of exported graphs are rewritten wherever they are read, with the axes and units that they have elsewhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.weights.facts import Need
from conftest import flat, loss, tensors
from exported_models import EVERYTHING, assert_same_in_both_modes, call, export, forms, x
from models import any_python
from models.small import CONVOLUTIONS, ConvNet, Reused, layer_and_input, mlp
from pipelines import NEUTRAL


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_have_the_axes_that_they_have_elsewhere(kind, padding):
    if "transpose" in kind and padding != 1:
        pytest.skip("a transposed convolution has no padding by name")
    layer, value = layer_and_input(kind, "grouped", padding=padding)
    exported, traced = (
        biofx.transform(layer, EVERYTHING, example_inputs=value, frontend=frontend)
        for frontend in ("export", "symbolic")
    )
    a, b = biofx.weight_sites(exported)["weight"], biofx.weight_sites(traced)["weight"]
    assert (a.operator, a.groups, a.units) == (b.operator, b.groups, b.units)
    torch.testing.assert_close(exported(value), traced(value))


def test_units_are_those_of_the_symbolic_front_end():
    for model, value in ((ConvNet(), x(2, 1, 8, 8)), (mlp(4, 8, 6, 3), x())):
        signs = []
        for frontend in ("export", "symbolic"):
            bio = biofx.transform(model, EVERYTHING, example_inputs=value, frontend=frontend)
            signs.append({name: site.sign for name, site in biofx.weight_sites(bio).items()})
        assert signs[0].keys() == signs[1].keys()
        for name, sign in signs[0].items():
            assert sign is signs[1][name] is None or torch.equal(sign, signs[1][name])


def test_tied_and_reused_weights_have_one_chain():
    bio = export(Reused(), x(), EVERYTHING)
    assert list(biofx.weight_sites(bio)) == ["step.weight", "first.weight"]
    assert len(biofx.weight_sites(bio)["step.weight"].uses) == 3
    assert bio.first.weight_synapses is bio.second.weight_synapses


# --- inner graphs ------------------------------------------------------------------------------------------------


class Casts(nn.Module):
    """Computes in lower precision; it uses one weight as stored, and transposes the other first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Parameter(x(4, 8))

    def forward(self, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(self.first(value), self.second).float()


class TwoWays(nn.Module):
    """Uses a weight in another way in training, and a product of parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.a, self.b = nn.Parameter(x(6, 2)), nn.Parameter(x(2, 4))

    def forward(self, value):
        if not self.training:
            return self.second(self.first(value).relu())
        hidden = self.first(value) + F.linear(value, self.a @ self.b)
        return F.linear(hidden.tanh() + torch.rand_like(hidden), 2 * self.second.weight)


PARTS = {
    "auxiliary": (any_python.Auxiliary, {"auxiliary.weight": "the part of the model that depends on its mode"}),
    "gated": (any_python.Gated, {"gate.weight": "the part of the model under torch.no_grad"}),
    "casts": (Casts, dict.fromkeys(("second", "first.weight"), "the part of the model under torch.autocast")),
    "two_ways": (TwoWays, dict.fromkeys(("a", "b", "second.weight"), "the part of the model that depends on its mode")),
}


@pytest.mark.parametrize("recipe", [EVERYTHING, "rejuvenate", [passes.MirrorUnits()], [passes.GroupUnits(2)]], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_weights_are_rewritten_inside_of_inner_graphs(name, recipe):
    build, inside = PARTS[name]
    model, value = build(), x()
    bio = export(model, value, recipe)
    sites = biofx.weight_sites(bio)
    assert {site.name: site.surroundings for site in sites.values() if site.inside} == inside
    assert all(site.operator == "linear" for site in sites.values())
    optimizer = torch.optim.SGD(bio.parameters(), 0.01)
    if any(site.passes for site in sites.values()):
        biofx.attach(bio, optimizer)
    for other in forms(bio):
        loss(other.train()(value)).backward()
        biofx.verify(other)
    optimizer.step()
    biofx.verify(bio)
    plain = biofx.fold(bio)
    for training in (True, False):
        a, b = (call(m.train(training), value) for m in (bio, plain))
        torch.testing.assert_close(tensors(a), tensors(b))


def test_weights_inside_of_parts_have_their_axes_and_gradients():
    model, value = TwoWays().double(), x().double()
    bio = export(model, value)
    assert_same_in_both_modes(bio, model, value)
    site = biofx.weight_sites(bio)["second.weight"]
    assert (site.presynaptic_axis, site.postsynaptic_axis) == (1, 0)
    for name in ("a", "b"):  # whose product is a weight
        site = biofx.weight_sites(bio)[name]
        assert (site.axes, site.unmet(Need.UNITS)) == (
            None,
            "matmul computes the weight that its operator reads from it",
        )
    assert "linear, in the part of the model that depends on its mode" in flat(biofx.summary(bio))


# --- recurrent layers --------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """Recurrent cells in a loop, and one whose parameters are its own."""

    def __init__(self, length):
        super().__init__()
        self.first, self.second, self.length = nn.LSTMCell(4, 5), nn.GRUCell(5, 5, bias=False), length
        self.own_ih, self.own_hh = (nn.Parameter(torch.randn(3, 5) / 2), nn.Parameter(torch.randn(3, 3) / 2))

    def forward(self, x):
        h, c, g, own = (x.new_zeros(x.shape[1], n) for n in (5, 5, 5, 3))
        for t in range(self.length):
            h, c = self.first(x[t], (h, c))
            g = self.second(h, g)
            own = torch.rnn_relu_cell(g, own, self.own_ih, self.own_hh)
        return own


RECURRENT = {
    "lstm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3)),
    "gru": lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5, bias=False)),
    "rnn": lambda: nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 5, nonlinearity="relu", batch_first=True)),
    "cells": lambda: Cells(3),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_weights_of_recurrent_layers_and_cells(kind, frontend):
    model, value = RECURRENT[kind]().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    bio = biofx.transform(model, [passes.SplitSynapses(2, compensate=False)], frontend=frontend, example_inputs=value)
    sites = biofx.weight_sites(bio)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert sites.keys() == matrices
    for name in matrices:
        assert (sites[name].presynaptic_axis, sites[name].postsynaptic_axis, sites[name].is_split) == (1, 0, True)
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        torch.testing.assert_close(tensors(other(value)), tensors(model(value)))
    loss(bio(value)).backward()
    loss(model(value)).backward()
    for name, parameter in model.named_parameters():
        wanted = torch.stack([parameter.grad] * 2) if name in matrices else parameter.grad
        torch.testing.assert_close(bio.get_parameter(name).grad, wanted)
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    torch.testing.assert_close(
        tensors(bio.double()(value)), tensors(model(value))
    )  # layers of torch.nn list weights anew


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_summary_of_recurrent_layers(frontend):
    bio = biofx.transform(RECURRENT["gru"](), [passes.DalesPrinciple()], frontend=frontend, example_inputs=x(3, 2, 4))
    sites = biofx.weight_sites(bio)
    operators = {name: site.operator for name, site in sites.items()}
    assert operators == {"0.weight": "linear", "1.weight_ih_l0": "gru", "1.weight_hh_l0": "gru"}
    assert [site.sign is None for site in sites.values()] == [True, False, False]


# --- weights that change -----------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """Its teacher follows the student at every step in training."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 8), nn.Linear(4, 8).requires_grad_(False)

    def forward(self, value):
        with torch.no_grad():
            if self.training:
                self.teacher.weight.mul_(0.9).add_(self.student.weight, alpha=0.1)
            target = self.teacher(value)
        return self.student(value) - target


@pytest.mark.parametrize("frontend", ["export", "symbolic", "module"])
def test_a_weight_that_forward_changes_is_left_alone(frontend):
    model, value = Teacher(), x()
    bio = biofx.transform(model, NEUTRAL, frontend=frontend, example_inputs=value)
    assert torch.equal(bio.teacher.weight, model.teacher.weight)
    assert "teacher.weight: forward changes it in place" in flat(biofx.summary(bio))
    assert_same_in_both_modes(bio, model, value)
    if frontend == "export":
        assert not torch.equal(copy.deepcopy(bio)(value), copy.deepcopy(bio).eval()(value))
