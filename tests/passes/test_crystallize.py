"""Crystallize: settled and wild synapses become less plastic."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.passes.crystallize import dampen_, dampened
from biofx.training.compiling import over_blocks
from models.small import mlp


def test_the_formula():
    gain = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0011, 0.0005]).double()
    weight = torch.tensor([1.0, 1.0, 0.0, -2.0, 1.0, 1.0, 1.0]).double()  # mean magnitude 1
    gradient = torch.tensor([1e-6, 0.5, 0.0, 8e-5, -1.5, 0.0, 0.0]).double()
    expected = [
        0.6,  # hardly learns
        1.0,  # learns
        1.0,  # silent and without a gradient: 0 < 0 is false, and nothing is divided by 0
        0.6,  # the threshold is relative to the weight's size
        0.6,  # a gradient beyond the mean weight
        0.001,  # the floor
        0.0005,  # already below it
    ]
    options = {"threshold": 4.5e-5, "dampening": 0.6, "floor": 1e-3}
    mean = weight.abs().mean()
    found = dampened(gain, weight, gradient, mean, **options)
    torch.testing.assert_close(found, torch.tensor(expected).double())
    dampen_([gain], [weight], [gradient], [mean], **options)
    torch.testing.assert_close(gain, found)


def slowly(gain, weight, gradient, threshold, dampening, floor):
    """The formula with comparisons, entry by entry."""
    settled = (gradient.abs() < threshold * weight.abs()) | (gradient.abs() > weight.abs().mean())
    return torch.where(settled, torch.minimum(gain, (gain * dampening).clamp(min=floor)), gain)


@pytest.mark.parametrize("compiled", [False, True])
def test_many_weights_of_any_size_and_layout_at_once(compiled):
    torch.manual_seed(0)
    shapes = [(3,), (700, 800), (2, 3, 5, 5), (1, 1), (64, 64), (40, 3, 3, 3), (2, 30, 40)]
    weights, gradients = ([torch.randn(shape).double() for shape in shapes] for _ in range(2))
    gains = [torch.rand(shape).double() for shape in shapes]
    for tensors in (weights, gradients, gains):
        tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    weights[5] = weights[5].to(memory_format=torch.channels_last)  # the others are not
    options = {"threshold": 0.1, "dampening": 0.6, "floor": 1e-3}
    expected = [slowly(*each, **options) for each in zip(gains, weights, gradients, strict=True)]
    means = [weight.abs().mean() for weight in weights]
    over_blocks(dampened, dampen_, gains, weights, gradients, means, **options, compiled=compiled)
    for given, wanted in zip(gains, expected, strict=True):
        torch.testing.assert_close(given, wanted)


def run(pipeline, steps=1, gradient=1e3, lr=0.0, optimizer=torch.optim.SGD):
    bio = biofx.transform(nn.Linear(3, 2, bias=False), pipeline)
    optimizer = optimizer(bio.parameters(), lr=lr)
    biofx.attach(bio, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (gradient * bio(torch.ones(1, 3))).sum().backward()
        optimizer.step()
    return bio


def test_it_needs_no_other_rule():
    assert torch.equal(
        run([passes.Crystallize(dampening=0.5)], steps=3).weight_synapses.gain, torch.full((2, 3), 0.125)
    )


def test_every():
    bio = run([passes.Crystallize(dampening=0.5, every=3)], steps=8)
    assert torch.equal(bio.weight_synapses.gain, torch.full((2, 3), 0.25))


def test_it_shares_the_gain_of_fuzzy_learning_rates():
    pipeline = [passes.FuzzyLearningRates(), passes.Crystallize(dampening=0.5)]
    bio = biofx.transform(nn.Linear(3, 2), pipeline)
    drawn = biofx.transform(nn.Linear(3, 2), pipeline[:1]).weight_synapses.gain
    assert torch.equal(bio.weight_synapses.gain, drawn)
    assert bio.code.count("scale_grad(") == 1
    assert "crystallize, fuzzy-learning-rates" in biofx.table(bio)
    biofx.verify(run(pipeline, steps=5))


def test_gains_never_fall_below_the_floor():
    bio = run([passes.Crystallize(floor=0.01)], steps=40)
    torch.testing.assert_close(bio.weight_synapses.gain, torch.full((2, 3), 0.01))
    biofx.verify(bio)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_it_acts_on_the_step_before_which_it_runs(optimizer):
    moved = []
    for dampening in (1.0, 0.5):
        torch.manual_seed(0)
        start = nn.Linear(3, 2, bias=False).weight.detach()
        torch.manual_seed(0)
        bio = run([passes.Crystallize(dampening=dampening)], lr=0.1, optimizer=optimizer)
        moved.append(bio.weight.detach() - start)
    torch.testing.assert_close(moved[1], 0.5 * moved[0], rtol=1e-4, atol=1e-6)


def test_a_refresh_leaves_crystallized_gains_alone():
    refreshed = passes.FuzzyLearningRates(distribution="weight_adaptive", every=1)
    bio = biofx.transform(mlp(3, 4), [refreshed, passes.Crystallize(dampening=0.1)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.tensor([1e3, 1e-2, 1e-2, 1e-2]) * bio(torch.ones(1, 3))).sum().backward()
        optimizer.step()
    gain = bio.get_buffer("0.weight_synapses.gain")
    assert (gain[0] < 0.01).all()
    assert (gain[1:] >= 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1}, "threshold must be a number ≥ 0, got -1"),
        ({"dampening": 1.5}, "dampening must be a number ≥ 0 and ≤ 1, got 1.5"),
        ({"floor": -0.1}, "floor must be a number ≥ 0, got -0.1"),
        ({"every": 0}, "every must be an integer ≥ 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.Crystallize(**options)
