"""ContinualBackprop: which units are replaced, and by what."""

import copy
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from biofx.passes.continual_backprop import fresh, next_layer_state

RATE, MATURITY, DECAY = 0.03, 4, 0.9
OPTIONS = {"replacement_rate": RATE, "maturity": MATURITY, "decay": DECAY}


class Residual(nn.Module):
    """Two layers: the stream, into which a and c lead, and the branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        stream = torch.tanh(self.a(x))
        return self.out(stream + self.c(F.relu(self.b(stream))))


def mlp():
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def convolutional():
    layers = nn.Conv2d(1, 6, 2), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
    return nn.Sequential(*layers)


def activity_in_sequence(model, x):
    """The input of each layer with weights, by its name."""
    found = {}
    for name, layer in model.named_children():
        found[name], x = x, layer(x)
    return found


def activity_in_residual(model, x):
    stream = torch.tanh(model.a(x))
    branch = F.relu(model.b(stream))
    return {"b": stream, "c": branch, "out": stream + model.c(branch)}


def size_of_contributions(layer, x):
    """|h|·Σ|w| for each channel or unit that a layer reads: by its definition, one connection after the other."""
    weight, mean = layer.weight.detach(), x.detach().abs().mean(0)
    if isinstance(layer, nn.Linear):
        return mean * weight.abs().sum(0)
    sums = [group[:, i].abs().sum() for group in weight.chunk(layer.groups) for i in range(weight.shape[1])]
    return torch.stack(sums) * mean.mean((1, 2))


def clear_outgoing(layer, x, unit, units):
    """Set entries of a tensor like a layer's weight to 0, of the connections from a unit or channel."""
    if isinstance(layer, nn.Linear):
        x.unflatten(1, (units, -1))[:, unit] = 0
    else:
        group, index = divmod(unit, x.shape[1])
        x.chunk(layer.groups)[group][:, index] = 0


@dataclass
class Oracle:
    """A layer in the paper's pseudocode.

    Attributes:
        into: the modules that lead into its units.
        out_of: the modules that read them.
    """

    into: list[str]
    out_of: list[str]
    utility: list[float] = field(default_factory=list)
    age: list[int] = field(default_factory=list)
    due: float = 0.0
    replaced: int = 0

    def step(self, model, activity):
        """The units that are replaced."""
        count = model.get_submodule(self.into[0]).weight.shape[0]
        self.utility, self.age = self.utility or [0.0] * count, self.age or [0] * count
        contribution = torch.zeros(count, dtype=torch.float64)
        for name in self.out_of:
            contribution += size_of_contributions(model.get_submodule(name), activity[name]).view(count, -1).sum(1)
        for i in range(count):
            self.age[i] += 1
            self.utility[i] = DECAY * self.utility[i] + (1 - DECAY) * float(contribution[i])
        self.due += RATE * sum(age > MATURITY for age in self.age)
        found = []
        while self.due >= 1:
            mature = [i for i in range(count) if self.age[i] > MATURITY]
            worst = min(mature, key=lambda i: self.utility[i])
            self.utility[worst], self.age[worst] = 0.0, 0
            self.due -= 1
            found.append(worst)
        self.replaced += len(found)
        return found


