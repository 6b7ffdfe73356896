"""Rejuvenate: which synapses are replaced, by what, and what the optimizer forgets."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn

import biofx
from biofx import passes
from biofx.base import noise
from biofx.passes.rejuvenate import RULES, turn_over_
from biofx.training import blocks

W = torch.randn(400, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3


def turned_over(rule, weight, dre, seed=0):
    """Where synapses of a weight are replaced, and the new weight."""
    new, purpose = weight.clone(), noise.Counter(torch.tensor(seed), torch.tensor(0), ("which",))
    pairs = noise.pairs([weight], [purpose])
    normal = noise.normal([weight], [noise.Counter(purpose.seed, purpose.steps, ("new",))])
    scales, *numbers = RULES[rule].numbers([*RULES[rule].statistics.of_parts([weight])], [weight.numel()], dre)
    return turn_over_(RULES[rule], pairs, normal, [weight], [new], scales, *numbers)[0].bool(), new


def probability(rule, weight, dre):
    if rule == "exponential":
        return torch.exp(-dre * weight.abs() / weight.std(correction=0))
    return torch.erfc(weight.abs() * dre / (weight.abs().max() * math.sqrt(2)))


@pytest.mark.parametrize(
    ("rule", "dre"), [("exponential", 2.0), ("exponential", 8.0), ("threshold", 5.0), ("threshold", 14.0)]
)
def test_the_observed_rate_is_the_probability(rule, dre):
    """In bins of the weight's size, within five standard errors."""
    mask, expected_for_each = turned_over(rule, W, dre)[0], probability(rule, W, dre)
    for low, high in ((0.0, 0.05), (0.05, 0.1), (0.1, 0.3), (0.3, 1.0)):
        chosen = (W.abs() >= low) & (W.abs() < high)
        expected = expected_for_each[chosen].mean()
        error = 5 * math.sqrt(expected * (1 - expected) / chosen.sum())
        assert abs(mask[chosen].double().mean() - expected) < error + 1e-9


def test_new_lognormal_weights():
    """Mean and deviation, the whole distribution, and signs, none of which depends on the weight that was there."""
    mask, weight = turned_over("exponential", W, 0.5)
    new, old = weight[mask], W[mask]
    mean, deviation = W.abs().mean(), W.abs().std(correction=0)
    assert len(new) > 100_000
    assert abs(new.abs().mean() - mean) < 5 * deviation / math.sqrt(len(new))
    torch.testing.assert_close(new.abs().std(), deviation, rtol=0.03, atol=0)
    shape = math.sqrt(math.log1p(float(deviation / mean) ** 2))
    distribution = stats.lognorm(shape, scale=float(mean) * math.exp(-(shape**2) / 2))
    assert stats.kstest(new.abs()[::10].numpy(), distribution.cdf).pvalue > 1e-3
    assert abs((new > 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(new))
    for a, b in ((new.abs(), new.sign()), (new.abs(), old.abs()), (new.sign(), old.sign()), (new.sign(), old.abs())):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(new))


def test_new_uniform_weights():
    mask, weight = turned_over("threshold", W, 1.0)
    new, largest = weight[mask], float(W.abs().max())
    assert len(new) > 100_000
    assert stats.kstest(new[::10].numpy(), stats.uniform(-largest, 2 * largest).cdf).pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([new, W[mask]]))[0, 1]) < 5 / math.sqrt(len(new))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("dre", [0.1, 1.0])
def test_equal_weights_have_no_spread(rule, value, dre):
    """Under the exponential rule; weights of zeros are left by both."""
    mask, new = turned_over(rule, torch.full((1000, 1000), value), dre)
    assert bool(mask.any()) is (rule == "threshold" and value != 0)
    assert torch.isfinite(new).all()
    assert torch.equal(new[~mask], torch.full_like(new, value)[~mask])


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


@pytest.mark.parametrize("rule", RULES)
def test_turnover_does_not_depend_on_how_a_weight_is_cut(rule, monkeypatch):
    results = []
    for size in (1 << 18, 500):
        monkeypatch.setattr(blocks, "CPU", size)
        bio, optimizer = attached([passes.Rejuvenate(rule=rule, dre=4.0)], torch.optim.Adam, lr=0.01)
        for _ in range(3):
            step(bio, optimizer)
        state = optimizer.state[bio.weight]
        results.append([bio.weight, bio.weight_synapses.replaced, state["exp_avg"], state["exp_avg_sq"]])
    assert results[0][1] > 300
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_steps_and_weights_turn_over_independently():
    bio = biofx.transform(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)), [passes.Rejuvenate(dre=1.0)])
    with torch.no_grad():
        bio[1].weight.copy_(bio[0].weight)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    start, masks = bio[0].weight.detach().clone(), []
    for _ in range(2):
        with torch.no_grad():
            for layer in bio:
                layer.weight.copy_(start)
        optimizer.zero_grad()
        bio(torch.ones(2, 60)).sum().backward()
        optimizer.step()
        masks += [layer.weight != start for layer in bio]
    rates = [mask.double().mean() for mask in masks]
    expected = torch.exp(-start.abs() / start.std(correction=0)).square().mean()
    for i, j in itertools.combinations(range(4), 2):
        both = (masks[i] & masks[j]).double().mean()
        assert abs(both - expected) < 5 * math.sqrt(expected / start.numel()) < (min(rates) - expected) / 2


def test_no_token_stays_none():
    bio = biofx.transform(nn.Sequential(nn.Embedding(50, 8, padding_idx=3), nn.Linear(8, 2)), [passes.Rejuvenate(1e-3)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    bio(torch.arange(50)).sum().backward()
    optimizer.step()
    assert not bio[0].weight[3].any()
    assert 0.9 * 49 * 8 < int(bio[0].weight_synapses.replaced) <= 49 * 8


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
def test_excitation_and_inhibition_keep_their_totals(rule):
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


def test_weights_of_several_dtypes_turn_over_in_one_step():
    bio = biofx.transform(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), [passes.Rejuvenate(dre=0.1)])
    bio[1].double()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    for parameter in bio.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(int(bio[layer].weight_synapses.replaced) > 0 for layer in (0, 1))
