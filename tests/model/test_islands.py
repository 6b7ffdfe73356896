"""Islands: what cannot be traced stays as it is, and the weights inside of it are rewritten like all others."""

import copy
import functools
import io
import re
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import biofx
from biofx import passes
from biofx.model.synapses import Synapses, stored_name, stored_parameters, synapses_of
from biofx.weights.facts import Need
from conftest import flat, gradients, in_turn, loss, tensors, times_listed
from models.islands import ISLANDS, Around, Branch, Checkpointed, Encoder, Kernels, Recursive, Tokens

SPLIT = (passes.SplitSynapses(2, init="equal", compensate=False),)
SLOW = (passes.SplitSynapses(2), passes.FuzzyLearningRates())


@pytest.fixture(params=ISLANDS)
def kind(request):
    return request.param


@pytest.fixture(params=["symbolic", "module"])
def frontend(request):
    return request.param


def network(kind):
    return Around(ISLANDS[kind][0]()).double().eval()


@functools.cache
def both(kind, frontend, passes_):
    """A network and what a transform made of it, for tests that change neither."""
    torch.manual_seed(0)
    model = network(kind)
    return model, biofx.transform(model, [*passes_], frontend=frontend)


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_close(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y)


def test_islands_are_the_smallest_untraceable_modules(kind):
    _, bio = both(kind, "symbolic", SPLIT)
    assert list(bio.biofx.islands) == ISLANDS[kind][1]


def test_the_function_is_preserved(kind, frontend):
    model, bio = both(kind, frontend, SLOW)
    for mode in (True, False):
        assert_close(bio.train(mode)(X), model.train(mode)(X))
        assert_close(bio(-X), model(-X))
    with torch.no_grad():
        assert_close(bio(X), model(X))


def test_all_weights_of_layers_are_rewritten(kind, frontend):
    _, bio = both(kind, frontend, SPLIT)
    sites = biofx.weight_sites(bio)
    matrices = {n for n, p in stored_parameters(bio) if p.dim() > 2 and not n.endswith(("bias_k", "bias_v"))}
    assert matrices == {name for name, site in sites.items() if site.is_split}
    left = {n for n, p in stored_parameters(bio) if p.dim() == 2 and "bias" not in n}
    listed = {name for name in left if "forward takes it from parameters()" in bio.biofx.others.get(name, "")}
    assert left - listed <= {"inner.sparse.weight", "inner.bounded.weight", "inner.own", "inner.b.weight_g"}
    assert bool(listed) is (kind == "registered")


def test_the_summary_names_every_parameter_once_and_every_island(kind, frontend):
    model, bio = both(kind, frontend, SPLIT)
    text = biofx.summary(bio)
    for name, _ in model.named_parameters():
        assert times_listed(text, name) == 1, text
    for path in bio.biofx.islands:
        assert f"  {path} (" in text if path else "  the model (" in text


def test_gradients_are_exact(kind, frontend):
    model, bio = both(kind, frontend, SPLIT)
    expected, sites = gradients(model, X), biofx.weight_sites(bio)
    for _ in range(2):  # nothing of one call is left for the next
        found = gradients(bio, X)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            wanted = expected[name]
            if name in sites and sites[name].is_split:
                wanted = torch.stack([wanted, wanted])
            torch.testing.assert_close(
                gradient.to_dense() if gradient.is_sparse else gradient,
                wanted.to_dense() if wanted.is_sparse else wanted,
            )


class Packed(nn.Module):
    """The idiom of language models: a recurrent layer on sequences of several lengths."""

    def __init__(self, rnn, width):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 2)

    def forward(self, x):
        self.rnn.flatten_parameters()
        y, state = self.rnn(pack_padded_sequence(x, torch.tensor([4, 2, 3]), batch_first=True, enforce_sorted=False))
        return self.head(pad_packed_sequence(y, batch_first=True)[0]), state


