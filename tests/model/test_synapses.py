"""A weight means one thing: what its synapses make of what is stored, whoever reads it."""

import copy
import pickle
import subprocess
import sys
import textwrap
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from biofx.base.errors import ArgumentError, BiofxError
from biofx.model.owners import give_synapses, remove_synapses
from biofx.model.slots import Inserted, Slot
from biofx.model.synapses import Link, State, stored, stored_parameters, synapses_in, synapses_of

SUM = Link(torch.sum, (0,), Inserted(("split-synapses",), "weight", Slot.SUM))
HOOK = Link(torch.ops.biofx.scale_grad, (0.5,), Inserted(("fuzzy-learning-rates",), "weight", Slot.HOOK))


def layer(*links, synapses=2):
    """A layer whose weight has synapses, and the weight that they make."""
    torch.manual_seed(0)
    fc = nn.Linear(4, 3).double()
    weight = fc.weight.detach().clone()
    child = give_synapses([(fc, "weight")], fc.weight)
    if SUM in links:
        child.weight = nn.Parameter(torch.stack([weight * 0.25, weight * 0.75][:synapses]))
    for link in links:
        child.insert(link)
    return fc, weight


X = torch.randn(5, 4, dtype=torch.float64)

# --- reading -----------------------------------------------------------------------------------------------------


def test_the_attribute_is_the_weight():
    fc, weight = layer(SUM, HOOK)
    assert torch.equal(fc.weight, weight)
    assert torch.equal(fc(X), F.linear(X, weight, fc.bias))
    assert torch.equal(F.linear(X, fc.weight, fc.bias), fc(X))


def test_gradients_reach_what_is_stored():
    fc, weight = layer(SUM, HOOK)
    plain = nn.Parameter(weight)
    fc(X).square().sum().backward()
    F.linear(X, plain, fc.bias.detach()).square().sum().backward()
    for synapse in fc.weight_synapses.weight.grad:
        torch.testing.assert_close(synapse, plain.grad * 0.5, rtol=1e-12, atol=0)


def test_links_are_in_canonical_order_for_any_order_of_passes():
    a, b = layer(SUM, HOOK)[0], layer(HOOK, SUM)[0]
    assert a.weight_synapses.links == b.weight_synapses.links == (HOOK, SUM)


def test_without_links_the_attribute_is_the_parameter_itself():
    fc, _ = layer()
    assert fc.weight is fc.weight_synapses.weight
    assert isinstance(fc.weight, nn.Parameter)


def test_names_end_as_those_of_the_original():
    fc, _ = layer(SUM)
    assert [name for name, _ in fc.named_parameters()] == ["bias", "weight_synapses.weight"]
    assert [name for name, _ in stored_parameters(fc)] == ["weight", "bias"]  # in the original's order
    assert stored(fc, "weight") is fc.get_parameter("weight") is fc.weight_synapses.weight


def test_a_name_that_a_module_has_for_itself_does():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.links = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ self.links

    model = Odd()
    bio = biofx.transform(model, "split-synapses")
    x = torch.randn(2, 3)
    torch.testing.assert_close(bio(x), model(x))
    assert biofx.fold(bio).state_dict().keys() == model.state_dict().keys()


