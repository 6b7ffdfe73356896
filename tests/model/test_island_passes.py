"""Passes and rules do in islands what they do elsewhere, or say why they leave a weight alone."""

import copy

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.model.synapses import stored_name, stored_parameters, synapses_of
from conftest import flat, in_turn, loss
from island_networks import X, assert_close, network
from models.islands import ISLANDS, Branch


@pytest.mark.parametrize(
    ("kind", "way"),
    in_turn(ISLANDS, [("symbolic", torch.optim.SGD), ("module", torch.optim.AdamW)]),
    indirect=["kind"],
)
def test_rules_act_at_steps(kind, way):
    frontend, optimizer = way
    pipeline = "split-synapses,fuzzy-learning-rates,crystallize,rejuvenate{dre=1.0},l1-regularization"
    bio = biofx.transform(network(kind), pipeline, frontend=frontend)
    held = optimizer([p for n, p in stored_parameters(bio) if "sparse" not in n], lr=0.01)
    biofx.attach(bio, held)
    before = copy.deepcopy(bio.state_dict())
    for _ in range(2):
        held.zero_grad()
        loss(bio(X)).backward()
        held.step()
    biofx.verify(bio)
    for name in biofx.weight_sites(bio):
        if bio.get_parameter(name).grad is None:  # what is before tokens
            continue
        assert not torch.equal(bio.get_parameter(name), before[stored_name(bio, name)])
        assert int(synapses_of(bio, name).steps) == 2
    plain = biofx.fold(bio)
    assert_close(plain(X), bio(X))


def test_every_pass_works_or_leaves_weights_in_islands_alone(kind):
    model = network(kind)
    found = [pass_class() for pass_class in biofx.rewrite.registry.registered_passes().values()]
    alone = [p for p in found if p.changes_units or p.slot in (passes.Slot.SIGN, passes.Slot.OUTPUT)]
    for pipeline in [[p for p in found if p not in alone], *([pass_] for pass_ in alone)]:
        if kind == "kernels" and isinstance(pipeline[0], passes.DalesPrinciple):
            with pytest.raises(biofx.PipelineError, match=r"units of before.weight .* need one sign, .*\[1\] \* 4"):
                biofx.transform(model, pipeline)  # a convolution of one channel reads four units by one weight
            pipeline = [passes.DalesPrinciple(assign={"before.weight": [1] * 4})]
        bio = biofx.transform(model, pipeline)
        biofx.verify(bio)
        bio(X)
        assert_close(biofx.fold(bio)(X), bio(X))


@pytest.mark.parametrize(
    "pass_",
    [
        passes.GroupUnits(2),
        passes.SplitSynapses(2, activation="relu"),
        passes.SynapticScaling(),
        passes.FuzzyLearningRates(distribution="activity"),
    ],
    ids=lambda pass_: pass_.name,
)
def test_a_pass_that_needs_the_operator_leaves_the_weight_alone(pass_):
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4)), [pass_])
    sites = biofx.weight_sites(bio)
    assert [site.island for site in sites.values()] == [None, "1", "1", None]
    assert sites["0.weight"].passes == (pass_.name,)
    assert sites["1.a.weight"].passes == sites["1.b.weight"].passes == ()
    assert (
        f"{pass_.name}: it is in the untraced submodule 1, so what its operator returns is out of reach; "
        'frontend="export" follows it unless it decides by values' in flat(biofx.summary(bio))
    )


@pytest.mark.parametrize("layer", [nn.RNN(4, 4), nn.LSTM(4, 4), nn.GRU(4, 4)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_no_front_end_is_advised_for_recurrent_layers(layer, frontend):
    bio = biofx.transform(layer, [passes.SynapticScaling()], example_inputs=torch.randn(2, 3, 4), frontend=frontend)
    assert all(not site.passes for site in biofx.weight_sites(bio).values())
    assert "frontend=" not in str(biofx.summary(bio))


def test_units_that_reach_an_island_are_not_mirrored():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Branch(), nn.Linear(4, 2)), torch.randn(5, 4)
    bio = biofx.transform(model, [passes.MirrorUnits()], example_inputs=x)
    torch.testing.assert_close(bio(x), model(x))
    left = bio.biofx.passes[0].left
    assert left["3.a.weight"].startswith("it is in the untraced submodule 3, so what its operator returns is out of")
    assert bio.get_parameter("0.weight").shape == (16, 4)
    assert bio.get_parameter("2.weight").shape == (4, 16)
    assert "Branch" in bio.biofx.passes[0].remarks["2.weight"]


def test_units_are_followed_through_islands():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Branch(), nn.Linear(4, 4)).eval()
    bio = biofx.transform(model, [passes.DalesPrinciple(balance=False)], example_inputs=torch.randn(2, 4))
    units = biofx.units(bio)
    names = [population.name for population in units.populations]
    read = {name: {names[i] for i in units.owner[r.numbers].tolist()} for name, r in units.readings.items()}
    assert read == {
        "0.weight": {"input input"},
        "2.a.weight": {"0.weight"},
        "2.b.weight": {"2.a.weight"},
        "3.weight": {"2.b.weight"},
    }
    assert "forward reads numbers that depend on its inputs (bool in 2 (islands.py" in str(units).replace("\n    ", " ")
    sites = biofx.weight_sites(bio)
    assert [site.sign is None for site in sites.values()] == [True, False, False, False]
    assert all(site.sign is None or (site.synaptic() * site.sign >= 0).all() for site in sites.values())


def test_balance_reaches_islands():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Branch(), nn.Linear(4, 4))
    model[2].a, model[2].b = nn.Linear(32, 64), nn.Linear(64, 4)
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    weight = biofx.weight_sites(bio)["2.b.weight"].effective()
    assert 0 < (weight != 0).double().mean() < 1
