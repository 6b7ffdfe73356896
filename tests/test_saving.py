"""Folders of `biofx.save`: what comes back, what is refused, and what an accident leaves."""

import copy
import functools
import itertools
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import ArgumentError, SavingError, passes
from biofx.base import gains, noise
from biofx.saving import _signed
from models.small import ZOO, ConvNet, mlp
from second_device import CPU, SECOND, SecondDevice

PIPELINES = {
    "hofmann2025": "symbolic",
    "cortex": "export",
    "dales-principle{constraint=softplus,readouts=excitatory,sites=('stem*', 'head*')},crystallize": "symbolic",
    "dales-principle{assign=closest,constraint=abs}": "module",
    "split-synapses{activation=tanh},rejuvenate": "export",
    "fuzzy-learning-rates{distribution=activity,every=2}": "symbolic",
    "fuzzy-learning-rates{dtype=unstored},synaptic-scaling{on=weight}": "export",
    "fuzzy-learning-rates{dtype=uint8},crystallize": "module",
}


def inputs(seed=3):
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(bio, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        optimizer.zero_grad()
        bio(inputs(step)).square().mean().backward()
        optimizer.step()


def trained(pipeline, build=ConvNet, **options):
    bio = biofx.transform(build(), pipeline, **options)
    optimizer = torch.optim.AdamW(bio.parameters(), 0.01)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 3)
    return bio, optimizer


def other_convnet():
    torch.manual_seed(99)
    return ConvNet()


def assert_same(a, b):
    ours, theirs = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
        for m in (a, b)
    )
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        other = theirs[name]
        assert (value.dtype, value.stride(), value.requires_grad) == (
            other.dtype,
            other.stride(),
            other.requires_grad,
        ), name
        assert torch.equal(value, other), name
    assert {n: m.training for n, m in a.named_modules()} == {n: m.training for n, m in b.named_modules()}
    assert biofx.summary(copy.deepcopy(a)) == biofx.summary(copy.deepcopy(b))  # copies have no optimizer
    assert a.biofx.nonnegative == b.biofx.nonnegative


