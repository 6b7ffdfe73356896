"""Isolation: a model runs without side effects."""

import collections
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn

import biofx
from biofx.base.isolation import (
    Snapshot,
    gradients,
    parameters_kept,
    run_in_mode,
    sketch,
    split_inputs,
    unchanged,
    undisturbed,
    uses_copies,
)


class Unclean(nn.Module):
    """Changes everything that it can lay hands on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inplace", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("filled", None)
        self.inner = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()
        self.inner.register_buffer("tied", self.inplace)

    def forward(self, x, more):
        x.add_(more["shift"])
        self.inplace.add_(1)
        self.replaced = self.replaced + 1
        self.filled = x
        self.register_buffer("new", x)
        self.inner.train()
        assert self.inner.tied is self.inplace
        return {"logits": self.inner(x), "draw": torch.rand(2), "training": self.training, "count": self.inplace}


def test_running_a_model_has_no_side_effects():
    model = Unclean()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    modes = [module.training for module in model.modules()]
    x, shift, rng = torch.zeros(3, 2), torch.ones(()), torch.get_rng_state()
    logits, _, count = run_in_mode(model, (x, {"shift": shift}))
    assert logits.shape == (3, 2)
    assert count.tolist() == [1, 1]
    after = dict(model.named_buffers(remove_duplicate=False))
    assert {name: id(b) for name, b in after.items()} == {name: id(b) for name, b in buffers.items()}
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert (model.filled, hasattr(model, "new")) == (None, False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(x, torch.zeros(3, 2))
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_model_that_fails_is_left_as_it_was():
    model = Unclean()
    with pytest.raises(KeyError):
        run_in_mode(model, (torch.zeros(3, 2), {}))
    assert model.training
    assert not model.inplace.any()


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("none", None)
        self.layer = nn.BatchNorm1d(2)

    def forward(self, x):
        self.replaced = self.replaced + 1
        return self.layer(x) + self.replaced


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_forward_that_runs_backward_leaves_no_gradient(frontend):
    class Learns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            y = self.fc(x)
            if y.requires_grad:
                y.sum().backward()
            return y.detach()

    model = Learns()
    bio = biofx.transform(model, "split-synapses", frontend=frontend)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *bio.parameters()))
    model(torch.ones(1, 3))
    gradient = model.fc.bias.grad
    bio = biofx.transform(model, "split-synapses", frontend=frontend, inplace=True)
    assert bio.fc.bias.grad is gradient
    assert gradient.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential], ids=["itself", "inside"])
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3, 2), check_trace=False)]
)
def test_running_a_scripted_model_has_no_side_effects(compiled, around):
    model = around(compiled(Scripted()))
    buffers = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    assert run_in_mode(model, torch.zeros(3, 2))[0].shape == (3, 2)
    after = dict(model.named_buffers())
    assert all(after[name] is buffer for name, buffer in buffers.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert all(module.training for module in model.modules())


WRITES = {
    "in place": lambda p: p.add_(1),
    "data": lambda p: p.data.add_(1),
    "memory": lambda p: setattr(p, "data", p.data + 1),
    "alias": lambda p: setattr(p, "data", p.data.clone()),
    "shape": lambda p: setattr(p, "data", torch.ones(3)),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_forward_writes_into_parameters_is_undone(write):
    model = nn.Linear(2, 2)
    weight, value, memory = model.weight, model.weight.detach().clone(), model.weight.detach()
    with parameters_kept(model), torch.no_grad():
        write(model.weight)
    assert model.weight is weight
    assert torch.equal(weight, value)
    assert weight.is_set_to(memory)


def test_parameters_only_read_stay_good_for_backward():
    model, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    loss = model(x).sum()
    with parameters_kept(model):
        model(x)
    loss.backward()  # which raises if a saved tensor was written to
    assert x.grad is not None


def test_an_operator_without_a_gradient_has_none_to_compare():
    weight = nn.Parameter(torch.ones(2))
    assert gradients([weight.argsort()], {"weight": weight}) == {}


@pytest.mark.parametrize("size", [3, 64, 1000])
@pytest.mark.parametrize("index", [0, -1])
def test_a_sketch_shows_every_entry_that_differs(size, index):
    one = torch.randn(size)
    other = one.clone()
    other[index] += 0.5
    gap = (sketch(one) - sketch(other)).abs()
    assert len(gap) < 64 + size / 64 + 1
    assert float(gap.max()) > 0.5 - 1e-5
    assert int((gap > 1e-5).sum()) == 1


@pytest.mark.parametrize("pattern", ["ones", "alternating", "ends", "blocks"])
def test_a_sketch_shows_differences_that_follow_a_pattern(pattern):
    places = torch.arange(64)
    column = {
        "ones": torch.ones(64),
        "alternating": places % 2 * 2 - 1,
        "ends": (places == 0).int() - (places == 63).int(),
        "blocks": places // 8 % 2 * 2 - 1,
    }[pattern].double()
    assert (sketch(column[:, None].expand(64, 5).flatten()).abs() > 1e-2).all()


def test_gradients_do_not_pile_up():
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    x = torch.ones(1, 4)
    for layer in layers:
        x = layer(x)
    seen = []
    for layer in layers:
        layer.weight.register_hook(lambda gradient: seen.append(gradient.detach().clone()))
    found = gradients([x], dict(layers.named_parameters()))
    assert [layer.weight.grad for layer in layers] == [None] * 3
    for gradient, name in zip(seen, ["2.weight", "1.weight", "0.weight"], strict=True):
        assert torch.equal(found[name], sketch(gradient))


class Collecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.count, self.layer = [], 0, nn.Linear(2, 2)

    def forward(self, x):
        self.seen.append(x)
        self.count += 1
        self.cache = x
        self.layer = nn.Identity()
        return random.random() + numpy.random.random()


def test_what_forward_stores_and_draws_is_undone():
    model, x = Collecting(), torch.ones(2)
    numpy.random.seed(0)
    expected = numpy.random.random()
    numpy.random.seed(0)
    seen, layer, draws = model.seen, model.layer, random.getstate()
    with unchanged(model):
        model(x)
        assert model.count == 1
    assert numpy.random.random() == expected
    assert (model.seen, model.count, hasattr(model, "cache"), model.layer) == ([], 0, False, layer)
    assert model.seen is seen
    assert random.getstate() == draws


class Stateful(nn.Module):
    """Changes tensors that are not buffers, and its own generator."""

    def __init__(self):
        super().__init__()
        self.trace, self.traces, self.generator = torch.zeros(2), [{"a": torch.zeros(2)}], torch.Generator()

    def forward(self, x):
        self.trace += x
        self.traces[0]["a"].mul_(0.5).add_(x)
        return torch.rand(2, generator=self.generator)


def test_tensors_that_are_no_buffers_and_generators_are_restored():
    model = Stateful()
    model(torch.ones(2))
    trace, inner, state = model.trace, model.traces[0]["a"], model.generator.get_state()
    with unchanged(model):
        first = model(torch.ones(2))
    assert model.trace is trace
    assert model.traces[0]["a"] is inner
    assert trace.tolist() == inner.tolist() == [1.0, 1.0]
    assert torch.equal(model.generator.get_state(), state)
    assert torch.equal(model(torch.ones(2)), first)


class State(NamedTuple):
    h: torch.Tensor
    generator: torch.Generator


@dataclass(slots=True)
class Slotted:
    parts: list


class Log(list):
    """A list that copies itself otherwise."""

    def copy(self):
        return self


class Cache(dict):
    """A dictionary that has attributes."""


HOLD = {
    "list": list,
    "tuple": tuple,
    "frozen set": frozenset,
    "named tuple": lambda parts: State(*parts),
    "slots": Slotted,
    "list in a tuple": lambda parts: ([[*parts]],),
    "subclass of list": Log,
    "subclass of dict": lambda parts: Cache(enumerate(parts)),
    "UserList": collections.UserList,
    "UserDict": lambda parts: collections.UserDict(enumerate(parts)),
}


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_what_any_container_holds_is_restored(hold):
    model, trace, generator = nn.Module(), torch.zeros(2), torch.Generator()
    model.state, before = hold([trace, generator]), generator.get_state()
    with unchanged(model):
        trace += torch.rand(2, generator=generator)
    assert not trace.any()
    assert torch.equal(generator.get_state(), before)


class Counter:
    def __init__(self):
        self.number, self.log = 0, []


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.layer, self.number, self.name, self.none = nn.Linear(2, 2), 1, "a", None
        self.seen, self.by_name, self.nested, self.kinds = [1], {"a": 1}, {"a": [{"b": 1}]}, {1}
        self.counter, self.pair, self.queue = Counter(), (1, torch.ones(1)), collections.deque([1], 2)
        self.log, self.cache, self.cache_too = Log([1]), Cache(a=1), Cache(a=1)


CHANGES = {
    "number": lambda m: setattr(m, "number", 2),
    "name": lambda m: setattr(m, "name", "b"),
    "none": lambda m: setattr(m, "none", 0),
    "new": lambda m: setattr(m, "new", 0),
    "pair": lambda m: setattr(m, "pair", (1, torch.ones(1))),
    "seen": lambda m: m.seen.append(1),
    "by_name": lambda m: m.by_name.update(a=2),
    "nested": lambda m: m.nested["a"][0].clear(),
    "kinds": lambda m: m.kinds.add(2),
    "queue": lambda m: m.queue.append(2),
    "log": lambda m: m.log.append(1),
    "cache": lambda m: m.cache.update(a=2),
    "cache_too": lambda m: setattr(m.cache_too, "size", 2),
    "counter": lambda m: setattr(m.counter, "number", 1),
    "mean": lambda m: setattr(m, "mean", m.mean + 1),
    "layer": lambda m: setattr(m, "layer", nn.Linear(2, 2)),
    "training": lambda m: setattr(m, "training", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_undone(name):
    model = nn.Sequential(Holding())
    before = Snapshot(model)
    assert list(before.changes()) == []
    CHANGES[name](model[0])
    assert [change[:2] for change in before.changes() if change.path] == [("0", name)]
    before.restore()
    assert list(before.changes()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "number", 1),
        lambda m: setattr(m, "pair", m.pair[:1] + m.pair[1:]),
        lambda m: setattr(m, "seen", m.seen),
        lambda m: m.mean.add_(1),  # what tensors hold is state that a graph changes as well
        lambda m: m.layer(torch.ones(2)),
    ],
    ids=["number", "tuple", "itself", "in place", "call"],
)
def test_what_reads_the_same_afterwards_is_no_change(change):
    model = Holding()
    before = Snapshot(model)
    change(model)
    assert list(before.changes()) == []


@pytest.mark.parametrize(
    ("example_inputs", "expected"),
    [
        (None, ((), {})),
        (3, ((3,), {})),
        ((1, 2), ((1, 2), {})),
        ([1, 2], ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        (collections.UserDict(x=1), ((), {"x": 1})),
        (({"x": 1},), (({"x": 1},), {})),
    ],
    ids=str,
)
def test_example_inputs_are_the_arguments_of_a_call(example_inputs, expected):
    assert split_inputs(example_inputs) == expected


class Graph:
    """Inputs in one object, as graph networks take them."""

    def __init__(self, x):
        self.x, self.size, self.steps = x, x.clone(), [0]


class Widening(nn.Module):
    """Writes into the object that it is given and returns it; a second run on the same object would fail."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, graph):
        graph.size.requires_grad_().data.mul_(2)
        graph.x = self.head(torch.tanh(self.inner(graph.x)))
        graph.steps[0] += 1
        graph.new = True
        return graph


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_objects_among_arguments_stay_as_they_are(frontend):
    x = torch.randn(4, 3)
    graph, model = Graph(x), Widening()
    bio = biofx.transform(model, "split-synapses", example_inputs=(graph,), frontend=frontend)
    assert (graph.x is x, torch.equal(graph.size, x), graph.size.requires_grad) == (True, True, False)
    assert (graph.steps, hasattr(graph, "new")) == ([0], False)
    other = torch.randn(4, 3)
    torch.testing.assert_close(bio(Graph(other)).x, model(Graph(other)).x)


def test_results_in_objects_are_results():
    model = Widening()
    expected = model(Graph(torch.ones(4, 3))).x
    assert any(torch.equal(x, expected) for x in run_in_mode(model, (Graph(torch.ones(4, 3)),)))


def test_copies_of_buffers_end_with_the_block():
    model = nn.BatchNorm1d(2)
    before = model.running_mean

    def fail():
        with undisturbed(model):
            assert uses_copies()
            assert model.running_mean is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not uses_copies()
    assert model.running_mean is before
