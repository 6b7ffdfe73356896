"""What is not finite is refused before the step, or stops the rules alone on a device that is not waited for."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.base.errors import LifecycleError
from biofx.training import finite
from training.test_costs import WAITS, operators_of_a_step
from training_runs import IMAGES, LABELS, start, states, train

RULES = (
    "split-synapses{synapses=2},fuzzy-learning-rates{distribution=lognormal},volume-dependent-learning-rates,"
    "l1-regularization{strength=0.01},crystallize,synaptic-scaling{on=weight},rejuvenate,dales-principle{balance=False}"
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["gradient", "weight"])
def test_what_is_not_finite_is_refused_and_nothing_changes(what, value):
    bio, optimizer, _ = start()
    train(bio, optimizer, 1)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    raw = bio.get_parameter("2.weight")
    with torch.no_grad():
        (raw.grad if what == "gradient" else raw)[0, 0, 0] = value
    before = states(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match=f"2.weight: its {what} is not finite"):
        optimizer.step()
    torch.testing.assert_close(states(bio, optimizer), before, rtol=0, atol=0, equal_nan=True)


def test_a_step_at_which_no_rule_acts_is_as_without_biofx():
    bio, optimizer, _ = start("rejuvenate{every=2}")
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    bio.get_parameter("2.weight").grad[0, 0] = float("nan")
    optimizer.step()
    assert bio.get_parameter("2.weight").isnan().sum() == 1
    with pytest.raises(biofx.LifecycleError, match="2.weight: its weight is not finite"):  # the cause of the gradient
        optimizer.step()


@dataclass(frozen=True)
class Breaks(passes.Pass):
    name = "breaks"
    slot = passes.Slot.HOOK
    preserves_function = True
    moment = passes.Moment.GAIN

    def rewrite(self, site, edit):
        edit.insert(torch.ops.biofx.scale_grad, edit.state("breaks_gain", torch.ones(site.shape)))

    def at_step(self, weights):
        next(w for w in weights if w.name == "0.weight").state("breaks_gain").fill_(float("nan"))


@pytest.mark.parametrize("waits", [True, False])
def test_a_rule_whose_state_is_not_finite_is_named(waits, monkeypatch):
    monkeypatch.setattr(finite, "is_waited_for", lambda device: waits)
    with pytest.raises(LifecycleError, match=r"0\.weight: its weight .*why: 0\.weight: breaks_gain of breaks$"):
        trained([Breaks()])
    bio, *_ = trained([Breaks()], steps=1)
    with pytest.raises(
        biofx.VerificationError, match=r"0\.weight: the weight is not finite, nor is breaks_gain of bre"
    ):
        biofx.verify(bio)


# --- a device that is not waited for -----------------------------------------------------------------------------


@pytest.fixture
def without_waiting(monkeypatch):
    monkeypatch.setattr(finite, "is_waited_for", lambda device: False)


def trained(pipeline, broken=(), steps=3):
    """A model, its optimizer and its weights after every step; at some steps a gradient is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    bio = biofx.transform(model, pipeline, example_inputs=(torch.randn(5, 6),))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1, momentum=0.9)
    attachment = biofx.attach(bio, optimizer)
    after = []
    for step in range(steps):
        optimizer.zero_grad()
        bio(torch.randn(5, 6)).square().sum().backward()
        if step in broken:
            biofx.weight_sites(bio)["0.weight"].raw.grad.view(-1)[3] = float(broken[step])
        optimizer.step()
        after.append(copy.deepcopy(bio.state_dict()))
    return bio, optimizer, attachment, after


