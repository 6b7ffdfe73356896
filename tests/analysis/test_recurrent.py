"""Recurrent networks: a unit that recurs, feeds other layers and is read out is one unit, with one sign.

Each network says which weights read the same units. Inputs are no units.
"""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import biofx
from biofx import passes
from biofx.signs.spectrum import singular_entropy, spectral_radius

STEPS, BATCH, INPUTS, UNITS = 5, 2, 4, 8


class Layer(nn.Module):
    """A recurrent layer of PyTorch and a readout."""

    def __init__(self, cls, take=lambda output, state: output, **options):
        super().__init__()
        self.r = cls(INPUTS, UNITS, batch_first=True, **options)
        width = options.get("proj_size") or UNITS
        self.o = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)
        self.take = take

    def forward(self, x):
        return self.o(self.take(*self.r(x)))


class Loop(nn.Module):
    """A network whose step is written by hand."""

    def __init__(self, step, last=False, **children):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 2)
        for name, child in children.items():
            setattr(self, name, child)
        self.step, self.last = step, last

    def forward(self, x):
        h, outputs = self.start(x), []
        for t in range(x.shape[1]):
            h = self.step(self, x[:, t], h)
            outputs.append(h)
        return self.o(outputs[-1] if self.last else torch.stack(outputs, 1))

    def start(self, x):
        return x.new_zeros(len(x), UNITS)


class LearnedStart(Loop):
    """The state begins with parameters."""

    def __init__(self, step):
        super().__init__(step)
        self.h0 = nn.Parameter(torch.randn(UNITS))

    def start(self, x):
        return self.h0.expand(len(x), -1)


class Cells(nn.Module):
    """A cell of PyTorch in a loop."""

    def __init__(self, cls):
        super().__init__()
        self.cell, self.o = cls(INPUTS, UNITS), nn.Linear(UNITS, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.o(state[0] if isinstance(state, tuple) else state)


class Packed(Layer):
    """Sequences of different lengths."""

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([STEPS, STEPS - 2]), batch_first=True)
        return self.o(pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])


class Areas(nn.Module):
    """Two areas that read each other."""

    def __init__(self):
        super().__init__()
        self.i, self.o = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, 2)
        self.aa, self.ab, self.ba, self.bb = (nn.Linear(UNITS, UNITS) for _ in range(4))

    def forward(self, x):
        a = b = x.new_zeros(len(x), UNITS)
        for t in range(x.shape[1]):
            a, b = F.relu(self.i(x[:, t]) + self.aa(a) + self.ba(b)), F.relu(self.ab(a) + self.bb(b))
        return self.o(b)


