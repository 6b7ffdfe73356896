"""Trainers that make the optimizer themselves: a callback for each, in the module with the name of its package."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn
from torch.optim import Optimizer

from biofx.base.errors import ArgumentError
from biofx.model.provenance import is_transformed
from biofx.training.attachment import attach, detach
from biofx.training.wrappers import parameter_ids


def transformed_in(model: nn.Module) -> list[fx.GraphModule]:
    """The transformed models in a model, or that model itself.

    Raises:
        ArgumentError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, fx.GraphModule) and is_transformed(module)]
    if not found:
        raise ArgumentError(f"no module of this {type(model).__name__} was made by biofx.transform; transform it first")
    return found


def attach_all(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Attach every transformed model in a model to those of the optimizers, at least one, that hold its parameters.

    A transformed model that is frozen as a whole may be in none.
    """
    for bio in transformed_in(model):
        own = {id(parameter) for parameter in bio.parameters()}
        holding = [each for each in optimizers if parameter_ids(each) & own]
        is_frozen = not any(parameter.requires_grad for parameter in bio.parameters())
        for optimizer in holding or (() if is_frozen else optimizers):
            attach(bio, optimizer)


def detach_all(model: nn.Module) -> None:
    """End all attachments of the transformed models in a model."""
    for bio in transformed_in(model):
        detach(bio)
