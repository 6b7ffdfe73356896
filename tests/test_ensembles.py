"""Ensembles: several transformed models in one call of vmap."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import biofx
from biofx import ArgumentError

PIPELINES = [
    "split-synapses{synapses=4}",
    "fuzzy-learning-rates",
    "fuzzy-learning-rates{dtype=unstored}",
    "volume-dependent-learning-rates",
    "dales-principle",
    "inhibitory-interneurons",
    "mirror-units",
    "hofmann2025",
    "cortex",
]
INPUTS = torch.randn(6, 3, dtype=torch.float64)


class Network(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.hidden = nn.Linear(3, width, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(width, dtype=torch.float64)
        self.readout = nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x):
        return self.readout(self.norm(self.hidden(x)).relu())


def transformed(pipeline, seed=0, **options):
    torch.manual_seed(seed)
    return biofx.transform(Network(**options).eval(), pipeline, example_inputs=INPUTS, seed=seed)


def caller(model):
    base = copy.deepcopy(model).to("meta")
    return lambda parameters, buffers, x: functional_call(base, (parameters, buffers), (x,))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_ensemble_computes_what_its_models_compute(pipeline):
    models = [transformed(pipeline, seed) for seed in range(3)]
    parameters, buffers = biofx.stack_module_state(models)
    together = vmap(caller(models[0]), (0, 0, None))(parameters, buffers, INPUTS)
    torch.testing.assert_close(together, torch.stack([model(INPUTS) for model in models]))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_gradients_are_those_of_the_models(pipeline):
    models = [transformed(pipeline, seed) for seed in range(3)]
    parameters, buffers = biofx.stack_module_state(models)
    call = caller(models[0])
    together = vmap(grad(lambda *tensors: call(*tensors, INPUTS).square().mean()))(parameters, buffers)
    for place, model in enumerate(models):
        model(INPUTS).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][place], parameter.grad)


def test_stacked_parameters_are_leaves_of_their_own():
    model = transformed("split-synapses")
    model.get_parameter("hidden.bias").requires_grad_(False)
    parameters, buffers = biofx.stack_module_state([model, model])
    assert {name for name, each in parameters.items() if not each.requires_grad} == {"hidden.bias"}
    assert all(each.is_leaf and len(each) == 2 for each in [*parameters.values(), *buffers.values()])
    with torch.no_grad():
        parameters["hidden.bias"].zero_()
    assert model.get_parameter("hidden.bias").abs().sum() > 0


def wider():
    return transformed("split-synapses", width=9)


def frozen():
    model = transformed("split-synapses")
    model.get_parameter("readout.bias").requires_grad_(False)
    return model


def in_another_network():
    class Other(Network):
        def forward(self, x):
            return self.readout(self.norm(self.hidden(x)).tanh())

    return biofx.transform(Other().eval(), "split-synapses", example_inputs=INPUTS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Network(), "made by biofx.transform"),
        (lambda: transformed("split-synapses{synapses=3}"), "its passes are split-synapses"),
        (lambda: transformed("split-synapses").train(), "training mode"),
        (wider, r"hidden.bias is \(9,\) in torch.float64, not \(8,\)"),
        (frozen, "readout.bias is frozen in one of them"),
        (in_another_network, "different networks"),
    ],
)
def test_models_that_differ_in_more_than_values_are_refused(other, message):
    with pytest.raises(ArgumentError, match=message):
        biofx.stack_module_state([transformed("split-synapses"), other()])


def test_an_attached_model_is_refused():
    model = transformed("split-synapses")
    attachment = biofx.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match=r"model 1 is attached.*biofx\.detach"):
        biofx.stack_module_state([transformed("split-synapses"), model])
    attachment.detach()


def test_no_model_is_refused():
    with pytest.raises(ArgumentError, match="at least one"):
        biofx.stack_module_state([])