def test_the_numbers_are_those_of_a_step_that_waits(monkeypatch):
    *_, waited = trained(RULES)
    monkeypatch.setattr(finite, "is_waited_for", lambda device: False)
    *_, other = trained(RULES)
    torch.testing.assert_close(other, waited, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("without_waiting")
def test_nothing_is_read():
    bio, optimizer, *_ = trained(RULES, steps=1)
    counted = operators_of_a_step(bio, optimizer, torch.randn(4, 6))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    own = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    expected = operators_of_a_step(plain, own, torch.randn(4, 6))
    assert [counted[name] for name in WAITS] == [expected[name] for name in WAITS]


@pytest.mark.usefixtures("without_waiting")
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_the_optimizers_alone(value):
    pipeline = "fuzzy-learning-rates,crystallize,synaptic-scaling{on=weight},rejuvenate{dre=1.0}"
    bio, optimizer, _, (before, after) = trained(pipeline, broken={1: value}, steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    own = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # The optimizer's own step, from the same weights with the same gradients and momentum.
    for (name, parameter), trained_one in zip(model.named_parameters(), _parameters(bio), strict=True):
        parameter.data.copy_(before[_stored(bio, name)])
        parameter.grad = trained_one.grad.clone()
    momentum = _momentum_before(pipeline)
    for parameter, buffer in zip(model.parameters(), momentum, strict=True):
        own.state[parameter]["momentum_buffer"] = buffer
    own.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, after[_stored(bio, name)], rtol=0, atol=0, equal_nan=True)
    for parameter, trained_one in zip(model.parameters(), _parameters(bio), strict=True):
        found, expected = (o.state[p]["momentum_buffer"] for o, p in ((optimizer, trained_one), (own, parameter)))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for key in before:
        if key.endswith(("gain", "replaced")):
            assert torch.equal(before[key], after[key])


def _stored(bio, name):
    return next(key for key in bio.state_dict() if key in (name, f"{name}_synapses.{name.rpartition('.')[2]}"))


def _parameters(bio):
    """Parameters in the order of the original's."""
    return [bio.get_parameter(name) for name in ("0.weight", "0.bias", "2.weight", "2.bias")]


def _momentum_before(pipeline):
    bio, optimizer, *_ = trained(pipeline, steps=1)
    return [optimizer.state[p]["momentum_buffer"] for p in _parameters(bio)]


@pytest.mark.usefixtures("without_waiting")
@pytest.mark.parametrize("ask", ["step", "check", "detach", "verify"])
def test_it_is_told_as_soon_as_the_host_knows(ask):
    bio, optimizer, attachment, _ = trained(RULES, broken={2: "nan"})
    asked = {
        "step": optimizer.step,
        "check": attachment.check,
        "detach": attachment.detach,
        "verify": lambda: biofx.verify(bio),
    }
    with pytest.raises(LifecycleError, match=r"0\.weight: its gradient was not finite at an earlier step"):
        asked[ask]()
    attachment.check()  # said once


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.Linear(6, 4) for name in "abc"})

    def forward(self, x, names="abc"):
        return sum(self.branches[name](x) for name in names)


@pytest.mark.usefixtures("without_waiting")
@pytest.mark.parametrize("taking_part", [["ab", "a"], ["abc", "a"], ["c", "abc", "ac"], ["ab", "cab", "c"]], ids=str)
def test_the_weight_told_is_that_of_the_step(taking_part, monkeypatch):
    x = torch.randn(5, 6)
    bio = biofx.transform(Branches(), "crystallize", example_inputs=(x,), frontend="module")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    attachment = biofx.attach(bio, optimizer)
    # The host asks after the last step, as if no answer had arrived before.
    monkeypatch.setattr(attachment.finite, "refuse_if_known", lambda: None)
    for names in taking_part:
        optimizer.zero_grad()
        bio(x, names).sum().backward()
        if "b" in names:
            bio.branches["b"].weight_synapses.weight.grad[0, 0] = float("nan")
        optimizer.step()
    with pytest.raises(LifecycleError, match=r"^branches\.b\.weight: its gradient was not finite"):
        attachment.check()


@pytest.mark.usefixtures("without_waiting")
def test_an_error_on_the_way_out_is_not_hidden():
    *_, attachment, _ = trained(RULES, broken={2: "nan"})
    with pytest.raises(ZeroDivisionError), attachment:
        raise ZeroDivisionError
    assert not attachment.weights