class Translator(nn.Module):
    """An encoder whose last state a decoder goes on with."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.RNN(INPUTS, UNITS, nonlinearity="relu", batch_first=True) for _ in range(2))
        self.o = nn.Linear(UNITS, 3)

    def forward(self, x):
        _, state = self.encoder(x)
        return self.o(self.decoder(x, state)[0])


def leak(m, x, h):
    return 0.8 * h + 0.2 * F.relu(m.i(x) + m.h(h))


def vanilla(m, x, h):
    return F.relu(m.i(x) + m.h(h))


def gate(m, x, h):
    z = torch.sigmoid(m.z(x) + m.zh(h))
    return z * h + (1 - z) * F.relu(m.i(x) + m.h(h))


def add_up(m, x, h):
    return h + F.relu(m.i(x) + m.h(h))


RNN = {"nonlinearity": "relu"}
SAME = [("h.weight", "o.weight")]
NETWORKS = {
    "RNN": (lambda: Layer(nn.RNN, **RNN), [("r.weight_hh_l0", "o.weight")]),
    "RNN, tanh": (lambda: Layer(nn.RNN), [("r.weight_hh_l0", "o.weight")]),
    "RNN, last step": (lambda: Layer(nn.RNN, lambda y, h: y[:, -1]), [("r.weight_hh_l0", "o.weight")]),
    "RNN, last state": (lambda: Layer(nn.RNN, lambda y, h: h[-1]), [("r.weight_hh_l0", "o.weight")]),
    "RNN, packed": (lambda: Packed(nn.RNN), [("r.weight_hh_l0", "o.weight")]),
    "RNN, 2 layers": (
        lambda: Layer(nn.RNN, num_layers=2),
        [("r.weight_hh_l0", "r.weight_ih_l1"), ("r.weight_hh_l1", "o.weight")],
    ),
    "LSTM": (lambda: Layer(nn.LSTM), [("r.weight_hh_l0", "o.weight")]),
    "LSTM, 2 layers": (
        lambda: Layer(nn.LSTM, num_layers=2),
        [("r.weight_hh_l0", "r.weight_ih_l1"), ("r.weight_hh_l1", "o.weight")],
    ),
    "LSTM, projections": (lambda: Layer(nn.LSTM, proj_size=6), [("r.weight_hh_l0", "o.weight")]),
    "GRU": (lambda: Layer(nn.GRU), [("r.weight_hh_l0", "o.weight")]),
    "RNN cell": (lambda: Cells(nn.RNNCell), [("cell.weight_hh", "o.weight")]),
    "LSTM cell": (lambda: Cells(nn.LSTMCell), [("cell.weight_hh", "o.weight")]),
    "GRU cell": (lambda: Cells(nn.GRUCell), [("cell.weight_hh", "o.weight")]),
    "by hand": (lambda: Loop(vanilla), SAME),
    "by hand, last step": (lambda: Loop(vanilla, last=True), SAME),
    "leak": (lambda: Loop(leak), SAME),
    "leak, last step": (lambda: Loop(leak, last=True), SAME),
    "gate": (
        lambda: Loop(gate, z=nn.Linear(INPUTS, UNITS), zh=nn.Linear(UNITS, UNITS)),
        [*SAME, ("h.weight", "zh.weight")],
    ),
    "running sum": (lambda: Loop(add_up), SAME),
    "learned start": (lambda: LearnedStart(leak), SAME),
    "areas": (Areas, [("aa.weight", "ab.weight"), ("ba.weight", "bb.weight"), ("bb.weight", "o.weight")]),
    "encoder and decoder": (Translator, [("decoder.weight_hh_l0", "o.weight")]),
}
READ_INPUTS = (
    "i.weight",
    "z.weight",
    "r.weight_ih_l0",
    "cell.weight_ih",
    "encoder.weight_ih_l0",
    "decoder.weight_ih_l0",
)


def sequence():
    return torch.randn(BATCH, STEPS, INPUTS)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_unit_is_one_unit_at_every_step(name):
    build, same = NETWORKS[name]
    found = biofx.units(build(), sequence())
    assert {weight: reading.remark for weight, reading in found.readings.items() if reading.remark} == {}
    for a, b in same:
        assert torch.equal(found.readings[a].classes, found.readings[b].classes), (a, b)
        assert len(found.readings[a].classes.unique()) == len(found.readings[a].numbers)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_read_the_input_are_free_and_others_are_not(name):
    found = biofx.units(NETWORKS[name][0](), sequence())
    for weight, reading in found.readings.items():
        assert bool(reading.is_free.all()) is (weight in READ_INPUTS), weight


@pytest.mark.parametrize("name", NETWORKS)
def test_an_untouched_network_has_mixed_units(name):
    assert len(biofx.units(NETWORKS[name][0](), sequence()).mixed())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("name", NETWORKS)
def test_dales_principle_gives_each_unit_one_sign(name, frontend):
    torch.manual_seed(0)
    model, x = NETWORKS[name][0](), sequence()
    bio = biofx.transform(model, [passes.DalesPrinciple()], example_inputs=x, frontend=frontend)
    verdicts = {w: v.kind for w, v in biofx.units(biofx.fold(bio), x).verdicts().items()}
    assert verdicts == {w: "free" if w in READ_INPUTS else "obeys" for w in verdicts}
    sites = biofx.weight_sites(bio)
    assert all((sites[weight].sign is None) is (weight in READ_INPUTS) for weight in sites)


def test_both_directions_are_units_of_their_own():
    found = biofx.units(Layer(nn.LSTM, bidirectional=True), sequence())
    forward, backward = (found.readings[f"r.weight_hh_l0{suffix}"].classes for suffix in ("", "_reverse"))
    assert torch.equal(found.readings["o.weight"].classes, torch.cat([forward, backward]))
    assert not set(forward.tolist()) & set(backward.tolist())


def test_more_steps_make_no_more_units():
    counts = {}
    for steps in (3, 12):
        found = biofx.units(Loop(leak), torch.randn(BATCH, steps, INPUTS))
        counts[steps] = [p.size for p in found.populations]
    assert counts[3] == counts[12]


# --- state that is carried from call to call ----------------------------------------------------------------------


class Step(nn.Module):
    """One step; the caller carries the state."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 2)

    def forward(self, x, h):
        h = F.relu(self.i(x) + self.h(h))
        return self.o(h), h


def several_steps(model):
    h = torch.zeros(BATCH, UNITS)
    for x in torch.randn(STEPS, BATCH, INPUTS):
        _, h = model(x, h)


def test_one_step_of_a_carried_state_is_not_judged():
    verdict = biofx.units(Step(), (torch.randn(BATCH, INPUTS), torch.zeros(BATCH, UNITS))).verdicts()["h.weight"]
    assert verdict.kind == "not judged"
    assert "give example_inputs a function that runs the model for several steps" in verdict.reason


def test_a_function_runs_several_steps():
    found = biofx.units(Step(), several_steps)
    assert torch.equal(found.readings["h.weight"].classes, found.readings["o.weight"].classes)
    bio = biofx.transform(Step(), [passes.DalesPrinciple()], example_inputs=several_steps)
    assert biofx.verify(bio)["h.weight"].kind == "obeys"
    assert biofx.units(bio, several_steps).verdicts()["h.weight"].kind == "obeys"


# --- proof, or its absence ----------------------------------------------------------------------------------------


