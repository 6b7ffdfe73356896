"""MirrorUnits: Dale's principle without a change of the function."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from conftest import flat, tensors
from mirrored import Tokens, assert_one_sign, double, doubled, mirror
from models.architectures import ARCHITECTURES
from models.convolutional import DenseNet, ResNet, channel_shuffle
from models.small import CONVOLUTIONS, GROUPS, ConvNet, Residual, Reused, mlp
from models.weights import KINDS, MODELS, PATHS, Layer, Network

DOUBLED = {  # whose units are doubled, of how many weights
    "vgg": (6, 7),
    "resnet": (10, 11),
    "resnext": (15, 16),
    "densenet": (14, 15),
    "mobilenet": (10, 11),
    "efficientnet": (12, 17),
    "shufflenet": (14, 18),
    "convnext": (14, 15),
    "unet": (12, 13),
    "autoencoder": (2, 6),
    "generator": (2, 3),
    "vit": (2, 10),
    "swin": (4, 19),
    "mlp_mixer": (5, 10),
    "gpt": (2, 10),
    "llama": (6, 16),
    "lstm": (0, 6),
    "mixture_of_experts": (4, 9),
    "siamese": (3, 4),
    "graph_convolution": (2, 3),
}


def left(bio, weight):
    """Why the units of a weight are not doubled."""
    run = bio.biofx.passes[0]
    return run.left.get(weight) or run.remarks[weight]


# --- what it does ----------------------------------------------------------------------------------------------------


def test_twins_by_hand():
    model = mlp(2, 2, 3)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([5.0, -6.0]))
        model[2].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 0.0]]))
    bio = mirror(model, torch.randn(5, 2))
    assert bio.get_parameter("0.weight").tolist() == [[1, -2], [1, -2], [3, 4], [3, 4]]
    assert bio.get_parameter("0.bias").tolist() == [5, 5, -6, -6]
    # from:                                         x0 x0' x1 x1'
    assert bio.get_parameter("2.weight").tolist() == [[1, 0, 0, -2], [0, -3, 4, 0], [5, 0, 0, 0]]
    assert bio.get_buffer("2.weight_synapses.sign").tolist() == [[1, -1, 1, -1]]
    assert torch.equal(bio.get_parameter("2.bias"), model[2].bias)
    assert (bio.get_submodule("0").out_features, bio.get_submodule("2").in_features) == (4, 4)


@pytest.mark.parametrize(
    ("name", "examples"),
    [*((name, True) for name in ARCHITECTURES), *((name, False) for name in ("resnet", "unet", "gpt", "lstm"))],
)
def test_every_architecture_computes_what_it_did(name, examples):
    model, x = double(name)
    bio = biofx.transform(model, [passes.MirrorUnits()], example_inputs=x if examples else None)
    for a, b in zip(tensors(bio(*x)), tensors(model(*x)), strict=True):
        torch.testing.assert_close(a, b)
    assert (len(doubled(bio, model)), len(biofx.weight_sites(bio))) == DOUBLED[name]
    if doubled(bio, model):
        assert_one_sign(bio, *x)
    biofx.verify(bio)
    for a, b in zip(tensors(biofx.fold(bio)(*x)), tensors(bio(*x)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*KINDS, *PATHS])
def test_operators_are_doubled_and_weights_on_a_path_left_alone(name):
    kind = {**KINDS, **PATHS}[name]
    layer, x = Layer(kind.shape, kind.function).double(), torch.randn(kind.inputs, dtype=torch.float64)
    model = Network(layer, kind.output, layer(x).shape[kind.output]).double()
    bio = mirror(model, x)
    if name in PATHS:
        assert left(bio, "layer.weight") == "its operator reads what forward computes from it"
    elif "addmm" in name:
        assert left(bio, "layer.weight") == "its bias cannot be doubled"
    else:
        assert doubled(bio, model) == {"layer.weight"}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_weight_is_doubled_or_left_with_a_reason(name):
    build, inputs, weights = MODELS[name]
    model, x = build().eval(), inputs()
    bio = mirror(model, *x)
    run = bio.biofx.passes[0]
    assert run.weights | run.left.keys() >= weights


@pytest.mark.parametrize("network", [ResNet, DenseNet])
def test_batch_norm_computes_what_it_did_in_training_as_well(network):
    """Twins have the same statistics, so dropout is all that could differ; there is none."""
    model, x = network().double().train(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "drop"):
            module.drop = 0.0
    bio = biofx.transform(model, [passes.MirrorUnits()])
    torch.testing.assert_close(bio(x), model(x))
    for name, buffer in model.named_buffers():
        mine = bio.get_buffer(name)
        torch.testing.assert_close(mine, buffer.repeat_interleave(2) if buffer.dim() else buffer)


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_every_kind(kind, grouping):
    cls, _ = CONVOLUTIONS[kind]
    axes = int(kind[-2])
    groups = GROUPS[grouping]
    layers = [cls(2, 4, 3), nn.ReLU(), cls(4, 8, 3, groups=groups), nn.ReLU(), cls(8, 4, 3, groups=groups)]
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 2, *[9] * axes, dtype=torch.float64)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"0.weight", "2.weight"}
    assert bio.get_submodule("2").groups == groups
    assert_one_sign(bio, x)


def test_half_of_the_units_of_a_population_are_excitatory():
    model, x = double("resnet")
    bio = mirror(model, *x)
    for name in doubled(bio, model) & {n for n, s in biofx.weight_sites(bio).items() if s.sign is not None}:
        assert float(biofx.weight_sites(bio)[name].sign.sum()) == 0


def test_inputs_and_outputs_of_the_model_keep_their_shape():
    bio = mirror(ConvNet().eval(), torch.randn(2, 1, 8, 8))
    assert bio.stem.weight.shape == (8, 1, 3, 3)
    assert bio.depthwise.weight.shape == (8, 2, 3, 3)
    assert bio.head.weight.shape == (10, 128)
    assert biofx.weight_sites(bio)["stem.weight"].sign is None
    assert left(bio, "head.weight") == "its units are the model's output"


def test_flattened_positions_of_a_unit_have_its_sign():
    sites = biofx.weight_sites(mirror(ConvNet().eval()))  # without examples: the flattened size is that of the head
    sign = sites["head.weight"].sign.view(4, 2, 16)
    assert torch.equal(sign, torch.tensor([1.0, -1.0]).view(2, 1).expand(4, 2, 16))
    units = sites["head.weight"].state("units").view(8, 16)
    assert torch.equal(units, units[:, :1].expand(8, 16))
    assert len(units.unique()) == 8


# --- what goes along -------------------------------------------------------------------------------------------------


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 3 * 3, 6)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 1), nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv(x)), 2).view(-1, 4 * 3 * 3)
        x = F.layer_norm(self.fc(x), (6,), self.scale, self.shift)
        first, second = x.split(3, dim=1)
        return self.out(torch.cat([second, first], 1) + x[:, [0] * 6].mean() * 0)


def test_sizes_in_forward_are_adapted():
    model, x = LeNet(), torch.randn(2, 1, 8, 8)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"conv.weight", "fc.weight"}
    assert "view(-1, 72)" in bio.code
    assert "layer_norm(linear, (12,)" in bio.code
    assert bio.scale.tolist() == model.scale.repeat_interleave(2).tolist()


class Biases(nn.Module):
    """Biases that are computed: from a parameter, and from the input."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = F.linear(x, self.first.weight, 2 * self.first.bias)
        return self.third(hidden * F.linear(x, self.second.weight, hidden[0]).sigmoid())


