"""The pipeline: canonical order, conflicts, checks between passes."""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from conftest import flat
from models.small import Chaotic, ConvNet, mlp
from training_runs import network


@dataclass(frozen=True)
class Halve(passes.Pass):
    """A gradient hook that halves."""

    name = "halve"
    slot = passes.Slot.HOOK

    def rewrite(self, site, edit):
        edit.insert(torch.ops.biofx.scale_grad, 0.5)


@dataclass(frozen=True)
class Rectify(passes.Pass):
    """A sign constraint."""

    name = "rectify"
    slot = passes.Slot.SIGN

    def rewrite(self, site, edit):
        edit.insert(torch.abs)


@dataclass(frozen=True)
class Negate(Rectify):
    """Another sign constraint, and one that lies about preserving the function."""

    name = "negate"
    preserves_function = True

    def rewrite(self, site, edit):
        edit.insert(torch.neg)


@dataclass(frozen=True)
class Reluctant(Halve):
    """Leaves everything alone, with and without saying why."""

    name = "reluctant"

    def rewrite(self, site, edit):
        if site.name.startswith("0"):
            edit.leave("it is the first")


ALL = [passes.SplitSynapses(2), passes.FuzzyLearningRates(), Halve(), Rectify()]


@pytest.mark.parametrize("order", permutations(ALL))
def test_the_order_of_passes_does_not_matter(order):
    model = mlp(3, 4, 2)
    expected, given = biofx.transform(model, ALL), biofx.transform(model, order)
    assert given.code == expected.code
    assert list(given.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in given.state_dict().items())
    slots = [line.split("  ")[-2].strip() for line in biofx.table(given).splitlines()[2:] if " 0.weight " in line]
    assert len(slots) == 6


def test_a_chain_reads_in_canonical_order():
    bio = biofx.transform(nn.Linear(3, 2), ALL)
    site = biofx.weight_sites(bio)["weight"]
    calls = [biofx.looking.inspection.callee(node) for node in site.chain]
    assert calls == ["weight_synapses.weight", "biofx.scale_grad", "biofx.scale_grad", "abs", "biofx.share_grad", "sum"]
    torch.testing.assert_close(site.effective(), site.raw.abs().sum(0))
    site.effective().sum().backward()
    torch.testing.assert_close(site.raw.grad, 0.5 * 0.5 * site.gain * site.raw.sign())


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (
            [passes.SplitSynapses(2), passes.SplitSynapses(3)],
            r"weight has split-synapses already, and a weight can have split-synapses only once \(use exclude",
        ),
        ([passes.FuzzyLearningRates(), passes.FuzzyLearningRates()], "weight has fuzzy-learning-rates already"),
        (
            [passes.MirrorUnits(), passes.GroupUnits()],
            "mirror-units and group-units exclude each other on weight: one gives every unit a sign, and the other",
        ),
        (
            [passes.MirrorUnits(), passes.DalesPrinciple()],
            "mirror-units and dales-principle both claim the sign constr",
        ),
        ([Rectify(), Negate()], "negate and rectify both claim the sign constraint of weight; drop one"),
    ],
)
def test_conflicts_name_both(pipeline, message):
    model = nn.Linear(2, 2)
    with pytest.raises(biofx.PipelineError, match=message):
        biofx.transform(model, pipeline)


@pytest.mark.parametrize("pipeline", [[passes.FuzzyLearningRates()] * 2, [Rectify(), Negate()]])
def test_a_conflict_with_an_earlier_transform_changes_nothing(pipeline):
    first = biofx.transform(nn.Linear(2, 2), pipeline[:1])
    state, code = first.state_dict(), first.code
    with pytest.raises(biofx.PipelineError, match=r"already|both claim"):
        biofx.transform(first, pipeline[1:], inplace=True)
    assert (first.code, list(first.state_dict())) == (code, list(state))


def test_a_second_transform_that_would_not_fit_is_refused():
    first = biofx.transform(network(), [passes.Crystallize()])
    with pytest.raises(biofx.PipelineError, match="split-synapses changes the shape of 0.weight .* with both"):
        biofx.transform(first, [passes.SplitSynapses(3)])
    with pytest.raises(
        biofx.PipelineError, match="group-units changes the shape of 0.weight or of its operator's output"
    ):
        biofx.transform(biofx.transform(network(), [passes.SynapticScaling()]), [passes.GroupUnits()])