def test_a_container_runs_the_children_that_it_had():
    class Chain(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.mix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            assert len(self) == 2
            for layer in self:
                x = layer(x)
            return x @ self.mix

    model, x = nn.Sequential(Chain(nn.Linear(4, 4), nn.Linear(4, 4)), nn.ReLU()), torch.randn(2, 4)
    for frontend in ("symbolic", "module"):
        bio = biofx.transform(model, "split-synapses", frontend=frontend)
        torch.testing.assert_close(bio(x), model(x))
        torch.testing.assert_close(bio[0](x), model[0](x))
        torch.testing.assert_close(bio.original_forward(x), model(x))


def test_a_forward_that_goes_through_its_children_is_told():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.a = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x @ self.mix

    with pytest.raises(BiofxError, match="split-synapses: Through fails after the pass"):
        biofx.transform(Through(), "split-synapses", frontend="module")


def test_an_error_while_computing_is_not_a_missing_attribute():
    fc, _ = layer(SUM)
    fc.weight_synapses.links = (Link(lambda w: w.no_such_thing, (), Inserted(("broken",), "weight", Slot.SUM)),)
    with pytest.raises(RuntimeError, match="weight of Linear cannot be computed: .*no_such_thing"):
        fc(X)


def test_tied_weights_share_their_synapses():
    torch.manual_seed(0)
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    child = give_synapses([(embed, "weight"), (head, "weight")], embed.weight)
    child.insert(HOOK)
    assert embed.weight_synapses is head.weight_synapses
    assert [*synapses_in(model)] == ["0.weight"]
    assert synapses_of(model, "1.weight") is child
    remove_synapses(model)
    assert embed.weight is head.weight


class Tied(nn.Sequential):
    """An embedding, and a head that reads tokens with the same weight."""

    def __init__(self):
        super().__init__(nn.Embedding(7, 4), nn.Linear(4, 7))
        self[1].weight = self[0].weight


@pytest.mark.parametrize("inside", [False, True])
def test_functional_calls_leave_tied_weights_as_they_were(inside):
    tokens = torch.tensor([[1, 2, 3]])
    bio = biofx.transform(Tied(), "split-synapses,fuzzy-learning-rates", example_inputs=tokens)
    model = nn.Sequential(bio) if inside else bio
    present, before = {**dict(model.named_parameters()), **dict(model.named_buffers())}, model(tokens)
    doubled = {name: 2 * tensor.detach() for name, tensor in present.items()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(functional_call(model, doubled, (tokens,)), expected(tokens))
    assert {**dict(model.named_parameters()), **dict(model.named_buffers())}.items() == present.items()
    assert torch.equal(model(tokens), before)


def test_a_tensor_that_a_functional_call_left_is_an_error():
    bio = biofx.transform(Tied(), "split-synapses")
    functional_call(bio, bio.state_dict(), (torch.tensor([[1, 2, 3]]),), tie_weights=False)
    with pytest.raises(ArgumentError, match="0.weight has a tensor in place of its parameter, .* give it one"):
        biofx.fold(bio)


# --- promises ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "target", "args", "why"),
    [
        (Slot.HOOK, torch.mul, (2.0,), "mul cannot be a gradient hook: it changes the weight"),
        (Slot.HOOK, torch.sum, (0,), r"cannot be a gradient hook: it changes the shape from \(3, 4\) to \(4,\)"),
        (Slot.SIGN, torch.sum, (0,), r"cannot be a sign constraint: it changes the shape from \(3, 4\) to \(4,\)"),
        (
            Slot.HOOK,
            torch.ops.biofx.scale_grad,
            (State("gain"),),
            r"its gain of shape \(4, 3\) does not broadcast to the weight.s \(3, 4\)",
        ),
        (Slot.HOOK, torch.Tensor.float, (), "it returns torch.float32 for a weight of torch.float64"),
        (Slot.HOOK, torch.detach, (), "what it returns has no gradient, so the weight would not learn"),
        (Slot.SIGN, torch.detach, (), "what it returns has no gradient, so the weight would not learn"),
        (Slot.HOOK, torch.Tensor.tolist, (), "it returns list for a weight of torch.float64"),
        (Slot.INTERNEURONS, torch.sum, (0,), r"cannot be a pool of interneurons: it changes the shape"),
    ],
)
def test_a_link_does_what_its_slot_promises(slot, target, args, why):
    fc, _ = layer()
    fc.weight_synapses.keep("gain", torch.ones(4, 3), "doubles")
    with pytest.raises(biofx.PipelineError, match=f"^doubles: weight: .*{why}"):
        fc.weight_synapses.insert(Link(target, args, Inserted(("doubles",), "weight", slot)))
    assert fc.weight_synapses.links == ()


def test_state_that_is_a_parameter_is_trained_if_the_weight_is():
    for is_trained in (True, False):
        fc, _ = layer()
        fc.weight_synapses.stored.requires_grad_(is_trained)
        fc.weight_synapses.keep("slope", nn.Parameter(torch.tensor(2.0).double()), "mine")
        fc.weight_synapses.insert(Link(torch.mul, (State("slope"),), Inserted(("mine",), "weight", Slot.INTERNEURONS)))
        assert torch.equal(fc.weight, 2 * fc.weight_synapses.stored)
        slope = dict(fc.named_parameters())["weight_synapses.slope"]
        assert slope.requires_grad is is_trained
        if is_trained:
            fc.weight.sum().backward()
            torch.testing.assert_close(slope.grad, fc.weight_synapses.stored.sum())


# --- once --------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """Calls one layer many times."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, steps=100):
        for _ in range(steps):
            x = torch.tanh(self.fc(x))
        return x if bool(x.isfinite().all()) else x * 0  # cannot be traced


def counted(monkeypatch):
    """Counts how often weights are computed."""
    from biofx.model.synapses import Synapses

    calls, compute = [], Synapses.forward
    monkeypatch.setattr(Synapses, "forward", lambda self, *a, **k: (calls.append(self), compute(self, *a, **k))[1])
    return calls


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_loop_computes_a_weight_once(frontend, monkeypatch):
    bio = biofx.transform(Loop(), "split-synapses", frontend=frontend)
    calls = counted(monkeypatch)
    bio(torch.randn(2, 4)).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        bio(torch.randn(2, 4))
    assert len(calls) == 2


def test_calls_of_a_model_do_not_share_what_they_computed():
    bio = biofx.transform(Loop(), "split-synapses", frontend="module")
    x, stored_weight = torch.randn(2, 2, 4), biofx.weight_sites(bio)["fc.weight"].raw
    losses, slopes = [bio(part).sum() for part in x], []
    for loss in losses:
        slopes += torch.autograd.grad(loss, stored_weight)  # each frees what it saved
    alone = [torch.autograd.grad(bio(part).sum(), stored_weight)[0] for part in x]
    assert slopes[0].any()
    torch.testing.assert_close(slopes, alone)


def test_what_was_computed_without_gradients_is_not_reused():
    class NoGradFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                target = self.fc(x)
            return (self.fc(x) - target + 1).square()

    model = NoGradFirst()
    bio = biofx.transform(model, [passes.SplitSynapses(compensate=False)])
    x = torch.randn(3, 4)
    model(x).sum().backward()
    bio(x).sum().backward()
    torch.testing.assert_close(biofx.weight_sites(bio)["fc.weight"].raw.grad[1], model.fc.weight.grad)


def test_what_changes_inside_of_a_forward_is_seen():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            first = self.fc(x)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.mul_(0.5)
            return first, self.fc(x)

    halves = Halves()
    child = give_synapses([(halves.fc, "weight")], halves.fc.weight)
    child.weight = nn.Parameter(torch.stack([child.weight.detach() / 2] * 2))
    child.insert(SUM)
    from biofx.model import weight_cache

    with weight_cache.caching():
        first, second = halves(torch.randn(3, 4))
    torch.testing.assert_close(second, first * 0.5)


class FreezesTheCritic(nn.Module):
    """An actor learns from a critic that is frozen while it does, and that learns in the same forward."""

    def __init__(self, first):
        super().__init__()
        self.actor, self.critic, self.first = nn.Linear(4, 4), nn.Linear(4, 1), first

    def forward(self, x):
        outputs = []
        for frozen in (self.first, not self.first):
            self.critic.requires_grad_(not frozen)
            outputs.append(self.critic(self.actor(x) if frozen else x))
        self.critic.requires_grad_(True)
        return tuple(outputs)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses", "inhibitory-interneurons"])
def test_a_forward_may_freeze_a_weight_for_a_while(frontend, recipe, first):
    model, x = FreezesTheCritic(first).double(), torch.randn(5, 4, dtype=torch.float64)
    bio = biofx.transform(model, recipe, frontend=frontend, exclude=["actor.weight"], example_inputs=(x,))
    for each in (model, bio):
        sum(output.square().sum() for output in each(x)).backward()
    site = biofx.weight_sites(bio)["critic.weight"]
    (expected,) = torch.autograd.grad(site.effective(), site.raw, model.critic.weight.grad)
    torch.testing.assert_close(site.raw.grad, expected)


class LearnsInForward(nn.Module):
    """Runs a backward pass for each step of a sequence, as predictive coding and online learning do."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.readout = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        state, total = torch.zeros_like(x[0]), 0.0
        for step in x:
            state = torch.tanh(step + self.recurrent(state.detach()))
            error = self.readout(state).square().sum()
            if torch.is_grad_enabled():
                error.backward()
            total = total + error.detach()
        return total


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses", "inhibitory-interneurons", "volume-dependent-learning-rates"])
def test_a_forward_may_run_backward_several_times(frontend, recipe):
    model, x = LearnsInForward().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    bio = biofx.transform(model, recipe, frontend=frontend)
    torch.testing.assert_close(bio(x), model(x))
    torch.testing.assert_close(bio.readout.bias.grad, model.readout.bias.grad)
    for name, site in biofx.weight_sites(bio).items():
        if recipe != "volume-dependent-learning-rates":  # which draws gains
            (expected,) = torch.autograd.grad(site.effective(), site.raw, model.get_parameter(name).grad)
            torch.testing.assert_close(site.raw.grad, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_checkpoints_compute_weights_again(frontend, reentrant):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return checkpoint(lambda x: self.head(self.fc(x).relu()), self.embed(i), use_reentrant=reentrant)

    torch.manual_seed(0)
    model, i = Tied().double(), torch.tensor([1, 2])
    bio = biofx.transform(model, "split-synapses", frontend=frontend)
    for each in (model, bio):
        each(i).square().sum().backward()
    for name, site in biofx.weight_sites(bio).items():
        torch.testing.assert_close(site.raw.grad.sum(0), model.get_parameter(name).grad)


def test_an_exception_leaves_nothing_behind(monkeypatch):
    bio = biofx.transform(Loop(), "split-synapses", frontend="module")
    with pytest.raises(RuntimeError):
        bio(torch.randn(2, 5))
    calls = counted(monkeypatch)
    bio(torch.randn(2, 4))
    assert len(calls) == 1


# --- writing -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def without_gradients(write, weight):
    return write(weight)


WRITES = {
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "ones_": nn.init.ones_,
    "data.mul_": lambda w: w.data.mul_(2),
    "data[0].zero_": lambda w: w.data[0].zero_(),
    "data.t().zero_": lambda w: w.data.t().zero_(),
    "data =": lambda w: setattr(w, "data", torch.zeros(3, 4)),
    "copy_": lambda w: w.copy_(torch.zeros(3, 4)),
    "set_": lambda w: w.set_(torch.zeros(3, 4, dtype=w.dtype)),
    "[0] =": lambda w: w.__setitem__(0, 9.0),
    "[0].zero_": lambda w: w[0].zero_(),
    "view.mul_": lambda w: w.view(-1).mul_(2),
    "detach.mul_": lambda w: w.detach().mul_(2),
    "+=": lambda w: w.__iadd__(1),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.mul(w, 2, out=w),
    "zero_": lambda w: torch.zero_(w),
    "numpy": lambda w: w.detach().numpy().__imul__(2),
    "max_norm": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.1),
    "clamp_": lambda w: w.clamp_(0, 0.01),
    "requires_grad_": lambda w: w.requires_grad_(not w.requires_grad),
    "requires_grad =": lambda w: setattr(w, "requires_grad", not w.requires_grad),
    "grad =": lambda w: setattr(w, "grad", torch.zeros(3, 4)),
    "register_hook": lambda w: w.register_hook(lambda g: g * 2),
}


OF_THE_TENSOR = {"set_", "register_hook"}
OF_THE_PARAMETER = {"grad =", "requires_grad_", "requires_grad ="}
FREEZES = {"requires_grad_", "requires_grad ="}


def written_then_read(fc, write):
    """Where a weight can be written at first, it is noticed when it is read next."""
    without_gradients(write, fc.weight)
    fc(X)


@pytest.mark.parametrize("write", [write for name, write in WRITES.items() if name not in FREEZES])
def test_a_write_into_a_weight_that_is_computed_raises(write):
    fc, weight = layer(SUM)
    with pytest.raises((BiofxError, ValueError), match="would be lost|read-only"):
        written_then_read(fc, write)
    assert torch.equal(fc.weight_synapses(), weight)


def read_again(bio):
    return bio.fc.weight


@pytest.mark.parametrize(
    "then", [read_again, biofx.fold, biofx.verify, copy.deepcopy, pickle.dumps, nn.Module.state_dict, biofx.summary]
)
@pytest.mark.parametrize("write", ["[0].zero_", "foreach", "out"])
def test_a_write_into_an_earlier_read_is_noticed(write, then):
    """Whatever asks for the weight next says so, however often it was read since."""
    bio = biofx.transform(nn.Sequential(OrderedDict(fc=nn.Linear(4, 3))), "split-synapses")
    weights = [bio.fc.weight for _ in range(3)]
    without_gradients(WRITES[write], weights[0])
    with pytest.raises(ArgumentError, match="would be lost"):
        then(bio)
    then(bio)


def test_weights_that_are_gone_are_not_watched():
    bio = biofx.transform(nn.Sequential(OrderedDict(fc=nn.Linear(4, 3))), "split-synapses")
    for _ in range(5):
        bio.fc.weight.norm()
    assert len(vars(bio.fc.weight_synapses)["_probes"]) <= 2


@pytest.mark.parametrize(
    "write", [write for name, write in WRITES.items() if name not in OF_THE_TENSOR | OF_THE_PARAMETER]
)
def test_a_write_into_a_weight_that_is_stored_takes_effect(write):
    fc, weight = layer(HOOK)
    without_gradients(write, fc.weight)
    assert not torch.equal(fc.weight_synapses.weight, weight)
    assert torch.equal(fc.weight, fc.weight_synapses.weight)


@pytest.mark.parametrize("name", sorted(OF_THE_TENSOR))
def test_what_belongs_to_one_tensor_is_refused(name):
    fc, _ = layer(HOOK)
    with pytest.raises(ArgumentError, match="would be lost"):
        without_gradients(WRITES[name], fc.weight)


@pytest.mark.parametrize("links", [(HOOK,), (HOOK, SUM)])
def test_swapping_a_weight_with_another_tensor_is_refused(links):
    """It would swap a temporary tensor."""
    fc, weight = layer(*links)
    with pytest.raises(RuntimeError, match="Cannot swap"):
        torch.utils.swap_tensors(fc.weight, nn.Parameter(torch.zeros(3, 4)))
    assert torch.equal(fc.weight, weight)


@pytest.mark.parametrize("links", [(HOOK,), (HOOK, SUM)])
def test_freezing_freezes_what_is_stored(links):
    fc, _ = layer(*links)
    fc.weight.requires_grad_(False)
    assert not fc.weight_synapses.weight.requires_grad
    fc.weight.requires_grad = True
    assert fc.weight_synapses.weight.requires_grad


def test_a_detached_weight_has_gradients_of_its_own():
    fc, _ = layer(HOOK, SUM)
    weight = fc.weight.detach()
    assert not weight.requires_grad
    assert weight.grad is None
    weight.requires_grad_().sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))
    assert fc.weight_synapses.weight.grad is None
    assert fc.weight.requires_grad


def test_gradients_are_those_of_what_is_stored():
    fc, _ = layer(HOOK)
    fc(X).sum().backward()
    assert fc.weight.grad is fc.weight_synapses.weight.grad is not None
    fc.weight.grad = None
    assert fc.weight_synapses.weight.grad is None


def test_reset_parameters_and_apply():
    fc, _ = layer(SUM)
    with pytest.raises(ArgumentError, match="would be lost"):
        fc.reset_parameters()
    fc, weight = layer(HOOK)
    fc.reset_parameters()
    assert not torch.equal(fc.weight, weight)


def test_the_graph_notices_a_write_too():
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "split-synapses")
    with torch.no_grad():
        bio[0].weight[0].zero_()
    with pytest.raises(ArgumentError, match="would be lost"):
        bio(torch.randn(2, 4))
    bio(torch.randn(2, 4))


def test_a_weight_can_be_looked_at():
    fc, weight = layer(SUM)
    assert fc.weight.detach().numpy().shape == (3, 4)
    torch.testing.assert_close(fc.weight.cpu(), weight)
    assert type(fc.weight + 1) is type(copy.deepcopy(fc.weight)) is torch.Tensor
    assert type(pickle.loads(pickle.dumps(fc.weight))) is torch.Tensor
    assert "grad_fn" in repr(fc.weight)


# --- assignment --------------------------------------------------------------------------------------------------


def test_a_weight_that_is_assigned_shares_its_synapses():
    (a, weight), (b, _) = layer(SUM), layer(HOOK)
    b.weight = a.weight
    assert b.weight_synapses is a.weight_synapses
    assert torch.equal(b.weight, weight)


def test_a_parameter_takes_the_place_of_synapses():
    fc, _ = layer(SUM)
    fc.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    assert [name for name, _ in fc.named_parameters()] == ["weight", "bias"]
    assert torch.equal(fc(X), fc.bias.expand(5, 3))


@pytest.mark.parametrize("value", [torch.zeros(3, 4), None, 1.0])
def test_all_else_is_refused(value):
    fc, weight = layer(SUM)
    with pytest.raises(ArgumentError, match="weight of Linear cannot become a"):
        fc.weight = value
    with pytest.raises(ArgumentError, match="cannot be deleted"):
        del fc.weight
    assert torch.equal(fc.weight, weight)


def test_what_rewrites_weights_has_to_come_before():
    fc, weight = layer(SUM)
    for rewrite in (
        lambda: nn.utils.prune.l1_unstructured(fc, "weight", 0.5),
        lambda: nn.utils.parametrizations.spectral_norm(fc),
    ):
        with pytest.raises(ArgumentError, match="fold the model first|would be lost"):
            rewrite()
        assert torch.equal(fc.weight, weight)


# --- copies and files --------------------------------------------------------------------------------------------


def test_copies_are_independent():
    fc, weight = layer(SUM, HOOK)
    other = copy.deepcopy(fc)
    with torch.no_grad():
        other.weight_synapses.weight.zero_()
    assert torch.equal(fc.weight, weight)
    assert bool((other.weight == 0).all())
    assert isinstance(other, nn.Linear)


def test_a_fresh_process_loads_a_pickle(tmp_path):
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), [passes.SplitSynapses(), passes.Crystallize()])
    x = torch.randn(5, 4)
    torch.save((bio, x, bio(x)[0].detach()), tmp_path / "model.pt")
    program = f"""
        import torch
        bio, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(bio(x)[0], y)
        assert torch.equal(bio.original_forward(x)[0], y)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def earlier_names(bio):
    """A checkpoint with the names that weights and state had before they had a child."""
    return {k.replace("_synapses.weight", "").replace("_synapses.", "_"): v for k, v in bio.state_dict().items()}


PIPELINE = [passes.SplitSynapses(synapses=3), passes.FuzzyLearningRates(), passes.Rejuvenate()]


def test_checkpoints_of_earlier_versions_load():
    torch.manual_seed(0)
    one = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), PIPELINE, seed=1)
    other = biofx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), PIPELINE, seed=2)
    state = earlier_names(one)
    assert {"0.weight", "0.weight_gain", "0.weight_steps"} <= state.keys()
    other.load_state_dict(state)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_checkpoints_of_the_original_load():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    bio = biofx.transform(copy.deepcopy(model), PIPELINE)
    gain = bio[0].weight_synapses.gain.clone()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    bio.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(bio(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(bio[0].weight_synapses.gain, gain)


def test_a_checkpoint_that_breaks_signs_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    bio = biofx.transform(model, [passes.SplitSynapses(), passes.DalesPrinciple()])
    before = copy.deepcopy(bio.state_dict())
    with pytest.raises(ArgumentError, match="load it into that, before transform: 2.weight violates the signs"):
        bio.load_state_dict(model.state_dict())
    assert all(torch.equal(bio.state_dict()[name], value) for name, value in before.items())
    folded = biofx.fold(bio)
    bio.load_state_dict(folded.state_dict())  # obeys them
    x = torch.randn(5, 4)
    torch.testing.assert_close(bio(x), folded(x))


def test_state_is_kept_by_name():
    fc, _ = layer()
    child = fc.weight_synapses
    child.keep("gain", torch.ones(3, 4), "fuzzy-learning-rates")
    assert child.share("gain", "crystallize", links=True) is child.gain
    assert child.users == {"gain": ("fuzzy-learning-rates", "crystallize")}
    assert child.state("sign") is None
    with pytest.raises(biofx.PipelineError, match="mine cannot keep a state called gain with a weight: the name is t"):
        child.keep("gain", torch.ones(1), "mine")
    child.insert(Link(torch.ops.biofx.scale_grad, (State("gain"),), Inserted(("mine",), "weight", Slot.HOOK)))
    assert "scale_grad" in repr(child)


@pytest.mark.parametrize("pipeline", ["split-synapses", "split-synapses,fuzzy-learning-rates,dales-principle"])
def test_split_weights_of_convolutions_become_channels_last(pipeline):
    bio = biofx.transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), pipeline)
    x = torch.randn(2, 3, 8, 8)
    before = bio(x)
    bio.to(memory_format=torch.channels_last)
    torch.testing.assert_close(bio(x.to(memory_format=torch.channels_last)), before)
    assert bio[0].weight_synapses.weight[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(bio.double()(x.double()), before.double(), rtol=1e-5, atol=1e-5)
