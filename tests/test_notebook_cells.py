"""A notebook cell that defines a pass, a hook or an observer may be run again, edited or not."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import biofx
from biofx.base import noise
from biofx.base.rule_code import digest
from biofx.model import definitions, operators

CELL = """
import torch
from dataclasses import dataclass
from biofx.model import operators
from biofx import passes


@operators.gradient_hook("{hook}_grad(Tensor(a) weight, float rate) -> Tensor(a)")
def grad(gradient, rate):
    return gradient * rate * {factor}


@passes.register
@dataclass(frozen=True)
class Rule(passes.Pass):
    name = "{hook}"
    slot = passes.Slot.HOOK
    moment = passes.Moment.TURNOVER
    rate: float = 1.0

    def rewrite(self, site, edit):
        edit.insert(torch.ops.biofx.{hook}_grad, self.rate)

    def at_step(self, weights):
        for weight in weights:
            weight.raw.fill_({factor})
"""


def run_cell(hook, factor, cell=CELL):
    cells = vars(sys.modules["__main__"])
    exec(cell.format(hook=hook, factor=factor), cells)
    return biofx.transform(nn.Linear(1, 1, bias=False), [cells["Rule"]()])


def gradient(bio, run=None):
    bio.zero_grad()
    (bio if run is None else run)(torch.ones(1)).sum().backward()
    return next(bio.parameters()).grad.item()


def saved(bio):
    file = io.BytesIO()
    torch.save(bio, file)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_each_model_runs_the_rule_that_it_was_made_with():
    models = {factor: run_cell("edited", factor) for factor in (2.0, 3.0, 3.0, 5.0)}
    for factor, bio in models.items():
        assert gradient(bio) == factor
        bio.recompile()
        assert gradient(bio) == factor
        assert gradient(copy.deepcopy(bio)) == factor
        optimizer = torch.optim.SGD(bio.parameters(), lr=1.0)
        with biofx.attach(bio, optimizer):
            weight = next(bio.parameters())
            nn.init.zeros_(weight)
            gradient(bio)
            optimizer.step()
        assert weight.item() == factor


def test_the_pass_of_a_name_is_the_one_that_was_run_last():
    for factor in (2.0, 3.0):
        run_cell("last", factor)
        assert gradient(biofx.transform(nn.Linear(1, 1, bias=False), "last{rate=10.0}")) == 10 * factor


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_run_the_rule_that_they_were_made_with(backend):
    first = run_cell("compiled", 2.0)
    old = torch.compile(first, fullgraph=True, backend=backend)
    assert gradient(first, old) == 2.0
    second = run_cell("compiled", 3.0)
    assert gradient(second, torch.compile(second, fullgraph=True, backend=backend)) == 3.0
    assert gradient(first, old) == 2.0


def test_a_loaded_model_runs_what_its_names_mean_then():
    files = [saved(run_cell("pickled", factor)) for factor in (2.0, 3.0)]
    run_cell("pickled", 5.0)
    assert [gradient(loaded(file)) for file in files] == [5.0, 5.0]


def test_the_schema_may_change():
    first = run_cell("wider", 2.0)
    other = CELL.replace("float rate)", "float rate, Tensor age)").replace("gradient, rate", "gradient, rate, age")
    other = other.replace("rate *", "rate * age *").replace(
        "self.rate)", 'self.rate, edit.state("age", torch.ones(1)))'
    )
    second = run_cell("wider", 3.0, other)
    assert (gradient(first), gradient(second)) == (2.0, 3.0)
    assert gradient(loaded(saved(second))) == 3.0


def test_an_observer_may_be_defined_again():
    def define(factor):
        @operators.observer("scaled_sum_for_test")
        def look(activity, positions):
            return factor * activity.sum(positions)

        return torch.ops.biofx.scaled_sum_for_test

    for observer, factor in [(define(f), f) for f in (2.0, 3.0)]:
        state = torch.zeros(2, 2, 1)
        observer(torch.ones(1), state, 0, True)
        assert state.sum(0)[0].item() == factor


def test_noise_does_not_depend_on_how_often_a_cell_was_run():
    def define():
        @operators.gradient_hook(
            "noisy_again_grad(Tensor(a) weight, Tensor seed, Tensor steps, str site) -> Tensor(a)", draw=noise.normal
        )
        def noisy(gradient, weight, noise):
            return gradient * noise

        w = torch.ones(3, requires_grad=True)
        torch.ops.biofx.noisy_again_grad(w, torch.tensor(1), torch.tensor(2), "w").sum().backward()
        return w.grad

    expected = noise.normal(
        [torch.ones(3)], [noise.Counter(torch.tensor(1), torch.tensor(2), ("noisy_again_grad", "w"))]
    )
    assert torch.equal(define(), expected[0])
    assert torch.equal(define(), expected[0])


def test_a_name_of_another_module_is_taken():
    def hook(module):
        def rule(gradient):
            return gradient

        rule.__module__ = module
        return operators.gradient_hook("taken_grad(Tensor(a) weight) -> Tensor(a)")(rule)

    hook("mine")
    hook("mine")
    with pytest.raises(biofx.ArgumentError, match=r"yours.*rule defines biofx.taken_grad, which mine.*rule defines al"):
        hook("yours")


def test_a_hook_that_is_not_defined_here_is_named(monkeypatch):
    file = saved(run_cell("elsewhere", 2.0))
    monkeypatch.delattr(torch.ops.biofx, "elsewhere_grad")
    monkeypatch.setattr(definitions, "written_name", lambda name: "elsewhere_2_grad" if "elsewhere" in name else name)
    with pytest.raises(biofx.PipelineError, match="the operator biofx.elsewhere_2_grad, which nobody has defined here"):
        loaded(file)


SCRIPT = """
import torch
{cell}
bio = {model}
weight = next(bio.parameters())
torch.compile(bio)(torch.ones(1)).sum().backward()
print(weight.grad.item())
"""


def test_no_process_runs_a_rule_that_another_one_compiled(tmp_path):
    """Caches on disk know a graph by its text, in which an edited rule has its old name."""

    def run(factor, model):
        program = SCRIPT.format(cell=CELL.format(hook="cached", factor=factor), model=model)
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        env["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # or it compiles a program, to see whether the processor has vectors
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    new = "__import__('biofx').transform(torch.nn.Linear(1, 1, bias=False), [Rule()])"
    torch.save(run_cell("cached", 7.0), tmp_path / "bio.pt")
    old = f"torch.load({str(tmp_path / 'bio.pt')!r}, weights_only=False)"
    assert [run(2.0, new), run(3.0, new), run(5.0, old)] == [2.0, 3.0, 5.0]


def test_the_digest_of_a_rule_tells_what_it_computes_apart():
    def rules(factor, power):
        def helper(x):
            return x**power

        return [lambda x: x * factor, lambda x: helper(x), lambda x: [y**2 for y in x]]

    assert [digest(a) == digest(b) for a, b in zip(rules(1.0, 2), rules(1.0, 2), strict=True)] == [True] * 3
    assert [digest(a) == digest(b) for a, b in zip(rules(1.0, 2), rules(2.0, 3), strict=True)] == [False, False, True]
