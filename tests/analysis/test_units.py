"""Units: which unit feeds each presynaptic position of every weight. All answers are written out by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.analysis.units import NOBODY
from conftest import tensors
from models.architectures import ARCHITECTURES
from models.small import CONVOLUTIONS, Reused, mlp


class Net(nn.Module):
    """Children by name, and what forward does with them."""

    def __init__(self, compute, **children):
        super().__init__()
        self.compute = compute
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.compute(self, x)


class Net2(Net):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.compute(self, x, y)


def analysed(compute, *inputs, **children):
    return biofx.units((Net if len(inputs) < 2 else Net2)(compute, **children), inputs)


def feeds(found, weight):
    """Where each position of a weight comes from: the name of a population and the number of the unit in it."""
    result = []
    for number in found.readings[weight].numbers.tolist():
        index = int(found.owner[number])
        assert number in found.members(index)
        result.append((found.populations[index].name, found.members(index).tolist().index(number)))
    return result


def run(name, *units, times=1):
    """Units of one population in a row, each as often as it is said."""
    return [(name, unit) for unit in units for _ in range(times)]


def origin(found, name):
    (population,) = [p for p in found.populations if p.name == name]
    return population.origin, population.size


def through(function, positions=6):
    """What a second weight reads behind something that is done to the output of the first, shape (2, 5, 6)."""
    return feeds(behind(function, torch.randn(2, 5, 4), nn.Linear(4, 6), nn.Linear(positions, 3)), "b.weight")


def through_images(function, positions=6):
    """The same for feature maps, shape (2, 6, 8, 7)."""
    x, a, b = torch.randn(2, 3, 8, 7), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(positions, 2, 1)
    return feeds(behind(function, x, a, b), "b.weight")


def behind(function, x, a, b):
    if isinstance(function, nn.Module):
        return analysed(lambda m, x: m.b(m.function(m.a(x))), x, a=a, b=b, function=function)
    return analysed(lambda m, x: m.b(function(m.a(x))), x, a=a, b=b)


# --- layers behind each other ------------------------------------------------------------------------------------


def test_linear_layers_in_sequence():
    found = biofx.units(mlp(4, 8, 6, 3), torch.randn(5, 4))
    assert feeds(found, "0.weight") == run("input input", *range(4))
    assert feeds(found, "2.weight") == run("0.weight", *range(8))
    assert feeds(found, "4.weight") == run("2.weight", *range(6))
    assert [(p.name, p.origin, p.size) for p in found.populations] == [
        ("nobody", "constant", 0),
        ("input input", "input", 4),
        ("0.weight", "weight", 8),
        ("2.weight", "weight", 6),
    ]
    assert {r.remark for r in found.readings.values()} == {""}


def test_a_flattened_feature_map_is_channel_major():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7 * 7, 10))
    found = biofx.units(model, torch.randn(2, 3, 9, 9))
    assert feeds(found, "0.weight") == run("input input", 0, 1, 2)
    assert feeds(found, "3.weight") == run("0.weight", *range(16), times=49)
    assert found.describe(found.readings["3.weight"].numbers) == "16 × 49: 0.weight"


@pytest.mark.parametrize(
    "flatten", [lambda x: x.flatten(1), lambda x: x.view(x.size(0), -1), lambda x: x.reshape(2, -1)]
)
def test_ways_to_flatten(flatten):
    found = analysed(
        lambda m, x: m.b(flatten(m.a(x))), torch.randn(2, 3, 4, 5), a=nn.Conv2d(3, 4, 3), b=nn.Linear(24, 1)
    )
    assert feeds(found, "b.weight") == run("a.weight", *range(4), times=6)


def test_channels_last_before_flattening_is_position_major():
    found = analysed(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)),
        torch.randn(2, 3, 4, 4),
        a=nn.Conv2d(3, 5, 3),
        b=nn.Linear(20, 1),
    )
    assert feeds(found, "b.weight") == run("a.weight", *range(5)) * 4


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind):
    cls, spatial = CONVOLUTIONS[kind]
    found = biofx.units(nn.Sequential(cls(4, 6, 3), nn.ReLU(), cls(6, 2, 1)), torch.randn(3, 4, *spatial))
    assert feeds(found, "0.weight") == run("input input", *range(4))
    assert feeds(found, "2.weight") == run("0.weight", *range(6))


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", (4,)), ("conv1d", (4, 7)), ("conv2d", (4, 7, 5)), ("conv_transpose2d", (4, 3, 5))]
)
def test_inputs_without_a_batch(kind, shape):
    cls, arguments = (nn.Linear, ()) if kind == "linear" else (CONVOLUTIONS[kind][0], (1,))
    model = nn.Sequential(cls(4, 6, *arguments), nn.ReLU(), cls(6, 2, *arguments))
    found = biofx.units(model, torch.randn(shape))
    assert feeds(found, "0.weight") == run("input input", *range(4))
    assert feeds(found, "2.weight") == run("0.weight", *range(6))


def test_grouped_and_depthwise_separable_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 1, groups=2)
    )
    found = biofx.units(model, torch.randn(2, 3, 5, 4))
    assert feeds(found, "1.weight") == run("0.weight", *range(8))
    assert feeds(found, "2.weight") == run("1.weight", *range(8))
    assert feeds(found, "3.weight") == run("2.weight", *range(4))


def test_grouped_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Conv1d(6, 2, 1))
    assert feeds(biofx.units(model, torch.randn(2, 4, 5)), "1.weight") == run("0.weight", *range(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_does_not_matter(dtype):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).to(dtype)
    found = biofx.units(model, torch.randn(2, 1, 5, 5, dtype=dtype))
    assert feeds(found, "4.weight") == run("0.weight", *range(4), times=9)
    assert feeds(biofx.units(model), "4.weight") == run("0.weight", *range(4), times=9)


def test_one_sample_in_training_mode():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).train()
    assert feeds(biofx.units(model, torch.randn(1, 1, 3, 3)), "4.weight") == run("0.weight", *range(4))


# --- what keeps units --------------------------------------------------------------------------------------------

KEEP = {
    "relu": F.relu,
    "a method": lambda x: x.relu(),
    "in place": lambda x: F.relu(x, inplace=True),
    "tanh": torch.tanh,
    "gelu": nn.GELU(),
    "prelu": nn.PReLU(),
    "softmax": nn.Softmax(-1),
    "dropout": nn.Dropout(),
    "functional dropout": lambda x: F.dropout(x, 0.5),
    "layer norm": nn.LayerNorm(6),
    "functional layer norm": lambda x: F.layer_norm(x, (6,)),
    "rms norm": nn.RMSNorm(6),
    "clamp": lambda x: x.clamp(0, 1),
    "power": lambda x: x**2,
    "base": lambda x: 2**x,
    "constants": lambda x: 1 - 2 * x / 3 + 1,
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "cast": lambda x: x.double().float().to(x.dtype).contiguous().clone().detach(),
    "data": lambda x: x.data,
    "identity": nn.Identity(),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "transposed twice": lambda x: x.transpose(1, 2).mT,
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1),
    "view": lambda x: x.reshape(2, 5, 2, 3).permute(0, 2, 3, 1).reshape(2, 6, 5).transpose(1, 2),
    "chunk": lambda x: torch.cat(x.chunk(3, -1), -1),
    "split": lambda x: torch.cat(x.split([1, 5], -1), -1),
    "unbind": lambda x: torch.stack(x.unbind(-1), -1),
    "slice": lambda x: torch.cat([x[..., :2], x[..., 2:]], -1),
    "ellipsis": lambda x: x[:, ::2, None][..., 0, :],
    "roll of tokens": lambda x: torch.roll(x, 1, 1),
    "mean over tokens": lambda x: x.mean(1),
    "maximum over tokens": lambda x: x.max(dim=1)[0],
    "maximum over tokens, by name": lambda x: x.max(dim=1, keepdim=True).values,
    "sum over tokens": lambda x: torch.sum(x, dim=[0, 1]),
    "norm over tokens": lambda x: x.norm(2, 1),
    "padding of tokens": lambda x: F.pad(x, (0, 0, 1, 1)),
    "padding with a value": lambda x: F.pad(x, (0, 0, 1, 1), value=7.0),
    "unfold": lambda x: x.unfold(1, 2, 1)[..., 0],
    "pooling of tokens": lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
    "added zeros": lambda x: x + torch.zeros_like(x),
    "positions": lambda x: x + torch.arange(5)[:, None].float().sin(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "with itself": lambda x: x + x.sigmoid() * x,
    "attention": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "fused attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention by name": lambda x: F.scaled_dot_product_attention(value=x, key=x, query=x, is_causal=True),
    "mixture over samples": lambda x: torch.bmm(torch.ones(2, 5, 5), x),
}


@pytest.mark.parametrize("name", KEEP)
def test_what_keeps_units(name):
    assert through(KEEP[name]) == run("a.weight", *range(6))


def test_what_adds_up_over_time_keeps_units():
    assert through(lambda x: x.cumsum(1)) == run("a.weight", *range(6))
    assert through(lambda x: x.sort(1)[0]) == run("a.weight", *range(6))
    assert through(lambda x: torch.fft.rfft(x, dim=1).abs()) == run("a.weight", *range(6))


KEEP_IMAGES = {
    "max pooling": nn.MaxPool2d(2),
    "functional max pooling": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "average pooling": nn.AvgPool2d(3, 2),
    "functional average pooling": lambda x: F.avg_pool2d(x, 2),
    "adaptive pooling": nn.AdaptiveAvgPool2d(1),
    "adaptive pooling to odd sides": nn.AdaptiveMaxPool2d((3, 2)),
    "functional adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, (5, 3)),
    "lp pooling": nn.LPPool2d(2, 2),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "upsampling": nn.Upsample(size=(5, 5)),
    "nearest": nn.UpsamplingNearest2d(scale_factor=2),
    "batch norm": nn.BatchNorm2d(6),
    "functional batch norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)),
    "group norm": nn.GroupNorm(3, 6),
    "instance norm": nn.InstanceNorm2d(6, affine=True),
    "dropout": nn.Dropout2d(),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "reflection": nn.ReflectionPad2d(1),
    "zeros": nn.ZeroPad2d(1),
    "constant": nn.ConstantPad2d((1, 0, 2, 0), 3.0),
    "functional reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "flip": lambda x: x.flip(3),
}


@pytest.mark.parametrize("name", KEEP_IMAGES)
def test_what_keeps_the_units_of_feature_maps(name):
    assert through_images(KEEP_IMAGES[name]) == run("a.weight", *range(6))


# --- what moves units --------------------------------------------------------------------------------------------

MOVE = {
    "slice": (lambda x: x[..., 1:4], [1, 2, 3]),
    "step": (lambda x: x[..., ::2], [0, 2, 4]),
    "index": (lambda x: x[:, :, torch.tensor([5, 0, 0])], [5, 0, 0]),
    "index_select": (lambda x: x.index_select(-1, torch.tensor([2, 1])), [2, 1]),
    "narrow": (lambda x: x.narrow(-1, 2, 3), [2, 3, 4]),
    "flip": (lambda x: x.flip(-1), [5, 4, 3, 2, 1, 0]),
    "roll": (lambda x: x.roll(1, -1), [5, 0, 1, 2, 3, 4]),
    "repeat": (lambda x: x.repeat(1, 1, 2), [0, 1, 2, 3, 4, 5] * 2),
    "tile": (lambda x: x.tile(2), [0, 1, 2, 3, 4, 5] * 2),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, -1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "expand": (lambda x: x[..., None].expand(-1, -1, -1, 2).flatten(2), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    "swapped halves": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), [3, 4, 5, 0, 1, 2]),
    "second half": (lambda x: x.chunk(2, -1)[1], [3, 4, 5]),
    "stack": (lambda x: torch.stack([x[..., 3], x[..., 3], x[..., 0]], -1), [3, 3, 0]),
    "concatenation": (lambda x: torch.cat([x, x[..., :1]], dim=-1), [0, 1, 2, 3, 4, 5, 0]),
    "hstack": (lambda x: torch.hstack([x[:, 0], x[:, 1]]), [0, 1, 2, 3, 4, 5] * 2),
    "interleaved": (lambda x: x.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2), [0, 3, 1, 4, 2, 5]),
    "neighbours": (lambda x: x[:, :4].reshape(2, 2, 12), [0, 1, 2, 3, 4, 5] * 2),
}


@pytest.mark.parametrize("name", MOVE)
def test_what_moves_units(name):
    function, expected = MOVE[name]
    assert through(function, positions=len(expected)) == run("a.weight", *expected)


def channel_shuffle(x):
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


@pytest.mark.parametrize("shuffle", [channel_shuffle, nn.ChannelShuffle(2)])
def test_channel_shuffle(shuffle):
    assert through_images(shuffle) == run("a.weight", 0, 3, 1, 4, 2, 5)


def test_padding_of_channels_comes_from_nobody():
    found = analysed(
        lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))),
        torch.randn(2, 3, 4, 4),
        a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(4, 2, 1),
    )
    constants = "constants read by b.weight"
    assert feeds(found, "b.weight") == [(constants, 0), ("a.weight", 0), ("a.weight", 1), (constants, 1)]
    assert origin(found, constants) == ("constant", 2)


def test_space_to_depth_and_back():
    """Pixels of one channel become channels, which are one unit; pixels of one that come from several are not."""
    assert through_images(lambda x: F.pixel_unshuffle(x[..., :6], 2), positions=24) == run(
        "a.weight", *range(6), times=4
    )
    a, b = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 2, 1)
    found = analysed(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), torch.randn(2, 3, 4, 4), a=a, b=b)
    assert found.readings["b.weight"].remark == ""
    classes = found.classes[found.readings["b.weight"].sources]
    assert [len(found.readings["b.weight"].sources), len(classes.unique())] == [8, 2]  # one sign for four units


# --- what merges units -------------------------------------------------------------------------------------------


def test_a_residual_block():
    """All readers of a tensor share its units; a sum's units are new."""

    def forward(m, x):
        x = m.stem(x).relu()
        y = (x + m.b(m.a(x).relu())).relu()
        return m.c(y), m.d(y), m.e(x)

    layers = {name: nn.Linear(4, 4) for name in ("stem", "a", "b", "c", "d", "e")}
    found = analysed(forward, torch.randn(2, 4), **layers)
    assert feeds(found, "a.weight") == feeds(found, "e.weight") == run("stem.weight", *range(4))
    assert feeds(found, "b.weight") == run("a.weight", *range(4))
    assert feeds(found, "c.weight") == feeds(found, "d.weight") == run("add", *range(4))
    assert origin(found, "add") == ("merged", 4)


