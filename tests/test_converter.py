"""BioConverter: the reference package's names, and its numbers where biofx means to agree."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, BioConverter
from biofx.converter import DEFAULT_BIO_CONFIG, Distribution
from biofx.model.synapses import stored_parameters
from conftest import flat


class Net(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc1 = nn.Linear(4 * 36, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


X, Y = torch.randn(6, 1, 8, 8), torch.arange(6)


def backward(model, x=X):
    model.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    return model


def test_the_training_script_of_the_readme_runs():
    """Only the import is another."""
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    converter = BioConverter(fuzzy_learning_rate_factor_nu=0.16, crystal_thresh=4.5e-05, rejuvenation_parameter_dre=8.0)
    bio_model = converter(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.1)
    inputs, targets = torch.randn(32, 784), torch.randint(10, (32,))
    losses = []
    for _ in range(30):
        loss = criterion(bio_model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        bio_model.volume_dependent_lr()
        bio_model.fuzzy_learning_rates()
        bio_model.crystallize()
        optimizer.step()
        losses.append(loss.item())
    bio_model.rejuvenate_weights()
    assert losses[-1] < losses[0]
    biofx.verify(bio_model)


def test_configurations():
    config = BioConfig(fuzzy_lr_distribution=Distribution.NORMAL, weight_splitting_Gamma=2)
    assert BioConverter(config=config).get_config() == config
    assert BioConverter(config, base_lr=0.3).get_config() == config._replace(base_lr=0.3)
    converter = BioConverter.from_dict({"dampening_factor": 0.7})
    assert converter.get_config() == DEFAULT_BIO_CONFIG._replace(dampening_factor=0.7)
    converter.update_config(crystal_thresh=5e-05)
    assert converter.get_config().crystal_thresh == 5e-05
    with pytest.raises(
        biofx.ArgumentError, match="unknown option 'gamma'; the options are weight_splitting_activation"
    ):
        BioConverter(gamma=2)
    with pytest.raises(biofx.ArgumentError, match="passes.Crystallize: dampening must be a number ≥ 0 and ≤ 1, got 3"):
        BioConverter(dampening_factor=3)(Net())


def test_a_class_becomes_a_class_of_converted_models():
    converted = BioConverter(weight_splitting_Gamma=2)(Net)
    model = converted(hidden=6)
    assert isinstance(model, Net)
    assert model.fc1.weight.shape == (6, 144)
    backward(model).fuzzy_learning_rates()

    @BioConverter()
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    assert "fuzzy-learning-rates" in flat(biofx.summary(Decorated()))


def test_nothing_happens_by_itself():
    model = Net()
    bio = BioConverter()(model)
    for (name, plain), (_, given) in zip(
        backward(model).named_parameters(), stored_parameters(backward(bio)), strict=True
    ):
        assert torch.equal(plain.grad, given.grad), name


def test_the_methods_are_the_rules():
    model = Net()
    bio = BioConverter(lr_variability=1e-9, fuzzy_lr_distribution="lognormal")(model)
    sites = biofx.weight_sites(bio)
    expected = {n: p.grad.clone() for n, p in backward(model).named_parameters()}
    backward(bio).fuzzy_learning_rates()
    for name, site in sites.items():
        torch.testing.assert_close(site.raw.grad, expected[name] * site.gain)
    backward(bio).volume_dependent_lr()
    for name, site in sites.items():
        w = site.raw.detach().abs()
        torch.testing.assert_close(site.raw.grad, expected[name] * 0.1 * torch.exp(-2 * w / (w + 1)))
    before = {name: site.raw.detach().clone() for name, site in sites.items()}
    bio.rejuvenate_weights()
    assert all((site.raw != before[name]).any() for name, site in sites.items())
    torch.testing.assert_close(bio.l1_reg(), sum(site.raw.abs().sum() for site in sites.values()))
    bio.l1_reg().backward()


def test_volume_noise_is_new_at_every_call():
    bio = BioConverter()(Net())
    grads = []
    for _ in range(2):
        backward(bio).volume_dependent_lr()
        grads.append(bio.fc2.weight.grad.clone())
    assert not torch.equal(*grads)


def test_crystallize_and_scale_grad():
    bio = BioConverter()(Net())
    before = bio.fc2.weight_synapses.gain.clone()
    (backward(bio), bio.fc2.weight.grad.fill_(100.0))
    bio.crystallize()
    torch.testing.assert_close(bio.fc2.weight_synapses.gain, 0.6 * before)
    grad = backward(bio).fc2.weight.grad.clone()
    bio.scale_grad()
    torch.testing.assert_close(bio.fc2.weight.grad, grad * bio.fc2.weight_synapses.homeostasis)
    assert bio.fc2.weight_synapses.homeostasis.std() > 0


@pytest.mark.parametrize("dynamic", [True, False])
def test_update_fuzzy_learning_rates(dynamic):
    converter = BioConverter(fuzzy_lr_distribution="temporal", fuzzy_lr_dynamic=dynamic, fuzzy_lr_update_freq=2)
    bio = converter(Net())
    before = bio.fc1.weight_synapses.gain.clone()
    bio.update_fuzzy_learning_rates(X)
    assert torch.equal(bio.fc1.weight_synapses.gain, before)
    bio.update_fuzzy_learning_rates()
    assert torch.equal(bio.fc1.weight_synapses.gain, before) is not dynamic


def test_the_marker_skips_a_layer():
    model = Net()
    BioConverter.set_last_module_token_for_module(model.conv)
    bio = BioConverter(weight_splitting_Gamma=2)(model)
    grouped = {name for name, site in biofx.weight_sites(bio).items() if "group-units" in site.passes}
    assert grouped == {"fc1.weight"}


def test_methods_survive_a_shallow_copy_and_leave_with_fold():
    bio = BioConverter()(Net())
    weight = bio.fc1.weight.detach().clone()
    copy.copy(bio).rejuvenate_weights()
    assert not torch.equal(bio.fc1.weight, weight)
    assert type(biofx.fold(bio)) is Net


def test_methods_survive_deepcopy_and_pickling():
    bio = BioConverter()(Net())
    bio.rejuvenate_weights()
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    results = []
    for model in (bio, copy.deepcopy(bio), torch.load(file, weights_only=False)):
        model.rejuvenate_weights()
        results.append(model.fc1.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dales_principle():
    """Turnover keeps to the units' signs by itself; what the optimizer did, the method undoes."""
    bio = BioConverter(apply_dales_principle=True)(Net())
    signed = [site for site in biofx.weight_sites(bio).values() if site.sign is not None]
    assert signed
    with torch.no_grad():
        for site in signed:
            site.raw.add_(torch.randn_like(site.raw))
    bio.enforce_dales_principle()
    assert all((site.raw * site.sign >= 0).all() for site in signed)
    bio.rejuvenate_weights()
    biofx.verify(bio)
    assert all((site.raw * site.sign >= 0).all() for site in signed)


