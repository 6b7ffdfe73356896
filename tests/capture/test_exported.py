"""The front end "export": the graph is the model, whatever Python its forward is made of."""

import copy
import io
import random
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from biofx.base.isolation import split_inputs
from biofx.model.synapses import stored_parameters
from biofx.weights.facts import Need
from conftest import flat, loss, tensors, times_listed
from models import any_python
from models.architectures import ARCHITECTURES
from models.small import CONVOLUTIONS, ZOO, ConvNet, Reused, layer_and_input, mlp

NEUTRAL = [passes.FuzzyLearningRates(distribution="baseline")]
EVERYTHING = [passes.SplitSynapses(3), passes.DalesPrinciple(balance=False), passes.FuzzyLearningRates()]


def bert(transformers):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    return transformers.BertModel(config), {"input_ids": tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def llama(transformers):
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32, **NO_TOKENS
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def t5(transformers):
    config = transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_ff=16, d_kv=4, vocab_size=32)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), inputs


NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TRANSFORMERS = {f.__name__: f for f in (bert, llama, t5)}


def tokens():
    return torch.randint(3, 32, (2, 6))


def x(*shape):
    return torch.randn(shape or (2, 4))


ANY_PYTHON = {
    "shape_branch": (any_python.ShapeBranch, lambda: (x(3, 4),)),
    "loop": (any_python.Loop, lambda: (x(3, 5, 4),)),
    "returns": (any_python.Returns, lambda: {"x": x()}),
    "auxiliary": (any_python.Auxiliary, lambda: x()),
    "counting": (any_python.Counting, lambda: x()),
    "gated": (any_python.Gated, lambda: x()),
}
SMALL = {name: (build, lambda shape=shape: (x(*shape),)) for name, (build, shape) in ZOO.items()}
SAMPLE = ("efficientnet", "gpt", "lstm", "mixture_of_experts", "siamese")
MODELS = {**SMALL, **{name: ARCHITECTURES[name] for name in SAMPLE}, **ANY_PYTHON}


def export(model, inputs, recipe=NEUTRAL, **options):
    return biofx.transform(model, recipe, frontend="export", example_inputs=inputs, **options)


def export_for_graph(model, inputs):
    """With a pass that needs the graph, so that the Python of the model cannot take its place."""
    return export(model, inputs, [*NEUTRAL, passes.SynapticScaling()])


def call(model, inputs):
    args, kwargs = split_inputs(inputs)
    torch.manual_seed(3)
    return model(*args, **kwargs)


def in_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@dataclass
class Case:
    """A model in float64, what it is called with, and the two after biofx had them."""

    model: nn.Module
    inputs: object
    neutral: nn.Module
    bio: nn.Module


@pytest.fixture(scope="module", params=[*MODELS, *TRANSFORMERS])
def case(request):
    torch.manual_seed(0)
    if request.param in TRANSFORMERS:
        transformers = pytest.importorskip("transformers")
        model, inputs = TRANSFORMERS[request.param](transformers)
    else:
        build, make = MODELS[request.param]
        model, inputs = build(), make()
    model, inputs = model.double(), pytree.tree_map(in_double, inputs)
    bio = export(model, inputs, EVERYTHING)
    return Case(model, inputs, export(model, inputs), bio)


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def forms(bio):
    return [bio, copy.deepcopy(bio), reloaded(bio)]


def same(a, b):
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(torch.equal(p, q) for p, q in pairs)


def assert_same_in_both_modes(bio, model, inputs):
    """Outputs, gradients and buffers, from the same random numbers; `bio` and `model` stay as they are."""
    bio, model = copy.deepcopy(bio), copy.deepcopy(model)
    for training in (True, False, True):
        results = [call(m.train(training), inputs) for m in (bio, model)]
        assert same(*results)
        for result in results:
            loss(result).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(bio.get_parameter(name).grad, parameter.grad)
        for name, buffer in model.named_buffers():
            assert torch.equal(bio.get_buffer(name), buffer), name


def test_outputs_and_gradients_equal_the_model_in_both_modes(case):
    for other in forms(case.neutral):
        assert_same_in_both_modes(other, case.model, case.inputs)


