"""FuzzyLearningRates: the ten distributions, and what a gain does."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import fx, nn

import biofx
from biofx import passes
from biofx.base import gains as drawing
from biofx.passes.fuzzy_learning_rates import DISTRIBUTIONS, DYNAMIC, layer_adaptive_spread, weight_adaptive_spread
from biofx.training import blocks
from conftest import gradients
from models.small import CONVOLUTIONS, GROUPS, layer_and_input, mlp

WIDE = {"minimum": 0.0, "maximum": 1e9}
NAMES = list(DISTRIBUTIONS)
KINDS = [("linear", "dense"), *((kind, grouping) for kind in CONVOLUTIONS for grouping in GROUPS)]


def gains(nu, distribution, shape=(400, 500), **options):
    model = nn.Linear(shape[1], shape[0], bias=False)
    bio = biofx.transform(model, [passes.FuzzyLearningRates(nu=nu, distribution=distribution, **options)])
    return bio.weight_synapses.gain.double()


def test_there_are_ten():
    assert len(NAMES) == 10


@pytest.mark.parametrize("nu", [0.05, 0.16, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_mean_is_one(name, nu):
    """Within five standard errors of 200 000 draws, before clamping."""
    sample = gains(nu, name, **WIDE)
    assert abs(sample.mean() - 1) < 5 * nu / math.sqrt(sample.numel()) + 1e-7


@pytest.mark.parametrize("nu", [0.05, 0.16, 0.4])
@pytest.mark.parametrize("name", ["normal", "lognormal", "gamma"])
def test_unbounded_distributions_have_standard_deviation_nu(name, nu):
    sample = gains(nu, name, **WIDE)
    torch.testing.assert_close(sample.std(), torch.tensor(nu).double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("nu", [0.05, 0.16, 0.4])
@pytest.mark.parametrize("name", ["uniform", "beta", "layer_adaptive", "temporal", "activity"])
def test_bounded_distributions_stay_within_nu(name, nu):
    distance = (gains(nu, name, **WIDE) - 1).abs().max()
    assert distance <= nu * (1 + 1e-6)
    assert distance > 0.5 * nu


CDF = {
    "uniform": lambda nu: stats.uniform(1 - nu, 2 * nu).cdf,
    "temporal": lambda nu: stats.uniform(1 - nu, 2 * nu).cdf,
    "activity": lambda nu: stats.uniform(1 - nu, 2 * nu).cdf,
    "layer_adaptive": lambda nu: stats.uniform(1 - nu, 2 * nu).cdf,  # the only weight is the first
    "normal": lambda nu: stats.norm(1, nu).cdf,
    "lognormal": lambda nu: stats.lognorm(s=math.sqrt(math.log1p(nu**2)), scale=1 / math.sqrt(1 + nu**2)).cdf,
    "gamma": lambda nu: stats.gamma(nu**-2, scale=nu**2).cdf,
    "beta": lambda nu: stats.beta(1 / nu, 1 / nu, loc=1 - nu, scale=2 * nu).cdf,
}


@pytest.mark.parametrize("nu", [0.16, 0.3])
@pytest.mark.parametrize("name", CDF)
def test_distribution_functions(name, nu):
    """Kolmogorov-Smirnov against scipy's; the draws are fixed, so this never flickers."""
    sample = gains(nu, name, shape=(100, 200), minimum=0.0).flatten().numpy()
    assert stats.kstest(sample, CDF[name](nu)).pvalue > 1e-3


def test_baseline_is_one():
    assert (gains(0.5, "baseline") == 1).all()


