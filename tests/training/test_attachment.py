"""Attachments: rules around `optimizer.step()`, with any optimizer, exactly once."""

import copy
import gc
import io
import itertools
import subprocess
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from conftest import flat, gradients, in_turn
from models.small import ConvNet, mlp

GAINS = [passes.FuzzyLearningRates(nu=0.4, distribution="lognormal")]
EVERYTHING = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.VolumeDependentLearningRates(base_lr=0.9),
    passes.Crystallize(),
    passes.Rejuvenate(dre=6.0),
    passes.SynapticScaling(on="weight"),
    passes.L1Regularization(1e-4),
    passes.ExponentiatedGradient(),
]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.003, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.003, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.003, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.003, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.003),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.003),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.02),
}


def digits(dtype=torch.float64):
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=dtype), torch.tensor(data.target)


IMAGES, LABELS = digits()


def network():
    torch.manual_seed(1)
    return mlp(64, 32, 10).double()


def train(model, optimizer, steps, batch=64, start=0):
    for step in range(start, start + steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(LABELS)
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[rows]), LABELS[rows]).backward()
        optimizer.step()


def displacements(optimizer_of, steps, pipeline=GAINS):
    """Displacement of every weight in the plain and in the transformed model, and the gain."""
    plain = network()
    bio = biofx.transform(plain, pipeline)
    plain_optimizer, optimizer = optimizer_of(plain.parameters()), optimizer_of(bio.parameters())
    biofx.attach(bio, optimizer)
    before = copy.deepcopy(plain)
    train(plain, plain_optimizer, steps)
    train(bio, optimizer, steps)
    for name, site in biofx.weight_sites(bio).items():
        start = before.get_parameter(name).detach()
        yield plain.get_parameter(name).detach() - start, site.raw.detach() - start, site.gain


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_moves_a_weight_by_gain_times_the_plain_step(name):
    for plain, given, gain in displacements(OPTIMIZERS[name], 1):
        assert plain.abs().max() > 1e-6
        torch.testing.assert_close(given, gain * plain, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_over_fifty_steps_displacement_follows_gain(name):
    """Correlation of the displacement with gain × the plain displacement, over all weights."""
    sites = zip(*displacements(OPTIMIZERS[name], 50), strict=True)
    plain, given, gain = (torch.cat([x.flatten() for x in xs]) for xs in sites)
    correlation = torch.corrcoef(torch.stack([given, gain * plain]))[0, 1]
    assert correlation > 0.75


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_without_attach_an_adaptive_optimizer_cancels_gains(name):
    """What attach is for: without it, a gain that is larger by 1 moves a weight by less than 5% more."""
    plain = network()
    bio = biofx.transform(plain, GAINS)
    for model in (plain, bio):
        train(model, OPTIMIZERS[name](model.parameters()), 1)
    start, site = network()[0].weight.detach(), biofx.weight_sites(bio)["0.weight"]
    plain_step, step = plain[0].weight.detach() - start, site.raw.detach() - start
    moved = plain_step.abs() > 1e-4
    covariance = torch.cov(torch.stack([step[moved] / plain_step[moved], site.gain[moved]]))
    assert abs(covariance[0, 1] / covariance[1, 1]) < 0.05


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_attached_graph_is_plain(name):
    bio = biofx.transform(network(), GAINS)
    code = bio.code
    attachment = biofx.attach(bio, OPTIMIZERS[name](bio.parameters()))
    assert "torch.ops.biofx" not in bio.code
    assert bio.get_submodule("0").weight is bio.get_parameter("0.weight")
    biofx.verify(bio)
    attachment.detach()
    assert bio.code == code


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_compensation_of_splitting_holds_for_every_optimizer(name):
    """One step moves a connection as far as it moves the plain weight, whatever Γ is."""
    plain = network()
    bio = biofx.transform(plain, [passes.SplitSynapses(4)])
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (plain, bio)]
    biofx.attach(bio, optimizers[1])
    before = copy.deepcopy(plain)
    for model, optimizer in zip((plain, bio), optimizers, strict=True):
        train(model, optimizer, 1)
    for weight_name, site in biofx.weight_sites(bio).items():
        start = before.get_parameter(weight_name)
        torch.testing.assert_close(
            site.effective() - start, plain.get_parameter(weight_name) - start, rtol=1e-4, atol=1e-7
        )