@pytest.mark.parametrize(("pipeline", "frontend"), PIPELINES.items())
def test_a_loaded_model_goes_on_bit_for_bit(pipeline, frontend, tmp_path):
    bio, optimizer = trained(pipeline, example_inputs=(inputs(),), frontend=frontend)
    biofx.save(bio, tmp_path)
    model = other_convnet()
    before = copy.deepcopy(model.state_dict())
    loaded = biofx.load(tmp_path, model, example_inputs=(inputs(),))
    assert_same(bio, loaded)
    assert torch.equal(bio.eval()(inputs()), loaded.eval()(inputs()))
    again = torch.optim.AdamW(loaded.parameters(), 0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    biofx.attach(loaded, again)
    train(bio.train(), optimizer, 3)
    train(loaded.train(), again, 3)
    assert_same(bio, loaded)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_load_balances_no_weights(tmp_path, monkeypatch):
    bio = biofx.transform(mlp(6, 30, 4), "split-synapses,dales-principle")
    biofx.save(bio, tmp_path / "m")
    monkeypatch.delattr("biofx.passes.dales_principle.balance")  # nine tenths of the time of load, for no use
    assert_same(bio, biofx.load(tmp_path / "m", mlp(6, 30, 4)))


def test_dtypes_memory_formats_modes_and_frozen_weights_return(tmp_path):
    bio = biofx.transform(ConvNet(), "fuzzy-learning-rates").to(torch.bfloat16, memory_format=torch.channels_last)
    bio.norm.eval()
    biofx.weight_sites(bio)["head.weight"].raw.requires_grad_(False)
    biofx.save(bio, tmp_path)
    assert_same(bio, biofx.load(tmp_path, ConvNet()))


class Shifted(nn.Module):
    """Adds what its state_dict leaves out: a table, the same under another name, and a cache that forward fills."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("table", scale * torch.linspace(0, 1, 4), persistent=False)
        self.register_buffer("again", self.table, persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        return self.inner(x + self.table + torch.arange(4.0).to(x)) + self.again


@pytest.mark.parametrize("frontend", ["symbolic", "export", "module"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_are_not_persistent_return(frontend, dtype, tmp_path):
    x = torch.randn(3, 4)
    bio = biofx.transform(Shifted(), "split-synapses", frontend=frontend, example_inputs=(x,)).to(dtype)
    bio.table += 1
    bio.cache = torch.ones(2)
    biofx.save(bio, tmp_path)
    loaded = biofx.load(tmp_path, Shifted(scale=3.0), example_inputs=(x,))
    assert_same(bio, loaded)
    x = x.to(next(iter(bio.parameters())).dtype)
    torch.testing.assert_close(loaded.original_forward(x), bio.original_forward(x), rtol=0, atol=0)


def test_constants_of_forward_follow_the_inputs_that_load_gets(tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x).sum(0) / torch.tensor(float(x.shape[0]))

    biofx.save(biofx.transform(Mean(), "split-synapses", example_inputs=(torch.ones(3, 4),)), tmp_path)
    model, x = Mean(), torch.randn(5, 4)
    loaded = biofx.load(tmp_path, model, example_inputs=(x,))
    torch.testing.assert_close(loaded(x), loaded.original_forward(x))


def test_folders_of_the_first_format_load(tmp_path):
    bio = biofx.transform(mlp(4, 6, 2), "split-synapses,dales-principle")
    biofx.save(bio, tmp_path)
    path = tmp_path / "pipeline.json"
    document = json.loads(path.read_text()) | {"format": 1}
    del document["transient"], document["checksum"]
    path.write_text(_signed(document))
    assert_same(bio, biofx.load(tmp_path, mlp(4, 6, 2)))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_small_network_returns(name, tmp_path):
    build, shape = ZOO[name]
    x = torch.randn(shape)
    bio = biofx.transform(build().eval(), "cortex", example_inputs=(x,))
    biofx.save(bio, tmp_path)
    torch.manual_seed(99)
    loaded = biofx.load(tmp_path, build().eval(), example_inputs=(x,))
    assert_same(bio, loaded)
    torch.testing.assert_close(loaded(x), bio(x), rtol=0, atol=0)


class Versioned(nn.Linear):
    """Its second version stores twice the bias of its first."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}bias"] = 2 * state[f"{prefix}bias"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("layer", [Versioned(4, 6), nn.utils.spectral_norm(nn.Linear(4, 6))], ids=["versioned", "norm"])
@pytest.mark.parametrize("exclude", ["0.*", "2.*"])
def test_values_are_those_of_the_present_version(layer, exclude, tmp_path):
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 2))
    bio = biofx.transform(model, "split-synapses", exclude=exclude)
    biofx.save(bio, tmp_path / "model")
    assert_same(bio, biofx.load(tmp_path / "model", copy.deepcopy(model)))


def test_several_transforms_return_in_their_order(tmp_path):
    bio = biofx.transform(mlp(4, 6, 6, 2), "volume-dependent-learning-rates", exclude="0.*", seed=1)
    bio = biofx.transform(bio, "fuzzy-learning-rates{nu=0.3},dales-principle", exclude=["4.weight"], seed=2)
    bio = biofx.transform(bio, "fuzzy-learning-rates{nu=0.1}", exclude=["0.weight", "2.weight"])
    biofx.save(bio, tmp_path)
    loaded = biofx.load(tmp_path, mlp(4, 6, 6, 2))
    assert_same(bio, loaded)
    assert loaded.code == bio.code
    assert loaded.biofx.requests == bio.biofx.requests


def doubled(x):
    return 2 * x


