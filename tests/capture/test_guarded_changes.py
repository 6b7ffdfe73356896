"""Changes that a graph could miss: what a trace took as fixed, and what may be another thing in the next call."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import biofx

X = torch.randn(4, 3, dtype=torch.float64)
SCALE, ACTIVATION = 2.0, torch.relu


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3, dtype=torch.float64)


def pair(cls, frontend, *inputs):
    model = cls()
    return model, biofx.transform(model, "split-synapses", example_inputs=inputs or (X,), frontend=frontend)


class WithoutBias(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.register_buffer("mask", None)

    def forward(self, x):
        y = self.head(self.fc(x))
        return y if self.mask is None else y * self.mask


class Listing(Model):
    def __init__(self):
        super().__init__()
        self.more, self.settings = nn.ModuleList(), nn.Module()
        self.settings.scale = 2.0

    def forward(self, x):
        for layer in self.more:
            x = layer(x)
        return self.fc(x) * self.settings.scale
