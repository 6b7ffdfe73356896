"""Changes: what a user assigns after the transform acts everywhere, or is refused with what to do instead."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import biofx
from biofx import passes

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
PIPELINES = {
    "synapses": "split-synapses,fuzzy-learning-rates,rejuvenate",
    "signs": [passes.DalesPrinciple(assign="closest")],
    "interneurons": [passes.InhibitoryInterneurons(fraction=0.5), passes.SplitSynapses(2)],
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
    ).eval()


def parameter(m):
    m[5].weight = nn.Parameter(torch.eye(4))


def head(m):
    torch.manual_seed(5)
    m[5] = nn.Linear(4, 7)


def same_parameter(m):
    own, m[5] = m[5].weight_synapses.weight, nn.Linear(4, 4)
    m[5].weight = own


def sequence(m):
    torch.manual_seed(5)
    m[5] = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3))


def features(m):
    m[5] = nn.Identity()


def shorter(m):
    del m[5]


def norm(m):
    m[1] = nn.Identity()


def no_bias(m):
    m[5].bias = None


def tie(m):
    m[5].weight = m[3].weight


def tie_earlier(m):
    m[3].weight = m[5].weight


def tie_without_gradients(m):
    with torch.no_grad():
        tie(m)


def tie_after_all(m):
    parameter(m)
    tie(m)


def share(m):
    m[5] = m[3]


TIES = [tie, tie_earlier, tie_without_gradients, tie_after_all, share]
CHANGES = [parameter, head, sequence, features, shorter, norm, no_bias, *TIES]


def named(cases):
    return pytest.mark.parametrize("change", cases, ids=lambda change: change.__name__)


def changed(change, pipeline, frontend="symbolic"):
    """The transformed network after a change, and the folded one after the same change."""
    bio = biofx.transform(network(), PIPELINES[pipeline], frontend=frontend, example_inputs=X)
    plain = biofx.fold(bio)
    change(bio)
    change(plain)
    return bio, plain


def trained(bio):
    optimizer = torch.optim.SGD(bio.parameters(), 0.01)
    with biofx.attach(bio, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            bio(X).square().sum().backward()
            optimizer.step()
    return bio


FRONTENDS = ["symbolic", "module", "export"]
IN_TURN = [
    pytest.param(change, pipeline, FRONTENDS[(i + j) % 3], id=f"{change.__name__}-{pipeline}-{FRONTENDS[(i + j) % 3]}")
    for i, change in enumerate(CHANGES)
    for j, pipeline in enumerate(PIPELINES)
]  # every change meets every pipeline and every front end


@pytest.mark.parametrize(("change", "pipeline", "frontend"), IN_TURN)
def test_every_form_of_the_model_follows(change, pipeline, frontend):
    bio, plain = changed(change, pipeline, frontend)
    for form in (
        copy.deepcopy(bio),
        pickle.loads(pickle.dumps(bio)),
        biofx.fold(bio),
        biofx.fold(copy.deepcopy(bio)),
        biofx.fold(pickle.loads(pickle.dumps(bio))),
        bio,
    ):
        torch.testing.assert_close(form(X), plain(X), rtol=1e-4, atol=1e-5)
    biofx.verify(trained(bio.train()))
    torch.testing.assert_close(biofx.fold(bio.eval())(X), bio(X), rtol=1e-4, atol=1e-5)
    for look in (biofx.summary, biofx.table, biofx.to_networkx, biofx.weight_sites):
        look(bio)


@named([parameter, head])
def test_a_new_weight_is_left_alone_until_the_next_transform(change):
    bio, _plain = changed(change, "synapses")
    reason = "it was assigned after the transform; transform the model again to give it synapses"
    summary = biofx.summary(bio)
    assert summary.to_dict()["left_alone"] == {"5.weight": reason}
    assert "the model (Sequential): 5.weight was replaced since the transform" in summary
    before = bio[5].weight.clone()
    trained(bio)
    assert not torch.equal(before, bio[5].weight)
    again = biofx.transform(bio, "volume-dependent-learning-rates", example_inputs=X)
    assert biofx.weight_sites(again)["5.weight"].passes == ("volume-dependent-learning-rates",)


@named([parameter, head, sequence, features, shorter, no_bias])
def test_units_judge_what_was_assigned_as_in_any_model(change):
    bio, plain = changed(change, "signs")
    found, expected = biofx.units(bio, X), biofx.units(plain, X)
    assert found.verdicts() == expected.verdicts()
    assert len(found.mixed()) == len(expected.mixed())
    reason = "it was assigned after the transform; transform the model again to give it synapses"
    verdicts = biofx.verify(bio)
    assert verdicts.keys() == found.verdicts().keys()
    assert all(verdicts[n].reason == reason for n, verdict in found.verdicts().items() if verdict.kind == "breaks")


@named(TIES)
def test_ties_are_kept_and_not_judged(change):
    bio, _ = changed(change, "signs")
    plain = biofx.fold(bio)
    assert plain[3].weight is plain[5].weight
    assert "5.weight was tied to it after the transform" in biofx.verify(bio)["3.weight"].reason
    bio, _ = changed(change, "synapses")
    assert bio[3].weight_synapses is bio[5].weight_synapses
    assert biofx.summary(bio).rows[1]["weight"] == "3.weight"


def test_several_weights_may_be_tied():
    bio = biofx.transform(network(), PIPELINES["synapses"])
    bio[0].weight, bio[5].weight = bio[3].weight, bio[3].weight
    expected = bio(X)
    torch.testing.assert_close(pickle.loads(pickle.dumps(bio))(X), expected)
    torch.testing.assert_close(biofx.fold(bio)(X), expected)
    assert list(biofx.verify(trained(bio))) == ["0.weight"]


@pytest.mark.parametrize("pipeline", ["fuzzy-learning-rates", "split-synapses"])
def test_a_parameter_may_be_tied_to_a_weight_with_synapses(pipeline):
    model, x = nn.Sequential(nn.LSTM(4, 4, num_layers=2)), torch.randn(3, 2, 4)
    bio = biofx.transform(model, pipeline, example_inputs=x, exclude="*weight_ih_l1")
    bio[0].weight_ih_l1 = bio[0].weight_ih_l0
    plain = biofx.fold(bio)
    assert plain[0].weight_ih_l1 is plain[0].weight_ih_l0
    torch.testing.assert_close(bio(x), plain(x))


def test_a_tie_while_attached_shares_the_synapses():
    bio = biofx.transform(network(), [passes.FuzzyLearningRates()])
    biofx.attach(bio, torch.optim.SGD(bio.parameters(), 0.1))
    tie(bio)
    assert bio[3].weight_synapses is bio[5].weight_synapses


@named([parameter, head, same_parameter, sequence, features, shorter, tie, share])
def test_a_step_after_a_change_says_to_attach_again(change):
    bio = biofx.transform(network(), [passes.FuzzyLearningRates(), passes.Rejuvenate()])
    optimizer = torch.optim.SGD(bio.parameters(), 0.1)
    biofx.attach(bio, optimizer)
    change(bio)
    bio(X).sum().backward()
    with pytest.raises(biofx.LifecycleError, match="5.weight .*; detach, build the optimizer again, and attach"):
        optimizer.step()
    biofx.detach(bio)
    biofx.verify(trained(bio))


def test_a_scale_that_was_removed_while_attached():
    bio = biofx.transform(network(), PIPELINES["signs"])
    optimizer = torch.optim.SGD(bio.parameters(), 0.1)
    biofx.attach(bio, optimizer)
    norm(bio)
    bio(X).sum().backward()
    with pytest.raises(biofx.LifecycleError, match="1.weight was removed after it was attached"):
        optimizer.step()


@named([parameter, head, features, tie])
def test_where_a_pass_needs_the_graph_a_change_is_refused(change):
    bio = biofx.transform(network(), [passes.SynapticScaling()])
    change(bio)
    with pytest.raises(biofx.CaptureError, match="changed since the transform, and synaptic-scaling needs the graph"):
        bio(X)
    refusal = "5.weight was .* since the transform, and synaptic-scaling needs the graph, .* and then transform it"
    for function in (biofx.fold, biofx.summary, pickle.dumps):
        with pytest.raises(biofx.ArgumentError, match=refusal):
            function(bio)
    with pytest.raises(biofx.VerificationError, match="synaptic-scaling needs the graph"):
        biofx.verify(bio)


def test_weights_of_another_shape_are_not_for_the_original(tmp_path):
    bio, _ = changed(head, "synapses")
    with pytest.raises(biofx.ExportError, match=r"5.weight is \(7, 4\) now and \(4, 4\) in the original"):
        biofx.export(bio, tmp_path / "weights.safetensors")
    bio, _ = changed(features, "synapses")
    with pytest.raises(biofx.ExportError, match="5.weight was removed since the transform"):
        biofx.export(bio, tmp_path / "weights.safetensors")


def test_a_module_at_two_places_of_a_sequence_runs_twice():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    bio = biofx.transform(model, "split-synapses")
    bio[0].register_forward_hook(lambda *_: None)  # so that the Python runs
    torch.testing.assert_close(bio(X), model(X))
    assert len(bio) == 4


def test_a_wrapped_layer_is_refused_until_it_is_moved_back():
    """As by an adapter. What training made of the weights is not lost: the advice works."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    bio = biofx.transform(model, "fuzzy-learning-rates")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    layer = bio.get_submodule("0")
    setattr(bio, "0", nn.Sequential(layer))
    bio(x).sum().backward()
    for call in (optimizer.step, lambda: biofx.fold(bio)):
        with pytest.raises(biofx.BiofxError, match=r"0\.0\.weight has synapses .* move them back; .* biofx\.fold"):
            call()
    setattr(bio, "0", layer)
    optimizer.step()
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        lambda m: prune.l1_unstructured(m[0], "bias", 1),
        lambda m: parametrizations.weight_norm(m[0]),
        lambda m: spectral_norm(m[0]),
        lambda m: delattr(m[0], "bias") or setattr(m[0], "bias", torch.zeros(4)),
    ],
)
def test_a_weight_without_synapses_may_be_pruned(change):
    """A pruned or parametrized layer has an attribute of that name, which is no parameter any more."""
    bio = biofx.transform(network(), PIPELINES["synapses"], exclude="0.weight", example_inputs=X)
    plain = biofx.fold(bio)
    for each in (bio, plain):
        torch.manual_seed(0)
        change(each)
    torch.testing.assert_close(bio(X), plain(X))
    biofx.verify(trained(bio))
    torch.testing.assert_close(biofx.fold(bio)(X), bio(X))


def test_a_weight_that_was_deleted_is_left_alone():
    bio = biofx.transform(network(), PIPELINES["synapses"], exclude="0.weight", example_inputs=X)
    del bio[0].weight
    assert "0.weight" not in biofx.weight_sites(bio)
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        bio(X)
