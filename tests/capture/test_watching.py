"""Watching: what a forward does while it is traced, beside what becomes a node."""

import threading

import pytest
import torch
from torch import nn

from biofx.capture.watching import watched


class Notes:
    def __init__(self):
        self.reads, self.blocks = [], []

    def note_read(self, module):
        self.reads.append(module)

    def enter_block(self, block):
        self.blocks.append(type(block).__name__)

    def exit_block(self, block):
        self.blocks.append("end")


def test_reads_of_training_are_noted():
    model, notes = nn.Dropout(), Notes()
    with watched(model, notes):
        model(torch.ones(2))
    assert notes.reads == [model]
    assert "training" in vars(model)
    model(torch.ones(2))
    assert notes.reads == [model]  # the watch is over


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (torch.no_grad, "no_grad"),
        (torch.enable_grad, "enable_grad"),
        (lambda: torch.set_grad_enabled(False), "set_grad_enabled"),
        (torch.inference_mode, "inference_mode"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_blocks_are_noted(block, name):
    notes = Notes()
    with watched(nn.Identity(), notes), block():
        assert notes.blocks == [name]
    assert notes.blocks == [name, "end"]


def test_other_threads_are_not_watched():
    model, notes = nn.Dropout(), Notes()

    def work():
        with torch.no_grad():
            model(torch.ones(2))

    with watched(nn.Identity(), notes):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert (notes.reads, notes.blocks) == ([], [])


def test_everything_is_as_it_was_after_an_error():
    model = nn.Dropout()

    def fails():
        model.training, model.count = False, 3
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), watched(model, Notes()):
        fails()
    assert model.training
    assert not hasattr(model, "count")
    assert "training" not in vars(nn.Module)