def test_functions_as_options_return_by_name(tmp_path):
    for index, function in enumerate([doubled, torch.tanh, F.gelu, F.relu, "softplus", None]):
        bio = biofx.transform(mlp(4, 6, 2), [passes.GroupUnits(2, activation=function)])
        biofx.save(bio, tmp_path / str(index))
        loaded = biofx.load(tmp_path / str(index), mlp(4, 6, 2))
        assert loaded.biofx.requests[0].passes[0].activation == function


def test_options_without_a_name_are_refused(tmp_path):
    for value in (nn.PReLU(), lambda x: x):
        bio = biofx.transform(mlp(4, 6, 2), [passes.GroupUnits(2, activation=value)])
        with pytest.raises(SavingError, match="save: group-units: activation="):
            biofx.save(bio, tmp_path)


def test_a_pass_of_a_users_own_returns_if_registered(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Slow(passes.Pass):
        name = "slow"
        slot = passes.Slot.HOOK
        factor: float = 0.5
        scale: float = field(init=False, default=1.0)  # computed from the options, so not one of them

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "scale", self.factor / 2)

        def rewrite(self, site, edit):
            edit.insert(torch.ops.biofx.scale_grad, self.scale)

    bio = biofx.transform(mlp(4, 2), [Slow(0.25)])
    with pytest.raises(SavingError, match="Slow is not registered"):
        biofx.save(bio, tmp_path)
    passes.register(Slow)
    biofx.save(bio, tmp_path)
    assert biofx.load(tmp_path, mlp(4, 2)).biofx.passes[0].pass_ == Slow(0.25)
    assert biofx.rewrite.registry.parse(str(Slow(0.25))) == [Slow(0.25)]
    monkeypatch.delitem(biofx.rewrite.registry._PASSES, "slow")
    with pytest.raises(SavingError, match="needs the pass slow, which is not registered; import test_saving"):
        biofx.load(tmp_path, mlp(4, 2))


def test_a_model_on_another_device_gets_the_values(tmp_path):
    bio = biofx.transform(ConvNet(), "cortex", example_inputs=(inputs(),))
    biofx.save(bio, tmp_path / "cpu")
    for cached in (noise._on_device, gains._table):
        cached.cache_clear()
    with SecondDevice() as mode:
        model = ConvNet()
        mode.put(model)
        x = inputs().to(SECOND)
        loaded = biofx.load(tmp_path / "cpu", model, example_inputs=(x,))
        assert {tensor.device for tensor in loaded.state_dict().values()} == {SECOND}
        biofx.save(loaded, tmp_path / "second")
        back = biofx.load(tmp_path / "second", ConvNet(), example_inputs=(inputs(),))
        assert {tensor.device for tensor in back.state_dict().values()} == {CPU}
    for cached in (noise._on_device, gains._table):
        cached.cache_clear()
    assert_same(bio, back)


@pytest.fixture
def folder(tmp_path):
    biofx.save(biofx.transform(mlp(4, 6, 2), "split-synapses,fuzzy-learning-rates"), tmp_path / "model")
    return tmp_path / "model"


def loads(folder):
    return biofx.load(folder, mlp(4, 6, 2))


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_another_architecture_is_refused_by_its_first_weight(folder, tmp_path):
    cases = [
        (mlp(4, 5, 2), r"0.weight is \(6, 4\) there and \(5, 4\) here"),
        (mlp(4, 6, 2, 3), r"4.weight is missing there and \(3, 2\) here"),
        (mlp(4, 6), r"2.weight is \(2, 6\) there and missing here"),
        (biofx.transform(mlp(4, 6, 2), "split-synapses"), "model is transformed"),
        (mlp, "model must be a torch.nn.Module"),
    ]
    for model, message in cases:
        with pytest.raises(ArgumentError, match=message):
            biofx.load(folder, model)
    biofx.save(biofx.transform(Tied(tied=True), "split-synapses"), tmp_path / "tied")
    with pytest.raises(ArgumentError, match=r"b.weight is missing there and \(4, 4\) here"):
        biofx.load(tmp_path / "tied", Tied(tied=False))
    with pytest.raises(
        ArgumentError, match="parameter 0.weight of Sequential is on the meta device|0.weight is on the"
    ):
        biofx.load(folder, mlp(4, 6, 2).to("meta"))


