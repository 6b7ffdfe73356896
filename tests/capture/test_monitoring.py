"""Monitoring: what a forward does during a trace without making a node."""

import threading

import pytest
import torch
from torch import nn

from biofx.capture.monitoring import monitored


class Notes:
    def __init__(self):
        self.reads, self.contexts = [], []

    def note_mode_read(self, module):
        self.reads.append(module)

    def enter_context(self, context):
        self.contexts.append(type(context).__name__)

    def exit_context(self, context):
        self.contexts.append("end")


def test_reads_of_training_are_noted():
    model, notes = nn.Dropout(), Notes()
    with monitored(model, notes):
        model(torch.ones(2))
    assert notes.reads == [model]
    assert "training" in vars(model)
    model(torch.ones(2))
    assert notes.reads == [model]  # monitoring is over


@pytest.mark.parametrize(
    ("context", "name"),
    [
        (torch.no_grad, "no_grad"),
        (torch.enable_grad, "enable_grad"),
        (lambda: torch.set_grad_enabled(False), "set_grad_enabled"),
        (torch.inference_mode, "inference_mode"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_contexts_are_noted(context, name):
    notes = Notes()
    with monitored(nn.Identity(), notes), context():
        assert notes.contexts == [name]
    assert notes.contexts == [name, "end"]


def test_other_threads_are_not_monitored():
    model, notes = nn.Dropout(), Notes()

    def work():
        with torch.no_grad():
            model(torch.ones(2))

    with monitored(nn.Identity(), notes):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert (notes.reads, notes.contexts) == ([], [])


def test_everything_is_restored_after_an_error():
    model = nn.Dropout()

    def fails():
        model.training, model.count = False, 3
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), monitored(model, Notes()):
        fails()
    assert model.training
    assert not hasattr(model, "count")
    assert "training" not in vars(nn.Module)
