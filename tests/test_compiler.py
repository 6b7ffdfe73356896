"""`biofx.transform`: its promises, apart from what single passes do."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import fx, nn

import biofx
from biofx import passes
from biofx.model.slots import Slot
from biofx.model.synapses import stored_parameters
from conftest import flat
from models.small import ConvNet, mlp

BOTH = [passes.SplitSynapses(3), passes.FuzzyLearningRates()]


def storages(model):
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        [type(m) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
    )


def assert_untouched(model, before):
    state, types, attributes = snapshot(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[k], before[0][k]) for k in state)
    assert (types, attributes) == before[1:]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched_and_shares_no_tensor(zoo, training):
    model, x = zoo
    model.train(training)
    before = snapshot(model)
    bio = biofx.transform(model, BOTH, example_inputs=(x,))
    assert isinstance(bio, fx.GraphModule)
    assert_untouched(model, before)
    assert not storages(model) & storages(bio)


def test_mode_dtype_and_device_are_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = ConvNet().to(dtype)
        model.norm.eval()
        bio = biofx.transform(model, BOTH)
        assert bio.training
        assert not bio.norm.training
        assert {t.dtype for t in [*bio.parameters(), *biofx.weight_sites(bio)["head.weight"].gain]} == {dtype}


def test_requires_grad_is_kept():
    model = mlp(3, 4, 2)
    model[0].weight.requires_grad_(False)
    bio = biofx.transform(model, BOTH)
    assert {n: p.requires_grad for n, p in stored_parameters(bio)} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert "0.weight (frozen)" in flat(biofx.summary(bio))


def test_the_global_rng_is_not_moved():
    state = torch.get_rng_state()
    biofx.transform(ConvNet().eval(), "split-synapses,fuzzy-learning-rates{distribution=beta}")
    fresh = torch.get_rng_state()
    torch.set_rng_state(state)
    ConvNet()
    assert torch.equal(torch.get_rng_state(), fresh)


def test_the_seed_decides_and_a_new_layer_changes_no_other_draw():
    small, large = mlp(3, 4, 2), mlp(3, 4, 2, 2)
    large.load_state_dict(small.state_dict(), strict=False)

    def draws(model, seed):
        bio = biofx.transform(model, BOTH, seed=seed)
        return [bio.get_parameter("0.weight").data, bio.get_buffer("2.weight_synapses.gain")]

    def equal(a, b):
        return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]

    assert equal(draws(small, 1), draws(small, 1)) == [True, True]
    assert equal(draws(small, 1), draws(large, 1)) == [True, True]
    assert equal(draws(small, 1), draws(small, 2)) == [False, False]


def test_a_seed_may_be_any_integer():
    model = mlp(2, 2)
    a, b = (biofx.transform(model, BOTH, seed=seed) for seed in (np.int64(3), 3))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert json.dumps(a.meta["biofx"]["passes"][0]["seed"]) == "3"


def test_a_model_that_is_transformed_in_inference_mode_trains():
    model = mlp(2, 3, 2)
    with torch.inference_mode():
        bio = biofx.transform(model, BOTH, example_inputs=torch.randn(1, 2))
    assert not any(t.is_inference() for t in [*bio.parameters(), *bio.buffers()])
    bio(torch.randn(1, 2)).sum().backward()


def test_exclude():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model = nn.Sequential(*model.values())
    bio = biofx.transform(model, BOTH, exclude="0.*")
    assert torch.equal(bio.get_parameter("0.weight"), model[0].weight)
    assert bio.get_parameter("1.weight").dim() == 3
    assert 'split-synapses: excluded by pattern "0.*"' in flat(biofx.summary(bio))


def test_exclude_by_any_name_of_a_tied_weight():
    model = mlp(2, 2, 2)
    model[2].weight = model[0].weight
    with pytest.raises(biofx.ArgumentError, match="no weight is left to transform"):
        biofx.transform(model, BOTH, exclude=["2.weight"])


def test_excluded_weights_take_options_of_a_second_transform():
    model = mlp(2, 3, 2)
    bio = biofx.transform(model, [passes.SplitSynapses(2)], exclude="2.*")
    bio = biofx.transform(bio, [passes.SplitSynapses(5)], exclude="0.*")
    assert [site.synapses for site in biofx.weight_sites(bio).values()] == [2, 5]
    x = torch.randn(4, 2)
    torch.testing.assert_close(bio(x), model(x))


def test_passes_in_two_transforms_are_passes_in_one():
    model, x = mlp(2, 3, 2), torch.randn(4, 2)
    once = biofx.transform(model, BOTH)
    twice = biofx.transform(biofx.transform(model, [BOTH[0]]), [BOTH[1]])
    assert twice.code == once.code
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert torch.equal(once(x), twice(x))


def test_inplace_uses_the_given_tensors():
    model = mlp(2, 3, 2)
    bias, weight = model[0].bias, model[0].weight
    bio = biofx.transform(model, [passes.FuzzyLearningRates()], inplace=True)
    assert bio.get_parameter("0.bias") is bias
    assert bio.get_parameter("0.weight") is weight


class Counting(nn.Module):
    """Changes its buffer and its input in forward."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.fc(x.add_(1)) + self.calls.add_(1)


