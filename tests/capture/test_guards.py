"""Guards: what changes after the transform is followed, or refused where a pass needs the graph; never ignored."""

import contextvars
import copy
import decimal
import io
import math
import os
import pickle
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import biofx
from biofx import passes

X = torch.randn(5, 4)
SPLIT = [passes.SplitSynapses(2), passes.FuzzyLearningRates()]


class Network(nn.Module):
    """Reads attributes, a configuration and a list of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ModuleList(nn.Linear(4, 2) for _ in "ab")
        self.task, self.scale, self.config, self.factors = 0, 1.0, SimpleNamespace(p=0.0), [1.0]

    def forward(self, x):
        y = F.dropout(self.body(x), self.config.p, self.training)
        return self.heads[self.task](y) * self.scale * self.factors[0]


def task(m):
    m.task = 1


def scale(m):
    m.scale = 0.5


def factor(m):
    m.factors[0] = 3.0


def configuration(m):
    m.config = SimpleNamespace(p=0.9999999)


def layer(m):
    m.body[1] = nn.Tanh()


def head(m):
    m.heads[0] = nn.Linear(4, 7)


def hook(m):
    m.body[0].register_forward_hook(lambda module, args, output: output * 0)


def hook_of_a_container(m):
    m.body.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def forward(m):
    original = m.body.forward
    m.body.forward = lambda x: original(x) + 1


def removed(m):
    del m.body[1]


CHANGES = [task, scale, factor, layer, hook, hook_of_a_container, forward, removed]


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, copy.copy, reloaded], ids=["", "deep", "copy", "file"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_result_acts_as_on_the_model(change, copied):
    model = Network()
    bio = copied(biofx.transform(model, SPLIT))
    for one in (model, bio):
        change(one)
    torch.testing.assert_close(bio(X), model(X))
    if change is not forward:  # which refers to one instance
        torch.testing.assert_close(biofx.fold(bio)(X), model(X))


@pytest.mark.parametrize("change", [layer, removed])
@pytest.mark.parametrize("copy_", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_a_copy_of_a_changed_result_runs(change, copy_):
    """The copy found that its graph is not the captured one, and refused to run."""
    bio = biofx.transform(Network(), SPLIT)
    change(bio)
    torch.testing.assert_close(copy_(bio)(X), bio(X))


def rate(m):
    m.config.p = 0.9


def hook_in_training(m):
    m.body[0].register_forward_hook(lambda module, args, output: output * 2 if module.training else None)


def written(m):
    m.offset.data.fill_(3.0)


class Offset(Network):
    """Computes with a tensor in an attribute that is no buffer."""

    def __init__(self):
        super().__init__()
        self.offset = torch.ones(4)

    def forward(self, x):
        return super().forward(x + (self.offset + 1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("change", [scale, factor, rate, hook, hook_in_training, written])
def test_a_second_transform_follows_what_changed_after_the_first(change, inplace):
    model = Offset()
    bio = biofx.transform(model, [passes.SplitSynapses(2)], example_inputs=X)
    for one in (model, bio):
        change(one)
    again = biofx.transform(bio, [passes.FuzzyLearningRates()], example_inputs=X, inplace=inplace)
    for training in (True, False):
        outputs = []
        for one in (model.train(training), again.train(training)):
            torch.manual_seed(0)
            outputs.append(one(X))
        torch.testing.assert_close(*outputs)


def test_a_second_transform_names_a_change_it_cannot_follow():
    bio = biofx.transform(Network(), [passes.GroupUnits(2)], example_inputs=X)
    bio.scale = 3.0
    with pytest.raises(biofx.CaptureError, match="scale changed since the transform, and group-units needs the graph"):
        biofx.transform(bio, [passes.FuzzyLearningRates()], example_inputs=X)


def test_a_second_transform_in_place_that_fails_leaves_the_graph():
    bio = biofx.transform(Network(), [passes.SplitSynapses(2)], example_inputs=X)
    bio.scale = 3.0
    with pytest.raises(biofx.BiofxError):
        biofx.transform(bio, [passes.SplitSynapses(2)], example_inputs=X, inplace=True)
    bio.scale = 1.0
    torch.testing.assert_close(bio(X), biofx.fold(bio)(X))
    assert "body" in str(bio.graph)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, copy.copy, reloaded], ids=["", "deep", "copy", "file"])
@pytest.mark.parametrize("before", [True, False])
def test_a_written_tensor_acts_in_copies(before, copied):
    model = Offset()
    bio = biofx.transform(model, SPLIT, example_inputs=X)
    if before:
        written(bio)
    bio = copied(bio)
    if not before:
        written(bio)
    written(model)
    torch.testing.assert_close(bio(X), model(X))


class Doubling(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["", "deep"])
def test_another_forward_of_a_class_acts(frontend, copied, monkeypatch):
    """A module gets another class, or libraries replace the forward of a class; the graph went on as before."""
    model = Network()
    bio = biofx.transform(model, SPLIT, example_inputs=(X,), frontend=frontend)
    bio(X)
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: x.relu() + 1)
        torch.testing.assert_close(copied(bio)(X), model(X))
    for one in (model, bio):
        one.body[1].__class__ = Doubling
    torch.testing.assert_close(copied(bio)(X), model(X))


class AsksForInference(Network):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_inference_mode_enabled() else 1)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_inference_mode_is_seen(frontend):
    model = AsksForInference()
    bio = biofx.transform(model, SPLIT, example_inputs=(X,), frontend=frontend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(bio(X), model(X))


class Catches(Network):
    """Catches all errors, so also those of a tracer, which said that it decides by a value."""

    def __init__(self, decide):
        super().__init__()
        self.decide = decide

    def forward(self, x):
        try:
            factor = 2.0 if self.decide(x) else 3.0
        except Exception:  # noqa: BLE001 - as libraries do it
            factor = 4.0
        return super().forward(x) * factor


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.shape[0] == 5,
        lambda x: len(x) > 4,
        lambda x: int(x.shape[0]) > 4,
        lambda x: float(x.detach().sum()) > 0,
        lambda x: [*range(x.shape[0])][-1] > 3,
        lambda x: list(x)[-1] is None,
        lambda x: 5 in x.shape,
        lambda x: math.sqrt(x.shape[0]) > 2.1,
    ],
)
def test_a_forward_that_catches_errors_decides_by_values(decide):
    model = Catches(decide)
    bio = biofx.transform(model, SPLIT, example_inputs=(X,))
    for x in (X, X[:3], -X):
        torch.testing.assert_close(bio(x), model(x))


def test_dropout_that_is_turned_up_acts():
    bio = biofx.transform(Network(), SPLIT)
    configuration(bio)
    assert torch.equal(bio(X), bio.heads[0].bias.expand(5, 2))


def test_a_new_head_learns_beside_synapses():
    bio = biofx.transform(Network(), SPLIT)
    head(bio)
    bio(X).sum().backward()
    assert bio(X).shape == (5, 7)
    assert bio.heads[0].weight.grad is not None
    assert bio.get_parameter("body.0.weight").grad.shape == (2, 4, 4)


def test_pruning_a_weight_that_was_left_alone_acts():
    bio = biofx.transform(Network(), SPLIT)
    prune.l1_unstructured(bio.heads[1], "weight", amount=1)
    biofx.verify(bio)
    assert (biofx.fold(bio).heads[1].weight == 0).sum() == 1


def test_gradient_hooks_act_in_python_as_in_the_graph():
    bio = biofx.transform(Network(), [passes.SplitSynapses(2), passes.FuzzyLearningRates(nu=0.5)], example_inputs=X)
    gradients = []
    for change in (lambda m: None, lambda m: setattr(m, "note", "for somebody"), hook_of_nothing):
        change(bio)
        bio.zero_grad()
        bio(X).square().sum().backward()
        gradients.append(bio.get_parameter("body.0.weight").grad.clone())
    assert gradients[0].any()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def hook_of_nothing(m):
    m.body.register_forward_hook(lambda *_: None)


def test_mode_dtype_and_more_axes_do_not_change_the_function():
    model = Network()
    bio = biofx.transform(model, SPLIT, example_inputs=X)
    for x in (X, torch.randn(2, 3, 4), X[0]):
        torch.testing.assert_close(bio.eval()(x), model.eval()(x))
        torch.testing.assert_close(bio.train()(x), model.train()(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bio(X), model(X), rtol=0.02, atol=0.02)
    torch.testing.assert_close(bio.double()(X.double()), model.double()(X.double()))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, copy.copy, reloaded], ids=["", "deep", "copy", "file"])
@pytest.mark.parametrize("change", [*CHANGES, head])
def test_where_a_pass_needs_the_graph_a_change_is_refused(change, copied):
    bio = copied(biofx.transform(Network(), [passes.SynapticScaling()]))
    bio(X)
    change(bio)
    with pytest.raises(
        biofx.CaptureError, match=r"(changed|got hooks|was removed) since the transform, and synaptic-scaling needs"
    ):
        bio(X)


def test_an_edited_graph_runs_and_does_not_follow_changes():
    bio = biofx.transform(Network(), SPLIT)
    (output,) = bio.graph.find_nodes(op="output")
    with bio.graph.inserting_before(output):
        output.args = (bio.graph.call_function(torch.neg, output.args),)
    before = bio(X)
    bio.recompile()
    torch.testing.assert_close(bio(X), -before)
    task(bio)
    with pytest.raises(biofx.CaptureError, match="its graph was edited"):
        bio(X)


def test_a_global_hook_sees_all_modules():
    bio, seen = biofx.transform(Network(), SPLIT, example_inputs=X), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        bio(X)
    finally:
        handle.remove()
    assert seen.count("Linear") == 2


@pytest.fixture
def global_hook():
    """A hook for all modules, which changes what linear layers return."""
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: output + 1 if isinstance(module, nn.Linear) else output
    )
    yield handle
    handle.remove()


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_global_hook_is_no_part_of_the_graph(global_hook, frontend):
    model = Network()
    bio = biofx.transform(model, SPLIT, example_inputs=X, frontend=frontend)
    torch.testing.assert_close(bio(X), model(X))
    global_hook.remove()
    torch.testing.assert_close(bio(X), model(X))


def test_an_export_under_a_global_hook_is_refused(global_hook):
    with pytest.raises(biofx.CaptureError, match="hooks for all modules are registered"):
        biofx.transform(nn.Linear(4, 2), SPLIT, example_inputs=X, frontend="export")


@pytest.mark.parametrize("run", [lambda bio: bio, lambda bio: torch.compile(bio, backend="eager")])
def test_a_global_hook_is_refused_by_a_needed_graph(run, request):
    bio = biofx.transform(Network(), [passes.SynapticScaling()], example_inputs=X)
    request.getfixturevalue("global_hook")
    with pytest.raises(biofx.CaptureError, match="hooks for all modules .* synaptic-scaling needs the graph"):
        run(bio)(X)


@pytest.mark.parametrize("pipeline", ["synaptic-scaling", "group-units", "split-synapses{activation=relu}"])
@pytest.mark.parametrize("change", [task, scale, factor], ids=lambda change: change.__name__)
def test_a_needed_graph_is_not_compiled_after_a_change(change, pipeline):
    bio = biofx.transform(Network(), pipeline, example_inputs=X)
    change(bio)
    with pytest.raises(biofx.CaptureError, match="changed since the transform, and .* needs the graph"):
        torch.compile(bio, backend="eager")(X)


class DecidesByTensor(Network):
    """Decides by the values of a tensor in an attribute."""

    def __init__(self):
        super().__init__()
        self.gates = {"open": torch.ones(4)}

    def forward(self, x):
        return super().forward(x) * (2 if self.gates["open"].sum() > 3 else 1)


@pytest.mark.parametrize("write", [lambda gate: gate.zero_(), lambda gate: gate.data.mul_(0)])
def test_a_written_tensor_is_refused_by_a_needed_graph(write):
    bio = biofx.transform(DecidesByTensor(), [passes.SynapticScaling()], example_inputs=X)
    bio(X)
    write(bio.gates["open"])
    with pytest.raises(biofx.CaptureError, match="was written into since the transform, and synaptic-scaling needs"):
        bio(X)


class Tied(nn.Module):
    """Has parameters and a buffer that are tied and have no synapses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("same_shift", self.shift)
        self.b.bias, self.other.weight = self.a.bias, self.norm.weight

    def forward(self, x):
        return self.other(self.b(self.norm(self.a(x)).tanh() + self.shift)) + self.same_shift


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", ["a.bias", "b.bias", "norm.weight", "other.weight", "shift", "same_shift"])
@pytest.mark.parametrize("value", [torch.full((4,), 0.5), None])
def test_tensors_that_are_no_longer_tied_are_seen(name, value, frontend):
    model = Tied()
    bio = biofx.transform(model, "fuzzy-learning-rates", example_inputs=X, frontend=frontend)
    path, _, key = name.rpartition(".")
    for each in (model, bio):
        owner = each.get_submodule(path)
        new = getattr(owner, key).detach().clone() if value is None else value.clone()
        setattr(owner, key, nn.Parameter(new) if path else new)
        getattr(owner, key).data.mul_(2)
    torch.testing.assert_close(bio(X), model(X))
    bio = biofx.transform(Tied(), [passes.SynapticScaling()], example_inputs=X, frontend=frontend)
    setattr(bio.get_submodule(path), key, nn.Parameter(torch.ones(4)) if path else torch.ones(4))
    if frontend == "export" or path not in ("norm", "other"):
        with pytest.raises(biofx.CaptureError, match="which was tied to .*, changed since the transform"):
            bio(X)


class TiedNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.a = nn.Linear(4, 4), nn.Parameter(torch.ones(()))
        self.b = self.a

    def forward(self, x):
        return self.fc(x) * self.a + self.b


def test_an_equal_number_that_is_no_longer_tied_is_seen():
    """Shallow copies of what modules hold are equal then."""
    bio = biofx.transform(TiedNumbers(), SPLIT, example_inputs=X)
    bio(X)
    bio.b = nn.Parameter(torch.ones(()))
    bio.b.data.fill_(2)
    torch.testing.assert_close(bio(X), bio.fc(X) + 2)


def test_attributes_that_are_new_change_nothing():
    bio = biofx.transform(Network(), [passes.SynapticScaling()])
    before = bio(X)
    bio.trainer = object()
    torch.testing.assert_close(bio(X), before)


class ByName(nn.Module):
    """Looks a weight up where what is stored is, in a way that no run sees."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.get_parameter("fc.weight")


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_weight_looked_up_by_name_is_no_silent_fault(frontend):
    model = ByName()
    with pytest.raises(biofx.BiofxError, match="fails after the pass|does not compute what its graph does|output 0"):
        biofx.transform(model, SPLIT, example_inputs=X, frontend=frontend)
    bio = biofx.transform(model, "fuzzy-learning-rates", example_inputs=X, frontend=frontend)  # stored as it is
    torch.testing.assert_close(bio(X), model(X))


TEMPERATURE = 2.0
OPTIONS = SimpleNamespace(power=1.0)
LEVELS = {"offsets": {"first": 0.0}}
MASK = torch.ones(4)


def scaled(x):
    return x * TEMPERATURE


class Scheduled(nn.Module):
    """Reads what a training script sets."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return scaled(self.fc(x) * MASK) * OPTIONS.power + LEVELS["offsets"]["first"]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(sys.modules[__name__], "TEMPERATURE", 3.0),
        lambda patch: patch.setattr(OPTIONS, "power", 0.5),
        lambda patch: patch.setattr(sys.modules[__name__], "scaled", lambda x: x - 1),
        lambda patch: patch.setattr(OPTIONS, "power", torch.tensor(2.0)),
        lambda patch: patch.setitem(LEVELS["offsets"], "first", 1.0),
        lambda patch: patch.setattr(sys.modules[__name__], "MASK", torch.zeros(4)),
    ],
    ids=["variable", "option", "function", "tensor", "entry", "mask"],
)
def test_module_level_variables_that_forward_reads_may_change(change, monkeypatch):
    model = Scheduled()
    bio = biofx.transform(model, SPLIT, example_inputs=X)
    loaded = pickle.loads(pickle.dumps(bio))
    before = bio(X)
    with monkeypatch.context() as patch:
        change(patch)
        for other in (bio, copy.deepcopy(bio), loaded):
            torch.testing.assert_close(other(X), model(X))
        assert not torch.allclose(model(X), before)
    torch.testing.assert_close(bio(X), before)


