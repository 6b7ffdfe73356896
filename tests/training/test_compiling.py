"""A compiled step: the same numbers to rounding, and a time to compile that does not grow with the model."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import biofx
from biofx.base.errors import LifecycleError
from biofx.training import blocks, compiling

ALL = "fuzzy-learning-rates{distribution=lognormal},volume-dependent-learning-rates,crystallize"


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    compiling._kernel.cache_clear()


@pytest.fixture
def without_code_generation(monkeypatch):
    """How often something is compiled does not depend on what the code becomes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def weights_after(model, pipeline, x, *, steps=4, optimizer=torch.optim.SGD, **options):
    bio = biofx.transform(copy.deepcopy(model), pipeline, example_inputs=(x,))
    own = optimizer(bio.parameters(), lr=0.1)
    biofx.attach(bio, own, **options)
    for _ in range(steps):
        own.zero_grad()
        bio(x).square().mean().backward()
        own.step()
    return bio.state_dict()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 80), nn.Linear(80, 4))


@pytest.mark.parametrize(
    ("pipeline", "optimizer"),
    [
        (f"{ALL},synaptic-scaling", torch.optim.SGD),
        (f"split-synapses{{synapses=3}},{ALL},dales-principle,exponentiated-gradient", torch.optim.AdamW),
    ],
)
def test_the_numbers_are_the_same_to_rounding(pipeline, optimizer):
    x = torch.randn(8, 3, 6, 6)
    model = network().to(memory_format=torch.channels_last)
    assert model[3].weight.numel() > compiling.ALONE > model[0].weight.numel()
    plain, compiled = (weights_after(model, pipeline, x, optimizer=optimizer, compile=c) for c in (False, True))
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("without_code_generation")
def test_kernels_do_not_grow_with_the_number_of_weights():
    graphs = []
    for layers in (2, 30):
        torch.compiler.reset()
        compiling._kernel.cache_clear()
        counters.clear()
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        weights_after(model, ALL, torch.randn(4, 8), steps=2, compile=True)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]


@pytest.mark.usefixtures("without_code_generation")
def test_any_number_of_pipelines_is_compiled():
    counters.clear()
    for power in range(9):
        tensor = torch.full((8,), 2.0)
        compiling.run_kernel(lambda x, name: x ** len(name), None, [tensor], compiled=True, name="x" * power)
        assert torch.equal(tensor, torch.full((8,), 2.0**power))
    assert counters["stats"]["unique_graphs"] == 9


@pytest.mark.usefixtures("without_code_generation")
def test_no_step_compiles_again():
    model, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 8)), torch.randn(4, 300)
    weights_after(model, ALL, x, steps=2, compile=True)
    before = counters["stats"]["unique_graphs"]
    bio = biofx.transform(model, ALL, example_inputs=(x,))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer, compile=True)
    for _ in range(3):
        bio(x).sum().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == before


def test_without_a_compiler(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    bio = biofx.transform(nn.Linear(4, 2), "fuzzy-learning-rates")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    with pytest.raises(
        LifecycleError, match=r"compile=True needs a compiler .* no working C\+\+ compiler found; install"
    ):
        biofx.attach(bio, optimizer, compile=True)
    biofx.attach(bio, optimizer)


def test_parts_that_share_memory_are_vectors():
    tensor = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)
    first, number = blocks.lines([tensor, torch.tensor(1.0)])
    assert (first.shape, number.shape) == ((300,), ())
    first += 1
    assert tensor.sum() == 300
    assert blocks.lines([tensor, torch.zeros(4, 3, 5, 5)]) is None
