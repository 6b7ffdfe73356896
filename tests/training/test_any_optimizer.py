"""Any optimizer: those of other packages, and those around other optimizers."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.signs.constraints import rectify_
from biofx.training import attachment, lifecycle
from biofx.training.attachment import Attachment

GAINS = [passes.FuzzyLearningRates(nu=0.3)]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4, bias=False)).double()


def train(model, optimizer, steps, step=lambda optimizer, evaluate: optimizer.step()):
    """All weights are pulled alike, so that where a weight is does not change its gradient."""
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        pulls = [
            1 + 0.1 * torch.randn(w.shape, generator=generator).double() for w in (model[0].weight, model[1].weight)
        ]

        def evaluate(pulls=pulls):
            optimizer.zero_grad()
            loss = sum((layer.weight * pull).sum() for layer, pull in zip(model, pulls, strict=True))
            loss.backward(create_graph=False)
            return loss

        evaluate()
        torch.manual_seed(number)  # some optimizers draw numbers
        step(optimizer, evaluate)


def displacements(make, steps, *how):
    """Displacement of every weight in the plain and in the transformed model, and the gain."""
    plain, bio = network(), biofx.transform(network(), GAINS)
    for model in (plain, bio):
        optimizer = make([*model.parameters()])
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        if model is bio:
            biofx.attach(bio, optimizer)
        train(model, optimizer, steps, *how)
    for name, site in biofx.weight_sites(bio).items():
        start = network().get_parameter(name).detach()
        yield plain.get_parameter(name).detach() - start, site.raw.detach() - start, site.gain


def assert_gains_hold(make, steps, *how, rtol=1e-6):
    for plain, given, gain in displacements(make, steps, *how):
        torch.testing.assert_close(given, gain * plain, rtol=rtol, atol=1e-12)


# --- wrappers ----------------------------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Every fifth step, the weights return half the way to a slow copy (Zhang et al. 2019)."""

    def __init__(self, optimizer):
        self.fast, self.count = optimizer, 0
        self.slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    param_groups = property(lambda self: self.fast.param_groups)

    def zero_grad(self, set_to_none=True):
        self.fast.zero_grad(set_to_none)

    def step(self, closure=None):
        self.fast.step(closure)
        self.count += 1
        if self.count % 5 == 0:
            with torch.no_grad():
                for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))


class Sam(torch.optim.Optimizer):
    """Gradients where the loss is larger (Foret et al. 2021), in two steps that the user calls."""

    def __init__(self, params, inner, **options):
        super().__init__(params, options)
        self.inner = inner(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p].pop("old"))
        self.inner.step()

    def step(self, closure):
        self.first_step()
        closure()
        self.second_step()


def in_two_steps(optimizer, evaluate):
    optimizer.first_step()
    evaluate()
    optimizer.second_step()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


WRAPPERS = {
    "lookahead": (lambda p: Lookahead(adam(p)),),
    "twice": (lambda p: Lookahead(Lookahead(adam(p))),),
    "sam": (lambda p: Sam(p, torch.optim.Adam, lr=0.01), lambda o, evaluate: o.step(evaluate)),
    "sam in two steps": (lambda p: Sam(p, torch.optim.Adam, lr=0.01), in_two_steps),
}


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_gains_hold_at_the_steps_inside_a_wrapper(wrapper, steps):
    make, *how = wrapper
    assert_gains_hold(make, steps, *how)


class Each(Lookahead):
    """Several optimizers, each with some of the parameters."""

    def __init__(self, parameters):
        self.first, self.second = adam(parameters[:1]), adam(parameters[1:])

    param_groups = property(lambda self: self.first.param_groups + self.second.param_groups)


def test_a_wrapper_around_several_optimizers_is_refused():
    bio = biofx.transform(network(), GAINS)
    code = bio.code
    wrapper = Each([*bio.parameters()])
    with pytest.raises(biofx.ArgumentError, match="of Each run no hooks, so rules could not act; attach") as refusal:
        biofx.attach(bio, wrapper)
    assert bio.code == code
    assert_advice_attaches(str(refusal.value), bio, wrapper, ["optimizer.first", "optimizer.second"])


def assert_advice_attaches(message, bio, optimizer, inside):
    """Run the line in a message."""
    line = message.partition("attach each one in it: ")[2]
    assert [call.removeprefix("biofx.attach(bio, ").removesuffix(")") for call in line.split("; ")] == inside
    exec(line, {"biofx": biofx, "bio": bio, "optimizer": optimizer})  # as a user would
    assert bio.biofx.attached == {"0.weight", "1.weight"}