def test_a_tensor_outside_of_the_model_may_be_written():
    model = Scheduled()
    bio = biofx.transform(model, SPLIT, example_inputs=X)
    try:
        for other in (bio, copy.deepcopy(bio)):
            MASK.mul_(0.5)
            torch.testing.assert_close(other(X), model(X))
    finally:
        MASK.fill_(1.0)


def test_a_needed_graph_names_the_variable_that_changed(monkeypatch):
    bio = biofx.transform(Scheduled(), [passes.SynapticScaling()], example_inputs=X)
    monkeypatch.setattr(OPTIONS, "power", 3.0)
    with pytest.raises(
        biofx.CaptureError, match=r"the variable test_guards.OPTIONS.power, which forward reads, changed"
    ):
        bio(X)


class TakesOptions(nn.Sequential):
    """Takes what nobody can guess."""

    def forward(self, options):
        return super().forward(options["values"][0])


@pytest.mark.xfail(torch.__version__ < (2, 13), reason="torch.compile could not follow vars() of a container")
def test_a_model_that_nobody_could_check_compiles_its_python():
    model = TakesOptions(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    bio = biofx.transform(model, SPLIT)
    compiled, given = torch.compile(bio, fullgraph=True, backend="aot_eager"), {"values": [X]}
    torch.testing.assert_close(compiled(given), model(given))
    compiled(given).sum().backward()
    assert bio.get_parameter("0.weight").grad.any()


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_call_with_other_weights_by_the_names_of_the_original(frontend):
    """The graph reads what is stored, and ignored such a weight without a word."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    bio, others = biofx.transform(model, SPLIT, example_inputs=(X,), frontend=frontend), {"0.weight": torch.zeros(4, 4)}
    before = bio(X)
    torch.testing.assert_close(functional_call(bio, others, (X,)), functional_call(model, others, (X,)))
    torch.testing.assert_close(bio(X), before)
    bio = biofx.transform(model, [passes.SynapticScaling()], example_inputs=(X,))
    with pytest.raises(
        biofx.CaptureError, match=r"0\.weight was replaced since the transform, and synaptic-scaling needs"
    ):
        functional_call(bio, others, (X,))


class WeightsInAList(nn.Module):
    """Reads a weight from a list of weights."""

    def __init__(self):
        super().__init__()
        self.hidden, self.readout = nn.Linear(4, 4), nn.Linear(4, 2)
        self.weights = [self.hidden.weight]

    def forward(self, x):
        return self.readout(torch.relu(nn.functional.linear(x, self.weights[0])))


def test_weights_that_a_list_holds_as_well_are_trained():
    """The step of the optimizer was called a write that the graph does not follow."""
    bio = biofx.transform(WeightsInAList(), [passes.SynapticScaling()], example_inputs=(X,))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    before = bio(X)
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(bio(X), before)


class Settings:
    """A configuration: an object in an attribute, or outside of the model."""

    def __init__(self):
        self.p, self.inner, self.options = 1.0, SimpleNamespace(q=1.0), {"a": [1.0]}


class Table(dict):
    """A dictionary of a user's class."""


OUTSIDE, TABLE = SimpleNamespace(deep=SimpleNamespace(r=1.0)), {"o": SimpleNamespace(z=1.0)}


class Configured(nn.Module):
    """Reads what is deep inside of objects and containers."""

    def __init__(self):
        super().__init__()
        self.fc, self.settings, self.factors = nn.Linear(4, 4), Settings(), [[1.0]]
        self.table, self.parts, self.pair = numpy.ones(2), [torch.ones(4)], (torch.ones(4),)
        self.own = Table(a=1.0)

    def forward(self, x):
        inside = self.settings.p * self.settings.inner.q * self.settings.options["a"][0] * self.factors[0][0]
        return (
            self.fc(x)
            * inside
            * OUTSIDE.deep.r
            * TABLE["o"].z
            * self.table.sum()
            * self.parts[0]
            * self.pair[0]
            * self.own["a"]
        )


DEEP = {
    "attribute of an object": lambda m, patch: setattr(m.settings, "p", 2.0),
    "attribute of an attribute": lambda m, patch: setattr(m.settings.inner, "q", 3.0),
    "list in a dictionary of an object": lambda m, patch: m.settings.options["a"].__setitem__(0, 4.0),
    "list in a list": lambda m, patch: m.factors[0].__setitem__(0, 5.0),
    "array": lambda m, patch: m.table.fill(2.0),
    "tensor in a list": lambda m, patch: m.parts.__setitem__(0, torch.zeros(4)),
    "what a tensor in a list holds": lambda m, patch: m.parts[0].zero_(),
    "what a tensor in a tuple holds": lambda m, patch: m.pair[0].zero_(),
    "item of a subclass of dict": lambda m, patch: m.own.update(a=8.0),
    "outside": lambda m, patch: patch.setattr(OUTSIDE.deep, "r", 6.0),
    "outside, in a dictionary": lambda m, patch: patch.setattr(TABLE["o"], "z", 7.0),
}


@pytest.mark.parametrize("change", DEEP.values(), ids=DEEP)
def test_what_is_deep_inside_of_objects_may_change(change, monkeypatch):
    model = Configured()
    bio = biofx.transform(model, SPLIT, example_inputs=(X,))
    before = bio(X)
    for other in (bio, copy.deepcopy(bio), pickle.loads(pickle.dumps(bio))):
        plain = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            for each in (plain, other):
                change(each, patch)
            torch.testing.assert_close(other(X), plain(X))
            assert not torch.allclose(other(X), before)


@pytest.mark.parametrize("functions", [(torch.relu, torch.tanh), tuple(lambda x, k=k: k * x for k in (1, 2))])
def test_functions_as_arguments_are_told_apart(functions):
    class Applies(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, function):
            return function(self.fc(x))

    model = Applies()
    bio = biofx.transform(model, SPLIT, example_inputs=(X, functions[0]))
    for function in functions:
        torch.testing.assert_close(bio(X, function), model(X, function))


DEPTH = contextvars.ContextVar("DEPTH", default=1.0)


class LooksElsewhere(nn.Module):
    """Reads what no guard follows: the environment, a context variable, and the state of another package."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * float(os.environ.get("BIOFX_TEST", "1")) * DEPTH.get() * decimal.getcontext().prec


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_python_runs_wherever_it_looks(frontend, monkeypatch):
    model = LooksElsewhere()
    bio = biofx.transform(model, SPLIT, example_inputs=(X,), frontend=frontend)
    before = bio(X)
    monkeypatch.setenv("BIOFX_TEST", "2")
    token = DEPTH.set(3.0)
    try:
        with decimal.localcontext() as context:
            context.prec += 1
            torch.testing.assert_close(bio(X), model(X))
            assert not torch.allclose(bio(X), before)
    finally:
        DEPTH.reset(token)


def test_compiled_python_follows_what_is_set_later():
    model = Network()
    bio = biofx.transform(model, SPLIT, example_inputs=(X,))
    compiled = torch.compile(bio, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    for change in (task, scale, factor):
        for one in (model, bio):
            change(one)
        torch.testing.assert_close(compiled(X), model(X))


class Scales(nn.Module):
    """Computes with a tensor in an attribute, and keeps the last activity in another."""

    def __init__(self):
        super().__init__()
        self.fc, self.gain, self.last = nn.Linear(4, 4), torch.tensor(1.0), torch.zeros(4)

    def forward(self, x):
        y = self.fc(x) * (self.gain + 1)
        self.last.copy_(y[0].detach())
        return y


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, copy.copy, reloaded], ids=["", "deep", "copy", "file"])
def test_a_needed_graph_refuses_a_tensor_that_was_written(copied):
    """The sum is a constant of the graph, also in a copy that was not called before the write."""
    model = Scales()
    bio = copied(biofx.transform(model, [passes.SynapticScaling()], example_inputs=(X,)))
    for x in (X, 2 * X):  # what forward itself writes is no change
        torch.testing.assert_close(bio(x), model(x))
        assert torch.equal(bio.last, model.last)
    other = copied(bio)
    other.gain.mul_(2)
    with pytest.raises(biofx.CaptureError, match="a tensor in an attribute.*was written into since the transform"):
        other(X)


def test_a_needed_graph_follows_a_tensor_that_it_reads():
    class Multiplies(Scales):
        def forward(self, x):
            return self.fc(x) * self.gain

    model = Multiplies()
    bio = biofx.transform(model, [passes.SynapticScaling()], example_inputs=(X,))
    for one in (model, bio):
        one.gain.fill_(3.0)
    torch.testing.assert_close(bio(X), model(X))


class Metric(nn.Module):
    """Wraps a method for each instance, and leaves it out of copies and files, as torchmetrics does."""

    def __init__(self):
        super().__init__()
        self.__setstate__({})

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "update"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.update = lambda value: value


def test_attributes_that_copies_make_anew_are_left_to_them():
    model = Network()
    model.metric = Metric()
    bio = biofx.transform(model, SPLIT, example_inputs=X)
    for same in (copy.deepcopy(bio), pickle.loads(pickle.dumps(bio))):
        model.task = 0
        torch.testing.assert_close(same(X), model(X))
        assert same.metric.update(3) == 3
        same.task = model.task = 1
        torch.testing.assert_close(same(X), model(X))