def test_it_has_the_state_of_the_model(case):
    state, expected = case.neutral.state_dict(), case.model.state_dict()
    kept = {name for name in state if name.partition("_synapses.")[2] in ("gain", "steps", "seed")}
    originals = [name.partition("_synapses.")[0] for name in state if name not in kept]
    assert sorted(originals) == sorted(expected)
    assert {n: p.shape for n, p in stored_parameters(case.neutral)} == {
        n: p.shape for n, p in case.model.named_parameters()
    }
    assert isinstance(case.neutral, type(case.model)) or isinstance(case.model, nn.Sequential)


def test_biological_models_survive_everything(case):
    for other in forms(case.bio):
        biofx.verify(other)
        assert same(*(call(copy.deepcopy(m).eval(), case.inputs) for m in (other, case.bio)))


def test_folding_gives_the_plain_model_back(case):
    bio = case.bio.eval()
    plain = biofx.fold(bio)
    assert list(plain.state_dict()) == list(case.model.state_dict())
    model = copy.deepcopy(case.model).eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    results = [tensors(call(copy.deepcopy(m), case.inputs)) for m in (plain, model, bio)]
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_it_trains(case):
    bio = copy.deepcopy(case.bio).train()
    optimizer = torch.optim.AdamW(bio.parameters())
    biofx.attach(bio, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss(call(bio, case.inputs)).backward()
        optimizer.step()
    biofx.verify(bio)


def test_every_parameter_is_in_the_summary(case):
    summary = biofx.summary(case.bio)
    assert all(times_listed(summary, name) == 1 for name, _ in case.model.named_parameters())
    assert len(biofx.weight_sites(case.bio)) > 0


def batched(value, size):
    if not isinstance(value, torch.Tensor):
        return value
    return value[torch.arange(size) % len(value)]


def test_the_batch_may_have_any_size(case):
    model, bio = (copy.deepcopy(m).eval() for m in (case.model, case.neutral))
    five, one = (pytree.tree_map(lambda value, size=size: batched(value, size), case.inputs) for size in (5, 1))
    assert same(call(bio, five), call(model, five))
    assert same(call(bio, one), call(model, one))


BATCHES = {
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda n: (x(n, 5, 8),)),
    "two_inputs": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda n: (x(n, 5, 8), x(n, 3, 8))),
    "mask": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        lambda n: {"src": x(n, 5, 8), "mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
    ),
    "without_gradients": (any_python.Gated, lambda n: (x(n, 4),)),
}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_one_is_like_any_other(name, first):
    build, make = BATCHES[name]
    model = build()
    bio = export(model, make(first))
    for size in (1, 2, 3):
        assert_same_in_both_modes(bio, model, make(size))


class OneApart(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return -y if value.shape[0] == 1 else y


@pytest.mark.parametrize(("first", "other"), [(1, 2), (2, 1)])
def test_a_batch_of_one_runs_the_python_or_is_refused(first, other):
    model = OneApart(4, 4)
    bio = export(model, x(first, 4))
    for size in (first, other):
        value = x(size, 4)
        assert same(bio(value), model(value))
    bio = export_for_graph(model, x(first, 4))
    with pytest.raises(biofx.ArgumentError, match=r"captured for value.shape\[0\] .= 1: value has shape"):
        bio(x(other, 4))


# --- arguments ---------------------------------------------------------------------------------------------------


def test_containers_of_any_kind_are_arguments_and_results():
    model = any_python.Containers()
    inputs = {"batch": {"x": x(), "more": [x(), x()]}, "scale": 2.0, "extra": x()}
    bio = export(model, inputs)
    for other in forms(bio):
        result, expected = call(other, inputs), call(model, inputs)
        assert list(result) == ["sum", "parts", "extra_right"]
        assert result["parts"][1] is None
        assert same(result, expected)
    reordered = {**inputs, "batch": {"more": [x(), x()], "x": x()}}
    assert same(call(bio, reordered), call(model, reordered))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 3.0}, "scale is 3.0, and forward was captured for 2.0"),
        ({"batch": {"x": torch.zeros(2, 4), "more": []}}, "batch['more'] is an empty list, and forward was captured"),
        ({"batch": {"x": torch.zeros(2, 4)}}, "batch is a dict of ['x'], and forward was captured for a dict of"),
        ({"new": torch.zeros(2, 4)}, "named is a dict of ['extra'], ['new'], and forward was captured for a dict of"),
        ({"extra": torch.zeros(2, 5)}, "forward was captured for named['extra'].shape[1] == 4"),
        ({"extra": torch.zeros(4)}, "forward was captured for 2 axes of named['extra'], which has 1"),
    ],
)
def test_other_kinds_of_arguments_are_refused_by_a_needed_graph(change, message):
    inputs = {"batch": {"x": x(), "more": [x()]}, "scale": 2.0, "extra": x()}
    bio = export_for_graph(any_python.Containers(), inputs)
    for other in (bio, reloaded(bio)):
        with pytest.raises(biofx.ArgumentError) as error:
            call(other, {**inputs, **change})
        assert message in str(error.value)


