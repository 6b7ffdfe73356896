"""Weight operators and weight paths: whichever operator reads a weight, and however it gets there."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.analysis.understanding import understand
from biofx.recording.inputs import guess
from biofx.weights.facts import Need
from conftest import flat, gradients, in_turn, only, tensors, times_listed
from models.composite import GraphConvolution, normalised_adjacency
from models.weights import KINDS, MODELS, PATHS, FusedAttention, Layer, LoRA, Network, TiedLanguageModel, Words
from pipelines import DIVERSE, EVERYTHING

ALL = {**KINDS, **PATHS}


@pytest.fixture(scope="module", params=ALL)
def kind(request):
    return ALL[request.param]


@pytest.fixture(scope="module")
def transformed(kind):
    torch.manual_seed(0)
    layer, x = Layer(kind.shape, kind.function).double(), torch.randn(kind.inputs, dtype=torch.float64)
    return layer, x, biofx.transform(layer, DIVERSE, example_inputs=(x,))


@pytest.fixture
def layer(transformed):
    return copy.deepcopy(transformed[0])


@pytest.fixture
def x(transformed):
    return transformed[1]


@pytest.fixture
def bio(transformed):
    return copy.deepcopy(transformed[2])


def built(name):
    torch.manual_seed(0)
    build, inputs, weights = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight norm
        model = build().double().eval()
    return model, tuple(t.double() if t.is_floating_point() else t for t in inputs()), weights


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model_and_inputs(name):
    return built(name)


@pytest.fixture(scope="module")
def transformed_model(name):
    model, inputs, _ = built(name)
    return biofx.transform(model, DIVERSE, example_inputs=inputs)


@pytest.fixture
def bio_model(transformed_model):
    return copy.deepcopy(transformed_model)


# --- one operator ----------------------------------------------------------------------------------------------------


def test_axes(kind, bio):
    site = only(bio)
    assert (site.operator, site.presynaptic_axis, site.postsynaptic_axis) == (kind.name, kind.pre, kind.post)
    assert (site.presynaptic_units, site.units) == (4, 8)


def test_the_axes_are_those_along_which_units_act(kind, layer, x, bio):
    """Silencing a presynaptic unit = zeroing its slice of the weight; likewise the output of a postsynaptic one."""
    site = only(bio)
    silenced = x.clone()
    silenced.select(kind.source, 2).zero_()
    if kind is PATHS["normalize"]:
        return  # the other entries of a row change with it
    expected = layer(silenced)
    with torch.no_grad():
        layer.weight.select(site.presynaptic_axis, 2).zero_()
        torch.testing.assert_close(layer(x), expected)
        bias = layer(torch.zeros_like(x)).select(kind.output, 5)
        layer.weight.select(site.postsynaptic_axis, 5).zero_()
        torch.testing.assert_close(layer(x).select(kind.output, 5), bias)


def test_splitting_preserves_outputs_and_scales_gradients(layer, x, bio):
    torch.testing.assert_close(bio(x), layer(x))
    plain, site = gradients(layer, x)["weight"], only(bio)
    torch.testing.assert_close(gradients(bio, x)["weight"], site.gain * plain / 3)


def test_folds_to_the_plain_weight(layer, x, bio):
    with torch.no_grad():
        bio.get_parameter("weight").add_(torch.randn_like(bio.get_parameter("weight")) * 0.1)
    plain = biofx.fold(bio)
    assert torch.equal(plain(x), bio(x))
    layer.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(layer(x), bio(x))


@pytest.mark.parametrize(("kind", "constraint"), in_turn(ALL, ["project", "abs", "softplus"]), indirect=["kind"])
def test_a_unit_acts_with_one_sign(kind, layer, x, constraint):
    dale = passes.DalesPrinciple(inputs="mixed", excitatory=0.5, constraint=constraint)
    bio = biofx.transform(layer, [dale, passes.SplitSynapses(2)], example_inputs=(x,))
    assert only(bio).sign is not None
    jacobian = torch.autograd.functional.jacobian(bio, x).movedim(kind.source % x.dim() - x.dim(), 0)
    effects = jacobian.flatten(1)
    excites, inhibits = (effects > 1e-12).any(1), (effects < -1e-12).any(1)
    assert not (excites & inhibits).any()
    assert excites.sum() == inhibits.sum() == 2


def test_units_that_feed_a_weight_are_those_of_the_one_before(kind, x):
    """Linear → ReLU → operator: it reads the units of the linear layer."""

    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(4, 4)
            self.layer = Layer(kind.shape, kind.function)

        def forward(self, x):
            return self.layer(F.relu(self.before(x.movedim(kind.source, -1))).movedim(-1, kind.source))

    found = biofx.units(Fed(), example_inputs=(x.float(),))
    reading = found.readings["layer.weight"]
    assert found.populations[found.owner[reading.numbers[0]]].name == "before.weight"
    assert reading.numbers.tolist() == found.members(int(found.owner[reading.numbers[0]])).tolist()


def test_units_that_a_weight_returns_are_on_the_output_s_axis(kind, x):
    network = Network(Layer(kind.shape, kind.function), kind.output, 8)
    found = biofx.units(network, example_inputs=(x.float(),))
    numbers = found.readings["head.weight"].numbers
    assert found.describe(numbers) == "8: layer.weight"


@pytest.mark.parametrize(("kind", "activation"), in_turn(ALL, [None, "tanh"]), indirect=["kind"])
def test_grouping_sums_adjacent_units(kind, x, activation):
    network = Network(Layer(kind.shape, kind.function), kind.output, 8).double()
    bio = biofx.transform(network, [passes.GroupUnits(4, activation)], example_inputs=(x,))
    z = network.layer(x).movedim(kind.output, -1)
    z = torch.tanh(z) if activation else z
    grouped = z.unflatten(-1, (2, 4)).sum(-1).repeat_interleave(4, -1)
    torch.testing.assert_close(bio(x), network.head(grouped))


def test_observers_see_every_unit(kind, x):
    network = Network(Layer(kind.shape, kind.function), kind.output, 8).double()
    bio = biofx.transform(
        network,
        [passes.SynapticScaling(), passes.FuzzyLearningRates(distribution="activity")],
        example_inputs=(x,),
    ).train()
    bio(x)
    activity = network.layer(x).movedim(kind.output, -1).reshape(-1, 8).abs()
    seen, active = (state.sum(0) for state in (bio.layer.weight_synapses.seen, bio.layer.weight_synapses.active))
    torch.testing.assert_close(seen[0], activity.sum(0))
    assert torch.equal(active[0], (activity > 0.01).sum(0).double())
    assert torch.equal(seen[1], torch.full((8,), len(activity)).double())
    assert torch.equal(active[1], seen[1])


@pytest.mark.parametrize("name", KINDS)
def test_every_synapse_can_have_an_activation(name):
    kind = KINDS[name]
    layer, x = Layer(kind.shape, kind.function).double(), torch.randn(kind.inputs, dtype=torch.float64)
    pipeline = [passes.SplitSynapses(3, activation="tanh"), passes.FuzzyLearningRates()]
    bio = biofx.transform(layer, pipeline, example_inputs=(x,))
    if "add" in kind.name:  # their bias is a constant of eight values
        assert "its operator's bias is computed" in flat(biofx.summary(bio))
        return
    expected = sum(torch.tanh(kind.function(x, synapse)) for synapse in bio.get_parameter("weight"))
    torch.testing.assert_close(bio(x), expected)
    torch.testing.assert_close(biofx.fold(bio)(x), expected)
    biofx.verify(bio)


@pytest.mark.parametrize("name", PATHS)
def test_behind_a_path_there_is_no_place_for_an_activation(name):
    kind = PATHS[name]
    layer, x = Layer(kind.shape, kind.function), torch.randn(kind.inputs)
    bio = biofx.transform(layer, [passes.SplitSynapses(3, activation="tanh")], example_inputs=(x,))
    assert "something else than its operator reads the weight" in flat(biofx.summary(bio))


def test_without_example_inputs(kind, x):
    """What runs tells the same; what does not is told to give example inputs."""
    layer = Network(Layer(kind.shape, kind.function), kind.output, 8)
    if guess(layer) is None:
        with pytest.raises(biofx.ArgumentError, match="give example_inputs"):
            biofx.units(layer)
        return
    found = biofx.units(layer)
    assert found.describe(found.readings["head.weight"].numbers) == "8: layer.weight"


# --- models ----------------------------------------------------------------------------------------------------------


def test_which_parameters_are_synapses(model_and_inputs, bio_model):
    _, _, weights = model_and_inputs
    assert set(biofx.weight_sites(bio_model)) >= weights
    assert {name for name, site in biofx.weight_sites(bio_model).items() if site.passes} >= weights


def test_the_summary_lists_every_parameter_once(model_and_inputs, bio_model):
    model, _, _ = model_and_inputs
    summary = biofx.summary(bio_model)
    assert {name: times_listed(summary, name) for name, _ in model.named_parameters()} == {
        name: 1 for name, _ in model.named_parameters()
    }


def test_function_gradients_and_fold_are_exact(model_and_inputs, bio_model):
    model, inputs, _ = model_and_inputs
    bio = bio_model.eval()
    for a, b in zip(tensors(bio(*inputs)), tensors(model(*inputs)), strict=True):
        torch.testing.assert_close(a, b)
    plain, hooked, sites = gradients(model, *inputs), gradients(bio, *inputs), biofx.weight_sites(bio)
    assert plain.keys() == hooked.keys()
    for name, gradient in plain.items():
        expected = sites[name].gain * gradient / 3 if name in sites else gradient
        torch.testing.assert_close(hooked[name], expected)
    with torch.no_grad():
        for site in sites.values():
            site.raw.add_(torch.randn_like(site.raw) * 0.05)
    folded = biofx.fold(bio)
    for a, b in zip(tensors(folded(*inputs)), tensors(bio(*inputs)), strict=True):
        torch.testing.assert_close(a, b)
    assert list(folded.state_dict()) == list(model.state_dict())
    model.load_state_dict(folded.state_dict(), strict=True)
    for a, b in zip(tensors(model(*inputs)), tensors(bio(*inputs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("optimizer_name", "balance"), [("SGD", True), ("Adam", False)])
def test_everything_trains_copies_and_folds(model_and_inputs, optimizer_name, balance):
    model, inputs, _ = model_and_inputs
    everything = [*EVERYTHING, passes.DalesPrinciple(excitatory=0.5, balance=balance)]
    del everything[1]
    bio = biofx.transform(model, everything, example_inputs=inputs).train()
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=1e-3)
    biofx.attach(bio, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sum(t.square().sum() for t in tensors(bio(*inputs))).backward()
        optimizer.step()
    biofx.verify(bio.eval())
    copied = copy.deepcopy(bio)
    folded = biofx.fold(bio)
    for a, b, c in zip(*(tensors(m(*inputs)) for m in (bio, copied, folded)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    model.load_state_dict(folded.state_dict(), strict=True)


def test_grouped_experts_have_axes_of_their_own():
    build, inputs, _ = MODELS["experts"]
    sites = biofx.weight_sites(biofx.transform(build(), DIVERSE))
    assert [(s.presynaptic_axis, s.postsynaptic_axis, s.presynaptic_units, s.units) for s in sites.values()] == [
        (1, 2, 3 * 4, 3 * 6),
        (1, 2, 3 * 6, 3 * 4),
    ]
    (x,) = inputs()
    found = biofx.units(build(), example_inputs=(x,))
    assert found.describe(found.readings["w2"].numbers) == "18: w1"
    shared = biofx.units(build(), example_inputs=(x[:1],))  # all experts read the same units
    assert shared.describe(shared.readings["w1"].numbers) == "4 × 3: input x"


def test_several_axes_can_run_over_units():
    build, inputs, _ = MODELS["heads"]
    model = build()
    bio = biofx.transform(model, DIVERSE)
    q, o = biofx.weight_sites(bio).values()
    assert (q.axes.presynaptic, q.axes.postsynaptic, q.postsynaptic_axis) == ((0,), (1, 2), None)
    assert (o.axes.presynaptic, o.axes.postsynaptic, o.presynaptic_axis) == ((0, 1), (2,), None)
    found = biofx.units(model, example_inputs=inputs())
    assert found.describe(found.readings["o"].numbers) == "6: q"
    assert found.readings["o"].numbers.tolist() == sorted(found.readings["o"].numbers.tolist())


def test_a_graph_convolution_reads_units_along_its_features():
    inputs = torch.randn(2, 5, 6), normalised_adjacency(2, 5)
    found = biofx.units(GraphConvolution().eval(), example_inputs=inputs)
    described = {name: found.describe(reading.numbers) for name, reading in found.readings.items()}
    assert described == {
        "gc1.weight": "6: input features",
        "gc2.weight": "16: gc1.weight",
        "head.weight": "16: gc2.weight",
    }


def test_gpt_2_s_layers_read_units_through_their_views():
    build, inputs, _ = MODELS["gpt-2 feed-forward"]
    for example_inputs in (None, inputs()):
        found = biofx.units(build(), example_inputs=example_inputs)
        assert found.describe(found.readings["c_proj.weight"].numbers) == "16: c_fc.weight"


def test_a_tied_weight_has_the_axes_of_its_head():
    """Tokens are inputs, and free, so that the use that reads units decides."""
    bio = biofx.transform(TiedLanguageModel(), [*EVERYTHING, passes.GroupUnits(2)])
    site = biofx.weight_sites(bio)["embedding.weight"]
    assert (site.operator, site.presynaptic_axis, site.postsynaptic_axis) == ("embedding, linear", 1, 0)
    assert site.sign.shape == (1, 8)
    assert "dales-principle" in site.passes
    summary = flat(biofx.summary(bio))
    for name in ("fuzzy-learning-rates", "synaptic-scaling"):  # the embedding returns other units than the head
        assert f"{name}: embedding, linear does not return its units on one axis" in summary


def test_uses_on_different_axes_return_no_units_to_observe():
    """Both operators read inputs, and have as many units as each other."""
    layer = Layer((4, 4, 1), lambda x, w: F.conv1d(x, w) + F.conv_transpose1d(x, w))
    bio = biofx.transform(layer, [passes.SynapticScaling(), *DIVERSE], example_inputs=torch.randn(2, 4, 5))
    assert "synaptic-scaling: conv1d, conv_transpose1d does not return its units on one axis" in " ".join(
        biofx.summary(bio).split()
    )


@pytest.mark.parametrize("crossed", [False, True])
def test_parts_of_a_weight_read_and_return_parts_of_its_units(crossed):
    inputs = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    model = FusedAttention(crossed=crossed)
    found = biofx.units(model, example_inputs=inputs)
    values = found.readings["out.weight"].numbers
    assert found.describe(values) == "4 of 12: qkv"
    first = found.populations[found.owner[values[0]]].name == "qkv" and int(values[0])
    units = found.members(int(found.owner[values[0]])).tolist()
    assert units.index(first) == 8  # values come from the last four rows
    reading = found.readings["qkv"]
    if crossed:  # queries and the rest read two populations by one axis, which need one sign then
        assert {found.populations[found.owner[n]].name for n in reading.sources} == {"embed.weight", "context.weight"}
    else:
        assert found.describe(reading.numbers) == "4: embed.weight"
    bio = biofx.transform(model, EVERYTHING, example_inputs=inputs)
    calls = biofx.weight_sites(bio)["qkv"].calls
    assert [call.use.units for call in calls] == [4, 4, 4]
    understood = understand(model, inputs)
    reads = [read for read in understood.forms.reads if read.parameter.name == "qkv"]
    positions = [read.postsynaptic_positions(read.axes()).tolist() for read in reads]
    assert positions == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert "synaptic-scaling: not each of its uses returns all of its units" in flat(biofx.summary(bio))


def test_a_sum_of_weights_has_no_sign():
    bio = biofx.transform(LoRA(merged=True), [passes.DalesPrinciple(inputs="mixed"), passes.SplitSynapses(2)])
    summary, sites = flat(biofx.summary(bio)), biofx.weight_sites(bio)
    assert "dales-principle: not judged: its operator reads the sum of it and something else" in summary
    reason = "matmul computes the weight that its operator reads from it"
    assert {name: site.unmet(Need.AXES) for name, site in sites.items()} == {"base": None, "a": reason, "b": reason}
    assert all(site.passes == ("split-synapses",) for site in sites.values())


def test_a_row_for_padding_is_no_synapse():
    model = Words(padding_idx=0)
    nn.init.ones_(model.words.weight)
    bio = biofx.transform(model, [passes.Rejuvenate(dre=0.1, rule="threshold"), passes.L1Regularization(0.1)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    bio(torch.randint(9, (4, 3))).sum().backward()
    optimizer.step()
    assert bio.words.weight[0].eq(1).all()
    assert int(bio.words.weight_synapses.replaced) > 0
