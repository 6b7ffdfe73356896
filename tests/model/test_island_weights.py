"""Weights in islands: each is rewritten and has its axes, as outside of islands, or a reason why it is left alone."""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from biofx.weights.facts import Need
from conftest import flat, gradients, loss, times_listed
from island_networks import SPLIT, X, assert_close, both
from models.islands import Around, Branch, Kernels, Tokens


def test_all_weights_of_layers_are_rewritten(kind, frontend):
    _, bio = both(kind, frontend, SPLIT)
    sites = biofx.weight_sites(bio)
    matrices = {n for n, p in stored_parameters(bio) if p.dim() > 2 and not n.endswith(("bias_k", "bias_v"))}
    assert matrices == {name for name, site in sites.items() if site.is_split}
    left = {n for n, p in stored_parameters(bio) if p.dim() == 2 and "bias" not in n}
    listed = {name for name in left if "forward takes it from parameters()" in bio.biofx.others.get(name, "")}
    assert left - listed <= {"inner.sparse.weight", "inner.bounded.weight", "inner.own", "inner.b.weight_g"}
    assert bool(listed) is (kind == "registered")


def test_the_summary_names_every_parameter_once_and_every_island(kind, frontend):
    model, bio = both(kind, frontend, SPLIT)
    text = biofx.summary(bio)
    for name, _ in model.named_parameters():
        assert times_listed(text, name) == 1, text
    for path in bio.biofx.islands:
        assert f"  {path} (" in text if path else "  the model (" in text


def test_axes_inside_islands():
    sites = biofx.weight_sites(biofx.transform(Around(Kernels()), SPLIT))
    found = {n: (s.operator, s.presynaptic_axis, s.postsynaptic_axis, s.groups) for n, s in sites.items()}
    assert found["inner.up.weight"] == ("conv1d", 1, 0, 1)
    assert found["inner.grouped.weight"] == ("conv1d", 1, 0, 2)
    assert found["inner.down.weight"] == ("conv_transpose1d", 0, 1, 1)
    sites = biofx.weight_sites(biofx.transform(Around(Tokens()), SPLIT))
    embedding = sites["inner.embedding.weight"]
    assert (embedding.presynaptic_units, embedding.units) == (5, 4)


def test_depth_counts_the_weights_of_an_island_in_their_order():
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4)), SPLIT)
    sites = biofx.weight_sites(bio).values()
    assert [site.depth for site in sites] == [0, 1 / 3, 2 / 3, 1]
    assert [site.is_output for site in sites] == [False, False, False, True]


def test_what_is_left_alone_in_an_island_has_a_reason():
    bio = biofx.transform(Around(Tokens()), SPLIT)
    text = flat(biofx.summary(bio))
    assert "inner.sparse.weight: embedding gives it a sparse gradient, and rules act on every entry" in text
    assert "inner.bounded.weight: embedding changes it in forward, as max_norm is set" in text
    own = biofx.weight_sites(bio)["inner.own"]  # a parameter that forward multiplies by itself
    assert (own.operator, own.island, own.presynaptic_axis, own.postsynaptic_axis) == ("matmul", "inner", 0, 1)


class Tied(Tokens):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(super().forward(x))


def test_a_tied_embedding_takes_its_signs_from_the_head():
    model = Around(Tied())
    bio = biofx.transform(model, SPLIT)
    (row,) = [row for row in biofx.summary(bio).rows if row["weight"] == "inner.embedding.weight"]
    assert (row["operator"], row["uses"], row["inside"]) == ("embedding, linear", 2, "inner")
    torch.testing.assert_close(bio(torch.ones(2, 3)), model(torch.ones(2, 3)))
    bio = biofx.transform(model, [passes.DalesPrinciple(balance=False)])
    tied = biofx.weight_sites(bio)["inner.embedding.weight"]
    assert (tied.presynaptic_axis, tied.postsynaptic_axis) == (1, 0)
    assert tied.sign is not None
    assert (tied.synaptic() * tied.sign >= 0).all()


# --- parametrizations --------------------------------------------------------------------------------------------


class Parametrized(nn.Module):
    """A layer of each kind whose weight a parametrization computes, behind a decision."""

    def __init__(self, parametrization):
        super().__init__()
        self.fc, self.attention = parametrization(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2)
        self.conv, self.own = parametrization(nn.Conv1d(4, 4, 1, groups=2)), nn.Linear(4, 4)
        parametrization(self.attention, "in_proj_weight")

    def forward(self, x):
        if len(x) == 0:
            return x
        y = self.conv(torch.tanh(self.fc(x))[:, :, None])[..., 0]
        return self.own(self.attention(y, y, y)[0])


PARAMETRIZATIONS = {
    "weight norm": (parametrizations.weight_norm, "original1", "it is stored as a direction"),
    "spectral norm": (parametrizations.spectral_norm, "original", None),
    "orthogonal": (
        functools.partial(parametrizations.orthogonal, orthogonal_map="cayley"),
        "original",
        r"\w+ in inner\.[\w.]+ computes the weight that its operator reads from it",
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights_are_rewritten(name, frontend):
    parametrization, stored, why_not_judged = PARAMETRIZATIONS[name]
    model = Around(Parametrized(parametrization)).double().eval()
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    sites = biofx.weight_sites(bio)
    parametrized = {f"inner.{layer}.{stored}": operator for layer, operator in [
        ("fc.parametrizations.weight", "linear"),
        ("conv.parametrizations.weight", "conv1d"),
        ("attention.parametrizations.in_proj_weight", "attention"),
    ]}  # fmt: skip
    assert {n: site.operator for n, site in sites.items() if "parametrizations" in n} == parametrized
    for site in (sites[n] for n in parametrized):
        assert site.is_split
        assert (site.axes is None) is (name == "orthogonal")
        assert re.match(why_not_judged or "$", site.unmet(Need.UNITS) or "")
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        assert_close(other(X), model(X))
    expected = gradients(model, X)
    for n, gradient in gradients(bio, X).items():
        torch.testing.assert_close(gradient, torch.stack([expected[n]] * 2) if n in sites else expected[n])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    loss(bio(X)).backward()
    optimizer.step()
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    assert_close(bio(X), model(X))
    assert_close(biofx.fold(bio, into=Around(Parametrized(parametrization)).double().eval())(X), model(X))


def test_a_parametrization_is_followed_or_the_reason_is_said():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = Around(Branch())
    parametrize.register_parametrization(model.inner.a, "weight", Doubled())
    parametrizations.orthogonal(model.inner.b, orthogonal_map="householder")
    bio = biofx.transform(model, SPLIT)
    assert list(biofx.weight_sites(bio)) == ["before.weight", "inner.a.parametrizations.weight.original"]
    assert biofx.weight_sites(bio)["inner.a.parametrizations.weight.original"].unmet(Need.UNITS) is None
    summary = flat(biofx.summary(bio))
    assert "inner.b.parametrizations.weight.original: forward takes whole numbers from it, by int in" in summary
