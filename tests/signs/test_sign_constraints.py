"""A weight under each constraint, its inverse, its slope, and the check that a unit has one sign."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.signs.constraints import CONSTRAINTS, rectify, rectify_

WEIGHT = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
SIGNS = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
LN2 = 0.6931471805599453

VALUES = {
    "project": [0.0, -1.0, 0.0, 0.0, 2.0],
    "abs": [2.0, -1.0, 0.0, -1.0, 2.0],
    "softplus": [0.1269280110429726, -0.3132616875182228, LN2, -1.3132616875182228, 2.0],
}
GRADIENTS = {  # of the sum
    "project": [1.0, 1.0, 1.0, 1.0, 1.0],
    "abs": [-1.0, 1.0, 1.0, -1.0, 1.0],
    "softplus": [0.11920292202211755, -0.2689414213699951, 0.5, -0.7310585786300049, 1.0],
}


@pytest.fixture(params=sorted(CONSTRAINTS))
def name(request):
    return request.param


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_the_value(name):
    close(CONSTRAINTS[name].operator(WEIGHT, SIGNS), VALUES[name])


def test_the_gradient(name):
    weight = WEIGHT.clone().requires_grad_()
    CONSTRAINTS[name].operator(weight, SIGNS).sum().backward()
    close(weight.grad, GRADIENTS[name])


def test_the_gradient_under_functorch(name):
    operator = CONSTRAINTS[name].operator
    close(torch.func.grad(lambda w: operator(w, SIGNS).sum())(WEIGHT), GRADIENTS[name])
    close(torch.func.vmap(operator)(WEIGHT.expand(3, -1, -1), SIGNS.expand(3, -1, -1))[2], VALUES[name])


def test_the_slope_is_the_derivative_of_the_magnitude(name):
    stored = torch.tensor([[-3.0, -0.5, 0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([[-1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)  # what projection leaves as it is
    CONSTRAINTS[name].operator(stored, sign).abs().sum().backward()
    torch.testing.assert_close(CONSTRAINTS[name].slope(stored.detach(), sign), stored.grad)


def test_what_is_stored_gives_the_weight(name):
    weight = torch.tensor([[0.5, -1e-3, 30.0, -2.0, 7.0, -7.0]], dtype=torch.float64)
    sign = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    constraint = CONSTRAINTS[name]
    torch.testing.assert_close(constraint.operator(constraint.store(weight, sign), sign), weight)


def test_a_weight_of_the_other_sign_becomes_zero(name):
    constraint = CONSTRAINTS[name]
    sign = torch.ones(1, 1)
    assert float(constraint.operator(constraint.store(torch.tensor([[-3.0]]), sign), sign)) == pytest.approx(0)


def test_the_dtype_stays(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        constraint = CONSTRAINTS[name]
        assert constraint.operator(WEIGHT.to(dtype), SIGNS.to(dtype)).dtype is dtype
        assert torch.isfinite(constraint.store(WEIGHT.to(dtype), SIGNS.to(dtype))).all()


def test_rectify_is_the_formula():
    weight, sign = torch.randn(5, 7), torch.randn(1, 7).sign()
    torch.testing.assert_close(rectify(weight, sign), torch.relu(weight * sign) * sign)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_weights_are_rectified_in_place_as_one(dtype):
    weights = [torch.randn(shape).to(dtype) for shape in ((5, 7), (2, 4, 3), (6, 7, 3, 3), (0, 4))]
    signs = [torch.randint(-1, 2, shape).to(dtype) for shape in ((1, 7), (1, 1, 3), (1, 7, 1, 1), (1, 4))]
    weights[0][0, 0] = torch.nan
    expected = [rectify(weight, sign) for weight, sign in zip(weights, signs, strict=True)]
    rectify_(weights, signs)
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(weight.signbit(), other.signbit())  # no zero is negative


class Shared(nn.Module):
    """Two weights that read the same units."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 10), nn.Linear(10, 4), nn.Linear(10, 5)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return self.left(h), self.right(h)


def test_verify_finds_a_unit_of_both_signs():
    """Each weight keeps to its own signs, but the two do not agree."""
    bio = biofx.transform(Shared(), [passes.DalesPrinciple(balance=False)])
    biofx.verify(bio)
    with torch.no_grad():
        bio.get_buffer("right.weight_synapses.sign")[:, 3] *= -1
        bio.get_parameter("right.weight")[:, 3] *= -1
    with pytest.raises(biofx.VerificationError) as error:
        biofx.verify(bio)
    assert "left.weight: 1 of its presynaptic units are excitatory and inhibitory at once" in str(error.value)
    assert "right.weight: 1 of its presynaptic units are excitatory and inhibitory at once" in str(error.value)
