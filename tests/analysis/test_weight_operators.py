"""Weight operators and weight paths: whichever operator reads a weight, and however it gets there."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import biofx
from biofx import passes
from biofx.analysis.understanding import understand
from biofx.recording.inputs import guess
from biofx.weights.facts import Need
from conftest import gradients, tensors, times_listed
from models.composite import GraphConvolution, normalised_adjacency
from models.weights import KINDS, MODELS, PATHS, FusedAttention, Layer, LoRA, Network, TiedLanguageModel, Words

ALL = {**KINDS, **PATHS}
DIVERSE = [passes.SplitSynapses(3), passes.FuzzyLearningRates()]


@pytest.fixture(params=ALL)
def kind(request):
    return ALL[request.param]


@pytest.fixture
def layer(kind):
    return Layer(kind.shape, kind.function).double()


@pytest.fixture
def x(kind):
    return torch.randn(kind.inputs, dtype=torch.float64)


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    build, inputs, weights = MODELS[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight norm
        model = build().double().eval()
    doubled = tuple(t.double() if t.is_floating_point() else t for t in inputs())
    return model, doubled, weights


def only(bio):
    (site,) = biofx.weight_sites(bio).values()
    return site


# --- one operator ----------------------------------------------------------------------------------------------------


def test_axes(kind, layer, x):
    site = only(biofx.transform(layer, DIVERSE, example_inputs=(x,)))
    assert (site.operator, site.presynaptic_axis, site.postsynaptic_axis) == (kind.name, kind.pre, kind.post)
    assert (site.presynaptic_units, site.units) == (4, 8)


def test_the_axes_are_those_along_which_units_act(kind, layer, x):
    """Silencing a presynaptic unit = zeroing its slice of the weight; likewise the output of a postsynaptic one."""
    site = only(biofx.transform(layer, DIVERSE, example_inputs=(x,)))
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


def test_splitting_preserves_outputs_and_scales_gradients(layer, x):
    bio = biofx.transform(layer, DIVERSE, example_inputs=(x,))
    torch.testing.assert_close(bio(x), layer(x))
    plain, site = gradients(layer, x)["weight"], only(bio)
    torch.testing.assert_close(gradients(bio, x)["weight"], site.gain * plain / 3)


def test_folds_to_the_plain_weight(layer, x):
    bio = biofx.transform(layer, DIVERSE, example_inputs=(x,))
    with torch.no_grad():
        bio.get_parameter("weight").add_(torch.randn_like(bio.get_parameter("weight")) * 0.1)
    plain = biofx.fold(bio)
    assert torch.equal(plain(x), bio(x))
    layer.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(layer(x), bio(x))


@pytest.mark.parametrize("constraint", ["project", "abs", "softplus"])
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


@pytest.mark.parametrize("activation", [None, "tanh"])
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
        assert "its operator's bias is computed" in " ".join(biofx.summary(bio).split())
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
    assert "something else than its operator reads the weight" in biofx.summary(bio)


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


def test_which_parameters_are_synapses(model_and_inputs):
    model, inputs, weights = model_and_inputs
    bio = biofx.transform(model, DIVERSE, example_inputs=inputs)
    assert set(biofx.weight_sites(bio)) >= weights
    assert {name for name, site in biofx.weight_sites(bio).items() if site.passes} >= weights


def test_the_summary_lists_every_parameter_once(model_and_inputs):
    model, inputs, _ = model_and_inputs
    summary = biofx.summary(biofx.transform(model, DIVERSE, example_inputs=inputs))
    assert {name: times_listed(summary, name) for name, _ in model.named_parameters()} == {
        name: 1 for name, _ in model.named_parameters()
    }


def test_function_gradients_and_fold_are_exact(model_and_inputs):
    model, inputs, _ = model_and_inputs
    bio = biofx.transform(model, DIVERSE, example_inputs=inputs).eval()
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


EVERYTHING = [
    passes.SplitSynapses(2),
    passes.DalesPrinciple(excitatory=0.5, balance=False),
    passes.FuzzyLearningRates(distribution="activity"),
    passes.VolumeDependentLearningRates(),
    passes.Crystallize(),
    passes.Rejuvenate(),
    passes.SynapticScaling(on="weight"),
    passes.L1Regularization(1e-3),
]


@pytest.mark.parametrize("optimizer_name", ["SGD", "Adam"])
@pytest.mark.parametrize("balance", [False, True])
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
    summary = " ".join(biofx.summary(bio).split())
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
    assert "synaptic-scaling: not each of its uses returns all of its units" in " ".join(biofx.summary(bio).split())


def test_a_sum_of_weights_has_no_sign():
    bio = biofx.transform(LoRA(merged=True), [passes.DalesPrinciple(inputs="mixed"), passes.SplitSynapses(2)])
    summary, sites = biofx.summary(bio), biofx.weight_sites(bio)
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


# --- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "embedding changes it in forward, as max_norm is set"),
        ({"sparse": True}, "embedding gives it a sparse gradient, and rules act on every entry"),
        ({"scale_grad_by_freq": True}, "embedding divides its gradient by the frequency of tokens"),
    ],
)
def test_embeddings_with_rules_of_their_own_are_left_alone(options, reason):
    model, tokens = Words(**options), torch.randint(9, (4, 3))
    expected = copy.deepcopy(model)(tokens)
    bio = biofx.transform(model, DIVERSE)
    assert f"words.weight: {reason}" in biofx.summary(bio)
    assert list(biofx.weight_sites(bio)) == ["head.weight"]
    torch.testing.assert_close(bio(tokens), expected)


def shaped(function, *shape):
    return lambda: Layer(shape, function)


LEFT = {
    "diagonal": (shaped(lambda x, w: torch.einsum("bi,ii->bi", x, w), 4, 4), "used by einsum in odd"),
    "only parameters": (
        shaped(lambda x, w: x + (w @ w.t()).sum(), 4, 4),
        "add in odd reads what matmul in odd computes from it, but not as a weight",
    ),
    "negative alpha": (
        shaped(lambda x, w: torch.addmm(x, x, w, alpha=-1), 4, 4),
        "addmm multiplies it with -1, not with a number above 0",
    ),
    "whole numbers": (
        shaped(lambda x, w: F.linear(x, w.int().to(x.dtype)), 4, 4),
        "forward takes whole numbers from it, by int in odd",
    ),
    "modulated": (shaped(lambda x, w: x @ (w * x.mean()), 4, 4), "used by mul"),
    "in place, on a view": (
        shaped(lambda x, w: F.linear(x, w.t().mul_(1.0)), 4, 4),
        "forward changes it in place, by mul_",
    ),
    "in place, by a function": (
        shaped(lambda x, w: F.linear(x, torch.relu_(w)), 4, 4),
        "forward changes it in place, by relu_",
    ),
    "integers": (
        lambda: _with(Layer((4, 4), lambda x, w: F.linear(x, w.float())), torch.ones(4, 4).int()),
        "torch.int32",
    ),
    "complex": (
        lambda: _with(Layer((4, 4), lambda x, w: F.linear(x.cfloat(), w).real), torch.ones(4, 4).cfloat()),
        "its dtype is torch.complex64, and synapses are real numbers",
    ),
    "sparse": (
        lambda: _with(Layer((4, 4), lambda x, w: w @ x.t()), torch.eye(4).to_sparse()),
        "its layout is torch.sparse_coo, and synapses need a dense one",
    ),
}


def _with(layer, value):
    layer.weight = nn.Parameter(value, requires_grad=value.is_floating_point())
    return layer


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone_has_a_reason_and_computes_the_same(case):
    build, reason = LEFT[case]

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.plain = build(), nn.Linear(4, 4)

        def forward(self, x):
            return self.odd(self.plain(x))

    model, x = Beside(), torch.randn(3, 4)
    if "in place" in case:
        model.odd.weight.requires_grad_(False)
    expected = model(x)
    bio = biofx.transform(model, DIVERSE, inplace=case == "sparse")  # copy.deepcopy refuses sparse parameters
    assert list(biofx.weight_sites(bio)) == ["plain.weight"]
    assert reason in biofx.summary(bio)
    torch.testing.assert_close(bio(x), expected)


def test_axes_that_are_lost_leave_what_needs_no_axes():
    """One weight for all outputs of a unit: the axis of postsynaptic units is not that of a weight."""
    model = nn.Sequential(Layer((1, 4), lambda x, w: F.linear(x, w.expand(8, 4))), nn.ReLU(), nn.Linear(8, 2))
    bio = biofx.transform(model, [*DIVERSE, passes.DalesPrinciple(), passes.GroupUnits(2)])
    assert biofx.weight_sites(bio)["0.weight"].passes == ("split-synapses", "fuzzy-learning-rates")
    reason = "which of its axes run over units is lost on the way to linear"
    assert f"dales-principle: {reason}" in biofx.summary(bio)
    assert f"group-units: {reason}" in biofx.summary(bio)


@st.composite
def layouts(draw):
    """A shape, and a layout of it as a matrix: permutations, views and parts, in any order."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4))
    steps, value = [], torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["permute", "unflatten", "flatten", "narrow", "unsqueeze"]))
        axis = draw(st.integers(0, value.dim() - 1))
        if kind == "permute":
            args = (draw(st.permutations(range(value.dim()))),)
        elif kind == "unflatten":
            args = (axis, (draw(st.sampled_from([n for n in (1, 2, 3, 4) if value.shape[axis] % n == 0])), -1))
        elif kind == "flatten":
            args = (axis, min(axis + 1, value.dim() - 1))
        else:
            args = (axis, 0, draw(st.integers(1, value.shape[axis]))) if kind == "narrow" else (axis,)
        steps.append((kind, args))
        value = getattr(value, kind)(*args)
    cut = draw(st.integers(1, value.dim() - 1)) if value.dim() > 1 else 0
    steps += [("flatten", (cut, -1)), ("flatten", (0, cut - 1))] if cut else [("unsqueeze", (0,))]
    return tuple(shape), steps


