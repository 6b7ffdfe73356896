"""The dispatcher operators: what they do to gradients, in every way that PyTorch has of computing one."""

import copy
import io
import re
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from biofx.model import operators
from biofx.model.synapses import stored_parameters
from biofx.passes.synaptic_scaling import sum_activity
from conftest import gradients, loss
from models.small import ConvNet, mlp
from training_runs import ACTIVITY

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
    given = original(given)
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], **tolerance)


def exactly(given, expected):
    assert_same(given, expected, rtol=0, atol=0)


def test_the_forward_pass_is_a_view():
    w = torch.randn(3, 2, requires_grad=True)
    y = torch.ops.biofx.scale_grad(w, torch.rand(3, 2))
    assert y.data_ptr() == w.data_ptr()
    assert torch.ops.biofx.scale_grad(w, 0.5).data_ptr() == w.data_ptr()


def test_the_rule_stays_callable():
    assert operators.scale_grad(torch.tensor(3.0), torch.tensor(0.5)) == 1.5


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


def seen(state):
    return {name: value for name, value in state.items() if name.endswith((".seen", ".active"))}


def on_dual_numbers(bio):
    with forward_ad.dual_level():
        bio(forward_ad.make_dual(X, X))


WAYS = {
    "vmap": lambda bio: vmap(lambda x: bio(x[None]))(X),
    "nested vmap": lambda bio: vmap(vmap(bio))(X.view(3, 2, 4)),
    "per-sample gradients": lambda bio: vmap(
        grad(lambda p, x: loss(functional_call(bio, p, (x[None],)))), in_dims=(None, 0)
    )(dict(bio.named_parameters()), X),
    "jacrev": lambda bio: jacrev(bio)(X),
    "jacfwd": lambda bio: jacfwd(bio)(X),
    "hessian": lambda bio: hessian(lambda x: loss(bio(x)))(X),
    "jvp": lambda bio: jvp(bio, (X,), (X,)),
    "dual numbers": on_dual_numbers,
}


@pytest.mark.parametrize("way", WAYS)
def test_observers_see_the_same_under_every_transform(plain, way):
    pipeline = [passes.SynapticScaling(), passes.FuzzyLearningRates(distribution="activity")]
    bio, expected = (biofx.transform(plain, pipeline).train() for _ in range(2))
    WAYS[way](bio)
    expected(X)
    assert_same(seen(bio.state_dict()), seen(expected.state_dict()))
    assert len(seen(bio.state_dict())) == 4


