"""Random small networks × front ends × recipes × properties, and the ones that once failed.

The networks are in `models.random_networks`, the properties in `differential`.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import differential
from differential import RECIPES
from models.random_networks import RandomNetwork, plans


def check(plan: dict[str, Any], recipe: str, frontend: str) -> None:
    """All properties."""
    torch.manual_seed(0)
    case = differential.transformed(RandomNetwork(**plan), (torch.randn(5, 2, 4, 4),), recipe, frontend)
    for check_property in differential.PROPERTIES:
        check_property(case)


@given(plan=plans, recipe=st.sampled_from(sorted(RECIPES)), frontend=st.sampled_from(["symbolic", "module"]))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_every_network_has_every_property(plan, recipe, frontend):
    check(plan, recipe, frontend)
