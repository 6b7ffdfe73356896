"""Gradient hooks: what they do to gradients, in every way that PyTorch has of computing one."""

import copy
import io
import re
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from biofx.model.gradient_hooks import gradient_hook, scale_grad
from biofx.model.synapses import stored_parameters
from conftest import gradients, loss
from models.small import ConvNet, mlp

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PIPELINE = [passes.FuzzyLearningRates(nu=0.4)]


@pytest.fixture
def plain():
    return mlp(4, 8, 3).double()


@pytest.fixture
def bio(plain):
    return biofx.transform(plain, PIPELINE)


@pytest.fixture
def oracle(plain, bio):
    """Gain × gradient of the plain model, in float64."""
    expected = gradients(plain, X)
    for name, site in biofx.weight_sites(bio).items():
        expected[name] = expected[name] * site.gain
    return expected


def original(names):
    """Values by the names of the original model."""
    return {re.sub(r"_synapses\.(weight|bias)$", "", name): value for name, value in names.items()}


def assert_same(given, expected, **tolerance):
    torch.testing.assert_close(original(given), expected, **tolerance)


def exactly(given, expected):
    assert_same(given, expected, rtol=0, atol=0)


def test_the_forward_pass_is_a_view():
    w = torch.randn(3, 2, requires_grad=True)
    y = torch.ops.biofx.scale_grad(w, torch.rand(3, 2))
    assert y.data_ptr() == w.data_ptr()
    assert torch.ops.biofx.scale_grad(w, 0.5).data_ptr() == w.data_ptr()


def test_the_rule_stays_callable():
    assert scale_grad(torch.tensor(3.0), torch.tensor(0.5)) == 1.5


@pytest.mark.parametrize("gain", [0.25, torch.tensor([[0.5], [2.0]]), torch.tensor([1.0, 2.0, 3.0])])
def test_the_gain_broadcasts_against_the_weight(gain):
    w = torch.randn(2, 3, requires_grad=True)
    torch.ops.biofx.scale_grad(w, gain).sum().backward()
    assert torch.equal(w.grad, torch.ones(2, 3) * gain)


def test_eager(bio, oracle):
    exactly(gradients(bio, X), oracle)


def test_compiled_without_graph_breaks(bio, oracle):
    compiled = torch.compile(bio, fullgraph=True, backend="aot_eager")
    assert_same({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, X).items()}, oracle)


def test_deepcopy(bio, oracle):
    exactly(gradients(copy.deepcopy(bio), X), oracle)


def test_saving_and_loading_the_module(bio, oracle):
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    exactly(gradients(torch.load(file, weights_only=False), X), oracle)


def test_tracing_again(bio, oracle):
    exactly(gradients(fx.symbolic_trace(bio), X), oracle)


def test_the_interpreter(bio, oracle):
    loss(fx.Interpreter(bio).run(X)).backward()
    exactly({name: p.grad for name, p in stored_parameters(bio)}, oracle)


def test_a_training_export_keeps_node_and_gradient(bio, oracle):
    program = torch.export.export(bio, (X,))
    assert any(node.target is torch.ops.biofx.scale_grad.default for node in program.graph.nodes)
    exactly(gradients(program.module(), X), oracle)


def test_an_inference_export_holds_no_biofx_operator(bio):
    program = torch.export.export(bio, (X,)).run_decompositions()
    assert not [node for node in program.graph.nodes if "biofx" in str(node.target)]


def test_functional_gradients(bio, oracle):
    parameters = dict(bio.named_parameters())
    assert_same(grad(lambda p: loss(functional_call(bio, p, (X,))))(parameters), oracle)
    assert_same(jacrev(lambda p: loss(functional_call(bio, p, (X,))))(parameters), oracle)


def test_functional_values_are_exact(plain, bio):
    _, y = grad(lambda p: ((y := functional_call(bio, p, (X,))).sum(), y), has_aux=True)(dict(bio.named_parameters()))
    assert torch.equal(y, plain(X))


def test_per_sample_gradients(bio, oracle):
    per_sample = vmap(grad(lambda p, x: loss(functional_call(bio, p, (x[None],)))), in_dims=(None, 0))
    summed = {name: g.sum(0) for name, g in per_sample(dict(bio.named_parameters()), X).items()}
    assert_same(summed, oracle)


