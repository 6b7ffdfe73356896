"""Export: every format, loaded again by its own runtime."""

import builtins
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import biofx
from biofx import passes
from biofx.output.export import PROGRAMS, WEIGHTS
from models.small import ConvNet, Residual, mlp

PIPELINE = [passes.SplitSynapses(2), passes.FuzzyLearningRates()]
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bio():
    return biofx.transform(ConvNet(), PIPELINE)


def expected(bio, x=X):
    return bio.eval()(x).detach()


def test_pt2(bio, tmp_path):
    biofx.export(bio, tmp_path / "model.pt2", example_inputs=(X,))
    assert bio.training
    program = torch.export.load(tmp_path / "model.pt2")
    assert not [node for node in program.graph.nodes if "biofx" in str(node.target)]
    torch.testing.assert_close(program.module()(X), expected(bio))


def run(path, *inputs):
    """The first output of an exported program, run by its own runtime."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*inputs)
    session = onnxruntime.InferenceSession(path)
    feed = {port.name: x.numpy() for port, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize(("suffix", "example"), [(".pt2", 1), (".pt2", 4), (".onnx", 1)])
def test_another_batch_size(bio, tmp_path, suffix, example):
    path = tmp_path / f"model{suffix}"
    biofx.export(bio, str(path), example_inputs=X[:example])
    for x in (X[:1], X, torch.randn(7, 1, 8, 8)):
        torch.testing.assert_close(run(path, x), expected(bio, x), rtol=1e-4, atol=1e-4)
    if suffix == ".onnx":
        onnx.checker.check_model(path)
        assert {node.domain for node in onnx.load(path).graph.node} == {""}


class Sequences(nn.Module):
    """Attention over sequences of tokens of any length."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        return self.head((x @ x.mT).masked_fill(~mask[:, None], -100.0).softmax(-1) @ x)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_other_sequences_after_a_batch_of_one(tmp_path, suffix):
    def inputs(batch, length):
        return torch.randint(5, (batch, length)), torch.rand(batch, length) < 0.9

    bio, path = biofx.transform(Sequences(), PIPELINE, example_inputs=inputs(1, 6)), tmp_path / f"model{suffix}"
    biofx.export(bio, path, example_inputs=inputs(1, 6))
    for sizes in ((1, 6), (3, 6), (2, 9)):
        given = inputs(*sizes)
        torch.testing.assert_close(run(path, *given), bio(*given).detach(), rtol=1e-4, atol=1e-5)


