"""Recurrent weights with signs: eigenvalues and singular values, what the network then does, and special weights."""

import math

import pytest
import torch

from biofx.base.randomness import generator
from biofx.signs.spectrum import MIN_SYNAPSES, MIN_UNITS, balanced_recurrent, singular_entropy, spectral_radius

KINDS = {
    "uniform": lambda n, draw: (2 * torch.rand(n, n, generator=draw, dtype=torch.float64) - 1) / math.sqrt(n),
    "normal": lambda n, draw: torch.randn(n, n, generator=draw, dtype=torch.float64) / math.sqrt(n),
    "orthogonal": lambda n, draw: torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0],
}
ENTROPY = {"uniform": 0.015, "normal": 0.015, "orthogonal": 0.06}  # largest change of the entropy
GAP = 1.25  # largest eigenvalue by the third largest: the first two may be a conjugate pair
EVERY = [(kind, n, excitatory) for kind in KINDS for n in (64, 128) for excitatory in (0.5, 0.8)]


def free(kind, n, seed=0):
    return KINDS[kind](n, generator(seed, "weight"))


def signs(n, excitatory):
    sign = torch.full((n,), -1.0, dtype=torch.float64)
    sign[torch.randperm(n, generator=generator(0, "sign"))[: round(excitatory * n)]] = 1.0
    return sign


def balanced(weight, sign, density=0.1):
    return balanced_recurrent(weight, sign, density, generator(0, "density"))


def gap(weight):
    values = torch.linalg.eigvals(weight).abs().sort(descending=True)[0]
    return float(values[0] / values[2])


def change(new, old):
    return abs(singular_entropy(new) - singular_entropy(old))


def test_the_radius_is_the_largest_magnitude_of_an_eigenvalue():
    turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])  # eigenvalues ±i/2
    assert spectral_radius(turn) == pytest.approx(0.5)
    assert spectral_radius(torch.tensor([[0.3, 9.0], [0.0, -0.7]])) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("weight", "entropy"),
    [
        (torch.eye(5), 1.0),
        (torch.ones(5, 5), 0.0),
        (torch.diag(torch.tensor([1.0, -3.0])), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)),
        (torch.tensor([[-2.0]]), 1.0),
        (torch.zeros(3, 3), 0.0),
    ],
)
def test_entropy_is_that_of_the_shares_of_the_singular_values(weight, entropy):
    assert singular_entropy(weight) == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize(("kind", "n", "excitatory"), EVERY)
