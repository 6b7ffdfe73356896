"""A weight at a step: rules see the weights of synapses, whatever is stored for them."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.base import noise
from biofx.base.shards import Cut, Shard
from biofx.training.plastic_weight import PlasticWeight

CONSTRAINTS = ["project", "abs", "softplus"]


@pytest.fixture(params=CONSTRAINTS)
def weight(request):
    """The second weight of a network under Dale's principle, before the first step of an optimizer."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    bio = biofx.transform(model, [passes.DalesPrinciple(constraint=request.param, balance=False)])
    bio(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    site = biofx.weight_sites(bio)["2.weight"]
    optimizer = torch.optim.SGD(bio.parameters())
    return PlasticWeight(site, site.raw, site.raw.grad, optimizer, 1, "dales-principle")


def test_the_value_is_what_the_operator_receives(weight):
    torch.testing.assert_close(weight.value, weight.site.effective().detach())


def test_state_that_there_is_not_lists_what_there_is(weight):
    for read in (weight.state, weight.observed):
        with pytest.raises(
            biofx.ArgumentError, match=r"dales-principle: 2\.weight has no state 'seeen'; .* are sign, "
        ):
            read("seeen")
    with pytest.raises(biofx.ArgumentError, match=r"no observer adds to 'sign'"):
        weight.observed("sign")
    assert weight.state("sign").any()
    with pytest.raises(biofx.ArgumentError, match=r"old weights are kept only for .* moment = passes\.Moment\.UPDATE"):
        weight.old  # noqa: B018


def test_without_a_constraint_the_value_is_what_is_stored():
    site = biofx.weight_sites(biofx.transform(nn.Linear(3, 2), [passes.L1Regularization()]))["weight"]
    plain = PlasticWeight(site, site.raw, torch.zeros(2, 3), None, 1)
    assert torch.equal(plain.value, site.raw)
    assert torch.equal(plain.slope, site.raw.sign())


@torch.no_grad()
def test_an_assigned_value_is_what_the_operator_receives(weight):
    wanted = weight.value * torch.rand(6, 10)
    weight.assign(wanted)
    torch.testing.assert_close(weight.site.effective(), wanted)


@torch.no_grad()
def test_so_is_a_replaced_one(weight):
    mask = torch.rand(6, 10) < 0.5
    new = torch.rand(6, 10, dtype=torch.float64) * weight.site.sign
    others = weight.value[~mask]
    weight.replace(mask, torch.where(mask, new, torch.nan))
    torch.testing.assert_close(weight.site.effective()[mask], new[mask])
    assert torch.equal(weight.value[~mask], others)


MEMORIES = {  # what an optimizer remembers of a synapse, and what of a new one
    "momentum_buffer": (torch.float64, 0.0),
    "exp_avg": (torch.bfloat16, 0.0),
    "codes": (torch.uint8, 0),
    "sum": (torch.float64, 0.25),
    "step_size": (torch.float64, 0.125),
}


@torch.no_grad()
@pytest.mark.parametrize("key", [*MEMORIES, "ax"])
def test_the_optimizer_forgets_what_is_replaced_whatever_it_was(key):
    bio = biofx.transform(nn.Linear(5, 4).double(), [passes.Rejuvenate()])
    site = biofx.weight_sites(bio)["weight"]
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.125)
    optimizer.param_groups[0]["initial_accumulator_value"] = 0.25
    dtype, initial = MEMORIES.get(key, (torch.float64, None))
    memory = torch.full((4, 5), 3, dtype=dtype)
    if dtype.is_floating_point:
        memory[0], memory[1], memory[2] = torch.inf, torch.nan, -torch.inf
    before = memory.clone()
    optimizer.state[site.raw] = {key: memory, "step": torch.tensor(7.0)}
    mask = torch.arange(20).view(4, 5) % 2 == 0
    PlasticWeight(site, site.raw, torch.zeros(4, 5), optimizer, 1, "rejuvenate").replace(mask, torch.ones(4, 5))
    assert (memory[mask] == (1 if initial is None else initial)).all()
    assert torch.equal(memory[~mask].nan_to_num(7), before[~mask].nan_to_num(7))
    assert optimizer.state[site.raw]["step"] == 7


def test_noise_follows_from_pass_weight_purpose_and_step():
    bio = biofx.transform(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), [passes.Rejuvenate()])
    sites = biofx.weight_sites(bio)

    def drawn(name="0.weight", by="rejuvenate", purpose="which"):
        raw = sites[name].raw
        weight = PlasticWeight(sites[name], raw, torch.zeros_like(raw), None, 1, by)
        return noise.normal([raw.detach()], [weight.counter(purpose)])[0]

    first = drawn()
    assert torch.equal(first, drawn())
    others = [drawn(name="1.weight"), drawn(by="crystallize"), drawn(purpose="new")]
    sites["0.weight"].state("steps").add_(1)
    assert all((first != other).any() for other in [*others, drawn()])


def test_the_slope_is_the_derivative_of_the_stored_magnitude(weight):
    weight.raw.grad = None
    weight.site.effective().abs().sum().backward()
    torch.testing.assert_close(weight.slope, weight.raw.grad)


def test_sums_by_unit_of_shards_add_up_to_those_of_the_whole():
    """A part of a grouped transposed convolution may have as many entries as the whole has units."""
    layer = nn.ConvTranspose1d(4, 6, 1, groups=2)
    bio = biofx.transform(nn.Sequential(layer, nn.ReLU()), "rejuvenate", example_inputs=torch.randn(2, 4, 5))
    site = biofx.weight_sites(bio)["0.weight"]

    def sums(*cuts):
        own, part = site.bound(), site.raw.detach()
        vars(own)["shard"] = Shard(part.shape, cuts)
        for cut in cuts:
            part = part.narrow(cut.axis, cut.start, cut.length)
        return PlasticWeight(own, part, part, None, 1).by_unit([part])[0]

    torch.testing.assert_close(sums(Cut(0, 0, 2)) + sums(Cut(0, 2, 2)), sums())
    torch.testing.assert_close(sums(), site.incoming(site.raw.detach()).sum(1))
