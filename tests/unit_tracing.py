"""What the tests of the unit analysis share: small networks around a function, and what their weights read."""

import torch
from torch import nn

import biofx


class Net(nn.Module):
    """Children by name, and what forward does with them."""

    def __init__(self, compute, **children):
        super().__init__()
        self.compute = compute
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.compute(self, x)


class Net2(Net):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.compute(self, x, y)


def analysed(compute, *inputs, **children):
    return biofx.units((Net if len(inputs) < 2 else Net2)(compute, **children), inputs)


def feeds(found, weight):
    """Where each position of a weight comes from: the name of a population and the number of the unit in it."""
    result = []
    for number in found.readings[weight].numbers.tolist():
        index = int(found.owner[number])
        assert number in found.members(index)
        result.append((found.populations[index].name, found.members(index).tolist().index(number)))
    return result


def run(name, *units, times=1):
    """Units of one population in a row, each repeated `times` times."""
    return [(name, unit) for unit in units for _ in range(times)]


def origin(found, name):
    (population,) = [p for p in found.populations if p.name == name]
    return population.origin, population.size


def through(function, positions=6):
    """What a second weight reads behind something that is done to the output of the first, shape (2, 5, 6)."""
    return feeds(behind(function, torch.randn(2, 5, 4), nn.Linear(4, 6), nn.Linear(positions, 3)), "b.weight")


def behind(function, x, a, b):
    if isinstance(function, nn.Module):
        return analysed(lambda m, x: m.b(m.function(m.a(x))), x, a=a, b=b, function=function)
    return analysed(lambda m, x: m.b(function(m.a(x))), x, a=a, b=b)