def test_a_fixed_gain_of_one_changes_nothing():
    for name in ("momentum", "adam"):
        neutral = [passes.FuzzyLearningRates(distribution="baseline")]
        for plain, given, _ in displacements(OPTIMIZERS[name], 10, neutral):
            torch.testing.assert_close(given, plain, rtol=1e-9, atol=1e-12)


def states(bio, optimizer):
    tensors = {f"model.{k}": v for k, v in bio.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def start(pipeline=EVERYTHING, name="adamw", model=None):
    bio = biofx.transform(network() if model is None else model, pipeline)
    optimizer = OPTIMIZERS[name](bio.parameters())
    return bio, optimizer, biofx.attach(bio, optimizer)


def assert_same_states(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_accumulation_over_micro_batches_equals_one_batch(name):
    results = []
    for parts in (1, 4):
        bio, optimizer, _ = start(name=name)
        for step in range(5):
            rows = torch.arange(step * 64, (step + 1) * 64)
            optimizer.zero_grad()
            for part in rows.chunk(parts):
                (F.cross_entropy(bio(IMAGES[part]), LABELS[part]) / parts).backward()
            optimizer.step()
        results.append(states(bio, optimizer))
    assert_same_states(*results, rtol=1e-7, atol=1e-9)


class Checkpointed(nn.Module):
    def __init__(self, bio, reentrant):
        super().__init__()
        self.bio, self.reentrant = bio, reentrant

    def forward(self, x):
        return checkpoint(self.bio, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pipeline", [EVERYTHING, [passes.FuzzyLearningRates(distribution="activity", every=2)]])
def test_activation_checkpointing_changes_nothing(pipeline, reentrant):
    results = []
    for wrap in (lambda bio: bio, lambda bio: Checkpointed(bio, reentrant)):
        bio, optimizer, _ = start(pipeline)
        train(wrap(bio), optimizer, 4)
        results.append(states(bio, optimizer))
    assert_same_states(*results)


@pytest.mark.parametrize(("name", "backend"), [("momentum", "inductor"), ("adamw", "aot_eager")])
def test_compiling_changes_nothing(name, backend):
    results = []
    for wrap in (lambda bio: bio, lambda bio: torch.compile(bio, fullgraph=True, backend=backend)):
        bio, optimizer, _ = start(name=name)
        train(wrap(bio), optimizer, 4)
        results.append(states(bio, optimizer))
    assert_same_states(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["sgd", "adam", "sgd-fused", "adam-fused"])
def test_a_step_that_the_scaler_skips_changes_nothing(name):
    bio = biofx.transform(network().float(), EVERYTHING)
    optimizer = OPTIMIZERS[name](bio.parameters())
    biofx.attach(bio, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    images = IMAGES.float()
    before = None
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(bio(images[:64]), LABELS[:64]) * factor).backward()
        kept = {k: v.clone() for k, v in bio.state_dict().items() if not k.endswith("_seen")}
        scaler.step(optimizer)
        scaler.update()
        after = bio.state_dict()
        unchanged = all(torch.equal(v, after[k]) for k, v in kept.items())
        assert unchanged is (step == 1)
        before = after
    assert int(before["0.weight_synapses.steps"]) == 2


@pytest.mark.parametrize("name", ["sgd", "adam", "sgd-fused", "adam-fused"])
def test_rules_see_unscaled_gradients(name):
    """With and without a loss scale, a step does the same."""
    results = []
    for scale in (1.0, 2.0**12):
        pipeline = [*GAINS, passes.Crystallize(), passes.L1Regularization(0.01)]
        bio = biofx.transform(network().float(), pipeline)
        optimizer = OPTIMIZERS[name](bio.parameters())
        biofx.attach(bio, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(bio(IMAGES.float()[:64]), LABELS[:64])).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append({k: v.clone() for k, v in bio.state_dict().items()})
    assert_same_states(*results, rtol=1e-4, atol=1e-6)


def test_a_closure_is_evaluated_before_the_rules():
    results = []
    for with_closure in (True, False):
        bio, optimizer, _ = start(name="momentum")

        def closure(bio=bio, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(bio(IMAGES[:64]), LABELS[:64])
            loss.backward()
            return loss

        for _ in range(3):
            if with_closure:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
        results.append(states(bio, optimizer))
    assert_same_states(*results)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.used, self.unused = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        h = torch.relu(self.trunk(x))
        return self.used(h), self.unused(h)


@pytest.mark.parametrize("to_none", [True, False])
def test_weights_without_a_gradient_take_no_part(to_none):
    bio, optimizer, _ = start(model=TwoHeads().double())
    before = {k: v.clone() for k, v in bio.state_dict().items()}
    bio.trunk.weight.requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=to_none)
        F.cross_entropy(bio(IMAGES[:32])[0], LABELS[:32]).backward()
        optimizer.step()
    after = bio.state_dict()
    changed = {k.split("_")[0] for k, v in after.items() if not torch.equal(v, before[k]) and not k.endswith(".seen")}
    assert changed == {"used.weight", "used.bias", "trunk.bias"}
    bio.trunk.weight.requires_grad_(True)
    F.cross_entropy(bio(IMAGES[:32])[0], LABELS[:32]).backward()
    optimizer.step()
    assert int(bio.trunk.weight_synapses.steps) == 1
    assert not torch.equal(bio.get_parameter("trunk.weight"), before["trunk.weight_synapses.weight"])


def test_several_optimizers_over_parts_of_the_model():
    bio = biofx.transform(network(), EVERYTHING)
    first = torch.optim.SGD(bio.get_submodule("0").parameters(), lr=0.1)
    second = torch.optim.AdamW(bio.get_submodule("2").parameters())
    assert "no rule acts at its steps (biofx.attach): 0.weight, 2.weight" in flat(biofx.summary(bio))
    a = biofx.attach(bio, first)
    assert "no rule acts at its steps (biofx.attach): 2.weight" in flat(biofx.summary(bio))
    b = biofx.attach(bio, second)
    assert "nothing happens" not in flat(biofx.summary(bio))
    assert (a.weights, b.weights) == (("0.weight",), ("2.weight",))
    for _ in range(3):
        bio.zero_grad()
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        first.step()
        first.step()
        second.step()
    assert (int(bio.get_buffer("0.weight_synapses.steps")), int(bio.get_buffer("2.weight_synapses.steps"))) == (6, 3)
    biofx.verify(bio)
    assert "scale_grad" not in bio.code
    biofx.detach(bio)
    assert (a.weights, b.weights) == ((), ())
    assert bio.code == biofx.transform(network(), EVERYTHING).code


def test_detach_leaves_optimizer_and_model_as_before():
    bio, optimizer, attachment = start()
    attachment.detach()
    attachment.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert bio.code == biofx.transform(network(), EVERYTHING).code
    before = int(bio.get_buffer("0.weight_synapses.replaced"))
    train(bio, optimizer, 3)
    assert int(bio.get_buffer("0.weight_synapses.replaced")) == before
    with biofx.attach(bio, optimizer):
        train(bio, optimizer, 1)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 1


def test_a_copy_of_an_attached_model_is_not_attached():
    bio, optimizer, _ = start()
    other = copy.deepcopy(bio)
    assert "no rule acts at its steps" in flat(biofx.summary(other))
    biofx.attach(other, torch.optim.SGD(other.parameters(), lr=0.1)).detach()
    assert "scale_grad" in other.code
    assert "scale_grad" not in bio.code
    train(bio, optimizer, 1)


RESUME = """
import sys, torch
sys.path[:0] = {tests!r}
torch.set_num_threads(1)
import test_attachment as t
after = {{}}
for (pipeline, name), saved in torch.load({path!r}).items():
    bio, optimizer, _ = t.start(getattr(t, pipeline), name)
    bio.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    t.train(bio, optimizer, 5, start=7)
    after[pipeline, name] = t.states(bio, optimizer)
torch.save(after, {path!r} + ".after")
"""
ACTIVITY = [
    passes.FuzzyLearningRates(distribution="activity", every=2),
    passes.SynapticScaling(),
    passes.Rejuvenate(rule="threshold"),
]


def test_a_fresh_process_resumes_bit_for_bit(tmp_path):
    saved, expected, path = {}, {}, str(tmp_path / "checkpoints.pt")
    for case in itertools.product(("EVERYTHING", "ACTIVITY"), ("nesterov", "adamw")):
        bio, optimizer, _ = start(globals()[case[0]], case[1])
        train(bio, optimizer, 7)
        saved[case] = copy.deepcopy({"model": bio.state_dict(), "optimizer": optimizer.state_dict()})
        train(bio, optimizer, 5, start=7)
        expected[case] = states(bio, optimizer)
    torch.save(saved, path)
    script = RESUME.format(tests=[str(Path(__file__).parents[i]) for i in (0, 1)], path=path)
    subprocess.run([sys.executable, "-c", script], check=True)
    found = torch.load(path + ".after")
    assert found.keys() == expected.keys()
    for case, after in found.items():
        assert_same_states(after, expected[case])


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


def test_an_unlearned_step_is_refused():
    bio, optimizer, _ = start()
    with pytest.raises(biofx.LifecycleError, match=r"without backward\(\): none of the 2 weights has a gradient"):
        optimizer.step()
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["gradient", "weight"])
def test_what_is_not_finite_is_refused_and_nothing_changes(what, value):
    bio, optimizer, _ = start()
    train(bio, optimizer, 1)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    raw = bio.get_parameter("2.weight")
    with torch.no_grad():
        (raw.grad if what == "gradient" else raw)[0, 0, 0] = value
    before = states(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match=f"2.weight: its {what} is not finite"):
        optimizer.step()
    after = states(bio, optimizer)
    assert all(torch.equal(v, after[k]) or torch.isnan(v).any() for k, v in before.items())


def test_a_parameter_whose_shape_changed_is_refused():
    bio, optimizer, _ = start()
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    bio.get_submodule("0").weight = nn.Parameter(torch.zeros(2, 32, 65))
    with pytest.raises(biofx.LifecycleError, match=r"0.weight was \(2, 32, 64\) when .* and is \(2, 32, 65\)"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    bio, optimizer, _ = start(GAINS, "sgd")
    raw = bio.get_parameter("0.weight")
    raw.grad = torch.zeros_like(raw).to_sparse()
    with pytest.raises(biofx.LifecycleError, match="0.weight: its gradient is sparse"):
        optimizer.step()


def test_what_cannot_be_attached():
    bio = biofx.transform(network(), GAINS)
    with pytest.raises(biofx.LifecycleError, match="LBFGS evaluates the loss several times in a step"):
        biofx.attach(bio, torch.optim.LBFGS(bio.parameters()))
    with pytest.raises(biofx.LifecycleError, match="SparseAdam needs sparse gradients"):
        biofx.attach(bio, torch.optim.SparseAdam(list(bio.parameters())))
    with pytest.raises(biofx.ArgumentError, match="SGD holds no weight of this model that a pass changed"):
        biofx.attach(bio, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(biofx.ArgumentError, match="optimizer must be a torch.optim.Optimizer, got float"):
        biofx.attach(bio, 0.1)
    with pytest.raises(biofx.ArgumentError, match="expected a model made by biofx.transform"):
        biofx.attach(network(), torch.optim.SGD(bio.parameters(), lr=0.1))
    unchanged = biofx.transform(network(), [passes.MirrorUnits()], frontend="module")
    with pytest.raises(biofx.ArgumentError, match="no pass changed any weight of this model; biofx.summary"):
        biofx.attach(unchanged, torch.optim.SGD(unchanged.parameters(), lr=0.1))
    with pytest.raises(biofx.ArgumentError, match=r"the arguments are swapped; write attach\(bio, optimizer\)"):
        biofx.attach(torch.optim.SGD(bio.parameters(), lr=0.1), bio)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ([passes.GroupUnits(1)], "it has 0.weight_synapses.gain, which no pass keeps here"),
        ([*GAINS, passes.Rejuvenate()], "it has no 0.weight_synapses.replaced, which rejuvenate keeps here"),
        ([*GAINS, passes.SplitSynapses(2)], r"0.weight is \(32, 64\) in it and \(2, 32, 64\) here"),
    ],
)
def test_a_checkpoint_of_another_pipeline_loads_nothing(pipeline, message):
    checkpoint = biofx.transform(network(), GAINS).state_dict()
    other = biofx.transform(network(), pipeline, seed=5)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(biofx.ArgumentError, match=f"the checkpoint is from another pipeline than .*: {message}"):
        other.load_state_dict(checkpoint)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (passes.FuzzyLearningRates(nu=0.1), passes.FuzzyLearningRates(nu=0.3), "nu=0.1 in it and nu=0.3 here"),
        (
            passes.DalesPrinciple(constraint="softplus"),
            passes.DalesPrinciple(constraint="abs"),
            "constraint='softplus' in it and constraint='abs' here",
        ),
    ],
)
def test_a_checkpoint_of_other_options_loads_nothing(one, other, message):
    file = io.BytesIO()
    torch.save(biofx.transform(network(), [one]).state_dict(), file)
    file.seek(0)
    checkpoint = torch.load(file)
    bio = biofx.transform(network(), [other], seed=5)
    before = {k: v.clone() for k, v in bio.state_dict().items()}
    with pytest.raises(
        biofx.ArgumentError, match=f"the same passes with other options: {one.name} of .* has {message}"
    ):
        bio.load_state_dict(checkpoint)
    assert all(torch.equal(v, before[k]) for k, v in bio.state_dict().items())
    bio.load_state_dict(checkpoint, strict=False)
    bio.load_state_dict(
        dict(checkpoint)
    )  # as from safetensors, or from an earlier version: nothing is known of options
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(bio).load_state_dict(nn.Sequential(biofx.transform(network(), [one])).state_dict())


