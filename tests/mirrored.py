"""What the tests of mirrored units share."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

import biofx
from biofx import passes
from conftest import tensors
from models.architectures import ARCHITECTURES


def mirror(model, *x, **options):
    """The transformed model, with the check that it computes what it did."""
    bio = biofx.transform(model, [passes.MirrorUnits()], example_inputs=x or None, **options)
    for a, b in zip(tensors(bio(*x)), tensors(model(*x)), strict=True) if x else ():
        torch.testing.assert_close(a, b)
    return bio


def doubled(bio, model):
    """The weights whose units are doubled."""
    sites, original = biofx.weight_sites(bio), dict(model.named_parameters())
    axes = {name: site.postsynaptic_axis for name, site in sites.items()}
    return {n for n, a in axes.items() if a is not None and sites[n].raw.shape[a] == 2 * original[n].shape[a]}


def assert_one_sign(bio, *x):
    """Every unit has outgoing weights of one sign, by an analysis of the folded model, which knows of no signs."""
    units = biofx.units(biofx.fold(bio), x)
    signs = {}
    for name, site in biofx.weight_sites(bio).items():
        if site.sign is None:
            continue
        constrained = site.outgoing(site.sign.expand(site.shape))[:, 0] != 0
        outgoing = site.outgoing(units.sites[name].effective().detach())
        for unit, weights in zip(
            units.readings[name].numbers[constrained].tolist(), outgoing[constrained], strict=True
        ):
            signs.setdefault(unit, set()).update(weights.sign().unique().tolist())
    assert signs
    assert all({1.0, -1.0} - found for found in signs.values())


def double(build):
    """A model in evaluation mode with inputs, in float64, with norms that have seen something."""
    make, inputs = ARCHITECTURES[build]
    model, x = make().double(), inputs()
    x = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, x)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval(), x


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.norm, self.gamma = nn.LayerNorm(6), nn.Parameter(torch.rand(6))
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.gamma * self.fc(self.norm(x))
        return self.out(x[:, 0])
