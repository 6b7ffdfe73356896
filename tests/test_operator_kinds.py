"""What operators do to units: how calls are recognised."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biofx.capture import capture
from biofx.operator_kinds import _KINDS, _SIGNS, Kind, Sign, argument, held_parameter, operation


class Call(nn.Module):
    """One call of a function or of a module."""

    def __init__(self, called):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.called = called

    def forward(self, x):
        return self.called(x)


def only_call(called):
    bio = capture(Call(called))
    (node, *others) = [node for node in bio.graph.nodes if node.op.startswith("call_")]
    assert not others
    return node, bio


def described(called):
    found = operation(*only_call(called))
    return found.name, found.kind, found.key, found.axes


@torch.fx.wrap
def relu(x):
    return x


@pytest.mark.parametrize(
    ("called", "name", "kind", "key", "axes"),
    [
        (nn.MaxPool2d(2), "MaxPool2d", Kind.WINDOW, "maxpool", 2),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d", Kind.WINDOW, "maxpool", 2),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d_with_indices", Kind.WINDOW, "maxpool", 2),
        (nn.AdaptiveAvgPool1d(1), "AdaptiveAvgPool1d", Kind.WINDOW, "adaptiveavgpool", 1),
        (lambda x: F.interpolate(x, 2), "interpolate", Kind.WINDOW, "interpolate", 0),
        (nn.BatchNorm3d(2), "BatchNorm3d", Kind.NORM, "batchnorm", 3),
        (lambda x: x.relu_(), "relu_", Kind.KEEP, "relu", 0),
        (lambda x: relu(x), "relu", Kind.UNKNOWN, "relu", 0),
        (lambda x: torch.atleast_2d(x), "atleast_2d", Kind.LAYOUT, "atleast", 2),
        (lambda x: x.mT, "mT", Kind.LAYOUT, "mt", 0),
        (lambda x: x.shape, "shape", Kind.CONSTANT, "shape", 0),
        (lambda x: x[0], "getitem", Kind.LAYOUT, "getitem", 0),
        (lambda x: x + 1, "add", Kind.MERGE, "add", 0),
        (lambda x: x @ x, "matmul", Kind.MIX, "matmul", 0),
        (lambda x: x.max(1), "max", Kind.REDUCE, "max", 0),
        (lambda x: x.cumsum(1), "cumsum", Kind.UNKNOWN, "cumsum", 0),
        (nn.LSTM(2, 2), "LSTM", Kind.UNKNOWN, "lstm", 0),
    ],
)
def test_calls(called, name, kind, key, axes):
    assert described(called) == (name, kind, key, axes)


def test_the_maximum_of_two_tensors_is_a_merge():
    bio = capture(Call(lambda x: torch.max(x, torch.exp(x))))
    assert [operation(n, bio).kind for n in bio.graph.nodes if n.op == "call_function"] == [Kind.KEEP, Kind.MERGE]


@pytest.mark.parametrize(
    ("called", "changes"),
    [
        (lambda x: x.relu_(), True),
        (lambda x: torch.relu_(x), True),
        (nn.ReLU(inplace=True), True),
        (lambda x: F.relu(x, inplace=True), True),
        (nn.ReLU(), False),
        (lambda x: x.relu(), False),
        (lambda x: x + 1, False),
    ],
)
def test_changes_in_place(called, changes):
    node, bio = only_call(called)
    assert operation(node, bio).changes is (node.all_input_nodes[0] if changes else None)


def test_signs():
    def sign(called):
        return operation(*only_call(called)).sign

    assert sign(F.relu) is Sign.NEVER
    assert sign(lambda x: x.flatten(1)) is Sign.PASSED
    assert sign(torch.tanh) is Sign.ODD
    assert sign(nn.BatchNorm1d(3)) is Sign.ANY
    assert sign(lambda x: relu(x)) is Sign.ANY


def test_arguments():
    node, bio = only_call(lambda x: torch.cat((x, x), axis=1))
    assert argument(node, bio, 1, "dim", "axis", default=0) == 1
    node, bio = only_call(lambda x: torch.cat((x, x), 2))
    assert argument(node, bio, 1, "dim", "axis", default=0) == 2
    node, bio = only_call(lambda x: torch.cat((x, x)))
    assert argument(node, bio, 1, "dim", "axis", default=0) == 0
    assert argument(*only_call(nn.GLU(1)), 1, "dim", default=-1) == 1


@pytest.mark.parametrize(
    ("function", "held"),
    [
        (lambda w: w, True),
        (lambda w: w.view(1, -1, 1), True),
        (lambda w: w[:, None].contiguous().float(), True),
        (lambda w: 1 + w, False),
        (lambda w: w.exp(), False),
    ],
)
def test_layouts_of_a_parameter_hold_it(function, held):
    class Scaled(Call):
        def forward(self, x):
            return x * function(self.weight)

    bio = capture(Scaled(None))
    operations = {n: operation(n, bio) for n in bio.graph.nodes if n.op.startswith("call_")}
    (product,) = [n for n, found in operations.items() if found.is_product]
    assert held_parameter(product.args[1], bio, operations) == ("weight" if held else None)
    assert held_parameter(product.args[0], bio, operations) is None
    assert held_parameter(2.0, bio, operations) is None


def test_every_name_in_the_tables_is_that_of_something():
    """Each key belongs to an operator, a method, an attribute or a module of PyTorch."""
    names = {*dir(torch), *dir(torch.Tensor), *dir(F), *dir(torch.special), *dir(torch.nn), *dir(inspect.builtins)}
    names |= {"shape", "values", "truediv", "floordiv", "getitem"}
    dispatched = {"_to_copy", "_unsafe_view", "alias", "constant_pad_nd", "index", "lift_fresh", "lift_fresh_copy"}
    dispatched |= {"sym_numel", "sym_size", "sym_stride"}
    assert all(hasattr(torch.ops.aten, name) for name in dispatched)
    names |= dispatched
    keys = set()
    for name in names:
        key = name.lower().replace("_", "")
        keys |= {key, key.removesuffix("1d"), key.removesuffix("2d"), key.removesuffix("3d")}
    assert set(_KINDS) <= keys
    assert set(_SIGNS) <= set(_KINDS)


def test_kinds_and_signs_fit_together():
    for key, kind in _KINDS.items():
        if kind in (Kind.LAYOUT, Kind.CONCATENATE, Kind.WINDOW, Kind.MIX):
            assert _SIGNS[key] is Sign.PASSED
        if kind is Kind.NORM:
            assert key not in _SIGNS
