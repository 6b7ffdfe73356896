"""Questions whether something is None that a module returns which is called as it is."""

import sys

import pytest
import torch
from torch import nn

import biofx
from biofx.capture.none_tests import compared_with_none, none_tests


def asks(a, b, c):
    if a is None or b.part[0] is not None:
        return c == 1
    return b if c is None else a


def test_the_variables_that_are_asked_about_by_line():
    first = asks.__code__.co_firstlineno
    assert compared_with_none(asks.__code__) == {first + 1: ("a", "b"), first + 3: ("c",)}
    assert compared_with_none(compile("x is None", "<no file>", "eval")) == {}


def test_each_value_is_shown_before_the_question():
    seen, before = [], sys.gettrace()
    with none_tests(seen.append, frozenset({"contextlib"})):
        asks(1, type("B", (), {"part": [None]}), 3)
    assert (seen[0], seen[2]) == (1, 3)
    assert sys.gettrace() is before


def test_other_packages_are_not_looked_at():
    seen = []
    with none_tests(seen.append, frozenset({__name__, "contextlib"})):
        asks(None, None, None)
    assert seen == []


class Maybe(nn.Module):
    """Returns a second value, or none."""

    def __init__(self, threshold):
        super().__init__()
        self.fc, self.threshold, self.extra = nn.Linear(3, 3), threshold, None

    def forward(self, x):
        y = self.fc(x)
        self.extra = y.square() if y.sum() < self.threshold else None
        return y, self.extra


def in_a_branch(inner, x):
    y, extra = inner(x)
    if extra is None:
        return y
    return y * 2


def in_an_expression(inner, x):
    y, extra = inner(x)
    return y if extra is None else y + 1


def of_a_part(inner, x):
    result = inner(x)
    return result[0] * (3 if result[1] is not None else 2)


def of_what_it_keeps(inner, x):
    y, _ = inner(x)
    extra = inner.extra
    return y if extra is None else y - 1


class Asks(nn.Module):
    def __init__(self, function, threshold):
        super().__init__()
        self.inner, self.head, self.function = Maybe(threshold), nn.Linear(3, 2), function

    def forward(self, x):
        return self.head(self.function(self.inner, x))


@pytest.mark.parametrize("threshold", [-1e9, 1e9], ids=["none", "some"])
@pytest.mark.parametrize("function", [in_a_branch, in_an_expression, of_a_part, of_what_it_keeps])
def test_a_forward_that_asks_needs_python(function, threshold):
    model, x = Asks(function, threshold), torch.randn(2, 3)
    bio = biofx.transform(model, "split-synapses")
    torch.testing.assert_close(bio(x), model(x))
    assert "asks whether something is None" in " ".join(biofx.summary(bio).split())


def test_other_questions_stay_in_the_graph():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Maybe(1e9), nn.Linear(3, 2)

        def forward(self, x, scale=None):
            y, _ = self.inner(x)
            if scale is None:
                scale = 2.0
            return self.head(y * scale)

    model, x = Optional(), torch.randn(2, 3)
    bio = biofx.transform(model, "split-synapses")
    torch.testing.assert_close(bio(x), model(x))
    assert [biofx.islands.island_path(node) for node in biofx.islands.island_nodes(bio.graph)] == ["inner"]
