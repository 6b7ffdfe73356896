"""Fold: the plain model that a transformed one computes."""

import copy
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import loss, tensors
from models.small import ConvNet, Functional, Residual, keep_logits, layer_and_input, mlp

PIPELINES = {
    "split": [passes.SplitSynapses(3)],
    "fuzzy": [passes.FuzzyLearningRates()],
    "both": [passes.SplitSynapses(3), passes.FuzzyLearningRates(distribution="gamma")],
}


def trained(bio, x, steps=3):
    """A few steps, so that nothing is at its initial value."""
    optimizer = torch.optim.SGD(bio.parameters(), lr=1e-2)
    bio.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(bio(x)).backward()
        optimizer.step()
    return bio.eval()


def assert_close(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_folded_model_is_the_plain_model(zoo, pipeline):
    model, x = zoo
    bio = trained(biofx.transform(model, PIPELINES[pipeline]), x)
    plain = biofx.fold(bio)
    expected = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in plain.state_dict().items()} == expected
    assert list(plain.state_dict()) == list(model.state_dict())
    assert_close(plain(x), bio(x))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_close(model(x), bio(x))
    assert type(plain) is type(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert not any("gain" in name for name, _ in plain.named_buffers())


def test_the_transformed_model_stays_and_shares_nothing():
    bio = biofx.transform(ConvNet(), PIPELINES["both"])
    before, code = copy.deepcopy(bio.state_dict()), bio.code
    plain = biofx.fold(bio)
    assert bio.code == code
    assert all(torch.equal(v, before[k]) for k, v in bio.state_dict().items())
    pointers = [{t.data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (bio, plain)]
    assert not pointers[0] & pointers[1]
    biofx.verify(bio)


def test_mode_and_requires_grad_are_kept():
    model = mlp(2, 3, 2).eval()
    model[0].weight.requires_grad_(False)
    plain = biofx.fold(biofx.transform(model, PIPELINES["both"]))
    assert not plain.training
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in model.parameters()]


def test_an_edited_graph_stays_as_captured_but_for_the_edit():
    bio, x = biofx.transform(ConvNet().eval(), PIPELINES["both"]), torch.randn(4, 1, 8, 8)
    captured = biofx.capture.symbolic.capture(ConvNet())
    (output,) = bio.graph.find_nodes(op="output")
    with bio.graph.inserting_before(output):
        output.args = (bio.graph.call_function(torch.neg, output.args),)
    bio.recompile()
    plain = biofx.fold(bio)
    assert_close(plain(x), bio(x))
    assert len(plain.graph.nodes) == len(captured.graph.nodes) + 1
    assert "biofx" not in plain.code


def test_a_graph_is_folded_to_a_graph():
    model, x = torch.fx.symbolic_trace(ConvNet().eval()), torch.randn(4, 1, 8, 8)
    plain = biofx.fold(biofx.transform(model, PIPELINES["both"]))
    assert plain.code == biofx.capture.symbolic.capture(model).code
    assert_close(plain(x), model(x))


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_container_is_one_again(frontend):
    bio = biofx.transform(mlp(4, 8, 3), PIPELINES["both"], frontend=frontend, example_inputs=torch.randn(2, 4))
    plain = biofx.fold(bio)
    assert type(plain) is nn.Sequential
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    assert plain[0].weight.shape == (8, 4)


def test_what_is_done_to_layers_of_a_folded_model_takes_effect():
    """Hooks, pruning, other layers and scripting, as of any model."""
    x, seen = torch.randn(5, 4), []
    plain = biofx.fold(biofx.transform(mlp(4, 8, 3), PIPELINES["both"]))
    plain[0].register_forward_hook(lambda *_: seen.append("hook"))
    plain(x)
    assert seen == ["hook"]
    plain[0]._forward_hooks.clear()
    assert_close(torch.jit.script(plain)(x), plain(x))
    nn.utils.prune.l1_unstructured(plain[0], "weight", amount=0.5)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(2):
        plain(x).square().mean().backward()
        optimizer.step()
    plain[2] = nn.Linear(8, 7)
    assert plain(x).shape == (5, 7)


def test_attributes_set_since_the_transform_are_folded():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(2, 2), 1.0

        def forward(self, x):
            return self.fc(x) * self.scale

    bio, x = biofx.transform(Scaled(), PIPELINES["split"]), torch.randn(3, 2)
    plain = biofx.fold(bio)
    bio.scale = 2.0
    assert_close(biofx.fold(bio)(x), 2 * plain(x))


def test_a_folded_model_trains_pickles_and_transforms_again():
    model, x = ConvNet(), torch.randn(4, 1, 8, 8)
    plain = biofx.fold(biofx.transform(model, PIPELINES["both"]))
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    assert_close(torch.load(file, weights_only=False).eval()(x), plain.eval()(x))
    again = biofx.transform(plain, PIPELINES["split"])
    assert_close(trained(again, x)(x), biofx.fold(again)(x))


WITHOUT_BIOFX = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "biofx":
            raise ImportError("biofx is not installed here")

sys.meta_path.insert(0, Refuse())
import torch

for model, x, expected in torch.load(sys.argv[1], weights_only=False):
    torch.testing.assert_close(model(**x)["logits"], expected)
    torch.testing.assert_close(model.hooked, expected)
"""


def test_folded_models_load_where_biofx_is_not_installed(tmp_path):
    model, x = Residual(), {"x": torch.randn(5, 4), "shift": 0.5}
    model.register_forward_hook(keep_logits)
    kept = [
        biofx.fold(biofx.transform(model, "cortex", example_inputs=x, frontend=frontend))
        for frontend in ("symbolic", "module", "export")
    ]
    kept += [biofx.fold(biofx.transform(model, p, example_inputs=x)) for p in ("split-synapses{activation=tanh}",)]
    assert [type(plain) is Residual for plain in kept] == [True] * 3 + [False]
    torch.save([(plain, x, plain(**x)["logits"].detach()) for plain in kept], tmp_path / "folded.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", WITHOUT_BIOFX, tmp_path / "folded.pt"], env=environment, check=True)


class RootBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.fc(x) * self.mask + torch.arange(3) + self.count


def test_which_buffers_are_persistent_is_kept():
    model = RootBuffers()
    bio = biofx.transform(model, PIPELINES["both"])
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    x = torch.randn(2, 3)
    for other in (bio, copy.deepcopy(bio), copy.copy(bio), torch.load(file, weights_only=False)):
        plain = biofx.fold(other)
        assert list(plain.state_dict()) == list(model.state_dict())
        assert list(copy.deepcopy(plain).state_dict()) == list(model.state_dict())
        assert_close(plain(x), model(x))


def test_fold_into_an_instance_copies_every_buffer():
    model = RootBuffers()
    model.mask.fill_(7)
    target = biofx.fold(biofx.transform(model, PIPELINES["both"]), into=RootBuffers())
    assert torch.equal(target.mask, model.mask)
    x = torch.randn(2, 3)
    assert_close(target(x), model(x))
    other = RootBuffers()
    other.mask = torch.ones(4)
    with pytest.raises(biofx.ArgumentError, match=r"mask is \(3,\) in the folded model and \(4,\) in this one"):
        biofx.fold(biofx.transform(model, PIPELINES["both"]), into=other)


class Versioned(nn.Linear):
    """A layer with state that is no tensor."""

    version = 1

    def get_extra_state(self):
        return {"version": self.version}

    def set_extra_state(self, state):
        self.version = state["version"]


def test_extra_state_goes_along():
    model = nn.Sequential(Versioned(2, 2))
    model[0].version = 5
    bio = biofx.transform(model, PIPELINES["both"])
    assert biofx.fold(bio).get_submodule("0").version == 5
    assert biofx.fold(bio, into=nn.Sequential(Versioned(2, 2)))[0].version == 5


def test_fold_into_something_else_than_a_model():
    with pytest.raises(biofx.ArgumentError, match="into must be an instance of the original model, got 3"):
        biofx.fold(biofx.transform(mlp(2, 2), PIPELINES["both"]), into=3)


def test_a_model_that_cannot_be_copied():
    model = mlp(2, 2)
    model.lock = threading.Lock()
    bio = biofx.transform(model, PIPELINES["both"], inplace=True)
    with pytest.raises(biofx.ArgumentError, match="Sequential cannot be copied: .*lock.*; remove what copy"):
        biofx.fold(bio)


def test_a_model_that_is_folded_in_inference_mode_trains():
    bio = biofx.transform(mlp(2, 2), PIPELINES["both"])
    with torch.inference_mode():
        plain = biofx.fold(bio)
    loss(plain(torch.randn(1, 2))).backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_a_weight_without_elements():
    bio = biofx.transform(mlp(0, 3, 2), PIPELINES["split"])
    for plain in (biofx.fold(bio), biofx.fold(bio, into=mlp(0, 3, 2))):
        assert plain.get_parameter("0.weight").shape == (3, 0)
        assert_close(plain(torch.randn(2, 0)), bio(torch.randn(2, 0)))
    with pytest.raises(biofx.ArgumentError, match="weight: it has no entries"):
        biofx.transform(nn.Linear(0, 3), PIPELINES["split"])


def test_fold_into_an_instance():
    bio = trained(biofx.transform(Functional(), PIPELINES["both"]), torch.randn(5, 4, 7))
    target = Functional().eval()
    assert biofx.fold(bio, into=target) is target
    x = torch.randn(5, 4, 7)
    assert_close(target(x), bio(x))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: mlp(2, 4, 2), r"0.weight is \(3, 2\) in the folded model and \(4, 2\) in this one"),
        (lambda: mlp(2, 3, 2, 2), r"4.weight is missing in the folded model and \(2, 2\) in this one"),
    ],
)
def test_fold_into_another_model_names_the_first_difference(target, message):
    model = target()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(biofx.ArgumentError, match="is not the model that was transformed: " + message):
        biofx.fold(biofx.transform(mlp(2, 3, 2), PIPELINES["both"]), into=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_per_synapse_activation_folds_to_a_graph():
    layer, x = layer_and_input("conv2d", "grouped")
    pipeline = [passes.SplitSynapses(3, activation="tanh"), passes.FuzzyLearningRates()]
    bio = trained(biofx.transform(layer, pipeline), x)
    plain = biofx.fold(bio)
    assert_close(plain(x), bio(x))
    assert "tanh" in plain.code
    assert "biofx" not in plain.code
    assert plain.weight.shape == (3 * 8, 2, 3, 3)


@pytest.mark.parametrize(
    ("pipeline", "by"),
    [("hofmann2025", "group-units"), ([passes.SplitSynapses(activation="tanh")], "split-synapses")],
)
def test_what_no_weight_can_hold_stays_in_the_graph(pipeline, by):
    model, x = mlp(4, 8, 2), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    bio = biofx.transform(model, pipeline)
    assert_close(biofx.fold(bio)(x), bio(x))
    message = f"Sequential would compute something else: {by} changed what the operator of 0.weight returns"
    with pytest.raises(biofx.ArgumentError, match=message):
        biofx.fold(bio, into=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = mlp(2, 2, 2)
    model[2].weight = model[0].weight
    plain = biofx.fold(biofx.transform(model, PIPELINES["split"]))
    assert plain.get_parameter("0.weight") is plain.get_parameter("2.weight")
    assert list(plain.state_dict()) == list(model.state_dict())
