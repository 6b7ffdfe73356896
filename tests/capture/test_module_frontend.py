"""`frontend="module"`: the model's own Python code stays, only weights change; on models of transformers as well."""

import copy
import io

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from conftest import flat, gradients, tensors
from models.architectures import ARCHITECTURES
from models.pretrained import PRETRAINED
from models.small import ZOO, mlp

SPLIT = [passes.SplitSynapses(2)]
EXACT = [passes.SplitSynapses(2, init="equal", compensate=False)]


def module(model, pipeline=SPLIT, **options):
    return biofx.transform(model, pipeline, frontend="module", **options)


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", [*ZOO, *ARCHITECTURES])
def test_the_function_is_preserved(name):
    if name in ZOO:
        build, shape = ZOO[name]
        model, inputs = build().eval(), (torch.randn(shape),)
    else:
        build, make = ARCHITECTURES[name]
        model, inputs = build().eval(), make()
    bio = module(model, example_inputs=inputs)
    assert all(site.is_split for site in biofx.weight_sites(bio).values())
    for a, b in zip(tensors(bio(*inputs)), tensors(model(*inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_graph_is_one_call_and_the_table_lists_its_weights():
    bio = module(mlp(3, 4, 2))
    assert isinstance(bio, torch.fx.GraphModule)
    calls = [node for node in bio.graph.nodes if node.op == "call_function"]
    assert [node.name for node in calls if node.args[0] is not None][-1] == "call_python"
    assert bio.biofx.islands == {"": 'with frontend="module", the model keeps its Python forward'}
    assert [site.island for site in biofx.weight_sites(bio).values()] == ["", ""]
    assert "the model (Sequential): with frontend" in flat(biofx.summary(bio))
    assert len(biofx.table(bio).splitlines()) == 2 + 4


class Model(nn.Module):
    """Has what a Python class may have."""

    def __init__(self):
        super().__init__()
        self.fc, self.config, self.calls = nn.Linear(3, 3), {"width": 3}, 0

    @property
    def width(self):
        return self.config["width"]

    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x, scale=2.0)
        return x

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        return torch.tanh(self.fc(x)) * scale if x.sum() < 1e9 else x


def test_methods_properties_attributes_and_hooks_stay():
    model, x, events = Model(), torch.randn(2, 3), []
    model.register_forward_hook(lambda m, args, out: events.append(m.calls))
    model.fc.register_forward_pre_hook(lambda m, args: events.append(tuple(m.weight.shape)))
    expected = model.generate(x, 3)
    assert events == [(3, 3), 1, (3, 3), 2, (3, 3), 3]
    model.calls = 0
    bio = module(model)
    for other in (copy.deepcopy(bio), biofx.fold(bio), bio):
        events.clear()
        torch.testing.assert_close(other.generate(x, 3), expected)
        assert events == [(3, 3), 1, (3, 3), 2, (3, 3), 3]
        assert isinstance(other, Model)
        assert (other.width, other.config) == (3, {"width": 3})
    with pytest.raises(TypeError):
        bio(x, 2.0)
    with pytest.raises(TypeError, match="nonsense"):
        bio(x, nonsense=1)


def test_the_signature_is_the_models():
    import inspect

    assert inspect.signature(module(Model()).forward) == inspect.signature(Model().forward)
    assert inspect.signature(copy.deepcopy(module(Model())).forward) == inspect.signature(Model().forward)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.GRU(3, 3), nn.Bilinear(3, 3, 2)])
def test_a_model_that_is_a_layer(layer):
    layer, x = layer.double(), torch.randn(3, 3, 3, dtype=torch.float64)
    inputs = (x, x) if isinstance(layer, nn.Bilinear) else (x,)
    bio = module(layer, EXACT)
    for other in (bio, copy.deepcopy(bio), reloaded(bio)):
        torch.testing.assert_close(other(*inputs), layer(*inputs))
        found, expected = gradients(other, *inputs), gradients(layer, *inputs)
        for name, gradient in found.items():
            wanted = torch.stack([expected[name]] * 2) if gradient.dim() > expected[name].dim() else expected[name]
            torch.testing.assert_close(gradient, wanted)
    assert type(biofx.fold(bio)) is type(layer)
    torch.testing.assert_close(biofx.fold(bio)(*inputs), layer(*inputs))


def test_a_container_is_one_again_when_it_is_folded():
    model, x = mlp(3, 4, 2), torch.randn(2, 3)
    plain = biofx.fold(module(model))
    assert type(plain) is nn.Sequential
    assert len(plain) == 3
    torch.testing.assert_close(plain(x), model(x))