@pytest.mark.parametrize(
    "change", [{"scale": 3.0}, {"batch": {"x": torch.zeros(2, 4), "more": []}}, {"extra": torch.zeros(4)}]
)
def test_on_arguments_of_another_kind_the_python_runs(change):
    inputs = {"batch": {"x": x(), "more": [x()]}, "scale": 2.0, "extra": x()}
    model = any_python.Containers()
    bio = export(model, inputs)
    for other in forms(bio):
        assert same(call(other, {**inputs, **change}), call(model, {**inputs, **change}))


def test_arguments_by_position_and_more_of_them():
    model, inputs = any_python.Containers(), ({"x": x(), "more": []}, x(), x())
    bio = export_for_graph(model, inputs)
    for other in forms(bio):
        assert same(call(other, inputs), call(model, inputs))
    with pytest.raises(
        biofx.ArgumentError, match=r"others is a tuple of \[0\], and forward was captured for a tuple of \[0\], \[1\]"
    ):
        call(bio, inputs[:2])


def test_defaults_stay():
    class Scaled(nn.Linear):
        def forward(self, x, scale=2.0, bias=None):
            y = super().forward(x) * scale
            return y if bias is None else y + bias

    model = Scaled(4, 4)
    bio = export_for_graph(model, x())
    value = x()
    assert same(bio(value), model(value))
    assert same(bio(value, 2.0, bias=None), model(value))
    with pytest.raises(
        biofx.ArgumentError, match="bias is an instance of Tensor, and forward was captured for None.*contain this"
    ):
        bio(value, bias=x())


def test_equal_sizes_have_to_stay_equal():
    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    bio = export_for_graph(Sum(4, 4), (x(), x()))
    with pytest.raises(biofx.ArgumentError, match=r"forward was captured for .*a.shape\[0\] == b.shape\[0\]"):
        bio(x(3, 4), x(1, 4))


