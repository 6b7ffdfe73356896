"""Weight tensors: in a forward, Python decides about a weight as about the parameter of the original."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import biofx

PIPELINES = (
    "fuzzy-learning-rates",
    "split-synapses",
    "dales-principle{balance=False}",
    "dales-principle{constraint=softplus,balance=False}",
)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Deciding(nn.Module):
    """Doubles its activity if a question about its second layer is answered with yes."""

    def __init__(self, question: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.question = question

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden * 2 if self.question(self) else hidden)


ANSWERED = {
    "is it a leaf": lambda model: model.second.weight.is_leaf,
    "has it a history": lambda model: model.second.weight.grad_fn is None,
    "is it no view": lambda model: model.second.weight._base is None and not model.second.weight._is_view(),
    "is it trained": lambda model: model.second.weight.requires_grad,
}
REFUSED = {
    "class of the weight": lambda model: isinstance(model.second.weight, nn.Parameter),
    "type of the weight": lambda model: type(model.second.weight) is nn.Parameter,
    "identity of the weight": lambda model: any(p is model.second.weight for p in model.parameters()),
    "type of the layer": lambda model: type(model.second) is nn.Linear,
    "names of parameters": lambda model: "second.weight" in dict(model.named_parameters()),
    "number of modules": lambda model: len([*model.modules()]) == 3,
    "text of the layer": lambda model: repr(model.second) == repr(nn.Linear(4, 4)),
}


def in_training(question: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    return lambda model: model.training and question(model)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", ANSWERED)
def test_a_forward_decides_about_a_weight_as_about_a_parameter(question, frontend, pipeline):
    bio = biofx.transform(Deciding(ANSWERED[question]), pipeline, example_inputs=(X,), frontend=frontend)
    expected = biofx.fold(bio)(X)
    torch.testing.assert_close(bio(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(bio(X), expected)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", REFUSED)
def test_a_forward_that_would_decide_otherwise_is_refused(question, frontend, pipeline):
    with pytest.raises((biofx.CaptureError, biofx.VerificationError), match="output 0 differs by"):
        biofx.transform(Deciding(REFUSED[question]), pipeline, example_inputs=(X,), frontend=frontend)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", REFUSED)
def test_so_is_one_that_would_in_training_only(question, frontend, pipeline):
    model = Deciding(in_training(REFUSED[question])).eval()
    with pytest.raises(biofx.CaptureError, match="in training mode: output 0 differs by"):
        biofx.transform(model, pipeline, example_inputs=(X,), frontend=frontend)


def with_gradients(question: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    return lambda model: torch.is_grad_enabled() and question(model)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", REFUSED)
def test_so_is_one_that_would_with_gradients_only(question, frontend):
    model = Deciding(with_gradients(REFUSED[question]))
    with pytest.raises(biofx.CaptureError, match="in training mode with gradients: output 0 differs by"):
        biofx.transform(model, "split-synapses", example_inputs=(X,), frontend=frontend)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", ANSWERED)
def test_questions_in_training_only_are_noticed(question, frontend):
    model = Deciding(in_training(ANSWERED[question])).eval()
    bio = biofx.transform(model, "split-synapses", example_inputs=(X,), frontend=frontend)
    assert "torch.compile leaves the model uncompiled" in " ".join(biofx.summary(bio).split())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("question", ANSWERED)
def test_torch_compile_leaves_such_a_forward_uncompiled(question, frontend, tmp_path):
    model = Deciding(ANSWERED[question])
    bio = biofx.transform(model, "split-synapses", example_inputs=(X,), frontend=frontend)
    assert "torch.compile leaves the model uncompiled" in " ".join(biofx.summary(bio).split())
    biofx.save(bio, tmp_path / "saved")
    expected = biofx.fold(bio)(X)
    for each in (bio, biofx.load(tmp_path / "saved", model)):
        torch.testing.assert_close(torch.compile(each, backend="eager")(X), expected)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(each, backend="eager")(X), expected)
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="disable|no compiled frames"):
            torch.compile(each, backend="eager", fullgraph=True)(X)


def test_outside_of_forward_a_weight_is_no_parameter_to_train():
    bio = biofx.transform(Deciding(ANSWERED["is it a leaf"]), "split-synapses", example_inputs=(X,))
    assert not bio.second.weight.is_leaf
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([bio.second.weight], lr=0.1)


def test_a_refusal_leaves_a_model_in_place_as_it_was():
    model = Deciding(REFUSED["type of the layer"])
    before = [(parameter, parameter.clone()) for parameter in model.parameters()]
    with pytest.raises(biofx.CaptureError, match="by the types"):
        biofx.transform(model, PIPELINES[2], example_inputs=(X,), frontend="module", inplace=True)
    assert type(model.second) is nn.Linear
    for now, (parameter, value) in zip(model.parameters(), before, strict=True):
        assert now is parameter
        assert torch.equal(now, value)


class FastWeights(nn.Module):
    """Computes with its layer after one step down a gradient, as in test-time training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.layer(x).square().sum(), self.layer.weight, create_graph=True)
        return nn.functional.linear(x, self.layer.weight - 0.01 * slope, self.layer.bias)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
@pytest.mark.parametrize("verify", [True, False])
def test_an_inner_module_may_differentiate_by_its_weight(frontend, pipeline, verify):
    model = nn.Sequential(nn.Linear(4, 4), FastWeights())
    bio = biofx.transform(model, pipeline, example_inputs=(X,), frontend=frontend, verify=verify)
    torch.testing.assert_close(bio(X), biofx.fold(bio)(X))
