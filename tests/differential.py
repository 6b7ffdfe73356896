"""What holds for every transformed model, stated against plain PyTorch; only biofx's public interface is used.

A `Case` holds a plain model, what `biofx.transform` made of it, and inputs; each `check_…` states one property. Weights
are not counted and not named: what is said of a weight is said of all that `biofx.weight_sites` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import biofx
from biofx import passes
from biofx.model.synapses import stored_parameters
from conftest import loss, tensors, times_listed

DALE = passes.DalesPrinciple(excitatory=0.5)
RECIPES: dict[str, str | Sequence[passes.Pass]] = {
    "split": [passes.SplitSynapses(synapses=2)],
    "dale": [DALE],
    "fuzzy": [passes.SplitSynapses(synapses=3), passes.FuzzyLearningRates()],
    "everything": f"cortex,{DALE}",
}

LINEAR_RULES = {"split-synapses", "fuzzy-learning-rates", "dales-principle"}
"""Passes under which the gradient of a synapse is a known factor times that of its weight."""


@dataclass
class Case:
    """A model in float64 and evaluation mode, transformed with a recipe.

    Attributes:
        model: the plain model, which `transform` was given.
        bio: the transformed one.
        inputs: arguments of forward, positional (a tuple) or by keyword (a dict).
        preserved: whether every pass of the recipe promises to preserve the function.
        tolerance: what rounding may come to where weights are rounded differently; larger for models that compute
            parts in float32 whatever their dtype.
    """

    model: nn.Module
    bio: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    preserved: bool
    tolerance: float = 1e-9
    oracle: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.oracle = self.folded_into_the_original(self.bio)

    def folded_into_the_original(self, bio: nn.Module) -> nn.Module:
        """A plain model of the original class with the weights that `bio` computes with: the oracle."""
        plain = copy.deepcopy(self.model)
        plain.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
        return plain

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors that a model returns; the same random numbers in every call."""
        torch.manual_seed(1)
        args, kwargs = ((), self.inputs) if isinstance(self.inputs, Mapping) else (self.inputs, {})
        return tensors(model(*args, **kwargs))

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Gradients by parameter name; `.grad` is left empty."""
        model.zero_grad()
        loss(self.run(model)).backward()
        found = {name: p.grad.to_dense().clone() for name, p in stored_parameters(model) if p.grad is not None}
        model.zero_grad()
        return found


def transformed(
    model: nn.Module, inputs: Any, recipe: str, frontend: str = "symbolic", tolerance: float = 1e-9
) -> Case:
    """A case from a plain model; inputs and model are made float64."""
    model = model.double().eval()
    inputs = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    bio = biofx.transform(model, RECIPES[recipe], frontend=frontend, example_inputs=inputs)
    preserved = not isinstance(RECIPES[recipe], str) and all(p.preserves_function for p in RECIPES[recipe])
    return Case(model, bio, inputs, preserved, tolerance)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Tensor by tensor; what is float32 is held to float32's rounding."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        limit = max(tolerance, 1e-5) if b.dtype is torch.float32 else tolerance
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def check_function_is_preserved(case: Case) -> None:
    """If every pass promises it, the transformed model computes what the plain one does."""
    if case.preserved:
        assert_same(case.run(case.bio), case.run(case.model), case.tolerance)


def check_fold(case: Case, bio: nn.Module | None = None) -> None:
    """The folded model computes the same, and loads strictly into the original, which computes the same then."""
    bio = case.bio if bio is None else bio
    expected = case.run(bio)
    assert all(torch.isfinite(x).all() for x in expected)
    assert_same(case.run(biofx.fold(bio)), expected)
    assert_same(case.run(case.folded_into_the_original(bio)), expected)


def check_gradients(case: Case) -> None:
    """A synapse's gradient is its gain / Γ times that of the plain weight; other parameters' are the plain ones."""
    found, plain, sites = case.gradients(case.bio), case.gradients(case.oracle), biofx.weight_sites(case.bio)
    assert found.keys() == plain.keys()
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in found.items():
        expected, site = plain[name], sites.get(name)
        if site is not None:
            if not set(site.passes) <= LINEAR_RULES:
                assert gradient.shape == site.raw.shape
                assert torch.isfinite(gradient).all()
                continue
            factor = torch.ones_like(gradient) if site.gain is None else site.gain
            expected = factor * (expected / site.synapses).expand_as(gradient)
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def check_deepcopy(case: Case) -> None:
    """A copy computes the same, forward and backward, and shares nothing."""
    other = copy.deepcopy(case.bio)
    assert_same(case.run(other), case.run(case.bio), 0)
    assert list(other.state_dict()) == list(case.bio.state_dict())
    found, expected = case.gradients(other), case.gradients(case.bio)
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()), 0)
    assert biofx.summary(other) == biofx.summary(case.bio)
    biofx.verify(other)
    theirs = {p.data_ptr() for p in case.bio.parameters() if p.numel()}
    assert not any(p.data_ptr() in theirs for p in other.parameters())


def check_trains(case: Case) -> None:
    """All invariants hold, also after two steps with an optimizer attached; and the trained model folds."""
    biofx.verify(case.bio)
    bio = copy.deepcopy(case.bio).train()
    before = {name: p.detach().clone() for name, p in stored_parameters(bio)}
    optimizer = torch.optim.AdamW(bio.parameters(), lr=1e-3)
    biofx.attach(bio, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss(case.run(bio)).backward()
        optimizer.step()
    biofx.verify(bio)
    assert all(torch.isfinite(p).all() for p in bio.parameters())
    for name, p in stored_parameters(bio):
        assert p.grad is None or not p.grad.any() or not torch.equal(p, before[name]), f"{name} does not learn"
    check_fold(case, bio.eval())


def check_summary(case: Case) -> None:
    """Every parameter of the original is named exactly once: in a row, as left alone, or as not a synapse."""
    summary = biofx.summary(case.bio)
    for name, _ in case.model.named_parameters():
        assert times_listed(summary, name) == 1, f"{name} in\n{summary}"
    assert {name for name, _ in case.model.named_parameters()} >= {*summary.to_dict()["not_synapses"]}


def check_same_weights(cases: Sequence[Case]) -> None:
    """What several front ends made of one model has the same signs, synapse by synapse, and the same weights."""
    first, *others = (biofx.weight_sites(case.bio) for case in cases)
    assert any(site.sign is not None for site in first.values())
    for sites in others:
        assert sites.keys() == first.keys()
        for name, site in sites.items():
            assert (site.sign is None) == (first[name].sign is None), name
            if site.sign is not None:
                assert torch.equal(site.sign.expand_as(site.raw), first[name].sign.expand_as(site.raw)), name
            weight, expected = site.effective(), first[name].effective()
            assert torch.equal(weight.sign(), expected.sign()), name
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


PROPERTIES = (
    check_function_is_preserved,
    check_fold,
    check_gradients,
    check_deepcopy,
    check_trains,
    check_summary,
)