RECURRENT = {
    "lstm": lambda: Packed(nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2, batch_first=True), 4),
    "gru": lambda: Packed(nn.GRU(3, 5, bidirectional=True, batch_first=True), 10),
    "rnn": lambda: Packed(nn.RNN(3, 5, bias=False, nonlinearity="relu", batch_first=True), 5),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_packed_sequences_in_recurrent_layers(kind, autocast, frontend):
    model, x = RECURRENT[kind]().double(), torch.randn(3, 4, 3, dtype=torch.float64)
    if autocast:
        model, x = model.float(), x.float()
    # Autocast adds the gradients of time steps up in bfloat16 for a parameter, and in float32 for an effective weight.
    tolerance = {"rtol": 0.02, "atol": 0.02} if autocast else {}
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_close(bio(x), model(x))
        found, expected = gradients(bio, x), gradients(model, x)
    sites = biofx.weight_sites(bio)
    assert len(sites) == sum(p.dim() == 2 for p in model.parameters())
    for name, wanted in expected.items():
        wanted = torch.stack([wanted, wanted]) if name in sites else wanted
        torch.testing.assert_close(found[name], wanted, **tolerance)
    bio.rnn.flatten_parameters()
    assert_close(biofx.fold(bio)(x), bio(x))


def test_copies_and_pickles_compute_the_same(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    expected, wanted = bio(X), gradients(bio, X)
    for other in (copy.deepcopy(bio), reloaded(bio), reloaded(copy.deepcopy(bio))):
        assert_close(other(X), expected)
        found = gradients(other, X)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n].to_dense(), wanted[n].to_dense()) for n in found)
        assert list(other.state_dict()) == list(bio.state_dict())
        assert biofx.summary(other) == biofx.summary(bio)
        assert biofx.table(other) == biofx.table(bio)
        biofx.verify(other)
        assert not any(g is not None for g in (p.grad for p in bio.parameters()))


def test_a_copy_is_independent(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    expected = bio(X)
    other = copy.deepcopy(bio)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(bio(X), expected)


def test_fold_gives_the_plain_model(kind, frontend):
    _, bio = both(kind, frontend, SLOW)
    model, plain = network(kind), biofx.fold(bio)
    assert_close(plain(X), bio(X))
    assert plain.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(plain.state_dict(), strict=True)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    again = biofx.transform(plain, SPLIT, frontend=frontend)
    assert list(biofx.weight_sites(again)) == list(biofx.weight_sites(bio))
    assert_close(again(X), model(X))
    assert_close(reloaded(plain)(X), plain(X))


@pytest.mark.parametrize(
    ("kind", "way"),
    in_turn(ISLANDS, [("symbolic", torch.optim.SGD), ("module", torch.optim.AdamW)]),
    indirect=["kind"],
)
def test_rules_act_at_steps(kind, way):
    frontend, optimizer = way
    pipeline = "split-synapses,fuzzy-learning-rates,crystallize,rejuvenate{dre=1.0},l1-regularization"
    bio = biofx.transform(network(kind), pipeline, frontend=frontend)
    held = optimizer([p for n, p in stored_parameters(bio) if "sparse" not in n], lr=0.01)
    biofx.attach(bio, held)
    before = copy.deepcopy(bio.state_dict())
    for _ in range(2):
        held.zero_grad()
        loss(bio(X)).backward()
        held.step()
    biofx.verify(bio)
    for name in biofx.weight_sites(bio):
        if bio.get_parameter(name).grad is None:  # what is before tokens
            continue
        assert not torch.equal(bio.get_parameter(name), before[stored_name(bio, name)])
        assert int(synapses_of(bio, name).steps) == 2
    plain = biofx.fold(bio)
    assert_close(plain(X), bio(X))


def test_every_pass_works_or_leaves_weights_in_islands_alone(kind):
    model = network(kind)
    found = [pass_class() for pass_class in biofx.rewrite.registry.registered_passes().values()]
    alone = [p for p in found if p.changes_units or p.slot in (passes.Slot.SIGN, passes.Slot.OUTPUT)]
    for pipeline in [[p for p in found if p not in alone], *([pass_] for pass_ in alone)]:
        if kind == "kernels" and isinstance(pipeline[0], passes.DalesPrinciple):
            with pytest.raises(biofx.PipelineError, match=r"units of before.weight .* need one sign, .*\[1\] \* 4"):
                biofx.transform(model, pipeline)  # a convolution of one channel reads four units by one weight
            pipeline = [passes.DalesPrinciple(assign={"before.weight": [1] * 4})]
        bio = biofx.transform(model, pipeline)
        biofx.verify(bio)
        bio(X)
        assert_close(biofx.fold(bio)(X), bio(X))


@pytest.mark.parametrize(
    "pass_",
    [
        passes.GroupUnits(2),
        passes.SplitSynapses(2, activation="relu"),
        passes.SynapticScaling(),
        passes.FuzzyLearningRates(distribution="activity"),
    ],
    ids=lambda pass_: pass_.name,
)
def test_a_pass_that_needs_the_operator_leaves_the_weight_alone(pass_):
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4)), [pass_])
    sites = biofx.weight_sites(bio)
    assert [site.island for site in sites.values()] == [None, "1", "1", None]
    assert sites["0.weight"].passes == (pass_.name,)
    assert sites["1.a.weight"].passes == sites["1.b.weight"].passes == ()
    assert (
        f"{pass_.name}: it is in the untraced submodule 1, so what its operator returns is out of reach; "
        'frontend="export" follows it unless it decides by values' in flat(biofx.summary(bio))
    )