@pytest.mark.parametrize("pipeline", [[passes.MirrorUnits()], [passes.DalesPrinciple(inputs="excitatory")]])
def test_a_plain_checkpoint_that_does_not_fit_is_refused(pipeline):
    checkpoint = network().state_dict()
    with pytest.raises(biofx.ArgumentError, match="looks like a checkpoint of the plain model; load it into that, bef"):
        biofx.transform(network(), pipeline).load_state_dict(checkpoint)


def test_a_skipped_overflow_leaves_no_trace_in_the_activity():
    bio = biofx.transform(network().float(), [passes.SynapticScaling(on="weight")])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0, 1.0):
        images = IMAGES.float()[:32].clone()
        images[0, 0] = value
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(bio(images), LABELS[:32])).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(x).all() for x in bio.state_dict().values())
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 3


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_bias_that_was_split_learns_as_fast_as_its_weight(name):
    moved = []
    for synapses in (1, 4):
        pipeline = [passes.SplitSynapses(synapses, activation="tanh", init="equal")]
        bio = biofx.transform(nn.Linear(64, 10, bias=True).double(), pipeline)
        with torch.no_grad():
            bio.get_parameter("weight").zero_()
            bio.get_parameter("bias").zero_()
        optimizer = OPTIMIZERS[name](bio.parameters())
        biofx.attach(bio, optimizer)
        train(bio, optimizer, 1)
        moved.append(bio.get_parameter("bias").detach().sum(0))
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-9)


