"""The front end "export": the graph is the model, whatever Python its forward is made of."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from conftest import loss, tensors, times_listed
from exported_models import EVERYTHING, assert_same_in_both_modes, call, export, forms, same, x
from models import any_python
from models.architectures import ARCHITECTURES
from models.small import ZOO, ConvNet, mlp
from pipelines import NEUTRAL


def bert(transformers):
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    return transformers.BertModel(config), {"input_ids": tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def llama(transformers):
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32, **NO_TOKENS
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(), "use_cache": False}


def t5(transformers):
    config = transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_ff=16, d_kv=4, vocab_size=32)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), inputs


NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TRANSFORMERS = {f.__name__: f for f in (bert, llama, t5)}


def tokens():
    return torch.randint(3, 32, (2, 6))


ANY_PYTHON = {
    "shape_branch": (any_python.ShapeBranch, lambda: (x(3, 4),)),
    "loop": (any_python.Loop, lambda: (x(3, 5, 4),)),
    "returns": (any_python.Returns, lambda: {"x": x()}),
    "auxiliary": (any_python.Auxiliary, lambda: x()),
    "counting": (any_python.Counting, lambda: x()),
    "gated": (any_python.Gated, lambda: x()),
}
SMALL = {name: (build, lambda shape=shape: (x(*shape),)) for name, (build, shape) in ZOO.items()}
SAMPLE = ("efficientnet", "gpt", "lstm", "mixture_of_experts", "siamese")
MODELS = {**SMALL, **{name: ARCHITECTURES[name] for name in SAMPLE}, **ANY_PYTHON}


def in_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@dataclass
class Case:
    """A model in float64, what it is called with, and the two after biofx had them."""

    model: nn.Module
    inputs: object
    neutral: nn.Module
    bio: nn.Module


@pytest.fixture(scope="module", params=[*MODELS, *TRANSFORMERS])
def case(request):
    torch.manual_seed(0)
    if request.param in TRANSFORMERS:
        transformers = pytest.importorskip("transformers")
        model, inputs = TRANSFORMERS[request.param](transformers)
    else:
        build, make = MODELS[request.param]
        model, inputs = build(), make()
    model, inputs = model.double(), pytree.tree_map(in_double, inputs)
    bio = export(model, inputs, EVERYTHING)
    return Case(model, inputs, export(model, inputs), bio)


def test_outputs_and_gradients_equal_the_model_in_both_modes(case):
    for other in forms(case.neutral):
        assert_same_in_both_modes(other, case.model, case.inputs)


def test_it_has_the_state_of_the_model(case):
    state, expected = case.neutral.state_dict(), case.model.state_dict()
    kept = {name for name in state if name.partition("_synapses.")[2] in ("gain", "steps", "seed")}
    originals = [name.partition("_synapses.")[0] for name in state if name not in kept]
    assert sorted(originals) == sorted(expected)
    assert {n: p.shape for n, p in stored_parameters(case.neutral)} == {
        n: p.shape for n, p in case.model.named_parameters()
    }
    assert isinstance(case.neutral, type(case.model)) or isinstance(case.model, nn.Sequential)


def test_biological_models_survive_everything(case):
    for other in forms(case.bio):
        biofx.verify(other)
        assert same(*(call(copy.deepcopy(m).eval(), case.inputs) for m in (other, case.bio)))


def test_folding_gives_the_plain_model_back(case):
    bio = case.bio.eval()
    plain = biofx.fold(bio)
    assert list(plain.state_dict()) == list(case.model.state_dict())
    model = copy.deepcopy(case.model).eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    results = [tensors(call(copy.deepcopy(m), case.inputs)) for m in (plain, model, bio)]
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_it_trains(case):
    bio = copy.deepcopy(case.bio).train()
    optimizer = torch.optim.AdamW(bio.parameters())
    biofx.attach(bio, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss(call(bio, case.inputs)).backward()
        optimizer.step()
    biofx.verify(bio)


def test_every_parameter_is_in_the_summary(case):
    summary = biofx.summary(case.bio)
    assert all(times_listed(summary, name) == 1 for name, _ in case.model.named_parameters())
    assert len(biofx.weight_sites(case.bio)) > 0


def batched(value, size):
    if not isinstance(value, torch.Tensor):
        return value
    return value[torch.arange(size) % len(value)]


def test_the_batch_may_have_any_size(case):
    model, bio = (copy.deepcopy(m).eval() for m in (case.model, case.neutral))
    five, one = (pytree.tree_map(lambda value, size=size: batched(value, size), case.inputs) for size in (5, 1))
    assert same(call(bio, five), call(model, five))
    assert same(call(bio, one), call(model, one))


# --- what else there is to a model -------------------------------------------------------------------------------


def test_methods_attributes_and_hooks_of_the_root_stay():
    class Model(nn.Linear):
        def twice(self, value):
            return 2 * self(value)

    model, value, seen = Model(4, 4), x(), []
    model.note = "kept"
    model.register_forward_hook(lambda *_: seen.append(1))
    bio = export(model, value)
    seen.clear()
    assert same(bio.twice(value), 2 * F.linear(value, model.weight, model.bias))
    assert (bio.note, seen) == ("kept", [1])


def test_the_model_is_untouched():
    model = ConvNet()
    before, modules = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    value, state = x(2, 1, 8, 8), torch.get_rng_state()
    export(model, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_place_and_a_failure_in_place():
    model, value = ConvNet(), x(2, 1, 8, 8)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(biofx.ArgumentError):
        export(model, value, exclude="*", inplace=True)
    assert [name for name, _ in model.named_modules()] == modules
    weight = model.head.weight
    assert export(model, value, inplace=True).get_parameter("head.weight") is weight


@pytest.mark.parametrize("name", ["gated", "returns", "auxiliary"])
def test_it_compiles_without_graph_breaks(name):
    build, make = ANY_PYTHON[name]
    inputs = make()
    bio = export(build(), inputs).eval()
    compiled = torch.compile(bio, fullgraph=True, backend="eager")
    assert same(call(compiled, inputs), call(bio, inputs))


def test_it_exports_and_is_transformed_again(tmp_path):
    model, value = ConvNet().eval(), x(2, 1, 8, 8)
    bio = export(model, value, [passes.SplitSynapses(2)])
    path = tmp_path / "model.pt2"
    biofx.export(bio, path, example_inputs=value)
    torch.testing.assert_close(torch.export.load(path).module()(value), model(value))
    again = biofx.transform(bio, NEUTRAL)
    torch.testing.assert_close(again(value), model(value))
    for frontend in ("symbolic", "export"):
        once_more = biofx.transform(biofx.fold(bio), EVERYTHING, example_inputs=value, frontend=frontend)
        assert list(biofx.weight_sites(once_more)) == list(biofx.weight_sites(bio))


def test_example_inputs_are_needed_and_have_to_fit():
    model = mlp(4, 4)
    with pytest.raises(biofx.ArgumentError, match='frontend="export" runs the model: it needs example_inputs, such as'):
        biofx.transform(model, NEUTRAL, frontend="export")
    with pytest.raises(biofx.ArgumentError, match="example_inputs do not fit Sequential.forward: "):
        export(model, x(2, 5))
    with pytest.raises(biofx.ArgumentError, match="example_inputs do not fit Sequential.forward"):
        export(model, (x(), x()))


def test_it_maps_over_a_batch_of_batches():
    """Operators that ask a tensor for its size have no rule for vmap."""
    model, value = ConvNet().eval(), x(3, 2, 1, 8, 8)
    bio = export(model, value[0], [passes.SplitSynapses(2)])
    torch.testing.assert_close(torch.func.vmap(bio)(value), torch.func.vmap(model)(value))