class Branches(nn.Module):
    """Whether its second weight reads units depends on an argument, which cannot be guessed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, state):
        return self.second(self.first(state["x"]).relu())


def test_missing_example_inputs_are_named(tmp_path):
    x = {"x": torch.randn(3, 4)}
    biofx.save(biofx.transform(Branches(), "dales-principle", example_inputs=(x,)), tmp_path)
    with pytest.raises(ArgumentError, match="second.weight is stored .* so give load example_inputs as well"):
        biofx.load(tmp_path, Branches())
    assert isinstance(biofx.load(tmp_path, Branches(), example_inputs=(x,)), Branches)


def damaged(content, how):
    middle = len(content) // 2
    return {
        "truncated": content[:middle],
        "empty": b"",
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[how]


@pytest.mark.parametrize("name", ["pipeline.json", "state.safetensors"])
def test_damaged_files_are_refused(name, folder):
    content = (folder / name).read_bytes()
    for how in ("truncated", "empty", "one bit"):
        (folder / name).write_bytes(damaged(content, how))
        with pytest.raises(SavingError, match=f"{name} is damaged"):
            loads(folder)
    (folder / name).unlink()
    with pytest.raises(SavingError, match=f"there is no .*{name}"):
        loads(folder)
    (folder / name).write_bytes(content)
    loads(folder)


def test_files_of_two_models_are_refused(folder, tmp_path):
    biofx.save(biofx.transform(mlp(4, 6, 2), "split-synapses"), tmp_path / "other")
    (tmp_path / "other" / "state.safetensors").replace(folder / "state.safetensors")
    with pytest.raises(SavingError, match="belongs to another pipeline.json"):
        loads(folder)


def test_edited_options_and_newer_formats_are_refused(folder):
    path = folder / "pipeline.json"
    text = path.read_text()
    path.write_text(text.replace('"nu": 0.16', '"nu": 0.3'))
    with pytest.raises(SavingError, match="was edited"):
        loads(folder)
    path.write_text(json.dumps(json.loads(text) | {"format": 3, "biofx": "9.0"}))
    with pytest.raises(SavingError, match="has format 3, by biofx 9.0, and this biofx .* reads 2; upgrade"):
        loads(folder)


def test_what_files_cannot_hold_is_refused(tmp_path):
    edited = biofx.transform(mlp(4, 6, 2), "split-synapses")
    edited.graph.call_function(torch.relu, (next(iter(edited.graph.nodes)),))
    by_hand = biofx.BioConverter()(mlp(4, 6, 2))
    on_meta = biofx.transform(mlp(4, 6, 2), "split-synapses").to("meta")
    cases = {
        "its graph was edited": edited,
        "called by hand": by_hand,
        "0.bias is on the meta device": on_meta,
        "got an instance of Sequential": mlp(4, 6, 2),
    }
    for message, model in cases.items():
        with pytest.raises((SavingError, ArgumentError), match=message):
            biofx.save(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()


class Marked(torch.Tensor):
    """A tensor subclass, as those of sharded models are."""


def test_tensors_without_plain_values_are_refused(tmp_path):
    cases = {
        "an instance of Marked": torch.zeros(2).as_subclass(Marked),
        "not a plain dense tensor": torch.eye(2).to_sparse(),
    }
    for message, value in cases.items():
        bio = biofx.transform(mlp(4, 6, 2), "split-synapses")
        bio.register_buffer("extra", value)
        with pytest.raises(SavingError, match=f"save: extra is {message}, which state.safetensors cannot hold"):
            biofx.save(bio, tmp_path)


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path):
    bio = biofx.transform(mlp(4, 6, 2), "split-synapses")
    for index, wrap in enumerate((torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
        biofx.save(wrap(bio), tmp_path / str(index))
        assert_same(bio, loads(tmp_path / str(index)))


def test_missing_and_extra_buffers_are_named(folder, tmp_path):
    model = mlp(4, 6, 2)
    model.register_buffer("count", torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"count is missing there and \(3,\) here"):
        biofx.load(folder, model)
    biofx.save(biofx.transform(model, "split-synapses"), tmp_path / "counting")
    with pytest.raises(ArgumentError, match=r"count is \(3,\) there and missing here"):
        loads(tmp_path / "counting")


def test_places_that_cannot_be_written_are_refused(tmp_path):
    bio = biofx.transform(mlp(4, 6, 2), "split-synapses")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="file is a file"):
        biofx.save(bio, tmp_path / "file")
    for path in (tmp_path / "file" / "model", tmp_path / "none" / "model"):
        with pytest.raises(ArgumentError, match="save: there is no folder"):
            biofx.save(bio, path)
    with pytest.raises(SavingError, match="cannot be written"):
        biofx.save(bio, "/proc/model")


def killed_at(moment, bio, folder):
    """Save in a process that is killed instead of renaming a file for the `moment`-th time."""
    child = os.fork()
    if not child:
        rename, count = Path.replace, itertools.count()
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        Path.replace = lambda path, target: kill() if next(count) == moment else rename(path, target)
        try:
            biofx.save(bio, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def pipelines(folder):
    return [request.passes[0].name for request in loads(folder).biofx.requests]


@pytest.mark.parametrize(("moment", "left"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_process_killed_in_the_middle_leaves_a_model(moment, left, folder):
    (folder / "optimizer.pt").write_text("of the user")
    killed_at(moment, biofx.transform(mlp(4, 6, 2), "dales-principle"), folder)
    assert pipelines(folder) == (["split-synapses"] if left == "old" else ["dales-principle"])
    biofx.save(biofx.transform(mlp(4, 6, 2), "crystallize"), folder)
    assert pipelines(folder) == ["crystallize"]
    assert sorted(path.name for path in folder.iterdir()) == ["optimizer.pt", "pipeline.json", "state.safetensors"]


class Phases(nn.Module):
    """Has complex numbers."""

    def __init__(self, dtype):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("phase", torch.exp(1j * torch.arange(4)).to(dtype))
        self.register_buffer("conjugate", self.phase.conj())
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return ((self.fc(x) * self.phase.to(torch.complex64)) @ self.mix.to(torch.complex64) * self.conjugate).abs()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_return(dtype, tmp_path):
    x = torch.randn(3, 4)
    bio = biofx.transform(Phases(torch.complex64), "split-synapses", example_inputs=x)
    for name in ("phase", "conjugate", "mix"):
        getattr(bio, name).data = getattr(bio, name).data.to(dtype)
    biofx.save(bio, tmp_path)
    assert_same(bio, biofx.load(tmp_path, Phases(torch.complex64), example_inputs=x))


def test_a_dtype_that_files_cannot_hold_is_refused_before(tmp_path, monkeypatch):
    bio = biofx.transform(mlp(4, 2), "split-synapses")
    monkeypatch.setattr("biofx.saving._has_written_form", lambda dtype: False)
    with pytest.raises(SavingError, match="has the dtype torch.float32, which state.safetensors cannot hold"):
        biofx.save(bio, tmp_path / "model")
    assert not (tmp_path / "model").exists()


class Centred(nn.Module):
    """Subtracts a mean that training makes, and drops a scale that training ends."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", None)
        self.register_buffer("scale", torch.ones(4))
        self.register_parameter("shift", None)

    def forward(self, x):
        h = self.fc(x)
        if self.training:
            self.mean = h.detach().mean(0)
            self.scale = None
        h = h if self.mean is None else h - self.mean
        h = h if self.scale is None else h * self.scale
        return h if self.shift is None else h + self.shift


