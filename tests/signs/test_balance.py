"""Balanced weights: the two equations of each row, what is kept, and what the network then computes."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.base.randomness import generator
from biofx.signs import net_inputs
from biofx.signs.balance import MEAN_LIMIT, MIN_SYNAPSES, balanced_rows, kept_synapses, row_factors
from models.small import mlp


def signs(rows, *, excitatory, inhibitory, free=0):
    row = torch.tensor([1.0] * excitatory + [-1.0] * inhibitory + [0.0] * free)
    return row.expand(rows, -1)


def rows_of(model, *names):
    return [model.get_parameter(name).detach() for name in names]


def test_two_numbers_give_a_row_its_mean_and_variance():
    """a·x − b·y for correlated x, y of known moments."""
    x, y, xx, yy, xy = (torch.tensor([v], dtype=torch.float64) for v in (2.0, 3.0, 1.0, 4.0, 0.5))
    mean, variance = torch.tensor([0.3], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    a, b = row_factors(x, y, xx, yy, xy, mean, variance)
    torch.testing.assert_close(a * x - b * y, mean)
    torch.testing.assert_close(a**2 * xx - 2 * a * b * xy + b**2 * yy, variance)
    assert a > 0
    assert b > 0


def convolutions():
    layers = (layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(8 * 36, 4))


MEASURED = {
    "convolutions": (convolutions, torch.ones(1, 3, 8, 8)),
    "20 layers": (lambda: mlp(*[32] * 20, 4), torch.ones(1, 32)),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_products_lose_no_digit_that_balance_needs(kind, monkeypatch):
    """Deviations from the mean over samples are multiplied in single precision; here all is computed in double, too."""
    build, x = MEASURED[kind]
    torch.manual_seed(0)
    model = build()
    found = biofx.fold(biofx.transform(model, "dales-principle", example_inputs=(x,))).state_dict()
    monkeypatch.setattr(net_inputs, "_PRODUCTS", {})
    expected = biofx.fold(biofx.transform(model, "dales-principle", example_inputs=(x,))).state_dict()
    assert any(not torch.equal(found[name], value) for name, value in expected.items())  # rounding shows
    for name, value in expected.items():
        assert torch.dist(found[name], value) <= 1e-5 * value.norm(), name


def test_a_mean_that_is_too_large_for_its_variance_is_cut():
    """With b = 0 the mean is at most x·√(variance/xx)."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, b = row_factors(2 * one, one, one, one, zero, 100 * one, one)
    torch.testing.assert_close(a * 2 - b, torch.tensor([MEAN_LIMIT * 2], dtype=torch.float64))


def test_rows_keep_their_sum_and_their_energy():
    weight = torch.randn(50, 200, dtype=torch.float64)
    weight -= 0.9 * weight.mean(1, keepdim=True)  # a large sum would be cut
    sign = signs(50, excitatory=160, inhibitory=40)
    new = balanced_rows(weight, sign, 0.1, generator(0, "x"))
    torch.testing.assert_close(new.sum(1), weight.sum(1))
    torch.testing.assert_close(new.square().sum(1), weight.square().sum(1))
    assert (new * sign >= 0).all()


@pytest.mark.parametrize(
    ("density", "excitatory", "inhibitory"), [(0.1, 16, MIN_SYNAPSES), (0.5, 80, 20), (1.0, 160, 40)]
)
def test_each_row_keeps_enough_of_each_sign_to_balance(density, excitatory, inhibitory):
    sign = signs(7, excitatory=160, inhibitory=40)
    mask = kept_synapses(sign, density, generator(0, "x"))
    assert (mask & (sign > 0)).sum(1).tolist() == [excitatory] * 7
    assert (mask & (sign < 0)).sum(1).tolist() == [inhibitory] * 7


def test_all_that_there_is_is_kept_if_it_is_less():
    assert kept_synapses(signs(3, excitatory=4, inhibitory=2), 0.1, generator(0, "x")).all()


def test_free_weights_stay():
    weight = torch.randn(5, 60)
    sign = signs(5, excitatory=40, inhibitory=10, free=10)
    assert torch.equal(balanced_rows(weight, sign, 0.1, generator(0, "x"))[:, -10:], weight[:, -10:])


