"""Checkpoints: training resumes bit for bit, and a checkpoint of something else loads nothing."""

import copy
import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import biofx
import training_runs
from biofx import passes
from training_runs import GAINS, assert_same_states, network, start, states, train

RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import training_runs as t
after = {{}}
for (pipeline, name), saved in torch.load({path!r}).items():
    bio, optimizer, _ = t.start(getattr(t, pipeline), name)
    bio.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    t.train(bio, optimizer, 5, start=7)
    after[pipeline, name] = t.states(bio, optimizer)
torch.save(after, {path!r} + ".after")
"""


def test_a_fresh_process_resumes_bit_for_bit(tmp_path):
    saved, expected, path = {}, {}, str(tmp_path / "checkpoints.pt")
    for case in itertools.product(("EVERYTHING", "ACTIVITY"), ("nesterov", "adamw")):
        bio, optimizer, _ = start(getattr(training_runs, case[0]), case[1])
        train(bio, optimizer, 7)
        saved[case] = copy.deepcopy({"model": bio.state_dict(), "optimizer": optimizer.state_dict()})
        train(bio, optimizer, 5, start=7)
        expected[case] = states(bio, optimizer)
    torch.save(saved, path)
    script = RESUME.format(tests=str(Path(__file__).parents[1]), path=path)
    subprocess.run([sys.executable, "-c", script], check=True)
    found = torch.load(path + ".after")
    assert found.keys() == expected.keys()
    for case, after in found.items():
        assert_same_states(after, expected[case])


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pipeline",
    [
        "split-synapses{synapses=3}",
        "dales-principle{constraint=project},split-synapses",
        "dales-principle{constraint=abs,inputs=mixed}",
        "dales-principle{constraint=softplus}",
        "dales-principle{constraint=softplus,readouts=excitatory},split-synapses",
        "inhibitory-interneurons",
    ],
)
def test_what_was_folded_loads_again(pipeline, dtype):
    bio = biofx.transform(network(), pipeline).to(dtype)
    with torch.no_grad():
        for site in biofx.weight_sites(bio).values():
            site.raw.mul_(1.5)
    plain = biofx.fold(bio)
    other = biofx.transform(network(), pipeline).to(dtype)
    other.load_state_dict(plain.state_dict())
    limit = 32 * torch.finfo(dtype).eps
    for name, weight in biofx.fold(other).state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=limit, atol=max(1e-6, limit / 8))
    biofx.verify(other)


@pytest.mark.parametrize("constraint", ["project", "abs", "softplus"])
def test_wrong_signs_are_refused_while_attached_too(constraint):
    bio = biofx.transform(network(), f"dales-principle{{constraint={constraint}}}")
    state = biofx.fold(bio).state_dict()
    state["2.weight"] = -state["2.weight"]
    for _ in range(2):
        with pytest.raises(biofx.ArgumentError, match="2.weight violates the signs that its units have"):
            bio.load_state_dict(state)
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), 0.1))


@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates"])
def test_a_plain_dictionary_loads_into_spectral_norm(pipeline):
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    bio, other = (biofx.transform(model, pipeline, seed=seed) for seed in (0, 1))
    saved = {name: value.clone() for name, value in bio.state_dict().items()}
    other.load_state_dict(saved)
    assert_same_states(dict(other.state_dict()), saved)
    x = torch.randn(3, 4)
    bio.load_state_dict(dict(copy.deepcopy(model).state_dict()))
    torch.testing.assert_close(bio.eval()(x), model.eval()(x))


def test_a_dictionary_without_metadata_may_be_an_early_one():
    bio = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "split-synapses")
    saved = {name: value.clone() for name, value in bio.state_dict().items()}
    del saved["1.num_batches_tracked"]  # PyTorch had none
    with torch.no_grad():
        bio.get_parameter("0.weight").zero_()
    bio.load_state_dict(saved)
    assert_same_states({name: x for name, x in bio.state_dict().items() if name in saved}, saved)


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, lambda bio: torch.compile(bio, backend="eager")])
@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "cortex"])
def test_a_module_around_the_model_loads_plain_checkpoints(pipeline, wrap):
    other, x = network(), torch.randn(3, 64, dtype=torch.float64)
    with torch.no_grad():
        other[0].weight.mul_(-0.5)
    whole = wrap(biofx.transform(network(), pipeline))
    assert not any(whole.load_state_dict(wrap(other).state_dict()))
    torch.testing.assert_close(whole(x), other(x))
    again = wrap(biofx.transform(network(), pipeline))
    assert not any(again.load_state_dict(whole.state_dict()))
    assert_same_states(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("pipeline", [[passes.MirrorUnits()], [passes.DalesPrinciple(inputs="excitatory")]])
def test_a_module_around_the_model_says_what_does_not_fit(pipeline):
    whole = nn.Sequential(biofx.transform(network(), pipeline))
    with pytest.raises(RuntimeError, match=r"(?s)0.*(violates the signs|size mismatch)"):
        whole.load_state_dict(nn.Sequential(network()).state_dict())


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state, prefix, *args):
        state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, *args)


class Fusing(nn.Sequential):
    """Early checkpoints have the two halves of a weight, and no `early` in the name of the bias."""

    @staticmethod
    def on_load(model, state, *_):
        if "0.upper" in state:
            state["0.weight"] = torch.cat([state.pop("0.upper"), state.pop("0.lower")])

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict({name.removeprefix("early."): x for name, x in state.items()}, strict)


def halves(state):
    upper, lower = state.pop("0.weight").chunk(2)
    return {f"early.{name}": value for name, value in {**state, "0.upper": upper, "0.lower": lower}.items()}


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "cortex"])
def test_code_of_the_model_sees_plain_checkpoints(pipeline, around):
    model = Fusing(nn.Linear(3, 4), nn.ReLU(), Doubling(4, 2))
    model.register_load_state_dict_pre_hook(Fusing.on_load)
    bio, x = biofx.transform(model, pipeline), torch.randn(5, 3)
    state = {name: 3 * value for name, value in model.state_dict().items()}
    if around:
        nn.Sequential(bio).load_state_dict({f"0.{name}": value for name, value in state.items()})
        model.load_state_dict(state)
    else:
        bio.load_state_dict(halves(dict(state)))
        model.load_state_dict(halves(dict(state)))
    torch.testing.assert_close(bio(x), model(x))


def test_code_of_the_model_does_not_get_around_signs():
    bio = biofx.transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Doubling(4, 2)), "dales-principle")
    state = biofx.fold(bio).state_dict()
    state["2.weight"] = -state["2.weight"]
    with pytest.raises(RuntimeError, match="2.weight violates the signs that its units have in this model"):
        bio.load_state_dict(state)


@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "cortex"])
def test_a_layer_loads_plain_checkpoints(pipeline):
    bio, other, x = biofx.transform(network(), pipeline), network()[0], torch.randn(3, 64, dtype=torch.float64)
    with torch.no_grad():
        other.weight.mul_(-0.5)
    assert not any(bio[0].load_state_dict(other.state_dict()))
    torch.testing.assert_close(bio[0](x), other(x))


@pytest.mark.parametrize("pipeline", ["split-synapses", "fuzzy-learning-rates", "dales-principle"])
def test_a_plain_checkpoint_has_no_values_for_what_is_on_meta(pipeline):
    bio = biofx.transform(network(), pipeline)
    plain, own = biofx.fold(bio).state_dict(), copy.deepcopy(bio.state_dict())
    bio.to("meta")
    with pytest.raises(biofx.ArgumentError, match="values neither in this checkpoint nor on the meta device"):
        bio.load_state_dict(plain, assign=True)
    bio.load_state_dict(own, assign=True)
    assert_same_states(bio.state_dict(), own)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_assigning_tied_weights_does_not_lose_one(own, around):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    bio = biofx.transform(model, "split-synapses")
    whole = nn.Sequential(bio) if around else bio
    state = copy.deepcopy((whole if own else nn.Sequential(model) if around else model).state_dict())
    whole.load_state_dict(state, assign=True)
    name = next(name for name in state if "2.weight" in name)
    state[name] = 2 * state[name]
    with pytest.raises(
        (biofx.ArgumentError, RuntimeError), match="2.weight is tied to 0.weight in this model, and has o"
    ):
        whole.load_state_dict(state, assign=True)


class Writing(nn.Linear):
    """Writes its weight into a checkpoint by its own code, as lazy layers do; or in another form, and reads it back."""

    in_parts = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        weight = self.weight if keep_vars else self.weight.detach()
        parts = {"upper": weight[:2], "lower": weight[2:]} if self.in_parts else {"weight": weight}
        destination.update({f"{prefix}{name}": part for name, part in parts.items()})
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state, prefix, *args):
        if f"{prefix}upper" in state:
            state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}upper"), state.pop(f"{prefix}lower")])
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("in_parts", [False, True])
def test_code_that_writes_a_weight_leaves_its_synapses_alone(in_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(Writing, "in_parts", in_parts)
    model, x = nn.Sequential(Writing(3, 4), nn.ReLU(), Writing(4, 4)), torch.randn(5, 3)
    bio, other = (biofx.transform(model, "split-synapses", seed=seed) for seed in range(2))
    state = bio.state_dict()
    assert ("0.weight" in state, "0.upper" in state) == (False, in_parts)
    other.load_state_dict(state)
    assert_same_states(bio.state_dict(), other.state_dict())
    early = biofx.transform(model, "split-synapses", seed=2)
    early.load_state_dict(state | {"0.weight": bio[0].weight.detach()})  # as one that was saved with both
    assert_same_states(bio.state_dict(), early.state_dict())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    if not in_parts:
        biofx.save(bio, tmp_path / "kept")
        assert_same_states(bio.state_dict(), biofx.load(tmp_path / "kept", model).state_dict())