def test_a_shortcut_with_a_projection():
    layers = {"a": nn.Linear(3, 4), "shortcut": nn.Linear(3, 4), "head": nn.Linear(4, 2)}
    found = analysed(lambda m, x: m.head(F.relu(m.a(x) + m.shortcut(x))), torch.randn(2, 3), **layers)
    assert feeds(found, "a.weight") == feeds(found, "shortcut.weight") == run("input x", 0, 1, 2)
    assert feeds(found, "head.weight") == run("add", *range(4))


def test_the_same_pair_is_the_same_unit_again():
    def forward(m, x):
        a, b = m.a(x), m.b(x)
        return m.c((a + b).relu()), m.d(torch.maximum(a[..., :2], b[..., :2]))

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2), "d": nn.Linear(2, 2)}
    found = analysed(forward, torch.randn(2, 3), **layers)
    assert feeds(found, "c.weight") == run("add", *range(4))
    assert feeds(found, "d.weight") == run("add", 0, 1)


def test_a_residual_stream_has_new_units_after_each_block():
    def forward(m, x):
        x = x + m.a(x)
        x = x + m.b(x)
        return m.c(x)

    found = analysed(forward, torch.randn(2, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    assert feeds(found, "a.weight") == run("input x", *range(4))
    assert feeds(found, "b.weight") == run("add", *range(4))
    assert feeds(found, "c.weight") == run("add (2)", *range(4))


MERGE = {
    "gate": (lambda a, b: a * b.sigmoid(), "mul"),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), "lerp"),
    "where": (lambda a, b: torch.where(a > 0, a, b), "where"),
    "difference": (lambda a, b: a - b, "sub"),
    "quotient": (lambda a, b: a / b.exp(), "div"),
    "extremum": (torch.max, "max"),
    "in place": (lambda a, b: a.add_(b), "add_"),
}