def test_an_ensemble_of_models_learns_as_each_does_on_its_own(plain):
    pipeline = biofx.rewrite.registry.parse("cortex")
    models = [biofx.transform(plain, pipeline, seed=seed).train() for seed in range(3)]
    stacked = {n: torch.stack([m.state_dict()[n] for m in models]) for n in models[0].state_dict()}
    parameters = {name: stacked.pop(name) for name, _ in models[0].named_parameters()}
    base = copy.deepcopy(models[0]).to("meta")
    per_model = vmap(grad(lambda p, b: loss(functional_call(base, (p, b), (X,)))))(parameters, stacked)
    expected = [gradients(model, X) for model in models]
    assert_same(per_model, {name: torch.stack([g[name] for g in expected]) for name in expected[0]})
    torch.testing.assert_close(stacked, {n: torch.stack([m.state_dict()[n] for m in models]) for n in stacked})


@pytest.mark.parametrize(("weight_dim", "gain_dim"), [(0, None), (2, None), (None, 0), (1, 1), (None, 1)])
def test_vmap_over_weights_and_gains(weight_dim, gain_dim):
    w, c = torch.randn(3, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    ws = w if weight_dim is None else torch.stack([w, 2 * w], weight_dim)
    cs = c if gain_dim is None else torch.stack([c, 3 * c], gain_dim)
    ws.requires_grad_()
    ys = vmap(torch.ops.biofx.scale_grad, in_dims=(weight_dim, gain_dim))(ws, cs)
    expected = torch.stack([w, w if weight_dim is None else 2 * w])
    assert torch.equal(ys, expected)
    (given,) = torch.autograd.grad(ys.sum(), ws)
    gains = torch.stack([c, c if gain_dim is None else 3 * c])[:, None].expand(2, 3, 2)
    torch.testing.assert_close(given, gains.sum(0) if weight_dim is None else gains.movedim(0, weight_dim))


def test_second_derivatives():
    w, c = torch.randn(3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def f(w):
        return torch.ops.biofx.scale_grad(w, c).pow(3).sum()

    # Every differentiation scales once: d²/dw² of w³ is 6w, times c twice.
    torch.testing.assert_close(torch.diagonal(hessian(f)(w)), 6 * w * c * c)
    x = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * w * c * c)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(bio, oracle, reentrant):
    x = X.clone().requires_grad_()
    loss(checkpoint(bio, x, use_reentrant=reentrant)).backward()
    exactly({name: p.grad for name, p in stored_parameters(bio)}, oracle)


def test_autocast():
    plain = mlp(4, 8, 3)
    bio = biofx.transform(plain, PIPELINE)
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, given = gradients(plain, x), gradients(bio, x)
    for name, site in biofx.weight_sites(bio).items():
        expected[name] = expected[name] * site.gain
    exactly(given, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_keeps_its_dtype(dtype):
    w = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    torch.ops.biofx.scale_grad(w, torch.full((2, 2), 0.5, dtype=torch.float64)).sum().backward()
    assert w.grad.dtype is dtype
    assert torch.equal(w.grad, torch.full((2, 2), 0.5, dtype=dtype))


def test_a_frozen_weight_gets_no_gradient():
    plain = ConvNet().eval()
    plain.stem.weight.requires_grad_(False)
    bio = biofx.transform(plain, PIPELINE)
    assert "stem.weight" not in gradients(bio, torch.randn(2, 1, 8, 8))
    bio.stem.weight.requires_grad_(True)
    assert "stem.weight" in gradients(bio, torch.randn(2, 1, 8, 8))


def test_one_hook_for_all_uses_fires_once():
    fired = []

    @gradient_hook("count_for_test_grad(Tensor(a) weight) -> Tensor(a)")
    def count(gradient):
        fired.append(gradient.clone())
        return gradient

    weight = nn.Parameter(torch.ones(2))
    hooked = torch.ops.biofx.count_for_test_grad(weight)
    (hooked.sum() + (2 * hooked).sum()).backward()
    assert [g.tolist() for g in fired] == [[3.0, 3.0]]


def test_a_rule_must_take_the_arguments_of_its_schema():
    with pytest.raises(biofx.ArgumentError, match=r"the rule takes \['rate'\] after the gradient.*gain"):
        gradient_hook("wrong_for_test_grad(Tensor(a) weight, Tensor gain) -> Tensor(a)")(lambda g, rate: g)
    assert not hasattr(torch.ops.biofx, "wrong_for_test_grad")


@gradient_hook("normalize_grad(Tensor(a) weight) -> Tensor(a)")
def normalize_grad(gradient):
    return gradient / gradient.norm()


def test_a_rule_that_is_no_factor_on_every_entry_is_refused():
    @dataclass(frozen=True)
    class Normalizing(passes.Pass):
        name = "normalizing"
        slot = passes.Slot.HOOK

        def rewrite(self, site, edit):
            edit.insert(torch.ops.biofx.normalize_grad)

    with pytest.raises(biofx.PipelineError, match="weight: biofx.normalize_grad does not multiply every entry"):
        biofx.transform(nn.Linear(3, 2), [Normalizing()])
