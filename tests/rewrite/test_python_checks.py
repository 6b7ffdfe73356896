"""Checks of Python: with synapses, it computes what it does with parameters, and has the same gradients."""

import pytest
import torch
from torch import nn

import biofx

PIPELINES = ("fuzzy-learning-rates", "split-synapses", "split-synapses,fuzzy-learning-rates,crystallize")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Recomputed(torch.autograd.Function):
    """Runs a layer again in the backward pass, as reversible networks and equilibrium models do."""

    @staticmethod
    def forward(ctx, layer, allow_unused, x, *weights):
        ctx.layer, ctx.allow_unused = layer, allow_unused
        ctx.save_for_backward(x, *weights)
        with torch.no_grad():
            return torch.tanh(layer(x))

    @staticmethod
    def backward(ctx, gradient):
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.tanh(ctx.layer(x))
        return None, None, *torch.autograd.grad(y, [x, *weights], gradient, allow_unused=ctx.allow_unused)


class Network(nn.Module):
    """A recomputed layer and a head."""

    def __init__(self, given, allow_unused=True):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.given, self.allow_unused = given, allow_unused

    def forward(self, x):
        return self.head(Recomputed.apply(self.layer, self.allow_unused, x, *self.given(self.layer)))


def attributes(layer):
    return layer.weight, layer.bias


def parameters(layer):
    return tuple(layer.parameters())


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_weight_that_a_backward_differentiates_by_is_refused(frontend, pipeline):
    with pytest.raises(biofx.CaptureError, match=r"layer.weight gets another gradient.*give it module.parameters\(\)"):
        biofx.transform(Network(attributes), pipeline, example_inputs=X, frontend=frontend)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_so_is_one_for_which_the_backward_fails(frontend):
    with pytest.raises(biofx.CaptureError, match=r"cannot be differentiated .* exclude the weights .*layer.weight"):
        biofx.transform(Network(attributes, allow_unused=False), "split-synapses", example_inputs=X, frontend=frontend)


class Policy(Network):
    """Returns a distribution."""

    def forward(self, x):
        return torch.distributions.Normal(super().forward(x), 1.0)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_so_is_one_behind_results_in_an_object(frontend):
    with pytest.raises(biofx.CaptureError, match=r"layer.weight gets another gradient"):
        biofx.transform(Policy(attributes), "split-synapses", example_inputs=X, frontend=frontend)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize(("given", "exclude"), [(parameters, ()), (attributes, "layer.weight")])
def test_what_the_error_says_to_do_works(given, exclude, frontend, pipeline):
    model = Network(given)
    bio = biofx.transform(model, pipeline, example_inputs=X, frontend=frontend, exclude=exclude)
    plain = biofx.fold(bio)
    bio(X).square().sum().backward()
    plain(X).square().sum().backward()
    torch.testing.assert_close(bio.layer.bias.grad, plain.layer.bias.grad)
    assert bio.get_parameter("layer.weight").grad.count_nonzero() == bio.get_parameter("layer.weight").numel()


ASKS = {
    "parameters": lambda m: sum(p.norm() for p in m.parameters()),
    "its registry": lambda m: m.layer._parameters["weight"].norm(),
    "its class": lambda m: type(m.layer) is nn.Linear,
    "by name": lambda m: m.get_parameter("layer.weight").norm(),
    "its children": lambda m: len([*m.layer.children()]),
}


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_what_only_training_asks_of_stored_values_is_refused(ask, frontend):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x):
            y = self.layer(x)
            return y + ask(self) if self.training else y

    with pytest.raises(biofx.CaptureError, match="in training mode.*read weights as attributes"):
        biofx.transform(Asks(), "split-synapses", example_inputs=X, frontend=frontend)
