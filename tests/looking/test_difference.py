"""Differences: what passes inserted, removed and changed between two graphs."""

import re

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from models.small import mlp


def kinds(found):
    return {(change.kind, change.calls.rpartition(".")[2], change.weight, change.passes) for change in found.changes}


def test_links_are_inserted_and_operators_do_not_change():
    model = mlp(6, 8, 4)
    found = biofx.diff(model, biofx.transform(model, [passes.FuzzyLearningRates()], exclude="2.*"))
    fuzzy = ("fuzzy-learning-rates",)
    assert kinds(found) == {("inserted", "gain", "0.weight", fuzzy), ("inserted", "scale_grad", "0.weight", fuzzy)}
    assert (len(found.inserted), len(found.removed), len(found.changed)) == (2, 0, 0)
    assert str(found).startswith("2 inserted\n")


def test_a_model_does_not_differ_from_its_copy():
    found = biofx.diff(biofx.transform(mlp(6, 8, 4), "cortex"), biofx.transform(mlp(6, 8, 4), "cortex"))
    assert not found.changes
    assert str(found) == "no difference"


def test_the_other_way_round_what_was_inserted_is_removed():
    model = mlp(6, 8, 4)
    bio = biofx.transform(model, [passes.FuzzyLearningRates()])
    there, back = biofx.diff(model, bio), biofx.diff(bio, model)
    assert [change.node for change in there.inserted] == [change.node for change in back.removed]


def test_between_two_pipelines_only_their_difference_is_shown():
    model = mlp(6, 8, 4)
    one = biofx.transform(model, [passes.FuzzyLearningRates(), passes.SplitSynapses(2)])
    two = biofx.transform(model, [passes.FuzzyLearningRates(), passes.DalesPrinciple()])
    found = biofx.diff(one, two)
    assert {change.passes for change in found.inserted} == {("dales-principle",)}
    assert {change.passes for change in found.removed} == {("split-synapses",)}
    shapes = {change.arguments for change in found.changed}
    assert "2 × 8 × 6 → 8 × 6" in shapes


def test_an_operator_that_reads_another_node_has_changed():
    model = mlp(6, 8, 4)
    found = biofx.diff(model, biofx.transform(model, [passes.GroupUnits(2)]))
    (changed,) = found.changed
    assert changed.arguments == "linear → repeat_interleave"


@pytest.mark.parametrize("suffix", [".html", ".svg", ".mmd"])
def test_a_picture_marks_what_differs(tmp_path, suffix):
    model, path = mlp(6, 8, 4), tmp_path / f"difference{suffix}"
    one, two = biofx.transform(model, [passes.SplitSynapses(2)]), biofx.transform(model, [passes.FuzzyLearningRates()])
    biofx.diff(one, two).draw(path, depth=3)
    text = re.sub("<.*?>", "", path.read_text())
    if suffix != ".svg":  # matplotlib draws letters as outlines
        assert "+ scale_grad" in text
        assert "- share_grad" in text


@pytest.mark.parametrize("model", [torch.zeros(1), nn.Linear, None])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(biofx.ArgumentError, match="after must be a torch.nn.Module"):
        biofx.diff(nn.Linear(2, 2), model)
