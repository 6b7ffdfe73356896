"""Devices and dtypes: a model moves to another device or is converted, unless its graph contains its dtype."""

import copy

import pytest
import torch
from torch import nn

import biofx
from exported_models import EVERYTHING, export, export_for_graph, forms, same, x
from models.small import mlp


class MakesTensors(nn.Linear):
    """Makes tensors on the device of its input, without gradients and in training as well."""

    def forward(self, value):
        with torch.no_grad():
            start = super().forward(torch.zeros(4, device=value.device))
        if self.training:
            start = start + torch.rand(4, device=value.device)
        return super().forward(value) + start + torch.arange(4, device=value.device)


@pytest.mark.parametrize("training", [True, False])
def test_it_may_move_to_another_device(training):
    bio = export(MakesTensors(4, 4), x(), EVERYTHING).train(training)
    for other in forms(bio):
        assert other.to("meta")(x().to("meta")).is_meta


class InItsDtype(nn.Linear):
    def forward(self, value):
        return super().forward(value.round().to(self.weight.dtype))


def test_a_dtype_that_the_graph_contains_stays():
    inputs = torch.arange(8).reshape(2, 4)
    model = InItsDtype(4, 4)
    bio, free = export_for_graph(model, inputs), export_for_graph(mlp(4, 3), x())
    assert same(export(model, inputs).double()(inputs), copy.deepcopy(model).double()(inputs))
    with pytest.raises(biofx.ArgumentError, match="contains torch.float32, in which it was captured, and"):
        bio.double()(inputs)
    assert free.double()(x().double()).dtype == torch.float64


def test_another_dtype_than_that_of_the_example():
    class ByDtype(nn.Linear):
        def forward(self, value, tokens):
            y = super().forward(value)
            return y if tokens.dtype == torch.int32 else -y

    model, value = ByDtype(4, 4), x()
    inputs, others = (value, torch.ones(2, dtype=torch.int32)), (value, torch.ones(2, dtype=torch.int64))
    assert same(export(model, inputs)(*others), model(*others))
    bio = export_for_graph(model, inputs)
    with pytest.raises(biofx.ArgumentError, match="torch.int32 as the dtype of tokens, which is torch.int64"):
        bio(*others)
    assert bio.double()(value.double(), inputs[1]).dtype == torch.float64
