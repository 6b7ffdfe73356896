"""Operators are given to passes as `torch.ops.biofx.<name>`, and not as the functions that define them."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.model.gradient_hooks import scale_grad
from biofx.passes.synaptic_scaling import sum_activity


@pytest.mark.parametrize(
    ("insert", "message"),
    [
        (lambda edit, site: edit.observe(sum_activity, site, "seen"), r"give its operator, torch\.ops\.biofx\.sum_act"),
        (lambda edit, site: edit.observe(torch.sum, site, "seen"), r"sum.* is no observer; give torch\.ops\.biofx\.<n"),
        (lambda edit, site: edit.insert(scale_grad), r"give its operator, torch\.ops\.biofx\.scale_grad"),
    ],
    ids=["observer", "another function", "hook"],
)
def test_a_function_in_place_of_its_operator_is_refused(insert, message):
    @dataclass(frozen=True)
    class Inserts(passes.Pass):
        name, slot = "inserts", passes.Slot.HOOK

        def rewrite(self, site, edit):
            insert(edit, site)

    with pytest.raises(biofx.PipelineError, match=f"inserts: weight: .*{message}"):
        biofx.transform(nn.Linear(3, 2), [Inserts()])