@pytest.mark.parametrize("inplace", [True, False])
def test_example_inputs_leave_no_trace(inplace):
    x = torch.zeros(1, 2)
    bio = biofx.transform(Counting(), [passes.SplitSynapses()], inplace=inplace, example_inputs=x)
    assert torch.equal(x, torch.zeros(1, 2))
    assert bio.calls == 0


class Failing(passes.Pass):
    """Fails at the second weight, after it has changed the first."""

    name = "failing"
    slot = Slot.HOOK

    def rewrite(self, site, edit):
        if site.name == "2.weight":
            raise RuntimeError("on purpose")
        edit.replace_raw(site.raw * 2)
        edit.state("marker", torch.zeros(1))
        edit.insert(torch.ops.biofx.scale_grad, 0.5)


class FailingLast(passes.Pass):
    """Fails behind passes that give weights their signs."""

    name = "failing-last"
    slot = Slot.HOOK

    def rewrite(self, site, edit):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_a_failed_transform_leaves_the_model_as_it_was(inplace, again):
    model, x = mlp(2, 3, 2), torch.randn(4, 2)
    if again:
        model = biofx.transform(model, [passes.FuzzyLearningRates()])
        before, code, record = snapshot(model), model.code, str(model.biofx)
    else:
        before = snapshot(model)
    parameters, expected = list(model.parameters()), model(x)
    with pytest.raises(RuntimeError, match="on purpose"):
        biofx.transform(model, [Failing()], inplace=inplace)
    assert_untouched(model, before)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert torch.equal(model(x), expected)
    if again:
        assert (model.code, str(model.biofx)) == (code, record)
        biofx.verify(model)


@pytest.mark.parametrize("balance", [True, False])
def test_signs_given_in_place_are_undone_if_a_later_pass_fails(balance):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[1].weight.data[0] = -1.0  # turned over, with the weights before it
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    signs = passes.DalesPrinciple(balance=balance, sites=["3.weight", "5.weight"])
    with pytest.raises(RuntimeError, match="on purpose"):
        biofx.transform(model, [signs, FailingLast()], inplace=True, example_inputs=torch.randn(3, 4))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_print_between_gets_the_graph_after_each_pass(capsys):
    texts = []
    biofx.transform(nn.Linear(2, 2), BOTH, print_between=texts.append)
    assert [t.partition(":")[0] for t in texts] == ["after split-synapses{synapses=3}", "after fuzzy-learning-rates"]
    assert "biofx.scale_grad" not in texts[0].partition("weight_synapses.gain")[2]
    assert "weight_synapses.gain" in texts[1]
    assert capsys.readouterr().out == ""
    biofx.transform(nn.Linear(2, 2), BOTH, print_between=True)
    assert "after fuzzy-learning-rates:" in capsys.readouterr().out


