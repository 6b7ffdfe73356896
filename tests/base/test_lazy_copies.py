"""Lazy copies: they share memory until somebody writes, and never where somebody else looks at that memory."""

import numpy as np
import pytest
import torch
from torch import nn

from biofx.base.isolation import parameters_kept, undisturbed
from biofx.base.lazy_copies import is_untouched, lazy_copy, settle


def test_a_lazy_copy_keeps_its_numbers_under_writes():
    tensor = torch.ones(3)
    copy = lazy_copy(tensor)
    assert is_untouched(tensor)
    tensor.data.add_(1)
    assert not is_untouched(tensor)
    assert (tensor.tolist(), copy.tolist()) == ([2, 2, 2], [1, 1, 1])


def test_a_tensor_stays_where_it_is_in_memory():
    tensor = torch.ones(3)
    before = tensor.data_ptr()
    copy = lazy_copy(tensor)
    assert tensor.add(copy).tolist() == [2, 2, 2]
    del copy
    settle(tensor)
    assert not is_untouched(tensor)
    assert tensor.data_ptr() == before


SEEN = {
    "by NumPy": lambda: (lambda t: (t, t.numpy()))(torch.ones(3)),
    "from NumPy": lambda: (lambda a: (torch.from_numpy(a), a))(np.ones(3)),
    "by another tensor": lambda: (lambda t: (t, t.view(3)))(torch.ones(3)),
    "by another process": lambda: (lambda t: (t, t))(torch.ones(3).share_memory_()),
}


@pytest.mark.parametrize("made", SEEN.values(), ids=SEEN)
def test_memory_that_somebody_else_sees_is_copied_at_once(made):
    tensor, other = made()
    copy = lazy_copy(tensor)
    tensor.add_(1)
    assert list(other) == [2, 2, 2]
    assert copy.tolist() == [1, 1, 1]


def test_saved_parameters_share_memory():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in tensors]
    with parameters_kept(model), undisturbed(model), torch.no_grad():
        assert all(map(is_untouched, tensors))
        model(torch.randn(3, 4))
        assert all(map(is_untouched, model[0].parameters()))
    assert [tensor.data_ptr() for tensor in tensors] == before
