"""Scale parameters: inverted together with weights if that changes nothing, and kept from being negative."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(norm, **convolution):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **convolution), norm, nn.ReLU(), nn.Conv2d(6, 10, 3)).eval().double()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            if getattr(norm, name, None) is not None:
                getattr(norm, name).copy_(torch.randn(6))
    assert (norm.weight < 0).any()
    return model


def transformed(model, *others):
    return biofx.transform(model, [passes.DalesPrinciple(inputs="excitatory", balance=False), *others])


@pytest.fixture
def first_layer_of():
    """What the norm makes of the first weight, before that weight gets its signs: the constraint is taken out."""

    def run(bio):
        values = []
        hook = bio.get_submodule("1").register_forward_hook(lambda module, args, output: values.append(output))
        with torch.no_grad():
            bio(X)
        hook.remove()
        return values[0]

    return run


@pytest.mark.parametrize("bias", [True, False])
def test_a_negative_gamma_is_turned_over_and_preserves_the_model(first_layer_of, bias):
    model = network(nn.BatchNorm2d(6), bias=bias)
    with torch.no_grad():  # weights of the right sign after the turn, so that signs change nothing
        model[0].weight.copy_(model[0].weight.abs() * model[1].weight.sign()[:, None, None, None])
    bio = transformed(model)
    torch.testing.assert_close(first_layer_of(bio), first_layer_of(model))
    assert torch.equal(bio.get_parameter("1.weight"), model[1].weight.abs())


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)])
def test_elsewhere_it_stays_and_is_reported(norm):
    model = network(norm)
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    assert torch.equal(bio.get_parameter("1.weight"), model[1].weight)
    assert "1.weight is negative for" in flat(biofx.summary(bio))
    biofx.verify(bio)


def test_what_multiplies_no_unit_with_a_sign_is_left_alone():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.neg_()
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    assert torch.equal(bio.get_parameter("0.weight"), model[0].weight)
    assert "is negative" not in flat(biofx.summary(bio))


def test_an_excluded_one_is_left_alone():
    model = network(nn.BatchNorm2d(6))
    bio = biofx.transform(model, [passes.DalesPrinciple()], exclude="1.weight")
    assert torch.equal(bio.get_parameter("1.weight"), model[1].weight)


def test_a_batch_norm_with_a_shared_weight_is_not_turned_over():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.out = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
            nn.init.constant_(self.norm.weight, -1.0)

        def forward(self, x):
            z = self.first(x)
            return self.out(torch.relu(self.norm(z)) + torch.relu(z))

    model = Both().eval()
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    assert torch.equal(bio.first.weight, model.first.weight)
    assert torch.equal(bio.norm.weight, model.norm.weight)
    assert "norm.weight is negative for 6 units" in flat(biofx.summary(bio))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gamma_is_kept_from_being_negative_at_every_step(optimizer):
    model = nn.Sequential(nn.Linear(3, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 2))
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    held = optimizer(bio.parameters(), lr=0.1)
    biofx.attach(bio, held)
    bio(torch.randn(8, 3)).sum().backward()
    bio.get_parameter("1.weight").grad = torch.full((10,), 100.0)
    held.step()
    biofx.verify(bio)
    assert (bio.get_parameter("1.weight") >= 0).all()


def test_so_it_is_if_an_optimizer_holds_no_weight_with_signs():
    """As where one optimizer has the matrices and another the rest, or where the weights are frozen."""
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    matrices, rest = ([p for p in bio.parameters() if (p.dim() == 2) is is_matrix] for is_matrix in (True, False))
    optimizers = [torch.optim.SGD(matrices, lr=20.0), torch.optim.SGD(rest, lr=20.0)]
    for optimizer in optimizers:
        biofx.attach(bio, optimizer)
    bio.get_parameter("3.weight").requires_grad_(False)
    for _ in range(2):
        bio(torch.randn(16, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    biofx.verify(bio)


def test_a_layer_scale_is_one_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale, self.out = nn.Linear(3, 10), nn.Parameter(torch.ones(10)), nn.Linear(10, 2)

        def forward(self, x):
            return self.out(torch.relu(self.first(x)) * self.scale)

    bio = biofx.transform(Scaled(), [passes.DalesPrinciple()])
    with torch.no_grad():
        bio.scale[2] = -1.0
    with pytest.raises(biofx.VerificationError, match="dales-principle: scale: a scale parameter is negative"):
        biofx.verify(bio)
