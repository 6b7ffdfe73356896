"""Structure: arguments and results are containers of any kind; of another kind they run the Python, or are refused."""

import pytest
import torch
from torch import nn

import biofx
from exported_models import call, export, export_for_graph, forms, reloaded, same, x
from models import any_python


def test_containers_of_any_kind_are_arguments_and_results():
    model = any_python.Containers()
    inputs = {"batch": {"x": x(), "more": [x(), x()]}, "scale": 2.0, "extra": x()}
    bio = export(model, inputs)
    for other in forms(bio):
        result, expected = call(other, inputs), call(model, inputs)
        assert list(result) == ["sum", "parts", "extra_right"]
        assert result["parts"][1] is None
        assert same(result, expected)
    reordered = {**inputs, "batch": {"more": [x(), x()], "x": x()}}
    assert same(call(bio, reordered), call(model, reordered))


def test_arguments_by_position_and_more_of_them():
    model, inputs = any_python.Containers(), ({"x": x(), "more": []}, x(), x())
    bio = export_for_graph(model, inputs)
    for other in forms(bio):
        assert same(call(other, inputs), call(model, inputs))
    with pytest.raises(
        biofx.ArgumentError, match=r"others is a tuple of \[0\], and forward was captured for a tuple of \[0\], \[1\]"
    ):
        call(bio, inputs[:2])


def test_defaults_stay():
    class Scaled(nn.Linear):
        def forward(self, x, scale=2.0, bias=None):
            y = super().forward(x) * scale
            return y if bias is None else y + bias

    model = Scaled(4, 4)
    bio = export_for_graph(model, x())
    value = x()
    assert same(bio(value), model(value))
    assert same(bio(value, 2.0, bias=None), model(value))
    with pytest.raises(
        biofx.ArgumentError, match="bias is an instance of Tensor, and forward was captured for None.*contain this"
    ):
        bio(value, bias=x())


@pytest.mark.parametrize(
    "change", [{"scale": 3.0}, {"batch": {"x": torch.zeros(2, 4), "more": []}}, {"extra": torch.zeros(4)}]
)
def test_on_arguments_of_another_kind_the_python_runs(change):
    inputs = {"batch": {"x": x(), "more": [x()]}, "scale": 2.0, "extra": x()}
    model = any_python.Containers()
    bio = export(model, inputs)
    for other in forms(bio):
        assert same(call(other, {**inputs, **change}), call(model, {**inputs, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 3.0}, "scale is 3.0, and forward was captured for 2.0"),
        ({"batch": {"x": torch.zeros(2, 4), "more": []}}, "batch['more'] is an empty list, and forward was captured"),
        ({"batch": {"x": torch.zeros(2, 4)}}, "batch is a dict of ['x'], and forward was captured for a dict of"),
        ({"new": torch.zeros(2, 4)}, "named is a dict of ['extra'], ['new'], and forward was captured for a dict of"),
        ({"extra": torch.zeros(2, 5)}, "forward was captured for named['extra'].shape[1] == 4"),
        ({"extra": torch.zeros(4)}, "forward was captured for 2 axes of named['extra'], which has 1"),
    ],
)
def test_other_kinds_of_arguments_are_refused_by_a_needed_graph(change, message):
    inputs = {"batch": {"x": x(), "more": [x()]}, "scale": 2.0, "extra": x()}
    bio = export_for_graph(any_python.Containers(), inputs)
    for other in (bio, reloaded(bio)):
        with pytest.raises(biofx.ArgumentError) as error:
            call(other, {**inputs, **change})
        assert message in str(error.value)