LAYOUTS = {
    "units": lambda x: x[0, :, 0, 0],
    "units last": lambda x: x[:, :, 0, 0],
    "sequences": lambda x: x[..., 0].transpose(1, 2).contiguous(),
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second position": lambda x: x[::2, :, 1::2],
    "broadcast": lambda x: x[:, :, :1, :1].expand(-1, -1, 3, 4),
    "no positions": lambda x: x[:0],
}
AXES = {"units": 0, "sequences": 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_observers_reduce_any_layout(layout, dtype):
    x = LAYOUTS[layout](0.03 * torch.randn(5, 7, 6, 4)).to(dtype)
    axis = AXES.get(layout, 1)
    units = x.movedim(axis, -1).reshape(-1, 7)
    wide = torch.promote_types(dtype, torch.float32)
    for unit_axis in (axis, axis - x.dim()):
        seen, active = torch.zeros(2, 2, 2, 7, dtype=wide)
        torch.ops.biofx.sum_activity(x, seen, unit_axis, True)
        torch.ops.biofx.count_active(x, active, unit_axis, True)
        positions = torch.full((7,), float(len(units)), dtype=wide)
        torch.testing.assert_close(seen.sum(0), torch.stack((units.abs().sum(0, dtype=wide), positions)))
        assert torch.equal(active.sum(0), torch.stack(((units.abs() > 0.01).sum(0).to(wide), positions)))


def test_observations_add_up_to_a_unit_in_the_last_place():
    different = torch.rand(50, 1, 8)
    state = torch.zeros(2, 2, 8)
    for _ in range(400):
        for x in different:
            torch.ops.biofx.sum_activity(x, state, 1, True)
    expected = 400 * different.double().sum(0)
    assert ((state.sum(0)[:1] - expected).abs() <= torch.finfo(torch.float32).eps * expected).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_observers_leave_out_what_is_not_finite(bad):
    state = torch.zeros(2, 2, 3)
    batches = torch.ones(3, 4, 3)
    batches[1, 2, 0] = bad
    for x in batches:
        torch.ops.biofx.sum_activity(x, state, 1, True)
    assert torch.equal(state.sum(0), torch.full((2, 3), 8.0))


def observing(look, build=lambda: nn.Linear(3, 2), method="observe"):
    """A model in which a pass observes a weight by a function, which becomes an observer."""
    operators.observer("looks_for_test")(look)

    @dataclass(frozen=True)
    class Looks(passes.Pass):
        name, slot = "looks", passes.Slot.OBSERVER

        def rewrite(self, site, edit):
            getattr(edit, method)(torch.ops.biofx.looks_for_test, site, "seen")

    return biofx.transform(build(), [Looks()])


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda z, positions: z.sum(), r"shape \(\); .* for each unit, shape \(2,\)"),
        (lambda z, positions: z.sum(positions[1:]), r"shape \(\d, 2\); .* shape \(2,\)"),
        (lambda z, positions: z.sum(positions)[:1], r"shape \(1,\); .* shape \(2,\)"),
        (lambda z, positions: z.mean(positions), r"returns no sum over positions: .* activity.sum\(positions\)"),
        (lambda z, positions: z.amax(positions), "returns no sum over positions"),
    ],
    ids=["scalar", "some positions", "one unit", "mean", "maximum"],
)
@pytest.mark.parametrize("method", ["observe", "observe_input"])
def test_an_observer_that_returns_no_sums_is_refused(look, message, method):
    with pytest.raises(biofx.PipelineError, match=f"looks: weight: the observer biofx.looks_for_test {'.*'}{message}"):
        observing(look, lambda: nn.Linear(2, 2), method)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "look",
    [
        lambda z, positions: z.sum(positions),
        lambda z, positions: (z > 0.01).sum(positions),
        lambda z, positions: (z - z.mean(positions, keepdim=True)).square().sum(positions),
        lambda z, positions: z.log().sum(positions),
    ],
    ids=["sum", "count", "variance", "not finite"],
)
def test_an_observer_may_return_any_sum(look, dtype):
    bio = observing(look, lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 1, 1)).to(dtype))
    assert not bio.get_buffer("0.weight_synapses.seen").any()


def test_an_observer_called_by_hand_checks_the_shape():
    operators.observer("scalar_for_test")(lambda z, positions: z.sum())
    with pytest.raises(biofx.ArgumentError, match=r"biofx.scalar_for_test returns a tensor of shape \(\)"):
        torch.ops.biofx.scalar_for_test(torch.ones(4, 3), torch.zeros(2, 2, 3), 1, True)


@pytest.mark.parametrize(
    ("insert", "message"),
    [
        (lambda edit, site: edit.observe(sum_activity, site, "seen"), r"give its operator, torch\.ops\.biofx\.sum_act"),
        (lambda edit, site: edit.observe(torch.sum, site, "seen"), r"sum.* is no observer; give torch\.ops\.biofx\.<n"),
        (lambda edit, site: edit.insert(normalize_grad), r"give its operator, torch\.ops\.biofx\.normalize_grad"),
    ],
    ids=["observer", "another function", "hook"],
)
def test_a_function_in_place_of_its_operator_is_refused(insert, message):
    @dataclass(frozen=True)
    class Inserts(passes.Pass):
        name, slot = "inserts", passes.Slot.HOOK

        def rewrite(self, site, edit):
            insert(edit, site)

    with pytest.raises(biofx.PipelineError, match=f"inserts: weight: .*{message}"):
        biofx.transform(nn.Linear(3, 2), [Inserts()])


