"""Every registered pass × every property: a new pass joins by being registered."""

import copy
import functools
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from biofx.rewrite import registry
from conftest import gradients, loss, tensors
from models.small import ZOO, ConvNet, mlp

PASSES = [pass_class() for pass_class in registry.registered_passes().values()]
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=PASSES, ids=str)
def pass_(request):
    return request.param


@functools.cache
def transformed(pass_):
    torch.manual_seed(0)
    return biofx.transform(ConvNet().eval(), [pass_])


@pytest.fixture
def bio(pass_):
    return copy.deepcopy(transformed(pass_))


def reload(bio):
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_preserves_the_function_if_it_says_so(pass_, bio):
    torch.manual_seed(0)
    plain = ConvNet().eval()
    if pass_.preserves_function:
        torch.testing.assert_close(bio(X), plain(X))


def test_is_linear_in_the_gradient(bio):
    once = gradients(bio, X)
    loss(bio(X)).mul(2).backward()
    for name, p in stored_parameters(bio):
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_gradients_of_micro_batches_add_up(bio):
    """What gradient accumulation and the all-reduce of data parallelism rely on."""
    whole = gradients(bio, X)
    for half in X.chunk(2):
        loss(bio(half)).backward()
    for name, p in stored_parameters(bio):
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(pass_, dtype):
    bio = biofx.transform(ConvNet().to(dtype).eval(), [pass_])
    assert bio(X.to(dtype)).dtype is dtype
    assert {p.dtype for p in bio.parameters()} == {dtype}
    assert {g.dtype for g in gradients(bio, X.to(dtype)).values()} == {dtype}


def test_deepcopy_and_pickling_keep_everything(bio):
    expected = gradients(bio, X)
    for other in (copy.deepcopy(bio), reload(bio)):
        assert torch.equal(other(X), bio(X))
        assert same(gradients(other, X), expected)
        assert same(other.state_dict(), bio.state_dict())
        biofx.verify(other)


def test_a_checkpoint_restores_everything(pass_, bio):
    other = biofx.transform(ConvNet().eval(), [pass_], seed=99)
    other.load_state_dict(bio.state_dict(), strict=True)
    assert torch.equal(other(X), bio(X))
    assert same(gradients(other, X), gradients(bio, X))


def test_a_saved_folder_restores_everything(pass_, bio, tmp_path):
    biofx.save(bio, tmp_path)
    torch.manual_seed(99)
    other = biofx.load(tmp_path, ConvNet())
    assert torch.equal(other(X), bio(X))
    assert same(gradients(other, X), gradients(bio, X))
    assert same(other.state_dict(), bio.state_dict())
    assert str(other.biofx) == str(bio.biofx)
    assert biofx.summary(other) == biofx.summary(bio)


def test_folds(bio):
    plain = biofx.fold(bio)
    torch.testing.assert_close(plain(X), bio(X))
    assert not [name for name, _ in [*plain.named_modules(), *plain.named_buffers()] if "biofx" in name]
    assert "biofx" not in getattr(plain, "code", "")  # a graph is left where units are grouped


def test_changes_something_and_shows_it(pass_, bio):
    assert pass_.name in biofx.table(bio) or pass_.moment is not None
    for site in biofx.weight_sites(bio).values():
        (row,) = [row for row in biofx.summary(bio).rows if row["weight"] == site.name]
        # It is an output layer, or reads free inputs.
        assert pass_.name in site.passes or row["left_alone"][pass_.name].startswith("it ")


def test_adding_a_layer_changes_no_other_draw(pass_):
    if pass_.changes_units:
        pytest.skip("the last layer becomes a hidden one, whose units such a pass changes")
    short, long = mlp(3, 4, 4), mlp(3, 4, 4, 4)
    long.load_state_dict(short.state_dict(), strict=False)
    a, b = (biofx.transform(model, [pass_]) for model in (short, long))
    values = [dict([*stored_parameters(bio), *bio.named_buffers()]) for bio in (a, b)]
    assert same(values[0], {name: values[1][name] for name in values[0]})


def compatible(chosen):
    """The first pass for each exclusive slot, and no grouping of units that are mirrored."""
    first = {p.slot: p for p in reversed(chosen)}
    kept = [p for p in chosen if not p.slot.exclusive or first[p.slot] is p]
    mirrored = any(p.changes_units for p in kept)
    return [p for p in kept if not (mirrored and p.slot is passes.Slot.OUTPUT)]


@given(
    st.permutations(PASSES), st.integers(1, len(PASSES)), st.sampled_from(sorted(ZOO)), st.sampled_from(["SGD", "Adam"])
)
@settings(deadline=None, max_examples=20)
def test_any_passes_in_any_order_are_valid_train_and_fold(order, count, name, optimizer_name):
    build, shape = ZOO[name]
    model, x = build().eval(), torch.randn(shape)
    chosen = compatible(order[:count])
    bio = biofx.transform(model, chosen, example_inputs=(x,))
    assert bio.code == biofx.transform(model, chosen[::-1], example_inputs=(x,)).code
    biofx.verify(bio)
    if all(p.preserves_function for p in chosen):
        for a, b in zip(tensors(bio(x)), tensors(model(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=1e-3)
    if any(run.weights for run in bio.biofx.passes):  # mirrored units may all be left alone
        biofx.attach(bio, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss(bio.train()(x)).backward()
        optimizer.step()
    biofx.verify(bio)
    assert all(torch.isfinite(p).all() for p in bio.parameters())
    plain = biofx.fold(bio.eval())
    if not any(p.changes_units for p in chosen):
        model.load_state_dict(plain.state_dict(), strict=True)
    for a, b in zip(tensors(bio(x)), tensors(plain(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