@pytest.mark.parametrize("name", MERGE)
def test_what_merges_units(name):
    function, operator = MERGE[name]
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2)}
    found = analysed(lambda m, x: m.c(function(m.a(x), m.b(x))), torch.randn(2, 3), **layers)
    assert feeds(found, "c.weight") == run(operator, *range(4))
    assert origin(found, operator) == ("merged", 4)


def test_a_tensor_that_is_changed_in_place_has_new_units():
    def forward(m, x):
        h = m.a(x)
        before = m.c(h)
        h.add_(m.b(x))
        return before, m.d(h)

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2), "d": nn.Linear(4, 2)}
    found = analysed(forward, torch.randn(2, 3), **layers)
    assert feeds(found, "c.weight") == run("a.weight", *range(4))
    assert feeds(found, "d.weight") == run("add_", *range(4))


@pytest.mark.parametrize("gate", [F.glu, nn.GLU(), lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid()])
def test_a_gated_linear_unit_merges_the_two_halves(gate):
    found = behind(gate, torch.randn(2, 4), nn.Linear(4, 6), nn.Linear(3, 1))
    ((name, _), *_) = reading = feeds(found, "b.weight")
    assert reading == run(name, 0, 1, 2)
    assert origin(found, name) == ("merged", 3)


def test_a_gated_linear_unit_of_channels():
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.GLU(1), nn.Conv1d(4, 2, 1))
    found = biofx.units(model, torch.randn(2, 3, 9))
    assert feeds(found, "2.weight") == run("glu in 1", *range(4))


