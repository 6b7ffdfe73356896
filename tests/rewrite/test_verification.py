"""Verification: every invariant, broken on purpose."""

import re
from functools import partial

import pytest
import torch
from torch import fx, nn

import biofx
from biofx import passes
from biofx.model.provenance import RECORD
from models.small import ConvNet, mlp

X = torch.randn(3, 4)


@pytest.fixture
def bio():
    return biofx.transform(mlp(4, 6, 2), [passes.SplitSynapses(2), passes.FuzzyLearningRates()])


def find(bio: fx.GraphModule, target) -> fx.Node:
    return bio.graph.find_nodes(op="call_function", target=target)[0]


def violations(bio) -> str:
    with pytest.raises(biofx.VerificationError) as error:
        biofx.verify(bio)
    assert len(error.value.violations) == len(set(error.value.violations)) >= 1
    return str(error.value)


def test_a_transformed_model_is_valid_also_after_training(bio):
    biofx.verify(bio)
    optimizer = torch.optim.Adam(bio.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        bio(X).square().sum().backward()
        optimizer.step()
    biofx.verify(bio)


def test_a_malformed_graph(bio):
    node = find(bio, torch.sum)
    first = next(iter(bio.graph.nodes))
    first.prepend(node)
    assert "the graph is malformed" in violations(bio)


def test_a_second_chain(bio):
    site = biofx.weight_sites(bio)["0.weight"]
    with bio.graph.inserting_before(site.uses[0]):
        again = bio.graph.get_attr("0.weight_synapses.weight")
        twice = bio.graph.call_function(torch.sum, (again, 0))
    site.uses[0].update_arg(1, twice)
    text = violations(bio)
    assert "0.weight_synapses.weight: read by 2 nodes, must be read by one" in text
    assert "0.weight: sum_1 is not used by any node" in text


def test_a_chain_out_of_order(bio):
    node = find(bio, torch.sum)
    node.meta[RECORD] = passes.Slot.HOOK and type(node.meta[RECORD])("split-synapses", "0.weight", passes.Slot.HOOK)
    found = "gradient hook, sum over synapses, gradient hook"
    assert f"0.weight: its chain is not in canonical order: {found}" in violations(bio)


def test_a_link_with_another_argument(bio):
    node = find(bio, torch.sum)
    node.args = (node.args[0], 1)
    assert "0.weight: the graph does not compute it from its synapses as its module does" in violations(bio)


def test_states_that_were_exchanged():
    bio = biofx.transform(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [passes.FuzzyLearningRates()])
    one, two = (node for node in bio.graph.find_nodes(op="get_attr") if str(node.target).endswith("gain"))
    one.target, two.target = two.target, one.target
    assert "1.weight: the graph does not compute it from its synapses as its module does" in violations(bio)


def test_a_chain_that_branches(bio):
    site = biofx.weight_sites(bio)["0.weight"]
    hook = find(bio, torch.ops.biofx.scale_grad)
    with bio.graph.inserting_after(hook):
        stray = bio.graph.call_function(torch.neg, (hook,))
    stray.meta[RECORD] = hook.meta[RECORD]
    with bio.graph.inserting_after(stray):
        other = bio.graph.call_function(torch.sum, (stray, 0))
    site.uses[0].update_arg(1, other)
    assert "fuzzy-learning-rates: 0.weight: neg is not on the one chain of the weight" in violations(bio)


def test_an_operator_that_no_pass_inserted(bio):
    use = biofx.weight_sites(bio)["2.weight"].uses[0]
    with bio.graph.inserting_after(use):
        node = bio.graph.call_function(torch.ops.biofx.scale_grad, (use, 0.5))
    use.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    assert f"{node.name} is a biofx operator that no pass inserted" in violations(bio)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "fuzzy-learning-rates: 0.weight: gain is not finite"),
        (float("inf"), "fuzzy-learning-rates: 0.weight: gain is not finite"),
        (-1.0, "fuzzy-learning-rates: 0.weight: gain is negative"),
        (2.5, r"fuzzy-learning-rates: 0.weight: gain is in \[0.\d+, 2.5\], outside of \[0.5, 2\]"),
    ],
)
def test_gains(bio, value, message):
    biofx.weight_sites(bio)["0.weight"].gain[0, 0, 0] = value
    with pytest.raises(biofx.VerificationError, match=message):
        biofx.verify(bio)


