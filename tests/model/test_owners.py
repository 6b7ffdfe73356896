"""Members: modules and methods of a transformed model that are called beside its forward compute with it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import biofx
from biofx import passes
from biofx.model.owners import Owner
from models.pretrained import PRETRAINED

FRONTENDS = ["symbolic", "module"]


class Decoder(nn.Module):
    """Reads the weights of its layers itself."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(2, 8), nn.Parameter(torch.randn(8, 6))

    def forward(self, z):
        return F.linear(z, self.fc.weight, self.fc.bias).relu() @ self.scale

    def penalty(self):
        return self.fc.weight.square().sum() + self.scale.square().sum()

    @property
    def norm(self):
        return self.scale.norm()


class Autoencoder(nn.Module):
    """Is used through several methods."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.decoder = Decoder()
        self.prior = nn.Parameter(torch.randn(2, 2))

    def encode(self, x):
        return self.encoder(x) @ self.prior

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        return self.decode(self.encode(x))

    def sample(self, z):
        return F.linear(z @ self.prior, self.decoder.fc.weight)

    def reconstruct(self, x):
        return self(x) + self.decoder.penalty()

    def reset(self):
        nn.init.ones_(self.decoder.fc.weight)

    def clip(self):
        self.decoder.fc.weight.data.clamp_(-0.01, 0.01)

    def fit(self, x, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            (self(x).square().mean() + self.decoder.fc.weight.square().sum()).backward()
            optimizer.step()
        return self.decoder.fc.weight.norm()

    def load(self, state):
        self.load_state_dict(state)
        return self.state_dict()

    def parts(self, x):
        yield self.encode(x)


CALLS = {
    "a module": lambda m, x: m.encoder(x),
    "a module in it": lambda m, x: m.encoder[0](x),
    "a module that reads weights of others": lambda m, x: m.decoder(x[:, :2]),
    "a method": lambda m, x: m.encode(x),
    "several": lambda m, x: m.decode(m.encode(x)),
    "a method that reads weights": lambda m, x: m.sample(x[:, :2]),
    "a method of a module": lambda m, x: m.decoder.penalty(),
    "a property": lambda m, x: m.decoder.norm,
    "a method that calls the model": lambda m, x: m.reconstruct(x),
    "the model": lambda m, x: m(x),
}


@pytest.fixture(params=FRONTENDS)
def frontend(request):
    return request.param


def transformed(frontend, recipe="split-synapses"):
    model = Autoencoder().double()
    return model, biofx.transform(model, recipe, frontend=frontend)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_computes_with_effective_weights(call, frontend):
    model, bio = transformed(frontend)
    x = torch.randn(3, 6, dtype=torch.float64)
    loaded = io.BytesIO()
    torch.save(bio, loaded)
    loaded.seek(0)
    for other in (bio, copy.deepcopy(bio), torch.load(loaded, weights_only=False), biofx.fold(bio)):
        torch.testing.assert_close(call(other, x), call(model, x))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_reach_the_synapses(call, frontend):
    model, bio = transformed(frontend, [passes.FuzzyLearningRates()])
    x = torch.randn(3, 6, dtype=torch.float64)
    for net in (model, bio):
        call(net, x).square().sum().backward()
    sites = biofx.weight_sites(bio)
    for name, parameter in model.named_parameters():
        found = bio.get_parameter(name).grad
        if parameter.grad is None:
            assert found is None
        else:
            gain = sites[name].gain if name in sites else 1
            torch.testing.assert_close(found, parameter.grad * gain)


def test_what_acts_behind_an_operator_is_in_the_graph_only():
    model, x = Autoencoder(), torch.randn(3, 6)
    bio = biofx.transform(model, [passes.GroupUnits(size=2)])
    bio(x)
    with pytest.raises(biofx.CaptureError, match="Linear is called on its own, but group-units changes the"):
        bio.encoder(x)


@pytest.mark.parametrize("name", ["reset", "clip"])
def test_a_method_that_changes_a_weight_has_to_be_called_before(name, frontend):
    _, bio = transformed(frontend)
    with torch.no_grad(), pytest.raises(biofx.ArgumentError, match="would be lost; change the stored tensor"):
        getattr(bio, name)()


def test_a_method_may_train(frontend):
    model, bio = transformed(frontend, "l1-regularization{strength=0.0}")
    x = torch.randn(3, 6, dtype=torch.float64)
    norms = [net.fit(x, torch.optim.SGD(net.parameters(), 0.1)) for net in (model, bio)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(bio.decoder.fc.weight.norm(), norms[0])


def test_methods_see_the_state_as_it_is_stored(frontend):
    _, bio = transformed(frontend)
    state = {name: torch.ones_like(value) for name, value in bio.state_dict().items()}
    assert bio.load(state).keys() == state.keys()
    assert all(bool((parameter == 1).all()) for parameter in bio.parameters())


def test_attributes_are_the_effective_weights_from_outside_too(frontend):
    model, bio = transformed(frontend)
    assert torch.equal(bio.decoder.fc.weight, biofx.weight_sites(bio)["decoder.fc.weight"].effective())
    torch.testing.assert_close(bio.decoder.fc.weight.detach(), model.decoder.fc.weight.detach())
    assert bio.get_parameter("decoder.fc.weight").shape == (2, 8, 2)  # what is stored


def test_modules_are_what_they_were(frontend):
    _, bio = transformed(frontend)
    assert type(bio.decoder.fc).__name__ == "Linear"
    assert isinstance(bio.decoder, Decoder)
    assert isinstance(copy.deepcopy(bio.decoder), Decoder)
    assert "(weight_synapses): Synapses(stored (2, 8, 2) → biofx.share_grad → sum)" in repr(bio.decoder)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_models_of_transformers_generate_tie_and_save(frontend, tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 32}
    config = transformers.GPT2Config(**options, bos_token_id=None, eos_token_id=None)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(5)[None]
    recipe = [passes.SplitSynapses(), passes.FuzzyLearningRates()]
    bio = biofx.transform(model, recipe, frontend=frontend, example_inputs={"input_ids": ids})
    texts = [m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (bio, model)]
    assert torch.equal(*texts)
    bio.tie_weights()
    assert bio.lm_head.weight_synapses is bio.transformer.wte.weight_synapses
    torch.testing.assert_close(bio(ids).logits, model(ids).logits)
    with pytest.raises(biofx.ArgumentError, match="would be lost"):
        bio.resize_token_embeddings(50)
    bio.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_what_from_pretrained_loads_computes_what_was_saved(tmp_path):
    pytest.importorskip("transformers")
    build, make_inputs = PRETRAINED["resnet"]
    model, x = build().eval(), make_inputs()
    bio = biofx.transform(model, "dales-principle{constraint=softplus},split-synapses", example_inputs=x)
    other = copy.deepcopy(bio)
    for parameter in other.parameters():
        parameter.data *= 1.1
    cases = [(bio, {}), (bio, {"state_dict": bio.state_dict()}), (other, {"state_dict": bio.state_dict()})]
    for index, (saved, options) in enumerate(cases):
        saved.save_pretrained(tmp_path / str(index), **options)
        loaded = type(model).from_pretrained(tmp_path / str(index))
        torch.testing.assert_close(loaded(**x).logits, bio(**x).logits)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("group-units", "group-units changed what the operator of .* returns"),
        ("mirror-units", "mirror-units changed the number of units of "),
    ],
)
def test_save_pretrained_refuses_what_the_class_cannot_load(pipeline, reason, tmp_path):
    pytest.importorskip("transformers")
    build, make_inputs = PRETRAINED["resnet"]
    bio = biofx.transform(build().eval(), pipeline, example_inputs=make_inputs())
    with pytest.raises(biofx.ExportError, match=rf"save_pretrained: .*{reason}.*biofx.save\(bio, folder\)"):
        bio.save_pretrained(tmp_path)
    plain = biofx.fold(bio)
    if pipeline == "group-units":
        with pytest.raises(biofx.ExportError, match="this folded ResNetForImageClassification is a graph"):
            plain.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("pipeline", ["fuzzy-learning-rates", "split-synapses"])
def test_the_older_weight_norm_says_fold_first(pipeline):
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4)), pipeline)
    with pytest.raises(biofx.ArgumentError, match="fold the model first"):
        torch.nn.utils.weight_norm(bio[0])


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("follow", [biofx.fold, copy.deepcopy])
def test_a_class_that_a_user_derives_and_assigns_stays(follow, frontend):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    bio = biofx.transform(model, "split-synapses", frontend=frontend)
    for each in (model, bio):

        class Twice(type(each[2])):
            def forward(self, x, *, factor=2.0):
                return super().forward(x) * factor

        each[2].__class__ = Twice
    x = torch.randn(3, 4)
    torch.testing.assert_close(bio(x), model(x))
    torch.testing.assert_close(follow(bio)(x), model(x))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def prune_a_new_weight(layer):
    layer.weight = nn.Parameter(torch.eye(4))
    prune.l1_unstructured(layer, "weight", 0.5)


def parametrize_a_new_weight(layer):
    layer.weight = nn.Parameter(torch.eye(4))
    parametrizations.weight_norm(layer)


def parametrize_the_bias(layer):
    parametrize.register_parametrization(layer, "bias", Doubled())
    with torch.no_grad():
        layer.parametrizations.bias.original.add_(1)


def parametrize_the_bias_and_assign(layer):
    parametrize_the_bias(layer)
    layer.weight = nn.Parameter(torch.eye(4))


CODE = [prune_a_new_weight, parametrize_a_new_weight, parametrize_the_bias, parametrize_the_bias_and_assign]


@pytest.mark.parametrize("change", CODE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("pipeline", ["fuzzy-learning-rates", "split-synapses"])
def test_code_may_change_a_layer_that_lost_its_synapses(change, pipeline):
    bio, x = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), pipeline), torch.randn(3, 4)
    plain = biofx.fold(bio)
    change(plain[0])
    if change in (prune_a_new_weight, parametrize_a_new_weight):
        bio[0].weight = nn.Parameter(torch.eye(4))
        biofx.summary(bio)  # takes note of the new weight
    change(bio[0])
    folded = biofx.fold(bio)
    for model in (bio, copy.deepcopy(bio), folded):
        torch.testing.assert_close(model(x), plain(x))
    assert not isinstance(folded[0], Owner)
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_folded_layers_have_their_class_after_an_assignment():
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 4)), "split-synapses")
    x = torch.randn(2, 3, 4)
    bio[0].weight = nn.Parameter(torch.eye(4))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        setattr(bio[2], name, nn.Parameter(torch.ones(16, 4)))
        bio(x)
    plain = biofx.fold(bio)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU, nn.LSTM]
    torch.testing.assert_close(plain(x), bio(x))
    with torch.no_grad():
        bio[2].weight_hh_l0.zero_()
        plain[2].weight_hh_l0.zero_()
    torch.testing.assert_close(plain(x), bio(x))


def _made(size):
    return Remade(size)


class Remade(nn.Linear):
    """Says by its own code how a copy of it is made."""

    def __init__(self, size):
        super().__init__(size, size)

    def __reduce__(self):
        return _made, (self.in_features,), self.__dict__


@pytest.mark.parametrize("model", [Remade(3), nn.Sequential(Remade(3), nn.ReLU())])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_layers_that_are_made_by_their_own_code_are_copied(model, frontend):
    bio, x = biofx.transform(model, [passes.SplitSynapses()], frontend=frontend), torch.randn(4, 3)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    for same in (copy.deepcopy(bio), torch.load(file, weights_only=False), biofx.fold(bio)):
        torch.testing.assert_close(same(x), model(x))