def test_squeeze_and_excitation():
    def forward(m, x):
        x = m.conv(x)
        gate = m.up(m.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return m.head(x * gate)

    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "down": nn.Conv2d(8, 2, 1),
        "up": nn.Conv2d(2, 8, 1),
        "head": nn.Conv2d(8, 4, 1),
    }
    found = analysed(forward, torch.randn(2, 3, 6, 5), **layers)
    assert feeds(found, "down.weight") == run("conv.weight", *range(8))
    assert feeds(found, "up.weight") == run("down.weight", 0, 1)
    assert feeds(found, "head.weight") == run("mul", *range(8))


def test_a_mean_over_units_is_a_unit_of_its_own():
    found = analysed(
        lambda m, x: m.c(torch.cat([m.a(x), m.a(x).mean(-1, keepdim=True)], -1)),
        torch.randn(2, 3),
        a=nn.Linear(3, 4),
        c=nn.Linear(5, 1),
    )
    assert feeds(found, "c.weight") == [*run("a.weight", *range(4)), ("mean", 0)]


def test_dense_connections_are_in_order():
    def forward(m, x):
        features = [m.stem(x)]
        for layer in (m.a, m.b):
            features.append(layer(torch.cat(features, 1)).relu())
        return m.head(torch.cat(features, 1).mean((2, 3)))

    layers = {
        "stem": nn.Conv2d(3, 4, 1),
        "a": nn.Conv2d(4, 2, 3, padding=1),
        "b": nn.Conv2d(6, 2, 1),
        "head": nn.Linear(8, 3),
    }
    found = analysed(forward, torch.randn(2, 3, 5, 7), **layers)
    stem, a, b = run("stem.weight", *range(4)), run("a.weight", 0, 1), run("b.weight", 0, 1)
    assert feeds(found, "b.weight") == [*stem, *a]
    assert feeds(found, "head.weight") == [*stem, *a, *b]


