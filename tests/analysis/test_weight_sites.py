"""Weight sites: which parameters are synapses, and along which axes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.weights.axes import Axes
from conftest import flat
from models.small import CONVOLUTIONS, GROUPS, ConvNet, Functional, layer_and_input, mlp

SPLIT = [passes.SplitSynapses(3)]


def only_site(model, pipeline=SPLIT):
    (site,) = biofx.weight_sites(biofx.transform(model, pipeline)).values()
    return site


def test_linear():
    site = only_site(nn.Linear(4, 8))
    assert (site.postsynaptic_axis, site.presynaptic_axis) == (0, 1)


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, grouping):
    layer, _ = layer_and_input(kind, grouping)
    site = only_site(layer)
    groups = GROUPS[grouping]
    post, pre = site.postsynaptic_axis, site.presynaptic_axis
    assert (site.operator, site.groups) == (kind, groups)
    # A convolution's weight counts presynaptic units within a group; a transposed one's counts postsynaptic ones so.
    inside, outside = (post, pre) if "transpose" in kind else (pre, post)
    units = {pre: 4, post: 8}
    assert site.shape[outside] == units[outside]
    assert site.shape[inside] == units[inside] // groups


@pytest.mark.parametrize("kind", ["linear", *CONVOLUTIONS])
def test_the_axes_are_those_along_which_units_act(kind):
    """Silencing a presynaptic unit = zeroing its slice of the weight; likewise the output of a postsynaptic one."""
    layer, x = layer_and_input(kind, bias=False)
    site = only_site(layer)
    silenced = x.clone()
    silenced.select(1, 2).zero_()
    expected = layer(silenced)
    with torch.no_grad():
        layer.weight.select(site.presynaptic_axis, 2).zero_()
        torch.testing.assert_close(layer(x), expected)
        layer.weight.select(site.postsynaptic_axis, 5).zero_()
    assert not layer(x).select(1, 5).any()
    assert layer(x).select(1, 4).any()


def test_parameters_used_by_functional_operators():
    sites = biofx.weight_sites(biofx.transform(Functional(), SPLIT))
    assert list(sites) == ["kernel", "weights.0", "weights.1"]
    assert [site.groups for site in sites.values()] == [2, 1, 1]


def test_attributes_of_a_split_weight():
    model = nn.Linear(4, 8)
    site = only_site(model, [passes.SplitSynapses(3), passes.FuzzyLearningRates()])
    assert site.raw is site.bio.weight_synapses.weight
    assert site.raw.shape == site.gain.shape == (3, 8, 4)
    assert (site.synapses, site.shape, site.sign) == (3, (8, 4), None)
    torch.testing.assert_close(site.effective(), model.weight)
    site.effective().sum().backward()
    torch.testing.assert_close(site.raw.grad, site.gain / 3)


def test_attributes_of_an_untouched_weight():
    model = mlp(2, 3, 2)
    site = biofx.weight_sites(biofx.transform(model, SPLIT, exclude="2.*"))["2.weight"]
    assert (site.synapses, site.gain, site.sign, site.passes) == (1, None, None, ())
    assert torch.equal(site.effective(), model[2].weight)


def test_depth_is_the_longest_path():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shortcut, self.head = (nn.Linear(2, 2) for _ in range(4))

        def forward(self, x):
            return self.head(self.shortcut(x) + self.b(self.a(x)))

    sites = biofx.weight_sites(biofx.transform(Skip(), SPLIT))
    assert {name: site.depth for name, site in sites.items()} == {
        "a.weight": 0.0,
        "b.weight": 0.5,
        "shortcut.weight": 0.0,
        "head.weight": 1.0,
    }


class Confused(nn.Module):
    """A parameter that two operators read along different axes, one that none of them knows, and an island."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.randn(4, 4, 1))
        self.odd = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)
        self.rnn = nn.GRU(4, 4)

    def forward(self, x):
        y = F.conv1d(x, self.shared) + F.conv_transpose1d(x, self.shared)
        return self.fc(self.rnn(y[..., 0])[0]) * self.odd.cumsum(0)