NETWORKS = {
    "multilayer perceptron": (mlp, (3,), activity_in_sequence, [(["0"], ["2"]), (["2"], ["4"])]),
    "convolutions": (convolutional, (1, 4, 4), activity_in_sequence, [(["0"], ["2"]), (["2"], ["5"])]),
    "residual": (Residual, (3,), activity_in_residual, [(["a", "c"], ["b", "out"]), (["b"], ["c"])]),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    build, shape, activity, layers = NETWORKS[request.param]
    return build().double(), torch.randn(60, 8, *shape).double(), activity, [Oracle(*layer) for layer in layers]


def attached(model, optimizer=torch.optim.SGD, lr=0.01, pipeline=(), **options):
    bio = biofx.transform(model, [passes.ContinualBackprop(**{**OPTIONS, **options}), *pipeline])
    held = optimizer(bio.parameters(), lr=lr)
    biofx.attach(bio, held)
    return bio, held


def test_optimizers_that_share_a_layer_are_told():
    bio = biofx.transform(mlp(), [passes.ContinualBackprop()])
    layers = [layer for layer in bio.children() if [*layer.parameters()]]
    with pytest.warns(UserWarning, match=r"continual-backprop does not act on 0.weight together with 2.weight"):
        biofx.attach(bio, torch.optim.SGD(layers[0].parameters()))
    with pytest.warns(UserWarning, match=r"Let one optimizer hold all of them"):
        biofx.attach(bio, torch.optim.Adam(layers[1].parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        biofx.attach(bio, torch.optim.SGD([{"params": layer.parameters()} for layer in layers]))


def step(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.flatten(1).sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()


def test_many_steps_are_those_of_the_pseudocode(network):
    """… with the new synapses that the pass drew; and nothing else changes, in weights, biases or Adam's moments."""
    model, batches, activity, layers = network
    bio, optimizer = attached(model, torch.optim.Adam)
    largest = {name: p.detach().square().mean().mul(3).sqrt() for name, p in model.named_parameters()}
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    for x in batches:
        seen = activity(model, x)
        step(model, plain, x)
        step(bio, optimizer, x)
        found = [(layer, unit) for layer in layers for unit in layer.step(model, seen)]
        with torch.no_grad():
            for name, unit in ((name, unit) for layer, unit in found for name in layer.into):
                own = model.get_submodule(name)
                own.weight[unit] = new = bio.get_submodule(name).weight[unit]
                assert 0 < new.abs().max() <= largest[f"{name}.weight"]
                own.bias[unit] = 0
                for p in (own.weight, own.bias):
                    plain.state[p]["exp_avg"][unit] = plain.state[p]["exp_avg_sq"][unit] = 0
            for name, units, unit in ((name, len(layer.age), unit) for layer, unit in found for name in layer.out_of):
                own = model.get_submodule(name)
                moments = plain.state[own.weight]
                for x in (own.weight, moments["exp_avg"], moments["exp_avg_sq"]):
                    clear_outgoing(own, x, unit, units)
    for p, q in zip(biofx.fold(bio).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for (_, p), q in zip(stored_parameters(bio), model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][key], plain.state[q][key])
    for layer in layers:
        synapses = bio.get_submodule(f"{layer.into[0]}.weight_synapses")
        torch.testing.assert_close(synapses.unit_utility, torch.tensor(layer.utility).double())
        assert synapses.unit_age.tolist() == layer.age
        assert int(synapses.units_replaced) == layer.replaced > 5
    biofx.verify(bio)


def test_only_the_absence_of_the_old_unit_shows_in_outputs(network):
    model, batches, _, layers = network
    bio, optimizer = attached(model, lr=0.0, replacement_rate=0.25, maturity=0)
    step(bio, optimizer, batches[0])
    for layer in layers:
        ages = bio.get_submodule(f"{layer.into[0]}.weight_synapses").unit_age.tolist()
        assert ages.count(0) == 1
        with torch.no_grad():
            for name in layer.out_of:
                own = model.get_submodule(name)
                clear_outgoing(own, own.weight, ages.index(0), len(ages))
    torch.testing.assert_close(bio(batches[1]), model(batches[1]))


def test_new_synapses_are_spread_as_the_weight_was():
    model = nn.Sequential(nn.Linear(400, 50), nn.ReLU(), nn.Linear(50, 1))
    bio, optimizer = attached(model, lr=0.0, replacement_rate=1.0, maturity=0)
    step(bio, optimizer, torch.randn(4, 400))
    new, old = bio[0].weight.detach(), model[0].weight.detach()
    assert int(bio[0].weight_synapses.units_replaced) == 50
    torch.testing.assert_close(new.std(), old.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(new.abs().max(), old.abs().max(), rtol=0.02, atol=0)
    assert torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1].abs() < 0.03


def test_layers_are_judged_side_by_side():
    """Each layer of a batch does what it does alone; with rates of their own."""
    torch.manual_seed(1)
    rates, contributions = torch.tensor([0.05, 0.2]), torch.rand(40, 2, 5)
    options = {"maturity": 3, "decay": 0.8}

    def run(rate, contributions):
        shape = contributions.shape[1:]
        state = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[:-1])
        masks = []
        for contribution in contributions:
            *state, mask = next_layer_state(*state, contribution, rate=rate, **options)
            masks.append(mask)
        return torch.stack(masks)

    together = run(rates, contributions)
    assert (together.sum((0, 2)) > 5).all()
    for index in range(2):
        assert torch.equal(together[:, index], run(rates[index], contributions[:, index]))


def test_the_young_are_protected():
    bio, optimizer = attached(mlp(), replacement_rate=1.0, maturity=5)
    for age in (1, 2, 3, 4, 5, 0, 1):
        step(bio, optimizer, torch.randn(8, 3))
        assert bio[0].weight_synapses.unit_age.tolist() == [age] * 7


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_run_resumes_bit_for_bit(optimizer):
    model, batches = mlp(), torch.randn(40, 8, 3)
    bio, held = attached(model, optimizer)
    for x in batches[:20]:
        step(bio, held, x)
    saved = copy.deepcopy((bio.state_dict(), held.state_dict()))
    other, again = attached(mlp(), optimizer)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for x in batches[20:]:
        step(bio, held, x)
        step(other, again, x)
    assert int(bio[0].weight_synapses.units_replaced) > 3
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in bio.state_dict().items())


def test_nothing_happens_where_nothing_is_seen():
    bio, optimizer = attached(mlp().eval(), lr=0.0, replacement_rate=1.0, maturity=0)
    before = copy.deepcopy(bio.state_dict())
    step(bio, optimizer, torch.randn(8, 3))
    own = {key: value for key, value in bio.state_dict().items() if not key.endswith(".steps")}
    assert all(torch.equal(value, before[key]) for key, value in own.items())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x):
        h = F.relu(self.body(x))
        return self.heads[0](h), self.heads[1](h)


def test_a_layer_acts_when_all_its_weights_learn():
    bio = biofx.transform(TwoHeads(), [passes.ContinualBackprop(replacement_rate=0.25, maturity=0)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    counts = []
    for heads in ((0,), (0, 1), (1,), (0, 1)):
        optimizer.zero_grad()
        outputs = bio(torch.randn(8, 3))
        sum(outputs[head].sum() for head in heads).backward()
        optimizer.step()
        counts.append(int(bio.body.weight_synapses.units_replaced))
    assert counts == [0, 1, 1, 2]
    absent = [(head.weight == 0).all(0) for head in bio.heads]
    assert torch.equal(*absent)
    assert absent[0].any()


# --- With other rules


def test_synapses_add_up_to_connections():
    model = nn.Sequential(nn.Linear(400, 50), nn.ReLU(), nn.Linear(50, 3))
    bio, optimizer = attached(model, lr=0.0, replacement_rate=1.0, maturity=0, pipeline=[passes.SplitSynapses(3)])
    step(bio, optimizer, torch.randn(4, 400))
    torch.testing.assert_close(bio[0].weight.detach().std(), model[0].weight.detach().std(), rtol=0.03, atol=0)
    assert not bio.get_parameter("2.weight").any()


@pytest.mark.parametrize("constraint", ["project", "abs"])
@pytest.mark.parametrize("synapses", [1, 2])
def test_new_synapses_have_the_signs_of_their_units(constraint, synapses):
    model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 3))
    signs = passes.DalesPrinciple(constraint=constraint)
    bio, optimizer = attached(
        model, lr=0.0, replacement_rate=0.5, maturity=0, pipeline=[signs, passes.SplitSynapses(synapses)]
    )
    site = biofx.weight_sites(bio)["2.weight"]

    def totals():
        weight = site.effective().detach()
        return torch.stack([weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1)]).mean(1)

    before = totals()
    step(bio, optimizer, torch.randn(4, 20))
    biofx.verify(bio)
    replaced = bio[2].weight_synapses.unit_age == 0
    assert int(replaced.sum()) == 30
    assert (site.effective()[replaced] != 0).double().mean() > 0.4  # a half is read from units that are new themselves
    silent = bio[0].weight_synapses.unit_age == 0
    assert not site.effective()[:, silent].any()
    step(bio, optimizer, torch.randn(4, 20))
    biofx.verify(bio)
    assert (totals().abs() < 1.2 * before.abs()).all()