def test_what_training_fills_and_empties_returns(tmp_path):
    x = torch.randn(3, 4)
    bio = biofx.transform(Centred().eval(), "split-synapses", example_inputs=x)
    bio.train()(x)
    bio.shift = nn.Parameter(torch.randn(4))
    biofx.save(bio, tmp_path)
    loaded = biofx.load(tmp_path, Centred(), example_inputs=x)
    assert loaded.mean is not None
    assert loaded.scale is None
    assert_same(bio, loaded)
    torch.testing.assert_close(loaded.eval()(x), bio.eval()(x), rtol=0, atol=0)


def test_statistics_that_the_other_model_does_not_keep(tmp_path):
    def build(track):
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=track))

    biofx.save(biofx.transform(build(True), "split-synapses"), tmp_path)
    with pytest.raises(ArgumentError, match=r"1.num_batches_tracked is \(\) there and missing here"):
        biofx.load(tmp_path, build(False))


def tie_weight(model):
    model[4].weight = model[2].weight


def share_layer(model):
    model[4] = model[2]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [tie_weight, share_layer])
@pytest.mark.parametrize("pipeline", ["split-synapses,fuzzy-learning-rates", "inhibitory-interneurons"])
def test_ties_made_after_the_transform_return(change, tied, pipeline, tmp_path):
    bio, model = biofx.transform(mlp(4, 4, 4, 4), pipeline), mlp(4, 4, 4, 4)
    change(bio)
    if tied:
        change(model)
    biofx.save(bio, tmp_path)
    loaded = biofx.load(tmp_path, model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in bio.state_dict().items())
    assert loaded[4].weight_synapses is loaded[2].weight_synapses
    assert torch.equal(loaded(torch.ones(3, 4)), bio(torch.ones(3, 4)))


