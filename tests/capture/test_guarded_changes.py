"""Changes that a graph could miss: what a trace took as fixed, and what may be another thing in the next call."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import biofx

X = torch.randn(4, 3, dtype=torch.float64)
SCALE, ACTIVATION = 2.0, torch.relu


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3, dtype=torch.float64)


def pair(cls, frontend, *inputs):
    model = cls()
    return model, biofx.transform(model, "split-synapses", example_inputs=inputs or (X,), frontend=frontend)


class WithoutBias(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.register_buffer("mask", None)

    def forward(self, x):
        y = self.head(self.fc(x))
        return y if self.mask is None else y * self.mask


class Listing(Model):
    def __init__(self):
        super().__init__()
        self.more, self.settings = nn.ModuleList(), nn.Module()
        self.settings.scale = 2.0

    def forward(self, x):
        for layer in self.more:
            x = layer(x)
        return self.fc(x) * self.settings.scale


class Table(Model):
    def __init__(self):
        super().__init__()
        self.scale, self.factors = torch.ones(3, dtype=torch.float64), {"a": 1.0, "b": 2.0}

    def forward(self, x):
        return self.fc(x) * self.scale.exp() * next(iter(self.factors.values()))


class Drops(Model):
    factor = 2.0

    def forward(self, x):
        return nn.functional.dropout(self.fc(x), 0.9, self.training) * self.factor


class Comprehends(Model):
    def forward(self, x):
        return sum([ACTIVATION(self.fc(x)) * SCALE for _ in range(2)])


def set_bias(model):
    model.head.bias = nn.Parameter(torch.ones(3, dtype=torch.float64))


def set_mask(model):
    model.mask = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


def reorder(model):
    model.factors["a"] = model.factors.pop("a")


CHANGES = {
    "a bias that was None": (WithoutBias, set_bias),
    "a buffer that was None": (WithoutBias, set_mask),
    "an empty list of modules": (Listing, lambda model: model.more.append(nn.Tanh())),
    "a module that holds settings": (Listing, lambda model: setattr(model.settings, "scale", 5.0)),
    "a tensor in an attribute": (Table, lambda model: model.scale.fill_(4.0)),
    "the order of a dictionary": (Table, reorder),
    "the mode as an attribute": (Drops, lambda model: setattr(model, "training", False)),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_transform_acts(name, frontend):
    cls, change = CHANGES[name]
    model, bio = pair(cls, frontend)
    bio(X)
    for one in (model, bio):
        change(one)
    torch.testing.assert_close(bio(X), model(X))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_change_of_the_class_acts(frontend, monkeypatch):
    model, bio = pair(Drops, frontend)
    model.eval(), bio.eval()
    with monkeypatch.context() as patch:
        patch.setattr(Drops, "factor", 3.0)
        torch.testing.assert_close(bio(X), model(X))
    monkeypatch.setattr(Drops, "forward", lambda self, x: self.fc(x).tanh())
    torch.testing.assert_close(bio(X), model(X))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize(("name", "value"), [("SCALE", 3.0), ("ACTIVATION", torch.tanh)])
def test_a_variable_in_a_comprehension_acts(frontend, name, value, monkeypatch):
    model, bio = pair(Comprehends, frontend)
    monkeypatch.setitem(globals(), name, value)
    torch.testing.assert_close(bio(X), model(X))


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_change_before_compiling_acts(frontend):
    """PyTorch compiled the graph, whatever was set on the model before."""
    model, bio = pair(Listing, frontend)
    for one in (model, bio):
        one.settings.scale = 5.0
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(bio, backend="eager", fullgraph=True)(X), model(X))


class Returns(Model):
    def forward(self, x):
        return self.fc(x), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_tensor_that_forward_creates_is_new_in_each_call(frontend):
    """It was a constant of the graph, so what a caller added to it was there in the next call."""
    _, bio = pair(Returns, frontend)
    for _ in range(2):
        created = bio(X)[1]
        assert not created.any()
        created += 1


class Looks(Model):
    def __init__(self):
        super().__init__()
        self.table = {7: 3.0}

    def forward(self, x, n):
        return self.fc(x) * self.table.get(n, 1.0)


class Writes(Model):
    def forward(self, x, n):
        return self.fc(x) * {"7": 3.0}.get(f"{n}", 1.0) * (2.0 if str(x.shape[0]) == "4" else 1.0)


class Compares(Model):
    def forward(self, x, y):
        return self.fc(x) * (2.0 if x is y else 1.0)


class Chooses(Model):
    def forward(self, x, function):
        return function(self.fc(x))


ARGUMENTS = {
    "looked up": (Looks, (X, 5), (X, 7)),
    "written": (Writes, (X, 5), (X[:2], 7)),
    "the same object": (Compares, (X, X.clone()), (X, X)),
    "a function": (Chooses, (X, torch.relu), (X, torch.tanh)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_may_be_others_than_at_the_transform(name):
    cls, first, later = ARGUMENTS[name]
    model, bio = pair(cls, "symbolic", *first)
    torch.testing.assert_close(bio(*later), model(*later))


class Doubling(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is torch.relu else result


class Rectifies(Model):
    def forward(self, x):
        return torch.relu(self.fc(x))


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_a_class_of_tensors_may_replace_functions(frontend):
    model, bio = pair(Rectifies, frontend)
    x = X.as_subclass(Doubling)
    torch.testing.assert_close(bio(x), model(x))


def test_the_gradient_of_a_computed_weight_says_where_it_is():
    """It was None, whatever had been learned."""
    _, bio = pair(Rectifies, "symbolic")
    assert bio.fc.weight.grad is None
    bio(X).sum().backward()
    with pytest.raises(biofx.ArgumentError, match=r"weight_sites\(bio\)\[name\]\.raw\.grad"):
        _ = bio.fc.weight.grad


class Hooked(Model):
    def __init__(self):
        super().__init__()
        prune.l1_unstructured(self.fc, "weight", 0.5)
        self.head = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.fc(x))


def test_a_hook_that_takes_the_place_of_another_acts():
    """Hooks were counted, and their number is the same."""
    model, bio = pair(Hooked, "symbolic")
    for one in (model, bio):
        hooks = one.fc._forward_pre_hooks
        hooks[next(iter(hooks))] = lambda module, args: (args[0] * 2,)
    torch.testing.assert_close(bio(X), model(X))


def test_a_model_pickles_whose_example_input_was_a_function():
    model, bio = pair(Chooses, "symbolic", X, lambda x: x * 2)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(X, torch.relu), model(X, torch.relu))


FACTOR, FACTORS = 1.0, {"k": 1.0}


class OwnsWeight(nn.Linear):
    """A layer whose own code, not only that of the model, reads what lies outside of the model."""

    shift = 0.0

    def activation(self, x):
        return x.relu()

    def forward(self, x):
        return self.activation(super().forward(x)) * FACTOR * FACTORS["k"] + self.shift


CHANGES_AROUND_LAYERS = {
    "global": lambda patch: patch.setitem(globals(), "FACTOR", 2.0),
    "content": lambda patch: patch.setitem(FACTORS, "k", 2.0),
    "class_attribute": lambda patch: patch.setattr(OwnsWeight, "shift", 2.0),
    "method": lambda patch: patch.setattr(OwnsWeight, "activation", lambda self, x: x.tanh()),
    "forward": lambda patch: patch.setattr(OwnsWeight, "forward", lambda self, x: nn.Linear.forward(self, x)),
    "forward_of_torch": lambda patch: patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.t() * 3),
}


@pytest.mark.parametrize("change", CHANGES_AROUND_LAYERS.values(), ids=CHANGES_AROUND_LAYERS)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_what_a_layer_with_synapses_reads_is_followed(change, frontend, monkeypatch):
    model, x = nn.Sequential(OwnsWeight(4, 4), nn.Linear(4, 2)), torch.randn(5, 4)
    bio = biofx.transform(model, "split-synapses", example_inputs=x, frontend=frontend)
    needed = biofx.transform(model, "synaptic-scaling", example_inputs=x, frontend=frontend)
    torch.testing.assert_close(bio(x), model(x))
    change(monkeypatch)
    torch.testing.assert_close(bio(x), model(x))
    torch.testing.assert_close(copy.deepcopy(bio)(x), model(x))
    with pytest.raises(biofx.CaptureError, match="changed since the transform"):
        needed(x)


class Asks(Model):
    """Asks of its arguments what a trace answers for once: whether they are None, and of which class they are."""

    def forward(self, x, mask=None, *, parts, factor=1.0):
        x = x * 2 if mask is None else x
        x = x * 3 if isinstance(factor, int) else x
        x = x * 5 if parts["b"][1] is None else x
        return torch.clamp(self.fc(x), mask) * factor * parts["a"]


ONE = torch.ones(3, dtype=torch.float64)
PARTS = {"a": ONE, "b": [ONE, ONE]}
OTHER_KINDS = {
    "omitted": ((X,), {"parts": PARTS}, "mask is None"),
    "none": ((X, None), {"parts": PARTS}, "mask is None"),
    "class": ((X, ONE), {"parts": PARTS, "factor": 2}, "factor is <class 'int'>"),
    "none_inside": ((X, ONE), {"parts": {**PARTS, "b": [ONE, None]}}, "parts is"),
    "missing_inside": ((X, ONE), {"parts": {"a": ONE}}, "parts is"),
}


@pytest.mark.parametrize(("args", "kwargs", "words"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_needed_graph_refuses_an_argument_of_another_kind(args, kwargs, words):
    bio = biofx.transform(Asks(), "synaptic-scaling", example_inputs=lambda m: m(X, ONE, parts=PARTS))
    for one in (bio, copy.deepcopy(bio), torch.compile(bio, backend="eager")):
        with pytest.raises(biofx.ArgumentError, match=f"argument {words}.*example_inputs"):
            one(*args, **kwargs)


class AsksForMore(Model):
    """Takes any arguments, and asks the same of them."""

    def forward(self, x, *more, **named):
        x = x * 2 if named.get("mask") is None else x
        x = x * 3 if isinstance(more[0], float) else x
        return self.fc(x) * more[0]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"), [((X, ONE), {}, r"\*\*named"), ((X, 2.0), {"mask": X}, r"\*more")]
)
def test_a_needed_graph_refuses_others_of_any_arguments(args, kwargs, words):
    model = AsksForMore()
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=lambda m: m(X, ONE, mask=X))
    torch.testing.assert_close(bio(X, ONE * 2, mask=X, other=X), model(X, ONE * 2, mask=X, other=X))
    for one in (bio, torch.compile(bio, backend="eager")):
        with pytest.raises(biofx.ArgumentError, match=f"argument {words} is.*example_inputs"):
            one(*args, **kwargs)


def test_a_needed_graph_takes_other_values_and_more_of_them():
    model = Asks()
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=lambda m: m(X, ONE, parts=PARTS))
    more = {"a": ONE * 2, "b": [ONE, ONE, None], "c": None}
    torch.testing.assert_close(bio(X, -ONE, parts=more, factor=3.0), model(X, -ONE, parts=more, factor=3.0))


class Helped(Model):
    """Calls a method of its own, and, in a module inside, one of that module."""

    def __init__(self, inside=()):
        super().__init__()
        self.inside = nn.Sequential(*inside)

    def helper(self, x):
        return x.relu()

    def forward(self, x):
        return self.fc(self.inside(self.helper(x)))


@pytest.mark.parametrize("place", ["", "inside.0"])
def test_a_needed_graph_refuses_a_module_of_another_class(place):
    bio = biofx.transform(Helped([Helped()]), "synaptic-scaling", example_inputs=X)
    part = bio.get_submodule(place)
    part.__class__ = type("Derived", (type(part),), {"helper": lambda self, x: x.tanh()})
    for one in (bio, copy.deepcopy(bio)):
        with pytest.raises(biofx.CaptureError, match="Derived.helper.*changed since the transform"):
            one(X)


def test_an_edited_graph_asks_its_own_arguments():
    """An argument that an edit moved or took away was refused as one of another kind."""
    model = Asks()
    bio = biofx.transform(model, "split-synapses", example_inputs=lambda m: m(X, ONE, parts=PARTS))
    _, mask, *_ = bio.graph.find_nodes(op="placeholder")
    with bio.graph.inserting_before(mask):
        mask.replace_all_uses_with(bio.graph.call_function(torch.full, ((3,), -1.0), {"dtype": ONE.dtype}))
    bio.graph.erase_node(mask)
    bio.recompile()
    torch.testing.assert_close(bio(X, parts=PARTS), model(X, -ONE, parts=PARTS))
    with pytest.raises(biofx.ArgumentError, match="argument factor is"):
        bio(X, parts=PARTS, factor=2)


class Table(nn.Module):
    """Computes with a tensor while it is traced, or, as an island, not at all."""

    def __init__(self, table, is_island=False):
        super().__init__()
        self.table, self.is_island = table, is_island

    def forward(self, x):
        return x + float(x.sum()) * 0 if self.is_island else x * (self.table * 2).sum()


def test_a_needed_graph_watches_what_an_island_holds_as_well():
    """The tensor was found in the island, whose attributes are not watched, so writes were lost in silence."""
    model = nn.Sequential(Table(ONE.clone(), is_island=True), nn.Linear(3, 3).double())
    model.append(Table(model[0].table))
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=X)
    torch.testing.assert_close(bio(X), model(X))
    bio[2].table.mul_(3)
    with pytest.raises(biofx.CaptureError, match="a tensor in an attribute"):
        bio(X)


class Lists(nn.Module):
    """Reads a buffer and a parameter from lists."""

    def __init__(self, read):
        super().__init__()
        self.fc, self.gain = nn.Linear(3, 3).double(), nn.Parameter(ONE.clone())
        self.register_buffer("table", ONE.clone())
        self.tables, self.gains, self.read = [self.table], [self.gain], read

    def forward(self, x):
        return self.fc(x) * self.read(self.tables[0], self.gains[0])


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_needed_graph_follows_a_buffer_in_a_list(frontend):
    """It was a constant of torch.export, and a copy after the write was refused."""
    model = Lists(lambda table, gain: table)
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=X, frontend=frontend)
    for each in (model, bio):
        each.table.mul_(3)
    for each in (bio, copy.deepcopy(bio), copy.copy(bio)):
        torch.testing.assert_close(each(X), model(X))


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_checks_on_copies_of_buffers_are_no_changes(frontend):
    """A list went on to hold the buffer itself, so a transform with a pass that needs the graph was refused."""
    model = Lists(lambda table, gain: table)
    bio = biofx.transform(model, "group-units{size=3}", example_inputs=X, frontend=frontend)
    again = biofx.transform(copy.deepcopy(bio), "fuzzy-learning-rates", example_inputs=X)
    torch.testing.assert_close(again(X), bio(X))
    biofx.verify(bio)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_needed_graph_refuses_another_buffer_than_a_list_holds(frontend):
    """The graph read the new one by its name, and forward the one in the list."""
    model = Lists(lambda table, gain: table)
    bio = biofx.transform(model, "synaptic-scaling", example_inputs=X, frontend=frontend)
    before = bio.table
    bio.table = ONE * 2
    for _ in range(2):
        with pytest.raises(biofx.CaptureError, match=r"tables\[0\]"):
            bio(X)
    bio.table = before
    torch.testing.assert_close(bio(X), model(X))
    with pytest.raises(biofx.CaptureError, match=r"tables\[0\]"):
        torch.func.functional_call(bio, {"table": ONE * 2}, (X,))
    torch.testing.assert_close(bio(X), model(X))


@pytest.mark.parametrize(
    ("read", "changed", "frontend"),
    [
        (lambda table, gain: torch.tensor(table.tolist(), dtype=table.dtype), "table", "symbolic"),
        (lambda table, gain: torch.tensor(table.tolist(), dtype=table.dtype), "table", "export"),
        (lambda table, gain: gain.detach(), "gain", "export"),
    ],
)
def test_a_needed_graph_watches_what_became_a_constant(read, changed, frontend):
    """Parameters and buffers were not watched, though the graph held their values."""
    bio = biofx.transform(Lists(read), "synaptic-scaling", example_inputs=X, frontend=frontend)
    with torch.no_grad():
        getattr(bio, changed).mul_(3)
    with pytest.raises(biofx.CaptureError, match="was written into"):
        bio(X)
