"""Trials: a model runs, and is afterwards what it was before."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of a call: a tuple is positional, a dict by keyword, anything else is the first."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def run_in_eval_mode(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors that a model returns in evaluation mode.

    Neither the model's mode and buffers, nor the inputs, nor the global random number generators change.

    Args:
        model: any module.
        example_inputs: arguments of the model, as for `transform`.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    with parameters_kept(model), undisturbed(model), torch.no_grad():
        return _tensors(model.eval()(*args, **kwargs))


@dataclass(frozen=True)
class Trial:
    """What a model computes.

    Attributes:
        tensors: those that it returns, and the buffers asked for.
        gradients: of something that depends on all that it returns, by the parameter; None if they cannot be had.
    """

    tensors: list[Tensor]
    gradients: dict[str, Tensor] | None


def run_from_seed(model: nn.Module, example_inputs: Any, buffers: Sequence[str], parameters: Sequence[str]) -> Trial:
    """What a model computes in the mode that it is in, with random numbers from one seed.

    Neither the model's buffers and gradients, nor the inputs, nor the global random number generators change.

    Args:
        model: any module.
        example_inputs: arguments of the model, as for `transform`.
        buffers: the buffers whose values afterwards are returned as well, by name.
        parameters: the parameters whose gradients are returned, by name.
    """
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, split_inputs(example_inputs))
    with parameters_kept(model), undisturbed(model), torch.enable_grad():
        torch.manual_seed(0)
        outputs = _tensors(model(*args, **kwargs))
        gradients = _gradients(outputs, {name: model.get_parameter(name) for name in parameters})
        return Trial([x.detach() for x in (*outputs, *map(model.get_buffer, buffers))], gradients)


def _gradients(outputs: Sequence[Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor] | None:
    learned = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    ends = [output for output in outputs if output.requires_grad]
    # Not ones: a softmax has no gradient of its sum.
    starts = [torch.arange(x.numel(), device=x.device).reshape(x.shape).cos().to(x.dtype) for x in ends]
    try:
        found = torch.autograd.grad(ends, [*learned.values()], starts, allow_unused=True, materialize_grads=True)
    except RuntimeError:  # such as an operator that has no gradient
        return None if ends else {name: torch.zeros_like(parameter) for name, parameter in learned.items()}
    return dict(zip(learned, found, strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model compute on copies of its buffers while the block runs; restore its attributes and random numbers."""
    saved = [(module, dict(module._buffers), module.training) for module in model.modules()]
    copies = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for module, buffers, _ in saved:
        module._buffers.update({name: copies[id(b)] for name, b in buffers.items() if b is not None})
    try:
        with unchanged(model), torch.random.fork_rng():
            yield
    finally:
        for module, buffers, mode in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            module.training = mode


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does to parameters, such as those of a teacher, which follow those of its student."""
    parameters = [(p, p._version, p.detach().clone()) for p in model.parameters() if not p.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, version, value in parameters:
                if parameter._version != version:
                    parameter.copy_(value)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a forward stores in the modules, and its random draws: proxies mean nothing after a trace."""
    saved = [(vars(m), dict(vars(m)), _contents(vars(m))) for m in model.modules()]
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)
            for attributes, values, contents in saved:
                attributes.clear()
                attributes.update(values)
                for name, content in contents.items():
                    attributes[name].clear()
                    (attributes[name].extend if isinstance(content, list) else attributes[name].update)(content)


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the containers among attributes: registries of the module, and those in which forward may collect."""
    return {k: copy.copy(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}