def test_a_split_bias_is_no_synapse_in_the_summary():
    text = biofx.summary(biofx.transform(nn.Linear(4, 2), [passes.SplitSynapses(2, activation="tanh")]))
    assert "not synapses: bias" in text
    assert "left alone" not in text


def test_parameters_added_later_are_refused_until_reattached():
    bio = biofx.transform(network(), GAINS)
    optimizer = torch.optim.Adam(bio.get_submodule("2").parameters())
    attachment = biofx.attach(bio, optimizer)
    optimizer.add_param_group({"params": [bio.get_parameter("0.weight")]})
    with pytest.raises(
        biofx.LifecycleError, match="holds other parameters than when it was attached; detach and attach"
    ):
        train(bio, optimizer, 1)
    attachment.detach()
    assert biofx.attach(bio, optimizer).weights == ("0.weight", "2.weight")
    train(bio, optimizer, 1)


def test_regularization_pulls_towards_zero_under_maximize():
    for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
        bio = biofx.transform(network(), [passes.L1Regularization(0.1)])
        optimizer = optimizer_class(bio.parameters(), lr=0.001, maximize=True)
        biofx.attach(bio, optimizer)
        before = float(biofx.l1(bio))
        for _ in range(5):
            optimizer.zero_grad()
            (0 * bio(IMAGES[:8])).sum().backward()
            optimizer.step()
        assert float(biofx.l1(bio)) < before