def test_gathered_rows_return_units_in_another_order():
    gathered = Layer((8, 4), lambda x, w: F.linear(x, w[[3, 0, 1, 2, 7, 4, 6, 5]]))
    model = Network(gathered, -1, 8)
    found = biofx.units(model, example_inputs=(torch.randn(3, 4),))
    numbers = found.readings["head.weight"].numbers
    assert found.describe(numbers) == "8: layer.weight"
    assert (numbers - numbers.min()).tolist() == [3, 0, 1, 2, 7, 4, 6, 5]
    bio = biofx.transform(model, [passes.SynapticScaling()], example_inputs=(torch.randn(3, 4),))
    assert "layer.weight" in biofx.summary(bio)
    assert biofx.weight_sites(bio)["layer.weight"].unmet(Need.OUTPUT) == "linear does not return its units on one axis"


def test_a_concatenated_weight_has_no_axes_but_synapses():
    layer, x = Layer((4, 4), lambda x, w: F.linear(x, torch.cat([w, w]))), torch.randn(3, 4)
    bio = biofx.transform(layer, DIVERSE, example_inputs=(x,))
    reason = "cat computes the weight that its operator reads from it"
    assert (only(bio).unmet(Need.AXES), only(bio).unmet(Need.UNITS)) == (reason, reason)
    torch.testing.assert_close(bio(x), layer(x))
    torch.testing.assert_close(biofx.fold(bio)(x), layer(x))


