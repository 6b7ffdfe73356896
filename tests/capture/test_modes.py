"""What depends on training mode, gradients or precision: nodes that follow the mode, and islands."""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from conftest import assert_same_in_both_modes, same
from models.python_blocks import Residual
from pipelines import NEUTRAL


def islands(bio):
    return bio.biofx.islands


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return F.dropout(self.fc(x), p=0.5 if self.training else 0.0, training=self.training)


@pytest.mark.parametrize("captured_in", [True, False])
def test_functional_dropout_follows_the_mode(captured_in):
    model = nn.Sequential(FunctionalDropout(), FunctionalDropout()).train(captured_in)
    bio = biofx.transform(model, NEUTRAL)
    x = torch.randn(2, 64)
    assert bio[0].training is captured_in if hasattr(bio, "__getitem__") else bio.training is captured_in
    for mode in (True, False):
        model.train(mode)
        bio.train(mode)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert same(bio(x), expected)
        assert bool((expected == 0).any()) is mode


def test_the_mode_is_that_of_the_module_that_reads_it():
    bio = biofx.transform(nn.Sequential(FunctionalDropout(), FunctionalDropout()), NEUTRAL).train()
    bio.get_submodule("1").eval()
    zeros = bio(torch.randn(2, 64)) == 0
    assert not zeros.any()
    assert (biofx.fold(bio)(torch.randn(2, 64)) == 0).sum() == 0


def test_the_mode_survives_pickling_and_deepcopy():
    bio = biofx.transform(FunctionalDropout().train(), NEUTRAL)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    for other in (copy.deepcopy(bio), torch.load(file, weights_only=False)):
        x = torch.randn(2, 64)
        assert (other.train()(x) == 0).any()
        assert not (other.eval()(x) == 0).any()


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + self.auxiliary(x) if self.training else self.fc(x)


def test_the_smallest_module_with_a_training_path_is_an_island():
    model, x = nn.Sequential(Residual(), TwoPaths(), nn.Linear(4, 4)), torch.randn(8, 4)
    bio = biofx.transform(model, NEUTRAL)
    reason = "its forward takes another path in training than in evaluation mode"
    assert islands(bio) == {"0.drop": reason, "1": reason}
    assert list(biofx.weight_sites(bio)) == ["0.fc.weight", "1.fc.weight", "1.auxiliary.weight", "2.weight"]
    assert_same_in_both_modes(bio, model, x)
    assert_same_in_both_modes(biofx.transform(biofx.fold(bio), NEUTRAL), model, x)
    assert "training" not in vars(nn.Module)


def test_a_module_that_returns_more_in_training_is_an_island():
    class Either(nn.Module):
        def forward(self, x, y):
            return x if self.training else y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.either = nn.Linear(4, 4), nn.Linear(4, 4), Either()

        def forward(self, x):
            return self.either(self.a(x), self.b(x))

    bio = biofx.transform(Model(), NEUTRAL)
    assert list(islands(bio)) == ["either"]
    assert list(biofx.weight_sites(bio)) == ["a.weight", "b.weight"]


def test_a_model_with_a_training_path_is_one_island():
    model, x = TwoPaths(), torch.randn(8, 4)
    bio = biofx.transform(model, NEUTRAL)
    assert islands(bio) == {"": "its forward takes another path in training than in evaluation mode"}
    assert list(biofx.weight_sites(bio)) == ["fc.weight", "auxiliary.weight"]
    assert_same_in_both_modes(bio, model, x)


class Parent(nn.Module):
    """Passes its own mode to a child, which follows its own mode, too."""

    class Child(nn.Module):
        def forward(self, x, training):
            return F.dropout(x, 0.5, training), F.dropout(x, 0.5, self.training)

    def __init__(self):
        super().__init__()
        self.fc, self.child = nn.Linear(64, 64), Parent.Child()

    def forward(self, x):
        return self.child(self.fc(x), self.training)


def test_a_constant_follows_the_module_whose_mode_was_read():
    bio, x = biofx.transform(nn.Sequential(Parent()), NEUTRAL), torch.randn(2, 64)
    for other in (bio, biofx.transform(biofx.fold(bio), NEUTRAL)):
        for parent in (True, False):
            other.train()
            other.get_submodule("0").train(parent)
            other.get_submodule("0.child").train(not parent)
            dropped = [bool((y == 0).any()) for y in other(x)]
            assert dropped == [parent, not parent]


def test_a_constant_follows_a_child_whose_mode_is_read():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.switch = nn.Linear(64, 64), nn.Identity()

        def forward(self, x):
            return F.dropout(self.fc(x), 0.5, self.switch.training)

    bio = biofx.transform(Outside(), NEUTRAL).train()
    bio.switch.eval()
    assert not (bio(torch.randn(2, 64)) == 0).any()


def test_a_slice_and_a_tensor_that_depend_on_the_mode_follow_it():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x)
            noise = torch.full((4,), 2.0) if self.training else torch.zeros(4)
            return x[:, x.size(1) // 2 : (3 if self.training else 4)] * 1, x + noise

    model = Cut()
    bio = biofx.transform(model, NEUTRAL)
    assert_same_in_both_modes(bio, model, torch.randn(2, 4))
    assert_same_in_both_modes(biofx.transform(biofx.fold(bio), NEUTRAL), model, torch.randn(2, 4))
    assert not [name for name in bio.double().state_dict() if "constant" in name]


class Frozen(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.fc, self.block = nn.Linear(3, 3), block

    def forward(self, x):
        with self.block():
            return self.fc(x)


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    @torch.no_grad()
    def forward(self, x):
        return self.fc(x)


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        torch.set_grad_enabled(False)
        x = self.fc(x)
        torch.set_grad_enabled(True)
        return x


BLOCKS = {
    "no_grad": lambda: Frozen(torch.no_grad),
    "enable_grad": lambda: Frozen(torch.enable_grad),
    "inference_mode": lambda: Frozen(torch.inference_mode),
    "autocast": lambda: Frozen(functools.partial(torch.autocast, "cpu", enabled=False)),
    "decorator": Decorated,
    "switch": Switched,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_switching_gradients_or_precision_makes_an_island(kind):
    model = nn.Sequential(nn.Linear(3, 3), BLOCKS[kind]())
    enter = torch.no_grad.__enter__
    bio = biofx.transform(model, NEUTRAL)
    assert torch.no_grad.__enter__ is enter
    assert list(islands(bio)) == ["1"]
    assert "which a graph cannot represent" in islands(bio)["1"]
    x = torch.randn(2, 3, requires_grad=True)
    assert bio(x).requires_grad == model(x).requires_grad


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_model_that_switches_gradients_is_one_island(kind):
    model, x = BLOCKS[kind](), torch.randn(2, 3, requires_grad=True)
    bio = biofx.transform(model, NEUTRAL)
    assert list(islands(bio)) == [""]
    assert "which a graph cannot represent" in islands(bio)[""]
    assert bio(x).requires_grad == model(x).requires_grad
    assert torch.is_grad_enabled()


def test_a_transform_without_gradients_makes_no_islands():
    with torch.no_grad():
        assert not islands(biofx.transform(nn.Sequential(nn.Linear(3, 3)), NEUTRAL))