def test_units_that_reach_an_island_are_not_mirrored():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Branch(), nn.Linear(4, 2)), torch.randn(5, 4)
    bio = biofx.transform(model, [passes.MirrorUnits()], example_inputs=x)
    torch.testing.assert_close(bio(x), model(x))
    left = bio.biofx.passes[0].left
    assert left["3.a.weight"].startswith("it is in the untraced submodule 3, so what its operator returns is out of")
    assert bio.get_parameter("0.weight").shape == (16, 4)
    assert bio.get_parameter("2.weight").shape == (4, 16)
    assert "Branch" in bio.biofx.passes[0].remarks["2.weight"]


def test_units_are_followed_through_islands():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Branch(), nn.Linear(4, 4)).eval()
    bio = biofx.transform(model, [passes.DalesPrinciple(balance=False)], example_inputs=torch.randn(2, 4))
    units = biofx.units(bio)
    names = [population.name for population in units.populations]
    read = {name: {names[i] for i in units.owner[r.numbers].tolist()} for name, r in units.readings.items()}
    assert read == {
        "0.weight": {"input input"},
        "2.a.weight": {"0.weight"},
        "2.b.weight": {"2.a.weight"},
        "3.weight": {"2.b.weight"},
    }
    assert "forward reads numbers that depend on its inputs (bool in 2 (islands.py" in str(units).replace("\n    ", " ")
    sites = biofx.weight_sites(bio)
    assert [site.sign is None for site in sites.values()] == [True, False, False, False]
    assert all(site.sign is None or (site.synaptic() * site.sign >= 0).all() for site in sites.values())


def test_balance_reaches_islands():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Branch(), nn.Linear(4, 4))
    model[2].a, model[2].b = nn.Linear(32, 64), nn.Linear(64, 4)
    bio = biofx.transform(model, [passes.DalesPrinciple()])
    weight = biofx.weight_sites(bio)["2.b.weight"].effective()
    assert 0 < (weight != 0).double().mean() < 1


def test_axes_inside_islands():
    sites = biofx.weight_sites(biofx.transform(Around(Kernels()), SPLIT))
    found = {n: (s.operator, s.presynaptic_axis, s.postsynaptic_axis, s.groups) for n, s in sites.items()}
    assert found["inner.up.weight"] == ("conv1d", 1, 0, 1)
    assert found["inner.grouped.weight"] == ("conv1d", 1, 0, 2)
    assert found["inner.down.weight"] == ("conv_transpose1d", 0, 1, 1)
    sites = biofx.weight_sites(biofx.transform(Around(Tokens()), SPLIT))
    embedding = sites["inner.embedding.weight"]
    assert (embedding.presynaptic_units, embedding.units) == (5, 4)