def test_meta_says_what_ran():
    bio = biofx.transform(mlp(2, 3, 2), BOTH, seed=7, exclude="0.*")
    first, second = bio.meta["biofx"]["passes"]
    assert (first["pass"], second["pass"]) == ("split-synapses{synapses=3}", "fuzzy-learning-rates")
    assert first["seed"] == 7
    assert first["weights"] == ["2.weight"]
    assert 0 < first["seconds"] < 60
    assert copy.deepcopy(bio).meta == bio.meta


def test_importing_biofx_imports_no_heavy_packages():
    code = (
        "import sys, biofx; print([m for m in ('networkx', 'onnx', 'safetensors', 'matplotlib') if m in sys.modules])"
    )
    before = (
        "import sys, torch; print([m for m in ('networkx', 'onnx', 'safetensors', 'matplotlib') if m in sys.modules])"
    )
    outputs = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout for c in (code, before)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": []}, "no pass given; the passes are .*fuzzy-learning-rates, .*split-synapses"),
        ({"passes": None}, "passes must be a list of passes or a pipeline string, got NoneType"),
        ({"passes": passes.SplitSynapses()}, r"passes must be a list; write passes=\[SplitSynapses\("),
        ({"passes": [passes.SplitSynapses]}, r"passes\[0\] is the class SplitSynapses; write SplitSynapses\(\)"),
        ({"passes": [3]}, r"passes\[0\] is not a pass: 3"),
        ({"frontend": "magic"}, "frontend must be one of 'symbolic', 'module', 'export', got 'magic'"),
        ({"passes": [passes.Pass()]}, r"passes\[0\]: Pass must say which slot it fills"),
        ({"seed": 1.5}, "seed must be a 64-bit integer, got 1.5"),
        ({"seed": True}, "seed must be a 64-bit integer, got True"),
        ({"seed": 2**63}, "seed must be a 64-bit integer, got 9223372036854775808"),
        ({"exclude": None}, "exclude must be a glob pattern or a list of them, got None"),
        ({"exclude": 3}, "exclude must be a glob pattern or a list of them, got 3"),
        ({"exclude": [1]}, r"exclude must be a glob pattern or a list of them, got \[1\]"),
        ({"print_between": 3}, "print_between must be True or a function of one string, got 3"),
        ({"exclude": "fc9"}, 'exclude pattern "fc9" matches no weight; the model has 0.weight, 2.weight'),
        ({"exclude": "*"}, "no weight is left to transform"),
        ({"example_inputs": torch.randn(3, 5)}, "example_inputs do not fit Sequential.forward"),
        ({"example_inputs": (1, 2)}, "example_inputs do not fit Sequential.forward"),
    ],
)
def test_bad_arguments(options, message):
    model = mlp(2, 3, 2)
    for given in (model, biofx.transform(model, [passes.Crystallize()])):
        before = snapshot(given)
        with pytest.raises(biofx.ArgumentError, match=message):
            biofx.transform(given, **{"passes": BOTH, **options})
        assert_untouched(given, before)


class Trains(nn.Linear):
    """A layer whose method hides that of PyTorch, as in forward-forward networks."""

    def train(self, positive, negative):
        return self(positive) - self(negative)


@pytest.mark.parametrize(
    ("model", "name"),
    [(Trains(2, 2), "Trains"), (nn.Sequential(Trains(2, 2)), r"0 \(Trains\)")],
)
def test_another_method_in_the_place_of_train_is_named(model, name):
    with pytest.raises(biofx.ArgumentError, match=name + r" has a method train\(positive, negative\).*another name"):
        biofx.transform(model, BOTH, example_inputs=torch.ones(1, 2))


