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
    found = {name.removeprefix(f"{__name__}.") for name in reads([cls()])}
    return {name for name in found if not name.startswith(f"{cls.__qualname__}.")}  # its own methods and attributes


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
    found = {name: variable for name, variable in found.items() if not name.endswith(".forward")}
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


def test_code_inside_of_a_function_is_read():
    class Model(nn.Module):
        def forward(self, x):
            return sum([x * RATE for _ in range(2)]) + (lambda: LEVELS["low"][0])()

    assert {"RATE", "LEVELS"} <= names(Model)


def test_attributes_and_methods_of_a_class_are_read():
    class Model(nn.Module):
        factor = 2.0

        def forward(self, x):
            return self.scaled(x)

        def scaled(self, x):
            return x * self.factor

    prefix = f"{__name__}.{Model.__qualname__}."
    found = reads([Model()])
    assert {name.removeprefix(prefix) for name in found if name.startswith(prefix)} == {"factor", "forward", "scaled"}
    Model.factor = 3.0
    assert found[f"{prefix}factor"]() == 3.0