def test_the_spectrum_is_kept(kind, n, excitatory):
    old, sign = free(kind, n), signs(n, excitatory)
    new = balanced(old, sign)
    assert (new * sign >= 0).all()
    torch.testing.assert_close(new.sum(1), torch.zeros(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert spectral_radius(new) == pytest.approx(spectral_radius(old), rel=1e-9)
    assert gap(new) < GAP
    assert change(new, old) < ENTROPY[kind]
    assert float(new.norm() / old.norm()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(("kind", "n", "excitatory"), EVERY)
def test_naive_signs_do_not_keep_it(kind, n, excitatory):
    old, sign = free(kind, n), signs(n, excitatory)
    naive = old.abs() * sign
    assert spectral_radius(naive) != pytest.approx(spectral_radius(old), rel=0.05)
    assert change(naive, old) > 1.4 * ENTROPY[kind]
    if excitatory == 0.8:
        assert gap(naive) > 3 * GAP


@pytest.mark.parametrize("kind", KINDS)
def test_denser_rows_have_no_such_entropy(kind):
    """One singular value stands out, because all rows read through the same signs; and columns differ in energy."""
    old, sign = free(kind, 64), signs(64, 0.8)
    assert change(balanced(old, sign, 1.0), old) > change(balanced(old, sign), old) + 0.03


def test_rows_keep_their_energies_relative_to_each_other():
    old = free("normal", 64) * torch.linspace(0.5, 2, 64)[:, None]
    ratio = balanced(old, signs(64, 0.8)).norm(dim=1) / old.norm(dim=1)
    torch.testing.assert_close(ratio, ratio[:1].expand(64))


@pytest.mark.parametrize(
    ("density", "excitatory", "inhibitory"),
    [(0.01, MIN_SYNAPSES, 8), (0.1, 2, 8), (0.2, 4, 16), (0.5, 10, 20), (1.0, 20, 20)],
)
def test_rows_keep_a_fraction_of_each_sign_of_the_others_number(density, excitatory, inhibitory):
    sign = signs(100, 0.8)
    new = balanced(free("uniform", 100), sign, density)
    assert (new > 0).sum(1).tolist() == [excitatory] * 100
    assert (new < 0).sum(1).tolist() == [inhibitory] * 100


def test_columns_have_similar_numbers_of_synapses_and_energy():
    sign = signs(200, 0.8)
    new = balanced(free("normal", 200), sign, 0.1)
    for own in (sign > 0, sign < 0):
        counts = (new != 0).sum(0)[own].double()
        assert counts.std() < 0.4 * counts.mean().sqrt()  # of columns drawn independently: √mean
    energy = new.square().sum(0)
    assert float(energy[sign > 0].mean() / energy[sign < 0].mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_one_sign_becomes_nearly_a_permutation(kind):
    old = free(kind, 64)
    new = balanced(old, -torch.ones(64))
    assert (new <= 0).all()
    assert ((new != 0).sum(1) == 1).all()
    assert (new != 0).any(0).sum() >= 60
    assert spectral_radius(new) == pytest.approx(spectral_radius(old), rel=1e-9)
    assert singular_entropy(new) > 0.97 > singular_entropy(old.abs()) + 0.05


@pytest.mark.parametrize("n", [1, 2, 3, MIN_UNITS - 1])
def test_a_few_units_keep_all_their_synapses(n):
    old, sign = free("uniform", n, seed=1), signs(n, 0.5)
    new = balanced(old, sign)
    assert (new * sign > 0).all()
    assert spectral_radius(new) == pytest.approx(spectral_radius(old), rel=1e-9)


def test_the_identity_keeps_its_synapses():
    sign = signs(64, 0.8)
    torch.testing.assert_close(balanced(torch.eye(64, dtype=torch.float64), sign), torch.diag(sign))


def test_a_synapse_with_most_of_the_energy_of_its_row_is_kept():
    old = torch.eye(64, dtype=torch.float64) + 0.01 * free("normal", 64)
    assert (balanced(old, signs(64, 0.8)).diagonal().abs() > 0.3).all()


def test_what_is_not_there_stays_away():
    old = free("normal", 128) * (torch.rand(128, 128, generator=generator(0, "there")) < 0.2)
    new = balanced(old, signs(128, 0.8), 0.5)
    assert (new[old == 0] == 0).all()
    assert change(new, old) < 0.03


ALTERNATING = torch.tensor([1.0, -1.0] * 4)
WITHOUT_RADIUS = {
    "zero": torch.zeros(9, 9),
    "chain": torch.ones(8).diag(-1),
    "nilpotent": torch.ones(8).outer(ALTERNATING),
}


@pytest.mark.parametrize("name", WITHOUT_RADIUS)
def test_without_a_radius_rows_keep_their_energy(name):
    old = WITHOUT_RADIUS[name]
    torch.testing.assert_close(balanced(old, signs(len(old), 0.5)).norm(dim=1), old.norm(dim=1))


def test_free_columns_stay_and_the_others_keep_the_radius():
    old, sign = free("normal", 64), signs(64, 0.8)
    sign[:9] = 0
    new = balanced(old, sign)
    assert torch.equal(new[:, :9], old[:, :9])
    assert spectral_radius(new[9:, 9:]) == pytest.approx(spectral_radius(old[9:, 9:]), rel=1e-9)


def test_the_generator_decides_and_the_weight_keeps_its_dtype():
    old, sign = free("normal", 32).float(), signs(32, 0.8).float()
    before = old.clone()
    one, two, other = (balanced_recurrent(old, sign, 0.1, generator(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(old, before)
    assert one.dtype == torch.float32


def run(weight, h, steps, draw):
    """Activity of ReLU units after each step, driven by normal noise."""
    seen = []
    for _ in range(steps):
        h = torch.relu(h @ weight.T + torch.randn(h.shape, generator=draw, dtype=torch.float64))
        seen.append(h)
    return torch.stack(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_activity_neither_explodes_nor_dies(kind):
    old, sign = free(kind, 64), signs(64, 0.8)
    before, after, naive = (
        run(w, torch.zeros(16, 64, dtype=torch.float64), 200, generator(0, "noise")).std((0, 1)).mean()
        for w in (old, balanced(old, sign), old.abs() * sign)
    )
    assert float(after / before) == pytest.approx(1, abs=0.25)
    assert naive > 1e6 * before


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_grow_by_no_more_per_step(kind):
    """Over ten steps, per step, by no more than a fifth; those of free networks of this size differ by a tenth."""

    def growth(weight):
        draw = generator(0, "noise")
        h = run(weight, torch.zeros(32, 64, dtype=torch.float64), 20, draw)[-1].requires_grad_()
        last = run(weight, h, 10, draw)[-1]
        gradient = torch.autograd.grad((last * torch.randn(last.shape, generator=draw, dtype=torch.float64)).sum(), h)
        return gradient[0].norm() ** 0.1

    sign = signs(64, 0.8)
    olds = [free(kind, 64, seed) for seed in range(4)]
    before = torch.stack([growth(old) for old in olds]).mean()
    after = torch.stack([growth(balanced(old, sign)) for old in olds]).mean()
    assert 1 / 1.2 < after / before < 1.2
    assert growth(olds[0].abs() * sign) > 4 * before
