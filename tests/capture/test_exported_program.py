"""Programs: what a graph cannot represent is refused, and the message says why."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from exported_models import assert_same_in_both_modes, export, x


class Decides(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y if y.sum() > 0 else -y


class Counts(nn.Linear):
    calls = 0

    def forward(self, value):
        self.calls += 1
        return super().forward(value) * self.calls


class DrawsInPython(nn.Linear):
    def __init__(self, draw):
        super().__init__(4, 4)
        self.draw = draw

    def forward(self, value):
        return super().forward(value) * self.draw()


class Chooses(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))


class Opaque:
    pass


class ReturnsAnything(nn.Linear):
    def forward(self, value):
        return super().forward(value), Opaque()


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))
        self[0].register_forward_hook(lambda *_: None)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class ReversesGradients(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y, Reversed.apply(y).exp()


class ReversesInEvaluation(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y if self.training else Reversed.apply(y)


class ReversesInTraining(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return Reversed.apply(y) if self.training else y


class HooksItsTensor(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y


class Differentiates(nn.Linear):
    def forward(self, value):
        step = torch.func.grad(lambda weight: (value @ weight.T).tanh().square().sum())(self.weight)
        return super().forward(value) - value @ step.T


class Infers(nn.Linear):
    def forward(self, value):
        with torch.inference_mode():
            y = super().forward(value)
        return y.clone()


class Checkpoints(nn.Sequential):
    def __init__(self, use_reentrant):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, value):
        return checkpoint(self[1], self[0](value).relu(), use_reentrant=self.use_reentrant)


def has_steep_gradient(layer):
    return layer.weight.grad is not None and layer.weight.grad.norm() > 1


class Asks(nn.Linear):
    def __init__(self, asks=lambda layer: layer.weight.requires_grad):
        super().__init__(4, 4)
        self.asks = asks

    def forward(self, value):
        return super().forward(value) * (2 if self.asks(self) else 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Decides(4, 4), r"Decides cannot be exported in training mode: .*data-dependent.*\n +at .*y if y.sum\(\) > 0"),
        (
            Counts(4, 4),
            "Counts cannot be exported: its forward changes the attribute calls, which a graph cannot represent",
        ),
        (nn.Sequential(Counts(4, 4)), "Sequential cannot be exported: the forward of 0 changes the attribute calls"),
        (
            nn.Sequential(Decides(4, 4)),
            r"decides by the values of a tensor.*\n  in 0 \(Decides\)\n  at .*y if y.sum",
        ),
        (nn.BatchNorm1d(4, momentum=None), "makes a Python number of them: Could not extract"),
        (DrawsInPython(random.random), "its forward draws random numbers from Python or NumPy"),
        (DrawsInPython(lambda: numpy.random.random()), "its forward draws random numbers from Python or NumPy"),
        (ReturnsAnything(4, 4), "forward returns an instance of Opaque, which torch.export cannot unpack"),
        (Chooses(4, 4), "forward uses cond, whose branches biofx cannot follow"),
        (Hooked(), r"0 \(Linear\) has hooks, which only run when the module itself is called"),
        (
            ReversesGradients(4, 4),
            "computes something else in evaluation mode: gradient of weight differs.*a torch.autograd.Function",
        ),
        (ReversesInEvaluation(4, 4), "computes something else in evaluation mode: gradient of weight differs"),
        (ReversesInTraining(4, 4), "computes something else in training mode: gradient of weight differs"),
        (HooksItsTensor(4, 4), "computes something else in evaluation mode: gradient of weight differs"),
        (Infers(4, 4), "its forward uses torch.inference_mode, which a graph cannot represent"),
        (
            Differentiates(4, 4),  # PyTorch 2.9 fails by itself
            "torch.export loses tensors that forward computes, as it does inside of torch.func.grad"
            "|cannot be exported in training mode: AssertionError",
        ),
        (Asks(), "its forward asks whether a parameter is frozen, which a graph cannot represent"),
        (
            nn.Sequential(Asks(lambda layer: any(p.requires_grad for p in layer.parameters()))),
            "the forward of 0 asks whether a parameter is frozen",
        ),
        (Asks(has_steep_gradient), "its forward reads the gradient of a parameter, which a graph cannot represent"),
        (Asks(lambda layer: layer.weight._version > 9), "its forward asks whether a parameter was written to"),
        (Checkpoints(use_reentrant=True), "its forward calls checkpoint with use_reentrant=True, which a graph"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_graph_does_not_do_is_refused_with_the_reason(model, message, capsys):
    with pytest.raises(biofx.CaptureError, match=r"(?s)" + message) as error:
        export(model, x())
    assert 'frontend="module"' in str(error.value)
    assert len(str(error.value).splitlines()) < 6
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_other_front_ends_read_the_gradient_that_is_there(frontend):
    model, value = Asks(has_steep_gradient), x()
    bio = biofx.transform(model, [passes.FuzzyLearningRates()], frontend=frontend, example_inputs=value)
    biofx.attach(bio, torch.optim.SGD(bio.parameters()))
    before = model(value)
    for each in (model, bio):
        torch.testing.assert_close(each(value), before)
        (9 * each(value)).square().sum().backward()
        torch.testing.assert_close(each(value), 2 * before)


def test_what_is_never_frozen_may_be_asked():
    model, value = Asks(lambda layer: layer.weight.detach().requires_grad), x()
    for each in (model, bio := export(model, value)):
        each.weight.requires_grad_(False)
    assert_same_in_both_modes(bio, model, value)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_modules_of_pytorch_may_ask_what_is_frozen(is_frozen):
    layer, value = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), x(2, 5, 8)
    layer.self_attn.requires_grad_(not is_frozen)
    bio = export(layer, value)
    for each in (layer, bio):
        each.self_attn.requires_grad_(is_frozen)
    for mode in (True, False):
        torch.testing.assert_close(bio.train(mode)(value), layer.train(mode)(value))


def test_a_checkpoint_that_is_not_reentrant_is_part_of_the_graph():
    model, value = Checkpoints(use_reentrant=False), x()
    bio = export(model, value)
    assert_same_in_both_modes(bio, model, value)
    assert len(biofx.weight_sites(bio)) == 2


def test_padding_filled_without_gradients_is_refused():
    inputs = {"src": x(2, 5, 8), "src_key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)}
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(biofx.CaptureError, match="build it with enable_nested_tensor=False"):
        export(nn.TransformerEncoder(layer, 1), inputs)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    assert_same_in_both_modes(export(model, inputs), model, inputs)
