"""SynapticScaling: homeostasis through gradients or weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import biofx
from biofx import passes
from biofx.passes.synaptic_scaling import gradient_factor, weight_factor
from conftest import UNNOTICED, gradients
from models.small import CONVOLUTIONS, GROUPS, layer_and_input

KINDS = [("linear", "dense"), *((kind, grouping) for kind in CONVOLUTIONS for grouping in GROUPS)]


def test_the_factors():
    activity, target = torch.tensor([0.0, 0.25, 1.0, 4.0, 1e6]).double(), torch.tensor(1.0).double()
    torch.testing.assert_close(gradient_factor(activity, target, 0.5), torch.tensor([2.0, 2.0, 1.0, 0.5, 0.5]).double())
    torch.testing.assert_close(weight_factor(activity, target, 0.1), torch.tensor([1.1, 1.075, 1.0, 0.7, 0.5]).double())
    assert gradient_factor(torch.zeros(1), torch.tensor(0.0), 0.5) == 1


def attached(layer, lr=0.0, **options):
    bio = biofx.transform(layer, [passes.SynapticScaling(**options)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=lr)
    biofx.attach(bio, optimizer)
    return bio, optimizer


def step(bio, optimizer, *batches):
    optimizer.zero_grad()
    for batch in batches:
        bio(batch).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_activity_is_measured_for_every_unit_of_every_operator(kind, grouping):
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64)
    bio, optimizer = attached(layer, memory=0.0)
    step(bio, optimizer, x)
    output = layer(x).abs().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(bio.weight_synapses.activity, output.mean(0))


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_weights_are_scaled_by_their_postsynaptic_unit(kind, grouping):
    """Scaling the weights of a unit scales its output: the layer without bias shows whose weights they are."""
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64, bias=False)
    bio, optimizer = attached(layer, on="weight", target=1.0, strength=0.1)
    before = layer(x)
    step(bio, optimizer, x)
    factor = 1 + 0.1 * (1 - bio.weight_synapses.activity)
    torch.testing.assert_close(bio(x), (before.movedim(1, -1) * factor).movedim(-1, 1))


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_gradients_are_scaled_by_their_postsynaptic_unit(kind, grouping):
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64, bias=False)
    bio, optimizer = attached(layer, target=0.1, strength=0.1)
    step(bio, optimizer, x)
    factor = (0.1 / bio.weight_synapses.activity).pow(0.1).clamp(0.5, 2)
    assert factor.std() > 0
    biofx.detach(bio)  # the hooks act in the backward pass again
    expected = gradients(layer, x)["weight"]
    torch.testing.assert_close(gradients(bio, x)["weight"], expected * biofx.weight_sites(bio)["weight"].spread(factor))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_any_leading_dimensions(shape):
    layer = nn.Linear(6, 4).double()
    bio, optimizer = attached(layer, memory=0.0)
    x = torch.randn(shape, dtype=torch.float64)
    step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, layer(x).abs().reshape(-1, 4).mean(0))


def test_the_running_mean_and_accumulation():
    layer = nn.Linear(6, 4).double()
    bio, optimizer = attached(layer, memory=0.75)
    batches = torch.randn(6, 8, 6, dtype=torch.float64)
    step(bio, optimizer, batches[0], batches[1])
    first = layer(batches[:2]).abs().mean((0, 1))
    torch.testing.assert_close(bio.weight_synapses.activity, first)
    step(bio, optimizer, batches[2])
    torch.testing.assert_close(bio.weight_synapses.activity, 0.75 * first + 0.25 * layer(batches[2]).abs().mean(0))


def test_units_approach_the_target():
    bio, optimizer = attached(nn.Linear(20, 10), on="weight", target=2.0, strength=0.05)
    x = torch.randn(64, 20)
    for _ in range(200):
        step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, torch.full((10,), 2.0), rtol=0.1, atol=0)


def test_the_default_target_is_the_mean_of_the_population():
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [3.0]]))
    bio, optimizer = attached(layer, on="weight", strength=0.1)
    step(bio, optimizer, torch.ones(1, 1))
    torch.testing.assert_close(bio.weight.detach(), torch.tensor([[1.1], [2.7]]))


def test_nothing_happens_before_anything_was_seen():
    bio, optimizer = attached(nn.Linear(3, 2).eval(), on="weight", target=5.0)
    before = bio.weight.detach().clone()
    step(bio, optimizer, torch.ones(1, 3))
    assert torch.equal(bio.weight, before)


def test_the_observer_sees_units_behind_synaptic_activations():
    pipeline = [passes.SplitSynapses(3, activation="relu"), passes.SynapticScaling(memory=0.0)]
    bio = biofx.transform(nn.Conv2d(2, 4, 3, groups=2), pipeline)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    x = torch.randn(3, 2, 6, 6)
    step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, bio(x).abs().mean((0, 2, 3)))


def test_only_every_so_many_steps_are_looked_at_and_act():
    layer = nn.Linear(6, 4, bias=False).double()
    bio, optimizer = attached(layer, on="weight", target=1.0, strength=0.1, memory=0.75, every=3)
    batches, (synapses,) = torch.randn(6, 8, 6, dtype=torch.float64), [bio.weight_synapses]
    for batch in batches[:2]:
        step(bio, optimizer, batch)
    assert torch.equal(bio.weight, layer.weight)
    assert not synapses.seen.any()
    first = layer(batches[1:3]).abs().mean((0, 1))
    step(bio, optimizer, *batches[1:3])  # two micro-batches
    torch.testing.assert_close(synapses.activity, first)
    scaled = layer.weight * (1 + 0.1 * (1 - first[:, None]))
    torch.testing.assert_close(bio.weight.detach(), scaled.detach())
    bio(batches[3])
    assert not synapses.seen.any()
    for batch in batches[3:]:
        step(bio, optimizer, batch)
    last = (batches[5] @ scaled.T).abs().mean(0)
    torch.testing.assert_close(synapses.activity, 0.75 * first + 0.25 * last)


def test_observers_of_other_rules_look_on():
    layer = nn.Linear(6, 4)
    pipeline = [passes.SynapticScaling(every=5), passes.FuzzyLearningRates(distribution="activity", every=100)]
    bio = biofx.transform(layer, pipeline)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    for _ in range(4):
        step(bio, optimizer, torch.randn(8, 6))
    assert (bio.weight_synapses.active.sum(0)[1] == 32).all()


@UNNOTICED
def test_a_compiled_model_has_two_graphs_after_any_steps():
    torch._dynamo.reset()
    bio, optimizer = attached(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), memory=0.0, every=3)
    counter = CompileCounter()
    compiled = torch.compile(bio, backend=counter, fullgraph=True)
    for x in torch.randn(12, 8, 6):
        step(compiled, optimizer, x)
    assert counter.frame_count == 2


@pytest.mark.parametrize("steps", [4, 5, 6])
@pytest.mark.parametrize("into", ["new", "same"])
def test_a_run_resumes_from_a_checkpoint_bit_for_bit(steps, into):
    layer, batches = nn.Linear(6, 4), torch.randn(14, 8, 6)

    def run(bio, optimizer, batches):
        for batch in batches:
            step(bio, optimizer, batch)
        return bio.state_dict()

    options = {"lr": 0.1, "on": "weight", "target": 1.0, "every": 3}
    bio, optimizer = attached(layer, **options)
    saved = copy.deepcopy(run(bio, optimizer, batches[:steps]))
    expected = copy.deepcopy(run(bio, optimizer, batches[steps:]))
    if into == "new":
        bio, optimizer = attached(layer, **options)
    else:  # at another number of steps
        run(bio, optimizer, batches[:2])
    bio.load_state_dict(saved)
    assert_same(run(bio, optimizer, batches[steps:]), expected)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_copy_looks_at_every_step_until_it_knows_better():
    bio, optimizer = attached(nn.Linear(6, 4), every=10)
    step(bio, optimizer, torch.randn(8, 6))
    bio(torch.randn(8, 6))
    assert not bio.weight_synapses.seen.any()
    twin = copy.deepcopy(bio)
    twin(torch.randn(8, 6))
    assert twin.weight_synapses.seen.any()
    own = torch.optim.SGD(twin.parameters(), lr=0.0)
    biofx.attach(twin, own)
    step(twin, own, torch.randn(8, 6))
    assert not twin.weight_synapses.seen.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target must be a number > 0, got 0"),
        ({"strength": -1}, "strength must be a number > 0, got -1"),
        ({"on": "bias"}, "on must be one of gradient, weight, got 'bias'"),
        ({"every": 0}, "every must be an integer ≥ 1, got 0"),
        ({"memory": 1}, "memory must be a number ≥ 0 and < 1, got 1"),
        ({"target": math.nan}, "target must be a number > 0, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.SynapticScaling(**options)
