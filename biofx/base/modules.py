"""Checks of what a user gives as a model."""

from __future__ import annotations

import inspect
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


def why_without_modes(model: nn.Module) -> str | None:
    """Why a model cannot change between training and evaluation mode; None if nothing is known against it."""
    for path, module in model.named_modules():
        signature = inspect.signature(module.train)
        try:
            signature.bind()
        except TypeError:
            name = f"{path} ({type(module).__name__})" if path else type(module).__name__
            return (
                f"{name} has a method train{signature} in the place of torch.nn.Module.train, so .train() and .eval() "
                "fail, and biofx runs the model in both modes; give that method another name"
            )
    return None
