"""Explanations: in which line a forward stopped, and why."""

import torch

from biofx.capture.explanation import explain, lines_of


def caught(function):
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError("it did not fail")


def fails():
    raise ValueError("a message\n  on two lines " + "and on " * 40)


def multiplies():
    return torch.ones(2) @ torch.ones(3)


def test_the_line_of_the_user_is_named():
    text = explain(caught(fails))
    assert text.startswith("its forward cannot be traced at test_explanation.py:")
    assert "'raise ValueError(" in text
    assert "a message on two lines" in text
    assert text.endswith("[...]")


def test_it_is_the_users_also_if_pytorch_failed_inside():
    assert "return torch.ones(2) @ torch.ones(3)" in explain(caught(multiplies))


def test_a_long_line_is_cut():
    def stops():
        raise ValueError("short" if stops else "a line of code that goes on, and on, and on, and on, and on, and on")

    text = explain(caught(stops))
    assert text.endswith(
        """'raise ValueError("short" if stops else "a line of code that goes on, and on, an…': short"""
    )


def test_an_error_without_a_message_has_a_name():
    def stops():
        raise KeyError

    assert explain(caught(stops)).endswith(": KeyError")


def test_the_innermost_line_is_the_last():
    lines = [line.text for line in lines_of(caught(fails))]
    assert lines[0] == "function()"
    assert lines[-1].startswith("raise ValueError")