@pytest.mark.parametrize("example_inputs", [None, torch.ones(1, 2)])
def test_a_model_with_a_transformed_child_is_refused(example_inputs):
    bio = biofx.transform(mlp(2, 3, 3), BOTH)
    with pytest.raises(
        biofx.ArgumentError, match="0 was already transformed separately.*; transform the whole model at once"
    ):
        biofx.transform(nn.Sequential(bio, nn.Linear(3, 3)), BOTH, example_inputs=example_inputs)
    biofx.transform(nn.Sequential(biofx.fold(bio), nn.Linear(3, 3)), BOTH, example_inputs=example_inputs)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3))])
def test_a_model_without_weights_is_refused(model):
    with pytest.raises(biofx.ArgumentError, match="has no weight that biofx can give synapses"):
        biofx.transform(model, BOTH)


def test_complex_and_integer_weights_are_left_alone():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(biofx.ArgumentError, match="weight: its dtype is torch.complex64, and synapses are real"):
        biofx.transform(model, BOTH)
    model = mlp(2, 2, 2)
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    assert "0.weight: its dtype is torch.int64, and synapses are real numbers" in flat(
        biofx.summary(biofx.transform(model, BOTH))
    )


class CountsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(2, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls


def test_a_model_that_counts_its_calls_counts_no_checks():
    model, x = CountsCalls(), torch.randn(1, 2)
    bio = biofx.transform(model, BOTH, example_inputs=(x,))
    assert "the model (CountsCalls): its forward changes the attribute calls" in flat(biofx.summary(bio))
    for _ in range(3):
        torch.testing.assert_close(bio(x), model(x))


def test_a_model_whose_trace_differs_keeps_its_python():
    class Missing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention = nn.Linear(2, 2), nn.MultiheadAttention(2, 1)

        def forward(self, x):
            x, weights = self.attention(x, x, x, need_weights=False)
            return self.fc(x) * (1 if weights is None else 2)

    model = Missing()
    for frontend in ("symbolic", "module"):
        bio = biofx.transform(model, BOTH, example_inputs=(torch.randn(3, 2),), frontend=frontend)
        torch.testing.assert_close(bio(torch.ones(3, 2)), model(torch.ones(3, 2)))


class Chained(nn.Module):
    """Two layers, the second one called in a way of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.call = nn.Sequential.__call__

    def forward(self, x):
        return self.call(nn.Sequential(self.a, self.b), x)


def over_module(model):
    b = model.b
    model.call = lambda layers, x: b(layers[0](x))


def over_parameter(model):
    def call(layers, x, weight=model.b.weight):
        return layers[0](x) @ weight

    model.call = call


def over_method(model):
    forward = model.b.forward
    model.b.forward = lambda x: 2 * forward(x)


def over_model(model):
    model.b.register_forward_hook(lambda module, inputs, output: model.a(output))


@pytest.mark.parametrize(
    ("enclose", "where", "what"),
    [
        (over_module, "call", "b"),
        (over_parameter, "call", "b.weight"),
        (over_method, "b.forward", "b"),
        (over_model, "b._forward_hooks", "Chained"),
    ],
)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_function_that_encloses_a_part_of_the_model(enclose, where, what, frontend):
    model, x = Chained(), torch.randn(2, 3)
    enclose(model)
    expected, before = model(x), snapshot(model)
    message = f"{where} of Chained is or holds a function that refers to {what}, and its copy would refer to it as well"
    with pytest.raises(biofx.CaptureError, match=message):
        biofx.transform(model, BOTH, frontend=frontend)
    assert_untouched(model, before)
    bio = biofx.transform(model, BOTH, frontend=frontend, inplace=True)
    torch.testing.assert_close(bio(x), expected)
    bio(x).sum().backward()
    assert all(parameter.grad is not None for parameter in bio.parameters() if parameter is not bio.b.bias)
    if what != "b.weight" or frontend == "module":  # else the graph has the weight instead of the function
        with pytest.raises(biofx.ArgumentError, match=r"fold: .*, and its copy would refer to it as well"):
            biofx.fold(bio)
    other = biofx.fold(bio, into=Chained())
    enclose(other)
    torch.testing.assert_close(other(x), expected)


def test_a_layer_whose_class_refuses_subclasses_is_left_alone():
    class Closed(nn.Linear):
        def __init_subclass__(cls):
            raise TypeError("it is closed")

    model, x = nn.Sequential(nn.Linear(3, 3), Closed(3, 3)), torch.randn(2, 3)
    bio = biofx.transform(model, [passes.SplitSynapses()])
    assert [site.is_split for site in biofx.weight_sites(bio).values()] == [True, False]
    assert "Closed does not allow subclasses, and a module with synapses gets one: it is closed" in flat(
        biofx.summary(bio)
    )
    torch.testing.assert_close(bio(x), model(x))
    torch.testing.assert_close(biofx.fold(bio)(x), model(x))


def test_a_model_with_slots_is_transformed_in_place():
    class Slots(nn.Module):
        __slots__ = ("factor",)

        def __init__(self):
            super().__init__()
            self.fc, self.factor = nn.Linear(3, 3), 2.0

        def forward(self, x):
            return self.fc(x) * self.factor

    model, x = nn.Sequential(Slots()), torch.randn(2, 3)
    y = model(x)
    with pytest.raises(biofx.CaptureError, match=r"0\.factor is in __slots__, .*inplace=True"):
        biofx.transform(model, [passes.SplitSynapses()])
    bio = biofx.transform(model, [passes.SplitSynapses()], inplace=True)
    torch.testing.assert_close(bio(x), y)
    with pytest.raises(biofx.ArgumentError, match="is in __slots__"):
        biofx.fold(bio)
    bio[0].factor = 6.0
    torch.testing.assert_close(bio(x), 3 * y)


def test_a_transform_leaves_slots_as_they_were():
    class Counts(nn.Module):
        __slots__ = ("calls",)

        def __init__(self):
            super().__init__()
            self.fc, self.calls = nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.fc(x) * self.calls

    bio = biofx.transform(nn.Sequential(Counts()), [passes.SplitSynapses()], inplace=True)
    assert bio[0].calls == 0


def test_a_model_that_has_slots_itself_is_refused_in_place():
    class Slots(nn.Linear):
        __slots__ = ("factor",)

    model = Slots(3, 3)
    model.factor = 2.0
    with pytest.raises(biofx.ArgumentError, match="model.factor is in __slots__; keep it in a plain attribute"):
        biofx.transform(model, [passes.SplitSynapses()], inplace=True)


def test_an_import_does_not_import_the_compiler():
    code = "import sys, biofx; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


MODELS = {}


class Global(nn.Module):
    """Finds a layer of its own in a variable outside of the model."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        MODELS["latest"] = self

    def forward(self, x):
        return MODELS["latest"].layer(x)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_copy_that_reads_the_original_is_refused(frontend):
    """Its outputs are right until one of the two learns."""
    model, x = Global(), torch.randn(3, 4)
    with pytest.raises(biofx.CaptureError, match=r"reads layer\.weight of the original model.*inplace=True"):
        biofx.transform(model, "split-synapses", example_inputs=x, frontend=frontend)
    bio = biofx.transform(model, "split-synapses", example_inputs=x, frontend=frontend, inplace=True)
    bio(x).sum().backward()
    assert bio.get_parameter("layer.weight").grad is not None


VIEWS = {}


class TiedByMemory(nn.Module):
    """A decoder in the memory of its encoder: in the plain model, both learn as one."""

    def __init__(self, how):
        super().__init__()
        self.encoder, self.decoder, self.how = nn.Linear(6, 3), nn.Linear(3, 6), how
        view = self.encoder.weight.detach().t()
        if how == "parameter":
            self.decoder.weight = nn.Parameter(view)
        elif how == "buffer":
            self.register_buffer("view", view)
        elif how == "attribute":
            self.view = [view]
        VIEWS["latest"] = view

    def forward(self, x):
        views = {"buffer": lambda: self.view, "attribute": lambda: self.view[0], "outside": lambda: VIEWS["latest"]}
        return nn.functional.linear(self.encoder(x), views.get(self.how, lambda: self.decoder.weight)())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", ["parameter", "buffer", "attribute"])
def test_a_parameter_in_the_memory_of_another_is_refused(how, inplace):
    """Its outputs are right until it learns."""
    with pytest.raises(biofx.ArgumentError, match=r"lies in the memory of encoder\.weight.* self\.encoder\.weight\.t"):
        biofx.transform(TiedByMemory(how), "split-synapses", example_inputs=torch.randn(2, 6), inplace=inplace)


def test_a_copy_that_reads_a_view_of_the_original_is_refused():
    with pytest.raises(biofx.CaptureError, match=r"of the original model.*read self\.encoder\.weight there"):
        biofx.transform(TiedByMemory("outside"), "split-synapses", example_inputs=torch.randn(2, 6))


def test_parameters_side_by_side_in_one_memory_are_no_ties():
    model, both = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), torch.randn(4, 7)
    model[0].weight, model[1].weight = nn.Parameter(both[:, :3]), nn.Parameter(both[:, 3:])
    torch.testing.assert_close(biofx.transform(model, "split-synapses")(both[:, :3]), model(both[:, :3]))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameter_is_not_lost(register):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    weight, seen = model[0].weight, []
    getattr(weight, register)(lambda tensor: seen.append(tensor.shape))
    with pytest.raises(biofx.CaptureError, match=r"0\.weight has a hook of yours .*; transform .* inplace"):
        biofx.transform(model, "split-synapses")
    bio = biofx.transform(model, "split-synapses", inplace=True)
    assert bio.get_parameter("0.weight") is weight
    assert "has a hook of yours on its gradient" in flat(biofx.summary(bio))
    seen.clear()  # the checks of the transform differentiate as well
    bio(torch.randn(2, 3)).sum().backward()
    assert seen == [weight.shape]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "dales-principle"])
