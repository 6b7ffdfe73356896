"""Arguments are found with which a model's forward runs, and the search leaves no trace."""

import itertools
import random
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.recording import inputs
from biofx.recording.inputs import Inputs, guess
from models.architectures import ARCHITECTURES
from models.pretrained import PARAMETRIZED, PRETRAINED
from models.small import CONVOLUTIONS, ZOO, layer_and_input
from models.weights import MODELS as WEIGHTS


def runs(model: nn.Module, found: Inputs | None) -> bool:
    assert found is not None
    with torch.no_grad():
        model.eval()(*found.args, **found.kwargs)
    return True


def shapes(found: Inputs | None) -> list[tuple[int, ...]]:
    assert found is not None
    return [tuple(x.shape) for x in (*found.args, *found.kwargs.values()) if isinstance(x, Tensor)]


class Calls(nn.Module):
    """Layers, and a forward that is given as a function of the module and of its inputs."""

    def __init__(self, forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.forward = forward.__get__(self)


# Known models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    build, make = ARCHITECTURES[name]
    model = build()
    found = guess(model)
    assert runs(model, found)
    assert [(x.dim(), x.dtype) for x in found.args] == [
        (x.dim(), x.dtype) for x in make()
    ] or name == "mixture_of_experts"


@pytest.mark.parametrize("name", PRETRAINED | PARAMETRIZED)
def test_models_of_transformers(name):
    pytest.importorskip("transformers")
    build, make = (PRETRAINED | PARAMETRIZED)[name]
    model = build()
    found = guess(model)
    assert runs(model, found)
    assert {"attention_mask", "decoder_input_ids"} >= set(make()).difference(found.kwargs) or found.args


@pytest.mark.parametrize("build", [entry[0] for entry in (*ZOO.values(), *WEIGHTS.values())])
def test_small_networks(build):
    model = build()
    assert runs(model, guess(model))


# What the weights ask for


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), [(2, 3)]),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)]),
    "embedding": (lambda: nn.Embedding(5, 3), [(2, 8)]),
    "bag": (lambda: nn.EmbeddingBag(5, 3), [(2, 8)]),
    "rnn": (lambda: nn.RNN(3, 4), [(8, 2, 3)]),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), [(2, 8, 3)]),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True), [(8, 2, 3)]),
    "rnn cell": (lambda: nn.RNNCell(3, 4), [(2, 3)]),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), [(2, 3)]),
    "gru cell": (lambda: nn.GRUCell(3, 4), [(2, 3)]),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), [(2, 8, 4)] * 3),
    "attention, other widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True),
        [(2, 8, 4), (2, 8, 3), (2, 8, 5)],
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), [(2, 8, 4)]),
    "decoder": (lambda: nn.TransformerDecoderLayer(4, 2, 8), [(8, 2, 4)] * 2),
    "transformer": (lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True), [(2, 8, 4)] * 2),
    "projected sequences": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        [(2, 8, 3)],
    ),
    "norm": (lambda: nn.LayerNorm(5), [(2, 5)]),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), [(2, 3)]),
    "no weights": (nn.ReLU, [(2, 8)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    build, expected = LAYERS[name]
    assert shapes(guess(build())) == expected


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind):
    layer, batch = layer_and_input(kind)
    assert shapes(guess(layer)) == [(2, 4, *[16] * (batch.dim() - 2))]


BARE = {
    "in first": (lambda self, x: x @ self.w, (3, 5), (2, 3)),
    "out first": (lambda self, x: F.linear(x, self.w), (5, 3), (2, 3)),
    "of sequences": (lambda self, x: torch.einsum("bti,io->bto", x, self.w), (3, 5), (2, 8, 3)),
    "kernel": (lambda self, x: F.conv2d(x, self.w), (4, 3, 5, 5), (2, 3, 16, 16)),
    "grouped kernel": (lambda self, x: F.conv1d(x, self.w, groups=2), (4, 3, 5), (2, 6, 16)),
    "experts": (lambda self, x: torch.einsum("...i,eio->...eo", x, self.w), (4, 3, 5), (2, 3)),
}


@pytest.mark.parametrize("name", BARE)
def test_parameters_that_are_used_by_hand(name):
    forward, weight, expected = BARE[name]
    assert shapes(guess(Calls(forward, w=nn.Parameter(torch.randn(weight))))) == [expected]


ORDERS = {
    "registered in another order": (
        lambda self, x: self.a(self.b(x)),
        {"a": nn.Linear(5, 2), "b": nn.Linear(3, 5)},
        [(2, 3)],
    ),
    "two towers": (
        lambda self, x, y: self.a(x) + self.b(y),
        {"a": nn.Linear(5, 2), "b": nn.Linear(3, 2)},
        [(2, 5), (2, 3)],
    ),
    "words and numbers": (
        lambda self, x, y: torch.cat([self.a(x), self.b(y)], 1),
        {"a": nn.EmbeddingBag(7, 2), "b": nn.Linear(3, 2)},
        [(2, 8), (2, 3)],
    ),
    "users and items": (
        lambda self, user, item: self.c(torch.cat([self.a(user), self.b(item)], 1)),
        {"a": nn.Embedding(7, 2), "b": nn.Embedding(5, 2), "c": nn.Linear(4, 1)},
        [(2,), (2,)],
    ),
    "state and action": (
        lambda self, state, action: self.a(torch.cat([state, action], 1)),
        {"a": nn.Linear(7, 2)},
        [(2, 4), (2, 3)],
    ),
    "noise and labels": (
        lambda self, noise, labels: self.b(torch.cat([noise, self.a(labels)], 1)),
        {"a": nn.Embedding(9, 4), "b": nn.Linear(7, 2)},
        [(2, 3), (2,)],
    ),
    "bags of words, one after another": (
        lambda self, words, offsets: self.a(words, offsets),
        {"a": nn.EmbeddingBag(9, 4)},
        [(2,), (2,)],
    ),
    "frames": (
        lambda self, x: self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum((-1, -2)) @ self.b,
        {"a": nn.Conv2d(3, 2, 3), "b": nn.Parameter(torch.randn(2, 4))},
        [(2, 8, 3, 16, 16)],
    ),
    "channels last": (lambda self, x: self.a(x.permute(0, 3, 1, 2)), {"a": nn.Conv2d(3, 2, 3)}, [(2, 16, 16, 3)]),
    "no channels": (lambda self, x: self.a(x.unsqueeze(1)), {"a": nn.Conv2d(1, 2, 3)}, [(2, 16, 16)]),
    "flattened by forward": (lambda self, x: self.a(x.view(-1, 28 * 28)), {"a": nn.Linear(784, 2)}, [(2, 784)]),
    "norm of images": (
        lambda self, x: self.b(self.a(x)),
        {"a": nn.LayerNorm([3, 16, 16]), "b": nn.Conv2d(3, 2, 3)},
        [(2, 3, 16, 16)],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_what_reads_which_argument_is_found_out(name):
    forward, layers, expected = ORDERS[name]
    assert shapes(guess(Calls(forward, **layers))) == expected


# Sizes that a later layer asks for


@pytest.mark.parametrize("side", [6, 16, 23, 28, 50, 64, 100, 150])
def test_the_side_of_images_that_a_flattened_layer_asks_for(side):
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    width = features(torch.zeros(1, 1, side, side)).shape[1]
    found = guess(nn.Sequential(features, nn.Linear(width, 3)))
    assert ((shapes(found)[0][-1] - 2) // 2) ** 2 * 2 == width


@pytest.mark.parametrize("length", [5, 8, 30, 187])
def test_the_length_that_positions_ask_for(length):
    model = Calls(
        lambda self, x: self.head(self.words(x) + self.positions),
        words=nn.Embedding(9, 4),
        head=nn.Linear(4, 3),
        positions=nn.Parameter(torch.randn(1, length, 4)),
    )
    assert shapes(guess(model)) == [(2, length)]


def test_the_length_that_a_flattened_layer_asks_for():
    flat = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4 * 25, 2))
    assert shapes(guess(flat)) == [(2, 25, 3)]


@pytest.mark.parametrize("patches", [4, 36, 196])
def test_the_side_of_images_that_positions_ask_for(patches):
    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1) + self.positions

    token, positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, patches + 1, 8))
    model = Calls(forward, token=token, positions=positions, embed=nn.Conv2d(3, 8, 4, stride=4))
    assert (shapes(guess(model))[0][-1] // 4) ** 2 == patches


def test_the_side_that_an_assertion_names():
    def forward(self, x):
        assert x.shape[-1] == 40, f"this model reads images of side 40, not {x.shape[-1]}"
        return self.conv(x)

    assert shapes(guess(Calls(forward, conv=nn.Conv2d(3, 2, 3)))) == [(2, 3, 40, 40)]


def test_images_that_are_large_enough():
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 2, 3), nn.MaxPool2d(2)) for c in (3, 2, 2, 2)))
    assert shapes(guess(model)) == [(2, 3, 64, 64)]


