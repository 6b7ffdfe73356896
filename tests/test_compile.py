"""What `torch.compile` makes of transformed models. This file is the list of what compiles.

A transformed model compiles where the plain one does, into as many graphs. What PyTorch cannot compile, transformed or
not, is marked as failing, with the reason. The backends here are cheap ones, as biofx has no part in code generation;
`test_compiling_changes_nothing` in `training/test_lifecycle.py` trains with Inductor.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils import _pytree as pytree

import biofx
from biofx.rewrite import registry
from conftest import UNNOTICED, in_turn, since
from models.islands import ISLANDS, Around
from models.small import mlp

BATCHES = (3, 5, 4, 2)
X = torch.randn(max(BATCHES), 3, generator=torch.Generator().manual_seed(0))
LEARNING = "split-synapses,fuzzy-learning-rates"

BRANCHES = pytest.mark.xfail(strict=True, reason="PyTorch compiles no decision by values without a graph break")
RECURRENT = pytest.mark.xfail(strict=True, reason="PyTorch compiles no recurrent layers of torch.nn")
MARKS = {
    **dict.fromkeys(("branch", "nested", "structures", "tuple", "iterates", "reads", "calls_methods"), BRANCHES),
    **dict.fromkeys(("shared", "checkpointed", "checkpointed_reentrant"), BRANCHES),
    **dict.fromkeys(("hooked", "lstm", "gru", "rnn"), RECURRENT),
    **dict.fromkeys(("attention", "encoder"), since((2, 13), "PyTorch compiled no attention in one piece")),
}
UNROLLED = {"loop", "sizes"}  # PyTorch makes a graph for each number of rounds, and for each number that numpy gets


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def compiled(model, backend="eager"):
    """The compiled model, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def transformed(model, pipeline, **options):
    """A transformed model and its copy."""
    bio = biofx.transform(model, pipeline, example_inputs=X, **options)
    return bio, copy.deepcopy(bio)


def leaves(output):
    return pytree.tree_leaves(vars(output) if hasattr(output, "hidden") else output)


def compare(run, model, eager, training):
    """Run a compiled model and an eager one on all batches; their outputs, gradients and buffers have to be equal."""
    for size in BATCHES:
        outputs = [leaves(each(X[:size])) for each in (run, eager)]
        torch.testing.assert_close(*outputs)
        if training:
            for values in outputs:
                sum(value.square().sum() for value in values).backward()
    gradients = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, eager)]
    assert bool(gradients[0]) is training
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize(
    ("pipeline", "training"), in_turn([*registry.registered_passes(), *registry.recipes()], [False, True])
)
def test_every_pass_before_and_after_attach(pipeline, training):
    pair = transformed(mlp(3, 8, 4), pipeline)
    bio, eager = (model.train(training) for model in pair)
    run, counter = compiled(bio, "aot_eager" if training else "eager")
    compare(run, bio, eager, training)
    assert counter.frame_count == 2  # the second is for all batch sizes
    for model in pair:
        model.zero_grad()
        biofx.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    compare(run, bio, eager, training)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in ISLANDS])
def test_islands_compile_into_two_graphs(name):
    bio, eager = transformed(Around(ISLANDS[name][0]()), LEARNING)
    run, counter = compiled(bio.eval())
    with torch.no_grad():
        compare(run, bio, eager.eval(), training=False)
    assert counter.frame_count == (len(BATCHES) if name in UNROLLED else 2)


def test_islands_learn_as_without_compiling():
    bio, eager = transformed(Around(ISLANDS["registered"][0]()), LEARNING, frontend="module")
    run, _ = compiled(bio, "aot_eager")
    compare(run, bio, eager, training=True)


@pytest.mark.parametrize("name", ["branch", "rnn"])
def test_what_breaks_the_graph_runs_in_parts(name):
    bio, eager = transformed(Around(ISLANDS[name][0]()), LEARNING)
    compare(torch.compile(bio, backend="eager"), bio, eager, training=True)


class CompiledPart(nn.Module):
    """A model with a part that `torch.compile` returned."""

    def __init__(self, is_compiled=True):
        super().__init__()
        part = mlp(3, 8, 4)
        self.part = torch.compile(part, backend="aot_eager") if is_compiled else part
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.part(x).tanh())