def test_what_a_user_noted_on_parameters_stays(pipeline, inplace):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.options = {"lr": 0.1}
    bio = biofx.transform(model, pipeline, inplace=inplace)
    assert all(parameter.options == {"lr": 0.1} for parameter in bio.parameters())
    assert (bio[0].bias.options is model[0].bias.options) is inplace
    assert bio.get_submodule("2").weight.options == {"lr": 0.1}
    assert all(parameter.options == {"lr": 0.1} for parameter in biofx.fold(bio).parameters())


class MaskedByAttribute(nn.Module):
    """Keeps the mask of a weight as an attribute of the weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)
        self.layer.weight.mask = torch.eye(4, 3)

    def forward(self, x):
        weight = self.layer.weight
        mask = getattr(weight, "mask", None)
        return self.readout(nn.functional.linear(x, weight if mask is None else weight * mask).relu())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_forward_sees_what_a_user_noted_on_a_weight(frontend):
    model, x = MaskedByAttribute(), torch.randn(5, 3)
    bio = biofx.transform(model, "split-synapses", frontend=frontend)
    torch.testing.assert_close(bio(x), model(x))
    torch.testing.assert_close(biofx.fold(bio)(x), model(x))


class CountsItsCalls(nn.Module):
    """Counts its calls in a variable outside of the instance, so no call repeats another."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        CountsItsCalls.calls += 1
        return self.layer(x) * CountsItsCalls.calls


def test_a_model_of_which_no_call_repeats_another_is_transformed():
    model, x = CountsItsCalls(), torch.randn(5, 3)
    bio = biofx.transform(model, "split-synapses", example_inputs=(x,))
    assert "two calls on the same inputs return different outputs" in str(biofx.summary(bio)).replace("\n", " ")
    CountsItsCalls.calls = 0
    found = [bio(x) for _ in range(3)]
    CountsItsCalls.calls = 0
    torch.testing.assert_close(found, [model(x) for _ in range(3)])
