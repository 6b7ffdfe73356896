"""Recording: the run leaves everything as it was, and sees through scripted modules and branches."""

import concurrent.futures
import copy
import dataclasses
import random

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import biofx
from biofx.base.generators import global_states
from biofx.recording.recorder import Recorder, recording_of


def recorded(model, run):
    recorder = Recorder()
    with recording_of(recorder, model):
        run(model)
    return recorder.recording


class CopiesAModule(nn.Module):
    """Makes a teacher of the student at its first call."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 3), None

    def forward(self, x):
        if self.teacher is None:
            self.teacher = copy.deepcopy(self.student)
        return self.student(x), self.teacher(x).detach()


def test_a_forward_may_copy_a_module():
    model, x = CopiesAModule(), torch.randn(2, 3)
    recording = recorded(model, lambda model: model(x))
    assert [operation.name for operation in recording.operations].count("addmm") == 2
    bio = biofx.transform(model, "split-synapses", example_inputs=(x,))
    torch.testing.assert_close(bio(x), model(x))


class Everything(nn.Module):
    """Changes whatever a forward can reach."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(x)
        self.fc.weight.data.mul_(2)
        self.fc.bias.add_(1)
        self.norm.train()
        with torch.enable_grad():
            self.fc(x).sum().backward()
        return self.norm(self.fc(x)) * random.random() * numpy.random.random() + torch.rand(3)


def test_a_recorded_run_leaves_everything_as_it_was():
    model, x = Everything(), torch.randn(4, 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, generator, gradients = global_states(), torch.get_rng_state(), torch.is_grad_enabled()
    operations = recorded(model, lambda m: m(x)).operations
    assert {"mul", "native_batch_norm", "rand"} <= {operation.name for operation in operations}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.calls, model.log, model.norm.training) == (0, [], True)
    assert (global_states(), torch.is_grad_enabled()) == (drawn, gradients)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model._forward_pre_hooks


def test_a_scripted_model_is_recorded_by_its_operators():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    x = torch.randn(2, 3)
    names = [operation.name for operation in recorded(model, lambda m: m(x)).operations]
    assert [name for name in names if name in ("addmm", "relu", "native_batch_norm")] == [
        "addmm",
        "relu",
        "native_batch_norm",
        "addmm",
    ]
    found = biofx.units(nn.Sequential(model, nn.Linear(2, 2)), x)
    assert list(found.readings) == ["0.0.weight", "0.3.weight", "1.weight"]


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.a(x).relu()
        return self.c(torch.cond(y.sum() > -1, lambda y: self.b(y).relu(), torch.cos, (y,)))


def test_a_branch_taken_is_recorded_and_named_as_a_decision():
    found = biofx.units(Chooses(), torch.randn(2, 4))
    assert [site.operator for site in found.sites.values()] == ["linear"] * 3
    assert [set(found.owner[r.numbers.flatten()].tolist()) for r in found.readings.values()] == [{1}, {2}, {3}]
    assert "cond (test_recorder" in found.notes[0]