class Several:
    """Keeps optimizers in a list, as trainers do."""

    def __init__(self, optimizers):
        self.optimizers = optimizers


class SeveralAtOnce(Several, torch.optim.Optimizer):
    """Keeps optimizers in a list, and says that it is an optimizer."""

    param_groups = property(lambda self: [group for each in self.optimizers for group in each.param_groups])


@pytest.mark.parametrize(
    ("hold", "first", "second"),
    [
        (list, "optimizer[0]", "optimizer[1]"),
        (lambda each: dict(zip("ab", each, strict=True)), "optimizer['a']", "optimizer['b']"),
        (Several, "optimizer.optimizers[0]", "optimizer.optimizers[1]"),
        (SeveralAtOnce, "optimizer.optimizers[0]", "optimizer.optimizers[1]"),
    ],
)
def test_a_container_of_optimizers_says_how_to_attach_each(hold, first, second):
    bio = biofx.transform(network(), GAINS)
    parameters = [*bio.parameters()]
    container = hold([torch.optim.SGD(parameters[:1], 0.1), torch.optim.AdamW(parameters[1:])])
    with pytest.raises(biofx.ArgumentError) as refusal:
        biofx.attach(bio, container)
    assert_advice_attaches(str(refusal.value), bio, container, [first, second])


