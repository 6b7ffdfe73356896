"""Figures: what they show, not how it looks."""

import sys

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

import biofx
from biofx import passes, plot
from models.small import mlp

NEUTRAL = "fuzzy-learning-rates{distribution=baseline}"


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture(scope="module")
def recorded():
    torch.manual_seed(0)
    bio = biofx.transform(mlp(4, 6, 3), "fuzzy-learning-rates{nu=0.3},crystallize{floor=0.2},rejuvenate{dre=4.0}")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    with biofx.record(bio, optimizer, every=1) as history:
        for _ in range(3):
            bio(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
    return history


def signed(*columns):
    """A network whose second weight has these columns."""
    model = nn.Sequential(nn.Linear(3, len(columns)), nn.ReLU(), nn.Linear(len(columns), len(columns[0])))
    model[2].weight.data.copy_(torch.tensor(columns).T)
    return model


def named(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("quantity", "column", "bands"),
    [
        ("gain", "gain_mean", 1),
        ("learning_rate", "learning_rate", 0),
        ("crystallized", "crystallized", 0),
        ("turnover", "turnover", 0),
        ("excitation", "excitation", 0),
        ("weight", "weight_q50", 2),
    ],
)
def test_a_line_for_each_weight_shows_the_recorded_numbers(recorded, ax, quantity, column, bands):
    assert plot.history(recorded, quantity, ax=ax) is ax
    lines = named(ax)
    assert [*lines] == legend(ax) == ["0.weight", "2.weight"]
    for name, line in lines.items():
        rows = [row for row in recorded.rows if row["weight"] == name]
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        assert list(line.get_ydata()) == [row[column] for row in rows]
    assert len(ax.collections) == 2 * bands
    assert ax.get_xlabel() == "optimizer step"
    assert ax.get_ylabel()


def test_the_band_of_gains_is_one_deviation_within_their_range(recorded, ax):
    plot.history(recorded, weights=["2.weight"], ax=ax)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for row in (row for row in recorded.rows if row["weight"] == "2.weight"):
        low = max(row["gain_mean"] - row["gain_std"], row["gain_min"])
        high = min(row["gain_mean"] + row["gain_std"], row["gain_max"])
        here = corners[corners[:, 0] == row["step"], 1]
        assert (here.min(), here.max()) == pytest.approx((low, high))


def test_chosen_weights_only(recorded, ax):
    assert [*named(plot.history(recorded, "turnover", weights=["2.weight"], ax=ax))] == ["2.weight"]


def test_many_weights_have_many_colours_and_a_short_legend(ax):
    bio = biofx.transform(mlp(*[3] * 31), NEUTRAL)
    plot.history(biofx.record(bio, torch.optim.SGD(bio.parameters(), lr=0.1)), "weight", ax=ax)
    lines = named(ax)
    assert len({to_hex(line.get_color()) for line in lines.values()}) == len(lines) == 30
    assert len(legend(ax)) == 12
    assert (legend(ax)[0], legend(ax)[-1]) == ("0.weight", "58.weight")


def test_wrong_arguments_of_a_history_are_refused(recorded, ax):
    with pytest.raises(biofx.ArgumentError, match="one of gain, learning_rate, .*, weight; got 'gains'"):
        plot.history(recorded, "gains", ax=ax)
    with pytest.raises(biofx.ArgumentError, match='no weight "1.weight"; it has 0.weight, 2.weight'):
        plot.history(recorded, weights=["1.weight"], ax=ax)
    with pytest.raises(biofx.ArgumentError, match="give what biofx.record returned; got Linear"):
        plot.history(nn.Linear(2, 2), ax=ax)
    bio = biofx.transform(nn.Linear(2, 2), NEUTRAL)
    history = biofx.record(bio, torch.optim.SGD(bio.parameters(), lr=0.1))
    with pytest.raises(
        biofx.ArgumentError, match='none of the weights has the quantity "turnover"; it takes passes.Rejuvenate'
    ):
        plot.history(history, "turnover", ax=ax)


def test_columns_are_sorted_from_excitation_to_inhibition(ax):
    columns = [[-1.0, -2], [1, -3], [0, 0], [1, 2], [3, -1], [2, 1]]
    plot.weights(signed(*columns), "2.weight", ax=ax)
    expected = torch.tensor([columns[index] for index in (3, 5, 4, 1, 0, 2)]).T
    assert torch.equal(torch.tensor(ax.images[0].get_array()).float(), expected)
    (strip,) = ax.child_axes
    assert strip.images[0].get_array().tolist() == [[1, 1, 3, 3, 2, 0]]
    assert ax.get_xlabel() == "presynaptic positions: 2 excite, 1 inhibit, 2 mixed, 1 silent"
    assert (ax.get_ylabel(), ax.get_title(loc="left")) == ("postsynaptic unit", "2.weight")


def test_colours_are_centred_at_zero(ax):
    plot.weights(signed([-1.0, -2], [1, 9]), "2.weight", ax=ax)
    low, high = ax.images[0].get_clim()
    assert -low == high == 9
    assert to_hex(ax.images[0].cmap(0.5))[1:] >= "fe0000"
    assert to_hex(ax.images[0].cmap(0.0)) != to_hex(ax.images[0].cmap(1.0))


@pytest.mark.parametrize(
    ("layer", "shape", "label"),
    [
        (nn.Linear(8, 4), (4, 8), "postsynaptic unit"),
        (nn.Conv2d(8, 4, 3), (36, 8), "outgoing connection"),
        (nn.ConvTranspose1d(8, 4, 3), (12, 8), "outgoing connection"),
    ],
)
def test_columns_are_presynaptic_whatever_the_layer(ax, layer, shape, label):
    bio = biofx.transform(layer, [passes.SplitSynapses(2)])
    plot.weights(bio, "weight", ax=ax)
    assert ax.images[0].get_array().shape == shape
    assert ax.get_ylabel() == label
    site = biofx.weight_sites(bio)["weight"]
    total = float(site.effective().detach().double().sum())
    assert float(ax.images[0].get_array().sum()) == pytest.approx(total)


def test_a_model_that_needs_inputs_is_given_as_its_units(ax):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            assert x.shape[0] == 7
            return self.fc(x)

    model = Picky()
    for figure in (lambda m: plot.weights(m, "fc.weight", ax=ax), lambda m: plot.units(m, ax=ax)):
        with pytest.raises(biofx.ArgumentError, match=r"give biofx.units\(model, example_inputs\) here"):
            figure(model)
    plot.weights(biofx.units(model, torch.randn(7, 4)), "fc.weight", ax=ax)
    assert ax.images[0].get_array().shape == (3, 4)


@pytest.mark.parametrize("figure", [plot.weights, plot.eigenvalues, plot.singular_values])
def test_an_unknown_weight_names_those_that_exist(ax, figure):
    for model in (mlp(2, 2, 2), biofx.transform(mlp(2, 2, 2), NEUTRAL)):
        with pytest.raises(biofx.ArgumentError, match='the model has no weight "1.weight"; it has 0.weight, 2.weight'):
            figure(model, "1.weight", ax=ax)


@pytest.mark.parametrize("figure", [plot.weights, plot.eigenvalues, plot.singular_values])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(ax, figure, value):
    model = mlp(3, 3, 3)
    model[2].weight.data[1, 0] = value
    for each in (model, biofx.units(model, torch.randn(2, 3))):
        with pytest.raises(biofx.ArgumentError, match=r"2\.weight has values that are not finite"):
            figure(each, "2.weight", ax=ax)


def test_gains_that_are_not_finite_are_refused(ax):
    bio = biofx.transform(mlp(3, 3, 3), "fuzzy-learning-rates")
    biofx.weight_sites(bio)["2.weight"].state("gain")[0, 1] = float("inf")
    with pytest.raises(biofx.ArgumentError, match=r"plot.gains: 2\.weight has gains that are not finite"):
        plot.gains(bio, ax=ax)


def test_eigenvalues_are_those_of_the_matrix(ax):
    rnn = nn.RNN(2, 3)
    rnn.weight_hh_l0.data.copy_(torch.tensor([[0.0, -2, 0], [2, 0, 0], [0, 0, 0.5]]))
    plot.eigenvalues(rnn, "weight_hh_l0", ax=ax)
    unit, radius, points = named(ax).values()
    found = sorted(zip(points.get_xdata(), points.get_ydata(), strict=True))
    assert found == [pytest.approx(each) for each in ((0, -2), (0, 2), (0.5, 0))]
    assert legend(ax) == ["unit circle", "spectral radius 2", "3 eigenvalues"]
    assert (unit.get_xdata().max(), radius.get_xdata().max()) == pytest.approx((1, 2))
    assert ax.get_aspect() == 1


def test_eigenvalues_of_a_transformed_model_are_effective(ax):
    bio = biofx.transform(nn.Linear(4, 4), [passes.SplitSynapses(3)])
    plot.eigenvalues(bio, "weight", ax=ax)
    expected = torch.linalg.eigvals(biofx.weight_sites(bio)["weight"].effective().detach().double())
    assert max(named(ax)["4 eigenvalues"].get_xdata()) == pytest.approx(expected.real.max().item())


def test_a_matrix_that_is_not_square_is_refused(ax):
    with pytest.raises(biofx.ArgumentError, match="weight_hh_l0 is 12 × 3, .*; use plot.singular_values"):
        plot.eigenvalues(nn.LSTM(2, 3), "weight_hh_l0", ax=ax)


def test_singular_values_are_those_of_incoming_connections(ax):
    layer = nn.Conv1d(2, 3, 2)
    plot.singular_values(layer, "weight", ax=ax)
    expected = torch.linalg.svdvals(layer.weight.detach().double().flatten(1))
    (line,) = ax.lines
    torch.testing.assert_close(torch.tensor(line.get_ydata()), expected)
    assert [*line.get_xdata()] == [1, 2, 3]
    assert ax.get_title(loc="left") == f"weight: stable rank {float(expected.square().sum() / expected[0] ** 2):.3g}"


def test_every_unit_is_a_square_with_its_effect(ax):
    model = signed([-1.0, -2], [1, -3], [0, 0], [1, 2])
    plot.units(model, ax=ax)
    (mesh,) = ax.collections
    assert mesh.get_array().tolist() == [[2, 3, 0, 1]]
    assert legend(ax) == ["1 excite", "1 inhibit", "1 mixed", "1 silent"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.weight\n4 units"]


def test_populations_stand_in_blocks_and_can_be_chosen(ax):
    bio = biofx.transform(mlp(3, 40, 30, 2), [passes.DalesPrinciple(excitatory=0.5, balance=False)])
    plot.units(bio, ax=ax)
    assert ax.collections[0].get_array().count() == 70  # the rest of a block is masked
    assert legend(ax) == ["35 excite", "35 inhibit"]
    other = Figure().subplots()
    plot.units(bio, "2.weight", ax=other)
    assert other.collections[0].get_array().count() == 30
    with pytest.raises(biofx.ArgumentError, match='no population "4.weight"; it has 0.weight, 2.weight'):
        plot.units(bio, "4.weight", ax=ax)


def test_units_of_a_weight_that_cannot_be_judged_are_not_judged(ax):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x).relu()
            return h @ self.second.weight + self.second(h)  # along both of its axes

    plot.units(Twice(), ax=ax)
    assert any(text.endswith("not judged") for text in legend(ax))


def test_a_model_without_units_that_are_read_is_refused(ax):
    with pytest.raises(biofx.ArgumentError, match="no weight reads a unit of the network"):
        plot.units(nn.Linear(2, 2), ax=ax)


def test_gains_have_a_histogram_for_each_weight(ax):
    bio = biofx.transform(mlp(4, 6, 3), [passes.FuzzyLearningRates()], exclude="2.weight")
    gain = biofx.weight_sites(bio)["0.weight"].gain
    gain.view(-1).copy_(torch.tensor([0.0] * 6 + [0.1] * 4 + [0.5] * 4 + [1.0] * 9 + [3.0]))
    plot.gains(bio, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.weight\n41.7% crystallized, 25.0% at 0"]
    assert ax.get_xscale() == "log"
    patches = {to_hex(patch.get_facecolor()): patch.get_data() for patch in ax.patches}
    above, below = patches[plot.BLUE.lower()], patches[plot.ORANGE.lower()]
    assert sorted(below.values[below.values > 0]) == pytest.approx([0.85 * 2 / 3])  # roots of 4 and 9
    assert sorted(above.values[above.values > 0]) == pytest.approx([0.85 / 3, 0.85 * 2 / 3, 0.85])
    assert below.edges[-1] == above.edges[0] == pytest.approx(0.5)


def test_wrong_arguments_of_gains_are_refused(ax):
    with pytest.raises(biofx.ArgumentError, match="no pass gave these weights gains"):
        plot.gains(biofx.transform(nn.Linear(2, 2), "split-synapses"), ax=ax)
    bio = biofx.transform(nn.Linear(2, 2), [passes.FuzzyLearningRates()])
    with pytest.raises(biofx.ArgumentError, match='no weight "fc"; it has weight'):
        plot.gains(bio, weights=["fc"], ax=ax)
    with pytest.raises(biofx.ArgumentError, match="expected a model made by biofx.transform"):
        plot.gains(nn.Linear(2, 2), ax=ax)


def test_figures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        biofx.ExportError, match=r"plot.gains: matplotlib is not installed; pip install 'biofx\[draw\]'"
    ):
        plot.gains(biofx.transform(nn.Linear(2, 2), [passes.FuzzyLearningRates()]))