def test_half_precision_survives_a_fused_optimizer_with_scaler():
    steps = []
    for attached in (True, False):
        torch.manual_seed(0)
        bio = biofx.transform(nn.Linear(4, 4).half(), [passes.FuzzyLearningRates(distribution="baseline")])
        optimizer = torch.optim.Adam(bio.parameters(), lr=0.01, fused=True, eps=1e-12)
        if attached:
            biofx.attach(bio, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        before = bio.weight.detach().clone()
        scaler.scale((bio(torch.ones(2, 4).half()).float() * 1e-9).sum()).backward()
        scaler.step(optimizer)
        steps.append(bio.weight.detach() - before)
    assert steps[1].abs().max() > 0
    torch.testing.assert_close(*steps)


def test_detaching_twice_leaves_a_later_attachment_alone():
    bio, optimizer, first = start(GAINS)
    first.detach()
    second = biofx.attach(bio, optimizer)
    first.detach()
    assert second.weights == ("0.weight", "2.weight")
    assert "scale_grad" not in bio.code


class Perturbing(torch.optim.SGD):
    """Moves the weights before it calls the closure, and back, as sharpness-aware minimisation does."""

    def step(self, closure):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.01)
        super().step()
        return loss


def test_gains_act_on_the_step_of_perturbing_optimizers():
    plain = network()
    bio = biofx.transform(plain, GAINS)
    optimizers = [Perturbing(m.parameters(), lr=0.1) for m in (plain, bio)]
    biofx.attach(bio, optimizers[1])
    before = copy.deepcopy(plain)
    for model, optimizer in zip((plain, bio), optimizers, strict=True):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(IMAGES[:64]), LABELS[:64])
            loss.backward()
            return loss

        optimizer.step(closure)
    for name, site in biofx.weight_sites(bio).items():
        start_, end = before.get_parameter(name), plain.get_parameter(name)
        torch.testing.assert_close(site.raw - start_, site.gain * (end - start_), rtol=1e-6, atol=1e-12)


