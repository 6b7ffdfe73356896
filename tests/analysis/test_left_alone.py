"""Parameters and axes that no rule can act on: left alone with a reason, and the model computes what it did."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.analysis.understanding import understand
from biofx.weights.facts import Need
from conftest import flat, only
from models.weights import Layer, Network, Words
from pipelines import DIVERSE, EVERYTHING

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
    assert f"words.weight: {reason}" in flat(biofx.summary(bio))
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
    assert reason in flat(biofx.summary(bio))
    torch.testing.assert_close(bio(x), expected)


class Steps(nn.Module):
    """Yields what each layer returns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            yield x


def test_what_a_generator_uses_shows_when_something_iterates():
    x, reason = torch.randn(3, 4), r"layers\.0\.weight: not used in forward: that of Steps is a generator function"
    with pytest.raises(biofx.ArgumentError, match=reason):
        biofx.transform(Steps(), DIVERSE, example_inputs=x)
    model = Steps()
    bio = biofx.transform(model, DIVERSE, example_inputs=lambda model: list(model(x)))
    assert list(biofx.weight_sites(bio)) == ["layers.0.weight", "layers.1.weight"]
    torch.testing.assert_close(list(bio(x)), list(model(x)))


def test_axes_that_are_lost_leave_what_needs_no_axes():
    """One weight for all outputs of a unit: the axis of postsynaptic units is not that of a weight."""
    model = nn.Sequential(Layer((1, 4), lambda x, w: F.linear(x, w.expand(8, 4))), nn.ReLU(), nn.Linear(8, 2))
    bio = biofx.transform(model, [*DIVERSE, passes.DalesPrinciple(), passes.GroupUnits(2)])
    assert biofx.weight_sites(bio)["0.weight"].passes == ("split-synapses", "fuzzy-learning-rates")
    reason = "which of its axes run over units is lost on the way to linear"
    assert f"dales-principle: {reason}" in flat(biofx.summary(bio))
    assert f"group-units: {reason}" in flat(biofx.summary(bio))


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
    assert "layer.weight" in flat(biofx.summary(bio))
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
    assert "nested: its layout is nested, and synapses need a dense one" in flat(biofx.summary(bio))
    assert "quantized: its dtype is torch.qint8, and synapses are real numbers" in flat(biofx.summary(bio))


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
        assert "empty.weight: it has no entries" in flat(biofx.summary(bio))
        assert bio(x).shape == (2, 2)
        assert biofx.fold(bio).empty.weight.shape == (0, 3)
    torch.testing.assert_close(biofx.transform(model, DIVERSE)(x), model(x))


@pytest.mark.parametrize("last", [lambda m, q: q, lambda m, q: q * m.scale])
def test_a_bias_of_learned_queries_is_no_weight(last):
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.scale = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.ones(8))
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x):
            queries = last(self, self.q(self.queries.expand(len(x), 5, 8)))
            return (queries @ self.k(x).mT).softmax(-1) @ self.v(x)

    found = biofx.units(Queries(), torch.randn(3, 6, 4))
    assert found.sites.keys() == {"q.weight", "k.weight", "v.weight"}
    biases = {name for name in found.others if name.endswith(("bias", "scale"))}
    assert {found.others[name] for name in biases} == {"one value for each unit, not a synapse"}


# --- nothing to read -------------------------------------------------------------------------------------------------


class SometimesReads(nn.Module):
    """An expert gets the samples whose first number is above 5."""

    def __init__(self, of=lambda x: x):
        super().__init__()
        self.a, self.expert, self.b, self.of = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), of

    def forward(self, x):
        hidden, chosen = self.a(x).relu(), (x[:, 0] > 5).nonzero()[:, 0]
        return self.b(hidden.index_add(0, chosen, self.of(self.expert(hidden[chosen]))))


@pytest.mark.parametrize("passes_", ["split-synapses", "dales-principle", "mirror-units", "continual-backprop"])
def test_an_expert_without_samples_is_not_judged(passes_):
    model, x = SometimesReads(), torch.randn(5, 3)
    bio = biofx.transform(model, passes_, example_inputs=x)
    verdicts = biofx.verify(bio)
    assert verdicts["expert.weight"].kind == "not judged"
    assert "nothing to read" in verdicts["expert.weight"].reason
    plain = biofx.fold(bio)
    for inputs in (x, torch.full((2, 3), 9.0)):
        torch.testing.assert_close(bio(inputs), plain(inputs))


@pytest.mark.parametrize(
    "of",
    [lambda x: F.normalize(x), lambda x: x - x.mean(1, keepdim=True), lambda x: F.avg_pool1d(x[:, None], 1)[:, 0]],
)
def test_sums_over_no_samples_are_followed(of):
    model, x = SometimesReads(of), torch.randn(5, 3)
    torch.testing.assert_close(biofx.transform(model, "split-synapses", example_inputs=x)(x), model(x))