def test_padding_of_a_weight_is_none_of_its_entries():
    layer, x = Layer((4, 3), lambda x, w: F.linear(x, F.pad(w, (1, 0)))), torch.randn(3, 4)
    bio = biofx.transform(layer, DIVERSE, example_inputs=(x,))
    assert only(bio).unmet(Need.AXES) == "pad computes the weight that its operator reads from it"
    torch.testing.assert_close(bio(x), layer(x))


@given(layouts())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
def test_whatever_the_layout_each_unit_has_its_entries(drawn):
    """The entries of a presynaptic unit are those that the operator reads in the unit's columns; likewise rows."""
    shape, steps = drawn

    def as_read(w):
        for kind, args in steps:
            w = getattr(w, kind)(*args)
        return w

    layer = Layer(shape, lambda x, w: F.linear(x, as_read(w)))
    rows, columns = as_read(torch.zeros(shape)).shape
    (read,) = understand(layer, (torch.randn(2, columns),)).forms.reads
    axes = read.axes()
    assume(axes is not None)  # unless a layout mixes units
    pre, post = read.presynaptic_positions(axes), read.postsynaptic_positions(axes)
    units, presynaptic = torch.arange(axes.units), torch.arange(axes.presynaptic_units)
    assert torch.equal(as_read(axes.spread(units).expand(shape)), post[:, None].expand(rows, columns))
    assert torch.equal(as_read(axes.spread_presynaptic(presynaptic).expand(shape)), pre.expand(rows, columns))
    weight = torch.randn(shape)
    assert torch.equal(axes.from_incoming(axes.incoming(weight)), weight)