def test_what_is_no_weight_site_has_a_reason():
    bio = biofx.transform(Confused(), SPLIT, example_inputs=torch.randn(4, 4, 4))
    assert list(biofx.weight_sites(bio)) == ["shared", "fc.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    text = flat(biofx.summary(bio))
    assert "odd: mul reads what cumsum computes from it, but not as a weight" in text
    assert "rnn (GRU): it is a leaf module, as modules of torch.nn are" in text
    assert "not synapses: fc.bias, rnn.bias_ih_l0, rnn.bias_hh_l0" in text


def test_a_parameter_read_as_an_input_is_said_to_be_one():
    class Perceiver(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            latents = self.latents.expand(x.shape[0], -1, -1)
            return latents + self.fc(latents) * x

    text = flat(biofx.summary(biofx.transform(Perceiver(), SPLIT, example_inputs=torch.randn(2, 3, 4))))
    assert "latents: linear in fc reads it as an input, not as a weight" in text


def test_a_quantized_module_has_a_reason():
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert " 2: its weights are packed for quantized operators" in flat(
        biofx.summary(biofx.transform(quantized, SPLIT))
    )
    with pytest.raises(biofx.ArgumentError, match="no weight that biofx can give synapses:\n  - 2: its weights are pa"):
        biofx.transform(quantized[2:], SPLIT)


def test_axes_are_compared_once_for_each_use(monkeypatch):
    compared = []
    agree = Axes.agree
    monkeypatch.setattr(Axes, "agree", lambda a, b: (compared.append(1), agree(a, b))[1])

    class Unrolled(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.fc, self.steps = nn.Linear(4, 4), steps

        def forward(self, x):
            for _ in range(self.steps):
                x = self.fc(x).tanh()
            return x

    counts = []
    for steps in (6, 11):  # 5 and 10 uses after the first
        compared.clear()
        biofx.transform(Unrolled(steps), [passes.MirrorUnits()])
        counts.append(len(compared))
    assert counts[1] <= 2 * counts[0]


def test_a_weight_with_other_readers_is_effective_everywhere():
    class Regularised(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x), self.fc.weight.norm()

    model = Regularised()
    bio = biofx.transform(model, SPLIT)
    torch.testing.assert_close(bio(torch.ones(3))[1], model(torch.ones(3))[1])
    assert bio.get_parameter("fc.weight").shape == (3, 3, 3)


def test_l1_is_the_sum_of_effective_magnitudes():
    model = ConvNet()
    bio = biofx.transform(model, SPLIT)
    expected = sum(w.abs().sum() for name, w in model.named_parameters() if w.dim() > 1)
    torch.testing.assert_close(biofx.l1(bio), expected)
    biofx.l1(bio).backward()
    torch.testing.assert_close(bio.get_parameter("head.weight").grad, (model.head.weight.sign() / 3).expand(3, -1, -1))


def test_l1_of_no_weight_at_all_is_refused():
    bio = biofx.transform(nn.Linear(2, 2), SPLIT)
    bio.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(biofx.ArgumentError, match="l1: all weights were replaced or removed.*; transform the model"):
        biofx.l1(bio)


@pytest.mark.parametrize("function", [biofx.weight_sites, biofx.l1, biofx.summary, biofx.verify, biofx.fold])
def test_a_plain_model_is_refused(function):
    with pytest.raises(
        biofx.ArgumentError, match="expected a model made by biofx.transform, got an instance of Linear"
    ):
        function(nn.Linear(2, 2))


def test_wrappers_are_looked_through():
    bio = biofx.transform(nn.Linear(2, 2), SPLIT)
    assert list(biofx.weight_sites(torch.compile(bio))) == ["weight"]
    assert biofx.summary(nn.DataParallel(bio)) == biofx.summary(bio)


def test_weights_that_other_methods_use_are_sites():
    """The graph of forward lacks them, but a run of the methods shows them."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head, self.decoder = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(torch.relu(self.encoder(x)))

        def reconstruct(self, x):
            return self.decoder(torch.relu(self.encoder(x)))

    x = torch.randn(5, 4)

    def run(m):
        return m(x), m.reconstruct(x)

    model = Autoencoder()
    bio = biofx.transform(model, [passes.SplitSynapses(), passes.DalesPrinciple()], example_inputs=run)
    assert {name: str(verdict) for name, verdict in biofx.verify(bio).items()} == {
        "encoder.weight": "free",
        "head.weight": "obeys",
        "decoder.weight": "obeys",
    }
    assert not len(biofx.units(biofx.fold(bio), run).mixed())
    bio = biofx.transform(model, "split-synapses,crystallize,synaptic-scaling", example_inputs=run)
    torch.testing.assert_close(run(bio), run(model))
    assert "synaptic-scaling: no node of the graph is known to use it" in flat(biofx.summary(bio))
    bio = biofx.transform(model, "mirror-units", example_inputs=run)
    assert "decoder.weight is used by other methods than forward, which may read its units" in flat(biofx.summary(bio))
