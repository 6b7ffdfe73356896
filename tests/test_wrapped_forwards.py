"""A forward may get other arguments than the model is called with: a decorator or a hook makes them."""

import functools

import pytest
import torch
from torch import nn

import biofx
from pipelines import NEUTRAL

X, HALF = torch.randn(2, 3), torch.full((), 0.5)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, scale):
        return self.fc(x) * scale


class WithoutScale(Scaled):
    @functools.wraps(Scaled.forward)
    def forward(self, x):
        return Scaled.forward(self, x, HALF)


class WithAnything(Scaled):
    @functools.wraps(Scaled.forward)
    def forward(self, *args):
        return Scaled.forward(self, *args, HALF)


class WithFactor(Scaled):
    @functools.wraps(Scaled.forward)
    def forward(self, x, scale, factor, shift=0.0):
        return Scaled.forward(self, x, scale) * factor + shift


def hooked():
    model = Scaled()
    model.register_forward_pre_hook(lambda module, args: (*args, HALF))
    return model


WRAPPED = {
    "fewer": (WithoutScale, (X,)),
    "any": (WithAnything, (X,)),
    "more": (WithFactor, (X, HALF, 2.0)),
    "hook": (hooked, (X,)),
}


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize(("make", "args"), WRAPPED.values(), ids=WRAPPED)
def test_what_the_model_runs_on_are_example_inputs(make, args, frontend):
    model = make()
    bio = biofx.transform(model, NEUTRAL, example_inputs=args, frontend=frontend)
    torch.testing.assert_close(bio(*args), model(*args))
    assert str(biofx.units(model, args)) == str(biofx.units(bio, args))


@pytest.mark.parametrize(("make", "args"), WRAPPED.values(), ids=WRAPPED)
def test_a_graph_that_torch_cannot_export_is_refused(make, args, tmp_path):
    model = make()
    with pytest.raises(biofx.CaptureError, match=r"decorator or a hook calls forward\(x, scale\).*; try frontend="):
        biofx.transform(model, NEUTRAL, example_inputs=args, frontend="export")
    bio = biofx.transform(model, NEUTRAL, example_inputs=args)
    with pytest.raises(biofx.ExportError, match=r"torch.export cannot export \w+; .safetensors holds weights alone"):
        biofx.export(bio, tmp_path / "model.pt2", args)


def test_what_does_not_fit_is_told_by_the_decorators_arguments():
    with pytest.raises(biofx.ArgumentError, match=r"do not fit WithoutScale.forward\(x\): too many positional"):
        biofx.units(WithoutScale(), (X, HALF))
    with pytest.raises(biofx.ArgumentError, match="WithAnything fails on example_inputs: .* positional arguments but"):
        biofx.units(WithAnything(), (X, HALF))