@pytest.mark.parametrize("mode", [True, False])
def test_conditions_are_those_of_the_mode(mode):
    """A batch norm needs more than one example in training only."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    bio = export_for_graph(model, x()).train(mode)
    if mode:
        with pytest.raises(biofx.ArgumentError, match=r"captured for input.shape\[0\]"):
            bio(x(1, 4))
    else:
        one = x(1, 4)
        assert same(bio(one), model.eval()(one))


def test_another_dtype_than_that_of_the_example():
    class ByDtype(nn.Linear):
        def forward(self, value, tokens):
            y = super().forward(value)
            return y if tokens.dtype == torch.int32 else -y

    model, value = ByDtype(4, 4), x()
    inputs, others = (value, torch.ones(2, dtype=torch.int32)), (value, torch.ones(2, dtype=torch.int64))
    assert same(export(model, inputs)(*others), model(*others))
    bio = export_for_graph(model, inputs)
    with pytest.raises(biofx.ArgumentError, match="torch.int32 as the dtype of tokens, which is torch.int64"):
        bio(*others)
    assert bio.double()(value.double(), inputs[1]).dtype == torch.float64


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_have_the_axes_that_they_have_elsewhere(kind, padding):
    if "transpose" in kind and padding != 1:
        pytest.skip("a transposed convolution has no padding by name")
    layer, value = layer_and_input(kind, "grouped", padding=padding)
    exported, traced = (
        biofx.transform(layer, EVERYTHING, example_inputs=value, frontend=frontend)
        for frontend in ("export", "symbolic")
    )
    a, b = biofx.weight_sites(exported)["weight"], biofx.weight_sites(traced)["weight"]
    assert (a.operator, a.groups, a.units) == (b.operator, b.groups, b.units)
    torch.testing.assert_close(exported(value), traced(value))


def test_units_are_those_of_the_symbolic_front_end():
    for model, value in ((ConvNet(), x(2, 1, 8, 8)), (mlp(4, 8, 6, 3), x())):
        signs = []
        for frontend in ("export", "symbolic"):
            bio = biofx.transform(model, EVERYTHING, example_inputs=value, frontend=frontend)
            signs.append({name: site.sign for name, site in biofx.weight_sites(bio).items()})
        assert signs[0].keys() == signs[1].keys()
        for name, sign in signs[0].items():
            assert sign is signs[1][name] is None or torch.equal(sign, signs[1][name])


def test_tied_and_reused_weights_have_one_chain():
    bio = export(Reused(), x(), EVERYTHING)
    assert list(biofx.weight_sites(bio)) == ["step.weight", "first.weight"]
    assert len(biofx.weight_sites(bio)["step.weight"].uses) == 3
    assert bio.first.weight_synapses is bio.second.weight_synapses


class Casts(nn.Module):
    """Computes in lower precision, with one weight as it is stored and one that is transposed before."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Parameter(x(4, 8))

    def forward(self, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(self.first(value), self.second).float()


class TwoWays(nn.Module):
    """Uses a weight in another way in training, and a product of parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.a, self.b = nn.Parameter(x(6, 2)), nn.Parameter(x(2, 4))

    def forward(self, value):
        if not self.training:
            return self.second(self.first(value).relu())
        hidden = self.first(value) + F.linear(value, self.a @ self.b)
        return F.linear(hidden.tanh() + torch.rand_like(hidden), 2 * self.second.weight)


PARTS = {
    "auxiliary": (any_python.Auxiliary, {"auxiliary.weight": "the part of the model that depends on its mode"}),
    "gated": (any_python.Gated, {"gate.weight": "the part of the model under torch.no_grad"}),
    "casts": (Casts, dict.fromkeys(("second", "first.weight"), "the part of the model under torch.autocast")),
    "two_ways": (TwoWays, dict.fromkeys(("a", "b", "second.weight"), "the part of the model that depends on its mode")),
}


@pytest.mark.parametrize("recipe", [EVERYTHING, "rejuvenate", [passes.MirrorUnits()], [passes.GroupUnits(2)]], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_weights_are_rewritten_inside_of_inner_graphs(name, recipe):
    build, inside = PARTS[name]
    model, value = build(), x()
    bio = export(model, value, recipe)
    sites = biofx.weight_sites(bio)
    assert {site.name: site.surroundings for site in sites.values() if site.inside} == inside
    assert all(site.operator == "linear" for site in sites.values())
    optimizer = torch.optim.SGD(bio.parameters(), 0.01)
    if any(site.passes for site in sites.values()):
        biofx.attach(bio, optimizer)
    for other in forms(bio):
        loss(other.train()(value)).backward()
        biofx.verify(other)
    optimizer.step()
    biofx.verify(bio)
    plain = biofx.fold(bio)
    for training in (True, False):
        a, b = (call(m.train(training), value) for m in (bio, plain))
        torch.testing.assert_close(tensors(a), tensors(b))


def test_weights_inside_of_parts_have_their_axes_and_gradients():
    model, value = TwoWays().double(), x().double()
    bio = export(model, value)
    assert_same_in_both_modes(bio, model, value)
    site = biofx.weight_sites(bio)["second.weight"]
    assert (site.presynaptic_axis, site.postsynaptic_axis) == (1, 0)
    for name in ("a", "b"):  # whose product is a weight
        site = biofx.weight_sites(bio)[name]
        assert (site.axes, site.unmet(Need.UNITS)) == (
            None,
            "matmul computes the weight that its operator reads from it",
        )
    assert "linear, in the part of the model that depends on its mode" in flat(biofx.summary(bio))


class Teacher(nn.Module):
    """Its teacher follows the student at every step in training."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 8), nn.Linear(4, 8).requires_grad_(False)

    def forward(self, value):
        with torch.no_grad():
            if self.training:
                self.teacher.weight.mul_(0.9).add_(self.student.weight, alpha=0.1)
            target = self.teacher(value)
        return self.student(value) - target


@pytest.mark.parametrize("frontend", ["export", "symbolic", "module"])
def test_a_weight_that_forward_changes_is_left_alone(frontend):
    model, value = Teacher(), x()
    bio = biofx.transform(model, NEUTRAL, frontend=frontend, example_inputs=value)
    assert torch.equal(bio.teacher.weight, model.teacher.weight)
    assert "teacher.weight: forward changes it in place" in flat(biofx.summary(bio))
    assert_same_in_both_modes(bio, model, value)
    if frontend == "export":
        assert not torch.equal(copy.deepcopy(bio)(value), copy.deepcopy(bio).eval()(value))


# --- modes -------------------------------------------------------------------------------------------------------


def test_each_module_has_a_mode_of_its_own():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Dropout())
    value = x(8, 4)
    bio = export(model, value)
    for pattern in range(8):
        for index, name in enumerate(("1", "2", "4")):
            for m in (model, bio):
                m.get_submodule(name).train(bool(pattern >> index & 1))
        assert same(call(bio, value), call(model, value))
        assert torch.equal(bio.get_buffer("2.num_batches_tracked"), model[2].num_batches_tracked)


