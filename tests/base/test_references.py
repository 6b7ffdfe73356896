"""References: what a module reaches that is not its child."""

import functools
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import biofx
from biofx.base import contents, references
from biofx.base.references import held_parameters, listed_by_classes
from conftest import flat


class Average:
    """What an object keeps in its dictionary."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def restore(self):
        return self.parameters


class Slotted:
    __slots__ = ("kept", "unset")

    def __init__(self, kept):
        self.kept = kept


class Labelled(list):
    """What a container keeps besides its items."""

    def __init__(self, items, label):
        super().__init__(items)
        self.label = label


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_nothing_is_held():
    assert held_parameters(Block()) == {}


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: [layer.weight],
        lambda layer: {"a": (layer.weight,)},
        lambda layer: functools.partial(torch.add, layer.weight),
        lambda layer: closed(layer.weight),
        lambda layer: deque([layer.weight]),
        lambda layer: {layer.weight: 0.1},
        lambda layer: Average([layer.weight]),
        lambda layer: Slotted(Average([layer.weight])),
        lambda layer: Labelled([1], layer.weight),
        lambda layer: SimpleNamespace(a=[Average([layer.weight])]),
        lambda layer: Average([layer.weight]).restore,
        lambda layer: torch.optim.SGD([layer.weight]),
        lambda layer: torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([layer.weight]), float),
    ],
    ids=[
        *("list", "nested", "partial", "closure", "deque", "key", "object", "slot", "subclass", "namespace", "method"),
        *("optimizer", "scheduler"),
    ],
)
def test_parameters_that_are_held(hold):
    block = Block()
    block.held = hold(block.layer)
    assert held_parameters(block).keys() == {id(block.layer.weight)}


def closed(weight):
    return lambda: weight.sum()


def test_a_list_that_holds_itself():
    block = Block()
    block.held = [block.layer.weight]
    block.held.append(block.held)
    assert held_parameters(block).keys() == {id(block.layer.weight)}


def test_what_recurrent_layers_hold_is_looked_up_by_name():
    assert held_parameters(nn.LSTM(2, 2)) == {}


def test_a_long_chain_of_objects_is_followed_to_its_end():
    block = Block()
    chain = Slotted(block.layer.weight)
    for _ in range(2000):
        chain = Slotted(chain)
    block.held = chain
    assert held_parameters(block).keys() == {id(block.layer.weight)}


def test_what_modules_share_is_searched_once(monkeypatch):
    asked = []
    monkeypatch.setattr(references, "is_of_user", lambda value: asked.append(value) or contents.is_of_user(value))
    blocks, shared = nn.Sequential(*(Block() for _ in range(3))), Average([object()])
    for block in blocks:
        block.shared = shared
    held_parameters(blocks)
    assert asked.count(shared) == 1


def test_modules_inside_of_an_object_are_not_searched():
    block = Block()
    block.teacher = Average([Block()])
    assert held_parameters(block) == {}


def test_it_is_said_whether_an_optimizer_holds_a_parameter():
    block = nn.Sequential(Block(), Block())
    block[0].learner = Average([torch.optim.SGD(block[0].parameters(), lr=0.1)])
    block[1].average = Average(block[1].parameters())
    held = held_parameters(block)
    assert held[id(block[0].layer.weight)].startswith("the optimizer in the attribute 0.learner holds it")
    assert held[id(block[1].layer.weight)].startswith("the attribute 1.average holds it as well")


class Irrep(tuple):
    """A tuple that hides its length, as those of e3nn do."""

    def __len__(self):
        raise NotImplementedError


def test_what_containers_hold_is_read_without_their_methods():
    block = nn.Linear(2, 2)
    block.irreps = Irrep((Irrep((1, 0)), (lambda: block,)))
    assert references.enclosed(block) == ("irreps", "Linear")
    block.irreps = Irrep((Irrep((1, 0)), 2))
    assert references.enclosed(block) is None
    references.repoint(block, {})
    assert type(block.irreps) is Irrep


@pytest.mark.parametrize("kind", [list, weakref.WeakSet, weakref.WeakValueDictionary])
def test_a_class_that_lists_its_instances_is_found(kind):
    """… as neurons of snntorch do, so that one call resets the states of all."""

    class Neuron(nn.ReLU):
        instances = kind()

    model = nn.Sequential(nn.Linear(2, 2), Neuron())
    assert listed_by_classes(model) is None
    if kind is list:
        Neuron.instances.append(model[1])
    elif kind is weakref.WeakSet:
        Neuron.instances.add(model[1])
    else:
        Neuron.instances["first"] = model[1]
    assert listed_by_classes(model).endswith("Neuron.instances")
    text = "Neuron.instances lists modules of the original, not their copies in this model"
    assert text in flat(biofx.summary(biofx.transform(model, "split-synapses", frontend="module")))
    assert text not in flat(biofx.summary(biofx.transform(model, "split-synapses", frontend="module", inplace=True)))