def test_a_skip_connection_of_a_u_net():
    def forward(m, x):
        skip = m.inc(x).relu()
        up = m.up(m.down(F.max_pool2d(skip, 2)).relu())
        return m.out(torch.cat([skip, F.interpolate(up, skip.shape[-2:])], 1))

    layers = {
        "inc": nn.Conv2d(3, 4, 1),
        "down": nn.Conv2d(4, 8, 1),
        "up": nn.ConvTranspose2d(8, 4, 2, 2),
        "out": nn.Conv2d(8, 1, 1),
    }
    found = analysed(forward, torch.randn(2, 3, 7, 9), **layers)
    assert feeds(found, "out.weight") == [*run("inc.weight", *range(4)), *run("up.weight", *range(4))]


def test_multi_head_attention_keeps_the_units_of_values():
    def forward(m, x):
        batch, tokens, width = x.shape
        q, k, v = m.qkv(x).view(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(4)).softmax(-1)
        return m.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))

    found = analysed(forward, torch.randn(3, 5, 8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8))
    assert feeds(found, "proj.weight") == run("qkv.weight", *range(16, 24))


def test_keys_and_values_of_several_query_heads():
    def forward(m, x):
        q = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, 1) for p in (m.k, m.v))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4), "out": nn.Linear(8, 8)}
    found = analysed(forward, torch.randn(3, 5, 8), **layers)
    assert feeds(found, "out.weight") == run("v.weight", 0, 1, 0, 1, 2, 3, 2, 3)


# --- weights that are used more than once, and conflicts ------------------------------------------------------------


def test_one_tensor_for_five_layers():
    layers = {name: nn.Linear(4, 2) for name in "abcde"}
    found = analysed(
        lambda m, x: [getattr(m, n)(m.stem(x)) for n in "abcde"], torch.randn(2, 3), stem=nn.Linear(3, 4), **layers
    )
    for name in layers:
        assert feeds(found, f"{name}.weight") == run("stem.weight", *range(4))


def test_units_that_one_weight_reads_in_turn_are_of_one_class():
    found = analysed(
        lambda m, x: m.shared(m.a(x)) + m.shared(m.b(x)),
        torch.randn(2, 3),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        shared=nn.Linear(4, 2),
    )
    reading = found.readings["shared.weight"]
    a, b = (i for i, p in enumerate(found.populations) if p.name in ("a.weight", "b.weight"))
    assert reading.remark == ""
    assert reading.sources.tolist() == [*found.members(a).tolist(), *found.members(b).tolist()]
    assert torch.equal(found.classes[found.members(a)], found.classes[found.members(b)])
    assert torch.equal(found.classes[found.members(a)], reading.classes)


def test_a_siamese_encoder_is_no_conflict():
    encoder = mlp(3, 4, 5)
    found = analysed(
        lambda m, x, y: m.head((m.encoder(x) - m.encoder(y)).abs()),
        torch.randn(2, 3),
        torch.randn(2, 3),
        encoder=encoder,
        head=nn.Linear(5, 1),
    )
    assert feeds(found, "encoder.0.weight") == run("input x", 0, 1, 2)
    assert feeds(found, "encoder.2.weight") == run("encoder.0.weight", *range(4))
    assert feeds(found, "head.weight") == run("encoder.2.weight", *range(5))
    assert {r.remark for r in found.readings.values()} == {""}


def test_a_step_that_is_applied_three_times():
    found = biofx.units(Reused(), torch.randn(5, 4))
    assert {r.remark for r in found.readings.values()} == {""}
    assert len(found.readings["step.weight"].sources) > len(found.readings["step.weight"].numbers)
    assert len(found.readings["step.weight"].classes.unique()) == len(found.readings["step.weight"].numbers)