def test_one_optimizer_over_two_models_steps_for_one_of_them():
    a, b = (biofx.transform(network(), [*GAINS, passes.L1Regularization(0.1)]) for _ in range(2))
    optimizer = torch.optim.Adam([*a.parameters(), *b.parameters()])
    for bio in (a, b):
        biofx.attach(bio, optimizer)
    before = b.get_parameter("0.weight").detach().clone()
    train(a, optimizer, 2)
    assert (int(a.get_buffer("0.weight_synapses.steps")), int(b.get_buffer("0.weight_synapses.steps"))) == (2, 0)
    assert torch.equal(b.get_parameter("0.weight"), before)


def test_frozen_weights_with_biases_that_train():
    bio, optimizer, _ = start()
    for site in biofx.weight_sites(bio).values():
        site.raw.requires_grad_(False)
    train(bio, optimizer, 1)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 0


def test_a_second_transform_that_would_not_fit_is_refused():
    first = biofx.transform(network(), [passes.Crystallize()])
    with pytest.raises(biofx.PipelineError, match="split-synapses changes the shape of 0.weight .* with both"):
        biofx.transform(first, [passes.SplitSynapses(3)])
    with pytest.raises(
        biofx.PipelineError, match="group-units changes the shape of 0.weight or of its operator's output"
    ):
        biofx.transform(biofx.transform(network(), [passes.SynapticScaling()]), [passes.GroupUnits()])


def test_an_attached_model_is_transformed_as_a_copy_only():
    bio, optimizer, _ = start([passes.FuzzyLearningRates()])
    with pytest.raises(biofx.ArgumentError, match=r"model is attached to an optimizer; detach\(\) it before"):
        biofx.transform(bio, [passes.VolumeDependentLearningRates()], inplace=True)
    other = biofx.transform(bio, [passes.VolumeDependentLearningRates()])
    assert "scale_grad" in other.code
    assert "scale_grad" not in bio.code
    train(bio, optimizer, 1)


def test_weights_without_elements():
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 2))
    pipeline = [*EVERYTHING[1:], passes.GroupUnits(1)]
    pipeline[3] = passes.Rejuvenate(rule="threshold")
    bio = biofx.transform(model, pipeline)
    optimizer = torch.optim.Adam(bio.parameters())
    biofx.attach(bio, optimizer)
    bio(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    biofx.verify(bio)


# --- a later attachment ------------------------------------------------------------------------------------------


def test_a_later_attachment_takes_over():
    bio, first, attachment = start(GAINS)
    train(bio, first, 1)
    second = torch.optim.SGD(bio.get_submodule("2").parameters(), lr=0.1)
    later = biofx.attach(bio, second)
    assert (attachment.weights, later.weights) == (("0.weight",), ("2.weight",))
    again = biofx.attach(bio, first)
    assert (attachment.weights, later.weights, again.weights) == ((), (), ("0.weight", "2.weight"))
    assert len(first._optimizer_step_pre_hooks) == 1
    assert not second._optimizer_step_pre_hooks
    train(bio, first, 1)


def test_an_optimizer_that_is_gone_holds_nothing():
    bio, optimizer, attachment = start(GAINS)
    del optimizer, attachment
    gc.collect()
    assert "no rule acts at its steps" in flat(biofx.summary(bio))
    biofx.detach(bio)
    biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1))


