"""Sharding: along which axis of a weight its synapses are distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from biofx.model.provenance import transformed
from biofx.model.synapses import synapses_in

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard_placement(bio: nn.Module) -> Callable[[nn.Parameter], Shard | None]:
    r"""Where to cut the weights of a transformed model, for `torch.distributed.fsdp.fully_shard`.

    By itself that cuts along the first axis. For a weight in Γ synapses, of shape (Γ, \*shape), this is the axis of
    synapses, so that all processes beyond Γ would hold nothing. This function cuts such a weight along the first axis
    of its connections, which `fully_shard` wants to be a multiple of the number of processes, and leaves all other
    parameters to it.

    A weight in several synapses is computed, so autograd keeps it between forward and backward, unsharded. Where that
    is too much memory, checkpoint the blocks (`torch.utils.checkpoint`): the weight is computed again.

    Args:
        bio: a model made by `biofx.transform`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), [passes.SplitSynapses()])
        >>> placement = biofx.shard_placement(bio)  # fully_shard(bio, shard_placement_fn=placement)
        >>> placement(bio.get_parameter("weight")), placement(bio.bias)
        (Shard(dim=1), None)
    """
    from torch.distributed.tensor import Shard  # takes long to import

    split = {id(synapses.stored) for synapses in synapses_in(transformed(bio)).values() if synapses.is_split}
    return lambda parameter: Shard(1) if id(parameter) in split else None