def test_a_false_claim_to_preserve_the_function_is_caught():
    with pytest.raises(
        biofx.VerificationError,
        match="negate says that it preserves the function, but on the inputs with which the model ran output 0",
    ):
        biofx.transform(nn.Linear(2, 2), [Negate()], example_inputs=torch.ones(1, 2))
    biofx.transform(nn.Linear(2, 2), [Negate()], example_inputs=torch.ones(1, 2), verify=False)


class Policy(nn.Linear):
    """Returns a distribution."""

    def forward(self, x):
        return torch.distributions.Categorical(logits=super().forward(x))


def test_so_is_one_about_results_in_an_object():
    with pytest.raises(biofx.VerificationError, match="negate says that it preserves the function"):
        biofx.transform(Policy(2, 3), [Negate()], example_inputs=torch.ones(1, 2))


def chaotic():
    torch.manual_seed(0)
    return Chaotic(), torch.randn(8, 200)


@pytest.mark.parametrize("pipeline", ["split-synapses", "split-synapses{synapses=64}", "cortex"])
def test_rounding_that_a_model_amplifies_is_no_difference(pipeline):
    model, h = chaotic()
    bio = biofx.transform(model, pipeline, example_inputs=h)
    assert torch.allclose(bio(h, 20), model(h, 20), atol=1e-3)


def test_rounding_in_a_second_transform_is_no_difference():
    model, h = chaotic()
    bio = biofx.transform(model, "split-synapses", exclude="rec.*", example_inputs=h)
    bio = biofx.transform(bio, "split-synapses", exclude="out.*", example_inputs=h)
    assert torch.allclose(bio(h, 20), model(h, 20), atol=1e-3)


@dataclass(frozen=True)
class Blunt(passes.SplitSynapses):
    """Changes weights by more than rounding, and lies about it."""

    name = "blunt"

    def rewrite(self, site, edit):
        edit.replace_raw(site.raw.detach() * (1 + 1e-6))
        super().rewrite(site, edit)


@dataclass(frozen=True)
class Shift(passes.SplitSynapses):
    """Changes the graph, and lies about it."""

    name = "shift"

    def rewrite(self, site, edit):
        super().rewrite(site, edit)
        for call in site.calls:
            edit.after(call.node, torch.add, 1e-6)


class Traced(Chaotic):
    """Its loop is in the graph, as the number of steps is no argument."""

    def forward(self, h):
        return super().forward(h, 300)


@pytest.mark.parametrize("pass_", [Blunt(), Shift()])
def test_a_false_claim_on_a_model_that_amplifies_is_caught(pass_):
    torch.manual_seed(0)
    model, h = Traced(), torch.randn(8, 200)
    biofx.transform(model, "split-synapses", example_inputs=h)
    with pytest.raises(biofx.VerificationError, match="amplifies rounding, as chaotic networks do.* for fewer steps"):
        biofx.transform(model, [pass_], example_inputs=h)


def test_a_model_that_amplifies_says_how_to_go_on_in_place():
    model, h = chaotic()
    with pytest.raises(biofx.VerificationError, match="amplifies rounding, .* for fewer steps"):
        biofx.transform(model, "split-synapses", example_inputs=h, inplace=True)
    biofx.transform(model, "split-synapses", example_inputs=(h, 20), inplace=True)


@dataclass(frozen=True)
class Draw(Halve):
    """Replaces weights by what the random number generator gives."""

    name = "draw"

    def rewrite(self, site, edit):
        edit.replace_raw(torch.randn(site.raw.shape, generator=edit.generator))
        edit.insert(torch.ops.biofx.scale_grad, edit.state("ones", torch.ones(site.raw.shape)))


def test_a_pass_need_not_care_about_defaults_of_the_caller():
    model = nn.Linear(2, 3)
    expected = biofx.transform(model, [Draw()]).state_dict()
    for default in (torch.float64, torch.bfloat16, torch.device("meta")):
        with defaults(default):
            given = biofx.transform(model, [Draw()]).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in given.items())
        assert {value.dtype for value in given.values()} == {torch.float32}


