"""InhibitoryInterneurons: all units excite, and inhibit through interneurons."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.passes.inhibitory_interneurons import factors_of_inhibition, product
from conftest import flat
from models.small import ConvNet, layer_and_input, mlp

NAME = "2.weight"


def interneurons(model, *others, **options):
    return biofx.transform(model, [passes.InhibitoryInterneurons(**options), *others])


def network(*sizes):
    torch.manual_seed(1)
    return mlp(*(sizes or (3, 20, 10))).double()


def parts(bio, name=NAME):
    """W^EX, W^EI and W^IX of a weight."""
    synapses = biofx.weight_sites(bio)[name].child
    return biofx.weight_sites(bio)[name].direct().detach(), synapses.from_interneurons, synapses.to_interneurons


def train(bio, optimizer, steps=5, **options):
    generator = torch.Generator().manual_seed(2)
    attachment = biofx.attach(bio, optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        bio(torch.randn(8, 3, dtype=torch.float64, generator=generator)).square().mean().backward()
        optimizer.step()
    return attachment


# --- the equation ----------------------------------------------------------------------------------------------------


def test_the_weight_by_hand():
    bio = interneurons(network(1, 2, 2), fraction=0.5)
    _, inhibition, drive = parts(bio)
    with torch.no_grad():
        biofx.weight_sites(bio)[NAME].raw.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        inhibition.copy_(torch.tensor([[2.0], [0.5]]))
        drive.copy_(torch.tensor([[1.0, 3.0]]))
    assert biofx.weight_sites(bio)[NAME].effective().tolist() == [[-1.0, -4.0], [2.5, 2.5]]
    assert biofx.weight_sites(bio)[NAME].direct().tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert biofx.fold(bio).get_parameter(NAME).tolist() == [[-1.0, -4.0], [2.5, 2.5]]


def test_what_is_negative_counts_as_zero_and_feels_its_gradient():
    bio = interneurons(network(1, 2, 2), fraction=0.5)
    _, inhibition, drive = parts(bio)
    with torch.no_grad():
        inhibition.fill_(-1.0)
        drive.fill_(2.0)
    biofx.weight_sites(bio)[NAME].effective().sum().backward()
    assert torch.equal(biofx.weight_sites(bio)[NAME].effective(), biofx.weight_sites(bio)[NAME].direct())
    assert inhibition.grad.tolist() == [[-4.0], [-4.0]]
    assert drive.grad.tolist() == [[0.0, 0.0]]


def test_the_gradients_are_those_of_the_three_matrices():
    bio, x = interneurons(network()), torch.randn(6, 3, dtype=torch.float64)
    hidden = bio.get_submodule("0")(x).relu().detach()
    bio(x).pow(3).sum().backward()
    plain = biofx.fold(bio).get_submodule("2")
    at_output = 3 * plain(hidden).detach().square()
    upstream = at_output.T @ hidden
    _, inhibition, drive = parts(bio)
    torch.testing.assert_close(biofx.weight_sites(bio)[NAME].raw.grad, upstream)
    torch.testing.assert_close(inhibition.grad, -upstream @ drive.T)
    torch.testing.assert_close(drive.grad, -inhibition.T @ upstream)


# --- insertion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_any_weight_is_excitation_minus_inhibition(axis, count):
    weight = torch.randn(7, 7, dtype=torch.float64)
    inhibition, drive = factors_of_inhibition(weight, axis, count)
    excitation = weight + product(inhibition, drive, axis)
    assert min(float(each.min()) for each in (inhibition, drive, excitation)) >= -1e-15
    torch.testing.assert_close(drive.movedim(axis, 0).norm(dim=1), inhibition.norm(dim=0))
    if count == 7:  # an interneuron for each unit
        torch.testing.assert_close(excitation, weight.clamp(min=0))


def test_a_weight_without_negative_entries_needs_no_drive():
    inhibition, drive = factors_of_inhibition(torch.ones(4, 3), 0, 2)
    assert drive.tolist() == [[0.0] * 3] * 2
    assert inhibition.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 2


KINDS = ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_they_did(kind):
    layer, x = layer_and_input(kind, dtype=torch.float64)
    bio = interneurons(layer, fraction=0.25, inputs="excitatory")
    torch.testing.assert_close(bio(x), layer(x))
    _, inhibition, drive = parts(bio, "weight")
    assert inhibition.shape == (8, 2)
    assert drive.shape[biofx.weight_sites(bio)["weight"].postsynaptic_axis] == 2


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_compute_what_they_did(cell):
    model = cell(3, 8, batch_first=True).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    bio = biofx.transform(model, [passes.InhibitoryInterneurons()], example_inputs=(x,))
    torch.testing.assert_close(bio(x)[0], model(x)[0])
    assert biofx.weight_sites(bio)["weight_hh_l0"].has_interneurons
    assert not biofx.weight_sites(bio)["weight_ih_l0"].has_interneurons


class Product(nn.Module):
    """A weight with postsynaptic units on its last axis."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(n, m).double()) for n, m in ((3, 6), (6, 4)))

    def forward(self, x):
        return (x @ self.first).relu() @ self.second


