"""Units of whole architectures, what the analysis does not depend on, and the table that it prints."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.analysis.units import EFFECTS
from conftest import tensors
from models.architectures import ARCHITECTURES
from models.small import mlp
from unit_tracing import Net, Net2, analysed, feeds, run

# --- whole architectures ------------------------------------------------------------------------------------------


def built(name):
    build, inputs = ARCHITECTURES[name]
    return build().eval(), inputs()


def partition(found):
    """Which positions of all weights are one unit, whatever its number."""
    order = {}
    return {
        name: [order.setdefault(number, len(order)) for number in reading.numbers.tolist()]
        for name, reading in found.readings.items()
    }


def test_a_resnet():
    model, inputs = built("resnet")
    found = biofx.units(model, inputs)
    assert feeds(found, "layer1.0.conv1.weight") == run("conv1.weight", *range(8))
    assert feeds(found, "layer1.1.conv1.weight") == run("add_ in layer1.0", *range(8))
    assert feeds(found, "layer2.0.conv1.weight") == run("add_ in layer1.1", *range(8))
    assert feeds(found, "layer2.0.downsample.0.weight") == run("add_ in layer1.1", *range(8))
    assert feeds(found, "fc.weight") == run("add_ in layer2.1", *range(16))
    assert found.scales.keys() == {
        f"{name}.weight" for name, child in model.named_modules() if "BatchNorm" in str(type(child))
    }
    assert [name for name, reading in found.readings.items() if reading.signed_by] == ["conv1.weight"]


def test_a_densenet():
    found = biofx.units(*built("densenet"))
    layers = [f"features.denseblock1.denselayer{i}.conv2.weight" for i in range(3)]
    expected = run("features.transition1.conv.weight", *range(10))
    for index in range(3):
        assert feeds(found, f"features.denseblock1.denselayer{index}.conv1.weight") == expected
        expected = [*expected, *run(layers[index], *range(4))]
    assert feeds(found, "classifier.weight") == expected


def test_a_shufflenet():
    found = biofx.units(*built("shufflenet"))
    left, right, new = (f"stage2.{n}.0.weight" for n in ("0.branch1.1", "0.branch2.2", "1.branch2.2"))
    second_half = [(name, unit) for unit in range(4, 8) for name in (left, right)]
    assert feeds(found, "stage2.1.branch2.0.0.weight") == second_half
    first_half = [(name, unit) for unit in range(4) for name in (left, right)]
    shuffled = [pair for both in zip(first_half, run(new, *range(8)), strict=True) for pair in both]
    assert feeds(found, "stage3.0.branch1.0.0.weight") == feeds(found, "stage3.0.branch2.0.0.weight") == shuffled


def test_a_u_net():
    found = biofx.units(*built("unet"))
    assert feeds(found, "up1.conv.0.0.weight") == [
        *run("down1.1.1.0.weight", *range(8)),
        *run("up1.up.weight", *range(8)),
    ]
    assert feeds(found, "up2.conv.0.0.weight") == [*run("inc.1.0.weight", *range(4)), *run("up2.up.weight", *range(4))]


def test_an_efficientnet():
    found = biofx.units(*built("efficientnet"))
    assert feeds(found, "blocks.1.gate.fc1.weight") == run("blocks.1.depthwise.0.weight", *range(32))
    assert feeds(found, "blocks.1.gate.fc2.weight") == run("blocks.1.gate.fc1.weight", 0, 1)
    assert feeds(found, "blocks.1.project.0.weight") == run("mul in blocks.1.gate", *range(32))
    assert feeds(found, "blocks.2.expand.0.weight") == run("blocks.1.project.0.weight", *range(12))


def test_a_vision_transformer():
    found = biofx.units(*built("vit"))
    assert feeds(found, "blocks.0.attn.qkv.weight") == run("patch_embed.weight", *range(16))
    assert feeds(found, "blocks.0.attn.proj.weight") == run("blocks.0.attn.qkv.weight", *range(32, 48))
    assert feeds(found, "blocks.0.mlp.fc1.weight") == run("add in blocks.0", *range(16))
    assert feeds(found, "head.weight") == run("add in blocks.1 (2)", *range(16))


def test_a_shifted_window_transformer():
    found = biofx.units(*built("swin"))
    assert feeds(found, "layers.1.attn.qkv.weight") == run("add in layers.0 (2)", *range(8))
    assert feeds(found, "layers.1.attn.proj.weight") == run("layers.1.attn.qkv.weight", *range(16, 24))
    assert feeds(found, "layers.2.reduction.weight") == run("add in layers.1 (2)", *range(8)) * 4
    assert feeds(found, "head.weight") == run("add in layers.4 (2)", *range(16))


def test_grouped_values_of_a_llama():
    found = biofx.units(*built("llama"))
    value = "layers.0.attention.v_proj.weight"
    assert feeds(found, "layers.0.attention.o_proj.weight") == [
        *run(value, *range(4)) * 2,
        *run(value, *range(4, 8)) * 2,
    ]


NOT_JUDGED = {"mlp_mixer": {f"blocks.{i}.mlp_tokens.fc1.weight" for i in range(2)}}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_special_about_architectures(name):
    found = biofx.units(*built(name))
    assert {name for name, reading in found.readings.items() if reading.remark} == NOT_JUDGED.get(name, set())
    assert not [p.name for p in found.populations if p.origin == "unknown"]
    assert {p.origin for p in found.populations[1:]} <= {"weight", "input", "merged", "unknown", "shared"}


# --- what does not matter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure_tells_without_example_inputs(name):
    model, inputs = built(name)
    assert partition(biofx.units(model)) == partition(biofx.units(model, inputs))


def test_sides_that_no_guess_fits():
    """Nothing says that 35 positions are 5 × 7."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 35, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(biofx.ArgumentError, match="Sequential: the model ran with none of the inputs that were tried"):
        biofx.units(model)


