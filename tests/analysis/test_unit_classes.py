"""Units that one weight reads in several uses, and units of inputs, constants and operators that are not known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx.analysis.units import NOBODY
from models.small import Reused, mlp
from unit_tracing import analysed, feeds, origin, run, through

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


def test_what_is_made_of_numpy_is_no_input():
    """Units of the network may be behind it, so a weight that reads it is not free of signs."""

    def forward(m, x):
        return m.b(torch.from_numpy(F.relu(m.a(x)).numpy()[:, ::-1].copy()).cumsum(0))

    found = analysed(forward, torch.randn(3, 4), a=nn.Linear(4, 8), b=nn.Linear(8, 5))
    assert origin(found, "cumsum") == ("unknown", 8)
    assert found.verdicts()["b.weight"].kind == "breaks"


@pytest.mark.parametrize("rows", [lambda w, expert: w[expert], lambda w, expert: w.index_select(0, expert).clone()])
def test_experts_that_inputs_choose_are_not_judged(rows):
    def forward(m, x):
        return torch.einsum("bi,bio->bo", F.relu(m.a(x)), rows(m.experts, m.gate(x).argmax(-1)))

    layers = {"a": nn.Linear(4, 8), "gate": nn.Linear(4, 3), "experts": nn.Parameter(torch.randn(3, 8, 5))}
    verdict = analysed(forward, torch.randn(6, 4), **layers).verdicts()["experts"]
    assert verdict.reason == "inputs choose which of its parts einsum multiplies units by"
