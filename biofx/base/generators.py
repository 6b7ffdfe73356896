"""Random number generators of PyTorch, Python and NumPy, which need not be installed: their states."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import torch


def is_generator(value: Any) -> bool:
    """Whether a value is a random number generator that has a state."""
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)
    kind = type(value)
    return str(kind.__module__).startswith("numpy.random") and kind.__qualname__ in ("Generator", "RandomState")


def state_of(generator: Any) -> Any:
    """The state of a generator. Two states are equal if the same numbers follow from them."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    legacy = hasattr(generator, "get_state")  # `RandomState`
    return pickle.dumps(generator.get_state(legacy=False) if legacy else generator.bit_generator.state)


def set_state(generator: Any, state: Any) -> None:
    """Set a generator to a state that `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)


def global_states() -> list[tuple[Any, Any]]:
    """The generators that functions of Python and, if it is imported, of NumPy draw from, each with its state."""
    functions: list[Any] = [random.getstate]  # a method of the generator
    if "numpy" in sys.modules:
        from numpy import random as numpy  # importing NumPy does not import it

        functions.append(numpy.get_state)
    return [(function.__self__, state_of(function.__self__)) for function in functions]


def seed_global() -> None:
    """Seed the generators that functions of PyTorch, Python and, if it is imported, of NumPy draw from."""
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        from numpy import random as numpy

        numpy.seed(0)