def test_counts_are_exact_beyond_the_whole_numbers_of_float32():
    state = torch.zeros(2, 2, 1)
    state[0] = 2**24
    for _ in range(1001):
        torch.ops.biofx.count_active(torch.ones(1, 1), state, 1, True)
    assert (state.double().sum(0) == 2**24 + 1001).all()


def test_observers_count_nothing_in_evaluation_mode():
    plain = ConvNet().eval()
    bio = biofx.transform(plain, ACTIVITY)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(bio(x), plain(x))
    assert not bio.stem.weight_synapses.active.any()
    bio.train()
    plain.train()
    torch.manual_seed(0)
    expected = gradients(plain, x)
    torch.manual_seed(0)
    given = gradients(bio, x)
    torch.testing.assert_close(given["norm.weight"], expected["norm.weight"])
    assert bio.stem.weight_synapses.active.sum() > 0
    bio(x)
    seen = bio.stem.weight_synapses.seen.clone()
    bio.eval()(x)
    assert torch.equal(bio.stem.weight_synapses.seen, seen)


def test_a_model_with_observers_pickles_compiles_and_exports():
    bio = biofx.transform(mlp(4, 6, 2), ACTIVITY)
    x = torch.randn(5, 4)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    compiled = torch.compile(copy.deepcopy(bio), fullgraph=True, backend="aot_eager")
    program = torch.export.export(copy.deepcopy(bio), (x,)).module()
    bio(x)
    for other in (loaded, compiled, program):
        other(x)
        seen = {name.removeprefix("_orig_mod."): b for name, b in other.named_buffers() if name.endswith(".active")}
        assert len(seen) == 2
        assert all(torch.equal(b, bio.get_buffer(name)) for name, b in seen.items())


def test_an_ensemble_of_models_learns_as_each_does_on_its_own(plain):
    pipeline = biofx.rewrite.registry.parse("cortex")
    models = [biofx.transform(plain, pipeline, seed=seed).train() for seed in range(3)]
    stacked = {n: torch.stack([m.state_dict()[n] for m in models]) for n in models[0].state_dict()}
    parameters = {name: stacked.pop(name) for name, _ in models[0].named_parameters()}
    base = copy.deepcopy(models[0]).to("meta")
    per_model = vmap(grad(lambda p, b: loss(functional_call(base, (p, b), (X,)))))(parameters, stacked)
    expected = [gradients(model, X) for model in models]
    assert_same(per_model, {name: torch.stack([g[name] for g in expected]) for name in expected[0]})
    assert_same(seen(stacked), {n: torch.stack([m.state_dict()[n] for m in models]) for n in seen(stacked)})


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

    @operators.gradient_hook("count_for_test_grad(Tensor(a) weight) -> Tensor(a)")
    def count(gradient):
        fired.append(gradient.clone())
        return gradient

    weight = nn.Parameter(torch.ones(2))
    hooked = torch.ops.biofx.count_for_test_grad(weight)
    (hooked.sum() + (2 * hooked).sum()).backward()
    assert [g.tolist() for g in fired] == [[3.0, 3.0]]


def test_a_rule_must_take_the_arguments_of_its_schema():
    with pytest.raises(biofx.ArgumentError, match=r"the rule takes \['rate'\] after the gradient.*gain"):
        operators.gradient_hook("wrong_for_test_grad(Tensor(a) weight, Tensor gain) -> Tensor(a)")(lambda g, rate: g)
    assert not hasattr(torch.ops.biofx, "wrong_for_test_grad")


@operators.gradient_hook("normalize_grad(Tensor(a) weight) -> Tensor(a)")
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