@contextmanager
def defaults(default):
    if isinstance(default, torch.device):
        with default:
            yield
        return
    torch.set_default_dtype(default)
    try:
        yield
        assert torch.get_default_dtype() is default
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_is_skipped_silently():
    text = flat(biofx.summary(biofx.transform(mlp(2, 2, 2), [Halve(), Reluctant()])))
    assert "reluctant: it is the first" in text
    assert "reluctant: it changed nothing" in text


def test_state_that_would_hide_an_attribute_is_refused():
    model = nn.Linear(2, 2)
    model.weight_synapses = "mine"
    with pytest.raises(biofx.ArgumentError, match="has an attribute weight_synapses, which is where biofx keeps the"):
        biofx.transform(model, [passes.FuzzyLearningRates()])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", torch.zeros(()), "keeper cannot keep a state called steps: biofx counts steps by that name"),
        ("gain", torch.ones(2, 2), r"keeper: weight: gain is the state that rules share; edit\.gain\(value\)"),
        ("trace", 0.0, r"keeper: state is a tensor, got trace=0.0; use torch.tensor\(0.0\)"),
        ("a.b", torch.zeros(()), "keeper: weight: a name of state is a Python identifier, without dots, got 'a.b'"),
        ("class", torch.zeros(()), "a name of state is a Python identifier, without dots, got 'class'"),
        ("stored", torch.zeros(()), "keeper cannot keep a state called stored with a weight: the name is taken"),
    ],
)
def test_state_that_cannot_be_kept_is_refused(key, value, message):
    @dataclass(frozen=True)
    class Keeper(passes.Pass):
        name, slot = "keeper", passes.Slot.HOOK

        def rewrite(self, site, edit):
            edit.keep(key, value)

    with pytest.raises(biofx.PipelineError, match=message):
        biofx.transform(nn.Linear(2, 2), [Keeper()])


@pytest.mark.parametrize(
    ("insert", "message"),
    [
        (lambda edit, site: edit.insert(torch.ops.biofx.scale_grad, torch.ones(2, 3)), r"edit\.state\(key, tensor\)"),
        (lambda edit, site: edit.after(site.outputs[0], torch.add, torch.ones(2)), r"give that to edit\.activate"),
    ],
    ids=["weight", "output"],
)
def test_a_tensor_among_constants_says_where_to_keep_it(insert, message):
    @dataclass(frozen=True)
    class Inserts(passes.Pass):
        name, slot = "inserts", passes.Slot.HOOK

        def rewrite(self, site, edit):
            insert(edit, site)

    with pytest.raises(
        biofx.PipelineError, match=rf"inserts: weight: a tensor of shape \(2.* is no constant.*{message}"
    ):
        biofx.transform(nn.Linear(3, 2), [Inserts()])


@pytest.mark.parametrize(
    ("method", "build", "x", "message"),
    [
        (
            "observe_input",
            lambda: nn.Embedding(3, 2),
            torch.tensor([1]),
            r"embedding does not read .*passes\.Need\.INPUT",
        ),
        (
            "observe",
            lambda: nn.GRU(3, 2),
            torch.randn(4, 3),
            r"out of reach; .*passes\.Need\.OUTPUT\) first, and give",
        ),
    ],
)
def test_what_cannot_be_observed_names_the_need_to_ask(method, build, x, message):
    @dataclass(frozen=True)
    class Looks(passes.Pass):
        name, slot = "looks", passes.Slot.OBSERVER

        def rewrite(self, site, edit):
            getattr(edit, method)(torch.ops.biofx.sum_activity, site, "seen")

    with pytest.raises(biofx.PipelineError, match=message):
        biofx.transform(build(), [Looks()], example_inputs=x)


def test_a_graph_grows_by_a_constant_for_each_weight():
    sizes = [len(biofx.transform(mlp(*[2] * (n + 1)), ALL).graph.nodes) for n in (2, 3, 4)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


def test_everything_together_on_a_convnet():
    bio = biofx.transform(ConvNet(), ALL, example_inputs=torch.randn(2, 1, 8, 8))
    biofx.verify(bio)
    assert list(biofx.weight_sites(bio)) == ["stem.weight", "depthwise.weight", "head.weight"]
