"""Rejuvenate: which synapses are replaced, by what, and what the optimizer forgets."""

import math

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.passes.rejuvenate import (
    choose_by_threshold,
    choose_exponentially,
    draw_lognormal,
    draw_uniform,
    turnover_probability,
)

W = torch.randn(400, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_probability():
    w = torch.tensor([0.0, 1.0, -2.0]).double()
    deviation = w.std(correction=0)
    torch.testing.assert_close(turnover_probability(w, 4.0), torch.exp(-4 * w.abs() / deviation))
    assert not turnover_probability(torch.zeros(5), 4.0).any()
    assert not turnover_probability(torch.ones(5), 4.0).any()


@pytest.mark.parametrize("dre", [2.0, 8.0])
def test_the_observed_rate_is_the_probability(dre):
    """In bins of the weight's size, within five standard errors."""
    mask, probability = choose_exponentially(W, dre, generator()), turnover_probability(W, dre)
    for low, high in ((0.0, 0.05), (0.05, 0.1), (0.1, 0.3), (0.3, 1.0)):
        chosen = (W.abs() >= low) & (W.abs() < high)
        expected = probability[chosen].mean()
        error = 5 * math.sqrt(expected * (1 - expected) / chosen.sum())
        assert abs(mask[chosen].double().mean() - expected) < error + 1e-9


def test_the_observed_rate_of_the_threshold_rule():
    """P(|N(0, M/dre)| > |w|) = erfc(|w|·dre/(M·√2)), within five standard errors."""
    mask = choose_by_threshold(W, 14.0, generator())
    probability = torch.erfc(W.abs() * 14.0 / (W.abs().max() * math.sqrt(2)))
    for low, high in ((0.0, 0.05), (0.05, 0.1), (0.1, 0.3)):
        chosen = (W.abs() >= low) & (W.abs() < high)
        expected = probability[chosen].mean()
        error = 5 * math.sqrt(expected * (1 - expected) / chosen.sum())
        assert abs(mask[chosen].double().mean() - expected) < error + 1e-9


def test_the_moments_of_new_lognormal_weights():
    new = draw_lognormal(W, 200_000, generator()).double()
    mean, deviation = W.abs().mean(), W.abs().std(correction=0)
    assert abs(new.abs().mean() - mean) < 5 * deviation / math.sqrt(len(new))
    torch.testing.assert_close(new.std(correction=0), (mean**2 + deviation**2).sqrt(), rtol=0.02, atol=0)
    assert abs((new > 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(new))


def test_new_uniform_weights():
    new = draw_uniform(W, 200_000, generator()).double()
    largest = W.abs().max()
    assert new.abs().max() <= largest
    torch.testing.assert_close(new.std(), largest / math.sqrt(3), rtol=0.01, atol=0)


def attached(pipeline, optimizer, dtype=torch.float32, **options):
    torch.manual_seed(0)
    bio = biofx.transform(nn.Linear(60, 40).to(dtype), pipeline)
    held = optimizer(bio.parameters(), **options)
    biofx.attach(bio, held)
    return bio, held


def step(bio, optimizer):
    optimizer.zero_grad()
    bio(torch.ones(2, 60, dtype=bio.weight.dtype)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("rule", ["exponential", "threshold"])
def test_only_replaced_entries_change_and_they_are_counted(rule):
    bio, optimizer = attached([passes.Rejuvenate(rule=rule, dre=5.0)], torch.optim.SGD, lr=0.0)
    before = bio.weight.detach().clone()
    step(bio, optimizer)
    changed = bio.weight != before
    assert 0 < changed.sum() < changed.numel() / 2
    assert int(bio.weight_synapses.replaced) == int(changed.sum())
    assert before.abs()[changed].mean() < before.abs()[~changed].mean()


OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.5}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_forgets_replaced_synapses_only(name):
    optimizer_class, options = OPTIMIZERS[name]
    bio, optimizer = attached([passes.Rejuvenate(every=3)], optimizer_class, **options)
    plain, plain_optimizer = attached([passes.Rejuvenate(every=100)], optimizer_class, **options)
    for _ in range(3):
        step(bio, optimizer)
        step(plain, plain_optimizer)
    replaced = bio.weight != plain.weight
    assert replaced.any()
    compared = 0
    for key, expected in plain_optimizer.state[plain.weight].items():
        if expected.shape == replaced.shape:
            given = optimizer.state[bio.weight][key]
            assert torch.equal(given[~replaced], expected[~replaced])
            assert (given[replaced] == (0.5 if key == "sum" else 0.0)).all()
            compared += 1
    assert compared == {"momentum": 1, "adam": 3, "rmsprop": 3, "adagrad": 1}[name]


def test_every():
    bio, optimizer = attached([passes.Rejuvenate(every=4)], torch.optim.SGD, lr=0.0)
    counts = []
    for _ in range(9):
        step(bio, optimizer)
        counts.append(int(bio.weight_synapses.replaced))
    assert [i + 1 for i, (a, b) in enumerate(zip([0, *counts], counts, strict=False)) if a != b] == [4, 8]


def test_every_synapse_of_a_split_weight_turns_over_on_its_own():
    bio, optimizer = attached([passes.SplitSynapses(3), passes.Rejuvenate()], torch.optim.SGD, lr=0.0)
    stored = bio.get_parameter("weight")
    before = stored.detach().clone()
    step(bio, optimizer)
    changed = (stored != before).sum(0)
    assert ((changed > 0) & (changed < 3)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    bio, optimizer = attached([passes.Rejuvenate()], torch.optim.SGD, dtype=dtype, lr=0.0)
    before = bio.weight.detach().clone()
    step(bio, optimizer)
    assert bio.weight.dtype is dtype
    assert torch.isfinite(bio.weight).all()
    assert (bio.weight != before).any()


def test_equal_weights_are_left_as_they_are():
    bio, optimizer = attached([passes.Rejuvenate()], torch.optim.SGD, lr=0.0)
    with torch.no_grad():
        bio.weight.fill_(0.25)
    step(bio, optimizer)
    assert (bio.weight == 0.25).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dre": 0}, "dre must be a number > 0, got 0"),
        ({"every": 0}, "every must be an integer ≥ 1, got 0"),
        ({"rule": "random"}, "rule must be one of exponential, threshold, got 'random'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.Rejuvenate(**options)


class Signed(passes.Pass):
    """Gives every presynaptic unit a sign, as Dale's principle does, and the weights with it."""

    name = "signed"
    slot = passes.Slot.SIGN

    def rewrite(self, site, edit):
        sign = torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0).expand(site.shape)
        edit.replace_raw(site.raw.abs() * sign)
        edit.insert(torch.Tensor.copysign, edit.state("sign", sign))


@pytest.mark.parametrize("rule", ["exponential", "threshold"])
def test_new_synapses_keep_the_sign_of_their_unit(rule):
    bio, optimizer = attached([passes.Rejuvenate(rule=rule, dre=3.0), Signed()], torch.optim.SGD, lr=0.0)
    before = bio.weight.detach().clone()
    sign = bio.weight_synapses.sign
    for _ in range(3):
        step(bio, optimizer)
    assert (bio.weight != before).sum() > 100
    assert (bio.weight * sign > 0).all()


@pytest.mark.parametrize("rule", ["exponential", "threshold"])
def test_under_dales_principle_excitation_and_inhibition_keep_their_totals(rule):
    """… so that activity does not explode when turnover fills up what was sparse."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.ReLU(), torch.nn.Linear(50, 30))
    pipeline = [passes.DalesPrinciple(), passes.SplitSynapses(), passes.Rejuvenate(dre=0.1, rule=rule)]
    bio = biofx.transform(model, pipeline)
    site = biofx.weight_sites(bio)["2.weight"]
    with torch.no_grad():
        site.raw.add_(1e-6 * site.sign)  # no synapse is absent

    def totals():
        weight = site.effective().detach()
        return weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1)

    before = totals()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    bio(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert int(site.state("replaced")) > 1000
    torch.testing.assert_close(totals(), before, rtol=1e-4, atol=1e-6)