class Around(torch.optim.Optimizer):
    """Wraps an optimizer without being one: its steps run no hooks."""

    def __init__(self, base, hooks):
        self.base = base
        if hooks:
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize("hooks", [True, False])
def test_rules_act_at_the_steps_inside_a_wrapper(hooks):
    bio = biofx.transform(network(), GAINS)
    optimizer = Around(torch.optim.Adam(bio.parameters()), hooks)
    attachment = biofx.attach(bio, optimizer)
    assert attachment.optimizer is optimizer.base


# --- no attachment -----------------------------------------------------------------------------------------------

FORGOTTEN = {
    "gains cancel": (GAINS, "adamw", "fuzzy-learning-rates"),
    "gains act on gradients": (GAINS, "momentum", None),
    "split": ([passes.SplitSynapses(2)], "adam", "split-synapses"),
    "updates": ([passes.ExponentiatedGradient()], "sgd", "exponentiated-gradient"),
    "rules at steps": ([*GAINS, passes.Crystallize()], "sgd", "crystallize"),
    "nothing to do": ([passes.GroupUnits(2)], "adam", None),
}


@pytest.mark.parametrize(("pipeline", "name", "told"), FORGOTTEN.values(), ids=FORGOTTEN)
@pytest.mark.parametrize("copied", [False, True])
def test_whoever_forgets_to_attach_is_told_once(pipeline, name, told, copied):
    bio = biofx.transform(network(), pipeline)
    bio = copy.deepcopy(bio) if copied else bio
    optimizer = OPTIMIZERS[name](bio.parameters())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(bio, optimizer, 2)
        if told is None:
            train(bio, optimizer, 1)
    messages = [str(w.message) for w in seen if "biofx.attach" in str(w.message)]
    assert len(messages) == (told is not None)
    assert told is None or f"trains a model of biofx without its rules ({told})" in messages[0]


def test_whoever_attaches_is_told_nothing():
    bio, optimizer, _ = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(bio, optimizer, 2)


# --- the loop stays what it was ----------------------------------------------------------------------------------

SPLITS = {
    "alone": [passes.SplitSynapses(8)],
    "with rules": [passes.SplitSynapses(3), *GAINS, passes.L1Regularization()],
}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("pipeline", SPLITS.values(), ids=SPLITS)
def test_gradients_and_their_norm_are_those_of_the_backward_pass(name, pipeline):
    plain = network()
    bio, optimizer, _ = start(pipeline, name, plain)
    for model in (plain, bio):
        F.cross_entropy(model(IMAGES[:64]), LABELS[:64]).backward()
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 1e9) for model in (plain, bio)]
    torch.testing.assert_close(norms[1], norms[0])
    kept = [p.grad.clone() for p in bio.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, k) for p, k in zip(bio.parameters(), kept, strict=True))


INEXACT = ("muon", "adafactor")  # Muon takes no weights with three axes; Adafactor looks at all rows together


@pytest.mark.parametrize(("name", "synapses"), in_turn([name for name in OPTIMIZERS if name not in INEXACT], [2, 3]))
def test_split_connections_move_as_plain_ones_for_fifty_steps(name, synapses):
    plain = network()
    bio, optimizer, _ = start([passes.SplitSynapses(synapses)], name, plain)
    train(plain, OPTIMIZERS[name](plain.parameters()), 50)
    train(bio, optimizer, 50)
    for weight_name, site in biofx.weight_sites(bio).items():
        torch.testing.assert_close(site.effective(), plain.get_parameter(weight_name), rtol=1e-5, atol=1e-7)