SPLITS = [
    [passes.SplitSynapses(3)],
    [passes.SplitSynapses(3, activation="relu")],
    [passes.FuzzyLearningRates(distribution="activity")],
]


@pytest.mark.parametrize("pipeline", SPLITS, ids=["split", "split with activation", "observed"])
@pytest.mark.parametrize("name", ["resnext", "vit", "unet", "shufflenet"])
def test_transformed_models_have_the_units_of_the_original(name, pipeline):
    model, inputs = built(name)
    bio = biofx.transform(model, pipeline)
    found, expected = biofx.units(bio, inputs), biofx.units(model, inputs)
    assert partition(found) == partition(expected)
    weights = [[p for p in units.populations if p.origin == "weight"] for units in (found, expected)]
    assert weights[0] == weights[1]


def test_groups_of_units_are_units():
    bio = biofx.transform(mlp(4, 8, 2), [passes.GroupUnits(size=2)])
    found = biofx.units(bio, torch.randn(3, 4))
    assert feeds(found, "2.weight") == run("sum", *range(4), times=2)


def test_a_transformed_model_is_run_as_it_is_now():
    model = Net(lambda m, x: m.b(m.act(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    model.act = torch.relu
    bio, x = biofx.transform(model, "dales-principle", example_inputs=(torch.randn(2, 3),)), torch.randn(2, 3)
    assert biofx.units(bio, x).rows[1]["signed_by"] == ""
    bio.act = torch.tanh
    assert biofx.units(bio, x).rows[1]["signed_by"] == "tanh"
    bio.a.register_forward_hook(lambda module, args, output: output.flip(-1))
    assert feeds(biofx.units(bio, x), "b.weight") == run("a.weight", 3, 2, 1, 0)


def test_a_graph_that_does_not_follow_tells_no_units():
    model, x = Net(lambda m, x: m.b(m.act(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3)
    model.act = torch.relu
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=(x,))
    assert biofx.units(bio, x).rows[1]["signed_by"] == ""
    bio.act = torch.tanh
    with pytest.raises(biofx.CaptureError, match="act.*synaptic-scaling needs the graph"):
        biofx.units(bio, x)


@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "synaptic-scaling{on=weight}"])
def test_transformed_models_carry_state_from_call_to_call(pipeline):
    def steps(model):
        state = torch.zeros(2, 5)
        for _ in range(3):
            state = model(torch.randn(2, 3), state)

    layers = {"a": nn.Linear(3, 5), "b": nn.Linear(5, 5)}
    model = Net2(lambda m, x, state: torch.relu(m.a(x) + m.b(state)), **layers)
    bio = biofx.transform(model, pipeline, example_inputs=steps)
    original, found = (biofx.units(each, steps) for each in (model, bio))
    assert feeds(found, "b.weight") == feeds(original, "b.weight")
    assert torch.equal(found.mixed(), original.mixed())


def test_a_function_may_have_attributes_of_its_own():
    def run(model):
        return model(torch.randn(2, 3))

    run.words = "the vocabulary of the user"
    assert biofx.units(nn.Linear(3, 2), run).inputs == "given by a function"


def test_a_forward_may_need_gradients():
    def slope(m, x):
        x = x.detach().requires_grad_()
        return m.b(torch.autograd.grad(m.a(x).relu().sum(), x)[0])

    found = analysed(slope, torch.randn(2, 3), a=nn.Linear(3, 4), b=nn.Linear(3, 2))
    assert [row["operator"] for row in found.rows] == ["linear, grad", "linear"]


@pytest.mark.parametrize("how", ["class", "instance"])
def test_a_forward_that_replaces_that_of_the_model_is_run(how):
    """The model's own forward ran, so units were told of what calls do not compute."""
    x = torch.randn(2, 3)
    bio = biofx.transform(Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 3)), "split-synapses")
    inner = bio.forward
    if how == "class":
        bio.__class__ = type("Derived", (type(bio),), {"forward": lambda self, x: inner(inner(x).flip(-1))})
    else:
        bio.forward = lambda x: inner(inner(x).flip(-1))
    assert feeds(biofx.units(bio, x), "a.weight") == run("b.weight", 2, 1, 0)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_forward_asks_weights_of_synapses_as_it_asks_parameters(is_frozen):
    """While units were found, no weight required a gradient, so forward took another way than in a call."""
    model = Net(
        lambda m, x: m.b(torch.relu(m.a(x)) if m.a.weight.requires_grad else torch.tanh(m.a(x))),
        a=nn.Linear(3, 4).requires_grad_(not is_frozen),
        b=nn.Linear(4, 2),
    )
    bio, x = biofx.transform(model, "split-synapses", example_inputs=torch.randn(2, 3)), torch.randn(2, 3)
    signed_by = "tanh" if is_frozen else ""
    assert [biofx.units(each, x).rows[1]["signed_by"] for each in (model, bio)] == [signed_by, signed_by]


