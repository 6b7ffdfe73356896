"""Passes by name: registration, pipeline strings, recipes."""

from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

import biofx
from biofx import passes, registry
from biofx.registry import parse

options = st.fixed_dictionaries(
    {},
    optional={
        "nu": st.floats(1e-3, 10),
        "distribution": st.sampled_from(["gamma", "layer_adaptive", "baseline"]),
        "minimum": st.floats(0, 0.5),
        "every": st.integers(1, 1000),
        "dtype": st.sampled_from([None, "bfloat16"]),
    },
)


@given(options)
def test_a_pass_and_its_string_are_the_same(values):
    pass_ = passes.FuzzyLearningRates(**values)
    assert parse(str(pass_)) == [pass_]


@pytest.mark.parametrize("pass_class", registry.registered_passes().values())
def test_every_pass_is_frozen_documented_and_round_trips(pass_class):
    pass_ = pass_class()
    assert parse(str(pass_)) == [pass_]
    assert str(pass_) == pass_.name
    for field in fields(pass_):
        assert f"{field.name}:" in pass_class.__doc__
    with pytest.raises(AttributeError):
        pass_.name = "other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("split-synapses", [passes.SplitSynapses()]),
        (" split-synapses{ synapses = 4 , init=equal } ", [passes.SplitSynapses(4, init="equal")]),
        ("split-synapses{activation='relu'}", [passes.SplitSynapses(activation="relu")]),
        ("split-synapses{}", [passes.SplitSynapses()]),
        (
            "fuzzy-learning-rates{nu=0.3,dtype=None},split-synapses",
            [passes.FuzzyLearningRates(nu=0.3), passes.SplitSynapses()],
        ),
    ],
)
def test_pipeline_strings(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split", "unknown pass 'split'; the passes are fuzzy-learning-rates, split-synapses; the recipes are"),
        ("split-synapses{gamma=4}", "split-synapses has no option 'gamma'; its options are synapses, init, compensate"),
        ("split-synapses{synapses}", "split-synapses: 'synapses' is not of the form option=value"),
        ("split-synapses{synapses=2,synapses=3}", "option 'synapses' is given twice"),
        ("split-synapses{synapses=2", "no closing brace in 'split-synapses{synapses=2'"),
        ("split-synapses{synapses=0}", "passes.SplitSynapses: synapses must be an integer ≥ 1, got 0"),
    ],
)
def test_bad_pipeline_strings(text, message):
    with pytest.raises(biofx.BiofxError, match=message):
        biofx.transform(None, text)


def test_a_recipe_is_a_pipeline_with_a_name():
    registry.register_recipe("recipe-for-test", "split-synapses{synapses=7}")
    assert parse("recipe-for-test,fuzzy-learning-rates") == [passes.SplitSynapses(7), passes.FuzzyLearningRates()]
    with pytest.raises(biofx.ArgumentError, match="'recipe-for-test' is taken"):
        registry.register_recipe("recipe-for-test", "split-synapses")
    with pytest.raises(biofx.PipelineError, match="unknown pass 'nothing'"):
        registry.register_recipe("broken-recipe", "nothing")


def test_registering_what_is_no_pass():
    with pytest.raises(biofx.ArgumentError, match="must be a class derived from passes.Pass"):
        passes.register(int)

    class NotADataclass(passes.Pass):
        name, slot = "not-a-dataclass", passes.Slot.HOOK

    with pytest.raises(biofx.ArgumentError, match=r"must be decorated with @dataclass\(frozen=True\)"):
        passes.register(NotADataclass)

    @dataclass(frozen=True)
    class NoSlot(passes.Pass):
        name = "no-slot"

    with pytest.raises(biofx.ArgumentError, match="must say which slot it fills"):
        passes.register(NoSlot)

    @dataclass(frozen=True)
    class BadName(passes.Pass):
        name, slot = "Bad Name", passes.Slot.HOOK

    with pytest.raises(biofx.ArgumentError, match="needs a name of lower-case words joined by hyphens, got 'Bad Name'"):
        passes.register(BadName)

    @dataclass(frozen=True)
    class Taken(passes.Pass):
        name, slot = "split-synapses", passes.Slot.HOOK

    with pytest.raises(biofx.ArgumentError, match="the name 'split-synapses' is taken by SplitSynapses"):
        passes.register(Taken)