def test_a_step_that_fails_leaves_the_weights_as_they_were():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise ValueError("out of memory")

    bio = biofx.transform(network(), [passes.SplitSynapses(3)])
    optimizer = Failing(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    weights = [site.raw for site in biofx.weight_sites(bio).values()]
    before = [(p.detach().clone(), p.grad.clone()) for p in weights]
    with pytest.raises(ValueError, match="out of memory"):
        optimizer.step()
    for p, (value, gradient) in zip(weights, before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    biofx.detach(bio)
    assert "step" not in vars(optimizer)


# --- optimizers that keep copies of the weights ------------------------------------------------------------------


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): the parameters lie between an average and a fast copy."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            z, k = state.setdefault("z", p.clone()), state.setdefault("k", 0)
            p.lerp_(z, 1 / (k + 1))
            p.add_(p.grad, alpha=self.param_groups[0]["lr"] * (0.9 * (1 - 1 / (k + 1)) - 1))
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            state["k"] = k + 1


class Lookahead(torch.optim.Optimizer):
    """SGD with a slow copy, to which the weights return every fifth step (Zhang et al. 2019)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            slow = state.setdefault("slow", p.clone())
            state["k"] = state.get("k", 0) + 1
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            if state["k"] % 5 == 0:
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Master(torch.optim.Optimizer):
    """SGD on a copy of higher precision."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            master = self.state[p].setdefault("master", p.double().clone())
            master.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.copy_(master)


@pytest.mark.parametrize("steps", [1, 50, 200])
@pytest.mark.parametrize("optimizer_class", [ScheduleFree, Lookahead, Master, torch.optim.SGD])
def test_gains_hold_where_the_optimizer_keeps_a_copy(optimizer_class, steps):
    """The slope of displacement on gain, for weights that are all pulled alike."""
    torch.manual_seed(0)
    bio = biofx.transform(nn.Linear(50, 50, bias=False).double(), [passes.FuzzyLearningRates(nu=0.3)])
    optimizer = optimizer_class(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    raw, gain = bio.get_parameter("weight"), biofx.weight_sites(bio)["weight"].gain
    start_ = raw.detach().clone()
    for _ in range(steps):
        raw.grad = 1 + 0.1 * torch.randn_like(raw)
        optimizer.step()
    moved = (raw.detach() - start_).flatten()
    moved, gain = moved / moved.mean() - 1, gain.flatten() / gain.mean() - 1
    slope = (moved * gain).sum() / gain.square().sum()
    assert abs(slope - 1) < 0.05


class LookaheadAdam(Lookahead):
    """Undoes gains on its update, and normalises those on the gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad.sign()
        super().step()


def test_an_optimizer_that_undoes_gains_is_refused():
    bio = biofx.transform(network(), GAINS)
    code = bio.code
    with pytest.raises(biofx.LifecycleError, match="LookaheadAdam undoes gains, as it keeps copies of the weights"):
        biofx.attach(bio, LookaheadAdam(bio.parameters(), lr=0.01))
    assert bio.code == code
    attachment = biofx.attach(bio, torch.optim.Adam(bio.parameters()))
    with pytest.raises(biofx.LifecycleError, match="LookaheadAdam undoes gains"):
        biofx.attach(bio, LookaheadAdam(bio.parameters(), lr=0.01))
    assert attachment.weights == ("0.weight", "2.weight")


class NoDefaults(Master):
    """Its constructor takes something that is not in its defaults."""

    def __init__(self, params, rate, extra):
        super().__init__(params, rate)


def test_a_copy_of_the_weights_is_found_without_a_trial():
    bio = biofx.transform(network(), GAINS)
    optimizer = NoDefaults(bio.parameters(), 0.01, extra=None)
    biofx.attach(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match=r"keeps a copy of the weights \('master' in its state\)"):
        train(bio, optimizer, 1)


@pytest.mark.parametrize("first", ["scheduler", "attachment"])
def test_schedulers_and_attachments_in_any_order(first):
    bio = biofx.transform(network(), [passes.SplitSynapses(2), *GAINS])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "attachment":
            biofx.attach(bio, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if first == "scheduler":
            biofx.attach(bio, optimizer)
        for _ in range(3):
            train(bio, optimizer, 1)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0125
    biofx.detach(bio)
    train(bio, optimizer, 1)


def test_signs_of_a_pass_without_a_rule_hold_through_steps():
    """A projection in forward sleeps while an optimizer is attached, so every step sees to the signs."""

    @dataclass(frozen=True)
    class Positive(passes.Pass):
        name = "positive"
        slot = passes.Slot.SIGN

        def rewrite(self, site, edit):
            edit.insert(torch.ops.biofx.project_sign, edit.state("sign", torch.ones_like(site.raw)))

    bio = biofx.transform(network(), [Positive()])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 5)
    assert all((site.effective() >= 0).all() for site in biofx.weight_sites(bio).values())


def test_verify_finds_signs_overwritten_between_steps():
    bio, optimizer, _ = start([passes.DalesPrinciple(balance=False)], "sgd")
    with torch.no_grad():
        bio.get_submodule("2").weight.fill_(1.0)
    with pytest.raises(
        biofx.VerificationError, match=r"2.weight: \d+ of its synapses have another sign than their unit"
    ):
        biofx.verify(bio)
    train(bio, optimizer, 1)
    biofx.verify(bio)
