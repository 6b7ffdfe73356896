"""History: what `biofx.record` notes at the steps of an optimizer."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import biofx
from biofx import passes
from biofx.training import history as history_module
from biofx.training.history import COLUMNS, places
from conftest import flat, only
from models.small import mlp

EVERYTHING = "split-synapses{synapses=2},fuzzy-learning-rates,crystallize{floor=0.2},rejuvenate{dre=4.0}"


NEUTRAL = "fuzzy-learning-rates{distribution=baseline}"


def linear(pipeline, n_in=6, n_out=5):
    return biofx.transform(nn.Linear(n_in, n_out, dtype=torch.float64), pipeline)


def sgd(bio, lr=0.1):
    return torch.optim.SGD(bio.parameters(), lr=lr)


def train(bio, optimizer, steps, n_in=6):
    for _ in range(steps):
        optimizer.zero_grad()
        bio(torch.randn(4, n_in, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


def steps_of(history):
    return [row["step"] for row in history.rows]


@pytest.mark.parametrize(
    "pipeline", ["fuzzy-learning-rates", EVERYTHING, "crystallize,l1-regularization", "split-synapses"]
)
def test_every_column_is_what_its_equation_says(pipeline):
    bio = linear(pipeline)
    optimizer = sgd(bio, lr=0.3)
    history = biofx.record(bio, optimizer, every=1)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 3)
    site, row = only(bio), history.rows[-1]
    gain = torch.ones_like(site.raw) if site.factor is None else site.factor
    weight = site.effective().detach()
    expected = {
        "gain_mean": gain.mean(),
        "gain_std": gain.std(correction=0),
        "gain_min": gain.min(),
        "gain_max": gain.max(),
        "crystallized": (gain < 0.5).double().mean(),
        "learning_rate": 0.3 * gain.mean(),
        "turnover": int(site.state("replaced")) / site.raw.numel() if "rejuvenate" in pipeline else None,
        "excitation": weight[weight > 0].sum() / weight.abs().sum(),
        "weight_mean": weight.mean(),
        "weight_std": weight.std(correction=0),
        "weight_min": weight.min(),
        "weight_max": weight.max(),
        **{f"weight_q{q:02}": weight.quantile(q / 100) for q in (5, 25, 50, 75, 95)},
    }
    assert [*row] == ["step", "weight", *COLUMNS]
    assert {key: row[key] for key in COLUMNS} == pytest.approx(
        {key: None if value is None else float(value) for key, value in expected.items()}, abs=1e-12
    )


def test_steps_are_recorded_from_the_start_at_equal_distances():
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=3)
    train(bio, optimizer, 7)
    assert (steps_of(history), history.steps) == ([0, 3, 6], 7)


@pytest.mark.filterwarnings("ignore:.*without its rules")
@pytest.mark.parametrize("order", ["attach, record", "record, attach", "record, attach, attach", "record"])
def test_weights_are_seen_after_all_rules_have_acted(order):
    bio = biofx.transform(
        mlp(4, 6, 3).double(), "split-synapses,dales-principle{excitatory=0.5},fuzzy-learning-rates,rejuvenate"
    )
    optimizer = sgd(bio, lr=1.0)
    found = []
    for word in order.split(", "):
        found.append((biofx.attach if word == "attach" else biofx.record)(bio, optimizer))
    (history,) = (each for each in found if isinstance(each, biofx.History))
    history.every = 1
    site = biofx.weight_sites(bio)["2.weight"]
    for _ in range(4):
        train(bio, optimizer, 1, n_in=4)
        row = history.rows[-1]
        assert row["weight_std"] == pytest.approx(float(site.effective().detach().std(correction=0)), abs=1e-12)
        assert row["gain_mean"] == pytest.approx(float(site.factor.mean()), abs=1e-12)
        assert row["turnover"] == int(site.state("replaced")) / site.raw.numel()


@pytest.mark.filterwarnings("ignore:.*without its rules")
def test_a_record_survives_attaching_and_detaching():
    bio = linear("fuzzy-learning-rates,rejuvenate")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=1)
    train(bio, optimizer, 1)
    for _ in range(2):
        biofx.attach(bio, optimizer)
        train(bio, optimizer, 1)
    biofx.detach(bio)
    train(bio, optimizer, 1)
    assert steps_of(history) == [0, 1, 2, 3, 4]
    turnovers = [row["turnover"] for row in history.rows]
    assert 0 == turnovers[0] == turnovers[1] < turnovers[2] < turnovers[3] == turnovers[4]


def test_the_record_is_bounded_and_keeps_the_whole_training():
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=1, limit=4)
    train(bio, optimizer, 13)
    assert (steps_of(history), history.every) == ([0, 4, 8, 12], 4)


def test_recording_changes_nothing():
    trained = []
    for is_recorded in (False, True):
        torch.manual_seed(1)
        bio = linear(f"{EVERYTHING},volume-dependent-learning-rates")
        optimizer = torch.optim.AdamW(bio.parameters())
        biofx.attach(bio, optimizer)
        if is_recorded:
            biofx.record(bio, optimizer, every=1)
        train(bio, optimizer, 3)
        trained.append(bio.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in trained), strict=True))


def test_a_recording_ends_with_stop_or_its_context():
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    with biofx.record(bio, optimizer, every=1) as history:
        train(bio, optimizer, 1)
    train(bio, optimizer, 1)
    history.stop()
    assert steps_of(history) == [0, 1]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_noise_counts_in_the_learning_rate_but_not_as_a_gain():
    bio = linear([passes.VolumeDependentLearningRates(base_lr=0.5, stability=1e-9, variability=0.0)])
    history = biofx.record(bio, sgd(bio, lr=0.1))
    row = history.rows[0]
    assert (row["gain_mean"], row["gain_std"], row["crystallized"]) == (1, 0, 0)
    assert row["learning_rate"] == pytest.approx(0.05)


def test_every_weight_has_the_learning_rate_of_its_group():
    bio = biofx.transform(mlp(4, 6, 3), NEUTRAL)
    first, second = (site.raw for site in biofx.weight_sites(bio).values())
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": torch.tensor(0.25)}], lr=1)
    assert [row["learning_rate"] for row in biofx.record(bio, optimizer).rows] == [0.5, 0.25]


def test_only_weights_of_the_optimizer_are_recorded():
    bio = biofx.transform(mlp(4, 6, 3), "fuzzy-learning-rates")
    second = biofx.weight_sites(bio)["2.weight"].raw
    assert biofx.record(bio, torch.optim.SGD([second], lr=0.1)).weights == ("2.weight",)


def test_excitation_is_exact_for_weights_of_one_sign():
    for value, expected in ((0.3, 1.0), (-0.3, 0.0), (0.0, None)):
        bio = linear(NEUTRAL)
        only(bio).raw.data.fill_(value)
        assert biofx.record(bio, sgd(bio)).rows[0]["excitation"] == expected


def test_quantiles_of_large_weights_are_those_of_an_even_sample(monkeypatch):
    monkeypatch.setattr(history_module, "SAMPLE", 4096)
    bio = biofx.transform(nn.Linear(200, 100), NEUTRAL)
    weight = torch.randn(100, 200)
    only(bio).raw.data.copy_(weight)
    row = biofx.record(bio, sgd(bio)).rows[0]
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        below = (weight < row[f"weight_q{round(100 * level):02}"]).double().mean()
        assert below == pytest.approx(level, abs=0.03)
    chosen = places(20_000, torch.device("cpu"))
    assert torch.bincount(chosen % 200, minlength=200).min() > 0  # no column of the matrix is left out


@pytest.mark.parametrize("rows", [1000, 1597, 6765, 10946])  # three are Fibonacci numbers
def test_a_sample_has_its_share_of_every_column(rows):
    columns = places(100 * rows, torch.device("cpu")) % 100
    assert float((columns < 30).double().mean()) == pytest.approx(0.3, abs=0.02)


def test_low_precision_is_summed_in_single_precision():
    bio = biofx.transform(nn.Linear(300, 100), NEUTRAL).to(torch.bfloat16)
    history = biofx.record(bio, sgd(bio))
    weight = only(bio).raw.detach().double()
    assert history.rows[0]["weight_std"] == pytest.approx(float(weight.std(correction=0)), rel=1e-5)


def test_steps_of_a_class_that_calls_its_base_count_once():
    class Nested(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # its step runs hooks from now on
    bio = linear(EVERYTHING)
    optimizer = Nested(bio.parameters(), lr=0.1)
    history = biofx.record(bio, optimizer, every=1)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 2)
    assert (steps_of(history), history.steps) == ([0, 1, 2], 2)
    assert history.rows[-1]["weight_std"] == pytest.approx(float(only(bio).effective().detach().std(correction=0)))


def test_a_step_that_fails_does_not_count():
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=1)
    biofx.attach(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match="without backward"):
        optimizer.step()
    train(bio, optimizer, 2)
    assert steps_of(history) == [0, 1, 2]


REPLACED = {
    "module": (lambda bio: bio.__setitem__(2, nn.Linear(3, 2)), "replaced"),
    "weight": (lambda bio: setattr(bio[2], "weight", nn.Parameter(torch.ones(2, 3))), "replaced"),
    "state": (lambda bio: bio.load_state_dict(copy.deepcopy(bio.state_dict()), assign=True), "replaced"),
    "removal": (lambda bio: bio.__setitem__(2, nn.Identity()), "removed"),
}


@pytest.mark.parametrize(("change", "what"), REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("exclude", [(), "2.*"])
def test_a_weight_that_is_another_now_is_refused(change, what, exclude):
    bio = biofx.transform(mlp(4, 3, 2), NEUTRAL, exclude=exclude)
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=2)
    bio(torch.randn(5, 4)).sum().backward()
    change(bio)
    optimizer.step()  # it is not recorded
    before = copy.deepcopy([group["params"] for group in optimizer.param_groups])
    with pytest.raises(biofx.LifecycleError, match=f"^record: .* was {what} since the recording began; stop"):
        optimizer.step()
    torch.testing.assert_close([group["params"] for group in optimizer.param_groups], before, rtol=0, atol=0)
    history.stop()
    optimizer.step()
    assert steps_of(history) == [0, 0]


def test_a_step_that_a_cuda_graph_captures_is_refused(monkeypatch):
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer)
    monkeypatch.setattr(history_module, "is_captured", lambda: True)
    with pytest.raises(biofx.LifecycleError, match=r"stop\(\) the recording before the capture"):
        train(bio, optimizer, 1)
    history.stop()
    train(bio, optimizer, 1)


def test_sharded_weights_are_refused(monkeypatch):
    bio = linear("fuzzy-learning-rates")
    monkeypatch.setattr(history_module, "is_sharded", lambda tensor: True)
    with pytest.raises(biofx.ArgumentError, match="record: weight is sharded"):
        biofx.record(bio, sgd(bio))


def test_a_step_waits_for_nothing():
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **kwargs or {})

    bio = linear(f"{EVERYTHING},volume-dependent-learning-rates")
    history = biofx.record(bio, sgd(bio))
    with Waits():
        history._note()


def test_the_latest_record_is_one_flat_dict():
    bio = biofx.transform(mlp(4, 6, 3), "fuzzy-learning-rates")
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=1)
    F.mse_loss(bio(torch.ones(1, 4)), torch.ones(1, 3)).backward()
    optimizer.step()
    latest = history.latest()
    assert latest["2.weight/weight_mean"] == history.rows[-1]["weight_mean"] != history.rows[1]["weight_mean"]
    assert {type(value) for value in latest.values()} == {float}
    assert "2.weight/turnover" not in latest


def test_a_history_is_a_table_and_data():
    bio = linear(EVERYTHING)
    optimizer = sgd(bio)
    history = biofx.record(bio, optimizer, every=2)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 5)
    text = flat(str(history))
    assert text.startswith("steps 0 → 4; 3 records, every 2 steps; 5 steps in all")
    assert f"0.00 → {history.rows[-1]['turnover']:.2f}" in text
    assert repr(history) == str(history)
    assert max(map(len, str(history).splitlines())) <= 100
    assert "<td>weight  </td>" in history._repr_html_()
    told = history.to_dict()
    assert (told["every"], told["steps"], told["weights"]) == (2, 5, ["weight"])
    json.dumps(told)


def test_wrong_arguments_of_record_are_refused():
    bio = linear("fuzzy-learning-rates")
    optimizer = sgd(bio)
    with pytest.raises(biofx.ArgumentError, match=r"swapped; write record\(bio, optimizer\)"):
        biofx.record(optimizer, bio)
    for option, value, why in (("every", 0, "≥ 1, got 0"), ("every", 1.5, "≥ 1, got 1.5"), ("limit", 1, "≥ 2, got 1")):
        with pytest.raises(biofx.ArgumentError, match=f"{option} must be an integer {why}"):
            biofx.record(bio, optimizer, **{option: value})
    with pytest.raises(biofx.ArgumentError, match="expected a model made by biofx.transform"):
        biofx.record(nn.Linear(2, 2), optimizer)
    with pytest.raises(biofx.ArgumentError, match="must be a torch.optim.Optimizer, got str"):
        biofx.record(bio, "sgd")
    with pytest.raises(biofx.ArgumentError, match="SGD holds no weight of this model"):
        biofx.record(bio, sgd(nn.Linear(2, 2)))
