"""Dale's principle: whose sign a weight has, how it is kept, and that networks still start and learn as they did."""

import copy
import io

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat, in_turn
from models.architectures import ARCHITECTURES
from models.small import CONVOLUTIONS, mlp


def obeys(bio, example_inputs=None):
    """Whether no unit has outgoing weights of both signs, from the folded weights alone: no buffer of the pass."""
    return not [v for v in biofx.units(biofx.fold(bio), example_inputs).verdicts().values() if v.kind == "breaks"]


def train(bio, x, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        bio.train()(x).square().sum().backward()
        optimizer.step()


class Split(nn.Module):
    """One population, read by two weights."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 20), nn.Linear(20, 4), nn.Linear(20, 5)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return torch.cat([self.left(h), self.right(h)], -1)


# --- whose sign ---------------------------------------------------------------------------------------------------


def test_columns_have_one_sign():
    bio = biofx.transform(mlp(4, 10, 3), [passes.DalesPrinciple(balance=False)])
    weight = bio.get_parameter("2.weight")
    assert all(len(set(column.sign().tolist())) == 1 for column in weight.T)


def test_all_readers_of_a_unit_share_its_sign():
    bio = biofx.transform(Split(), [passes.DalesPrinciple()])
    sites = biofx.weight_sites(bio)
    assert torch.equal(sites["left.weight"].sign, sites["right.weight"].sign)


@pytest.mark.parametrize(("excitatory", "count"), [(0.8, 8), (0.5, 5), (0.01, 1), (0.99, 9), (0.0, 0), (1.0, 10)])
def test_the_fraction_is_exact(excitatory, count):
    """… and with a fraction between 0 and 1 there is at least one unit of each kind."""
    bio = biofx.transform(mlp(4, 10, 3), [passes.DalesPrinciple(excitatory=excitatory)])
    assert int((biofx.weight_sites(bio)["2.weight"].sign > 0).sum()) == count


def test_the_fraction_is_exact_for_the_units_that_are_read():
    """Of a population in three parts, only the last is read by a weight."""

    class Third(nn.Module):
        def __init__(self):
            super().__init__()
            self.three, self.out = nn.Linear(4, 30), nn.Linear(10, 2)

        def forward(self, x):
            return self.out(torch.relu(self.three(x).chunk(3, -1)[2]))

    bio = biofx.transform(Third(), [passes.DalesPrinciple()], example_inputs=torch.randn(2, 4))
    assert int((biofx.weight_sites(bio)["out.weight"].sign > 0).sum()) == 8


@pytest.mark.parametrize("seed", range(4))
def test_the_fraction_is_exact_for_units_that_carry_on(seed):
    """The units that merge in each step are of one class, though only those of the last are counted."""

    class Unjudged(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.recurrent, self.out = nn.Linear(3, 10), nn.Linear(10, 10), nn.Linear(10, 2)

        def forward(self, x):
            h = torch.zeros(2, 10)
            for now in x:
                h = 0.8 * h + torch.relu(h @ self.recurrent.weight.abs() @ torch.eye(10) + self.into(now))
            return self.out(h)

    bio = biofx.transform(Unjudged(), [passes.DalesPrinciple()], example_inputs=torch.randn(4, 2, 3), seed=seed)
    assert int((biofx.weight_sites(bio)["out.weight"].sign > 0).sum()) == 8


def test_a_flattened_map_has_one_sign_for_each_channel():
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(90, 4))
    for example_inputs in (None, torch.randn(2, 1, 8, 8)):
        bio = biofx.transform(model, [passes.DalesPrinciple()], example_inputs=example_inputs)
        sign = biofx.weight_sites(bio)["4.weight"].sign.view(10, 9)
        assert all(len(set(channel.tolist())) == 1 for channel in sign)
        assert int((sign[:, 0] > 0).sum()) == 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_unit_of_a_real_architecture_has_one_sign(name):
    build, make_inputs = ARCHITECTURES[name]
    inputs = make_inputs()
    bio = biofx.transform(build().eval(), [passes.DalesPrinciple(excitatory=0.5)], example_inputs=inputs)
    biofx.verify(bio)
    assert obeys(bio, inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_groups_and_transposed_weights(kind, groups):
    """The unit behind an entry of a weight depends on the operator's axes and groups."""
    layer, spatial = CONVOLUTIONS[kind]
    model = nn.Sequential(layer(3, 4, 1), nn.ReLU(), layer(4, 8, 3, groups=groups))
    given = {"0.weight": (1, -1, -1, 1)}
    bio = biofx.transform(model, [passes.DalesPrinciple(assign=given)], example_inputs=torch.randn(2, 3, *spatial))
    probe = biofx.fold(bio).get_submodule("2")
    with torch.no_grad():
        probe.bias.zero_()
        for channel, sign in enumerate(given["0.weight"]):
            x = torch.zeros(1, 4, *spatial)
            x[:, channel] = 1
            assert (probe(x) * sign >= 0).all()  # what the channel does to anybody
            assert (probe(x) != 0).any()


def test_units_that_one_weight_reads_in_turn_have_one_sign():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shared = nn.Linear(3, 10), nn.Linear(3, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.shared(torch.relu(self.a(x))) + self.shared(torch.relu(self.b(x)))

    bio = biofx.transform(Twice(), [passes.DalesPrinciple()])
    biofx.verify(bio)
    assert biofx.weight_sites(bio)["shared.weight"].sign is not None
    assert biofx.units(biofx.fold(bio), torch.randn(5, 3)).verdicts()["shared.weight"].kind == "obeys"


def test_synapses_have_their_units_sign():
    bio = biofx.transform(mlp(4, 10, 3), "split-synapses{synapses=4},dales-principle")
    site = biofx.weight_sites(bio)["2.weight"]
    assert site.raw.shape == (4, 3, 10)
    assert (site.raw * site.sign >= 0).all()


# --- inputs, sites, given signs -----------------------------------------------------------------------------------


def test_inputs_are_free_unless_told_otherwise():
    signs = {}
    for inputs in ("free", "excitatory", "mixed"):
        bio = biofx.transform(mlp(10, 10, 3), [passes.DalesPrinciple(inputs=inputs)])
        signs[inputs] = biofx.weight_sites(bio)["0.weight"].sign
    assert signs["free"] is None
    assert (signs["excitatory"] == 1).all()
    assert int((signs["mixed"] > 0).sum()) == 8


def test_a_weight_may_read_free_inputs_beside_units():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(3, 10), nn.Linear(13, 2)

        def forward(self, x):
            return self.out(torch.cat([x, torch.relu(self.hidden(x))], -1))

    model = Skip()
    bio = biofx.transform(model, [passes.DalesPrinciple()], example_inputs=torch.randn(2, 3))
    site = biofx.weight_sites(bio)["out.weight"]
    assert (site.sign[0, :3] == 0).all()
    assert (site.sign[0, 3:] != 0).all()
    assert torch.equal(site.raw[:, :3], model.out.weight[:, :3])
    assert "23% free" in flat(biofx.summary(bio))


def test_sites_can_be_chosen():
    bio = biofx.transform(mlp(4, 10, 10, 3), [passes.DalesPrinciple(sites="4.*")])
    assert biofx.weight_sites(bio)["2.weight"].sign is None
    assert biofx.weight_sites(bio)["4.weight"].sign is not None
    assert "it is not among the sites that were asked for" in flat(biofx.summary(bio))


def test_given_signs_hold_and_others_are_drawn():
    given = (1, -1) * 5
    bio = biofx.transform(mlp(4, 10, 10, 3), [passes.DalesPrinciple(assign={"0.weight": given})])
    sites = biofx.weight_sites(bio)
    assert sites["2.weight"].sign.flatten().tolist() == list(given)
    assert int((sites["4.weight"].sign > 0).sum()) == 8


def test_a_pipeline_string_can_give_signs():
    (pass_,) = biofx.rewrite.registry.parse("dales-principle{assign={'0.weight': (1, -1, 1)},density=0.2}")
    assert pass_.assign == {"0.weight": (1, -1, 1)}
    assert biofx.rewrite.registry.parse(str(pass_)) == [pass_]


# --- signs are kept -----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1},
    "RMSprop": {"lr": 0.1},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {"lr": 10.0},
    "Adamax": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "RAdam": {"lr": 0.1},
    "Rprop": {"lr": 0.1},
    "ASGD": {"lr": 0.1},
}


@pytest.mark.parametrize(("optimizer", "constraint"), in_turn(OPTIMIZERS, ["project", "abs", "softplus"]))
def test_signs_stay_through_training(optimizer, constraint):
    pipeline = [
        passes.DalesPrinciple(constraint=constraint),
        passes.SplitSynapses(),
        passes.Rejuvenate(dre=1.0),
        passes.SynapticScaling(on="weight"),
        passes.FuzzyLearningRates(),
    ]
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(360, 10))
    model.append(nn.ReLU()).append(nn.Linear(10, 3))
    x = torch.randn(16, 1, 8, 8)
    bio = biofx.transform(model, pipeline, example_inputs=x)
    held = getattr(torch.optim, optimizer)(bio.parameters(), **OPTIMIZERS[optimizer])
    biofx.attach(bio, held)
    train(bio, x, held)
    biofx.verify(bio)
    assert obeys(bio.eval(), x)
    assert (bio.get_parameter("1.weight") >= 0).all()


