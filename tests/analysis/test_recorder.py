"""Recording: the run leaves everything as it was, and sees through scripted modules and branches."""

import random

import numpy
import torch
from torch import nn

import biofx
from biofx.analysis.recorder import record
from biofx.trial import Draws


class Everything(nn.Module):
    """Changes whatever a forward can reach."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(x)
        self.fc.weight.data.mul_(2)
        self.fc.bias.add_(1)
        self.norm.train()
        with torch.enable_grad():
            self.fc(x).sum().backward()
        return self.norm(self.fc(x)) * random.random() * numpy.random.random() + torch.rand(3)


def test_a_recorded_run_leaves_everything_as_it_was():
    model, x = Everything(), torch.randn(4, 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, generator, gradients = Draws.now(), torch.get_rng_state(), torch.is_grad_enabled()
    operations = record(model, lambda m: m(x)).operations
    assert {"mul", "native_batch_norm", "rand"} <= {operation.name for operation in operations}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.calls, model.log, model.norm.training) == (0, [], True)
    assert (Draws.now(), torch.is_grad_enabled()) == (drawn, gradients)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model._forward_pre_hooks


def test_a_scripted_model_is_recorded_by_the_operators_that_it_calls():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    x = torch.randn(2, 3)
    names = [operation.name for operation in record(model, lambda m: m(x)).operations]
    assert [name for name in names if name in ("addmm", "relu", "native_batch_norm")] == [
        "addmm",
        "relu",
        "native_batch_norm",
        "addmm",
    ]
    found = biofx.units(nn.Sequential(model, nn.Linear(2, 2)), x)
    assert list(found.readings) == ["0.0.weight", "0.3.weight", "1.weight"]


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.a(x).relu()
        return self.c(torch.cond(y.sum() > -1, lambda y: self.b(y).relu(), torch.cos, (y,)))


def test_the_branch_that_a_conditional_takes_is_recorded_and_named_as_a_decision():
    found = biofx.units(Chooses(), torch.randn(2, 4))
    assert [site.operator for site in found.sites.values()] == ["linear"] * 3
    assert [set(found.owner[r.numbers.flatten()].tolist()) for r in found.readings.values()] == [{1}, {2}, {3}]
    assert "cond (test_recorder" in found.notes[0]
