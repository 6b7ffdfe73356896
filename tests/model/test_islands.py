"""Islands: untraced submodules keep their Python, and compute with the effective weights."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import biofx
from biofx.model.synapses import Synapses
from conftest import gradients, loss
from island_networks import SLOW, SPLIT, X, assert_close, both, network
from models.islands import Around, Branch, Checkpointed, Encoder, Recursive


def test_the_function_is_preserved(kind, frontend):
    model, bio = both(kind, frontend, SLOW)
    for mode in (True, False):
        assert_close(bio.train(mode)(X), model.train(mode)(X))
        assert_close(bio(-X), model(-X))
    with torch.no_grad():
        assert_close(bio(X), model(X))


def test_gradients_are_exact(kind, frontend):
    model, bio = both(kind, frontend, SPLIT)
    expected, sites = gradients(model, X), biofx.weight_sites(bio)
    for _ in range(2):  # nothing of one call is left for the next
        found = gradients(bio, X)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            wanted = expected[name]
            if name in sites and sites[name].is_split:
                wanted = torch.stack([wanted, wanted])
            torch.testing.assert_close(
                gradient.to_dense() if gradient.is_sparse else gradient,
                wanted.to_dense() if wanted.is_sparse else wanted,
            )


def test_modules_keep_their_class_names_and_trees(frontend):
    model = network("lstm")
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    modules = [(path, module) for path, module in bio.named_modules() if not isinstance(module, Synapses)]
    for (name, a), (other, b) in zip(model.named_modules(), modules, strict=True):
        assert name == other
        assert isinstance(b, type(a))
        assert type(b).__name__ == type(a).__name__


def test_a_module_called_alone_computes_with_effective_weights(frontend):
    model = network("branch")
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(bio.inner(x), model.inner(x))
    assert_close(bio.inner.a(x), model.inner.a(x))
    loss(bio.inner(x)).backward()
    assert biofx.weight_sites(bio)["inner.a.weight"].raw.grad is not None
    assert bio.inner.a.weight.shape == (6, 4)  # from outside, too


def test_a_module_taken_out_of_the_model_still_computes():
    model = network("branch")
    inner = biofx.transform(model, SPLIT, frontend="module").inner
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(inner(x), model.inner(x))


def test_threads_do_not_disturb_each_other(frontend):
    model = network("nested")
    bio = biofx.transform(model, SLOW, frontend=frontend)
    expected, wrong = bio(X), []

    def work():
        for _ in range(30):
            with torch.no_grad():
                wrong.extend([] if torch.equal(bio(X), expected) else [1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exception_inside_an_island_leaves_nothing_behind():
    bio = biofx.transform(network("structures"), SLOW)
    expected = bio(X)
    with pytest.raises(ValueError, match="too large"):
        bio(X * 1e12)
    assert_close(bio(X), expected)


def test_a_transform_in_place_that_fails_leaves_the_classes():
    model = network("branch")
    with pytest.raises(biofx.ArgumentError):
        biofx.transform(model, SPLIT, inplace=True, exclude="*")
    assert type(model.inner) is Branch
    assert type(model.inner.a) is nn.Linear
    assert not any("biofx" in name for module in model.modules() for name in vars(module))
    model(X)


# --- kinds of islands --------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """The idiom of language models: a recurrent layer on sequences of several lengths."""

    def __init__(self, rnn, width):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 2)

    def forward(self, x):
        self.rnn.flatten_parameters()
        y, state = self.rnn(pack_padded_sequence(x, torch.tensor([4, 2, 3]), batch_first=True, enforce_sorted=False))
        return self.head(pad_packed_sequence(y, batch_first=True)[0]), state


RECURRENT = {
    "lstm": lambda: Packed(nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2, batch_first=True), 4),
    "gru": lambda: Packed(nn.GRU(3, 5, bidirectional=True, batch_first=True), 10),
    "rnn": lambda: Packed(nn.RNN(3, 5, bias=False, nonlinearity="relu", batch_first=True), 5),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_packed_sequences_in_recurrent_layers(kind, autocast, frontend):
    model, x = RECURRENT[kind]().double(), torch.randn(3, 4, 3, dtype=torch.float64)
    if autocast:
        model, x = model.float(), x.float()
    # Autocast adds the gradients of time steps up in bfloat16 for a parameter, and in float32 for an effective weight.
    tolerance = {"rtol": 0.02, "atol": 0.02} if autocast else {}
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(bio(x), model(x))
        found, expected = gradients(bio, x), gradients(model, x)
    sites = biofx.weight_sites(bio)
    assert len(sites) == sum(p.dim() == 2 for p in model.parameters())
    for name, wanted in expected.items():
        wanted = torch.stack([wanted, wanted]) if name in sites else wanted
        torch.testing.assert_close(found[name], wanted, **tolerance)
    bio.rnn.flatten_parameters()
    assert_close(biofx.fold(bio)(x), bio(x))


class Packs(nn.Module):
    """Layers between which packed sequences go, whose class takes nothing but tensors."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 4), nn.GRU(4, 5), nn.Linear(5, 2)

    def forward(self, packed):
        return self.head(self.rnn(packed._replace(data=self.embed(packed.data)))[1][0])


