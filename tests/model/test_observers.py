"""Observers: what they see, in every way that PyTorch has of running a model."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import biofx
from biofx import passes
from biofx.model.observers import observer
from conftest import gradients, loss
from models.small import ConvNet, mlp
from training_runs import ACTIVITY

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def plain():
    return mlp(4, 8, 3).double()


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
    torch.testing.assert_close(seen(bio.state_dict()), seen(expected.state_dict()))
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
    observer("looks_for_test")(look)

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
    observer("scalar_for_test")(lambda z, positions: z.sum())
    with pytest.raises(biofx.ArgumentError, match=r"biofx.scalar_for_test returns a tensor of shape \(\)"):
        torch.ops.biofx.scalar_for_test(torch.ones(4, 3), torch.zeros(2, 2, 3), 1, True)


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
