"""Random small networks × front ends × recipes × properties, and the ones that once failed.

The networks are in `models.random_networks`, the properties in `differential`.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import biofx
import differential
from biofx import passes
from biofx.compiler import FRONTENDS
from differential import DALE, RECIPES
from models.python_blocks import KINDS
from models.random_networks import RandomNetwork, plans, python_plans


def check(plan: dict[str, Any], recipe: str, frontend: str) -> None:
    """All properties, or a refusal to export what decides by values."""
    torch.manual_seed(0)
    model, inputs = RandomNetwork(**plan), (torch.randn(5, 2, 4, 4),)
    if frontend == "export" and "'island'" in str(plan):
        with pytest.raises(biofx.CaptureError, match="cannot be exported"):
            differential.transformed(model, inputs, recipe, frontend)
        return
    case = differential.transformed(model, inputs, recipe, frontend)
    for check_property in differential.PROPERTIES:
        check_property(case)


@given(plan=plans, recipe=st.sampled_from(sorted(RECIPES)), frontend=st.sampled_from(sorted(FRONTENDS)))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_every_network_has_every_property(plan, recipe, frontend):
    check(plan, recipe, frontend)


def calls(model: nn.Module, mode: bool, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What two calls of a model return, from one seed."""
    torch.manual_seed(0)
    random.seed(0)
    model.train(mode)
    return [model(x) for x in inputs]


def behaviour(model: nn.Module, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two calls in each mode without and with gradients; and two calls after a step of training."""
    results = []
    for mode in (False, True):
        with torch.no_grad():
            results += calls(model, mode, inputs)
        results += calls(model, mode, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(y.square().mean() for y in calls(model, True, inputs)).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e6)
    optimizer.step()
    return results, calls(model, False, inputs)


def check_python(plan: dict[str, Any], frontend: str) -> None:
    """The transformed model, a copy of it, and the folded model behave as the model does."""
    torch.manual_seed(0)
    model = RandomNetwork(**plan).double()
    # What depends on values goes other ways with larger inputs than with those of the transform.
    x, *inputs = (scale * torch.randn(3, 2, 4, 4, dtype=torch.float64) for scale in (1, 1, 10))
    bio = biofx.transform(model, [passes.SplitSynapses(2)], example_inputs=(x,), frontend=frontend)
    others = (copy.deepcopy(bio), biofx.fold(bio), bio)
    before, after = behaviour(model, inputs)
    for other in others:
        results, stepped = behaviour(other, inputs)
        torch.testing.assert_close(results, before)
        torch.testing.assert_close(stepped, after, rtol=1e-5, atol=1e-7)


@given(plan=python_plans, frontend=st.sampled_from(["symbolic", "module"]))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_networks_that_do_what_no_graph_holds(plan, frontend):
    check_python(plan, frontend)


def test_recomputation_in_backward_changes_state_again():
    """A checkpoint around batch norm counts each batch twice; its graph counted it once, without a word."""
    plan = {"images": (("python", "checkpoint", ("norm", "batch")),), "vectors": (("linear", "tanh", True),)}
    check_python(plan, "symbolic")


def test_a_difference_behind_silent_units_is_found():
    """Asks whether gradients are on: they were for the graph, and no output of the check depended on it."""
    island = ("island", ("python", "training", ("python", "in_place", ("linear", "gelu", True))))
    plan = {"vectors": (("python", "gradients", ("linear", "tanh", True)), island)}
    check_python(plan | {"images": (("conv", 2, "circular", "tanh"),)}, "symbolic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_each_kind_of_python(kind, frontend):
    check_python({"vectors": (("python", kind, ("linear", "tanh", True)),)}, frontend)


@pytest.mark.parametrize("synapses", [(2, 0), (2,), (2, slice(None), slice(3, None))])
def test_balance_of_weights_that_are_0(synapses):
    """The embedding of a token for padding, tied to a head, became NaN under Dale's principle."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[synapses[0]].weight[synapses[1:]] = 0
    bio = biofx.transform(model, [DALE])
    assert all(torch.isfinite(p).all() for p in bio.parameters())
    assert not bio.get_parameter("2.weight")[model[2].weight == 0].any()


@pytest.mark.parametrize("width", [4, 8])
def test_balance_of_weights_whose_inputs_do_not_vary(width):
    """Behind units that are silent for all inputs, weights became 0, and those behind them NaN."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3)).double()
    nn.init.constant_(model[0].bias, -100.0)
    bio = biofx.transform(model, [DALE])
    for name in ("2.weight", "4.weight"):
        assert torch.isfinite(bio.get_parameter(name)).all()
        assert bio.get_parameter(name).any(1).all()
