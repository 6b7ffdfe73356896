"""The guide to rules of one's own: its listings run, and the rule that it writes does what it says."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat
from test_documentation import readme_blocks

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (7, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2)), (3, 2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), (5, 3, 6)),
}


@pytest.fixture
def guide():
    names = {"__name__": "__main__"}
    for block in readme_blocks("python", "passes"):
        exec(compile(block, "passes/README.md", "exec"), names)
    return names


@pytest.fixture(params=NETWORKS)
def network(request):
    build, shape = NETWORKS[request.param]
    return build().double(), torch.randn(2, *shape, dtype=torch.float64)


def train(bio, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        bio(x).square().mean().backward()
        optimizer.step()


def activity(model, x):
    """The mean input and output of every layer with a weight, by its name."""
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    model(x)
    return {
        f"{name}.weight".lstrip("."): [z.transpose(0, 1).flatten(1).mean(1) for z in pair]
        for name, pair in seen.items()
    }


def product(site, pre, post, groups):
    """The product of the activities of every connection, by a loop over units."""
    result = torch.zeros(site.shape, dtype=torch.float64)
    transposed = site.presynaptic_axis == 0
    for i, z in enumerate(post):
        for j, x in enumerate(pre):
            inside, own = len(pre) // groups, i * groups // len(post)
            if transposed:
                result[j, i] = z * x
            elif j // inside == own:
                result[i, j % inside] = z * x
    return result


def test_the_trace_is_that_of_input_and_output(guide, network):
    model, batches = network
    bio = biofx.transform(model, [guide["HebbianTrace"](strength=0.7, memory=0.5)], example_inputs=batches[0])
    with biofx.attach(bio, optimizer := torch.optim.SGD(bio.parameters(), lr=0.0)):
        train(bio, optimizer, batches)
    sites = biofx.weight_sites(bio)
    seen = [activity(copy.deepcopy(model), x) for x in batches]
    for name, (first, second) in {name: (seen[0][name], seen[1][name]) for name in seen[0]}.items():
        old, new = (product(sites[name], *each, sites[name].groups) for each in (first, second))
        trace = 0.25 * old + 0.5 * new
        torch.testing.assert_close(sites[name].state("hebbian_trace"), trace)
        torch.testing.assert_close(sites[name].state("hebbian_gain"), torch.exp(0.7 * trace.tanh()))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_synapse_moves_by_its_gain(guide, network, kind):
    model, batches = network
    bio = biofx.transform(model, [guide["HebbianTrace"](strength=2.0, memory=0.0)], example_inputs=batches[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in (model, bio):
        optimizer = getattr(torch.optim, kind)(each.parameters(), lr=0.1)
        if each is bio:
            biofx.attach(bio, optimizer)
        train(each, optimizer, batches[:1])
    for name, site in biofx.weight_sites(bio).items():
        plain = dict(model.named_parameters())[name] - before[name]
        assert (site.state("hebbian_gain") != 1).any()
        torch.testing.assert_close(site.raw - before[name], site.state("hebbian_gain") * plain)


def test_a_run_resumes_from_a_checkpoint_to_the_bit(guide, network):
    model, batches = network

    def begin():
        bio = biofx.transform(model, "split-synapses,hebbian-trace", example_inputs=batches[0])
        optimizer = torch.optim.AdamW(bio.parameters(), lr=0.1)
        biofx.attach(bio, optimizer)
        return bio, optimizer

    whole, optimizer = begin()
    train(whole, optimizer, batches)
    first, optimizer = begin()
    train(first, optimizer, batches[:1])
    resumed, second = begin()
    resumed.load_state_dict(first.state_dict())
    second.load_state_dict(optimizer.state_dict())
    train(resumed, second, batches[1:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_has_no_units_on_its_input_is_left_alone(guide):
    bio = biofx.transform(nn.Embedding(5, 3), "hebbian-trace", example_inputs=torch.tensor([1, 2]))
    assert "embedding does not read its units on one axis" in flat(biofx.summary(bio))


def test_verify_asks_the_rule(guide):
    bio = biofx.transform(nn.Linear(2, 2), "hebbian-trace")
    biofx.weight_sites(bio)["weight"].state("hebbian_gain").zero_()
    with pytest.raises(biofx.VerificationError, match="its Hebbian gain is not positive"):
        biofx.verify(bio)


def test_the_hook_of_the_guide_follows_its_formula(guide):
    w = torch.tensor([0.5, -3.0], requires_grad=True)
    torch.ops.biofx.soft_bound_grad(w, 2.0).sum().backward()
    assert torch.equal(w.grad, torch.tensor([0.75, 0.0]))


@pytest.mark.parametrize("value", ["1.5", "lots"])
def test_options_are_checked_when_the_rule_is_made(guide, value):
    with pytest.raises(biofx.ArgumentError, match=f"HebbianTrace: memory must be a number ≥ 0 and < 1, got '?{value}"):
        biofx.transform(nn.Linear(2, 1), f"hebbian-trace{{memory={value}}}")


def test_two_rules_may_observe_a_weight_of_several_synapses(guide):
    pipeline = ["hebbian-trace", "split-synapses", "synaptic-scaling"]
    codes = {biofx.transform(nn.Linear(2, 2), ",".join(order)).code for order in itertools.permutations(pipeline)}
    assert len(codes) == 1


def test_a_refused_step_does_not_poison_the_trace(guide):
    model = nn.Linear(3, 2)
    bio = biofx.transform(model, "hebbian-trace")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match="not finite"):
        train(bio, optimizer, [torch.full((4, 3), torch.nan)])
    train(bio, optimizer, torch.randn(3, 4, 3))
    biofx.verify(bio)
    assert bio.weight.isfinite().all()
    assert bio.weight_synapses.hebbian_trace.isfinite().all()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_input, self.of_state = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x):
        state = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = (self.of_input(x[:, t]) + self.of_state(state)).tanh()
        return state


@pytest.mark.parametrize(
    ("build", "width", "frontend", "reaches"),
    [
        (Recurrent, 3, "symbolic", False),
        (Recurrent, 3, "export", True),
        (lambda: nn.GRU(3, 5, batch_first=True), 3, "symbolic", False),
        (lambda: nn.GRU(3, 5, batch_first=True), 3, "export", False),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), 8, "symbolic", False),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), 8, "export", True),
    ],
    ids=["loop of one's own", "exported loop", "GRU", "exported GRU", "Transformer", "exported Transformer"],
)
def test_observers_reach_the_layers_that_the_guide_names(guide, build, width, frontend, reaches):
    bio = biofx.transform(build(), "hebbian-trace", example_inputs=torch.randn(2, 4, width), frontend=frontend)
    assert {site.state("hebbian_trace") is not None for site in biofx.weight_sites(bio).values()} == {reaches}


@dataclass(frozen=True)
class EverySecond(passes.Pass):
    name = "every-second"
    slot = passes.Slot.HOOK
    preserves_function = True
    moment = passes.Moment.GAIN
    every: int = 2

    def rewrite(self, site, edit):
        edit.observe_input(torch.ops.biofx.sum_activity, site, "second_seen")
        edit.keep("second_mean", torch.zeros(site.presynaptic_units))

    def at_step(self, weights):
        for weight in weights:
            if weight.step % self.every == 0:
                weight.state("second_mean").copy_(weight.observed("second_seen"))


def test_a_rule_for_every_second_step_sees_both():
    bio = biofx.transform(nn.Linear(3, 2), [EverySecond()])
    biofx.attach(bio, optimizer := torch.optim.SGD(bio.parameters(), lr=0.1))
    batches = torch.randn(4, 5, 3)
    train(bio, optimizer, batches)
    torch.testing.assert_close(bio.weight_synapses.second_mean, batches[2:].abs().mean((0, 1)))
