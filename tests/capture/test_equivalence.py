"""Graphs are checked against the Python that they were traced from. What differs stays Python."""

import copy
import itertools
import random
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import biofx

SPLIT = "split-synapses"
GENERATOR = torch.Generator()
CACHE: dict[int, Tensor] = {}


class Inner(nn.Module):
    """A layer, and something that a graph does not do, in a module of its own."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.function, self.calls = nn.Linear(4, 4), function, []
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        return self.function(self, self.fc(x))


def around(function):
    return nn.Sequential(nn.Linear(4, 4), Inner(function), nn.ReLU(), nn.Linear(4, 3))


def state_in_place(m, y):
    h = torch.zeros(3, 4)
    for _ in range(2):
        h += 0.5 * (y - h)
    return h


def preallocated(m, y):
    out = torch.empty(3, 4)
    for i in range(3):
        out[i] = y[i]
    return out


def index_added(m, y):
    return torch.zeros(3, 4).index_add_(0, torch.tensor([2, 0, 1]), y)


def written_by_out(m, y):
    out = torch.full((3, 4), 2.0)
    return torch.add(out, y.detach(), out=out) + y


def counted(m, y):
    steps = torch.arange(4.0)
    steps += 1
    return y * steps


def cached(m, y):
    if 4 not in CACHE:
        CACHE[4] = torch.arange(4.0)
    return y + CACHE[4]


def asks_for_type(m, y):
    return y * 2 if isinstance(y, Tensor) else y


def asks_torch(m, y):
    return y * 2 if torch.is_tensor(y) else y


def matches(m, y):
    match y:
        case Tensor():
            return y * 3
        case _:
            return y


def asks_for_attribute(m, y):
    return y * 2 if hasattr(y, "no_such_thing") else y


def asks_for_gradients(m, y):
    return y * 2 if torch.is_grad_enabled() and y.requires_grad else y


def asks_for_dtype(m, y):
    return y * 2 if y.dtype is torch.float32 else y


def checkpointed(m, y):
    for _ in range(3):
        y = checkpoint(lambda z: torch.tanh(torch.cat([z] * 64, 1))[:, :4], y, use_reentrant=False)
    return y


DETERMINISTIC = {
    function.__name__: function
    for function in (
        state_in_place,
        preallocated,
        index_added,
        written_by_out,
        counted,
        cached,
        asks_for_type,
        asks_torch,
        matches,
        asks_for_attribute,
        asks_for_gradients,
        asks_for_dtype,
        checkpointed,
    )
}


@pytest.mark.parametrize("inputs", [None, (torch.randn(3, 4),)], ids=["guessed", "given"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_call_computes_what_the_model_computes(name, inputs):
    model = around(DETERMINISTIC[name])
    bio = biofx.transform(model, SPLIT, example_inputs=inputs)
    for training in (True, False):
        for one in (model, bio, copy.deepcopy(bio), biofx.fold(bio)):
            one.train(training)
            for x in torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)):
                torch.testing.assert_close(one(x), model(x))
                one(x).sum().backward()


NUMPYS = np.random.RandomState(0)
OWN = random.Random(0)
RANDOM = {
    "numpy": lambda m, y: y * float(np.random.rand()),
    "numpy, a mask": lambda m, y: y * torch.from_numpy((np.random.rand(4) < 0.5).astype("f")),
    "random": lambda m, y: y * random.random(),
    "random, a branch": lambda m, y: y if random.random() < 0.5 else -y,
    "a generator": lambda m, y: y + torch.randn(4, generator=GENERATOR),
    "a generator of numpy": lambda m, y: y * float(NUMPYS.rand()),
    "a generator of Python": lambda m, y: y * OWN.random(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_in_every_call(name):
    bio, x = biofx.transform(around(RANDOM[name]), SPLIT), torch.randn(3, 4)
    results = [bio(x) for _ in range(20)]
    assert not all(torch.equal(result, results[0]) for result in results)


def none_of_input(m, x, mask):
    return m.fc(x * 2 if mask is None else x)


def none_inside(m, x, mask):
    return m.fc(x * 2 if mask["w"] is None else x)


def none_in_object(m, x, mask):
    return m.fc(x if mask.w is not None else x * 2)


def key_test(m, x, mask):
    return m.fc(x * 2 if "v" in mask else x)


ARGUMENTS = {
    "None": (none_of_input, None, torch.ones(3)),
    "None in a dictionary": (none_inside, {"w": None}, {"w": torch.ones(3)}),
    "None in an object": (none_in_object, SimpleNamespace(w=None), SimpleNamespace(w=torch.ones(3))),
    "a key": (key_test, {"v": torch.ones(3)}, {"w": torch.ones(3)}),
}


@pytest.mark.parametrize("has_examples", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_another_kind_take_the_models_way(name, has_examples):
    function, one, other = ARGUMENTS[name]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask):
            return function(self, x, mask)

    model, x = Masked(), torch.randn(2, 4)
    for first, second in ((one, other), (other, one)):
        bio = biofx.transform(model, SPLIT, example_inputs=(x, first) if has_examples else None)
        for mask in (first, second):
            torch.testing.assert_close(bio(x, mask), model(x, mask))


def test_the_smallest_module_that_differs_keeps_its_python():
    bio = biofx.transform(around(state_in_place), SPLIT, example_inputs=torch.randn(3, 4))
    islands: Mapping[str, str] = bio.biofx.islands
    assert list(islands) == ["1"]
    assert "its graph computes something else in evaluation mode" in islands["1"]
    assert len(biofx.weight_sites(bio)) == 3


def test_what_differs_behind_silent_units_is_found():
    """A count that no snapshot restores is another one in each call, and nothing of it reaches the output."""
    count = itertools.count(1)
    layers = around(lambda m, y: y * next(count))
    model = nn.Sequential(*layers[:2], nn.Linear(4, 4), *layers[2:])
    nn.init.constant_(model[2].bias, -1e6)
    x = torch.randn(3, 4)
    bio = biofx.transform(model, SPLIT, example_inputs=(x,))
    assert not model[:4](x).any()
    assert list(bio.biofx.islands) == ["1"]


def test_a_forward_that_asks_for_gradients_is_found_by_tracing():
    """On the example inputs, its own units are silent, so that no run tells."""
    model = around(lambda m, y: F.relu(y) * (2 if torch.is_grad_enabled() else 3)).double()
    nn.init.constant_(model[1].fc.bias, -100.0)
    x = torch.randn(3, 4, dtype=torch.float64)
    bio = biofx.transform(model, SPLIT, example_inputs=(x,))
    assert bio.biofx.islands == {"1": "its forward does something else without gradients"}
    with torch.no_grad():
        assert model[:2](1000 * x).any()
        torch.testing.assert_close(bio(1000 * x), model(1000 * x))


def test_the_original_works_as_before():
    CACHE.clear()
    model, x = around(cached), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    biofx.transform(model, SPLIT)
    assert type(model(x)) is Tensor
    assert all(type(value) is Tensor for value in CACHE.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_many_layers_with_a_training_path_are_found_at_once():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.tensor(0))

        def forward(self, x):
            if self.training:
                self.n.add_(1)
            return x

    model = nn.Sequential(*[layer for _ in range(30) for layer in (nn.Linear(4, 4), Counts())])
    traces = []
    original = biofx.capture.symbolic.trace_modes
    try:
        biofx.capture.symbolic.trace_modes = lambda *args: traces.append(1) or original(*args)
        bio = biofx.transform(model, SPLIT)
    finally:
        biofx.capture.symbolic.trace_modes = original
    assert len(traces) <= 3
    x = torch.randn(2, 4)
    bio(x)
    torch.testing.assert_close(bio.eval()(x), model.eval()(x))
    assert int(bio.get_buffer("1.n")) == 1


def test_dropout_and_batch_norm_stay_in_the_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    bio = biofx.transform(model, SPLIT, example_inputs=torch.randn(3, 4))
    assert not bio.biofx.islands
    x = torch.randn(5, 4)
    results = []
    for one in (model, bio):
        torch.manual_seed(0)
        results.append(F.relu(one(x)))
    torch.testing.assert_close(*results)


OUTSIDE, KEPT = torch.zeros(4), [torch.zeros(4)]
WRITES = {
    "a variable": lambda m, y: OUTSIDE.copy_(y),
    "a variable by out": lambda m, y: torch.add(y, 1, out=OUTSIDE),
    "in a list": lambda m, y: KEPT[0].copy_(y),
    "in a list of the model": lambda m, y: m.kept[0].copy_(y),
    "several": lambda m, y: torch._foreach_copy_([OUTSIDE, m.kept[0]], [y, y]),
}


@pytest.mark.parametrize("pipeline", ["split-synapses", "synaptic-scaling"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_forward_writes_into_tensors_is_not_lost(write, pipeline):
    """The graph wrote into a copy, which it made of the tensor as of a constant."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.kept = nn.Linear(4, 4), [torch.zeros(4)]

        def forward(self, x):
            y = self.layer(x)
            write(self, y[0].detach())
            return y

    x = torch.randn(3, 4)
    model = Writes()
    bio = biofx.transform(model, pipeline, example_inputs=(x,))
    written = []
    for one in (model, bio):
        OUTSIDE.zero_(), KEPT[0].zero_()
        one(2 * x)
        written.append((OUTSIDE.clone(), KEPT[0].clone(), one.kept[0]))
    torch.testing.assert_close(written[1], written[0])
    assert any(tensor.any() for tensor in written[0])


STAYS = torch.ones(4)


class Keeps(nn.Module):
    """Returns tensors that it keeps: an attribute, one in a list, one outside of it, and a view."""

    def __init__(self):
        super().__init__()
        self.fc, self.state, self.states = nn.Linear(4, 4), torch.ones(4), [torch.ones(4)]

    def forward(self, x):
        return self.fc(x) * self.state, self.state, self.states[0][:2], STAYS.view(2, 2)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_what_a_caller_writes_into_a_returned_tensor_stays(frontend):
    x, found = torch.randn(3, 4), []
    for model in (plain := Keeps(), biofx.transform(plain, "split-synapses", example_inputs=x, frontend=frontend)):
        for _ in range(2):
            for tensor in model(x)[1:]:
                tensor += 1
        found.append(model(x))
        STAYS.fill_(1)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