@pytest.mark.parametrize("rule", ["split-synapses", "mirror-units"])
def test_packed_sequences_between_layers(rule, frontend):
    model, packed = Packs(), pack_sequence([torch.randn(n, 3) for n in (4, 3, 1)])
    bio = biofx.transform(model, rule, example_inputs=(packed,), frontend=frontend)
    assert_close(bio(packed), model(packed))


def test_transformer_fast_paths_read_effective_weights():
    model = Around(Encoder()).eval()
    bio = biofx.transform(model, SPLIT, frontend="symbolic")
    x = torch.randn(5, 3)
    with torch.no_grad():
        for parameter in bio.parameters():
            parameter.mul_(1.5)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_close(bio(x), model(x))


def test_a_model_may_call_itself(frontend):
    model, x = Recursive().eval(), torch.randn(3, 4)
    bio = biofx.transform(model, SLOW, frontend=frontend)
    assert_close(bio(x, times=3), model(x, times=3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_an_island_gives_the_same_gradients(reentrant):
    plain, again = Around(Checkpointed(reentrant)).double(), None
    bio = biofx.transform(plain, SLOW)
    again = biofx.transform(nn.Sequential(plain.before, plain.inner.inner), SLOW)
    for site, other in zip(biofx.weight_sites(bio).values(), biofx.weight_sites(again).values(), strict=True):
        with torch.no_grad():
            other.raw.copy_(site.raw)
            other.gain.copy_(site.gain)
    for a, b in zip(gradients(bio, X).values(), gradients(again, X).values(), strict=True):
        torch.testing.assert_close(a, b)


class Refers(nn.Module):
    """Reaches another module in one of several ways."""

    def __init__(self, other, how):
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), how(other)

    def forward(self, x):
        other = self.other
        while isinstance(other, (list, tuple, dict)):
            other = next(iter(other.values())) if isinstance(other, dict) else other[0]
        return self.fc(other(x)) if len(x) else x


@pytest.mark.parametrize(
    "how",
    [
        lambda m: [m],
        lambda m: {"a": (m,)},
        lambda m: m.forward,
        lambda m: functools.partial(nn.Module.__call__, m),
        lambda m: [functools.partial(torch.nn.functional.linear, weight=m.weight, bias=m.bias)],
    ],
)
def test_an_island_may_refer_to_modules_outside_of_itself(how):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[0].append(Refers(model[0][0], how))
    bio, x = biofx.transform(model, SPLIT), torch.randn(2, 4)
    assert list(bio.biofx.islands) == ["0.1"]
    assert_close(bio(x), model(x))
    assert_close(bio(x), copy.deepcopy(bio)(x))