def test_biases_that_are_computed():
    model, x = Biases(), torch.randn(5, 3)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"first.weight", "second.weight"}
    assert bio.first.bias.shape == (8,)


def test_parameters_that_meet_units_are_doubled():
    model, x = Tokens(), torch.randn(2, 4, 3)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"embed.weight", "fc.weight"}
    for name in ("token", "position", "gamma", "norm.weight", "norm.bias"):
        assert torch.equal(bio.get_parameter(name), model.get_parameter(name).repeat_interleave(2, -1))
    assert bio.norm.normalized_shape == (12,)
    assert_one_sign(bio, x)


class Rearranged(nn.Module):
    """Two readers, one of which reads the units in another order."""

    def __init__(self, rearrange):
        super().__init__()
        self.rearrange = rearrange
        self.hidden = nn.Conv1d(2, 6, 1)
        self.first, self.second = nn.Conv1d(6, 2, 1), nn.Conv1d(6, 2, 1)

    def forward(self, x):
        x = torch.relu(self.hidden(x))
        return self.first(x) + self.second(self.rearrange(x))


REARRANGEMENTS = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "shuffle": lambda x: channel_shuffle(x[..., None], 2)[..., 0],
    "shuffle twice": lambda x: channel_shuffle(channel_shuffle(x[..., None], 2), 3)[..., 0],
    "group norm": lambda x: F.group_norm(x, 3),
    "permute": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "residual": lambda x: x + torch.tanh(x),
    "gate": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "neighbours": lambda x: x + x.roll(2, 1),
    "padding": lambda x: x + F.pad(x[:, 1:-1], (0, 0, 1, 1)),
    "maximum": lambda x: x - x.max(1, keepdim=True)[0],
    "zeros": lambda x: x + torch.cat([x[:, :3], x.new_zeros(1).expand(x.size(0), x.size(1) // 2, x.size(2))], 1),
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_twins_are_followed_wherever_they_go(name):
    model, x = Rearranged(REARRANGEMENTS[name]).double(), torch.randn(3, 2, 5, dtype=torch.float64)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"hidden.weight"}
    assert_one_sign(bio, x)


def test_a_square_parameter_is_doubled_along_the_units():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.positions = nn.Conv1d(3, 6, 1), nn.Parameter(torch.randn(6, 6))
            self.out = nn.Linear(36, 2)

        def forward(self, x):
            return self.out((self.conv(x) + self.positions).relu().flatten(1))

    model, x = Square(), torch.randn(5, 3, 6)
    bio = mirror(model, x)
    assert doubled(bio, model) == {"conv.weight"}
    assert bio.get_parameter("positions").shape == (12, 6)
    assert_one_sign(bio, x)


def test_a_norm_in_the_middle_keeps_its_groups_and_statistics():
    norms = (nn.GroupNorm(2, 8), nn.LayerNorm([8, 6]), nn.InstanceNorm1d(8, affine=True), nn.PReLU(8), nn.RMSNorm(6))
    model = nn.Sequential(nn.Conv1d(2, 8, 1), *norms, nn.Conv1d(8, 2, 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    bio = mirror(model, torch.randn(3, 2, 6))
    assert doubled(bio, model) == {"0.weight"}
    assert (bio.get_submodule("1").num_groups, bio.get_submodule("1").num_channels) == (2, 16)
    assert bio.get_submodule("2").normalized_shape == (16, 6)
    assert bio.get_submodule("5").normalized_shape == (6,)


def test_a_module_that_is_used_twice():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5))

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(5, 1)

        def forward(self, a, b):
            return self.head((self.encoder(a) - self.encoder(b)).abs())

    model, x = Siamese().eval(), (torch.randn(6, 3), torch.randn(6, 3))
    assert len(doubled(mirror(model, *x), model)) == 2


# --- what does not ---------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Something between two layers; the second reads as many units as it gives."""

    def __init__(self, between, units=6):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(3, 6), nn.Linear(units, 2)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


OTHERS = {
    "sum": (lambda x: x + x.sum(-1, keepdim=True), "sum, whose result changes if units are doubled"),
    "softmax": (lambda x: x.softmax(-1), "softmax, whose result changes"),
    "normalize": (lambda x: F.normalize(x, dim=-1), "normalize, whose result changes"),
    "deviation": (lambda x: x / x.std(-1, keepdim=True), "std, whose result changes"),
    "products": (lambda x: x @ (x.mT @ x), "matmul, whose result changes"),
    "cumsum": (lambda x: x.cumsum(-1), "cumsum, whose result changes"),
    "random": (lambda x: x + torch.randn_like(x), "randn_like, whose result changes"),
}


@pytest.mark.filterwarnings("ignore:.*random")
@pytest.mark.parametrize("name", OTHERS)
def test_units_whose_number_matters_are_left_alone(name):
    between, reason = OTHERS[name]
    model = Between(between)
    bio = biofx.transform(model, [passes.MirrorUnits()])
    assert not doubled(bio, model)
    assert reason in left(bio, "first.weight")


def test_units_that_are_added_to_an_input():
    bio = mirror(Residual().eval(), torch.randn(5, 4))
    assert left(bio, "inner.weight") == "add joins its units with input x, not doubled"
    assert left(bio, "outer.weight") == "its units are the model's output"


def test_a_weight_that_reads_different_units():
    bio = mirror(Reused().eval(), torch.randn(5, 4))
    assert left(bio, "step.weight") == "its units are read by step.weight, which reads others as well"


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.rnn, self.hidden = nn.Linear(3, 4), nn.LSTM(4, 4), nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.rnn(self.fc(x))[0])))