class OneIsSpecial(nn.Module):
    """Takes a decision by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if len(x) > 1 else -self.fc(x)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_decision_by_the_batch_stays_that_of_the_example(tmp_path, suffix):
    x, path = torch.randn(1, 3), tmp_path / f"model{suffix}"
    bio = biofx.transform(OneIsSpecial(), PIPELINE, example_inputs=x)
    biofx.export(bio, path, example_inputs=x)
    torch.testing.assert_close(run(path, x), bio(x).detach())


ALONE = """
import importlib.abc, sys

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuses())
{run}
"""
ALONE_RUN = {
    ".pt2": "import torch; print(torch.export.load({path!r}).module()(torch.ones(3, 1, 8, 8)).flatten().tolist())",
    ".onnx": "import numpy, onnxruntime; session = onnxruntime.InferenceSession({path!r}); "
    "print(session.run(None, {{'x': numpy.ones((3, 1, 8, 8), 'float32')}})[0].flatten().tolist())",
}


@pytest.mark.parametrize(("suffix", "refused"), [(".pt2", ["biofx"]), (".onnx", ["biofx", "torch"])])
def test_a_program_runs_where_biofx_is_not_installed(bio, tmp_path, suffix, refused):
    path = tmp_path / f"model{suffix}"
    biofx.export(bio, path, example_inputs=X)
    code = ALONE.format(refused=refused, run=ALONE_RUN[suffix].format(path=str(path)))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    output = torch.tensor(eval(printed))
    torch.testing.assert_close(output, expected(bio, torch.ones(3, 1, 8, 8)).flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_torch_export_of_a_training_model_keeps_its_rules(frontend):
    model = mlp(3, 4, 2)
    bio = biofx.transform(model, PIPELINE, example_inputs=torch.randn(4, 3), frontend=frontend)
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(bio, (torch.randn(4, 3),), dynamic_shapes=(batch,))
    assert {"biofx.scale_grad.default", "biofx.share_grad.default"} <= {str(n.target) for n in program.graph.nodes}
    x = torch.randn(7, 3)
    torch.testing.assert_close(program.module()(x), bio(x))


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.fc(a - b)


@pytest.mark.xfail(strict=True, reason="torch.export hands keyword arguments of a GraphModule on by position")
def test_torch_export_of_keyword_arguments_in_any_order():
    bio, inputs = biofx.transform(Difference(), PIPELINE), {"b": torch.zeros(4, 3), "a": torch.ones(4, 3)}
    torch.testing.assert_close(torch.export.export(bio, (), inputs).module()(**inputs), bio(**inputs))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, a, more, *, unused=None, scale=1.0):
        return self.fc(a) - scale * self.fc(more["b"]), a > 0, a.argmax(-1), (a * 0).log()


@pytest.mark.parametrize(
    ("suffix", "order"),
    [("pt2", ("a", "more", "unused")), ("pt2", ("unused", "more", "a")), ("onnx", ("unused", "more", "a"))],
)
def test_inputs_are_known_by_name(tmp_path, suffix, order):
    a, b, unused = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 1)
    inputs = {"a": a, "more": {"b": b}, "unused": unused}
    inputs = {name: inputs[name] for name in order}
    bio = biofx.transform(TwoInputs(), PIPELINE, example_inputs=inputs)
    path = tmp_path / f"model.{suffix}"
    biofx.export(bio, path, example_inputs=inputs)
    if suffix == "pt2":
        outputs = torch.export.load(path).module()(**inputs)
    else:
        ports = {"a": a, "more_b": b, "unused": unused}
        outputs = onnxruntime.InferenceSession(path).run(None, {name: x.numpy() for name, x in ports.items()})
        outputs = [torch.from_numpy(y) for y in outputs]
    for given, wanted in zip(outputs, bio(**inputs), strict=True):
        torch.testing.assert_close(given, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_hooks_of_the_model_are_exported(tmp_path, suffix):
    model = mlp(3, 2)
    model.register_forward_hook(lambda module, args, output: output + 100)
    bio = biofx.transform(model, PIPELINE)
    x = torch.zeros(4, 3)
    assert bio(x).min() > 50
    path = tmp_path / f"model.{suffix}"
    biofx.export(bio, path, example_inputs=x)
    if suffix == "pt2":
        output = torch.export.load(path).module()(x)
    else:
        session = onnxruntime.InferenceSession(path)
        output = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(output, bio(x).detach())


def test_safetensors(bio, tmp_path):
    biofx.export(bio, tmp_path / "model.safetensors")
    model = ConvNet().eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    torch.testing.assert_close(model(X), expected(bio))


def test_safetensors_of_tied_weights(tmp_path):
    model = mlp(2, 2, 2)
    model[2].weight = model[0].weight
    biofx.export(biofx.transform(model, PIPELINE), tmp_path / "tied.safetensors")
    assert list(load_file(tmp_path / "tied.safetensors")) == sorted(model.state_dict())


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_dicts_in_and_out(tmp_path, suffix):
    bio = biofx.transform(Residual(), PIPELINE)
    x = torch.randn(3, 4)
    path = tmp_path / f"model.{suffix}"
    biofx.export(bio, path, example_inputs={"x": x})
    if suffix == "pt2":
        outputs = list(torch.export.load(path).module()(x=x).values())
    else:
        session = onnxruntime.InferenceSession(path)
        outputs = [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]
    for given, wanted in zip(outputs, bio(x).values(), strict=True):
        torch.testing.assert_close(given, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("model.h5", None, r"unknown suffix '.h5' of model.h5; known are .pt2, .onnx, .safetensors"),
        ("missing/model.pt2", X, "there is no folder .*missing; create it first"),
        ("model.pt2", None, r".pt2 needs example_inputs, such as example_inputs=\(x,\)"),
        ("model.onnx", None, ".onnx needs example_inputs"),
        ("folder.pt2", X, "folder.pt2 is a folder; give the path of a file"),
        ("folder.safetensors", None, "folder.safetensors is a folder; give the path of a file"),
        ("model.pt2", (X, X), r"example_inputs do not fit ConvNet.forward.*: too many positional arguments"),
        ("model.onnx", (X, X), r"example_inputs do not fit ConvNet.forward.*: too many positional arguments"),
        ("model.pt2", torch.randn(2, 3), "example_inputs do not fit ConvNet.forward: "),
        ("model.onnx", {"y": X}, r"example_inputs do not fit ConvNet.forward.*: missing a required argument: 'x'"),
    ],
)
def test_bad_arguments(bio, tmp_path, name, inputs, message):
    folders = [tmp_path / "folder.pt2", tmp_path / "folder.safetensors"]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(biofx.ArgumentError, match=message):
        biofx.export(bio, tmp_path / name, example_inputs=inputs)
    assert sorted(tmp_path.iterdir()) == folders


def test_a_file_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch):
    bio, path = biofx.transform(mlp(3, 2), PIPELINE), tmp_path / "model.onnx"
    path.write_text("before")
    export = torch.onnx.export

    def wrong(program, *args, **kwargs):
        program.state_dict["0.bias"] = nn.Parameter(program.state_dict["0.bias"] + 1)
        return export(program, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(
        biofx.ExportError, match=r"model.onnx computes something else than Sequential: output 0 differs by 1 \(at most"
    ):
        biofx.export(bio, path, example_inputs=torch.randn(4, 3))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_safetensors_holds_weights_only(tmp_path):
    bio = biofx.transform(mlp(4, 8, 2), "hofmann2025")
    with pytest.raises(biofx.ExportError, match="group-units changed what the operator of 0.weight returns.*use .pt2"):
        biofx.export(bio, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_safetensors_holds_tensors_only(tmp_path):
    bio = biofx.transform(nn.Sequential(WithExtraState(2, 2)), PIPELINE)
    with pytest.raises(biofx.ExportError, match=r"tensors only, and 0._extra_state is an instance of dict; use torch"):
        biofx.export(bio, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*PROGRAMS, *WEIGHTS])
def test_a_weight_without_elements(tmp_path, suffix):
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    bio = biofx.transform(model, [passes.SplitSynapses()], example_inputs=torch.randn(2, 0))
    biofx.export(bio, tmp_path / f"model{suffix}", example_inputs=torch.randn(2, 0))
    assert (tmp_path / f"model{suffix}").stat().st_size > 0


class ByValues(nn.Module):
    """Takes a decision that no exporter can follow."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_an_exporter_that_refuses(tmp_path, suffix):
    bio, x = biofx.transform(ByValues(), PIPELINE), torch.randn(2, 3)
    with pytest.raises(biofx.ExportError, match="cannot export ByValues; .safetensors holds weights alone: "):
        biofx.export(bio, tmp_path / f"model{suffix}", example_inputs=x)
    assert not list(tmp_path.iterdir())


def test_weights_that_the_original_cannot_load_are_refused(tmp_path):
    bio = biofx.transform(mlp(4, 6, 2), "mirror-units", example_inputs=torch.randn(3, 4))
    with pytest.raises(biofx.ExportError, match="mirror-units changed the number of units of 0.weight.*use .pt2 or"):
        biofx.export(bio, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_what_to_install(bio, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(biofx.ExportError, match=r"safetensors is not installed; pip install 'biofx\[export\]'"):
        biofx.export(bio, tmp_path / "model.safetensors")


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(biofx.ArgumentError, match="expected a model made by biofx.transform"):
        biofx.export(nn.Linear(2, 2), tmp_path / "model.safetensors")


def test_weights_of_an_edited_graph_are_refused(tmp_path):
    bio = biofx.transform(mlp(4, 6, 2), "split-synapses")
    (output,) = bio.graph.find_nodes(op="output")
    with bio.graph.inserting_before(output):
        output.args = (bio.graph.call_function(torch.neg, output.args),)
    bio.recompile()
    with pytest.raises(biofx.ExportError, match="the graph was edited, which no weight can express; use .pt2 or"):
        biofx.export(bio, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