def test_units_on_the_last_axis_have_interneurons():
    model, x = Product(), torch.randn(2, 3, dtype=torch.float64)
    bio = biofx.transform(model, [passes.InhibitoryInterneurons(fraction=0.5)], example_inputs=x)
    torch.testing.assert_close(bio(x), model(x))
    assert [tuple(each.shape) for each in parts(bio, "second")] == [(6, 4), (4, 2), (6, 2)]


class Beside(nn.Module):
    """A weight that reads units and inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(7, 5)

    def forward(self, x):
        return self.second(torch.cat([self.first(x).relu(), x], dim=1))


def test_free_inputs_drive_no_interneuron():
    model, x = Beside().double(), torch.randn(2, 3, dtype=torch.float64)
    bio = interneurons(model)
    torch.testing.assert_close(bio(x), model(x))
    excitation, _, drive = parts(bio, "second.weight")
    assert bool((excitation[:, :4] >= 0).all())
    assert torch.equal(excitation[:, 4:], model.second.weight[:, 4:])
    bio(x).sum().backward()
    assert not drive.grad[:, 4:].any()
    assert str(biofx.verify(bio)["second.weight"]) == "obeys, with inhibition by interneurons"


def test_gamma_of_a_batch_norm_is_kept_from_being_negative():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    model[1].weight.data[0] = -1.0  # it is turned over, with the weights before it
    bio = biofx.transform(model, [passes.InhibitoryInterneurons()], example_inputs=x)
    torch.testing.assert_close(bio(x), model(x))
    assert list(bio.biofx.nonnegative) == ["1.weight"]
    assert bool((bio.get_parameter("1.weight") >= 0).all())


# --- signs -----------------------------------------------------------------------------------------------------------


def test_units_obey_and_the_folded_model_does_not():
    bio = interneurons(network())
    verdict = biofx.verify(bio)[NAME]
    assert (verdict.kind, str(verdict)) == ("obeys", "obeys, with inhibition by interneurons")
    assert biofx.units(bio).verdicts()[NAME] == verdict
    assert not len(biofx.units(bio).mixed())
    assert biofx.units(biofx.fold(bio)).verdicts()[NAME].kind == "breaks"
    assert "10% of" not in str(biofx.summary(bio))
    assert "1 interneuron" in str(biofx.summary(bio))


def test_a_negative_synapse_of_a_unit_is_found():
    bio = interneurons(network())
    attachment = train(bio, torch.optim.SGD(bio.parameters(), lr=0.1))
    biofx.verify(bio)
    with torch.no_grad():
        biofx.weight_sites(bio)[NAME].raw[0, 0] = -1.0
    with pytest.raises(biofx.VerificationError, match="1 of its synapses have another sign than their unit"):
        biofx.verify(bio)
    attachment.detach()


def test_an_interneuron_that_is_no_number_is_found():
    bio = interneurons(network())
    with torch.no_grad():
        parts(bio)[1][0, 0] = torch.nan
    with pytest.raises(biofx.VerificationError, match="its synapses from interneurons are not finite"):
        biofx.verify(bio)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        ("stem.weight", "it reads the model's inputs, which are free"),
        ("depthwise.weight", "it has groups of units, which have no interneurons in common"),
    ],
)
def test_what_is_left_alone(weight, why):
    assert interneurons(ConvNet().eval()).biofx.passes[0].left[weight] == why


def test_weights_of_inhibitory_units_are_left_alone():
    once = biofx.transform(Reader(), [passes.DalesPrinciple(balance=False, sites="first.weight", excitatory=0.5)])
    twice = biofx.transform(once, "inhibitory-interneurons", exclude="first.weight")
    assert twice.biofx.passes[1].left["second.weight"] == "it reads units that are inhibitory"


class Reader(nn.Module):
    """Two weights that read the same units."""

    def __init__(self):
        super().__init__()
        self.units, self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.units(x).relu()
        return self.first(hidden) + self.second(hidden)


def test_activity_of_either_sign_is_remarked():
    bio = interneurons(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    assert "the activity of its units can be negative (tanh)" in flat(bio.biofx.passes[0].remarks[NAME])


def test_synapses_with_an_activation_each_are_left_alone():
    bio = interneurons(network(), passes.SplitSynapses(2, activation="tanh"))
    assert bio.biofx.passes[1].left[NAME].startswith("its synapses have an activation each")


@pytest.mark.parametrize("other", [passes.DalesPrinciple(), passes.MirrorUnits()])
def test_other_signs_exclude_it(other):
    with pytest.raises(biofx.PipelineError, match="both claim the sign constraint"):
        interneurons(network(), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "InhibitoryInterneurons: fraction must be"),
        ({"fraction": 1.5}, "InhibitoryInterneurons: fraction must be"),
        ({"inputs": "mixed"}, "InhibitoryInterneurons: inputs must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.InhibitoryInterneurons(**options)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "compiled"), [(torch.optim.SGD, False), (torch.optim.AdamW, False), (torch.optim.AdamW, True)]
)
def test_all_synapses_stay_nonnegative(optimizer, compiled):
    bio = interneurons(network(), passes.FuzzyLearningRates())
    before = [each.clone() for each in parts(bio)]
    attachment = train(bio, optimizer(bio.parameters(), lr=0.3), compile=compiled)
    after = parts(bio)
    assert all(bool((each >= 0).all()) for each in after)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    x = torch.randn(4, 3, dtype=torch.float64)
    folded, attached = biofx.fold(bio)(x), bio(x)
    torch.testing.assert_close(folded, attached)
    attachment.detach()
    torch.testing.assert_close(bio(x), attached)
    biofx.verify(bio)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_is_that_of_the_three_matrices_alone(name):
    """An oracle without biofx: three parameters, the optimizer, and a clamp at 0."""
    bio = interneurons(network(), fraction=0.3)
    own = [nn.Parameter(each.clone()) for each in parts(bio)]
    first, second = (copy.deepcopy(biofx.fold(bio).get_submodule(place)) for place in ("0", "2"))
    others = [first.weight, first.bias, second.bias]
    optimizers = [getattr(torch.optim, name)(x, lr=0.3) for x in (bio.parameters(), [*own, *others])]
    biofx.attach(bio, optimizers[0])
    for _ in range(4):
        x = torch.randn(8, 3, dtype=torch.float64)
        plain = F.linear(first(x).relu(), own[0] - own[1] @ own[2], second.bias)
        for output, optimizer in zip((bio(x), plain), optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            for each in own:
                each.clamp_(min=0)
    assert all(bool((each == 0).any()) for each in own)
    for mine, expected in zip(parts(bio), own, strict=True):
        torch.testing.assert_close(mine, expected.detach())


def test_gains_act_on_the_synapses_of_units():
    plain = interneurons(network())
    fuzzy = interneurons(network(), passes.FuzzyLearningRates(distribution="lognormal"))
    gain, moved = biofx.weight_sites(fuzzy)[NAME].gain, []
    for bio in (plain, fuzzy):
        before = [each.clone() for each in parts(bio)]
        train(bio, torch.optim.SGD(bio.parameters(), lr=1e-3), steps=1)
        moved.append([after - b for after, b in zip(parts(bio), before, strict=True)])
    is_free = parts(fuzzy)[0] > 0  # of the projection
    torch.testing.assert_close(moved[1][0][is_free], (gain * moved[0][0])[is_free])
    assert all(torch.allclose(a, b) for a, b in zip(moved[0][1:], moved[1][1:], strict=True))


def test_split_synapses_share_the_excitation():
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    bio = interneurons(model, passes.SplitSynapses(3))
    torch.testing.assert_close(bio(x), model(x))
    site = biofx.weight_sites(bio)[NAME]
    assert site.raw.shape == (3, 10, 20)
    assert bool((site.raw >= 0).all())
    torch.testing.assert_close(parts(bio)[0], parts(interneurons(network()))[0])
    train(bio, torch.optim.AdamW(bio.parameters(), lr=0.1))
    assert bool((site.raw >= 0).all())
    biofx.verify(bio)


def test_a_frozen_weight_has_frozen_interneurons():
    model = network()
    model[2].weight.requires_grad_(False)
    assert not any(each.requires_grad for each in parts(interneurons(model)))


# --- keeping it ------------------------------------------------------------------------------------------------------


def test_names_in_the_state():
    bio = interneurons(network())
    names = {name for name, _ in bio.named_parameters() if name.startswith("2.weight")}
    assert names == {f"2.weight_synapses.{key}" for key in ("weight", "from_interneurons", "to_interneurons")}
    assert names < bio.state_dict().keys()


def test_a_run_resumes_bit_for_bit():
    bio = interneurons(network())
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.05)
    train(bio, optimizer)
    other = interneurons(network())
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    other.load_state_dict(bio.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, own in ((bio, optimizer), (other, other_optimizer)):
        train(model, own, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(bio.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_plain_checkpoint_loads_if_inhibition_suffices():
    model, x = network(), torch.randn(4, 3, dtype=torch.float64)
    bio = interneurons(model)
    bio.load_state_dict(model.state_dict())
    torch.testing.assert_close(bio(x), model(x))
    model[2].weight.data.neg_().mul_(100)
    with pytest.raises(biofx.ArgumentError, match="2.weight violates the signs"):
        bio.load_state_dict(model.state_dict())


def test_a_lost_matrix_is_found():
    bio = interneurons(network())
    del bio.get_submodule("2.weight_synapses")._parameters["to_interneurons"]
    with pytest.raises(biofx.VerificationError, match="to_interneurons of 2.weight, which .* keeps, was removed"):
        biofx.verify(bio)


def test_it_is_exported():
    bio, x = interneurons(network()).eval(), torch.randn(4, 3, dtype=torch.float64)
    exported = torch.export.export(bio, (x,)).module()
    torch.testing.assert_close(exported(x), bio(x))
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), bio(x))


def test_memory_counts_the_interneurons():
    bio = interneurons(network())
    buffers = sum(b.numel() * b.element_size() for b in bio.buffers())
    assert biofx.summary(bio).to_dict()["bytes_added"] == buffers + 8 * (10 + 20)
