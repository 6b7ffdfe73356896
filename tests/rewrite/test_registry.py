"""Passes by name: registration, pipeline strings, recipes."""

import inspect
from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

import biofx
from biofx import passes
from biofx.rewrite import registry
from biofx.rewrite.registry import parse

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
        ("splitter", "unknown pass 'splitter'; the passes are .*fuzzy-learning-rates, .*split-synapses, .*"),
        ("SplitSynapses", r"unknown pass 'SplitSynapses' \(did you mean split-synapses\?\); the passes are"),
        ("split_synapses", r"did you mean split-synapses\?"),
        ("split-synapses(synapses=4)", r"did you mean split-synapses\?"),
        ("fuzzy-learning-rate", r"did you mean fuzzy-learning-rates\?"),
        ("split-synapses{gamma=4}", "split-synapses has no option 'gamma'; its options are synapses, init, compensate"),
        ("split-synapses{synapses}", "split-synapses: 'synapses' is not of the form option=value"),
        ("split-synapses{synapses=2,synapses=3}", "option 'synapses' is given twice"),
        ("split-synapses{synapses=2", "'{' at character 15 of 'split-synapses{synapses=2' is not closed"),
        ("split-synapses{init=[equal}", "'\\[' at character 21 of 'split-synapses{init=\\[equal}' is not closed"),
        ("split-synapses{init='equal}", "at character 21 of .* is not closed"),
        ("split-synapses{synapses=4}}", "'}' at character 27 of 'split-synapses{synapses=4}}' closes nothing"),
        ("split-synapses{}{synapses=4}", "'{' at character 17 of .* stands behind the options; a comma separates"),
        ("split-synapses{synapses=4} x", "'x' at character 28 of .* stands behind the options; a comma separates"),
        ("split-synapses{synapses=0}", "passes.SplitSynapses: synapses must be an integer ≥ 1, got 0"),
    ],
)
def test_bad_pipeline_strings(text, message):
    with pytest.raises(biofx.BiofxError, match=message):
        biofx.transform(None, text)


def test_what_there_is_none_of_is_not_listed(monkeypatch):
    monkeypatch.setattr(registry, "_RECIPES", {})
    with pytest.raises(biofx.PipelineError, match="the passes are [^;]*$"):
        parse("nothing")


def test_a_recipe_is_a_pipeline_with_a_name():
    registry.register_recipe("recipe-for-test", "split-synapses{synapses=7}")
    assert parse("recipe-for-test,fuzzy-learning-rates") == [passes.SplitSynapses(7), passes.FuzzyLearningRates()]
    with pytest.raises(biofx.ArgumentError, match="'recipe-for-test' is taken"):
        registry.register_recipe("recipe-for-test", "split-synapses")
    with pytest.raises(biofx.PipelineError, match="unknown pass 'nothing'; the passes are .*; the recipes are .*-test"):
        registry.register_recipe("broken-recipe", "nothing")
    with pytest.raises(biofx.PipelineError, match=r"'recipe_for_test' \(did you mean recipe-for-test\?\)"):
        parse("recipe_for_test")
    for options in ("{}", "{synapses=3}"):
        with pytest.raises(biofx.PipelineError, match="recipe-for-test is a recipe and takes no options"):
            parse("recipe-for-test" + options)


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

    with pytest.raises(biofx.ArgumentError, match="'split-synapses' is taken by biofx.passes.split_synapses.SplitSyn"):
        passes.register(Taken)


def test_a_class_may_be_registered_again_but_not_its_namesake():
    def define(module):
        @dataclass(frozen=True)
        class Namesake(passes.Pass):
            name, slot = "namesake", passes.Slot.HOOK

        Namesake.__module__ = module
        return Namesake

    passes.register(define("notebook"))
    again = passes.register(define("notebook"))
    assert registry.registered_passes()["namesake"] is again
    with pytest.raises(biofx.ArgumentError, match="the name 'namesake' is taken by notebook"):
        passes.register(define("package"))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"passes\[0\]: Incomplete must say which slot it fills"),
        ({"slot": passes.Slot.HOOK}, r"passes\[0\]: Incomplete needs a name of lower-case words .*, got None"),
        ({"slot": passes.Slot.HOOK, "name": "a, b"}, "needs a name of lower-case words .*, got 'a, b'"),
        (
            {"slot": passes.Slot.HOOK, "name": "a", "at_step": lambda self, weights: None},
            r"Incomplete has at_step, which is called at a moment: add moment = passes\.Moment\.GAIN, say",
        ),
        (
            {"slot": passes.Slot.HOOK, "name": "a", "moment": passes.Moment.GAIN},
            r"has moment = Moment.GAIN, and no method at_step\(weights\)",
        ),
    ],
)
def test_a_pass_that_is_not_registered_must_be_complete(attributes, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        registry.as_passes([type("Incomplete", (passes.Pass,), attributes)()])
    complete = type("Complete", (passes.Pass,), {"slot": passes.Slot.HOOK, "name": "complete"})()
    assert registry.as_passes([complete]) == [complete]


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_a_rule_acts_every_whole_number_of_steps(every):
    @dataclass(frozen=True)
    class Rare(passes.Pass):
        name, slot, moment = "rare", passes.Slot.HOOK, passes.Moment.GAIN
        every: float = 1

        def at_step(self, weights):
            pass

    with pytest.raises(biofx.ArgumentError, match=rf"passes.Rare: every must be an integer ≥ 1, got {every}"):
        registry.as_passes([Rare(every)])


def test_strings_in_a_list_are_one_string():
    with pytest.raises(
        biofx.ArgumentError, match=r"give one string, passes='rejuvenate,crystallize', or a list of pass"
    ):
        registry.as_passes(["rejuvenate", passes.Crystallize()])


@pytest.mark.parametrize("members", [passes.Need, passes.Moment, passes.Slot])
def test_help_tells_what_members_mean(members):
    text = inspect.getdoc(members)
    assert all(f"    {name}: " in text for name in members.__members__)
