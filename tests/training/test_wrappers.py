"""Wrappers: rules act at the steps of the optimizer inside, whether or not the wrapper is an optimizer itself."""

from collections import OrderedDict

import pytest
import torch

import biofx
from training_runs import GAINS, network


class Around(torch.optim.Optimizer):
    """Wraps an optimizer without being one: its steps run no hooks."""

    def __init__(self, base, hooks):
        self.base = base
        if hooks:
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("hooks", [True, False])
def test_rules_act_at_the_steps_inside_a_wrapper(hooks):
    bio = biofx.transform(network(), GAINS)
    optimizer = Around(torch.optim.Adam(bio.parameters()), hooks)
    attachment = biofx.attach(bio, optimizer)
    assert attachment.optimizer is optimizer.base