def test_a_tie_that_was_undone_is_another_model(tmp_path):
    bio = biofx.transform(mlp(4, 4, 4, 4), "split-synapses")
    tie_weight(bio)
    biofx.save(bio, tmp_path)
    bio[4].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(SavingError, match="save: 4.weight was replaced since"):
        biofx.save(bio, tmp_path)


def test_a_model_with_another_head_is_refused(tmp_path):
    bio = biofx.transform(mlp(4, 4, 4), "split-synapses")
    bio[2] = nn.Linear(4, 7)
    with pytest.raises(SavingError, match=r"save: 2.weight was replaced since .*; use torch.save\(bio, path\), or cha"):
        biofx.save(bio, tmp_path)


class Own(nn.Sequential):
    """A network whose class has code for what is saved and loaded."""

    def __init__(self, of_class="", seed=0):
        super().__init__(*mlp(3, 4, 2))
        with torch.no_grad():
            self[2].bias.fill_(1.0 + seed)
        self.of_class = of_class
        self.register_load_state_dict_pre_hook(Own.on_load)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith("0.")]:
            if self.of_class == "leaves out":
                del state[name]
            elif self.of_class == "renames":
                state[f"first.{name}"] = state.pop(name)
            elif self.of_class == "rounds":
                state[name] = state[name].to(torch.bfloat16)
        return state

    @staticmethod
    def on_load(model, state, *_):
        if model.of_class == "doubles":
            state["2.bias"] = 2 * state["2.bias"]


@pytest.mark.parametrize("of_class", ["leaves out", "renames", "rounds", "doubles"])
@pytest.mark.parametrize("pipeline", ["split-synapses,fuzzy-learning-rates", "dales-principle"])
def test_what_a_model_does_to_its_state_dict_changes_no_value(of_class, pipeline, tmp_path):
    bio, x = biofx.transform(Own(of_class), pipeline), torch.randn(5, 3)
    biofx.save(bio, tmp_path)
    loaded = biofx.load(tmp_path, Own(of_class, seed=1))
    assert_same(bio, loaded)
    for other in (loaded, biofx.fold(bio, into=Own(of_class, seed=1))):
        torch.testing.assert_close(other(x), bio(x))
