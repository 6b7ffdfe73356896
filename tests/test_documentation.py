"""Every example in a docstring runs, and so does every example in the README."""

import doctest
import importlib
import pkgutil

import pytest

import biofx
import biofx.passes

MODULES = [
    module.name
    for package in (biofx, biofx.passes)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0