def test_wrappers_are_looked_through():
    bio = biofx.transform(mlp(4, 8, 2), [passes.SplitSynapses()])
    assert str(biofx.units(nn.DataParallel(bio))) == str(biofx.units(bio)) == str(biofx.units(mlp(4, 8, 2)))
    with pytest.raises(biofx.ArgumentError, match="transform model.module"):
        biofx.units(nn.DataParallel(mlp(4, 2)))


@pytest.mark.parametrize("is_transformed", [False, True])
def test_the_model_stays_as_it_is(is_transformed):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)).train()
    model[2].eval()
    if is_transformed:
        model = biofx.transform(model, [passes.FuzzyLearningRates(distribution="activity")])
    x = torch.randn(3, 1, 5, 5)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random, given = torch.get_rng_state(), x.clone()
    biofx.units(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_silencing_a_unit_equals_silencing_its_weights():
    """The analysis agrees with the computation: for units made by a weight, without a bias or norm in between."""
    model, inputs = built("vgg")
    found = biofx.units(model, inputs)
    unit = int(found.readings["classifier.0.weight"].numbers[17])
    silenced, cut = copy.deepcopy(model), copy.deepcopy(model)
    name, index = feeds(found, "classifier.0.weight")[17]
    with torch.no_grad():
        silenced.get_parameter(name)[index] = 0
        silenced.get_parameter(name.replace("weight", "bias"))[index] = 0
        cut.get_parameter("classifier.0.weight")[:, found.readings["classifier.0.weight"].numbers == unit] = 0
    for a, b in zip(tensors(silenced(*inputs)), tensors(cut(*inputs)), strict=True):
        torch.testing.assert_close(a, b)


def clamped(m, x):
    with torch.no_grad():
        m.w.clamp_(-1, 1)
    return F.relu(m.a(x)) @ m.w


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: torch.addmm(m.a.bias[:5], F.relu(m.a(x)), m.w, alpha=-1), "addmm multiplies it with -1"),
        (clamped, "forward changes it in place"),
        (lambda m, x: torch.cdist(F.relu(m.a(x)), m.w.mT), "used by cdist"),
    ],
)
def test_what_acts_on_units_and_is_left_alone_is_not_judged(forward, reason):
    found = analysed(forward, torch.randn(3, 4), a=nn.Linear(4, 8), w=nn.Parameter(torch.randn(8, 5)))
    assert reason in found.verdicts()["w"].reason
    assert {EFFECTS[effect] for effect in found.effects().tolist()} == {"not judged"}
    with pytest.raises(biofx.NotJudgedError, match=f"w: {reason}"):
        found.mixed()


