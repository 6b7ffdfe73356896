"""Wrappers: rules act at the steps of the optimizer inside, whether or not the wrapper is an optimizer itself."""

from collections import OrderedDict

import pytest
import torch

import biofx
from training_runs import GAINS, displacements, network


class Around(torch.optim.Optimizer):
    """Wraps an optimizer without being one: its steps run no hooks."""

    def __init__(self, base, hooks):
        self.base = base
        if hooks:
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)  # PyTorch's would add calls of hooks to `step`

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("hooks", [True, False])
def test_rules_act_at_the_steps_inside_a_wrapper(hooks):
    def wrapped(parameters):
        return Around(torch.optim.Adam(parameters, lr=0.003), hooks)

    for plain, moved, gain in displacements(wrapped, 1):
        torch.testing.assert_close(moved, gain * plain)
    bio = biofx.transform(network(), GAINS)
    optimizer = wrapped(bio.parameters())
    assert biofx.attach(bio, optimizer).optimizer is optimizer.base
