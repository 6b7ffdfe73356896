"""What forward changes beside its result: stored by the graph, or else left to the Python of an island."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm

import biofx
from biofx import passes
from conftest import flat
from models.small import Residual

NEUTRAL = [passes.FuzzyLearningRates(distribution="baseline")]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)


class Auxiliary(Layer):
    """Keeps a loss beside its result, for the training loop."""

    def forward(self, x):
        y = self.fc(x)
        self.auxiliary = y.square().mean()
        return y.relu()


class KeepsMany(Layer):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.kept = None

    def forward(self, x):
        y = self.fc(x)
        self.kept = {"y": y, "pair": (y, 1), "none": None}
        self.last = y.detach().mean(0)
        return y


class Reads(nn.Module):
    """Reads what its layer keeps."""

    def __init__(self):
        super().__init__()
        self.inner = Auxiliary()

    def forward(self, x):
        return self.inner(x), self.inner.auxiliary


class KeepsOfAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, x):
        self.inner.input = x
        return self.inner.fc(x)


RECORDS = [Auxiliary, KeepsMany, Reads, KeepsOfAnother, lambda: nn.Sequential(Auxiliary(), nn.ReLU(), Auxiliary())]


def kept(model):
    """Everything that is kept in a model, by where."""
    return {
        f"{path}.{name}": vars(module).get(name, module._buffers.get(name))
        for path, module in model.named_modules()
        for name in ("auxiliary", "kept", "last", "input")
        if hasattr(module, name)
    }


def close(a, b):
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", RECORDS)
def test_what_is_kept_for_others_is_kept_by_the_graph(build):
    model, x = build(), torch.randn(2, 3)
    bio = biofx.transform(model, "split-synapses")
    assert not bio.biofx.islands
    assert vars(model).keys() == vars(build()).keys()  # transform stores nothing in the model
    for batch in (x, x + 1):
        close(bio(batch), model(batch))
        close(kept(bio), kept(model))


@pytest.mark.parametrize("build", RECORDS)
@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda bio: torch.load(io.BytesIO(saved(bio)), weights_only=False),
        lambda bio: biofx.transform(bio, "l1-regularization"),
        lambda bio: torch.compile(bio, backend="eager", fullgraph=True),
        biofx.fold,
    ],
    ids=["copied", "loaded", "transformed", "compiled", "folded"],
)
def test_copies_keep_it_in_themselves(build, again):
    model, x = build(), torch.randn(2, 3)
    bio = biofx.transform(model, NEUTRAL)
    other = again(bio)
    close(other(x), model(x))
    close(kept(getattr(other, "_orig_mod", other)), kept(model))


def saved(bio):
    file = io.BytesIO()
    torch.save(bio, file)
    return file.getvalue()


def test_a_loss_that_is_kept_has_its_gradients():
    model, x = Auxiliary().double(), torch.randn(2, 3, dtype=torch.float64)
    bio = biofx.transform(model, NEUTRAL)
    for net in (model, bio):
        net(x)
        net.auxiliary.backward()
    close(bio.fc.weight.grad, model.fc.weight.grad)


def test_units_are_followed_past_what_is_kept():
    bio = biofx.transform(nn.Sequential(Auxiliary(), nn.Linear(3, 2)), [passes.DalesPrinciple()])
    assert biofx.weight_sites(bio)["1.weight"].sign is not None


def test_what_is_kept_in_one_mode_only_needs_python():
    class InTraining(Layer):
        def forward(self, x):
            if self.training:
                self.seen = x
            return self.fc(x)

    bio, x = biofx.transform(InTraining(), NEUTRAL), torch.randn(2, 3)
    bio.eval()(x)
    assert not hasattr(bio, "seen")
    bio.train()(x)
    assert bio.seen is x


class Decides(Layer):
    """An island that keeps a loss for the module around it."""

    limit: float | None = None

    def __init__(self):
        super().__init__()
        self.auxiliary, self.log = 0.0, None

    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 1e9:
            return x
        self.keep(y)
        return y

    def keep(self, y):
        self.auxiliary = y.square().mean()
        self.limit = y.max()
        setattr(self, "log", y.detach())  # noqa: B010 - people do

    def loss(self):
        return self.auxiliary * 2


class Around(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.first, self.second, self.head, self.read = Decides(), Decides(), nn.Linear(3, 2), read

    def forward(self, x):
        y = self.head(self.second(self.first(x)))
        return y, self.read(self)


READS = {
    "a loss": lambda m: m.first.auxiliary,
    "of all": lambda m: sum(child.auxiliary for child in m.modules() if isinstance(child, Decides)),
    "by a method": lambda m: m.second.loss(),
    "what setattr sets": lambda m: m.first.log,
    "what the class has": lambda m: m.second.limit,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_an_island_keeps_is_read_when_the_graph_runs(read):
    model, x = Around(read).double(), torch.randn(2, 3, dtype=torch.float64)
    bio = biofx.transform(model, [passes.SplitSynapses(2, compensate=False)])
    assert bio.biofx.islands
    for other in (bio, copy.deepcopy(bio), biofx.fold(bio)):
        for batch in (x, x + 1):
            close(other(batch), model(batch))
    sum(part.square().sum() for part in model(x)).backward()
    sum(part.square().sum() for part in bio(x)).backward()
    close(bio.get_parameter("first.fc.weight").grad, torch.stack([model.first.fc.weight.grad] * 2))
    assert "limit" not in vars(Around)
    assert not isinstance(vars(Decides).get("auxiliary"), property)
    assert vars(Decides)["limit"] is None


def test_it_survives_pickling():
    model, x = Keeps().double(), torch.randn(2, 3, dtype=torch.float64)
    bio = biofx.transform(model, "split-synapses")
    close(torch.load(io.BytesIO(saved(bio)), weights_only=False)(x), model(x))


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Decides()

    def forward(self, x):
        return self.inner(x) * self.inner.auxiliary


def test_what_is_read_before_the_call_needs_python():
    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Decides()

        def forward(self, x):
            last = self.inner.auxiliary
            return self.inner(x) + last

    model, x = Before(), torch.randn(2, 3)
    bio = biofx.transform(model, "split-synapses")
    for batch in (x, x + 1):
        close(bio(batch), model(batch))


class Hidden(Layer):
    def __init__(self):
        super().__init__()
        self.hidden = None

    def forward(self, x):
        y = self.fc(x) if self.hidden is None else self.fc(x) + self.hidden
        self.hidden = y.detach()
        return y


class HiddenInBuffer(Layer):
    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.zeros(3))

    def forward(self, x):
        y = self.fc(x) + self.hidden
        self.hidden = y.detach().mean(0)
        return y


class Counts(Layer):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.fc(x) * self.calls


class Collects(Layer):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.fc(x))
        return sum(self.seen)


class Caches(Layer):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        return self.fc(x) + self.cache.setdefault("first", self.fc(x).detach())


class Settings:
    scale = 1.0


class CountsElsewhere(Layer):
    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        self.settings.scale *= 2
        return self.fc(x) * self.settings.scale


class CountsInAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act = Layer(), nn.ReLU()

    def forward(self, x):
        self.act.gain = getattr(self.act, "gain", 1.0) * 2
        return self.act(self.inner.fc(x)) * self.act.gain


class Flags(Layer):
    def forward(self, x):
        self.is_built = True
        return self.fc(x)


STATES = [Flags, Hidden, HiddenInBuffer, Counts, Collects, Caches, CountsElsewhere, CountsInAnother]


@pytest.mark.parametrize("build", STATES)
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_what_the_next_call_reads_needs_python(build, frontend):
    model, x = build(), torch.randn(2, 3)
    bio = biofx.transform(model, "split-synapses", frontend=frontend)
    for batch in (x, x + 1, x):
        close(bio(batch), model(batch))


@pytest.mark.parametrize("build", [state for state in STATES if state is not HiddenInBuffer])  # buffers are state
def test_an_exported_graph_never_forgets_it(build):
    x = torch.randn(2, 3)
    with pytest.raises(biofx.CaptureError, match=r'changes the attribute \w+, .* try frontend="module"'):
        biofx.transform(build(), NEUTRAL, frontend="export", example_inputs=(x,))


@pytest.mark.parametrize("build", STATES)
def test_example_inputs_leave_the_state_of_the_model(build):
    model, fresh, x = build(), build(), torch.randn(2, 3)
    fresh.load_state_dict(model.state_dict())
    biofx.transform(model, NEUTRAL, example_inputs=(x,))
    close(model(x), fresh(x))


def test_the_summary_says_which_attribute():
    bio = biofx.transform(nn.Sequential(Residual(), Counts()), NEUTRAL)
    assert "its forward changes the attribute calls" in flat(biofx.summary(bio))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("frontend", ["symbolic", "export", "module"])
@pytest.mark.parametrize("compute", [lambda layer: prune.l1_unstructured(layer, "weight", 0.3), weight_norm])
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_a_hook_computes_can_be_penalized(compute, frontend, training):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.Linear(3, 2)).train(training), torch.randn(2, 3)
    compute(model[0])
    bio = biofx.transform(model, NEUTRAL, frontend=frontend, example_inputs=(x,))
    for each in (model, bio):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(2):
            (each(x).square().sum() + each[0].weight.abs().sum()).backward()
            optimizer.step()
    close(bio(x), model(x))
    close(bio[0].weight, model[0].weight)


def test_a_root_keeps_the_weight_that_its_hook_computes():
    model, x = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.3), torch.randn(2, 3)
    bio = biofx.transform(model, NEUTRAL, example_inputs=(x,))
    biofx.weight_sites(bio)["weight_orig"].raw.data.mul_(2)
    bio(x)
    close(bio.weight, 2 * model.weight)
