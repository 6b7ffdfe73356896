"""Optimizers around others: which one changes the weights, and what they remember of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

CLOSE = 0.1  # the relative distance from a weight below which what an optimizer remembers is a copy of the weight


def parameter_ids(optimizer: Any) -> set[int]:
    """The parameters of an optimizer, by id."""
    groups = getattr(optimizer, "param_groups", ())  # some wrappers have none
    return {id(p) for group in groups for p in group["params"]}


def wrapped_optimizers(optimizer: Any) -> Iterator[Optimizer]:
    """The optimizers that an optimizer keeps in its attributes."""
    attributes: dict[str, Any] = getattr(optimizer, "__dict__", {})
    return (value for value in attributes.values() if isinstance(value, Optimizer) and value is not optimizer)


def named_inside(container: Any) -> dict[str, Optimizer]:
    """The optimizers in a list, a dictionary, or the attributes of an object, by how Python reaches them from it.

    Args:
        container: the object; its attributes may be lists and dictionaries.
    """
    attributes = vars(container) if hasattr(container, "__dict__") else {}
    places = [(f".{name}", value) for name, value in attributes.items() if name not in ("state", "param_groups")]
    found: dict[str, Optimizer] = {}
    for place, value in [("", container), *places]:
        items = dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, dict) else {}
        found |= {f"{place}[{key!r}]": each for key, each in items.items() if isinstance(each, Optimizer)}
        found |= {place: value} if isinstance(value, Optimizer) and value is not container else {}
    return found


def innermost(optimizer: Any) -> Any:
    """The optimizer whose steps change the weights.

    A wrapper (Lookahead, SAM, those of trainers) leaves the steps to an optimizer of the same parameters. It may do so
    from methods of its own, whose steps run no hooks of the wrapper.

    Args:
        optimizer: an optimizer, or a wrapper, which need not be an `Optimizer` itself.
    """
    alike = [each for each in wrapped_optimizers(optimizer) if parameter_ids(each) == parameter_ids(optimizer)]
    return innermost(alike[0]) if len(alike) == 1 else optimizer


def memory_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer, or one inside, such as that of a shard, remembers of a parameter.

    Args:
        optimizer: the optimizer.
        parameter: the parameter.
    """
    memory: dict[str, Any] = {}
    for each in wrapped_optimizers(optimizer):
        memory |= memory_of(each, parameter)
    memory.update(optimizer.state.get(parameter, {}))
    return memory