class Between(nn.Module):
    """Two layers, and what happens to the units of the first on their way to the second."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


class Doubled(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(context, x):
        """Twice."""
        return 2 * x

    @staticmethod
    def backward(context, gradient):
        """Twice."""
        return 2 * gradient


@dataclasses.dataclass
class Cache:
    """What transformers hand from layer to layer."""

    states: dict[str, list[Tensor]]


def packed(y: Tensor) -> Tensor:
    padded = torch.stack([y, y], 1)
    sequence = nn.utils.rnn.pack_padded_sequence(padded, torch.tensor([2] * len(y)), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(sequence, batch_first=True)[0]


def in_place(y: Tensor) -> Tensor:
    y = y * 1
    y[:, 2:].mul_(2)
    y.relu_()[:, 0] += 1
    return y


def without_gradients(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y.detach().relu()


def in_bfloat16(y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (y.to(torch.bfloat16) * 2).to(y.dtype)


def filled(y: Tensor) -> Tensor:
    result = torch.empty_like(y)
    result.copy_(y)
    return result


def over_time(y: Tensor) -> Tensor:
    state = torch.zeros_like(y)
    for _ in range(3):
        state = 0.5 * state + y
    return state


BETWEEN = {
    "nothing": lambda m, y: y,
    "views": lambda m, y: y.view(-1, 2, 3).transpose(1, 2).transpose(1, 2).reshape(-1, 6),
    "operators in place": lambda m, y: in_place(y),
    "autocast": lambda m, y: in_bfloat16(y),
    "checkpoint": lambda m, y: checkpoint(torch.relu, y, use_reentrant=False),
    "reentrant checkpoint": lambda m, y: checkpoint(torch.relu, y, use_reentrant=True),
    "no_grad": lambda m, y: without_gradients(y),
    "an autograd function": lambda m, y: Doubled.apply(y),
    "complex numbers": lambda m, y: torch.complex(y, y).abs(),
    "a mask": lambda m, y: y.masked_fill(y > 0, 0.0),
    "where": lambda m, y: torch.where(torch.ones(y.shape, dtype=torch.bool), y, 0.0),
    "integers that choose samples": lambda m, y: y[torch.arange(len(y)).flip(0)],
    "nested containers": lambda m, y: {"a": [(y, None)]}["a"][0][0],
    "a dataclass": lambda m, y: Cache({"k": [y]}).states["k"][0],
    "packed sequences": lambda m, y: packed(y),
    "a loop over time": lambda m, y: over_time(y),
    "memory that is filled": lambda m, y: filled(y),
    "vmap": lambda m, y: torch.vmap(torch.sin)(y),
    "forward-mode gradients": lambda m, y: torch.func.jvp(torch.sin, (y,), (torch.ones_like(y),))[0],
    "a scripted function": lambda m, y: scripted(y),
    "a compiled function": lambda m, y: compiled(y),
    "functional_call": lambda m, y: torch.func.functional_call(nn.Identity(), {}, (y,)),
    "what was printed": lambda m, y: (print(y.shape), y)[1],
}


@torch.jit.script
def scripted(y: Tensor) -> Tensor:
    return torch.relu(y) * 2


@torch.compile
def compiled(y: Tensor) -> Tensor:
    return torch.relu(y) * 2


@pytest.mark.parametrize("name", BETWEEN)
def test_units_are_followed_through(name):
    found = biofx.units(Between(BETWEEN[name]), torch.randn(3, 4))
    reading = found.readings["b.weight"]
    assert reading.remark == ""
    assert [found.populations[i].name for i in found.owner[reading.sources].unique().tolist()] == ["a.weight"]
    assert len(reading.classes.unique()) == 6


def test_what_another_thread_computes_is_not_judged():
    def elsewhere(_, y):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: y.detach() * 2).result()

    verdict = biofx.units(Between(elsewhere), torch.randn(3, 4)).verdicts()["b.weight"]
    assert (verdict.kind, "another thread" in verdict.reason) == ("not judged", True)


ELSEWHERE = {
    "numpy": lambda y: torch.from_numpy(numpy.tanh(y.detach().numpy())),
    "an array": lambda y: torch.tensor(numpy.asarray(y.detach())),
    "dlpack": lambda y: torch.from_dlpack(numpy.from_dlpack(y.detach()) * 2),
    "lists": lambda y: torch.tensor(y.tolist()),
    "a constructor": lambda y: torch.Tensor(y.tolist()),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_numpy_or_python_computes_is_not_judged(name):
    model = Between(lambda _, y: ELSEWHERE[name](y))
    verdict = biofx.units(model, torch.randn(3, 4)).verdicts()["b.weight"]
    assert (verdict.kind, "numpy" in verdict.reason) == ("not judged", True)


def test_loops_that_inputs_decide_on_are_recorded_as_taken():
    def until_large(_, y):
        while y.abs().max() < 100:
            y = y * 2
        return y

    found = biofx.units(Between(until_large), torch.ones(3, 4))
    assert "forward reads numbers that depend on its inputs" in found.notes[0]
    assert "what it does with other inputs was not seen" in found.notes[0]


def test_a_forward_that_draws_random_numbers_is_recorded():
    model = Between(lambda _, y: y + torch.rand_like(y) * random.random())
    found = biofx.units(model, torch.randn(3, 4))
    assert found.readings["b.weight"].remark == ""


def test_a_model_on_the_meta_device_is_understood():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**15, 2**15), nn.ReLU(), nn.Linear(2**15, 2**15))
        x = torch.empty(2, 2**15)
    found = biofx.units(model, x)
    assert [found.populations[i].name for i in found.owner[found.readings["2.weight"].numbers].unique()] == ["0.weight"]
    assert found.verdicts()["2.weight"].kind == "not judged"


def test_a_run_that_fails_says_where():
    with pytest.raises(biofx.ArgumentError, match="Between fails on example_inputs, at view"):
        biofx.units(Between(lambda _, y: y.view(7, 7)), torch.randn(3, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this device is there")
def test_a_forward_that_asks_for_a_device_that_is_not_there():
    with pytest.raises(biofx.ArgumentError, match="Between fails on example_inputs, at cuda"):
        biofx.units(Between(lambda _, y: y.cuda()), torch.randn(3, 4))


class DropsLayers(nn.Module):
    """Draws the layers that it runs, in evaluation mode as well."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            if torch.rand(()) + random.random() + numpy.random.rand() < 1.5:
                x = layer(x).relu()
        return self.head(x)


def test_what_a_run_draws_does_not_depend_on_global_seeds(tmp_path):
    model, found = DropsLayers(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        bio = biofx.transform(model, "split-synapses", example_inputs=torch.randn(2, 4))
        found.add(tuple(biofx.weight_sites(bio)))
        biofx.save(bio, tmp_path)
        torch.manual_seed(seed + 1)
        biofx.load(tmp_path, model)
    assert len(found) == 1