def test_a_module_that_cannot_be_wider():
    bio = mirror(Recurrent(), torch.randn(2, 5, 3))
    assert "its units reach the untraced submodule rnn (LSTM)" in left(bio, "fc.weight")
    assert "its units reach the untraced submodule rnn" in flat(biofx.summary(bio))
    assert "given by a function" not in flat(biofx.summary(bio))
    assert bio.hidden.weight.shape == (10, 4)
    assert bio.head.weight.shape == (2, 10)


@pytest.mark.parametrize("kept", ["0.bias", "1.weight"])
def test_units_of_a_parameter_that_may_not_change_stay(kept):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model.averaged = SimpleNamespace(parameters=[model.get_parameter(kept)])
    bio = mirror(model, torch.randn(2, 3))
    assert bio.averaged.parameters[0] is bio.get_parameter(kept)
    assert [site.units for site in biofx.weight_sites(bio).values()] == [4, 10, 2]
    assert f"{kept} would have to be doubled: the attribute averaged holds it" in flat(biofx.summary(bio))


def test_excluded_weights_stay_as_they_are():
    bio = mirror(mlp(3, 4, 5, 6, 2), torch.randn(2, 3), exclude="4.weight")
    assert bio.get_parameter("4.weight").shape == (6, 5)
    assert left(bio, "2.weight") == "its units are read by 4.weight, and it may not change"
    assert bio.get_parameter("0.weight").shape == (8, 3)
    assert bio.get_parameter("2.weight").shape == (5, 8)