# The checks of a transform compile the part. `attach`, which puts its hooks to sleep, changes attributes afterwards.
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "frontend", [pytest.param("symbolic", marks=UNNOTICED), pytest.param("module", marks=UNNOTICED), "export"]
)
def test_a_part_may_be_compiled_before_the_transform(frontend, inplace):
    model, plain, x = CompiledPart(), CompiledPart(is_compiled=False), X[:3]
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    eager = biofx.transform(plain, "split-synapses{init=equal}")
    bio = biofx.transform(model, "split-synapses{init=equal}", example_inputs=x, frontend=frontend, inplace=inplace)
    twin = copy.deepcopy(bio)
    for each in (bio, eager):
        optimizer = attached(each)
        step(each, optimizer, x)
    torch.testing.assert_close(bio(x), eager(x))
    folded = biofx.fold(bio)
    assert type(folded.part) is type(CompiledPart().part)
    torch.testing.assert_close(folded(x), bio(x))
    torch.testing.assert_close(twin(x), plain(x))
    if not inplace:
        torch.testing.assert_close(model(x), plain(x))


def test_hooks_that_copies_of_a_compiled_part_lose():
    model, x = CompiledPart(), X[:3]
    model.part.register_forward_hook(lambda module, inputs, output: output + 1)
    expected = model(x)
    with pytest.raises(
        biofx.CaptureError, match="part has hooks, which copies of OptimizedModule lose; .* inplace=True"
    ):
        biofx.transform(model, LEARNING)
    bio = biofx.transform(model, LEARNING, inplace=True)
    torch.testing.assert_close(bio(x), expected)
    with pytest.raises(biofx.ArgumentError, match="fold: .* part has hooks, which copies of OptimizedModule lose"):
        biofx.fold(bio)


def test_a_folded_graph_compiles():
    bio, eager = (biofx.fold(model) for model in transformed(mlp(3, 8, 4), "hofmann2025"))
    run, counter = compiled(bio)
    compare(run, bio, eager, training=True)
    assert counter.frame_count == 2


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    biofx.attach(model, optimizer, **options)
    return optimizer


@pytest.mark.parametrize(("pipeline", "rules"), [("cortex", False), ("crystallize", True), ("dales-principle", False)])
def test_a_step_that_is_compiled_as_a_whole(pipeline, rules):
    bio, eager = transformed(mlp(3, 8, 4), pipeline)
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(functools.partial(step, bio, attached(bio, compile=rules)), backend=counter)
    optimizer, graphs = attached(eager), []
    for size in BATCHES:
        run(X[:size])
        step(eager, optimizer, X[:size])
        graphs.append(counter.frame_count)
    torch.testing.assert_close(bio.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)
    assert graphs[1] == graphs[0] + 1 == graphs[-1]


@pytest.mark.xfail(strict=True, reason="PyTorch breaks the graph at Optimizer.step, and rules act in its hooks")
@pytest.mark.parametrize("pipeline", [None, "fuzzy-learning-rates"])
def test_an_optimizer_step_in_one_graph(pipeline):
    model = mlp(3, 4)
    if pipeline is not None:
        model = biofx.transform(model, pipeline)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if pipeline is not None:
        biofx.attach(model, optimizer)
    model(X).sum().backward()
    torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")()


def test_a_model_that_compiles_itself():
    model = mlp(3, 4)
    model.compile(backend="eager")
    bio, eager = transformed(model, LEARNING)
    bio.compile(backend="eager")
    compare(bio, bio, eager, training=True)
    torch.testing.assert_close(biofx.fold(bio)(X), bio(X))


@since((2, 13), "PyTorch compiled no generated function inside of functional_call")
@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_weights_given_by_their_original_names(frontend):
    """The compiled graph read what is stored, and ignored the weights that `functional_call` gives."""
    model = mlp(3, 8, 2)
    bio = biofx.transform(model, LEARNING, example_inputs=X, frontend=frontend)
    given = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    run, _ = compiled(lambda weights, x: functional_call(bio, weights, (x,)))
    torch.testing.assert_close(run(given, X), functional_call(model, given, (X,)))
    run, _ = compiled(lambda x: bio(x))
    torch.testing.assert_close(run(X), model(X))


def test_weights_given_to_a_model_whose_graph_is_needed():
    bio = biofx.transform(mlp(3, 8, 2), "synaptic-scaling", example_inputs=X)
    with pytest.raises(Exception, match=r"0\.weight was replaced since the transform"):
        torch.compile(lambda w: functional_call(bio, {"0.weight": w}, (X,)), backend="eager")(torch.zeros(8, 3))
