"""What keeps, moves and merges units on their way from one weight to the next. All answers are written out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from models.small import CONVOLUTIONS, mlp
from unit_tracing import analysed, behind, feeds, origin, run, through


def through_images(function, positions=6):
    """The same for feature maps, shape (2, 6, 8, 7)."""
    x, a, b = torch.randn(2, 3, 8, 7), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(positions, 2, 1)
    return feeds(behind(function, x, a, b), "b.weight")


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


class Spikes(torch.autograd.Function):
    """A threshold with a surrogate gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.zeros_like(x)
        out[x > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (1 + ctx.saved_tensors[0].abs()) ** 2


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
    "masked_fill in place": lambda x: x.clone().masked_fill_(x > 0, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "masked_fill by a tensor": lambda x: x.masked_fill(x > 0, torch.tensor(-1.0, dtype=torch.float16)),
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
    "spikes": lambda x: (x > 0).to(x.dtype),
    "spikes between thresholds": lambda x: ((x > 0) & (x < 1)).float(),
    "spikes by where": lambda x: torch.where(x > 0, 1.0, 0.0),
    "spikes that are written": lambda x: torch.zeros_like(x).masked_fill_(x > 0, 1.0),
    "spikes in another shape": lambda x: (x > 0).view(10, 6).float(),
    "spikes that are drawn": lambda x: (torch.rand_like(x) < x.sigmoid()).float(),
    "spikes with a gradient": lambda x: Spikes.apply(x),
    "samples": lambda x: torch.bernoulli(x.sigmoid()),
    "samples around a mean": lambda x: torch.normal(x, 1.0),
    "samples with a spread": lambda x: torch.normal(0.0, x.exp()),
    "samples of a distribution": lambda x: torch.distributions.Normal(x, x.exp()).sample(),
    "a mask of its own": lambda x: x * (x > 0),
    "with itself": lambda x: x + x.sigmoid() * x,
    "attention": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "fused attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention by name": lambda x: F.scaled_dot_product_attention(value=x, key=x, query=x, is_causal=True),
    "mixture over samples": lambda x: torch.bmm(torch.ones(2, 5, 5), x),
    "written into some tokens": lambda x: torch.zeros(2, 9, 6).index_copy(1, torch.arange(3, 8), x),
    "added to some tokens": lambda x: torch.zeros(2, 9, 6).index_add(1, torch.arange(3, 8), x),
    "written where inputs say": lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x),
    "put where inputs say": lambda x: x.index_put((torch.arange(2)[:, None], x[..., 0].argsort(1)), x),
}


@pytest.mark.parametrize("name", KEEP)
def test_what_keeps_units(name):
    assert through(KEEP[name]) == run("a.weight", *range(6))


def test_what_adds_up_over_time_keeps_units():
    assert through(lambda x: x.cumsum(1)) == run("a.weight", *range(6))
    assert through(lambda x: x.sort(1)[0]) == run("a.weight", *range(6))
    assert through(lambda x: torch.fft.rfft(x, dim=1).abs()) == run("a.weight", *range(6))


KEEP_IMAGES = {
    "blur": lambda x: F.conv2d(x, torch.ones(6, 1, 3, 3) / 9, padding=1, groups=6),
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


@pytest.mark.parametrize("windows", [lambda x: x.unfold(1, 3, 1), lambda x: F.unfold(x.view(2, 1, 2, 5), (1, 3)).mT])
def test_windows_of_an_input_are_one_unit_that_moves(windows):
    found = analysed(lambda m, x: m.a(windows(x)), torch.randn(2, 10), a=nn.Linear(3, 4))
    assert found.readings["a.weight"].remark == ""
    assert found.describe(found.readings["a.weight"].numbers) == "1 × 3: input x"


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


@pytest.mark.parametrize("number", [0.0, 3.0, -1.0, 1e6])
def test_numbers_that_are_written_come_from_nobody(number):
    found = through(lambda x: x.scatter(2, torch.zeros(2, 5, 1, dtype=torch.int64), number))
    assert found == [("constants read by b.weight", 0), *run("a.weight", *range(1, 6))]


@pytest.mark.parametrize("what", [{"src": torch.ones(2, 5, 6)}, {"value": 2.0}])
def test_what_is_added_at_places_makes_units_of_its_own(what):
    found = through(lambda x: x.scatter(2, torch.arange(6).expand(2, 5, 6), reduce="add", **what))
    assert found == run("scatter", *range(6))


def test_the_parts_of_a_conjugate_are_units():
    assert through(lambda x: torch.complex(x, x).conj().imag) == run("a.weight", *range(6))


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


@pytest.mark.parametrize("units", [4, 40])
def test_a_mean_over_units_is_a_unit_of_its_own(units):
    found = analysed(
        lambda m, x: m.c(torch.cat([m.a(x), m.a(x).mean(-1, keepdim=True)], -1)),
        torch.randn(2, 3),
        a=nn.Linear(3, units),
        c=nn.Linear(units + 1, 1),
    )
    assert feeds(found, "c.weight") == [*run("a.weight", *range(units)), ("mean", 0)]


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


def test_fused_attention_repeats_values_for_query_heads():
    def forward(m, x):
        q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (m.q, m.k, m.v))
        return m.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4), "out": nn.Linear(8, 8)}
    found = analysed(forward, torch.randn(3, 5, 8), **layers)
    assert feeds(found, "out.weight") == run("v.weight", 0, 1, 0, 1, 2, 3, 2, 3)


