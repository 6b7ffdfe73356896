"""Dry run: what the nodes of a graph compute."""

import pytest
import torch
from torch import nn

import biofx
from biofx.capture import capture
from biofx.dry_run import SEQUENCE, SIDES, UNKNOWN, dry_run
from biofx.weights.sites import find
from models.small import ConvNet, Residual, mlp


def values(model, example_inputs=None):
    """What nodes compute, by name."""
    bio = capture(model, example_inputs)
    return {node.name: value for node, value in dry_run(bio, find(bio)[0], example_inputs).items()}


class Computed(nn.Module):
    """A layer, and what a function makes of its input."""

    def __init__(self, function, layer):
        super().__init__()
        self.function = function
        self.layer = layer

    def forward(self, x):
        return self.function(self, x)


def test_floating_point_tensors_have_shapes_only():
    found = values(mlp(4, 3, 2), torch.randn(5, 4, dtype=torch.float32))
    assert [tuple(value.shape) for name, value in found.items() if name.startswith("linear")] == [(5, 3), (5, 2)]
    assert all(value.is_meta for value in found.values() if isinstance(value, torch.Tensor))


def test_everything_else_has_its_value():
    model = Computed(lambda m, x: (m.layer(x), x.shape[0], x.argmax(1), x.topk(2)), nn.Linear(3, 2))
    found = values(model, torch.tensor([[1.0, 3.0, 2.0]]))
    assert found["getitem"] == 1
    assert found["argmax"].tolist() == [1]
    assert found["topk"].indices.tolist() == [[1, 2]]
    assert found["topk"].values.is_meta


def test_defaults_and_keywords():
    found = values(Residual(), {"x": torch.randn(5, 4), "shift": 2.0})
    assert (found["x"].shape, found["shift"]) == ((5, 4), 2.0)
    assert values(Residual(), torch.randn(5, 4))["shift"] == 0.0


def test_runs_in_evaluation_mode():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    values(model, torch.randn(1, 4))  # in training mode, one sample has no variance
    assert model.training


def test_the_inputs_stay_as_they_are():
    x = torch.randn(2, 4)
    before = x.clone()
    values(Computed(lambda m, x: m.layer(x.mul_(2)), nn.Linear(4, 2)), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("inputs", [torch.randn(5, 3), torch.randn(5, 4).double(), torch.randn(3)])
def test_example_inputs_that_do_not_fit(inputs):
    with pytest.raises(biofx.ArgumentError, match=r"Sequential fails on example_inputs, at linear in 0: .+"):
        values(mlp(4, 3, 2), inputs)


def test_missing_and_superfluous_inputs():
    bio = capture(mlp(4, 3, 2))
    for inputs in ((), (torch.randn(5, 4), 1), {"z": torch.randn(5, 4)}):
        with pytest.raises(biofx.ArgumentError, match="example_inputs do not fit Sequential.forward"):
            dry_run(bio, find(bio)[0], inputs)


# --- without example inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 2), (2, 4)),
        (nn.Conv1d(4, 2, 3), (2, 4, SIDES[0])),
        (nn.Conv3d(4, 2, 3), (2, 4, *[SIDES[0]] * 3)),
        (nn.ConvTranspose2d(4, 2, 3), (2, 4, SIDES[0], SIDES[0])),
        (nn.Conv2d(4, 2, 3, groups=2), (2, 4, SIDES[0], SIDES[0])),
    ],
)
def test_operators_say_what_shape_they_take(layer, shape):
    found = values(Computed(lambda m, x: m.layer((x + 1).relu()), layer))
    assert tuple(found["x"].shape) == tuple(found["relu"].shape) == shape


def test_shapes_may_be_asked_for_before_the_operator():
    model = Computed(lambda m, x: m.layer(x).view(x.size(0), -1, 1), nn.Conv2d(1, 3, 1))
    assert tuple(values(model)["view"].shape) == (2, 3 * SIDES[0] ** 2, 1)


def test_embeddings_ask_for_integers():
    model = Computed(lambda m, x: m.layer(x) + x.size(1), nn.Embedding(9, 4))
    found = values(model)
    assert torch.equal(found["x"], torch.zeros(2, SEQUENCE, dtype=torch.int64))
    assert tuple(found["add"].shape) == (2, SEQUENCE, 4)


def test_the_first_side_that_fits_is_taken():
    model = nn.Sequential(nn.Conv2d(3, 2, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 15 * 15, 4))
    assert values(model)["input_1"].shape[-1] == 64


def test_sequences_are_tried():
    def forward(m, x):
        batch, tokens, width = x.shape
        return m.layer(x).view(batch, tokens, 2, width // 2)

    assert tuple(values(Computed(forward, nn.Linear(4, 4)))["view"].shape) == (2, SEQUENCE, 2, 2)


def test_a_side_that_no_guess_fits_is_left_to_the_next_operator():
    found = values(ConvNet())  # whose head reads images of 8 × 8
    assert found["head" if "head" in found else "linear"].shape == (2, 10)


def test_what_cannot_be_computed_is_unknown():
    model = Computed(lambda m, x: (m.layer(x), x.view(-1, 7, 11).cumsum(0)), nn.Linear(4, 2))
    found = values(model)
    assert found["view"] is found["cumsum"] is UNKNOWN
    assert repr(UNKNOWN) == "unknown"
    assert tuple(found["linear"].shape) == (2, 2)
