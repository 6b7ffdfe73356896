"""Ensembles: several transformed models as one call of `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from biofx.base.errors import ArgumentError
from biofx.model.changes import transformed
from biofx.model.provenance import record_of
from biofx.model.synapses import synapses_in


def stack_module_state(models: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stack the parameters and the buffers of transformed models, for `torch.func.vmap` over `functional_call`.

    `torch.func.stack_module_state` refuses transformed models, because it requires one class, and every
    `fx.GraphModule` has its own. This function requires the same network and the same passes instead. Any of the models
    then computes, with the tensors of another one, what that one computes.

    Optimizers that train the stacked parameters are not attached, so no rule acts around their steps. Gains multiply
    the gradients, as in every model that is not attached: that is what they should do under SGD, and nearly nothing
    under Adam. To train with rules, train the models one by one, and stack them afterwards.

    Args:
        models: transformed models that differ only in the values of parameters and buffers, all in the same mode.

    Returns:
        The parameters and the buffers, each by name and with a new first axis, the models. Parameters are new leaves of
        autograd, which require gradients where those of the models do; they share no memory with the models.

    Raises:
        ArgumentError: no model; one that is not transformed, or that is attached to an optimizer; models that differ in
            more than values.

    Example:
        >>> import biofx, torch
        >>> from torch.func import functional_call, vmap
        >>> plain = [torch.nn.Linear(3, 2) for _ in range(5)]
        >>> models = [biofx.transform(model, "split-synapses", seed=seed) for seed, model in enumerate(plain)]
        >>> parameters, buffers = biofx.stack_module_state(models)
        >>> x = torch.randn(8, 3)
        >>> def call(parameters, buffers):
        ...     return functional_call(models[0], (parameters, buffers), (x,))
        >>> y = vmap(call)(parameters, buffers)  # shape (5, 8, 2)
        >>> torch.allclose(y, torch.stack([model(x) for model in plain]), atol=1e-6)
        True
    """
    bios = [transformed(model) for model in models]
    if not bios:
        raise ArgumentError("expected at least one model to stack, got none")
    for place, bio in enumerate(bios):
        if record_of(bio).attached:
            raise ArgumentError(f"model {place} is attached to an optimizer; call biofx.detach(model) first")
        for difference in _differences(bios[0], bio):
            raise ArgumentError(f"model {place} cannot be stacked with model 0: {difference}")
    parameters = [dict(bio.named_parameters()) for bio in bios]
    buffers = [dict(bio.named_buffers()) for bio in bios]
    leaves = {
        name: torch.stack([each[name].detach() for each in parameters]).requires_grad_(first.requires_grad)
        for name, first in parameters[0].items()
    }
    return leaves, {name: torch.stack([each[name] for each in buffers]) for name in buffers[0]}


def _differences(first: fx.GraphModule, other: fx.GraphModule) -> Iterator[str]:
    """Describe each way in which one model does something else with its tensors than another."""
    ours, theirs = record_of(first), record_of(other)
    if str(ours) != str(theirs):
        yield f"its passes are {theirs}, not {ours}"
    if first.training != other.training:
        yield "one is in training mode, the other in evaluation mode"
    for kind, own, others in (
        ("parameters", dict(first.named_parameters()), dict(other.named_parameters())),
        ("buffers", dict(first.named_buffers()), dict(other.named_buffers())),
    ):
        for name in sorted(own.keys() ^ others.keys()):
            yield f"only one of them has {name} among its {kind}"
        for name in sorted(own.keys() & others.keys()):
            if (own[name].shape, own[name].dtype) != (others[name].shape, others[name].dtype):
                yield f"{name} is {_described(others[name])}, not {_described(own[name])}"
            if own[name].requires_grad != others[name].requires_grad:
                yield f"{name} is frozen in one of them"
    if ours.captured != theirs.captured:
        yield "they are different networks"
    links = {name: synapses.links for name, synapses in synapses_in(first).items()}
    for name, synapses in synapses_in(other).items():
        if synapses.links != links[name]:
            yield f"{name} is computed in another way from what is stored"


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {tensor.dtype}"