def test_the_stored_weight_is_projected_so_that_no_synapse_dies():
    bio = biofx.transform(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), [passes.DalesPrinciple()])
    weight, sign = bio.get_parameter("2.weight"), bio.get_buffer("2.weight_synapses.sign")
    optimizer = torch.optim.SGD(bio.parameters(), lr=1.0)
    biofx.attach(bio, optimizer)
    before = weight.detach().clone()
    for push, expected in ((sign, torch.zeros_like(before)), (-sign, sign)):  # against its sign, then along
        optimizer.zero_grad()
        (bio(torch.zeros(1, 2)) * 0).sum().backward()
        weight.grad = (push * (1 + before.abs())).expand_as(weight) if push is sign else push.clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_a_checkpoint_and_a_copy_keep_the_signs():
    bio = biofx.transform(Split(), [passes.DalesPrinciple()])
    other = biofx.transform(Split(), [passes.DalesPrinciple()], seed=1)
    other.load_state_dict(bio.state_dict())
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    for restored in (other, copy.deepcopy(bio), torch.load(file, weights_only=False)):
        biofx.verify(restored)
        assert torch.equal(
            restored.get_buffer("left.weight_synapses.sign"), bio.get_buffer("left.weight_synapses.sign")
        )


def test_new_synapses_have_their_units_sign():
    bio = biofx.transform(mlp(4, 50, 50, 3), [passes.DalesPrinciple(), passes.Rejuvenate(dre=1e-6)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    before = bio.get_parameter("2.weight").detach().clone()
    bio(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    after = bio.get_parameter("2.weight").detach()
    assert (after != before).sum() > 0.9 * (before != 0).sum()
    assert torch.equal(after == 0, before == 0)
    assert torch.equal(after.sign(), before.sign())


def test_verify_names_a_synapse_of_the_wrong_sign():
    bio = biofx.transform(Split(), [passes.DalesPrinciple(constraint="abs")])
    with torch.no_grad():
        bio.get_buffer("left.weight_synapses.sign").neg_()
    with pytest.raises(biofx.VerificationError, match=r"left\.weight: \d+ of its presynaptic units are excitatory and"):
        biofx.verify(bio)


# --- batch norm and activity --------------------------------------------------------------------------------------


def conv_bn():
    model = nn.Sequential(nn.Conv2d(2, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 4, 3)).eval().double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(10))
        model[1].bias.copy_(torch.randn(10))
        model[1].running_mean.copy_(torch.randn(10))
    return model


def test_a_negative_gamma_moves_into_the_weights_before_it():
    """So the function stays, here seen at the batch norm; the weights behind it get their signs."""
    model = conv_bn()
    seen = []
    bio = biofx.transform(model, [passes.DalesPrinciple(balance=False)])
    for m in (model, bio):
        m.get_submodule("1").register_forward_hook(lambda module, args, output: seen.append(output))
        m(torch.ones(1, 2, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(seen[1], seen[0])
    assert (bio.get_parameter("1.weight") >= 0).all()
    assert "scale parameters kept from being negative: 1.weight" in flat(biofx.summary(bio))


def test_verify_finds_a_gamma_that_has_become_negative():
    bio = biofx.transform(conv_bn(), [passes.DalesPrinciple()])
    with torch.no_grad():
        bio.get_parameter("1.weight")[3] = -0.5
    with pytest.raises(biofx.VerificationError, match=r"1\.weight: a scale parameter is negative \(-0\.5\)"):
        biofx.verify(bio)


def test_summary_marks_units_whose_activity_can_be_negative():
    model = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    rows = biofx.summary(biofx.transform(model, [passes.DalesPrinciple()])).splitlines()
    assert "[2] dales-principle: the activity of its units can be negative (tanh)" in rows
    assert [row.split()[0] for row in rows if row.endswith("[2]")] == ["2.weight"]


def test_a_negative_gamma_is_reported_where_its_units_are_read():
    model = nn.Sequential(nn.Linear(3, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        model[1].weight[:4] = -1
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    assert torch.equal(bio.get_parameter("1.weight"), model[1].weight)
    assert "1.weight is negative for 4 units, and inverts their signs" in flat(biofx.summary(bio))


def test_weights_of_both_signs_on_the_same_units_are_reported():
    bio = biofx.transform(Split(), [passes.DalesPrinciple()], exclude="right.weight")
    assert "right.weight read the same units with weights of either sign" in flat(biofx.summary(bio))
    assert not obeys(bio)


def test_a_second_transform_continues_the_signs_that_units_have():
    once = biofx.transform(Split(), [passes.DalesPrinciple(sites="left.*", excitatory=0.5)])
    twice = biofx.transform(once, [passes.DalesPrinciple(sites="right.*", excitatory=0.8)], exclude="left.weight")
    biofx.verify(twice)
    assert obeys(twice)
    assert torch.equal(twice.get_buffer("right.weight_synapses.sign"), once.get_buffer("left.weight_synapses.sign"))
    against = tuple(int(-s) for s in once.get_buffer("left.weight_synapses.sign").flatten())
    contrary = passes.DalesPrinciple(sites="right.*", assign={"stem.weight": against})
    with pytest.raises(biofx.PipelineError, match="differs from the signs that they have"):
        biofx.transform(once, [contrary], exclude="left.weight")


# --- a trained network --------------------------------------------------------------------------------------------


def test_the_closest_sign_is_that_of_the_larger_energy():
    model = mlp(2, 2, 3)
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[3.0, 1.0], [-1.0, -2.0], [2.0, 1.0]]))
    bio = biofx.transform(model, [passes.DalesPrinciple(assign="closest")])
    assert bio.get_parameter("2.weight").tolist() == [[3.0, 0.0], [0.0, -2.0], [2.0, 0.0]]
    assert "85% of its energy was kept" in flat(biofx.summary(bio))  # (9 + 4 + 4) of (9 + 1 + 4 + 1 + 4 + 1)


def test_energy_is_counted_over_all_readers():
    model = Split()
    with torch.no_grad():
        model.left.weight.fill_(1.0)
        model.right.weight.fill_(-2.0)
    bio = biofx.transform(model, [passes.DalesPrinciple(assign="closest")])
    assert (bio.left.weight == 0).all()
    assert (bio.right.weight == -2).all()


def test_a_weight_without_energy():
    model = mlp(4, 10, 3)
    nn.init.zeros_(model[2].weight)
    assert "it has no energy" in flat(biofx.summary(biofx.transform(model, [passes.DalesPrinciple(assign="closest")])))


def test_what_softplus_cuts_off_can_come_back():
    model = mlp(4, 20, 3)
    bio = biofx.transform(model, [passes.DalesPrinciple(assign="closest", constraint="softplus")])
    site = biofx.weight_sites(bio)["2.weight"]
    smallest = 0.01 * model[2].weight.abs().mean()
    torch.testing.assert_close(site.effective().abs().min(), smallest, rtol=1e-3, atol=0)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"excitatory": 1.2}, "excitatory must be a number ≥ 0 and ≤ 1, got 1.2"),
        ({"excitatory": -0.1}, "excitatory must be a number ≥ 0 and ≤ 1, got -0.1"),
        ({"constraint": "clip"}, "constraint must be one of project, abs, softplus, got 'clip'"),
        ({"assign": "nearest"}, "assign must be one of random, closest, got 'nearest'"),
        ({"assign": {"fc1.weight": [1, 0, -1]}}, "assign['fc1.weight'] must be signs, +1 or −1, got [1, 0, -1]"),
        ({"inputs": "inhibitory"}, "inputs must be one of free, excitatory, mixed, got 'inhibitory'"),
        ({"density": 0.0}, "density must be a number > 0 and ≤ 1, got 0.0"),
        ({"balance": "yes"}, "balance must be True, False or None, got 'yes'"),
        ({"balance": 0}, "balance must be True, False or None, got 0"),
        ({"assign": "closest", "balance": True}, "keeps the weights of a trained network, and balance=True"),
        ({"sites": 3}, "sites must be glob patterns, got 3"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises(biofx.ArgumentError) as error:
        passes.DalesPrinciple(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assign": {"0.weight": [1, -1]}}, "assign['0.weight'] has 2 signs for 10 units"),
        ({"assign": {"fc.weight": [1]}}, "assign names 'fc.weight', but the populations are"),
        ({"sites": "conv*"}, 'no weight matches sites="conv*"; there are 0.weight, 2.weight'),
    ],
)
def test_what_does_not_fit_the_model(options, message):
    with pytest.raises(biofx.PipelineError) as error:
        biofx.transform(mlp(4, 10, 3), [passes.DalesPrinciple(**options)])
    assert message in str(error.value)


def test_a_population_of_one_unit_cannot_hold_a_fraction():
    with pytest.raises(biofx.PipelineError, match=r"0\.weight is a population of one unit, which cannot be 80% exc"):
        biofx.transform(mlp(4, 1, 3), [passes.DalesPrinciple()])
    biofx.transform(mlp(4, 1, 3), [passes.DalesPrinciple(assign={"0.weight": [1]})])
    biofx.transform(mlp(4, 1, 3), [passes.DalesPrinciple(excitatory=1.0)])


def test_a_weight_that_units_read_along_both_axes():
    """It is left alone with the reason, and an error if asked for."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.weight = nn.Linear(5, 6), nn.Parameter(torch.randn(12, 6))

        def forward(self, x):
            return torch.relu(torch.relu(torch.relu(self.before(x)) @ self.weight.t()) @ self.weight)

    model, x = nn.Sequential(Tied(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)), torch.randn(3, 5)
    bio = biofx.transform(model, [passes.DalesPrinciple()], example_inputs=x)
    assert biofx.weight_sites(bio)["0.weight"].sign is None
    assert "not judged: units read it along several of its axes" in flat(biofx.summary(bio))
    assert biofx.verify(bio)["0.weight"].kind == "not judged"
    with pytest.raises(biofx.PipelineError, match=r"0\.weight cannot have signs: shared by operators that want"):
        biofx.transform(model, [passes.DalesPrinciple(sites=("0.weight",))], example_inputs=x)


def test_one_weight_has_one_sign_constraint():
    with pytest.raises(biofx.PipelineError, match="0.weight has dales-principle already"):
        biofx.transform(mlp(4, 10, 3), [passes.DalesPrinciple(), passes.DalesPrinciple(excitatory=0.5)])


# --- balance ------------------------------------------------------------------------------------------------------


def deep(kind, init, depth=20):
    layers, units = [], 64 if kind == "linear" else 3
    for _ in range(depth):
        layer = nn.Linear(units, 128) if kind == "linear" else nn.Conv2d(units, 16, 3, padding=1)
        units = layer.weight.shape[0]
        if init == "He":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        layers += [layer, *([nn.BatchNorm2d(units)] if kind == "conv, batch norm" else []), nn.ReLU()]
    return nn.Sequential(*layers).double()


def deviations(model, x):
    """Standard deviation of activations at every depth: overall, and across the batch."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append([out.std(), out.var(0).mean().sqrt()]))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return torch.tensor(seen)


def factor(model, bio, x, *, training):
    """The largest factor by which a deviation is off, at any depth."""
    ratio = deviations(bio.train(training), x) / deviations(model.train(training), x)
    return float(ratio.log().abs().max().exp())


@pytest.mark.parametrize("init", ["He", "default"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv, batch norm"])
def test_twenty_layers_start_as_without_signs(kind, init):
    model = deep(kind, init)
    x = torch.randn(64, 64).double() if kind == "linear" else torch.randn(32, 3, 8, 8).double()
    balanced, naive = (
        biofx.transform(model, [passes.DalesPrinciple(balance=balance)], example_inputs=x[:2])
        for balance in (True, False)
    )
    for training in (False, True):
        assert factor(model, balanced, x, training=training) < 3
        # Batch norm in training hides how large net inputs are; without it, signs alone let them explode.
        if not (kind == "conv, batch norm" and training):
            assert factor(model, naive, x, training=training) > 1e6


def test_what_reads_a_parameter_is_left_alone_with_its_name():
    class HyperNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.randn(3, 4))
            self.generator, self.fc = nn.Linear(4, 5), nn.Linear(2, 3)

        def forward(self, x):
            return self.fc(x) @ self.generator(self.z)

    text = flat(biofx.summary(biofx.transform(HyperNetwork(), [passes.DalesPrinciple()])))
    assert "dales-principle: it reads parameters or constants, which no unit computes" in text
    assert text.count("it reads the model's inputs, which are free") == 1


class Reshaped(nn.Module):
    """A model that changes the layout of its input before a weight reads it."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.first, self.second = nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.second(self.first(self.change(x)).relu())


@pytest.mark.parametrize(
    "change", [lambda x: x.unsqueeze(1), lambda x: x[:, None], lambda x: x.view(x.shape[0], 1, -1)]
)
def test_an_input_in_another_layout_is_an_input_when_guessed(change):
    for example_inputs in (None, torch.randn(2, 8)):
        bio = biofx.transform(Reshaped(change), [passes.DalesPrinciple()], example_inputs=example_inputs)
        first, second = biofx.weight_sites(bio).values()
        assert first.sign is None
        assert second.sign.abs().min() == 1


def test_one_unit_that_adds_up_is_one_unit():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(1, 2)

        def forward(self, x):
            return self.b(self.a(x).cumsum(0))

    with pytest.raises(biofx.PipelineError, match=r"a\.weight is a population of one unit"):
        biofx.transform(Network(), [passes.DalesPrinciple()], example_inputs=torch.randn(5, 3))