def test_a_recurrent_network_reads_its_own_units():
    def forward(m, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in range(3):
            h = F.relu(m.w(h) + m.u(x[:, t]))
        return m.out(h)

    found = analysed(forward, torch.randn(2, 3, 5), w=nn.Linear(4, 4), u=nn.Linear(5, 4), out=nn.Linear(4, 2))
    assert feeds(found, "u.weight") == run("input x", *range(5))
    assert feeds(found, "w.weight") == feeds(found, "out.weight") == run("add", *range(4))
    assert {r.remark for r in found.readings.values()} == {""}


def test_token_mixing():
    """A weight over tokens multiplies all units by the same synapses."""
    found = analysed(
        lambda m, x: m.channels(m.tokens(m.stem(x).transpose(1, 2)).transpose(1, 2)),
        torch.randn(2, 5, 3),
        stem=nn.Linear(3, 4),
        tokens=nn.Linear(5, 5),
        channels=nn.Linear(4, 2),
    )
    assert found.readings["tokens.weight"].remark == "reads different units by the same synapses"
    assert feeds(found, "tokens.weight") == run("positions of tokens.weight", *range(5))
    assert len(found.readings["tokens.weight"].sources) == 4
    assert found.readings["channels.weight"].remark == "reads different units by the same synapses"


# --- inputs, unknown operators, constants -------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Two inputs, one of them by keyword only, and two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 1)

    def forward(self, x, *, context, scale=2.0):
        a, b = self.a(x), self.b(context) * scale
        return {"score": self.head(torch.cat([a, b], -1)), "hidden": (a, b)}


def test_inputs_by_keyword():
    found = biofx.units(TwoInputs(), {"x": torch.randn(2, 3), "context": torch.randn(2, 2)})
    assert feeds(found, "a.weight") == run("input x", 0, 1, 2)
    assert feeds(found, "b.weight") == run("input context", 0, 1)
    assert feeds(found, "head.weight") == [*run("a.weight", *range(4)), *run("b.weight", *range(4))]


def test_sums_of_inputs_are_inputs():
    found = analysed(lambda m, x, y: m.a(x - y), torch.randn(2, 5, 3), torch.randn(2, 5, 3), a=nn.Linear(3, 2))
    assert feeds(found, "a.weight") == run("sub", 0, 1, 2)
    assert origin(found, "sub") == ("input", 3)


def test_flattened_images_are_an_input_for_each_pixel():
    found = biofx.units(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 3, 2, 2))
    assert feeds(found, "1.weight") == run("input input", *range(12))


@pytest.mark.parametrize("samples", [1, 2])
def test_a_pooled_input_is_the_input(samples):
    model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 2, 1))
    assert feeds(biofx.units(model, torch.randn(samples, 3, 5, 7)), "1.weight") == run("input input", 0, 1, 2)


@torch.fx.wrap
def mystery(x):
    return x.cumsum(-1)


class Opaque(nn.Module):
    """A module that takes another path in training."""

    def forward(self, x):
        return x + 1 if self.training else x.cumsum(-1)


UNKNOWN = {
    "wrapped function": (lambda x: mystery(x), {}, 4, "cumsum"),
    "einsum": (lambda x: torch.einsum("btd,de->bte", x, torch.ones(4, 3)), {}, 3, "einsum"),
    "module": (lambda x, m: m.layer(x), {"layer": Opaque()}, 4, "cumsum in layer"),
    "chosen": (lambda x: x.gather(-1, x.argsort(-1)[..., :3]), {}, 3, "gather"),
    "sorted": (lambda x: x.sort(-1)[0], {}, 4, "sort"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_followed_starts_units_for_all_readers(name):
    function, children, width, operator = UNKNOWN[name]

    def forward(m, x):
        y = function(m.a(x), m) if children else function(m.a(x))
        return m.b(y), m.c(y.relu()), m.d(y.transpose(1, 2)), m.e(y[:, 0])

    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(width, 2), "c": nn.Linear(width, 2), "e": nn.Linear(width, 2)}
    found = analysed(forward, torch.randn(2, 5, 4), **layers, d=nn.Conv1d(width, 2, 3), **children)
    for reader in "bcde":
        assert feeds(found, f"{reader}.weight") == run(operator, *range(width))
    assert origin(found, operator) == ("unknown", width)


def test_units_that_are_joined_with_their_neighbours_are_not_one():
    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 2, 1), "c": nn.Conv2d(6, 2, 1)}
    found = analysed(
        lambda m, x: (m.b(y := F.local_response_norm(m.a(x), 3)), m.c(y)), torch.randn(2, 3, 8, 7), **layers
    )
    assert torch.equal(found.readings["b.weight"].classes, found.readings["c.weight"].classes)
    assert len(found.readings["b.weight"].classes.unique()) == 6


def test_a_function_of_ones_own_is_run():
    assert through(lambda x: relu(x)) == run("a.weight", *range(5, -1, -1))


@torch.fx.wrap
def relu(x):
    return x.flip(-1)


def test_the_last_states_of_both_directions_are_different_units():
    """The first axis of a tensor does not have to run over samples."""

    def forward(m, x):
        _, (h, _) = m.lstm(x)
        return m.head(torch.cat([h[-2], h[-1]], 1))

    found = analysed(
        forward, torch.randn(2, 5, 3), lstm=nn.LSTM(3, 4, bidirectional=True, batch_first=True), head=nn.Linear(8, 2)
    )
    assert feeds(found, "head.weight") == [*run("lstm in lstm", *range(4)), *run("lstm in lstm (2)", *range(4))]


def test_what_merges_with_unknown_units_is_unified_with_them():
    found = analysed(
        lambda m, x: m.b(F.relu(m.a(x) + m.table(x.argmax(-1)))),
        torch.randn(2, 5, 4),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 2),
        table=nn.Embedding(4, 6),
    )
    assert feeds(found, "b.weight") == run("add", *range(6))
    assert origin(found, "add") == ("merged", 6)


