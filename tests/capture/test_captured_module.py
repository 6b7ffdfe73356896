"""A captured model is the model: an instance of its class, with its methods, hooks and state, through all copies."""

import collections
import copy
import functools
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import biofx
from biofx import passes

NEUTRAL = [passes.FuzzyLearningRates(distribution="baseline")]


class Model(nn.Module):
    """Overrides what a module may override."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.hits = 0

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def get_extra_state(self):
        return {"hits": self.hits}

    def set_extra_state(self, state):
        self.hits = state["hits"]

    @property
    def device(self):
        return self.fc.weight.device

    def loss(self, x):
        return self(x).square().sum()

    def count(self, *_):
        self.hits += 1

    def forward(self, x):
        return self.norm(self.fc(x))


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def forms(bio):
    """A captured model after everything that people do to it."""
    return [
        bio,
        copy.deepcopy(bio),
        copy.copy(bio),
        reloaded(bio),
        reloaded(copy.deepcopy(bio)),
        biofx.fold(bio),
        biofx.transform(biofx.fold(bio), NEUTRAL),
    ]


def test_methods_properties_and_overrides_stay():
    model, x = Model(), torch.randn(4, 3)
    for other in forms(biofx.transform(model, NEUTRAL)):
        assert isinstance(other, Model)
        assert isinstance(other, torch.fx.GraphModule) or type(other) is Model  # which is folded
        assert type(other).__name__ == "Model"
        assert not other.train().norm.training
        assert other.training
        assert torch.equal(other.loss(x), model.train().loss(x))
        assert other.device == model.device


def test_extra_state_stays():
    model = Model()
    model.hits = 5
    for other in forms(biofx.transform(model, NEUTRAL)):
        state = other.state_dict()
        assert state["_extra_state"] == {"hits": 5}
        state["_extra_state"] = {"hits": 7}
        other.load_state_dict(state)
        assert other.hits == 7


def test_a_captured_model_compiles_and_exports():
    model, x = Model().eval(), torch.randn(4, 3)
    bio = biofx.transform(model, NEUTRAL)
    assert torch.equal(torch.compile(bio, fullgraph=True, backend="eager")(x), model(x))
    assert torch.equal(torch.export.export(bio, (x,)).module()(x), model(x))


def test_a_captured_layer_is_no_leaf():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    bio = biofx.transform(layer, NEUTRAL)
    assert isinstance(bio, nn.Linear)
    assert bio.in_features == 3
    assert torch.equal(torch.compile(bio, fullgraph=True, backend="eager")(x), layer(x))
    assert "scale_grad" in bio.code


def test_a_captured_container_stays_one():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    for bio in forms(biofx.transform(model, NEUTRAL)):
        assert type(bio).__name__ == "Sequential"
        assert isinstance(bio, nn.Sequential)
        assert len(bio) == len(list(bio)) == len(list(bio.children())) == 3
        assert [type(layer).__name__ for layer in bio] == ["Linear", "ReLU", "Linear"]
        assert torch.equal(bio[2].bias, model[2].bias)
        assert torch.equal(bio[:2](x), model[:2](x))
        assert torch.equal(bio[-1](bio[:-1](x)), model(x))
        bio.append(nn.Tanh())
        assert torch.equal(bio(x), model(x).tanh())


def test_overrides_of_a_container_stay():
    class Layers(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    bio, x = biofx.transform(Layers(nn.Linear(3, 3), nn.Dropout(0.9)), NEUTRAL), torch.randn(5, 3)
    assert not bio.train().training
    assert torch.equal(bio(x), bio[0](x))


def test_a_class_that_allows_no_subclass_is_refused():
    class Closed(Model):
        def __init_subclass__(cls):
            raise TypeError("closed")

    with pytest.raises(biofx.CaptureError, match="Closed does not allow subclasses.*closed"):
        biofx.transform(Closed(), NEUTRAL)


def events_of(model, x, events):
    events.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    with pytest.raises((TypeError, AttributeError)):
        model(None)
    return list(events)


def test_hooks_of_the_root_run_as_on_the_original():
    model, x, events = Model(), torch.randn(4, 3, requires_grad=True), []

    def log(event):
        return lambda *_, **__: events.append(event)

    model.register_forward_pre_hook(log("pre"), with_kwargs=True)
    model.register_forward_hook(log("forward"), with_kwargs=True)
    model.register_forward_hook(log("always"), always_call=True)
    model.register_full_backward_hook(log("backward"))
    model.register_full_backward_pre_hook(log("backward pre"))
    model.register_state_dict_pre_hook(log("state_dict pre"))
    model.register_state_dict_post_hook(log("state_dict"))
    model.register_load_state_dict_pre_hook(log("load pre"))
    model.register_load_state_dict_post_hook(log("load"))
    expected = events_of(model, x, events)
    assert len(expected) == 11
    bio = biofx.transform(model, NEUTRAL)
    assert events_of(bio, x, events) == expected
    assert events_of(copy.deepcopy(bio), x, events) == expected


def test_a_hook_that_is_a_method_acts_on_the_captured_model():
    model, x = Model(), torch.randn(4, 3)
    model.register_forward_hook(model.count)
    model.norm.register_forward_pre_hook(model.count)
    bio = biofx.transform(model, NEUTRAL)
    for other in (bio, copy.deepcopy(bio), reloaded(bio), biofx.fold(bio)):
        before = other.hits
        other(x)
        assert other.hits == before + 2
    assert model.hits == 0


def test_a_hook_that_takes_its_module_gets_that_module():
    model, seen = Model(), []
    model.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model.norm.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    bio = biofx.transform(model, NEUTRAL)
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        seen.clear()
        other.load_state_dict(other.state_dict())
        assert seen == [other, other.norm]


def test_a_transform_in_place_that_fails_leaves_the_hooks():
    model, x = Model(), torch.randn(4, 3)
    model.norm.register_forward_pre_hook(model.count)
    with pytest.raises(biofx.ArgumentError):
        biofx.transform(model, NEUTRAL, inplace=True, exclude="fc.weight")
    model(x)
    assert model.hits == 1


class Sampler:
    """Holds the model, as solvers do."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return x * self.model.scale * self.model.gain