def test_what_is_left_alone_in_an_island_has_a_reason():
    bio = biofx.transform(Around(Tokens()), SPLIT)
    text = flat(biofx.summary(bio))
    assert "inner.sparse.weight: embedding gives it a sparse gradient, and rules act on every entry" in text
    assert "inner.bounded.weight: embedding changes it in forward, as max_norm is set" in text
    own = biofx.weight_sites(bio)["inner.own"]  # a parameter that forward multiplies by itself
    assert (own.operator, own.island, own.presynaptic_axis, own.postsynaptic_axis) == ("matmul", "inner", 0, 1)


class Tied(Tokens):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(super().forward(x))


def test_a_tied_embedding_takes_its_signs_from_the_head():
    model = Around(Tied())
    bio = biofx.transform(model, SPLIT)
    (row,) = [row for row in biofx.summary(bio).rows if row["weight"] == "inner.embedding.weight"]
    assert (row["operator"], row["uses"], row["inside"]) == ("embedding, linear", 2, "inner")
    torch.testing.assert_close(bio(torch.ones(2, 3)), model(torch.ones(2, 3)))
    bio = biofx.transform(model, [passes.DalesPrinciple(balance=False)])
    tied = biofx.weight_sites(bio)["inner.embedding.weight"]
    assert (tied.presynaptic_axis, tied.postsynaptic_axis) == (1, 0)
    assert tied.sign is not None
    assert (tied.synaptic() * tied.sign >= 0).all()


def test_depth_counts_the_weights_of_an_island_in_their_order():
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 4)), SPLIT)
    sites = biofx.weight_sites(bio).values()
    assert [site.depth for site in sites] == [0, 1 / 3, 2 / 3, 1]
    assert [site.is_output for site in sites] == [False, False, False, True]


def test_transformer_fast_paths_read_effective_weights():
    model = Around(Encoder()).eval()
    bio = biofx.transform(model, SPLIT, frontend="symbolic")
    x = torch.randn(5, 3)
    with torch.no_grad():
        for parameter in bio.parameters():
            parameter.mul_(1.5)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_close(bio(x), model(x))


def test_a_module_called_alone_computes_with_effective_weights(frontend):
    model = network("branch")
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(bio.inner(x), model.inner(x))
    assert_close(bio.inner.a(x), model.inner.a(x))
    loss(bio.inner(x)).backward()
    assert biofx.weight_sites(bio)["inner.a.weight"].raw.grad is not None
    assert bio.inner.a.weight.shape == (6, 4)  # from outside, too


def test_a_module_taken_out_of_the_model_still_computes():
    model = network("branch")
    inner = biofx.transform(model, SPLIT, frontend="module").inner
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(inner(x), model.inner(x))