def test_bad_calls():
    bio = BioConverter()(Net())
    for method in (bio.fuzzy_learning_rates, bio.volume_dependent_lr, bio.crystallize):
        with pytest.raises(biofx.LifecycleError, match=r"no weight has a gradient; call backward\(\) first"):
            method()
    with pytest.raises(biofx.LifecycleError, match="convert the model with apply_dales_principle=True"):
        bio.enforce_dales_principle()
    with pytest.raises(biofx.ArgumentError, match="must be a torch.nn.Module"):
        BioConverter()(3)


class TestAgainstTheReference:
    """The same weights, the same numbers. Skipped where pytorch-bio-transformations is not installed."""

    @pytest.fixture
    def reference(self):
        return pytest.importorskip("bio_transformations")

    def pair(self, reference, **options):
        torch.manual_seed(0)
        model = Net()
        theirs = reference.BioConverter(**options)(copy.deepcopy(model))
        ours = BioConverter(**options)(model)
        return backward(ours), backward(theirs)

    def test_volume_dependent_lr(self, reference):
        ours, theirs = self.pair(reference, lr_variability=1e-9, base_lr=0.3, stability_factor=1.5)
        for model in (ours, theirs):
            model.volume_dependent_lr()
        for layer in ("conv", "fc1", "fc2"):
            torch.testing.assert_close(getattr(ours, layer).weight.grad, getattr(theirs, layer).weight.grad)

    def test_fuzzy_learning_rates(self, reference):
        ours, theirs = self.pair(reference)
        for layer in ("conv", "fc1", "fc2"):
            gain = getattr(theirs, layer).bio_mod.fuzzy_learning_rate_parameters
            getattr(ours, layer).weight_synapses.gain.copy_(gain)
        for model in (ours, theirs):
            model.fuzzy_learning_rates()
        for layer in ("conv", "fc1", "fc2"):
            assert torch.equal(getattr(ours, layer).weight.grad, getattr(theirs, layer).weight.grad)

    @pytest.mark.parametrize("activation", [nn.Identity(), nn.Tanh()])
    def test_group_units(self, reference, activation):
        options = {"weight_splitting_Gamma": 2, "weight_splitting_activation_function": activation}
        ours, theirs = self.pair(reference, **options)
        torch.testing.assert_close(ours(X), theirs(X))

    def test_crystallize(self, reference):
        ours, theirs = self.pair(reference)
        for layer in ("conv", "fc1", "fc2"):
            gain = getattr(theirs, layer).bio_mod.fuzzy_learning_rate_parameters
            getattr(ours, layer).weight_synapses.gain.copy_(gain)
        for model in (ours, theirs):
            model.crystallize()
        for layer in ("conv", "fc1", "fc2"):
            gain = getattr(theirs, layer).bio_mod.fuzzy_learning_rate_parameters
            torch.testing.assert_close(getattr(ours, layer).weight_synapses.gain, gain.data)


def test_converted_models_run_graphs_of_their_own():
    x, models = torch.randn(2, 4), [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 3), nn.ReLU())]
    converted = [BioConverter(dampening_factor=0.5)(model) for model in models]
    for bio in converted:
        bio.recompile()
    for model, bio in zip(models, converted, strict=True):
        torch.testing.assert_close(bio(x), model(x))
        torch.testing.assert_close(copy.deepcopy(bio)(x), model(x))