class RefersToItself(nn.Module):
    def __init__(self, refer):
        super().__init__()
        self.fc, self.gain, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3)), 1.0
        self.kept = refer(self)

    def scaled(self, x):
        return x * self.scale * self.gain

    def forward(self, x):
        return self.fc(self.kept[0](x))


def scaled_by(x, owner):
    return owner.scaled(x)


REFERENCES = {
    "a method": lambda m: [m.scaled],
    "in a tuple": lambda m: (m.scaled,),
    "a partial": lambda m: [functools.partial(RefersToItself.scaled, m)],
    "a partial by keyword": lambda m: [functools.partial(scaled_by, owner=m)],
    "an object": lambda m: [Sampler(m)],
    "in a deque": lambda m: collections.deque([m.scaled]),
    "a closure": lambda m: [lambda x: m.scaled(x)],
    "a default": lambda m: [lambda x, own=m: own.scaled(x)],
}


@pytest.mark.parametrize("case", REFERENCES)
def test_what_refers_to_the_model_follows_it(case):
    """An attribute that is set, and a parameter that is assigned, act on what the model kept of itself."""
    model, x = RefersToItself(REFERENCES[case]), torch.randn(4, 3)
    plain = RefersToItself(REFERENCES[case])
    plain.load_state_dict(model.state_dict())
    inplace = case in ("a closure", "a default")
    bio = biofx.transform(model, NEUTRAL, inplace=inplace)
    copies = (bio,) if inplace else (bio, copy.deepcopy(bio), reloaded(bio), biofx.fold(bio))
    plain.scale, plain.gain = 2.0, nn.Parameter(torch.zeros(3) + 3)
    for other in copies:
        other.scale, other.gain = 2.0, nn.Parameter(torch.zeros(3) + 3)
        torch.testing.assert_close(other(x), plain(x))


@pytest.mark.parametrize("case", ["a closure", "a default"])
def test_a_copy_does_not_take_over_functions(case):
    """A copy shares functions with its original, as any copy of a module does."""
    bio = biofx.transform(RefersToItself(REFERENCES[case]), NEUTRAL, inplace=True)
    x = torch.randn(4, 3)
    copy.deepcopy(bio).scale = 5.0
    bio.scale = 2.0
    torch.testing.assert_close(bio(x), bio.fc(bio.scaled(x)))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_transform_in_place_that_fails_leaves_references(frontend):
    model, x = RefersToItself(REFERENCES["an object"]), torch.randn(4, 3)
    with pytest.raises(biofx.ArgumentError):
        biofx.transform(model, NEUTRAL, inplace=True, exclude="*", frontend=frontend, example_inputs=x)
    assert model.kept[0].model is model