def test_weight_adaptive_is_wide_for_small_weights():
    model = nn.Linear(500, 400, bias=False)
    bio = biofx.transform(model, [passes.FuzzyLearningRates(nu=0.2, distribution="weight_adaptive", **WIDE)])
    relative = (model.weight.abs() / model.weight.abs().mean()).flatten()
    half_width = 0.2 * (2 - relative).clamp(0.5, 1.5)
    deviation = (bio.weight_synapses.gain - 1).abs().flatten()
    assert (deviation <= half_width * (1 + 1e-5)).all()
    for low, high in ((0, 0.5), (0.9, 1.1), (1.5, 10)):
        chosen = (relative >= low) & (relative < high)
        torch.testing.assert_close(deviation[chosen].mean(), half_width[chosen].mean() / 2, rtol=0.03, atol=0)


def test_weight_adaptive_of_a_weight_of_zeros_is_uniform():
    assert torch.equal(weight_adaptive_spread(0.2, [torch.zeros(3)], [torch.zeros(())])[0], torch.full((3,), 0.2))


def test_layer_adaptive_narrows_to_half_with_depth():
    assert [layer_adaptive_spread(0.2, depth) for depth in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.15, 0.1])
    model = mlp(100, 100, 100, 100)
    bio = biofx.transform(model, [passes.FuzzyLearningRates(nu=0.2, distribution="layer_adaptive")])
    widths = [float((site.gain - 1).abs().max()) for site in biofx.weight_sites(bio).values()]
    assert widths == pytest.approx([0.2, 0.15, 0.1], rel=0.01)


def test_layer_adaptive_goes_by_the_graph_not_by_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(100, 100), nn.Linear(100, 100)

        def forward(self, x):
            return self.last(self.first(x))

    bio = biofx.transform(Backwards(), [passes.FuzzyLearningRates(nu=0.2, distribution="layer_adaptive")])
    assert (bio.first.weight_synapses.gain - 1).abs().max() > 0.19
    assert (bio.last.weight_synapses.gain - 1).abs().max() <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_gains_are_clamped(name):
    sample = gains(0.9, name, minimum=0.8, maximum=1.1)
    expected = (1, 1) if name == "baseline" else (0.8, 1.1)
    assert (float(sample.min()), float(sample.max())) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gain_scales_the_gradient(name, dtype):
    model, x = mlp(4, 6, 3).to(dtype), torch.randn(5, 4).to(dtype)
    bio = biofx.transform(model, [passes.FuzzyLearningRates(nu=0.3, distribution=name)])
    expected, given = gradients(model, x), gradients(bio, x)
    for site_name, site in biofx.weight_sites(bio).items():
        is_wide = name == "temporal"  # a decay would be rounded away
        assert site.gain.dtype is (torch.promote_types(dtype, torch.float32) if is_wide else dtype)
        expected[site_name] = (expected[site_name] * site.gain).to(dtype)
    assert all(torch.equal(expected[n], given[n]) for n in expected)


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_the_gain_scales_the_gradient_of_every_operator(kind, grouping):
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64)
    bio = biofx.transform(layer, [passes.FuzzyLearningRates(distribution="lognormal")])
    expected, given = gradients(layer, x), gradients(bio, x)
    assert torch.equal(given["weight"], expected["weight"] * bio.weight_synapses.gain)
    assert torch.equal(given["bias"], expected["bias"])
    assert torch.equal(bio(x), layer(x))