def test_queries_and_keys_stay_and_values_are_doubled():
    model, x = double("llama")
    names = doubled(mirror(model, *x), model)
    assert {n for n in names if "attention" in n} == {f"layers.{i}.attention.v_proj.weight" for i in (0, 1)}


@torch.fx.wrap
def alone(x, layer_weight, layer_bias):
    return F.linear(x, layer_weight, layer_bias)


@torch.fx.wrap
def softmax_behind(x, layer_weight, layer_bias):
    return F.linear(x, layer_weight, layer_bias).softmax(-1)


class Wrapped(nn.Module):
    """A weight in a function that is one node, by itself or with something that does not go along."""

    def __init__(self, more):
        super().__init__()
        self.more = more
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        if self.more:
            return self.c(softmax_behind(x, self.b.weight, self.b.bias))
        return self.c(alone(x, self.b.weight, self.b.bias))


def test_a_function_that_is_one_node():
    model, x = Wrapped(more=False), torch.randn(2, 6, 3)
    assert doubled(mirror(model, x), model) == {"a.weight", "b.weight"}
    model = Wrapped(more=True)
    bio = mirror(model, x)
    assert not doubled(bio, model)
    assert left(bio, "b.weight") == "linear does not return its units on one axis"


def test_a_shuffle_in_front_of_a_depthwise_convolution():
    """The twins of a channel are not neighbours there, and a depthwise convolution reads neighbours."""
    model, x = double("shufflenet")
    assert "whose groups are not all doubled in the same way" in left(mirror(model, *x), "stage2.1.branch2.2.0.weight")


def test_a_weight_that_nobody_reads():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.fc = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x * self.gate(x).mean(-1, keepdim=True))

    bio = mirror(Dead(), torch.randn(2, 3))
    assert left(bio, "gate.weight") == "no weight reads its units"


# --- scales ----------------------------------------------------------------------------------------------------------


def test_a_negative_scale_behind_a_weight_is_turned_over():
    model, x = ConvNet().double().eval(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.25]))
        model.norm.running_mean.copy_(torch.randn(4))
    bio = mirror(model, x)
    assert bio.norm.weight.tolist() == [1, 1, 2, 2, 0.5, 0.5, 0.25, 0.25]
    assert torch.equal(bio.stem.weight[2:4], -model.stem.weight[[1, 1]])
    assert bio.biofx.nonnegative == {"norm.weight": "mirror-units"}


