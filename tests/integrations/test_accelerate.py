"""Accelerate trains a transformed model: attach takes what `prepare` returns, and what it was given."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes

accelerate = pytest.importorskip("accelerate")

PIPELINE = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.Crystallize(),
    passes.Rejuvenate(),
]


@pytest.fixture(autouse=True)
def _alone():
    """What accelerate remembers of a process ends with the test."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def start():
    torch.manual_seed(0)
    bio = biofx.transform(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), PIPELINE)
    return bio, torch.optim.AdamW(bio.parameters(), lr=0.01)


def prepared(when, **options):
    """An accelerator, and what it prepared of a model and an optimizer that are attached before that, or after it."""
    bio, optimizer = start()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    if when == "before":
        biofx.attach(bio, optimizer)
    model, optimizer = accelerator.prepare(bio, optimizer)
    if when == "after":
        biofx.attach(model, optimizer)
    return accelerator, bio, model, optimizer


def train(model, optimizer, numbers, backward=torch.Tensor.backward, parts=1):
    for number in numbers:
        images = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        for rows in torch.arange(16).chunk(parts):
            backward(F.cross_entropy(model(images[rows]), rows % 3) / parts)
        optimizer.step()
        optimizer.zero_grad()


def by_hand():
    bio, optimizer = start()
    biofx.attach(bio, optimizer)
    train(bio, optimizer, range(6))
    return bio.state_dict()


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_trains_as_a_loop_does(when):
    accelerator, bio, model, optimizer = prepared(when)
    train(model, optimizer, range(6), accelerator.backward)
    assert_same(bio.state_dict(), by_hand())


def test_accumulated_gradients_make_one_step():
    accelerator, bio, model, optimizer = prepared("after", gradient_accumulation_steps=2)
    images = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for part in range(4):
        rows = torch.arange(16).chunk(2)[part % 2]
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images[rows]), rows % 3))
            optimizer.step()
            optimizer.zero_grad()
        assert int(bio.get_buffer("0.weight_synapses.steps")) == (part + 1) // 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_half_precision_trains_with_rules(when):
    accelerator, bio, model, optimizer = prepared(when, mixed_precision="bf16")
    before = bio.get_parameter("0.weight").detach().clone()
    train(model, optimizer, range(3), accelerator.backward)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 3
    assert not torch.equal(bio.get_parameter("0.weight"), before)
    biofx.verify(accelerator.unwrap_model(model))


def test_what_accelerate_saves_resumes_bit_for_bit(tmp_path):
    accelerator, _, model, optimizer = prepared("after")
    train(model, optimizer, range(3), accelerator.backward)
    accelerator.save_state(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, bio, model, optimizer = prepared("after")
    accelerator.load_state(tmp_path)
    train(model, optimizer, range(3, 6), accelerator.backward)
    assert_same(bio.state_dict(), by_hand())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("unwrap", [lambda a, m: m, accelerate.Accelerator.unwrap_model, lambda a, m: bare(a, m)])
def test_a_model_in_half_precision_folds(frontend, unwrap):
    """Accelerate replaces the forward of the model by a wrapper around it, and a folded model has another forward."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    bio = biofx.transform(model, PIPELINE, frontend=frontend)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = unwrap(accelerator, accelerator.prepare(bio))
    plain, x = biofx.fold(wrapped), torch.randn(4, 8)
    torch.testing.assert_close(plain(x), wrapped(x), rtol=2e-2, atol=2e-2)
    for each in (plain, wrapped):
        each[0].register_forward_hook(lambda module, args, output: output * 0)
        torch.testing.assert_close(each(x), each[2].bias.expand(4, 3), rtol=2e-2, atol=2e-2)


def bare(accelerator, model):
    """The model without what Accelerate wraps it in."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def test_a_model_is_transformed_again_without_the_wrapper():
    bio = biofx.transform(nn.Linear(8, 3), "split-synapses")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(bio)
    with pytest.raises(biofx.ArgumentError, match=r"forward was replaced .* keep_fp32_wrapper=False"):
        biofx.transform(wrapped, "rejuvenate")
    again, x = biofx.transform(bare(accelerator, wrapped), "rejuvenate"), torch.randn(2, 8)
    torch.testing.assert_close(again(x), bio(x))