def test_dtype_of_the_gain():
    bio = biofx.transform(nn.Linear(3, 3), [passes.FuzzyLearningRates(dtype="bfloat16")])
    assert bio.weight_synapses.gain.dtype is torch.bfloat16
    biofx.verify(bio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clamped_gains_are_valid_in_half_precision(dtype):
    pass_ = passes.FuzzyLearningRates(nu=2.0, distribution="lognormal", minimum=0.3, maximum=1.7)
    biofx.verify(biofx.transform(nn.Linear(30, 30).to(dtype), [pass_]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nu": 0}, "passes.FuzzyLearningRates: nu must be a number > 0, got 0"),
        ({"nu": -0.1}, "nu must be a number > 0, got -0.1"),
        ({"nu": math.nan}, "nu must be a number > 0, got nan"),
        ({"nu": "wide"}, "nu must be a number > 0, got 'wide'"),
        ({"distribution": "cauchy"}, "distribution must be one of baseline, uniform, .*, activity, got 'cauchy'"),
        ({"minimum": 3}, "minimum must be ≤ maximum, got minimum=3, maximum=2.0"),
        ({"minimum": -1}, "minimum must be a number ≥ 0, got -1"),
        ({"decay": 1.5}, "decay must be a number ≥ 0 and ≤ 1, got 1.5"),
        ({"every": 0}, "every must be an integer ≥ 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float64, .*, uint8, unstored, got 'int8'"),
        ({"dtype": "unstored", "distribution": "activity"}, "dtype='unstored' is for gains that stay, .* use 'uint8'"),
        ({"dtype": "unstored", "distribution": "temporal"}, "'temporal' changes them; use 'float32'"),
        ({"dtype": "uint8", "distribution": "temporal"}, "dtype='uint8' is too coarse for 'temporal' gains"),
        ({"dtype": "bfloat16", "distribution": "temporal"}, "too coarse .* use 'float32'"),
        ({"dtype": "uint8", "maximum": 4.0}, "dtype='uint8' holds gains up to 3.97, got maximum=4.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.FuzzyLearningRates(**options)


def trained(distribution, steps, every=2, **options):
    """A layer of 100 × 80 after some steps, with the gains after each."""
    layer = nn.Linear(80, 100)
    bio = biofx.transform(layer, [passes.FuzzyLearningRates(distribution=distribution, every=every, **options)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    gains = [bio.weight_synapses.gain.clone()]
    for step in range(steps):
        optimizer.zero_grad()
        bio(torch.randn(4, 80, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
        gains.append(bio.weight_synapses.gain.clone())
    return bio, gains


@pytest.mark.parametrize("name", ["baseline", "uniform", "gamma", "layer_adaptive"])
def test_static_gains_stay(name):
    _, gains_by_step = trained(name, 3, every=1)
    assert all(torch.equal(g, gains_by_step[0]) for g in gains_by_step)


def test_temporal_gains_decay_and_are_stirred_every_tenth_time():
    _, g = trained("temporal", 20, every=2, nu=0.3, decay=0.9)
    for step in range(1, 20):
        expected = 1 + (g[step - 1] - 1) * 0.9 if step % 2 == 0 else g[step - 1]
        torch.testing.assert_close(g[step], expected)
    noise = g[20] - (1 + (g[19] - 1) * 0.9)
    assert noise.abs().max() <= 0.1 * 0.3 * (1 + 1e-5)
    assert noise.std() == pytest.approx(0.03 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("name", ["temporal", "weight_adaptive"])
def test_a_refresh_does_not_depend_on_how_a_weight_is_cut(name, monkeypatch):
    torch.manual_seed(0)
    state = nn.Linear(80, 100).state_dict()
    results = []
    for size in (1 << 18, 1000):
        monkeypatch.setattr(blocks, "CPU", size)
        torch.manual_seed(0)
        bio, gains = trained(name, 20, every=2, nu=0.3)
        assert torch.equal(bio.weight, state["weight"])
        results.append(gains[-1])
    assert torch.equal(*results)


def test_dampened_gains_are_not_refreshed():
    layer = nn.Linear(80, 100)
    bio = biofx.transform(layer, [passes.FuzzyLearningRates(distribution="weight_adaptive", every=1)])
    gain = bio.weight_synapses.gain
    gain[:50] = 0.01
    before = gain.clone()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    bio(torch.randn(4, 80)).sum().backward()
    optimizer.step()
    assert torch.equal(gain[:50], before[:50])
    assert (gain[50:] != before[50:]).double().mean() > 0.99


def test_weight_adaptive_gains_are_redrawn_for_present_weights():
    bio, g = trained("weight_adaptive", 4, every=2, nu=0.2)
    assert [torch.equal(a, b) for a, b in pairwise(g)] == [True, False, True, False]
    weight = bio.weight.detach()
    half_width = weight_adaptive_spread(0.2, [weight], [weight.abs().mean()])[0]
    assert ((g[-1] - 1).abs() <= half_width * (1 + 1e-5)).all()


def test_activity_gains_are_wide_for_silent_units():
    layer = nn.Linear(80, 100)
    with torch.no_grad():
        layer.weight[:50].zero_()
        layer.bias[:50].zero_()
    pass_ = passes.FuzzyLearningRates(distribution="activity", every=2, nu=0.2)
    bio = biofx.transform(layer, [pass_])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    x = torch.randn(16, 80)
    for _ in range(2):
        bio(x).sum().backward()
        optimizer.step()
    output = layer(x)
    counts, positions = bio.weight_synapses.active.double().sum(0)
    assert torch.equal(counts, 2.0 * (output.abs() > 0.01).sum(0))
    assert (positions == 32).all()
    a = (1 + 0.1 * (counts / counts.mean() - 1)).clamp(0.8, 1.2)
    half_width = (0.2 * (2 - a))[:, None]
    deviation = (bio.weight_synapses.gain - 1).abs()
    assert (deviation <= half_width * (1 + 1e-5)).all()
    assert deviation[:50].max() > 0.2 > deviation[50:].max()
    torch.testing.assert_close(deviation[:50].mean(), half_width[:50].mean().float() / 2, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["temporal", "weight_adaptive", "activity"])
def test_refreshed_gains_stay_within_bounds(name):
    bio, gains_by_step = trained(name, 20, every=1, nu=0.9, minimum=0.8, maximum=1.1)
    assert all(g.min() >= 0.8 - 1e-6 and g.max() <= 1.1 + 1e-6 for g in gains_by_step)
    biofx.verify(bio)


STATIC = [name for name in NAMES if name not in DYNAMIC]
HALF = (1 / 256) ** 2 + 1e-6  # half a level, at a gain of 0, and what single precision rounds
IN_A_BYTE = [name for name in NAMES if name != "temporal"]


def fuzzy(model, dtype=None, distribution="lognormal", **options):
    return biofx.transform(model, [passes.FuzzyLearningRates(dtype=dtype, distribution=distribution)], **options)


def extra_bytes(bio, plain):
    """What the model holds beside the weights, in bytes for each synapse."""
    held = sum(x.numel() * x.element_size() for x in [*bio.parameters(), *bio.buffers()] if x.dim())
    weights = sum(x.numel() * x.element_size() for x in plain.parameters())
    return (held - weights) / sum(site.raw.numel() for site in biofx.weight_sites(bio).values())


@pytest.mark.parametrize(("dtype", "expected"), [("unstored", 0), ("uint8", 1), ("bfloat16", 2), (None, 4)])
def test_bytes_for_each_synapse(dtype, expected):
    model = mlp(20, 30, 10)
    assert extra_bytes(fuzzy(model, dtype), model) == expected


@pytest.mark.parametrize("name", STATIC)
def test_unstored_gains_are_those_that_would_be_stored(name):
    model = mlp(20, 30, 700)
    stored, unstored = (fuzzy(model, dtype, name) for dtype in (None, "unstored"))
    for one, other in zip(*(biofx.weight_sites(bio).values() for bio in (stored, unstored)), strict=True):
        assert other.state("gain") is None
        assert torch.equal(one.gain, other.gain)
    biofx.verify(unstored)
    shown, expected = (biofx.summary(bio).rows for bio in (unstored, stored))
    assert shown == expected


@pytest.mark.parametrize("name", IN_A_BYTE)
def test_gains_in_a_byte_are_rounded_by_half_a_level(name):
    model = mlp(20, 30, 700)
    exact, rounded = (fuzzy(model, dtype, name) for dtype in (None, "uint8"))
    for one, other in zip(*(biofx.weight_sites(bio).values() for bio in (exact, rounded)), strict=True):
        assert other.state("gain").dtype is torch.uint8
        assert ((one.gain - other.gain).abs() <= one.gain.sqrt() / 128 + HALF).all()
        assert (name == "baseline") == torch.equal(one.gain, other.gain)
    biofx.verify(rounded)


def trained_model(bio, optimizer_name, x, *, steps=1, compiled=False, lr=0.01):
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=lr)
    if isinstance(bio, fx.GraphModule):
        biofx.attach(bio, optimizer, compile=compiled)
    for _ in range(steps):
        optimizer.zero_grad()
        bio(x).square().sum().backward()
        optimizer.step()
    return bio


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", ["unstored", "uint8"])
def test_a_step_moves_a_synapse_by_its_gain(dtype, optimizer_name):
    model, x = mlp(20, 600, 500).double(), torch.randn(5, 20, dtype=torch.float64)
    bio = fuzzy(model, dtype)
    before = {name: site.raw.detach().clone() for name, site in biofx.weight_sites(bio).items()}
    plain = dict(trained_model(copy.deepcopy(model), optimizer_name, x).named_parameters())
    trained_model(bio, optimizer_name, x)
    for name, site in biofx.weight_sites(bio).items():
        expected = before[name] + site.gain.double() * (plain[name] - before[name])
        torch.testing.assert_close(site.raw.detach(), expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(site.raw, plain[name])


@pytest.mark.parametrize("dtype", ["unstored", "uint8"])
def test_the_gain_scales_the_gradient_while_nothing_is_attached(dtype):
    model, x = mlp(4, 600, 500).double(), torch.randn(5, 4, dtype=torch.float64)
    bio = fuzzy(model, dtype)
    expected, given = gradients(model, x), gradients(bio, x)
    for name, site in biofx.weight_sites(bio).items():
        assert torch.equal(given[name], expected[name] * site.gain)


@pytest.mark.parametrize(
    ("dtype", "pipeline"),
    [
        ("unstored", ""),
        ("uint8", ""),
        ("uint8", "split-synapses{synapses=2},"),
        ("unstored", "volume-dependent-learning-rates,"),
    ],
)
def test_compiled_rules_do_the_same(dtype, pipeline):
    model, x = mlp(20, 300, 7), torch.randn(5, 20)
    bio = biofx.transform(model, f"{pipeline}fuzzy-learning-rates{{dtype={dtype}}}")
    eager, compiled = (
        trained_model(copy.deepcopy(bio), "AdamW", x, steps=2, compiled=compiled) for compiled in (False, True)
    )
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["unstored", "uint8"])
def test_unstored_gains_survive_whatever_happens_to_a_model(dtype):
    model, x = mlp(4, 6, 3), torch.randn(5, 4)
    bio = fuzzy(model, dtype)
    expected = gradients(bio, x)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    other = fuzzy(model, dtype, seed=1)
    assert not torch.equal(gradients(other, x)["0.weight"], expected["0.weight"])
    other.load_state_dict(bio.state_dict())
    compiled = torch.compile(copy.deepcopy(bio), fullgraph=True, backend="aot_eager")
    for each in (copy.deepcopy(bio), torch.load(file, weights_only=False), other, compiled):
        given = gradients(each, x)
        assert all(torch.equal(given[name], expected[name.removeprefix("_orig_mod.")]) for name in given)
    assert same_parameters(biofx.fold(bio), model)


def same_parameters(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtypes", [("uint8", None), (None, "uint8"), ("uint8", "float64"), ("uint8", "uint8")])
def test_a_checkpoint_is_read_whatever_its_gains_are_stored_in(dtypes):
    model = mlp(4, 60, 3)
    source, target = fuzzy(model, dtypes[0]), fuzzy(model, dtypes[1], seed=1)
    target.load_state_dict(source.state_dict())
    for one, other in zip(*(biofx.weight_sites(bio).values() for bio in (source, target)), strict=True):
        assert ((one.gain - other.gain).abs() <= one.gain.sqrt() / 128 + HALF).all()


def test_gains_of_a_cut_weight_are_those_of_the_whole(monkeypatch):
    bio = fuzzy(mlp(37, 41, 3), "unstored")
    whole = biofx.weight_sites(bio)["0.weight"].gain
    monkeypatch.setattr(drawing, "CPU", 101)
    assert torch.equal(biofx.weight_sites(bio)["0.weight"].gain, whole)
    x, moved = torch.randn(5, 37), []
    for size in (1 << 18, 103):
        monkeypatch.setattr(blocks, "CPU", size)
        moved.append(trained_model(copy.deepcopy(bio), "SGD", x))
    assert same_parameters(*moved)


@pytest.mark.parametrize("together", [True, False])
def test_crystallize_needs_gains_that_are_stored(together):
    unstored, crystallize = passes.FuzzyLearningRates(dtype="unstored"), passes.Crystallize()
    model = nn.Linear(3, 3) if together else biofx.transform(nn.Linear(3, 3), [unstored])
    message = 'weight: its gain is unstored, and crystallize needs one .* give fuzzy-.* another dtype, such as "uint8"'
    with pytest.raises(biofx.PipelineError, match=message):
        biofx.transform(model, [unstored, crystallize] if together else [crystallize])


@pytest.mark.parametrize("compiled", [False, True])
def test_crystallize_dampens_gains_in_a_byte(compiled):
    layer, x = nn.Linear(60, 50), 1000 * torch.randn(4, 60)  # gradients far larger than the weights
    pipeline = [passes.FuzzyLearningRates(dtype="uint8"), passes.Crystallize(dampening=0.6)]
    bio = biofx.transform(layer, pipeline)
    site = biofx.weight_sites(bio)["weight"]
    assert site.state("gain").dtype is torch.uint8
    expected = site.gain
    for _ in range(20):
        trained_model(bio, "SGD", x, compiled=compiled, lr=0.0)
        expected = torch.minimum(expected, (0.6 * expected).clamp(min=1e-3))
        expected = (128 * expected.sqrt()).round().div(128).square()
        assert torch.equal(site.gain, expected)
    assert site.gain.max() < 1.1e-3
    biofx.verify(bio)


@pytest.mark.parametrize("name", ["weight_adaptive", "activity"])
def test_gains_in_a_byte_are_refreshed_as_exact_ones(name):
    results = []
    for dtype in ("float32", "uint8"):
        torch.manual_seed(0)
        results.append(biofx.weight_sites(trained(name, 4, nu=0.3, dtype=dtype)[0])["weight"].gain)
    exact, rounded = results
    assert ((exact - rounded).abs() <= exact.sqrt() / 128 + HALF).all()
    assert (exact - rounded).mean().abs() < 1e-3


def test_dampened_gains_in_a_byte_are_not_refreshed():
    layer = nn.Linear(80, 100)
    bio = biofx.transform(layer, [passes.FuzzyLearningRates(distribution="weight_adaptive", every=1, dtype="uint8")])
    codes = bio.weight_synapses.gain
    codes[:50] = torch.arange(50, dtype=torch.uint8)[:, None]  # gains below 0.15
    before = codes.clone()
    trained_model(bio, "SGD", torch.randn(4, 80))
    assert torch.equal(codes[:50], before[:50])
    assert (codes[50:] != before[50:]).double().mean() > 0.9


def test_temporal_gains_decay_in_models_of_half_precision():
    bio = fuzzy(nn.Linear(80, 100).bfloat16(), None, "temporal")
    pass_ = bio.biofx.passes[0].pass_
    before = bio.weight_synapses.gain.clone()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    for _ in range(pass_.every):
        bio(torch.ones(1, 80, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(bio.weight_synapses.gain - 1, (before - 1) * pass_.decay, rtol=1e-3, atol=1e-7)