# --- What is left alone


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h), h


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (Returned, {}, "the model returns what its units compute, also without another weight"),
        (lambda: nn.Linear(3, 2), {}, "it computes what the model returns"),
        (mlp, {"exclude": "2.weight"}, "its units are read by 2.weight, and"),
        (mlp, {"pipeline": [passes.GroupUnits(1)]}, "other units have a part in what they return"),
        (mlp, {"exclude": "2.bias"}, "its units are not replaced: its bias is excluded"),
        (mlp, {"pipeline": [passes.DalesPrinciple(constraint="softplus")]}, "synapses of 0 could never grow"),
    ],
)
def test_what_is_left_alone_and_why(build, options, reason):
    torch.manual_seed(0)
    pipeline = options.pop("pipeline", [])
    bio = biofx.transform(build(), [passes.ContinualBackprop(), *pipeline], **options)
    assert reason in " ".join(str(biofx.summary(bio)).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replacement_rate": 0}, "replacement_rate must be a number > 0 and ≤ 1, got 0"),
        ({"maturity": -1}, "maturity must be an integer ≥ 0, got -1"),
        ({"decay": 1}, "decay must be a number ≥ 0 and < 1, got 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.ContinualBackprop(**options)


def test_new_synapses():
    uniform, bounds = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([2.0, 3.0, 5.0])
    assert fresh(uniform, None, bounds).tolist() == [-2, -1, 2]
    assert fresh(uniform, torch.tensor([0.0, 1.0, -1.0]), bounds).tolist() == [-2, 0.75, -5]


def replaced_and_remarks(model, *others):
    bio = biofx.transform(model, [passes.ContinualBackprop(0.5, maturity=0), *others], example_inputs=torch.randn(4, 6))
    return bio, {name: str(site.state("units_replaced")) for name, site in biofx.weight_sites(bio).items()}


def test_similar_names_are_layers_of_their_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential()
            self.a.b = nn.Linear(6, 8)
            self.a__b, self.a_0b = nn.Linear(8, 5), nn.Linear(5, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.a_0b(self.a__b(self.a.b(x).relu()).relu()).relu())

    bio, _ = replaced_and_remarks(Named())
    optimizer = torch.optim.Adam(bio.parameters())
    biofx.attach(bio, optimizer)
    bio(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    counts = {n: int(s.state("units_replaced")) for n, s in biofx.weight_sites(bio).items() if n != "out.weight"}
    assert counts == {"a.b.weight": 4, "a__b.weight": 2, "a_0b.weight": 2}


def test_a_bias_that_others_use_is_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            self.c.bias = self.a.bias

        def forward(self, x):
            return self.out(self.a(x).relu() * self.c(x).relu())

    bio, _ = replaced_and_remarks(Shared())
    assert "its operator's bias is also that of others" in str(biofx.summary(bio)).replace("\n    ", " ")


def test_rules_that_would_keep_units_silent_are_excluded():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    bio, found = replaced_and_remarks(model, passes.InhibitoryInterneurons(0.3))
    assert set(found.values()) == {"None"}
    assert "its interneurons would go on inhibiting" in str(biofx.summary(bio)).replace("\n    ", " ")
    bio, found = replaced_and_remarks(model, passes.ExponentiatedGradient())
    assert found["0.weight"] == found["2.weight"] == "tensor(0)"
    assert all("exponentiated-gradient" not in site.passes for site in biofx.weight_sites(bio).values())
    assert "which could never grow under this rule" in str(biofx.summary(bio)).replace("\n    ", " ")