def test_mixed_refuses_to_be_empty_where_weights_were_not_judged():
    model = Step()
    with torch.no_grad():
        model.o.weight.abs_()
    with pytest.raises(biofx.NotJudgedError, match=r"h\.weight: it reads input h, which looks like a state") as caught:
        biofx.units(model, (torch.randn(BATCH, INPUTS), torch.zeros(BATCH, UNITS))).mixed()
    assert list(caught.value.reasons) == ["h.weight"]


def test_a_tied_autoencoder_takes_signs_from_the_hidden_axis():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(UNITS, INPUTS))

        def forward(self, x):
            return F.relu(F.relu(x @ self.w.t()) @ self.w)

    torch.manual_seed(0)
    found = biofx.units(Tied(), torch.randn(BATCH, INPUTS))
    assert len(found.mixed()) > UNITS // 2
    bio = biofx.transform(Tied(), [passes.DalesPrinciple(balance=False)], example_inputs=torch.randn(BATCH, INPUTS))
    assert biofx.weight_sites(bio)["w"].presynaptic_axis == 0
    assert biofx.verify(bio)["w"].kind == "obeys"


def test_a_weight_that_units_read_along_both_axes_is_not_judged():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.w = nn.Linear(INPUTS, UNITS), nn.Parameter(torch.randn(6, UNITS))

        def forward(self, x):
            return F.relu(F.relu(self.i(x).relu() @ self.w.t()) @ self.w)

    verdict = biofx.units(Both(), torch.randn(BATCH, INPUTS)).verdicts()["w"]
    assert (verdict.kind, "along several of its axes" in verdict.reason) == ("not judged", True)


def test_a_tied_head_takes_signs_from_the_head():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(12, UNITS), nn.Linear(UNITS, UNITS)
            self.head = nn.Linear(UNITS, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(F.relu(self.mix(self.table(x))))

    tokens = torch.randint(12, (BATCH, STEPS))
    assert len(biofx.units(Language(), tokens).mixed())
    bio = biofx.transform(Language(), [passes.DalesPrinciple()], example_inputs=tokens)
    sites = biofx.weight_sites(bio)
    assert sites["table.weight"].presynaptic_axis == 1
    sign = sites["table.weight"].sign
    assert sign is not None
    assert sign.shape == (1, UNITS)
    assert len(biofx.units(biofx.fold(bio), tokens).mixed()) == 0


def test_excitatory_units_alone_project_to_the_readout():
    bio = biofx.transform(Loop(leak), [passes.DalesPrinciple(readouts="excitatory")], example_inputs=sequence())
    sites = biofx.weight_sites(bio)
    readout = sites["o.weight"].effective()
    silent = sites["h.weight"].sign[0] < 0
    assert bool(silent.any())
    assert float(readout.min()) >= 0
    assert not readout[:, silent].any()
    assert sites["h.weight"].effective()[:, silent].any()


def test_the_summary_reports_the_spectrum_of_recurrent_weights():
    """Radius and entropy, of each gate."""
    model = nn.Sequential(nn.GRU(INPUTS, UNITS, batch_first=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bio = biofx.transform(model, [passes.DalesPrinciple()], example_inputs=torch.randn(BATCH, STEPS, INPUTS))
    (remark,) = [run.remarks["0.weight_hh_l0"] for run in bio.biofx.passes]
    radii, entropies = re.findall(r"(?:radius|values) ([\d., ]+) → ([\d., ]+)", remark)
    free = model[0].weight_hh_l0.chunk(3)
    assert radii[0] == radii[1] == ", ".join(f"{spectral_radius(gate):.3g}" for gate in free)
    assert entropies[0] == ", ".join(f"{singular_entropy(gate):.3g}" for gate in free)
    signed = biofx.weight_sites(bio)["0.weight_hh_l0"].effective().chunk(3)
    assert entropies[1] == ", ".join(f"{singular_entropy(gate):.3g}" for gate in signed)


def test_areas_that_share_recurrent_weights_share_signs():
    """Unit j of both areas sends through column j, so both have its sign, and so have their readouts."""

    class Areas(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(INPUTS, UNITS), nn.Linear(INPUTS, UNITS)
            self.h = nn.Linear(UNITS, UNITS, bias=False)
            self.out_a, self.out_b = nn.Linear(UNITS, 2), nn.Linear(UNITS, 2)

        def forward(self, x):
            a = b = x.new_zeros(len(x), UNITS)
            for t in range(x.shape[1]):
                a = F.relu(self.a(x[:, t]) + self.h(a))
                b = F.relu(self.b(x[:, t]) + self.h(b))
            return self.out_a(a) + self.out_b(b)

    x = torch.randn(BATCH, STEPS, INPUTS)
    found = biofx.units(Areas(), x)
    classes = [found.readings[name].classes for name in ("h.weight", "out_a.weight", "out_b.weight")]
    assert all(torch.equal(classes[0], other) for other in classes)
    assert len(classes[0].unique()) == UNITS
    assert not torch.equal(*(found.readings[name].numbers for name in ("out_a.weight", "out_b.weight")))
    bio = biofx.transform(Areas(), [passes.DalesPrinciple()], example_inputs=x)
    assert len(biofx.units(biofx.fold(bio), x).mixed()) == 0
