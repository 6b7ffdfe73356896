"""The lifecycle: rules act once around each step in any training loop, or the step is refused with nothing changed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import biofx
from biofx import passes
from training_runs import (
    EVERYTHING,
    GAINS,
    IMAGES,
    LABELS,
    OPTIMIZERS,
    assert_same_states,
    network,
    start,
    states,
    train,
)


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


# --- loss scales -------------------------------------------------------------------------------------------------


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
        kept = {k: v.clone() for k, v in bio.state_dict().items() if not k.endswith(".seen")}
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


def test_a_loss_scale_costs_double_precision_no_digit():
    results = []
    for scale in (1.0, 3.0):
        bio, optimizer, _ = start("split-synapses", "sgd-fused")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(F.cross_entropy(bio(IMAGES[:64]), LABELS[:64])).backward()
        scaler.step(optimizer)
        results.append(states(bio, optimizer))
    assert_same_states(*results, rtol=1e-12, atol=1e-14)


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


# --- which weights take part -------------------------------------------------------------------------------------


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


def test_frozen_weights_with_biases_that_train():
    bio, optimizer, _ = start()
    for site in biofx.weight_sites(bio).values():
        site.raw.requires_grad_(False)
    train(bio, optimizer, 1)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 0


def test_one_optimizer_over_two_models_steps_for_one_of_them():
    a, b = (biofx.transform(network(), [*GAINS, passes.L1Regularization(0.1)]) for _ in range(2))
    optimizer = torch.optim.Adam([*a.parameters(), *b.parameters()])
    for bio in (a, b):
        biofx.attach(bio, optimizer)
    before = b.get_parameter("0.weight").detach().clone()
    train(a, optimizer, 2)
    assert (int(a.get_buffer("0.weight_synapses.steps")), int(b.get_buffer("0.weight_synapses.steps"))) == (2, 0)
    assert torch.equal(b.get_parameter("0.weight"), before)


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


# --- signs -------------------------------------------------------------------------------------------------------


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


# --- observers that see nothing ----------------------------------------------------------------------------------


OTHERWISE = {
    "a method": lambda bio, x: bio.get_submodule("2")(bio.get_submodule("1")(bio.get_submodule("0")(x))),
    "evaluation mode": lambda bio, x: bio.eval()(x),
}


@pytest.mark.parametrize("call", OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize(
    "rule",
    [passes.SynapticScaling(), passes.ContinualBackprop(), passes.FuzzyLearningRates(distribution="activity", every=1)],
)
def test_a_rule_whose_observers_see_nothing_is_told(rule, call):
    bio, optimizer, _ = start([rule], "sgd")
    F.cross_entropy(call(bio, IMAGES[:64]), LABELS[:64]).backward()
    with pytest.warns(UserWarning, match=rf"{rule.name} saw no activity at [02]\.weight .* training mode"):
        optimizer.step()


@pytest.mark.filterwarnings("error:.*saw no activity")
def test_a_rule_whose_observers_see_is_not_told():
    bio, optimizer, _ = start([passes.SynapticScaling(), passes.ContinualBackprop()], "sgd")
    train(bio, optimizer, 2)


# --- what is assigned between steps ---------------------------------------------------------------------------


def without_hook(synapses):
    synapses.links = ()


def with_another_gain(synapses):
    synapses.register_buffer("gain", torch.zeros_like(synapses.gain))


def with_gains_of_a_checkpoint(synapses):
    state = {name: torch.zeros_like(value) if name == "gain" else value for name, value in synapses.named_buffers()}
    synapses.load_state_dict(state, assign=True, strict=False)


@pytest.mark.parametrize(
    ("assign", "gain"), [(without_hook, 1.0), (with_another_gain, 0.0), (with_gains_of_a_checkpoint, 0.0)]
)
def test_what_is_assigned_to_synapses_acts_at_the_next_step(assign, gain):
    bio, optimizer, _ = start([passes.FuzzyLearningRates(nu=0.5)], "sgd")
    train(bio, optimizer, 2)
    assign(bio[0].weight_synapses)
    site = biofx.weight_sites(bio)["0.weight"]
    before = site.raw.detach().clone()
    train(bio, optimizer, 1)
    rate = optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(site.raw.detach(), before - gain * rate * site.raw.grad)


def test_a_weight_that_is_moved_to_another_dtype_goes_on():
    bio, optimizer, _ = start([*GAINS, passes.Rejuvenate(dre=2.0), passes.DalesPrinciple(balance=False)], "momentum")
    train(bio, optimizer, 2)
    bio.float()
    optimizer.state.clear()
    F.cross_entropy(bio(IMAGES[:64].float()), LABELS[:64]).backward()
    optimizer.step()
    biofx.verify(bio)
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 3


# --- refusals ----------------------------------------------------------------------------------------------------


def test_an_unlearned_step_is_refused():
    bio, optimizer, _ = start()
    with pytest.raises(biofx.LifecycleError, match=r"without backward\(\): none of the 2 weights has a gradient"):
        optimizer.step()
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 0


def test_a_step_of_frozen_weights_does_nothing():
    """As an optimizer of its own for a part that is frozen during training."""
    bio, optimizer, _ = start()
    before = [parameter.clone() for parameter in bio.requires_grad_(False).parameters()]
    optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(bio.parameters(), before, strict=True))
    assert int(bio.get_buffer("0.weight_synapses.steps")) == 0


def test_a_parameter_whose_shape_changed_is_refused():
    bio, optimizer, _ = start()
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    bio.get_parameter("0.weight").data = torch.zeros(2, 32, 65)
    with pytest.raises(biofx.LifecycleError, match=r"0.weight was \(2, 32, 64\) when .* and is \(2, 32, 65\)"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    bio, optimizer, _ = start(GAINS, "sgd")
    raw = bio.get_parameter("0.weight")
    raw.grad = torch.zeros_like(raw).to_sparse()
    with pytest.raises(biofx.LifecycleError, match="0.weight: its gradient is sparse"):
        optimizer.step()


# --- who takes part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pipeline", ["rejuvenate{dre=5.0}", "l1-regularization{strength=0.1}", "synaptic-scaling{on=weight}", "crystallize"]
)
def test_frozen_weights_take_no_part_even_with_gradients_of_zero(pipeline):
    bio, optimizer, _ = start(pipeline, "sgd")
    train(bio, optimizer, 1)
    bio.get_submodule("0").requires_grad_(False)
    kept = {name: value.clone() for name, value in bio.state_dict().items() if name.startswith("0.")}
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        optimizer.step()
    for name, value in kept.items():
        if not name.endswith((".seen", ".steps")):
            assert torch.equal(bio.state_dict()[name], value), name


@pytest.mark.parametrize(
    "pipeline",
    [
        "dales-principle{balance=False}",
        "split-synapses,dales-principle{balance=False}",
        "exponentiated-gradient",
        "inhibitory-interneurons",
    ],
)
def test_frozen_weights_that_momentum_moves_keep_their_signs(pipeline):
    """As with zero_grad(set_to_none=False), whose zeros let an optimizer go on."""
    bio = biofx.transform(network(), pipeline)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5, momentum=0.9)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 3)
    raw = biofx.weight_sites(bio)["2.weight"].raw
    signs, before = raw.sign(), raw.detach().clone()
    raw.requires_grad_(False)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        optimizer.step()
    assert not torch.equal(raw, before)
    assert not bool((raw * signs < 0).any()) or pipeline != "exponentiated-gradient"
    biofx.verify(bio)


def test_a_gradient_from_before_the_freeze_counts_in_full():
    results = []
    for pipeline in (None, "split-synapses{synapses=3}"):
        model = network() if pipeline is None else biofx.transform(network(), pipeline)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        if pipeline is not None:
            biofx.attach(model, optimizer)
        F.cross_entropy(model(IMAGES[:64]), LABELS[:64]).backward()
        model.requires_grad_(False)
        optimizer.step()
        results.append(model(IMAGES[:64]))
    torch.testing.assert_close(*results)


def test_gradients_from_before_the_attachment_are_refused():
    """They were multiplied by gains already, so weights moved by the square of their gains."""
    bio = biofx.transform(network(), GAINS)
    optimizer = OPTIMIZERS["sgd"](bio.parameters())
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    biofx.attach(bio, optimizer)
    for _ in range(2):
        with pytest.raises(biofx.LifecycleError, match=r"computed before the optimizer was attached.*zero_grad\(\)"):
            optimizer.step()
    train(bio, optimizer, 1)


@pytest.mark.parametrize("change", ["accumulated", "clipped"])
def test_gradients_from_before_the_attachment_are_known_by_sight(change):
    """Whatever was added to them, or done to them in place."""
    bio = biofx.transform(network(), "split-synapses,fuzzy-learning-rates")
    optimizer = OPTIMIZERS["sgd"](bio.parameters())
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    attachment = biofx.attach(bio, optimizer)
    for _ in range(2):
        if change == "accumulated":
            F.cross_entropy(bio(IMAGES[64:128]), LABELS[64:128]).backward()
        nn.utils.clip_grad_norm_(bio.parameters(), 0.1)
        with pytest.raises(biofx.LifecycleError, match=r"computed before the optimizer was attached.*zero_grad\(\)"):
            optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    for _ in range(2):
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    optimizer.step()
    optimizer.zero_grad()
    attachment.detach()
    assert not any(parameter._backward_hooks for parameter in bio.parameters())


def test_zeros_from_before_the_attachment_are_no_gradients():
    bio = biofx.transform(network(), GAINS)
    optimizer = OPTIMIZERS["sgd"](bio.parameters())
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    optimizer.zero_grad(set_to_none=False)
    biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    before = bio.get_parameter("0.weight").detach().clone()
    optimizer.step()
    assert not torch.equal(bio.get_parameter("0.weight"), before)


# --- hooks of others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_others_see_what_the_optimizer_is_not_shown(first):
    """The optimizer sees Γ times a weight and √Γ times its gradient; a hook may see neither, whoever comes first."""
    bio = biofx.transform(network(), "split-synapses{synapses=4}")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    seen = []

    def look(*_):
        site = biofx.weight_sites(bio)["0.weight"]
        seen.append((site.raw.detach().clone(), site.raw.grad.clone()))

    if not first:
        biofx.attach(bio, optimizer)
    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    if first:
        biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    look()
    optimizer.step()
    expected, *others = seen
    for found in others:
        torch.testing.assert_close(found, expected)


def test_steps_written_by_way_of_data_count():
    bio = biofx.transform(network(), [passes.Crystallize(every=10)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 1)
    for layer in (bio[0], bio[2]):
        layer.weight_synapses.steps.data.fill_(9)  # as some loops restore what they saved
    before = bio[0].weight_synapses.gain.clone()
    train(bio, optimizer, 1)
    assert int(bio[0].weight_synapses.steps) == 10
    assert not torch.equal(bio[0].weight_synapses.gain, before)


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")


def test_a_step_that_fails_leaves_signs_as_they_have_to_be():
    bio = biofx.transform(network(), "dales-principle")
    optimizer = Failing(bio.parameters(), lr=5.0)
    biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    biofx.verify(bio)


class Nested(Failing):  # whose steps are nested in each other
    def step(self, closure=None):
        super().step(closure)


@pytest.mark.parametrize("kind", [Failing, Nested])
@pytest.mark.parametrize("bound", ["before", "after"])
def test_a_step_bound_before_attach_may_fail(kind, bound):
    runs = []
    for fails in (True, False):
        bio = biofx.transform(network(), [passes.SplitSynapses(2), *GAINS])
        for bias in ("0.bias", "2.bias"):
            bio.get_parameter(bias).requires_grad_(False)  # what else the failed step changed
        optimizer = kind(bio.parameters(), lr=0.1)
        step = optimizer.step
        attachment = biofx.attach(bio, optimizer)
        step = step if bound == "before" else optimizer.step
        optimizer.fails = fails
        F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                step()
            optimizer.fails = False
            if bound == "before":
                with pytest.raises(biofx.LifecycleError, match=r"call zero_grad\(\) and backward\(\) again, and take"):
                    step()
            step()  # on the same gradient, which was computed before the failure
        else:
            step()
        train(bio, optimizer, 2)
        attachment.check()
        runs.append(states(bio, optimizer))
    assert_same_states(*runs)


def test_threads_leave_the_default_dtype_as_it_was():
    runs = [start([passes.Rejuvenate(), *GAINS], "sgd")[:2] for _ in range(2)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(train, *run, 60) for run in runs]:
                done.result()
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(before)
