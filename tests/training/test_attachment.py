"""Attachments: a weight obeys one optimizer at a time, and detaching leaves model and optimizer as they were."""

import copy
import gc
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import biofx
from biofx import ArgumentError, passes
from conftest import flat
from training_runs import EVERYTHING, GAINS, IMAGES, LABELS, OPTIMIZERS, network, start, train


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_attached_graph_is_plain(name):
    bio = biofx.transform(network(), GAINS)
    code = bio.code
    attachment = biofx.attach(bio, OPTIMIZERS[name](bio.parameters()))
    assert "torch.ops.biofx" not in bio.code
    assert bio.get_submodule("0").weight is bio.get_parameter("0.weight")
    biofx.verify(bio)
    attachment.detach()
    assert bio.code == code


@pytest.mark.parametrize("rewrite", [partial(prune.l1_unstructured, amount=0.5), parametrizations.spectral_norm])
def test_attached_weights_cannot_be_rewritten(rewrite):
    bio = biofx.transform(network(), GAINS)
    biofx.attach(bio, torch.optim.SGD(bio.parameters(), 0.1))
    names = [name for name, _ in bio.named_parameters()]
    with pytest.raises(ArgumentError, match="fold the model first"):
        rewrite(bio.get_submodule("0"), "weight")
    assert [name for name, _ in bio.named_parameters()] == names
    biofx.verify(bio)