def test_inputs_that_mix_nodes_merge_with_the_units():
    """As in a graph convolution, whose adjacency matrix is an input: channels come before nodes."""

    def forward(m, x, adjacency):
        return m.b(torch.einsum("ncv,vw->ncw", F.relu(m.a(x)), adjacency))

    found = analysed(forward, torch.randn(2, 4, 6), torch.rand(6, 6), a=nn.Conv1d(4, 8, 1), b=nn.Conv1d(8, 3, 1))
    assert feeds(found, "b.weight") == [("einsum", unit) for unit in range(5, 48, 6)]
    assert origin(found, "einsum") == ("merged", 48)
    assert found.verdicts()["b.weight"].kind == "breaks"


def test_units_that_inputs_weight_are_no_inputs():
    found = analysed(
        lambda m, x, y: m.b(F.relu(m.a(x)) @ y),
        torch.randn(3, 4),
        torch.rand(8, 8),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 2),
    )
    assert origin(found, "matmul") == ("unknown", 8)


def test_attention_over_inputs_reads_inputs():
    def forward(m, x):
        return m.b((m.q(x) @ m.k(x).mT).softmax(-1) @ x)

    found = analysed(forward, torch.randn(2, 5, 4), q=nn.Linear(4, 3), k=nn.Linear(4, 3), b=nn.Linear(4, 2))
    assert feeds(found, "b.weight") == run("input x", *range(4))


@pytest.mark.parametrize("size", [6, 3])
def test_tensors_that_one_operator_changes_keep_units_apart(size):
    """An operator on a list returns nothing. Each tensor that it changes has its own units."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, size)
            self.c, self.d = nn.Linear(6, 2), nn.Linear(size, 2)

        def forward(self, x):
            hidden = [self.a(x), self.b(x)]
            torch._foreach_tanh_(hidden)
            return self.c(hidden[0]) + self.d(hidden[1])

    text = str(biofx.units(Lists(), torch.randn(3, 4)))
    assert "6: _foreach_tanh_ " in text
    assert f"{size}: _foreach_tanh_ (2)" in text


def test_inputs_that_units_choose_are_inputs():
    def forward(m, x):
        kept = m.gate(x)[:, 0] > 0
        return m.a(x[kept]).sum(0) + m.b(x[kept.nonzero()[:, 0]]).sum(0)

    x = torch.tensor([[1.0, 2], [-1, 3], [2, -1]])
    gate, layers = nn.Linear(2, 1, bias=False), {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}
    nn.init.ones_(gate.weight)
    found = analysed(forward, x, gate=gate, **layers)
    assert {str(verdict) for verdict in found.verdicts().values()} == {"free"}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_what_reads_only_empty_tensors_is_not_judged(frontend):
    """… as experts to which no token went."""

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Conv1d(6, 2, 1)
            self.own = nn.Parameter(torch.randn(6, 2))

        def forward(self, x):
            h = self.a(x)
            none = torch.relu(h[:0])
            product = torch.einsum("bi,ij->bj", none, self.own)
            return self.b(h) + self.b(none).sum() + self.c(none[..., None]).mean(0).nan_to_num()[:, 0] + product.sum(0)

    bio = biofx.transform(Empty(), "dales-principle", example_inputs=torch.randn(3, 4), frontend=frontend)
    advice = "such as an expert without tokens; give other example_inputs"
    reason = f"not judged: the run gives it nothing to read, {advice}"
    assert {name: str(verdict) for name, verdict in biofx.verify(bio).items()} == {
        "own": reason,
        "a.weight": "free",
        "b.weight": "obeys",
        "c.weight": reason,
    }