def test_exports_are_of_the_plain_model(tmp_path):
    model, x = mlp(3, 4, 2).eval(), torch.randn(2, 3)
    biofx.export(module(model), tmp_path / "model.pt2", example_inputs=(x,))
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_a_model_transforms_again():
    bio = module(mlp(3, 4, 2), [passes.SplitSynapses(2)])
    again = biofx.transform(bio, [passes.FuzzyLearningRates()], frontend="module")
    assert [site.passes for site in biofx.weight_sites(again).values()] == [
        ("split-synapses", "fuzzy-learning-rates")
    ] * 2
    x = torch.randn(2, 3)
    torch.testing.assert_close(again(x), bio(x))


def test_training_mode_and_dropout_follow_the_model():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))
    bio, x = module(model.eval()), torch.randn(2, 64)
    assert not (bio(x) == 0).any()
    assert (bio.train()(x) == 0).any()
    assert not (biofx.fold(bio.eval())(x) == 0).any()


@pytest.fixture(params=PRETRAINED)
def pretrained(request):
    pytest.importorskip("transformers")
    build, inputs = PRETRAINED[request.param]
    return build().eval(), inputs()


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_models_of_transformers_compute_the_same(pretrained, frontend):
    model, inputs = pretrained
    bio = biofx.transform(model, SPLIT, frontend=frontend, example_inputs=inputs)
    assert isinstance(bio, type(model))
    assert bio.config is not model.config
    for other in (bio, copy.deepcopy(bio), reloaded(bio), biofx.fold(bio)):
        a, b = other(**inputs), model(**inputs)
        assert type(a) is type(b)
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert torch.isfinite(a[0]).all()
    assert type(biofx.fold(bio)) is type(model) or not biofx.summary(bio).count("  the model (")
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_of_models_of_transformers_are_exact(pretrained, checkpointing):
    model, inputs = pretrained
    model, inputs = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    bio = module(model, EXACT)
    if checkpointing is not None:
        if not model.supports_gradient_checkpointing:
            pytest.skip("has no checkpointing")
        bio.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
        for layer in (*bio.modules(), *model.modules()):
            for name in ("p", "dropout", "attention_dropout", "attn_pdrop"):
                if isinstance(getattr(layer, name, None), float):
                    setattr(layer, name, 0.0)
    found = {}
    for key, some in (("bio", bio), ("plain", model)):
        output = some(**inputs)
        sum(v.square().sum() for v in output.values() if torch.is_tensor(v)).backward()
        found[key] = {name: p.grad for name, p in stored_parameters(some) if p.grad is not None}
    assert found["bio"].keys() == found["plain"].keys()
    for name, gradient in found["bio"].items():
        torch.testing.assert_close(gradient, found["plain"][name].expand_as(gradient))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generate_works(name):
    pytest.importorskip("transformers")
    build, inputs = PRETRAINED[name]
    model, given = build().eval(), inputs()
    options = {"max_new_tokens": 5, "do_sample": False}
    given = {key: given[key] for key in ("input_ids", "attention_mask")}
    bio = module(model)
    expected = model.generate(**given, **options)
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        assert torch.equal(other.generate(**given, **options), expected)


def test_methods_that_call_submodules_see_effective_weights():
    pytest.importorskip("transformers")
    build, inputs = PRETRAINED["clip"]
    model, given = build().eval(), inputs()
    bio = module(model, EXACT)
    a, b = (m.get_image_features(given["pixel_values"]) for m in (bio, model))
    a, b = (x if torch.is_tensor(x) else x.pooler_output for x in (a, b))
    torch.testing.assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    wanted = model.visual_projection.weight.grad
    torch.testing.assert_close(bio.get_parameter("visual_projection.weight").grad, torch.stack([wanted, wanted]))


def test_a_transformers_model_inside_another_is_an_island():
    pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = PRETRAINED["bert"][0]()
            self.head = nn.Linear(50, 2)

        def forward(self, input_ids, attention_mask):
            return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).logits)

    model, given = Classifier().eval(), PRETRAINED["bert"][1]()
    bio = biofx.transform(model, SPLIT, example_inputs=given)
    assert list(bio.biofx.islands) == ["encoder.bert"]
    sites = biofx.weight_sites(bio)
    assert sites["head.weight"].island is None
    assert sites["encoder.bert.encoder.layer.0.attention.self.query.weight"].island == "encoder.bert"
    torch.testing.assert_close(bio(**given), model(**given), rtol=1e-4, atol=1e-5)