def test_a_gain_of_another_shape(bio):
    bio.get_submodule("0").weight_synapses.gain = torch.ones(7)
    assert "0.weight: gain has the shape (7,), and what is stored (" in violations(bio)


def test_a_parameter_that_is_gone():
    bio = biofx.transform(ConvNet(), [passes.SplitSynapses(2)])
    del bio.norm.bias
    assert "norm.bias: a parameter of the original model is gone" in violations(bio)


def prune_weight(bio):
    del bio.get_submodule("2")._parameters["weight"]


def resize_stored(bio):
    bio.get_submodule("2").weight_synapses.weight = nn.Parameter(torch.ones(3, 2, 8))


def move_layers(bio):
    bio.insert(0, nn.Identity())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prune_weight, "2.weight, which has synapses since the transform, is no parameter of the model any more"),
        (resize_stored, "2.weight, which has synapses since the transform, was (2, 2, 8) then and is (3, 2, 8) now"),
        (move_layers, "1.weight has synapses that were made for another weight"),
    ],
)
def test_synapses_that_were_damaged_after_the_transform(change, message, frontend):
    bio = biofx.transform(mlp(4, 8, 2), [passes.SplitSynapses(2), passes.Crystallize()], frontend=frontend)
    change(bio)
    assert message in violations(bio)
    again = partial(biofx.transform, passes="fuzzy-learning-rates")
    attach = partial(biofx.attach, optimizer=torch.optim.SGD(bio.parameters(), 0.1))
    for function in (biofx.weight_sites, biofx.summary, biofx.fold, biofx.units, attach, again):
        with pytest.raises(biofx.ArgumentError, match=re.escape(message) + "; .*prune, .* and then transform it"):
            function(bio)


def test_state_that_is_gone(bio):
    del bio.get_submodule("2").weight_synapses.gain
    assert "gain of 2.weight, which fuzzy-learning-rates keeps, was removed" in violations(bio)


def test_a_weight_may_be_reshaped_by_a_second_transform():
    bio = biofx.transform(mlp(4, 8, 2), [passes.GroupUnits()])
    biofx.verify(biofx.transform(bio, [passes.SplitSynapses(2)]))


def test_a_weight_whose_operator_is_gone(bio):
    use = biofx.weight_sites(bio)["2.weight"].uses[0]
    use.replace_all_uses_with(use.args[0])
    bio.graph.erase_node(use)
    assert "split-synapses: 2.weight: no operator uses the weight any more" in violations(bio)


def test_transform_verifies_after_each_pass():
    class Careless(passes.Pass):
        name, slot = "careless", passes.Slot.HOOK

        def rewrite(self, site, edit):
            edit.gain(torch.full_like(site.raw, torch.nan))

    with pytest.raises(biofx.VerificationError, match=r"after careless: careless: weight: gain is not finite"):
        biofx.transform(nn.Linear(2, 2), [Careless()])
    biofx.transform(nn.Linear(2, 2), [Careless()], verify=False)


@pytest.mark.parametrize("given", ["it is bad", True, None, [True]])
def test_violations_have_to_be_sentences(given):
    class Careless(passes.Pass):
        name, slot = "careless", passes.Slot.HOOK

        def rewrite(self, site, edit):
            edit.gain()

        def violations(self, site):
            return given

    with pytest.raises(
        biofx.ArgumentError, match=r"careless: violations\(site\) yields a sentence .* for weight it gave"
    ):
        biofx.transform(nn.Linear(2, 2), [Careless()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite(value, dtype):
    bio = biofx.transform(nn.Linear(3, 2, dtype=dtype), [passes.FuzzyLearningRates()])
    with torch.no_grad():
        bio.weight[0, 1] = value
    with pytest.raises(biofx.VerificationError, match="weight: the weight is not finite"):
        biofx.verify(bio)


def test_a_weight_without_entries_is_valid():
    model = nn.Sequential(nn.Linear(0, 2), nn.Linear(2, 2))
    assert list(biofx.verify(biofx.transform(model, [passes.FuzzyLearningRates()]))) == ["1.weight"]
