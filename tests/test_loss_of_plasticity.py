"""The experiment on loss of plasticity: its networks side by side do what attached ones do."""

import sys
from pathlib import Path

import pytest
import torch

import biofx
from biofx import passes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from loss_of_plasticity import EVERY, HIDDEN, INPUTS, LinearModels, Networks, Setting, network, problem

SEEDS, STEPS = (3, 4), 300
RULES = {
    "plain": None,
    "exponential": passes.Rejuvenate(10.0, 50),
    "threshold": passes.Rejuvenate(10.0, 50, rule="threshold"),
    "continual": passes.ContinualBackprop(0.01),
    "continual, rarely": passes.ContinualBackprop(0.002),
}
SETTINGS = [Setting(0.01 / (index + 1), rule) for index, rule in enumerate(RULES.values())]


@pytest.fixture(scope="module")
def examples():
    inputs, targets = next(problem(SEEDS, 1))
    return inputs[:STEPS].double(), targets[:STEPS].double()


@pytest.fixture(scope="module")
def side_by_side(examples):
    networks = Networks(SETTINGS, SEEDS, torch.float64)
    with torch.no_grad():
        errors = torch.stack([networks.step(*example) for example in zip(*examples, strict=True)])
    return networks, errors


@pytest.mark.parametrize("index", range(len(RULES)), ids=RULES)
def test_networks_side_by_side_do_what_attached_ones_do(index, examples, side_by_side):
    networks, expected = side_by_side
    for place, seed in enumerate(SEEDS):
        model, rule = network(seed).double(), SETTINGS[index].rule
        if rule is not None:
            model = biofx.transform(model, [rule], seed=seed, example_inputs=torch.zeros(1, INPUTS).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS[index].step_size)
        if rule is not None:
            biofx.attach(model, optimizer)
        errors = []
        for inputs, target in zip(examples[0][:, place], examples[1][:, place], strict=True):
            optimizer.zero_grad()
            error = model(inputs[None, :INPUTS])[0, 0] - target
            error.square().backward()
            optimizer.step()
            errors.append(error.detach())
        torch.testing.assert_close(torch.stack(errors), expected[:, index, place])
        torch.testing.assert_close(networks.incoming[index, place, :, :INPUTS], model[0].weight.detach())
        torch.testing.assert_close(networks.outgoing[index, place, :HIDDEN], model[2].weight.detach()[0])
        if isinstance(rule, passes.ContinualBackprop):
            assert int(model[0].weight_synapses.units_replaced) > 0


def test_the_linear_learner_is_gradient_descent(examples):
    model, errors = torch.nn.Linear(INPUTS + 1, 1, bias=False), []
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for inputs, target in zip(examples[0][:, 0].float(), examples[1][:, 0].float(), strict=True):
        optimizer.zero_grad()
        errors.append(model(inputs) - target)
        errors[-1].square().sum().backward()
        optimizer.step()
    linear = LinearModels([Setting(0.01)], SEEDS[:1])
    found = [linear.step(x[:1].float(), y[:1].float()) for x, y in zip(*examples, strict=True)]
    torch.testing.assert_close(
        torch.stack(found).flatten(), torch.stack(errors).flatten().detach(), rtol=1e-3, atol=1e-4
    )


def test_one_slow_bit_flips_between_bins():
    seen = torch.stack([inputs for inputs, _ in problem((0, 1), 4)])
    slow = seen[:, :, :, :15]
    assert torch.equal(slow, slow[:, :1].expand_as(slow))
    assert (slow[1:, 0] - slow[:-1, 0]).abs().sum(-1).eq(1).all()
    assert (seen[..., 15:20].mean((0, 1)) - 0.5).abs().max() < 5 / EVERY**0.5
    assert seen[..., 20].eq(1).all()
    again, _ = next(problem((1,), 1))
    assert torch.equal(seen[0, :, 1], again[:, 0])  # what a seed sees depends on no other