def test_a_forward_may_keep_an_attached_weight():
    class Keeper(nn.Linear):
        def forward(self, x):
            self.last = self.weight
            return super().forward(x)

    bio = biofx.transform(nn.Sequential(Keeper(4, 4), nn.Linear(4, 2)), GAINS, frontend="module")
    optimizer = torch.optim.SGD(bio.parameters(), 0.1)
    biofx.attach(bio, optimizer)
    for _ in range(2):
        bio(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    biofx.verify(bio)
    torch.testing.assert_close(biofx.fold(bio)(torch.ones(1, 4)), bio(torch.ones(1, 4)))


class Agent:
    def __init__(self):
        self.bio, self.optimizer, self.attachment = start()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_copies_of_an_attachment_are_detached(copied):
    agent = Agent()
    train(agent.bio, agent.optimizer, 2)
    other = copied(agent)
    assert (other.attachment.bio, other.attachment.optimizer) == (other.bio, other.optimizer)
    assert other.attachment.weights == ()
    assert "no weights" in repr(other.attachment)
    other.attachment.detach()
    biofx.attach(other.bio, other.optimizer)
    train(agent.bio, agent.optimizer, 2)
    train(other.bio, other.optimizer, 2)
    ours, theirs = agent.bio.state_dict(), other.bio.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert set(agent.attachment.weights) == {"0.weight", "2.weight"}


def test_a_model_that_keeps_its_attachment_is_copied():
    bio, _, attachment = start()
    bio.attachment = attachment
    other = copy.deepcopy(bio)
    assert other.attachment.bio is other
    assert other.attachment.weights == ()
    assert bio.attachment.weights


def test_detach_leaves_optimizer_and_model_as_before():
    bio, optimizer, attachment = start()
    attachment.detach()
    attachment.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert bio.code == biofx.transform(network(), EVERYTHING).code
    before = int(bio.get_buffer("0.weight_synapses.replaced"))
    train(bio, optimizer, 3)
    assert int(bio.get_buffer("0.weight_synapses.replaced")) == before
    with biofx.attach(bio, optimizer):
        train(bio, optimizer, 1)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 1


def test_several_optimizers_over_parts_of_the_model():
    bio = biofx.transform(network(), EVERYTHING)
    first = torch.optim.SGD(bio.get_submodule("0").parameters(), lr=0.1)
    second = torch.optim.AdamW(bio.get_submodule("2").parameters())
    assert "no rule acts at its steps (biofx.attach): 0.weight, 2.weight" in flat(biofx.summary(bio))
    a = biofx.attach(bio, first)
    assert "no rule acts at its steps (biofx.attach): 2.weight" in flat(biofx.summary(bio))
    b = biofx.attach(bio, second)
    assert "nothing happens" not in flat(biofx.summary(bio))
    assert (a.weights, b.weights) == (("0.weight",), ("2.weight",))
    for _ in range(3):
        bio.zero_grad()
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        first.step()
        first.step()
        second.step()
    assert (int(bio.get_buffer("0.weight_synapses.steps")), int(bio.get_buffer("2.weight_synapses.steps"))) == (6, 3)
    biofx.verify(bio)
    assert "scale_grad" not in bio.code
    biofx.detach(bio)
    assert (a.weights, b.weights) == ((), ())
    assert bio.code == biofx.transform(network(), EVERYTHING).code


@pytest.mark.parametrize("first", ["scheduler", "attachment"])
def test_schedulers_and_attachments_in_any_order(first):
    bio = biofx.transform(network(), [passes.SplitSynapses(2), *GAINS])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "attachment":
            biofx.attach(bio, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if first == "scheduler":
            biofx.attach(bio, optimizer)
        for _ in range(3):
            train(bio, optimizer, 1)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0125
    biofx.detach(bio)
    train(bio, optimizer, 1)


def test_a_copy_of_an_attached_model_is_not_attached():
    bio, optimizer, _ = start()
    other = copy.deepcopy(bio)
    assert "no rule acts at its steps" in flat(biofx.summary(other))
    biofx.attach(other, torch.optim.SGD(other.parameters(), lr=0.1)).detach()
    assert "scale_grad" in other.code
    assert "scale_grad" not in bio.code
    train(bio, optimizer, 1)


def test_an_attached_model_is_transformed_as_a_copy_only():
    bio, optimizer, _ = start([passes.FuzzyLearningRates()])
    with pytest.raises(biofx.ArgumentError, match=r"model is attached to an optimizer; detach\(\) it before"):
        biofx.transform(bio, [passes.VolumeDependentLearningRates()], inplace=True)
    other = biofx.transform(bio, [passes.VolumeDependentLearningRates()])
    assert "scale_grad" in other.code
    assert "scale_grad" not in bio.code
    train(bio, optimizer, 1)


# --- a later attachment ------------------------------------------------------------------------------------------


def test_a_later_attachment_takes_over():
    bio, first, attachment = start(GAINS)
    train(bio, first, 1)
    second = torch.optim.SGD(bio.get_submodule("2").parameters(), lr=0.1)
    later = biofx.attach(bio, second)
    assert (attachment.weights, later.weights) == (("0.weight",), ("2.weight",))
    again = biofx.attach(bio, first)
    assert (attachment.weights, later.weights, again.weights) == ((), (), ("0.weight", "2.weight"))
    assert len(first._optimizer_step_pre_hooks) == 1
    assert not second._optimizer_step_pre_hooks
    train(bio, first, 1)


def test_detaching_twice_leaves_a_later_attachment_alone():
    bio, optimizer, first = start(GAINS)
    first.detach()
    second = biofx.attach(bio, optimizer)
    first.detach()
    assert second.weights == ("0.weight", "2.weight")
    assert "scale_grad" not in bio.code


def test_an_optimizer_that_is_gone_holds_nothing():
    bio, optimizer, attachment = start(GAINS)
    del optimizer, attachment
    gc.collect()
    assert "no rule acts at its steps" in flat(biofx.summary(bio))
    biofx.detach(bio)
    biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_attached():
    bio = biofx.transform(network(), GAINS)
    with pytest.raises(biofx.LifecycleError, match="LBFGS evaluates the loss several times in a step"):
        biofx.attach(bio, torch.optim.LBFGS(bio.parameters()))
    with pytest.raises(biofx.LifecycleError, match="SparseAdam needs sparse gradients"):
        biofx.attach(bio, torch.optim.SparseAdam(list(bio.parameters())))
    with pytest.raises(biofx.ArgumentError, match="SGD holds no weight of this model that a pass changed"):
        biofx.attach(bio, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(biofx.ArgumentError, match="the parameters of this model that it holds need no attach"):
        biofx.attach(bio, torch.optim.SGD([bio.get_parameter("0.bias")], lr=0.1))
    with pytest.raises(biofx.ArgumentError, match="optimizer must be a torch.optim.Optimizer, got float"):
        biofx.attach(bio, 0.1)
    with pytest.raises(biofx.ArgumentError, match="expected a model made by biofx.transform"):
        biofx.attach(network(), torch.optim.SGD(bio.parameters(), lr=0.1))
    unchanged = biofx.transform(network(), [passes.MirrorUnits()], frontend="module")
    with pytest.raises(biofx.ArgumentError, match="no pass changed any weight of this model; biofx.summary"):
        biofx.attach(unchanged, torch.optim.SGD(unchanged.parameters(), lr=0.1))
    with pytest.raises(biofx.ArgumentError, match=r"the arguments are swapped; write attach\(bio, optimizer\)"):
        biofx.attach(torch.optim.SGD(bio.parameters(), lr=0.1), bio)


def test_parameters_added_later_are_refused_until_reattached():
    bio = biofx.transform(network(), GAINS)
    optimizer = torch.optim.Adam(bio.get_submodule("2").parameters())
    attachment = biofx.attach(bio, optimizer)
    optimizer.add_param_group({"params": [bio.get_parameter("0.weight")]})
    with pytest.raises(
        biofx.LifecycleError, match="holds other parameters than when it was attached; detach and attach"
    ):
        train(bio, optimizer, 1)
    attachment.detach()
    assert biofx.attach(bio, optimizer).weights == ("0.weight", "2.weight")
    train(bio, optimizer, 1)


def test_a_layer_of_two_models_has_rules_once():
    one, two = (biofx.transform(network(), GAINS) for _ in range(2))
    setattr(two, "0", one.get_submodule("0"))
    attachment = biofx.attach(one, torch.optim.SGD(one.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(two.parameters(), lr=0.1)
    with pytest.raises(biofx.ArgumentError, match=r"0\.weight is a weight of another transformed model as well"):
        biofx.attach(two, optimizer)
    attachment.detach()
    biofx.attach(two, optimizer)


def test_split_weights_that_processes_share_are_refused():
    bio = biofx.transform(network(), "split-synapses").share_memory()
    with pytest.raises(biofx.ArgumentError, match="memory that other processes share"):
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1))


def test_the_step_that_somebody_set_is_there_again_after_detach():
    bio, calls = biofx.transform(network(), GAINS), []
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    step = optimizer.step
    optimizer.step = lambda *args: (calls.append(1), step(*args))[1]
    attachment = biofx.attach(bio, optimizer)
    train(bio, optimizer, 1)
    attachment.detach()
    train(bio, optimizer, 1)
    assert len(calls) == 2


def test_the_state_of_an_optimizer_of_the_plain_model_is_refused():
    plain = network()
    trained = torch.optim.Adam([*plain.parameters()][::-1], lr=0.1)
    train(plain, trained, 1)
    bio = biofx.transform(plain, GAINS)
    optimizer = torch.optim.Adam(bio.parameters(), lr=0.1)
    optimizer.load_state_dict(trained.state_dict())
    with pytest.raises(biofx.ArgumentError, match="of the plain model belongs to other parameters"):
        biofx.attach(bio, optimizer)


def test_weights_that_were_assigned_are_noticed():
    """The optimizer went on with the old tensors, and rules acted on the new ones."""
    bio = biofx.transform(network(), "rejuvenate")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    bio.load_state_dict({name: value.clone() for name, value in bio.state_dict().items()}, assign=True)
    with pytest.raises(biofx.LifecycleError, match="another tensor than the optimizer holds"):
        train(bio, optimizer, 1)


def test_gradients_of_copies_are_refused():
    """Opacus computes the gradient for each sample on a copy of a layer, in which gains act."""
    bio = biofx.transform(network(), "split-synapses")
    optimizer = OPTIMIZERS["sgd"](bio.parameters())
    biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    biofx.weight_sites(bio)["0.weight"].raw.grad_sample = torch.ones(64, 1)
    with pytest.raises(biofx.LifecycleError, match="computed on a copy of its layer.*; train without attach"):
        optimizer.step()