# What names and annotations tell


def forward_of_transformer(self, x, src_mask, lengths):
    assert src_mask is None or src_mask.dim() == 2
    return self.a(x)[torch.arange(len(x)), lengths - 1]


def annotated(self, x: Tensor, depth: int, scale: float, flag: bool):
    assert (type(depth), type(scale), type(flag)) == (int, float, bool)
    return self.a(x)


def conditional(self, x, t):
    return self.a(x) + self.b(t)


def postponed(self, x: "Tensor", depth: "int"):
    return self.a(x) * range(3)[depth]


def keywords(self, *, x, flag=False):
    return self.a(x)


def optional(self, x=None, n=3):
    return self.a(x)


def mandatory_after_all(self, input_ids=None, pixel_values=None):
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    return self.b(input_ids).mean() + self.c(pixel_values).mean()


def nothing(self):
    return self.a.weight.sum()


NAMED = {
    "masks and lengths": (forward_of_transformer, "x float32 (2, 8, 3), src_mask None, lengths int64 (2,)"),
    "steps of a diffusion": (conditional, "x float32 (2, 3), t int64 (2,)"),
    "numbers": (annotated, "x float32 (2, 3), depth 1, scale 0.5, flag False"),
    "annotations that are text": (postponed, "x float32 (2, 3), depth 1"),
    "keyword-only": (keywords, "x float32 (2, 3)"),
    "optional": (optional, "x float32 (2, 3)"),
    "optional, but asked for": (
        mandatory_after_all,
        "input_ids int64 (2, 8), pixel_values float32 (2, 3, 16, 16)",
    ),
    "no arguments": (nothing, "no arguments"),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_and_annotations(name):
    forward, expected = NAMED[name]
    found = guess(Calls(forward, a=nn.Linear(3, 4), b=nn.Embedding(9, 4), c=nn.Conv2d(3, 2, 3)))
    assert found.description == f"guessed: {expected}"


def test_more_arguments():
    found = guess(Calls(lambda self, *tensors: sum(map(self.a, tensors)), a=nn.Linear(3, 4)))
    assert found.description == "guessed: tensors float32 (2, 3)"
    assert len(found.args) == 1


def test_ids_are_below_the_smallest_vocabulary():
    found = guess(Calls(lambda self, x: self.a(x) + self.b(x), a=nn.Embedding(100, 3), b=nn.Embedding(3, 3)))
    assert found.args[0].max() == 2


# What the model says


def stating(**statements) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    for name, value in statements.items():
        setattr(model, name, value)
    return model


STATED = {
    "lightning": (stating(example_input_array=torch.zeros(4, 3, 9, 9)), (4, 3, 9, 9)),
    "lightning, a dictionary": (stating(example_input_array={"input": torch.zeros(4, 3, 9, 9)}), (4, 3, 9, 9)),
    "transformers": (stating(dummy_inputs={"input": torch.zeros(1, 3, 9, 9)}), (1, 3, 9, 9)),
    "timm": (stating(pretrained_cfg={"input_size": (3, 9, 9)}), (2, 3, 9, 9)),
    "timm, old": (stating(default_cfg=type("Cfg", (), {"input_size": (3, 9, 9)})), (2, 3, 9, 9)),
    "wrong": (stating(dummy_inputs={"ids": torch.zeros(1)}, pretrained_cfg={"input_size": "any"}), (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", STATED)
def test_what_the_model_states_comes_first(name):
    model, expected = STATED[name]
    found = guess(model)
    assert runs(model, found)
    assert shapes(found) == [expected]
    assert found.description.startswith("guessed: " if name == "wrong" else "guessed from its ")


def test_a_statement_may_raise():
    class Raising(nn.Linear):
        @property
        def dummy_inputs(self):
            raise NotImplementedError

    assert guess(Raising(3, 4)).description == "guessed: input float32 (2, 3)"


# What is found is of the model's kind, and the same each time


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    assert guess(nn.Linear(3, 4, dtype=dtype)).args[0].dtype is dtype


def test_device():
    assert guess(nn.Linear(3, 4, device="meta")).args[0].is_meta


def test_another_default_dtype_and_device():
    model = nn.Linear(3, 4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = guess(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.args[0].dtype, found.args[0].device.type) == (torch.float32, "cpu")


def test_a_guess_is_the_same_each_time():
    torch.manual_seed(1)
    first = guess(nn.Linear(3, 4))
    torch.manual_seed(2)
    assert torch.equal(first.args[0], guess(nn.Linear(3, 4)).args[0])


# What is not found


class Refuses(nn.Module):
    """Takes nothing, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.calls = 0

    def forward(self, x, y, z):
        raise KeyError


def test_none_if_nothing_runs():
    assert guess(Refuses()) is None
    assert guess(nn.Module()) is None


def test_the_number_of_attempts_is_bounded():
    count = itertools.count()
    model = Refuses()
    model.register_forward_pre_hook(lambda *_: next(count) and None)
    guess(model)
    assert next(count) == inputs.ATTEMPTS


def test_layers_without_shapes_are_left_alone():
    model = nn.LazyLinear(4)
    assert guess(model) is None
    assert nn.parameter.is_lazy(model.weight)


def test_scripted_modules_are_not_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(3, 4))
    assert guess(nn.Sequential(nn.BatchNorm1d(3), scripted)) is None


def test_candidates_are_lazy_and_differ():
    found = [tried for tried, _ in itertools.islice(inputs._attempts(Refuses()), 40)]
    assert len({tried.description for tried in found}) == 40
    assert shapes(found[0]) == [(2, 3)] * 3


# The search leaves no trace


class Stateful(nn.Module):
    """Counts, averages, draws, overwrites its weight, remembers, warns, and changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.seen.append(x)
        with torch.no_grad():
            self.fc.weight.mul_(2)
        warnings.warn("a run", stacklevel=1)
        x.add_(torch.rand(()) + random.random())
        return self.norm(self.fc(x[:, :5]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_what_it_was(training):
    model = Stateful().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guess(model) is not None
    assert model.training is training
    assert model.norm.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (set(vars(model)), model.seen) == (attributes, [])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("build", [Stateful, Refuses])
def test_the_random_number_generators_stand_where_they_stood(build):
    model = build()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    guess(model)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()


def test_failures_are_silent(capfd):
    assert guess(torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Unflatten(1, (7, 3))))) is None
    assert capfd.readouterr() == ("", "")


def test_what_is_found_is_not_what_forward_changed():
    first, second = guess(Stateful()), guess(nn.Linear(3, 4))
    assert torch.equal(first.args[0], second.args[0])
