"""Both modes: one graph follows the mode of each module, as the model does."""

import pytest
import torch
from torch import nn

from exported_models import assert_same_in_both_modes, call, export, same, x
from models.small import mlp


def test_each_module_has_a_mode_of_its_own():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Dropout())
    value = x(8, 4)
    bio = export(model, value)
    for pattern in range(8):
        for index, name in enumerate(("1", "2", "4")):
            for m in (model, bio):
                m.get_submodule(name).train(bool(pattern >> index & 1))
        assert same(call(bio, value), call(model, value))
        assert torch.equal(bio.get_buffer("2.num_batches_tracked"), model[2].num_batches_tracked)


def test_the_mode_at_the_time_of_the_transform_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    bio, value = export(model, x()), x()
    assert (bio.training, bio.get_submodule("1").training) == (True, False)
    assert same(call(bio, value), call(model, value))
    assert model[1].num_batches_tracked == bio.get_buffer("1.num_batches_tracked") == 0


@pytest.mark.parametrize(("model", "exports"), [(mlp(4, 8, 3), 1), (nn.Sequential(nn.Linear(4, 4), nn.Dropout()), 2)])
def test_a_second_export_is_for_models_that_read_their_mode(model, exports, monkeypatch):
    calls, original = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: calls.append(1) or original(*args, **options))
    assert_same_in_both_modes(export(model, x()), model, x())
    assert len(calls) == exports