@pytest.mark.parametrize(("model", "exports"), [(mlp(4, 8, 3), 1), (nn.Sequential(nn.Linear(4, 4), nn.Dropout()), 2)])
def test_a_second_export_is_for_models_that_read_their_mode(model, exports, monkeypatch):
    calls, original = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: calls.append(1) or original(*args, **options))
    assert_same_in_both_modes(export(model, x()), model, x())
    assert len(calls) == exports


def test_the_mode_at_the_time_of_the_transform_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    bio, value = export(model, x()), x()
    assert (bio.training, bio.get_submodule("1").training) == (True, False)
    assert same(call(bio, value), call(model, value))
    assert model[1].num_batches_tracked == bio.get_buffer("1.num_batches_tracked") == 0


# --- devices and dtypes ---


class MakesTensors(nn.Linear):
    """Makes tensors on the device of its input, without gradients and in training as well."""

    def forward(self, value):
        with torch.no_grad():
            start = super().forward(torch.zeros(4, device=value.device))
        if self.training:
            start = start + torch.rand(4, device=value.device)
        return super().forward(value) + start + torch.arange(4, device=value.device)


@pytest.mark.parametrize("training", [True, False])
def test_it_may_move_to_another_device(training):
    bio = export(MakesTensors(4, 4), x(), EVERYTHING).train(training)
    for other in forms(bio):
        assert other.to("meta")(x().to("meta")).is_meta


class InItsDtype(nn.Linear):
    def forward(self, value):
        return super().forward(value.round().to(self.weight.dtype))


def test_a_dtype_that_the_graph_contains_stays():
    inputs = torch.arange(8).reshape(2, 4)
    model = InItsDtype(4, 4)
    bio, free = export_for_graph(model, inputs), export_for_graph(mlp(4, 3), x())
    assert same(export(model, inputs).double()(inputs), copy.deepcopy(model).double()(inputs))
    with pytest.raises(biofx.ArgumentError, match="contains torch.float32, in which it was captured, and"):
        bio.double()(inputs)
    assert free.double()(x().double()).dtype == torch.float64


# --- what else there is to a model -------------------------------------------------------------------------------


def test_methods_attributes_and_hooks_of_the_root_stay():
    class Model(nn.Linear):
        def twice(self, value):
            return 2 * self(value)

    model, value, seen = Model(4, 4), x(), []
    model.note = "kept"
    model.register_forward_hook(lambda *_: seen.append(1))
    bio = export(model, value)
    seen.clear()
    assert same(bio.twice(value), 2 * F.linear(value, model.weight, model.bias))
    assert (bio.note, seen) == ("kept", [1])