class Sharded(torch.optim.SGD):
    """Leaves some parameters to an optimizer inside, as `ZeroRedundancyOptimizer` does."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.shard = torch.optim.SGD(parameters[:1], **options)

    def step(self, closure=None):
        return self.shard.step(closure)


def test_the_optimizer_of_a_shard_forgets_what_is_replaced():
    bio = biofx.transform(network(), [passes.Rejuvenate(dre=2.0)])
    optimizer = Sharded([*bio.parameters()], lr=0.1, momentum=0.9)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 1)
    (momentum,) = (state["momentum_buffer"] for state in optimizer.shard.state.values())
    assert int((momentum == 0).sum()) == int(bio.get_buffer("0.weight_synapses.replaced")) > 0


# --- all or nothing ----------------------------------------------------------------------------------------------


def fail(*args, **kwargs):
    raise RuntimeError("out of memory")


def fail_once(wanted):
    """Fail when weights are attached, and not when that is undone."""
    calls = []

    def failing(*args, **kwargs):
        if kwargs.get("attached", True):
            calls.append(args)
            if len(calls) == 1:
                fail()
        return wanted(*args, **kwargs)

    return failing


def rectify_one_and_fail(weights, signs):
    rectify_(weights[:1], signs[:1])
    fail()


STAGES = {
    "trial": lambda m, o: m.setattr(attachment, "gain_target_for", fail),
    "update": lambda m, o: m.setattr(lifecycle, "Update", fail),
    "first hook": lambda m, o: m.setattr(o, "register_step_pre_hook", fail),
    "second hook": lambda m, o: m.setattr(o, "register_step_post_hook", fail),
    "step": lambda m, o: m.setattr(Attachment, "_with_undo", fail_once(Attachment._with_undo)),
    "graph": lambda m, o: m.setattr(attachment, "set_attached", fail_once(attachment.set_attached)),
    "weights": lambda m, o: m.setattr(attachment, "rectify_", rectify_one_and_fail),
}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_what_fails_leaves_model_and_optimizer_as_they_were(monkeypatch, stage, earlier):
    bio = biofx.transform(network(), [*GAINS, passes.DalesPrinciple(balance=False)])
    first, optimizer = adam(bio.parameters()), adam(bio.parameters())
    held = biofx.attach(bio, first) if earlier else None
    with torch.no_grad():
        for site in biofx.weight_sites(bio).values():
            site.raw.neg_()  # signs that `attach` is to correct
    code, values = bio.code, {k: v.clone() for k, v in bio.state_dict().items()}
    with monkeypatch.context() as patched:
        STAGES[stage](patched, optimizer)
        with pytest.raises(RuntimeError, match="out of memory"):
            biofx.attach(bio, optimizer)
    assert bio.code == code
    assert all(torch.equal(v, values[k]) for k, v in bio.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "step" not in vars(optimizer)
    assert held is None or held.weights == ("0.weight", "1.weight")
    assert len(first._optimizer_step_pre_hooks) == earlier
    biofx.attach(bio, optimizer)


# --- other packages ----------------------------------------------------------------------------------------------

HAS = {name: importlib.util.find_spec(name) is not None for name in ("pytorch_optimizer", "schedulefree", "torchao")}
pytorch_optimizer = importlib.import_module("pytorch_optimizer") if HAS["pytorch_optimizer"] else None


def of_the_package():
    if pytorch_optimizer is None:
        return []
    kinds = (getattr(pytorch_optimizer, name) for name in dir(pytorch_optimizer))
    classes = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]
    return sorted(classes, key=lambda kind: kind.__name__)


# They compute weights from sums of gradients or from averages that they keep.
UNDO_GAINS = {"DAdaptAdaGrad", "FTRL", "MADGRAD", "Nero", "Ranger", "ScheduleFreeAdamW", "ScheduleFreeRAdam"}
ROUGH = {"DAdaptSGD": 0.1}  # gains act on the gradient, whose norm decides how far all weights move


@pytest.mark.parametrize("kind", of_the_package(), ids=lambda kind: kind.__name__)
def test_optimizers_of_pytorch_optimizer_obey_gains(kind):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = network()
            train(plain, kind([*plain.parameters()], lr=0.01), 1)
    except Exception as error:  # noqa: BLE001 - anybody's code
        pytest.skip(f"it needs more: {error}")
    make = lambda parameters: kind(parameters, lr=0.01)  # noqa: E731
    if kind.__name__ in UNDO_GAINS:
        with pytest.raises(biofx.LifecycleError, match=f"{kind.__name__} undoes gains"):
            assert_gains_hold(make, 1)
    else:
        assert_gains_hold(make, 1, rtol=ROUGH.get(kind.__name__, 1e-6))


@pytest.mark.skipif(not HAS["pytorch_optimizer"], reason="pytorch_optimizer is not installed")
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize(
    "name", ["Lookahead", "OrthoGrad", "PCGrad", "SAM", "LookSAM", "FriendlySAM", "ScheduleFreeWrapper"]
)
def test_gains_hold_in_wrappers_of_pytorch_optimizer(name, steps):
    kind = getattr(pytorch_optimizer, name)
    if "SAM" in name:
        assert_gains_hold(lambda p: kind(p, torch.optim.Adam, lr=0.01), steps, lambda o, evaluate: o.step(evaluate))
    elif name != "OrthoGrad" or steps == 1:  # its gradient depends on where the weight is
        assert_gains_hold(lambda p: kind(adam(p)), steps)


@pytest.mark.skipif(not HAS["schedulefree"], reason="schedulefree is not installed")
def test_schedule_free_optimizers_obey_gains_or_are_refused():
    import schedulefree

    assert_gains_hold(lambda p: schedulefree.SGDScheduleFree(p, lr=0.01), 50)
    assert_gains_hold(lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.01)), 50)
    bio = biofx.transform(network(), GAINS)
    with pytest.raises(biofx.LifecycleError, match=r"AdamWScheduleFree undoes gains.*ScheduleFreeWrapper"):
        biofx.attach(bio, schedulefree.AdamWScheduleFree(bio.parameters()))


@pytest.mark.skipif(not HAS["torchao"], reason="torchao is not installed")
def test_states_in_eight_bits_forget_what_is_replaced(monkeypatch):
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    bio = biofx.transform(nn.Linear(64, 64, bias=False), [passes.Rejuvenate(dre=4.0)])
    optimizer = AdamW8bit(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    bio(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert type(state["exp_avg"]).__name__ == "OptimState8bit"
    forgotten = state["exp_avg_sq"].dequantize() == 0
    assert int(forgotten.sum()) >= int(bio.weight_synapses.replaced) > 0
    assert not forgotten.all()


@pytest.mark.parametrize("key", ["z", "momentum"])
def test_a_copy_of_a_weight_becomes_the_new_weight(key):
    class Remembering(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p][key] = p.detach().clone() if key == "z" else torch.ones_like(p)

    bio = biofx.transform(network(), [passes.Rejuvenate(dre=2.0)])
    optimizer = Remembering(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 1)
    for site in biofx.weight_sites(bio).values():
        memory = optimizer.state[site.raw][key]
        assert int(site.state("replaced")) > 0
        assert torch.equal(memory, site.raw) if key == "z" else int((memory == 0).sum()) == int(site.state("replaced"))


def test_a_memory_in_a_code_is_refused_before_turnover():
    class Coded(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["code"] = torch.zeros_like(p, dtype=torch.uint8)

    bio = biofx.transform(network(), [passes.Rejuvenate(dre=2.0)])
    optimizer = Coded(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    before = bio[0].weight.detach().clone()
    with pytest.raises(biofx.LifecycleError, match="0.weight: Coded remembers 'code' of every synapse in a code"):
        train(bio, optimizer, 1)
    assert torch.equal(bio[0].weight, before)
