"""GroupUnits: the paper's weight splitting."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat
from models.small import layer_and_input, mlp


def oracle(z, size, activation=lambda z: z):
    """Sum of f(z) over each group of adjacent units on axis 1, given to every unit of it."""
    groups = activation(z).split(size, dim=1)
    return torch.cat([g.sum(1, keepdim=True).expand_as(g) for g in groups], dim=1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_groups_are_summed_and_repeated(kind, size):
    layer, x = layer_and_input(kind, dtype=torch.float64)
    flat = layer(x)[0].numel()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(flat, 2).double())
    bio = biofx.transform(model, [passes.GroupUnits(size=size)])
    torch.testing.assert_close(bio(x), model[2](oracle(layer(x), size).flatten(1)))
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


@pytest.mark.parametrize("activation", ["relu", torch.tanh, nn.Sigmoid()])
def test_activation(activation):
    layer, x = layer_and_input("linear")
    model = nn.Sequential(layer, nn.Linear(8, 2))
    bio = biofx.transform(model, [passes.GroupUnits(size=4, activation=activation)])
    function = torch.relu if activation == "relu" else activation
    torch.testing.assert_close(bio(x), model[1](oracle(layer(x), 4, function)))
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


def test_leading_dimensions():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    bio = biofx.transform(model, [passes.GroupUnits(2)])
    x = torch.randn(2, 5, 3)
    expected = oracle(model[0](x).flatten(0, 1), 2).unflatten(0, (2, 5))
    torch.testing.assert_close(bio(x), model[1](expected))


def test_output_layers_are_left_alone_wherever_they_are():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))})

        def forward(self, x):
            h = self.body(x)
            return self.heads["a"](h), self.heads["b"](h)

    bio = biofx.transform(Nested(), [passes.GroupUnits(2)])
    changed = {name for name, site in biofx.weight_sites(bio).items() if site.passes}
    assert changed == {"body.0.weight", "heads.b.0.weight"}
    assert flat(biofx.summary(bio)).count("group-units: it is an output layer") == 2


def test_with_split_synapses_and_their_activation():
    layer, x = layer_and_input("linear", dtype=torch.float64)
    model = nn.Sequential(layer, nn.Linear(8, 2).double())
    bio = biofx.transform(model, [passes.GroupUnits(2), passes.SplitSynapses(3, activation="relu")])
    currents = [x @ w.T + b for w, b in zip(bio.get_parameter("0.weight"), bio.get_parameter("0.bias"), strict=True)]
    hidden = oracle(sum(map(torch.relu, currents)), 2)
    currents = [
        hidden @ w.T + b for w, b in zip(bio.get_parameter("1.weight"), bio.get_parameter("1.bias"), strict=True)
    ]
    torch.testing.assert_close(bio(x), sum(map(torch.relu, currents)))


def test_units_that_groups_do_not_divide():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(biofx.PipelineError, match=r'0.weight has 5 postsynaptic units.*exclude="0.weight"'):
        biofx.transform(model, [passes.GroupUnits(2)])


@pytest.mark.parametrize("sign", [passes.DalesPrinciple(), passes.InhibitoryInterneurons(), passes.ContinualBackprop()])
def test_a_group_is_one_unit_for_other_passes(sign):
    model, x = mlp(6, 12, 10, 3), torch.randn(4, 6)
    at_once = biofx.transform(model, [sign, passes.GroupUnits(2)], example_inputs=x)
    first = biofx.transform(model, [passes.GroupUnits(2)], example_inputs=x)
    in_turn = biofx.transform(first, [sign], example_inputs=x)
    for name, tensor in in_turn.state_dict().items():
        torch.testing.assert_close(at_once.state_dict()[name], tensor, rtol=0, atol=0)
    if isinstance(sign, passes.DalesPrinciple):
        sign = biofx.weight_sites(at_once)["2.weight"].sign[0]
        assert torch.equal(sign[::2], sign[1::2])
        assert not len(biofx.units(biofx.fold(at_once), x).mixed())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be an integer ≥ 1, got 0"),
        ({"activation": "nothing"}, "activation must be None, a function, or a name"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.GroupUnits(**options)