def test_the_model_is_untouched():
    model = ConvNet()
    before, modules = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    value, state = x(2, 1, 8, 8), torch.get_rng_state()
    export(model, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_place_and_a_failure_in_place():
    model, value = ConvNet(), x(2, 1, 8, 8)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(biofx.ArgumentError):
        export(model, value, exclude="*", inplace=True)
    assert [name for name, _ in model.named_modules()] == modules
    weight = model.head.weight
    assert export(model, value, inplace=True).get_parameter("head.weight") is weight


@pytest.mark.parametrize("name", ["gated", "returns", "auxiliary"])
def test_it_compiles_without_graph_breaks(name):
    build, make = ANY_PYTHON[name]
    inputs = make()
    bio = export(build(), inputs).eval()
    compiled = torch.compile(bio, fullgraph=True, backend="eager")
    assert same(call(compiled, inputs), call(bio, inputs))


def test_it_exports_and_is_transformed_again(tmp_path):
    model, value = ConvNet().eval(), x(2, 1, 8, 8)
    bio = export(model, value, [passes.SplitSynapses(2)])
    path = tmp_path / "model.pt2"
    biofx.export(bio, path, example_inputs=value)
    torch.testing.assert_close(torch.export.load(path).module()(value), model(value))
    again = biofx.transform(bio, NEUTRAL)
    torch.testing.assert_close(again(value), model(value))
    for frontend in ("symbolic", "export"):
        once_more = biofx.transform(biofx.fold(bio), EVERYTHING, example_inputs=value, frontend=frontend)
        assert list(biofx.weight_sites(once_more)) == list(biofx.weight_sites(bio))


# --- refusals ----------------------------------------------------------------------------------------------------


class Decides(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y if y.sum() > 0 else -y


class Counts(nn.Linear):
    calls = 0

    def forward(self, value):
        self.calls += 1
        return super().forward(value) * self.calls


class DrawsInPython(nn.Linear):
    def __init__(self, draw):
        super().__init__(4, 4)
        self.draw = draw

    def forward(self, value):
        return super().forward(value) * self.draw()


class Chooses(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))


class Opaque:
    pass


class ReturnsAnything(nn.Linear):
    def forward(self, value):
        return super().forward(value), Opaque()


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))
        self[0].register_forward_hook(lambda *_: None)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class ReversesGradients(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y, Reversed.apply(y).exp()


class ReversesInEvaluation(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return y if self.training else Reversed.apply(y)


class ReversesInTraining(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return Reversed.apply(y) if self.training else y


class HooksItsTensor(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y


class Infers(nn.Linear):
    def forward(self, value):
        with torch.inference_mode():
            y = super().forward(value)
        return y.clone()


class Checkpoints(nn.Sequential):
    def __init__(self, use_reentrant):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, value):
        return checkpoint(self[1], self[0](value).relu(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Decides(4, 4), r"Decides cannot be exported in training mode: .*data-dependent.*\n +at .*y if y.sum\(\) > 0"),
        (
            Counts(4, 4),
            "Counts cannot be exported: its forward changes the attribute calls, which a graph cannot represent",
        ),
        (nn.Sequential(Counts(4, 4)), "Sequential cannot be exported: the forward of 0 changes the attribute calls"),
        (
            nn.Sequential(Decides(4, 4)),
            r"decides by the values of a tensor.*\n  in 0 \(Decides\)\n  at .*y if y.sum",
        ),
        (nn.BatchNorm1d(4, momentum=None), "makes a Python number of them: Could not extract"),
        (DrawsInPython(random.random), "its forward draws random numbers from Python or NumPy"),
        (DrawsInPython(lambda: numpy.random.random()), "its forward draws random numbers from Python or NumPy"),
        (ReturnsAnything(4, 4), "forward returns an instance of Opaque, which torch.export cannot unpack"),
        (Chooses(4, 4), "forward uses cond, whose branches biofx cannot follow"),
        (Hooked(), r"0 \(Linear\) has hooks, which only run when the module itself is called"),
        (
            ReversesGradients(4, 4),
            "computes something else in evaluation mode: gradient of weight differs.*a torch.autograd.Function",
        ),
        (ReversesInEvaluation(4, 4), "computes something else in evaluation mode: gradient of weight differs"),
        (ReversesInTraining(4, 4), "computes something else in training mode: gradient of weight differs"),
        (HooksItsTensor(4, 4), "computes something else in evaluation mode: gradient of weight differs"),
        (Infers(4, 4), "its forward uses torch.inference_mode, which a graph cannot represent"),
        (Checkpoints(use_reentrant=True), "its forward calls checkpoint with use_reentrant=True, which a graph"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_graph_does_not_do_is_refused_with_the_reason(model, message, capsys):
    with pytest.raises(biofx.CaptureError, match=r"(?s)" + message) as error:
        export(model, x())
    assert 'frontend="module"' in str(error.value)
    assert len(str(error.value).splitlines()) < 6
    assert not any(capsys.readouterr())


def test_a_checkpoint_that_is_not_reentrant_is_part_of_the_graph():
    model, value = Checkpoints(use_reentrant=False), x()
    bio = export(model, value)
    assert_same_in_both_modes(bio, model, value)
    assert len(biofx.weight_sites(bio)) == 2


def test_padding_filled_without_gradients_is_refused():
    inputs = {"src": x(2, 5, 8), "src_key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)}
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(biofx.CaptureError, match="build it with enable_nested_tensor=False"):
        export(nn.TransformerEncoder(layer, 1), inputs)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    assert_same_in_both_modes(export(model, inputs), model, inputs)


class Cells(nn.Module):
    """Recurrent cells in a loop, and one whose parameters are its own."""

    def __init__(self, length):
        super().__init__()
        self.first, self.second, self.length = nn.LSTMCell(4, 5), nn.GRUCell(5, 5, bias=False), length
        self.own_ih, self.own_hh = (nn.Parameter(torch.randn(3, 5) / 2), nn.Parameter(torch.randn(3, 3) / 2))

    def forward(self, x):
        h, c, g, own = (x.new_zeros(x.shape[1], n) for n in (5, 5, 5, 3))
        for t in range(self.length):
            h, c = self.first(x[t], (h, c))
            g = self.second(h, g)
            own = torch.rnn_relu_cell(g, own, self.own_ih, self.own_hh)
        return own


RECURRENT = {
    "lstm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3)),
    "gru": lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5, bias=False)),
    "rnn": lambda: nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 5, nonlinearity="relu", batch_first=True)),
    "cells": lambda: Cells(3),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_weights_of_recurrent_layers_and_cells(kind, frontend):
    model, value = RECURRENT[kind]().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    bio = biofx.transform(model, [passes.SplitSynapses(2, compensate=False)], frontend=frontend, example_inputs=value)
    sites = biofx.weight_sites(bio)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert sites.keys() == matrices
    for name in matrices:
        assert (sites[name].presynaptic_axis, sites[name].postsynaptic_axis, sites[name].is_split) == (1, 0, True)
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        torch.testing.assert_close(tensors(other(value)), tensors(model(value)))
    loss(bio(value)).backward()
    loss(model(value)).backward()
    for name, parameter in model.named_parameters():
        wanted = torch.stack([parameter.grad] * 2) if name in matrices else parameter.grad
        torch.testing.assert_close(bio.get_parameter(name).grad, wanted)
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    torch.testing.assert_close(
        tensors(bio.double()(value)), tensors(model(value))
    )  # layers of torch.nn list weights anew


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_summary_of_recurrent_layers(frontend):
    bio = biofx.transform(RECURRENT["gru"](), [passes.DalesPrinciple()], frontend=frontend, example_inputs=x(3, 2, 4))
    sites = biofx.weight_sites(bio)
    operators = {name: site.operator for name, site in sites.items()}
    assert operators == {"0.weight": "linear", "1.weight_ih_l0": "gru", "1.weight_hh_l0": "gru"}
    assert [site.sign is None for site in sites.values()] == [True, False, False]


def test_example_inputs_are_needed_and_have_to_fit():
    model = mlp(4, 4)
    with pytest.raises(biofx.ArgumentError, match='frontend="export" runs the model: it needs example_inputs, such as'):
        biofx.transform(model, NEUTRAL, frontend="export")
    with pytest.raises(biofx.ArgumentError, match="example_inputs do not fit Sequential.forward: "):
        export(model, x(2, 5))
    with pytest.raises(biofx.ArgumentError, match="example_inputs do not fit Sequential.forward"):
        export(model, (x(), x()))
