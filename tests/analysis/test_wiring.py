"""Wiring: which synapses lead into units, and which lead out of them."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biofx.analysis.understanding import understand
from biofx.analysis.wiring import wire


def wired(model, *inputs, fixed=(), unread=()):
    """For each layer, its size, and of each weight how often a unit is there; and why others lead into none."""
    reasons = dict.fromkeys((*fixed, *unread), "it was asked for")
    layers, left = wire(understand(model, inputs), {n: reasons[n] for n in fixed}, {n: reasons[n] for n in unread})
    counts = [
        (each.size, *({n: places.shape[1] for n, places in side.items()} for side in (each.incoming, each.outgoing)))
        for each in layers
    ]
    return counts, left


class Network(nn.Module):
    """Layers a (3 → 4), b (4 → 4), c (3 → 4), out, and what to do with them."""

    def __init__(self, forward, read=4):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(read, 2)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def recurrent(net, x):
    state = torch.zeros(len(x), 4)
    for _ in range(3):
        state = torch.tanh(net.a(x) + net.b(state))
    return net.out(state)


FOLLOWED = {
    "a chain": (lambda n, x: n.out(n.b(n.a(x).relu())), 4, [("a", "b"), ("b", "out")]),
    "a residual stream": (lambda n, x: n.out((h := n.a(x).relu()) + n.b(h)), 4, [("ab", "b out")]),
    "a gate": (lambda n, x: n.out(n.a(x) * n.c(x).sigmoid()), 4, [("ac", "out")]),
    "a concatenation": (lambda n, x: n.out(torch.cat([n.a(x), n.c(x)], 1).relu()), 8, [("a", "out"), ("c", "out")]),
    "a loop": (recurrent, 4, [("ab", "b out")]),
    "a norm": (lambda n, x: n.out(F.layer_norm(n.a(x), (4,))), 4, [("a", "out")]),
    "two readers": (lambda n, x: n.out(h := n.a(x).relu()) + n.b(h)[:, :2], 4, [("a", "b out")]),
    "attention": (lambda n, x: n.out((n.c(x) @ n.c(x).T).softmax(-1) @ n.a(x)), 4, [("a", "out")]),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_synapses_of_units_are_found_in(name):
    forward, read, expected = FOLLOWED[name]
    found, _ = wired(Network(forward, read), torch.randn(2, 3))
    names = [
        (
            "".join(each.removesuffix(".weight") for each in into),
            " ".join(sorted(e.removesuffix(".weight") for e in out_of)),
        )
        for _, into, out_of in found
    ]
    assert names == expected
    assert all(size == 4 and {*into.values(), *out_of.values()} == {1} for size, into, out_of in found)


def test_a_unit_of_a_flattened_map_is_read_at_many_positions():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(24, 2))
    ((size, into, out_of),), _ = wired(model, torch.randn(2, 1, 4, 4))
    assert (size, into, out_of) == (6, {"0.weight": 1}, {"2.weight": 4})


def test_units_that_nothing_reads_are_left_out():
    net = Network(lambda n, x: n.out(n.a(x)[:, 1:].relu()), 3)
    ((layer,), _) = wire(understand(net, torch.randn(2, 3)), {}, {})
    assert layer.size == 3
    assert layer.incoming["a.weight"].tolist() == [[1], [2], [3]]
    assert layer.outgoing["out.weight"].tolist() == [[0], [1], [2]]


LEFT = {
    "returned": (lambda n, x: (n.out(h := n.a(x).relu()), h), "the model returns what its units compute, also"),
    "inputs": (
        lambda n, x: n.out(torch.cat([x, x[:, :1]], 1) + n.a(x).relu()),
        "its units merge with .*, which has no synapses",
    ),
    "broadcast": (
        lambda n, x: n.out(n.a(x).relu() + n.c(x)[:, :1].relu()),
        "some of its units merge with one that merges with others",
    ),
    "rolled": (
        lambda n, x: n.out(n.a(x).relu() + n.a(x).relu().roll(1, 1)),
        "some of its units merge with one that merges with others",
    ),
    "unknown": (
        lambda n, x: n.out(torch.fft.fft(n.a(x)).real),
        "it cannot be told which of its units out.weight reads",
    ),
    "keys": (
        lambda n, x: n.out((n.a(x) @ n.c(x).T) @ n.a(x)),
        "what its units compute also acts on others, as queries",
    ),
    "mask": (
        lambda n, x: n.out(n.a(x) * (n.a(x)[:, :1] > 0)),
        "what its units compute also acts on others, as queries",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_out_are_units_of_which_not_all_is_known(name):
    forward, reason = LEFT[name]
    found, left = wired(Network(forward), torch.randn(2, 3))
    assert found == []
    assert re.match(reason, left["a.weight"]), left["a.weight"]


def test_what_merges_with_fixed_units_is_fixed():
    net = Network(FOLLOWED["a gate"][0])
    found, left = wired(net, torch.randn(2, 3), fixed=["c.weight"])
    assert found == []
    assert left["a.weight"] == "its units merge with those of c.weight: it was asked for"
    found, left = wired(net, torch.randn(2, 3), unread=["out.weight"])
    assert found == []
    assert left["a.weight"] == "its units are read by out.weight, and it was asked for"
