"""Models with tensors that `copy.deepcopy` refuses."""

import pytest
import torch
from torch import nn

import biofx
from biofx.base.copying import copied
from conftest import flat, loss

IDENTITY = torch.eye(4)
UNUSUAL = {
    "coo": IDENTITY.to_sparse(),
    "csr": IDENTITY.to_sparse_csr(),
    "csc": IDENTITY.to_sparse_csc(),
    "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
}


class Unusual(nn.Module):
    """Has a parameter and a buffer that are not laid out in strides."""

    def __init__(self, kind):
        super().__init__()
        self.fixed = nn.Parameter(UNUSUAL[kind].clone())
        self.register_buffer("mask", UNUSUAL[kind].clone())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if not self.fixed.is_nested:
            x = (self.mask @ (self.fixed @ x.T)).T
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_without_strides_stay_as_they_are(kind, frontend):
    model, x = Unusual(kind), torch.randn(3, 4)
    bio = biofx.transform(model, "cortex", frontend=frontend)
    assert bio.fixed is not model.fixed
    assert isinstance(bio.fixed, nn.Parameter)
    torch.testing.assert_close(bio(x), model(x))
    assert " fixed: " in flat(biofx.summary(bio))
    loss(bio(x)).backward()
    assert biofx.units(model).readings.keys() == {"head.weight"}
    plain = biofx.fold(bio)
    torch.testing.assert_close(plain(x), model(x))
    assert plain.fixed.layout is plain.mask.layout is model.fixed.layout
    if kind != "nested":  # PyTorch cannot load those
        torch.testing.assert_close(biofx.fold(bio, into=Unusual(kind))(x), model(x))


def test_a_parameter_in_two_places_stays_one():
    model = Unusual("coo")
    model.tied, model.fixed.requires_grad = model.fixed, False
    copy = copied(model)
    assert copy.tied is copy.fixed
    assert copy.fixed is not model.fixed
    assert not copy.fixed.requires_grad