def test_embeddings():
    found = analysed(
        lambda m, x: m.b(m.words(x) + m.places(torch.arange(x.size(1)))),
        torch.randint(9, (2, 5)),
        words=nn.Embedding(9, 6),
        places=nn.Embedding(5, 6),
        b=nn.Linear(6, 2),
    )
    assert feeds(found, "b.weight") == run("add", *range(6))
    assert origin(found, "add") == ("merged", 6)


@pytest.mark.parametrize(
    ("look_up", "kind"), [(lambda m, x: F.embedding(x, m.table), "weight"), (lambda m, x: m.table[x], "weight")]
)
def test_a_parameter_that_is_looked_up_is_an_embedding(look_up, kind):
    def forward(m, x):
        y = look_up(m, x)
        return m.b(y), m.c(y)

    table = nn.Parameter(torch.randn(9, 6))
    found = analysed(forward, torch.randint(9, (2, 5)), table=table, b=nn.Linear(6, 2), c=nn.Linear(6, 2))
    ((name, _), *_) = feeds(found, "b.weight")
    assert feeds(found, "b.weight") == feeds(found, "c.weight") == run(name, *range(6))
    assert origin(found, name) == (kind, 6)


def test_class_token_and_positions():
    def forward(m, x):
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.a(x)], 1) + m.places
        return m.b(x), m.c(x[:, 0])

    parameters = {"token": nn.Parameter(torch.randn(1, 1, 6)), "places": nn.Parameter(torch.randn(1, 6, 6))}
    found = analysed(
        forward, torch.randn(2, 5, 4), a=nn.Linear(4, 6), b=nn.Linear(6, 2), c=nn.Linear(6, 2), **parameters
    )
    assert feeds(found, "b.weight") == feeds(found, "c.weight") == run("a.weight", *range(6))


def test_a_class_token_beside_inputs():
    parameters = {"token": nn.Parameter(torch.randn(1, 1, 4))}
    found = analysed(
        lambda m, x: m.a(torch.cat([m.token.expand(2, -1, -1), x], 1)),
        torch.randn(2, 5, 4),
        a=nn.Linear(4, 6),
        **parameters,
    )
    assert feeds(found, "a.weight") == run("input x", *range(4))


def test_constants_that_a_weight_reads():
    found = analysed(
        lambda m, x: m.b(m.a(m.query) + x),
        torch.randn(2, 4),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 1),
        query=nn.Parameter(torch.ones(3)),
    )
    assert feeds(found, "a.weight") == run("constants read by a.weight", 0, 1, 2)
    assert NOBODY not in found.readings["a.weight"].sources


# --- signs of activity --------------------------------------------------------------------------------------------

SIGNED_BY = {
    "nothing": (lambda x: x, "linear without activation"),
    "relu": (F.relu, ""),
    "relu module": (nn.ReLU6(), ""),
    "sigmoid": (lambda x: x.sigmoid(), ""),
    "softplus": (F.softplus, ""),
    "exp": (torch.exp, ""),
    "square": (torch.square, ""),
    "power": (lambda x: x**2, ""),
    "cube": (lambda x: x.pow(3), "linear without activation"),
    "abs": (abs, ""),
    "softmax": (lambda x: x.softmax(-1), ""),
    "clamp": (lambda x: x.clamp(min=0), ""),
    "clamp below zero": (lambda x: x.clamp(-1, 1), "linear without activation"),
    "tanh": (torch.tanh, "tanh"),
    "tanh behind relu": (lambda x: torch.tanh(F.relu(x)), ""),
    "gelu": (nn.GELU(), "gelu"),
    "leaky relu": (F.leaky_relu, "leaky_relu"),
    "layer norm": (lambda x: F.layer_norm(F.relu(x), (6,)), "layer_norm"),
    "minus": (lambda x: F.relu(x) - 1, "sub"),
    "negated": (lambda x: -F.relu(x), "neg"),
    "times a negative number": (lambda x: F.relu(x) * -0.5, "mul"),
    "times a positive number": (lambda x: F.relu(x) * 0.5, ""),
    "plus a negative number": (lambda x: F.relu(x) + (-1.0), "add"),
    "divided by a negative number": (lambda x: F.relu(x).div(-2), "div"),
    "negative alpha": (lambda x: torch.add(F.relu(x), F.relu(x), alpha=-2), "add"),
    "filled": (lambda x: F.relu(x).masked_fill(x > 0, -1e9), "masked_fill"),
    "filled with zeros": (lambda x: F.relu(x).masked_fill(x > 0, 0.0), ""),
    "dropout": (lambda x: F.dropout(F.relu(x)), ""),
    "propagated": (lambda x: torch.cat([F.relu(x)[..., :3], torch.tanh(x)[..., 3:]], -1), "tanh"),
    "concatenated": (lambda x: torch.cat([F.relu(x)[..., :3], x.exp()[..., 3:]], -1), ""),
    "sum": (lambda x: F.relu(x) + x.exp(), ""),
    "sum with a negative one": (lambda x: F.relu(x) + torch.sin(x), "sin"),
    "mean": (lambda x: F.relu(x).mean(1), ""),
    "deviation": (lambda x: x.std(1), ""),
    "pooled": (lambda x: F.max_pool1d(F.relu(x).transpose(1, 2), 2).transpose(1, 2), ""),
    "attention": (lambda x: (x @ x.mT).softmax(-1) @ F.relu(x), ""),
    "fused attention": (lambda x: F.scaled_dot_product_attention(x, x, F.relu(x)), ""),
    "raw attention": (lambda x: (x @ x.mT) @ F.relu(x), "linear without activation"),
    "changed in place": (lambda x: (x.relu_(), x)[1], ""),
    "added up": (lambda x: x.abs().cumsum(-1), ""),
    "unknown": (lambda x: torch.linalg.matrix_exp(x[..., :1, :1].abs()).expand(2, 5, 6), "linalg_matrix_exp"),
    "shape": (lambda x: F.relu(x) * (-x.size(1)), "mul"),
}


