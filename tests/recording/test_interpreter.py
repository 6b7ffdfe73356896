"""The interpreter: what is known of a tensor goes through operators, views and writes."""

import torch
from torch import nn

from biofx.recording.interpreter import Interpreter
from biofx.recording.recorder import Recorder, recording_of


class Names(Interpreter[frozenset]):
    """The inputs that a tensor was made of."""

    def source(self, value):
        return frozenset([value.name] if value.kind == "input" else ())

    def after(self, operation):
        return frozenset().union(*map(self.of, operation.operands))

    def joined(self, before, written):
        return before | written


def names(forward, *args):
    class Model(nn.Module):
        def forward(self, a, b):
            return forward(a, b)

    model, recorder, domain = Model(), Recorder(), Names()
    with recording_of(recorder, model):
        model(*args)
    domain.interpret(recorder.recording)
    return [domain.of(value) for value in recorder.recording.outputs]


A, B = torch.ones(2, 3), torch.ones(2, 3)


def test_what_is_known_goes_through_operators():
    assert names(lambda a, b: (a + 1, a * b, torch.zeros(2)), A, B) == [{"a"}, {"a", "b"}, set()]


def test_what_is_written_takes_the_place_of_what_was_there():
    assert names(lambda a, b: a.clone().copy_(b), A, B) == [{"a", "b"}]  # the operator reads what it writes into
    assert names(lambda a, b: (a.clone().zero_() + b,), A, B) == [{"a", "b"}]


def test_what_is_written_into_a_part_joins_what_is_in_the_rest():
    def forward(a, b):
        memory = torch.zeros(4, 3)
        before = memory + 1
        memory[:2] = a
        memory[2:].add_(b)
        return before, memory + 0

    assert names(forward, A, B) == [set(), {"a", "b"}]