def test_parameters_that_do_not_act_on_units_are_no_weights():
    def forward(m, x):
        return m.a(x * m.scale + m.position), torch.addmm(m.a.bias, x, m.w, alpha=-1)

    parameters = {"scale": torch.ones(3, 4), "position": torch.ones(3, 4), "w": torch.randn(4, 8)}
    layers = {name: nn.Parameter(value) for name, value in parameters.items()}
    found = analysed(forward, torch.randn(3, 4), a=nn.Linear(4, 8), **layers)
    assert {name: str(verdict) for name, verdict in found.verdicts().items()} == {"a.weight": "free"}
    assert not len(found.mixed())


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table():
    model = Net(
        lambda m, x: m.b(torch.cat([m.a(x), m.a(x)[..., 1:3]], -1).tanh()), a=nn.Linear(2, 4), b=nn.Linear(6, 1)
    )
    assert str(biofx.units(model, torch.randn(3, 2))).splitlines()[2:] == [
        "a.weight  linear      2            2: input x                  any sign (input x)",
        "b.weight  linear      6            4 at 6 positions: a.weight  any sign (tanh)",
    ]


def test_the_table_is_data():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    found = biofx.units(model, torch.randn(1, 1, 8, 8))
    first, second = found.rows
    assert first["signed_by"] == "input input"
    assert second == {
        "weight": "3.weight",
        "operator": "linear",
        "positions": 144,
        "units": [{"population": "0.weight", "units": 4, "of": 4, "positions": 144}],
        "signed_by": "",
        "inverted_by": "",
        "not_judged": "",
    }
    assert found.to_dict() == {"rows": [first, second], "inputs": "given", "notes": []}
    assert "<td>3.weight" in found._repr_html_()


def test_units_of_several_populations_are_listed_in_order():
    layers = {"a": nn.Linear(2, 4), "b": nn.Linear(2, 3), "c": nn.Linear(6, 1)}
    found = analysed(lambda m, x: m.c(torch.cat([m.b(x), m.a(x)[..., 1:]], -1)), torch.randn(3, 2), **layers)
    assert found.describe(found.readings["c.weight"].numbers) == "3: b.weight,\n3 of 4: a.weight"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5), "Sequential fails on example_inputs, at linear in 0: "),
        (torch.zeros(2, 4, dtype=torch.int64), "Sequential fails on example_inputs, at linear in 0: "),
        ((torch.randn(2, 4), torch.randn(2, 4)), "example_inputs do not fit Sequential.forward"),
        ({"y": torch.randn(2, 4)}, "example_inputs do not fit Sequential.forward"),
    ],
)
@pytest.mark.parametrize("is_transformed", [False, True])
def test_example_inputs_that_do_not_fit(inputs, message, is_transformed):
    model = mlp(4, 3, 2)
    if is_transformed:
        model = biofx.transform(model, [passes.SplitSynapses()])
    with pytest.raises(biofx.ArgumentError) as caught:
        biofx.units(model, inputs)
    assert message in str(caught.value)


@pytest.mark.parametrize("model", [nn.Linear, "model", None])
def test_what_is_no_model(model):
    with pytest.raises(biofx.ArgumentError):
        biofx.units(model)


def test_a_model_without_weights():
    found = biofx.units(nn.ReLU(), torch.randn(2, 3))
    assert (found.readings, len(found.populations)) == ({}, 1)


def test_weights_that_are_not_finite_are_not_judged():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight.data[0, 1] = math.nan
    units = biofx.units(model, torch.randn(1, 3))
    assert str(units.verdicts()["2.weight"]) == "not judged: it has values that are not finite"
    with pytest.raises(biofx.NotJudgedError, match="not finite"):
        units.mixed()
    assert "not judged" in {EFFECTS[index] for index in units.effects()}