@pytest.mark.parametrize("name", SIGNED_BY)
def test_by_what_activity_can_be_negative(name):
    function, expected = SIGNED_BY[name]
    found = behind(function, torch.randn(2, 5, 4), nn.Linear(4, 6), nn.Linear(6, 3))
    assert found.readings["a.weight"].signed_by == "input x"
    assert found.readings["b.weight"].signed_by == expected


def test_feature_maps_that_can_be_negative():
    def signed_by(*layers):
        return biofx.units(nn.Sequential(*layers, nn.Conv2d(4, 1, 1)), torch.randn(2, 4, 6, 6)).readings

    assert signed_by(nn.ReLU(), nn.AvgPool2d(2))["2.weight"].signed_by == ""
    assert signed_by(nn.ReLU(), nn.BatchNorm2d(4))["2.weight"].signed_by == "batch_norm"
    assert signed_by(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"))["2.weight"].signed_by == ""
    assert signed_by(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bicubic"))["2.weight"].signed_by == "interpolate"
    assert signed_by(nn.Conv2d(4, 4, 1))["1.weight"].signed_by == "conv2d without activation"


@pytest.mark.parametrize(
    ("value", "expected"), [(nn.Parameter(torch.ones(6)), "parameter"), (torch.ones(6), ""), (-torch.ones(6), "buffer")]
)
def test_parameters_and_buffers_that_are_added(value, expected):
    model = Net(lambda m, x: m.b(F.relu(m.a(x)) + m.c), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    if isinstance(value, nn.Parameter):
        model.c = value
    else:
        model.register_buffer("c", value)
    assert biofx.units(model, torch.randn(2, 4)).readings["b.weight"].signed_by == expected


# --- scales -------------------------------------------------------------------------------------------------------


def test_scales_multiply_units_on_their_way_to_a_weight():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.last = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 2, 1),
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(2),
            )
            self.gamma, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
            self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            x = F.relu(self.norm(self.a(x))) * self.gamma.view(1, -1, 1, 1) + self.shift[:, None, None]
            return self.last(self.b(F.group_norm(x, 2, self.weight, self.bias)))

    found = biofx.units(Scaled(), torch.randn(2, 3, 4, 4))
    assert found.scales == {name: {"b.weight"} for name in ("norm.weight", "gamma", "weight")}
    assert found.readings["b.weight"].signed_by == "group_norm"


def test_a_parameter_that_multiplies_units_is_no_sign_of_them():
    model = Net(lambda m, x: m.b(F.relu(m.a(x)) * m.c), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.c = nn.Parameter(torch.ones(6))
    found = biofx.units(model, torch.randn(2, 4))
    assert (found.scales, found.readings["b.weight"].signed_by) == ({"c": {"b.weight"}}, "")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w, b: F.batch_norm(x, torch.zeros(4), torch.ones(4), w, b), {"w"}),
        (lambda x, w, b: F.batch_norm(x, torch.zeros(4), torch.ones(4), None, b), set()),
        (lambda x, w, b: F.layer_norm(x, (4,), bias=b, weight=w), {"w"}),
        (lambda x, w, b: x * (1 + w) + b, set()),
        (lambda x, w, b: x / w, {"w"}),
    ],
)
def test_functional_scales(function, expected):
    model = Net(lambda m, x: m.b(function(m.a(x), m.w, m.v)), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    model.w, model.v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    assert biofx.units(model, torch.randn(2, 4)).scales.keys() == expected


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


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table():
    model = Net(
        lambda m, x: m.b(torch.cat([m.a(x), m.a(x)[..., 1:3]], -1).tanh()), a=nn.Linear(2, 4), b=nn.Linear(6, 1)
    )
    assert str(biofx.units(model, torch.randn(3, 2))).splitlines()[2:] == [
        "a.weight  linear      2            2: input x                  any sign (input x)",
        "b.weight  linear      6            4 at 6 positions: a.weight  any sign (tanh)",
    ]


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