def test_a_layout_that_copies_is_followed():
    mixed = shaped(lambda x, w: F.linear(x, w.t().reshape(2, 16).t().reshape(8, 4)), 8, 4)()
    x = torch.randn(3, 4)
    site = only(biofx.transform(mixed, DIVERSE, example_inputs=(x,)))
    assert (site.presynaptic_units, site.units) == (4, 8)
    assert (site.axes.presynaptic, site.axes.postsynaptic) == ((0, 1), (0, 1))
    for unit in range(4):
        silenced, without = x.clone(), site.effective().detach().clone()
        columns = [c for c in range(4) if _acts(mixed, site, unit, c)]
        silenced[:, columns] = 0
        without[site.spread_presynaptic(torch.arange(4)).expand(8, 4) == unit] = 0
        assert len(columns) == 1
        torch.testing.assert_close(mixed.function(x, without), mixed(silenced))


def _acts(layer, site, unit, column):
    """Whether a column of what is read is made of a unit's entries."""
    own = (site.spread_presynaptic(torch.arange(site.presynaptic_units)).expand(site.shape) == unit).float()
    return bool(layer.function(torch.eye(4)[column], own).any())


def test_nested_and_quantized_parameters_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(4, 4)
            self.nested = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
            quantized = torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)
            self.quantized = nn.Parameter(quantized, requires_grad=False)

        def forward(self, x):
            return F.linear(self.plain(x), self.quantized.dequantize()) + self.nested.to_padded_tensor(0.0).sum()

    bio = biofx.transform(Odd(), DIVERSE, example_inputs=torch.randn(2, 4))
    assert list(biofx.weight_sites(bio)) == ["plain.weight"]
    assert "nested: its layout is nested, and synapses need a dense one" in biofx.summary(bio)
    assert "quantized: its dtype is torch.qint8, and synapses are real numbers" in biofx.summary(bio)


def test_a_weight_without_elements():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty, self.head = Layer((0, 3), lambda x, w: x @ w), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.empty(x))

    model, x = Beside(), torch.ones(2, 0)
    for inputs in (None, (x,)):
        bio = biofx.transform(model, EVERYTHING, example_inputs=inputs)
        assert list(biofx.weight_sites(bio)) == ["head.weight"]
        assert "empty.weight: it has no entries" in biofx.summary(bio)
        assert bio(x).shape == (2, 2)
        assert biofx.fold(bio).empty.weight.shape == (0, 3)
    torch.testing.assert_close(biofx.transform(model, DIVERSE)(x), model(x))


# --- weights that are computed from what is learned ------------------------------------------------------------------

