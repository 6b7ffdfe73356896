"""Variables outside of a model: which its forward reads."""

import functools
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from biofx.capture.outside_variables import reads

RATE, UNUSED = 0.5, 1.0
LEVELS = {"low": [1, 2]}
OPTIONS = SimpleNamespace(power=2, other=3)
TENSOR = torch.ones(3)


class Settings:
    scale = 1.0
    other = 2.0


def helper(x):
    return x * RATE


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


def names(cls):
    return {name.removeprefix(f"{__name__}.") for name in reads([cls()])}


def test_plain_values_and_what_functions_read():
    class Model(nn.Module):
        def forward(self, x):
            return F.relu(helper(x)) * math.pi + len(LEVELS) + TENSOR

    assert names(Model) == {"helper", "RATE", "LEVELS", "TENSOR"}


def test_attributes_that_are_named():
    class Model(nn.Module):
        def forward(self, x):
            return x**OPTIONS.power * Settings.scale

    assert names(Model) == {"OPTIONS.power", "Settings.scale"}


def test_methods_properties_and_decorators():
    class Model(nn.Module):
        @property
        def rate(self):
            return RATE

        @staticmethod
        def power():
            return OPTIONS.power

        @decorated
        def forward(self, x):
            return x * LEVELS["low"][0]

    assert {"RATE", "OPTIONS.power", "LEVELS"} <= names(Model)


def test_variables_of_functions_around_a_class():
    rate, levels = 1.0, [1]

    class Model(nn.Module):
        def forward(self, x):
            return x * rate + levels[0]

    found = reads([Model()])
    before = {name: variable() for name, variable in found.items()}
    assert before == {f"{__name__}.rate": 1.0, f"{__name__}.levels": [1]}
    rate = 2.0
    levels.append(2)
    assert {name: variable() for name, variable in found.items()} == {
        f"{__name__}.rate": rate,
        f"{__name__}.levels": [1, 2],
    }


def test_layers_of_pytorch_read_nothing():
    assert reads(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).modules()) == {}
