"""Checks of what a user gives as a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from biofx.base.errors import ArgumentError


def check_module(model: Any) -> None:
    """Raise an error if `model` is not a module, or is a wrapper around one.

    Raises:
        ArgumentError: says what to give instead.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}; transform an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got an instance of {type(model).__name__}")
    if "_orig_mod" in model._modules:
        raise ArgumentError("model comes from torch.compile; transform the original module, then compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"model is wrapped in {type(model).__name__}; transform model.module, then wrap the result")