ROOTS = {
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
@pytest.mark.parametrize("name", ROOTS)
def test_the_root_itself_can_be_reparametrized(name, frontend, inplace):
    if (name, frontend) == ("old spectral norm", "symbolic"):
        pytest.skip("its hook cannot be traced")
    model, x = ROOTS[name]().eval(), torch.randn(2, 4)
    expected = model(x)
    bio = biofx.transform(model, DIVERSE, frontend=frontend, inplace=inplace, example_inputs=x)
    torch.testing.assert_close(bio(x), expected)
    bio(x).sum().backward()
    with torch.no_grad():
        for p in bio.parameters():
            p.sub_(p.grad if p.grad is not None else 0)
    assert not torch.allclose(bio(x), expected)  # it reads what is learned, not what once was computed
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


def test_masks_stay_and_signs_are_those_behind_them():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), prune.l1_unstructured(nn.Linear(8, 3), "weight", 0.5))
    bio = biofx.transform(model, [passes.DalesPrinciple(excitatory=0.5), *DIVERSE])
    site = biofx.weight_sites(bio)["2.weight_orig"]
    assert (site.presynaptic_axis, site.postsynaptic_axis) == (1, 0)
    assert site.sign is not None
    mask = model[2].weight_mask
    x = torch.randn(5, 8).abs()
    effect = torch.autograd.functional.jacobian(lambda h: F.linear(h, site.effective() * mask), x[0])
    assert ((effect > 0).any(0) & (effect < 0).any(0)).sum() == 0
    assert torch.equal((effect == 0) | (mask == 1), torch.ones_like(mask, dtype=torch.bool))
    assert torch.equal(biofx.fold(bio).get_submodule("2").weight_mask, mask)


ORTHOGONAL = "cat in {} computes the weight that its operator reads from it"


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_an_orthogonal_weight_stays_orthogonal_and_has_no_axes(frontend):
    build, inputs, weights = MODELS["orthogonal"]
    model, (x,) = build(), inputs()
    bio = biofx.transform(model, [*EVERYTHING, passes.GroupUnits(2)], frontend=frontend, example_inputs=x)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        bio(x).square().sum().backward()
        optimizer.step()
    summary, sites = " ".join(biofx.summary(bio).split()), biofx.weight_sites(bio)
    assert set(sites) == weights
    for index in (2, 4):
        site = sites[f"{index}.parametrizations.weight.original"]
        reason = ORTHOGONAL.format(f"{index}.parametrizations.weight.0")
        assert (site.operator, site.axes, site.unmet(Need.AXES)) == ("linear", None, reason)
        axis_free = ["crystallize", "l1-regularization", "rejuvenate", "split-synapses"]
        assert sorted(site.passes) == [*axis_free, "volume-dependent-learning-rates"]
        assert f"dales-principle: {reason}" in summary
        assert (f"group-units: {reason}" in summary) is (frontend != "module")
    assert "forward takes whole numbers from it, by int in 6.parametrizations.weight.0" in summary
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    for layer in (model[2], model[4], model[6]):
        w = layer.weight if len(layer.weight) <= 4 else layer.weight.T
        torch.testing.assert_close(w @ w.T, torch.eye(4))


def test_units_are_followed_out_of_an_orthogonal_weight_only():
    build, inputs, _ = MODELS["orthogonal"]
    found = biofx.units(build(), example_inputs=inputs())
    assert set(found.readings) == {"0.weight", "8.weight"}
    network = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))
    found = biofx.units(network, example_inputs=inputs())
    assert found.describe(found.readings["2.weight"].numbers) == "4: 0.parametrizations.weight.original"


def test_parametrizations_of_one_s_own_are_traced():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).mT

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[1], "weight", Symmetric())
    bio = biofx.transform(model, DIVERSE, example_inputs=(x,))
    doubled, symmetric = biofx.weight_sites(bio).values()
    assert (doubled.presynaptic_axis, doubled.postsynaptic_axis, doubled.unmet(Need.UNITS)) == (1, 0, None)
    assert symmetric.axes is None  # each entry is used both ways
    assert (
        symmetric.unmet(Need.AXES)
        == "add in 1.parametrizations.weight.0 computes the weight that its operator reads from it"
    )
    torch.testing.assert_close(bio(x), model(x))
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    torch.testing.assert_close(model(x), bio(x))


def test_a_tensor_subclass_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    bio = biofx.transform(model, DIVERSE, inplace=True)
    assert "0.weight: it is a TwoTensor, and biofx rewrites plain tensors only" in biofx.summary(bio)