def test_another_negative_scale_stays_and_is_named():
    model, x = Tokens(), torch.randn(2, 4, 3)
    with torch.no_grad():
        model.gamma[2] = -1
    bio = mirror(model, x)
    assert "and inverts their signs" in flat(biofx.summary(bio))
    assert set(bio.biofx.nonnegative) == {"norm.weight"}


# --- what the check did not see --------------------------------------------------------------------------------------


class Normalizing(nn.Module):
    """Divides by a sum over units if it is told to, which is another sum if units are doubled."""

    def __init__(self, decides):
        super().__init__()
        self.decides, self.is_on = decides, False

    def forward(self, x):
        return x / (1 + x.sum(-1, keepdim=True)) if self.decides(self, x) else x


def normalizing(decides):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Normalizing(decides), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "decides",
    [lambda module, x: module.training, lambda module, x: bool(x.max() > 50)],
    ids=["by mode", "by values"],
)
def test_units_that_reach_a_decision_keep_their_number(decides):
    model, x = normalizing(decides), 100 * torch.rand(5, 4)
    bio = mirror(model.eval(), x / 100)
    assert "its units reach the untraced submodule 2 (Normalizing)" in left(bio, "0.weight")
    for training in (False, True):
        torch.testing.assert_close(bio.train(training)(x), model.train(training)(x))


def by_hand(bio, values, x):
    """The output of the network with other parameters."""
    other = copy.deepcopy(bio)
    other.load_state_dict(values, strict=False)
    return other(x)


def test_what_is_switched_on_afterwards_is_refused():
    x = torch.randn(5, 4)
    bio = mirror(normalizing(lambda module, x: module.is_on), x)
    assert bio[3].weight.shape == (3, 16)
    expected = bio(x)
    handle = bio[2].register_forward_hook(lambda *given: None)
    torch.testing.assert_close(bio(x), expected)
    handle.remove()
    values = {name: 2 * value for name, value in bio.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(bio, values, (x,)), by_hand(bio, values, x))
    bio[2].is_on = True
    with pytest.raises(biofx.CaptureError, match="2.is_on changed since the transform, and mirror-units doubled units"):
        bio(x)
    with pytest.raises(biofx.CaptureError, match="2.is_on changed"):
        torch.compile(bio, backend="eager")(x)
    bio[2].is_on = False
    torch.testing.assert_close(bio(x), expected)


def other_axis(bio):
    bio[1].dim = -1


def other_class(bio):
    bio[1].__class__ = nn.Softmin


def other_forward(bio):
    bio[1].forward = lambda x: x.cumsum(-1)


@pytest.mark.parametrize("change", [other_axis, other_class, other_forward])
def test_changes_of_a_layer_between_doubled_ones_are_refused(change):
    x = torch.randn(2, 3, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 3))
    bio = biofx.transform(model, "mirror-units", example_inputs=x)
    assert bio[2].weight.shape == (3, 16)
    bio(x)
    change(bio)
    for one in (bio, copy.deepcopy(bio)):
        with pytest.raises(biofx.CaptureError, match="changed since the transform, and mirror-units doubled units"):
            one(x)


class Optional(nn.Module):
    """Adds a sum over units where a second argument is given."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, weights=None):
        hidden = torch.relu(self.first(x))
        if weights is not None:
            hidden = hidden / (1 + (hidden * weights).sum(-1, keepdim=True))
        return self.last(hidden)


def test_arguments_of_another_structure_are_refused():
    x = torch.randn(5, 4)
    bio = mirror(Optional(), x)
    assert bio.last.weight.shape == (3, 16)
    with pytest.raises(biofx.CaptureError, match="mirror-units doubled units|weights must be None"):
        bio(x, torch.ones(5, 1))


def test_the_model_runs_with_the_defaults_of_its_user():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.relu(self.first(x + torch.zeros(4))))

    torch.set_default_dtype(torch.float64)
    try:
        model = Draws()
        bio = biofx.transform(model, [passes.MirrorUnits()], example_inputs=lambda run: run(torch.ones(5, 4)))
        x = torch.randn(5, 4)
        torch.testing.assert_close(bio(x), model(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert bio.last.weight.shape == (3, 16)
