"""By what activity can be negative, and which parameters multiply units on their way to a weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from unit_tracing import Net, behind

# --- signs of activity --------------------------------------------------------------------------------------------

POLAR = torch.polar(torch.ones(3), torch.ones(3))
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
    "extrapolated": (lambda x: torch.lerp(F.relu(x), x.exp(), 2.0), "lerp"),
    "extrapolated backwards": (lambda x: torch.lerp(F.relu(x), x.exp(), -0.5), "lerp"),
    "interpolated": (lambda x: torch.lerp(F.relu(x), x.exp(), 0.5), ""),
    "times minus two": (lambda x: torch.addcmul(F.relu(x), x.exp(), x.exp(), value=-2), "addcmul"),
    "below a negative bound": (lambda x: F.relu(x).clamp(max=-0.5), "clamp"),
    "hardtanh below zero": (lambda x: F.hardtanh(F.relu(x), -1, -0.5), "hardtanh"),
    "above a negative bound": (lambda x: F.relu(x).clamp(min=-1), ""),
    "softplus upside down": (lambda x: F.softplus(x, beta=-1.0), "softplus"),
    "remainder of a negative number": (lambda x: F.relu(x).remainder(-0.7), "remainder"),
    "negative base": (lambda x: (-2.0) ** F.relu(x).round(), "pow"),
    "negative power": (lambda x: x.exp() ** -1, ""),
    "product times minus one": (lambda x: torch.baddbmm(x.exp(), x.exp() @ x.mT.exp(), x.exp(), alpha=-1), "baddbmm"),
    "scattered": (lambda x: F.relu(x).scatter(2, torch.zeros(2, 5, 1).long(), -1.0), "scatter"),
    "added at places": (lambda x: F.relu(x).index_add(2, torch.arange(6), x.exp(), alpha=-3), "index_add"),
    "rotated": (lambda x: torch.view_as_real(_pairs(F.relu(x)) * POLAR).flatten(2), "mul"),
    "complex exponential": (lambda x: torch.complex(F.relu(x), x.exp()).exp().real, "exp"),
    "complex magnitude": (lambda x: torch.complex(x, x).abs(), ""),
    "conjugate": (lambda x: _pairs(F.relu(x)).conj().imag.repeat(1, 1, 2), "get"),
}


def _pairs(x):
    return torch.view_as_complex(x.unflatten(-1, (3, 2)))


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


# --- signs that are turned over -----------------------------------------------------------------------------------


def leaky(h, drive):
    return h + 0.1 * (drive - h)


def both_ways(h, other):
    return torch.maximum(other + h, other - h)


INVERTED_BY = {
    "added": (lambda m, h: m.a(h) + m.b(h), ""),
    "subtracted": (lambda m, h: m.a(h) - m.b(h), "sub"),
    "subtracted in place": (lambda m, h: m.a(h).sub_(m.b(h)), "sub_"),
    "reversed": (lambda m, h: torch.rsub(m.b(h), m.a(h)), "rsub"),
    "negated": (lambda m, h: m.a(h) + (-m.b(h)), "neg"),
    "times a negative number": (lambda m, h: m.a(h) + m.b(h) * -0.5, "mul"),
    "with a negative factor": (lambda m, h: torch.add(m.a(h), m.b(h), alpha=-1), "add"),
    "negated and subtracted": (lambda m, h: m.a(h) - (-m.b(h)), ""),
    "negated twice": (lambda m, h: m.a(h) + -1 * (m.c - m.b(h)), ""),
    "subtracted twice": (lambda m, h: torch.sub(m.a(h), m.b(h), alpha=-1), ""),
    "scaled and moved before": (lambda m, h: m.a(h) - m.c * (m.b(h) + m.c).view(2, 2, 3).flatten(1), "sub"),
    "a minuend": (lambda m, h: m.b(h) - m.c + m.a(h), ""),
    "joined with others before": (lambda m, h: m.a(h) - 0.1 * (m.a(h) + m.b(h)), ""),
    "behind an activation": (lambda m, h: m.a(h) - F.relu(m.b(h)), ""),
    "leaking": (lambda m, h: leaky(m.b(h), m.a(h)), ""),
    "negated in one of two uses": (lambda m, h: both_ways(m.b(h), m.a(h)), ""),
}


@pytest.mark.parametrize("name", INVERTED_BY)
def test_where_forward_turns_over_what_a_weight_returns(name):
    function, expected = INVERTED_BY[name]
    layers = {"into": nn.Linear(4, 5), "a": nn.Linear(5, 6), "b": nn.Linear(5, 6), "last": nn.Linear(6, 3)}
    model = Net(lambda m, x: m.last(F.relu(function(m, F.relu(m.into(x))))), **layers)
    model.c = nn.Parameter(torch.ones(6))
    found = biofx.units(model, torch.randn(2, 4))
    assert {name: reading.inverted_by for name, reading in found.readings.items()} == {
        **dict.fromkeys(("into.weight", "a.weight", "last.weight"), ""),
        "b.weight": expected,
    }
    bio = biofx.transform(model, "dales-principle", example_inputs=torch.randn(2, 4))
    text = f"{expected} subtracts or negates what it returns, so its synapses act with the other sign"
    remarks = {row["weight"]: row["remarks"] for row in biofx.summary(bio).rows}
    assert (text in str(remarks["b.weight"])) is bool(expected)


def test_what_a_weight_returns_may_pass_many_operators():
    def decays(m, x):
        h = m.a(x)
        for _ in range(1500):
            h = h * 0.999
        return m.b(-h)

    found = biofx.units(Net(decays, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3))
    assert found.readings["a.weight"].inverted_by == "neg"


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
    ("factor", "expected"),
    [
        (lambda c: c.view(1, 6).clone() * 0.5, ""),
        (lambda c: c.exp(), ""),
        (lambda c: -c, "neg"),
        (lambda c: c - 1, "sub"),
        (lambda c: 1 + c, "parameter"),
        (lambda c: c * -0.5, "mul"),
        (lambda c: c.tanh(), "tanh"),
    ],
)
def test_what_is_computed_from_a_parameter_can_be_negative(factor, expected):
    model = Net(lambda m, x: m.b(F.relu(m.a(x)) * factor(m.c)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.c = nn.Parameter(torch.ones(6))
    assert biofx.units(model, torch.randn(2, 4)).readings["b.weight"].signed_by == expected


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