def test_a_model_may_call_itself(frontend):
    model, x = Recursive().eval(), torch.randn(3, 4)
    bio = biofx.transform(model, SLOW, frontend=frontend)
    assert_close(bio(x, times=3), model(x, times=3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_an_island_gives_the_same_gradients(reentrant):
    plain, again = Around(Checkpointed(reentrant)).double(), None
    bio = biofx.transform(plain, SLOW)
    again = biofx.transform(nn.Sequential(plain.before, plain.inner.inner), SLOW)
    for site, other in zip(biofx.weight_sites(bio).values(), biofx.weight_sites(again).values(), strict=True):
        with torch.no_grad():
            other.raw.copy_(site.raw)
            other.gain.copy_(site.gain)
    for a, b in zip(gradients(bio, X).values(), gradients(again, X).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_threads_do_not_disturb_each_other(frontend):
    model = network("nested")
    bio = biofx.transform(model, SLOW, frontend=frontend)
    expected, wrong = bio(X), []

    def work():
        for _ in range(30):
            with torch.no_grad():
                wrong.extend([] if torch.equal(bio(X), expected) else [1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exception_inside_an_island_leaves_nothing_behind():
    bio = biofx.transform(network("structures"), SLOW)
    expected = bio(X)
    with pytest.raises(ValueError, match="too large"):
        bio(X * 1e12)
    assert_close(bio(X), expected)


def test_a_transform_in_place_that_fails_leaves_the_classes():
    model = network("branch")
    with pytest.raises(biofx.ArgumentError):
        biofx.transform(model, SPLIT, inplace=True, exclude="*")
    assert type(model.inner) is Branch
    assert type(model.inner.a) is nn.Linear
    assert not any("biofx" in name for module in model.modules() for name in vars(module))
    model(X)


def test_a_copy_of_a_module_keeps_its_synapses():
    bio = biofx.transform(network("branch"), SPLIT)
    other = copy.deepcopy(bio.inner.a)
    assert isinstance(other, nn.Linear)
    assert torch.equal(other.weight, bio.inner.a.weight)


def test_modules_keep_their_class_names_and_trees(frontend):
    model = network("lstm")
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    modules = [(path, module) for path, module in bio.named_modules() if not isinstance(module, Synapses)]
    for (name, a), (other, b) in zip(model.named_modules(), modules, strict=False):
        assert name == other
        assert isinstance(b, type(a))
        assert type(b).__name__ == type(a).__name__


def test_a_trace_of_a_transformed_model_keeps_layers_of_pytorch():
    bio = biofx.transform(nn.Sequential(nn.Linear(3, 4), nn.RNN(4, 3)).double(), SLOW)
    traced = torch.fx.symbolic_trace(bio)
    assert_close(traced(X), bio(X))


def test_many_islands_are_found_in_few_traces(monkeypatch):
    traces = 0
    original = biofx.capture.modes.trace

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(biofx.capture.modes, "trace", counted)
    bio = biofx.transform(nn.Sequential(*[Branch() for _ in range(20)]), SPLIT)
    assert len(bio.biofx.islands) == 20
    assert traces == 3  # one finds them; with and without gradients, two make the graph


class AsksForType(nn.Module):
    """Takes one way for a tensor and another for anything else."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if isinstance(x, torch.Tensor) else x


def test_a_forward_that_tests_the_type_of_a_value_is_an_island():
    model, x = nn.Sequential(nn.Linear(4, 4), AsksForType()), torch.randn(2, 4)
    bio = biofx.transform(model, SPLIT)
    assert "its graph computes something else" in bio.biofx.islands["1"]
    assert_close(bio(x), model(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ones(3, 4).view(x.shape[0], -1),
        lambda x: torch.full((2,), x.shape[0]),
        lambda x: torch.arange(x.shape[0]),
        lambda x: torch.ones(3).to(x.dtype),
        lambda x: torch.roll(x, (x.shape[0], 1), (0, 1)),
    ],
)
def test_functions_of_pytorch_may_look_at_types(call):
    class Calls(nn.Module):
        def forward(self, x):
            return call(x), isinstance(self, nn.Module)

    assert not biofx.capture.symbolic.capture(Calls()).biofx.islands


def test_an_island_that_fails_because_of_its_child_is_the_child():
    class Keeps(nn.Module):
        """Needs what its child appended before it failed, so it fails together with it."""

        def __init__(self):
            super().__init__()
            self.child, self.fc = Branch(), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.child(x)) + len([1])

    bio = biofx.transform(nn.Sequential(Keeps()), SPLIT)
    assert list(bio.biofx.islands) == ["0.child"]


class Refers(nn.Module):
    """Reaches another module in one of several ways."""

    def __init__(self, other, how):
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), how(other)

    def forward(self, x):
        other = self.other
        while isinstance(other, (list, tuple, dict)):
            other = next(iter(other.values())) if isinstance(other, dict) else other[0]
        return self.fc(other(x)) if len(x) else x


def test_a_parameter_that_is_kept_in_an_attribute_is_left_alone():
    model = nn.Sequential(Branch(), nn.Linear(4, 4))
    model[0].kept = [model[0].a.weight]
    bio = biofx.transform(model, SPLIT)
    assert list(biofx.weight_sites(bio)) == ["0.b.weight", "1.weight"]
    assert "0.a.weight: a module keeps it in a list or a plain attribute as well" in flat(biofx.summary(bio))


@pytest.mark.parametrize(
    "how",
    [
        lambda m: [m],
        lambda m: {"a": (m,)},
        lambda m: m.forward,
        lambda m: functools.partial(nn.Module.__call__, m),
        lambda m: [functools.partial(torch.nn.functional.linear, weight=m.weight, bias=m.bias)],
    ],
)
def test_an_island_may_refer_to_modules_outside_of_itself(how):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[0].append(Refers(model[0][0], how))
    bio, x = biofx.transform(model, SPLIT), torch.randn(2, 4)
    assert list(bio.biofx.islands) == ["0.1"]
    assert_close(bio(x), model(x))
    assert_close(bio(x), copy.deepcopy(bio)(x))


class Clamped(nn.Module):
    """Limits its weights at each call, as critics of Wasserstein GANs do; or only at those of training."""

    def __init__(self, always):
        super().__init__()
        self.inner, self.always = nn.Linear(2, 2), always

    def forward(self, x):
        if self.training or self.always:
            with torch.no_grad():
                self.inner.weight.clamp_(-0.1, 0.1)
        return self.inner(x)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses", "fuzzy-learning-rates", [passes.DalesPrinciple()]], ids=str)
def test_a_weight_that_forward_changes_in_place_is_left_alone(frontend, recipe, always):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Clamped(always)), torch.randn(3, 2)
    bio = biofx.transform(model, recipe, frontend=frontend)
    assert list(biofx.weight_sites(bio)) == ["0.weight"]
    assert "2.inner.weight: forward changes it in place, by clamp_ in 2 (test_islands.py" in flat(biofx.summary(bio))
    assert torch.equal(bio.get_parameter("2.inner.weight"), model[2].inner.weight)
    torch.testing.assert_close(bio(x), model(x))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1
    again = biofx.transform(bio, [passes.Rejuvenate()], frontend=frontend)
    assert list(biofx.weight_sites(again)) == ["0.weight"]


class Unguessable(nn.Sequential):
    def forward(self, options):
        return super().forward(options.value)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_weight_that_is_stored_may_be_changed_by_forward(frontend):
    model = Unguessable(nn.Linear(2, 2), nn.ReLU(), Clamped(always=True))
    options = types.SimpleNamespace(value=torch.randn(3, 2))
    bio = biofx.transform(model, "fuzzy-learning-rates", frontend=frontend)
    torch.testing.assert_close(bio(options), model(options))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses"])
def test_a_weight_changed_by_an_unseen_forward_is_refused_then(frontend, recipe):
    model = Unguessable(nn.Linear(2, 2), nn.ReLU(), Clamped(always=True))
    options = types.SimpleNamespace(value=torch.randn(3, 2))
    bio = biofx.transform(model, recipe, frontend=frontend)
    with pytest.raises(biofx.ArgumentError, match=r"would be lost.*exclude="):
        bio(options)
    bio = biofx.transform(model, recipe, frontend=frontend, exclude=["*inner.weight"])
    torch.testing.assert_close(bio(options), model(options))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1


class Parametrized(nn.Module):
    """A layer of each kind whose weight a parametrization computes, behind a decision."""

    def __init__(self, parametrization):
        super().__init__()
        self.fc, self.attention = parametrization(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2)
        self.conv, self.own = parametrization(nn.Conv1d(4, 4, 1, groups=2)), nn.Linear(4, 4)
        parametrization(self.attention, "in_proj_weight")

    def forward(self, x):
        if len(x) == 0:
            return x
        y = self.conv(torch.tanh(self.fc(x))[:, :, None])[..., 0]
        return self.own(self.attention(y, y, y)[0])


PARAMETRIZATIONS = {
    "weight norm": (parametrizations.weight_norm, "original1", "it is stored as a direction"),
    "spectral norm": (parametrizations.spectral_norm, "original", None),
    "orthogonal": (
        functools.partial(parametrizations.orthogonal, orthogonal_map="cayley"),
        "original",
        r"\w+ in inner\.[\w.]+ computes the weight that its operator reads from it",
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights_are_rewritten(name, frontend):
    parametrization, stored, why_not_judged = PARAMETRIZATIONS[name]
    model = Around(Parametrized(parametrization)).double().eval()
    bio = biofx.transform(model, SPLIT, frontend=frontend)
    sites = biofx.weight_sites(bio)
    parametrized = {f"inner.{layer}.{stored}": operator for layer, operator in [
        ("fc.parametrizations.weight", "linear"),
        ("conv.parametrizations.weight", "conv1d"),
        ("attention.parametrizations.in_proj_weight", "attention"),
    ]}  # fmt: skip
    assert {n: site.operator for n, site in sites.items() if "parametrizations" in n} == parametrized
    for site in (sites[n] for n in parametrized):
        assert site.is_split
        assert (site.axes is None) is (name == "orthogonal")
        assert re.match(why_not_judged or "$", site.unmet(Need.UNITS) or "")
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        assert_close(other(X), model(X))
    expected = gradients(model, X)
    for n, gradient in gradients(bio, X).items():
        torch.testing.assert_close(gradient, torch.stack([expected[n]] * 2) if n in sites else expected[n])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    loss(bio(X)).backward()
    optimizer.step()
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    assert_close(bio(X), model(X))
    assert_close(biofx.fold(bio, into=Around(Parametrized(parametrization)).double().eval())(X), model(X))


def test_a_parametrization_is_followed_or_the_reason_is_said():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = Around(Branch())
    parametrize.register_parametrization(model.inner.a, "weight", Doubled())
    parametrizations.orthogonal(model.inner.b, orthogonal_map="householder")
    bio = biofx.transform(model, SPLIT)
    assert list(biofx.weight_sites(bio)) == ["before.weight", "inner.a.parametrizations.weight.original"]
    assert biofx.weight_sites(bio)["inner.a.parametrizations.weight.original"].unmet(Need.UNITS) is None
    summary = flat(biofx.summary(bio))
    assert "inner.b.parametrizations.weight.original: forward takes whole numbers from it, by int in" in summary


class Momentum(nn.Module):
    """A layer that follows another one, as the key encoder of MoCo does."""

    def __init__(self, update):
        super().__init__()
        self.query, self.key, self.update = nn.Linear(3, 3), nn.Linear(3, 3), update
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            for ours, theirs in zip(self.query.parameters(), self.key.parameters(), strict=True):
                self.update(ours, theirs)
        return self.head(self.query(x) * self.key(x).detach())


def assigned(ours, theirs):
    theirs.data = 0.9 * theirs.data + 0.1 * ours.data


def in_place(ours, theirs):
    theirs.data.mul_(0.9).add_(ours.data, alpha=0.1)


@pytest.mark.parametrize("update", [assigned, in_place])
def test_weights_that_forward_changes_are_left_alone(update, frontend):
    model, x = Momentum(update), torch.randn(2, 3)
    bio = biofx.transform(copy.deepcopy(model), SPLIT, frontend=frontend)
    assert [(site.name, site.unmet(Need.UNITS)) for site in biofx.weight_sites(bio).values()] == [("head.weight", None)]
    assert "query.weight: forward takes it from parameters(), which lists what is stored" in flat(biofx.summary(bio))
    assert re.search(r"key\.weight: forward (changes it in place|takes it from parameters)", biofx.summary(bio))
    for _ in range(3):
        torch.testing.assert_close(bio(x), model(x))
        loss(bio(x)).backward()
        loss(model(x)).backward()
        torch.testing.assert_close(bio.key.weight, model.key.weight)