def test_a_row_with_inputs_of_one_sign_stays_dense_and_shrinks():
    """Its inputs do not cancel: E[z²] is what it is for weights of random signs, Σw²·E[h²], with E[h²] = 1/2 here."""
    weight = torch.randn(5, 9, dtype=torch.float64)
    new = balanced_rows(weight, -torch.ones(5, 9), 0.1, generator(0, "x"))
    assert (new < 0).all()
    h = torch.randn(200_000, 9, generator=generator(0, "h"), dtype=torch.float64).relu()
    torch.testing.assert_close((h @ new.T).square().mean(0), weight.square().sum(1) / 2, rtol=0.02, atol=0)


def moments(model, name, x):
    """Mean and variance across the batch of what a submodule returns."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0].mean(0), seen[0].var(0)


def test_every_net_input_keeps_its_mean_and_variance():
    """… on normal inputs, here other ones than those of the transform; seen at the activations."""
    torch.manual_seed(3)
    model = mlp(50, 100, 100, 100, 10).double()
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    x = torch.randn(20_000, 50, dtype=torch.float64)
    for name in ("3", "5"):
        (mean, variance), (expected_mean, expected_variance) = moments(bio, name, x), moments(model, name, x)
        deviation = expected_variance.sqrt()
        assert ((mean - expected_mean).abs() < 0.4 * deviation).all()
        assert float((variance / expected_variance).log().abs().mean().exp()) < 1.2


def test_a_convolution_that_is_applied_again_is_balanced_by_rows():
    class Again(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = torch.nn.Conv2d(2, 20, 1), torch.nn.Conv2d(20, 20, 3, padding=1)

        def forward(self, x):
            x = self.first(x).relu()
            for _ in range(2):
                x = self.again(x).relu()
            return x

    x = torch.randn(2, 2, 6, 6)
    bio = biofx.transform(Again(), [passes.DalesPrinciple()], example_inputs=x)
    assert biofx.verify(bio)["again.weight"].kind == "obeys"
    assert torch.isfinite(bio(x)).all()


def test_synapses_keep_their_shares():
    """A split weight and a plain one compute the same after the same signs."""
    x = torch.randn(5, 4)
    whole = mlp(4, 30, 30, 3)
    one = biofx.transform(whole, [passes.DalesPrinciple()])
    several = biofx.transform(whole, [passes.DalesPrinciple(), passes.SplitSynapses(synapses=3)])
    torch.testing.assert_close(several(x), one(x))
    assert biofx.weight_sites(several)["2.weight"].synapses == 3


def test_balance_depends_on_the_seed_alone():
    model = mlp(4, 30, 30, 3)
    state = torch.get_rng_state()
    first, second, third = (biofx.transform(model, [passes.DalesPrinciple()], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    (a,), (b,), (c,) = (rows_of(bio, "2.weight") for bio in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_moves_into_a_bias_that_others_share_is_left_out():
    class SharedBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = SharedBias()
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    assert torch.equal(bio.a.bias, model.a.bias)


def zeros(weight):
    weight.zero_()


def one_dead_row(weight):
    weight[3] = 0


def nine_in_ten_pruned(weight):
    weight.mul_(torch.rand_like(weight) < 0.1)


@pytest.mark.parametrize("constraint", ["project", "abs", "softplus"])
@pytest.mark.parametrize("damage", [zeros, one_dead_row, nine_in_ten_pruned])
def test_weights_of_zero_stay_finite(damage, constraint):
    model = mlp(8, 64, 64, 4)
    with torch.no_grad():
        damage(model[2].weight)
    bio = biofx.transform(model, [passes.DalesPrinciple(constraint=constraint)])
    assert torch.isfinite(bio(torch.randn(4, 8))).all()


def test_so_do_weights_that_read_what_never_varies():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), *mlp(16, 16, 16, 4))
    nn.init.zeros_(model[1].weight)
    nn.init.ones_(model[1].bias)
    bio = biofx.transform(model, [passes.DalesPrinciple(inputs="mixed")])
    assert torch.isfinite(bio(torch.randn(4, 8))).all()


def test_a_forward_that_casts_to_a_dtype_of_its_own():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)).to(torch.float32))

    biofx.verify(biofx.transform(Casts(), [passes.DalesPrinciple()], example_inputs=torch.randn(2, 8)))


def test_an_excluded_bias_stays():
    model = mlp(8, 16, 16, 4)
    bio = biofx.transform(model, [passes.DalesPrinciple()], exclude="*.bias")
    assert torch.equal(bio.get_parameter("2.bias"), model[2].bias)