class MakesTwin(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.fc = nn.Linear(size, size)

    def forward(self, x):
        twin, layer = type(self)(3), type(self.fc)(3, 3)
        nn.init.eye_(twin.fc.weight)
        layer.weight, layer.bias = self.fc.weight, self.fc.bias
        return self.fc(x) - layer(x) + twin.fc(x) - twin.fc.bias


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_the_class_makes_models_of_the_original_class(frontend):
    bio, x = biofx.transform(MakesTwin(3), "split-synapses", frontend=frontend), torch.randn(4, 3)
    assert type(type(bio)(2)) is MakesTwin
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        torch.testing.assert_close(other(x), x)


class PassesOn(nn.Module):
    """A wrapper with what the model inside does not have, such as a `PeftModel`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.head(self.inner(x))


def test_a_copy_of_what_passes_on_attributes_is_one():
    wrapped, x = PassesOn(biofx.transform(Model(), "split-synapses")), torch.randn(4, 3)
    copied = copy.deepcopy(wrapped)
    assert type(copied) is PassesOn
    assert copied.inner is not wrapped.inner
    torch.testing.assert_close(copied(x), wrapped(x))


def test_a_copy_of_a_compiled_model_is_compiled():
    compiled = torch.compile(biofx.transform(Model(), "split-synapses"), backend="eager")
    assert type(copy.deepcopy(compiled)) is type(compiled)


ROWS = {}


class NotesItsClass(nn.Linear):
    """Finds what it returns by the name of its class, as models of transformers do."""

    def forward(self, x):
        result = super().forward(x)
        return {"y": result, "x": x} if ROWS.get(str(type(self))) else {"y": result}


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_class_is_found_by_its_name(frontend, monkeypatch):
    monkeypatch.setitem(ROWS, str(NotesItsClass), True)
    bio, x = biofx.transform(NotesItsClass(3, 3), "split-synapses", frontend=frontend), torch.randn(4, 3)
    for other in (bio, copy.deepcopy(bio), reloaded(bio), biofx.fold(bio)):
        assert [*other(x)] == ["y", "x"]


class TwoResults(nn.Module):
    """Decides by values, and returns an object."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return types.SimpleNamespace(y=self.fc(x) if x.sum() < 1e9 else x, extra=2 * x)


class ReadsAttributesOfAResult(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = TwoResults(), nn.Linear(3, 2)

    def forward(self, x):
        both = self.inner(x)
        return self.head(both.y), both.extra


def test_an_attribute_may_be_read_long_before_its_use():
    model, x = ReadsAttributesOfAResult(), torch.randn(4, 3)
    bio = biofx.transform(model, "split-synapses", example_inputs=x)
    island = next(iter(bio.graph.find_nodes(op="call_module")))
    read = next(node for node in bio.graph.nodes if node.target is getattr and node.args[1] == "extra")
    island.append(read)  # as what computed with it, and was removed, leaves it
    bio.recompile()
    torch.testing.assert_close(reloaded(bio)(x), model(x))


def derive(model):
    class Doubled(type(model)):
        def forward(self, x):
            return super().forward(x) * 2

    model.__class__ = Doubled


def derive_by_name(model):
    original = type(model)

    class Shift:
        factor = 2

        def shifted(self, x):
            return x + 1

    class Shifted(original, Shift):
        @property
        def factor(self):
            return super().factor + 1

        def forward(self, x):
            plain = lambda: original.forward(self, x)  # noqa: E731
            return super().shifted(plain()) * self.factor

    model.__class__ = Shifted


def parametrize_bias(model):
    parametrize.register_parametrization(model, "bias", nn.ReLU())


def recompiled(bio):
    bio.recompile()
    return bio


COPIES = (copy.deepcopy, copy.copy, recompiled, biofx.fold)


@pytest.mark.parametrize("change", [derive, derive_by_name, parametrize_bias])
@pytest.mark.parametrize("passed_on", COPIES)
def test_a_class_derived_since_the_transform_stays(change, passed_on):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    bio = biofx.transform(model, "split-synapses", example_inputs=x)
    change(model)
    change(bio)
    torch.testing.assert_close(passed_on(bio)(x), model(x))


def test_a_model_with_a_class_derived_since_is_not_saved(tmp_path):
    bio = biofx.transform(nn.Linear(3, 2), "split-synapses")
    derive(bio)
    for save in (pickle.dumps, lambda model: biofx.save(model, tmp_path / "model")):
        with pytest.raises(biofx.SavingError, match="Doubled.*state_dict"):
            save(bio)


def test_nor_is_a_folded_graph_with_such_a_class():
    """Its pickle was one of the graph alone."""
    folded = biofx.fold(biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "group-units"))
    derive(folded)
    with pytest.raises(biofx.SavingError, match="Doubled.*state_dict"):
        pickle.dumps(folded)
