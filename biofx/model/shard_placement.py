"""Shard placement: the axis along which FSDP2 splits the stored tensor of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from biofx.model.changes import transformed
from biofx.model.synapses import synapses_in

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard_placement(bio: nn.Module) -> Callable[[nn.Parameter], Shard | None]:
    r"""Return the `shard_placement_fn` of a transformed model for `torch.distributed.fsdp.fully_shard`.

    By default, `fully_shard` splits every parameter along its first axis. For a weight in Γ synapses, of shape
    (Γ, \*shape), this is the axis of synapses, so processes beyond Γ would hold nothing. This function splits such a
    weight along the first axis of its connections instead. `fully_shard` requires the length of that axis to be a
    multiple of the number of processes. All other parameters keep the default.

    A weight in several synapses is computed, so autograd keeps it between forward and backward, unsharded. If that
    needs too much memory, checkpoint the blocks (`torch.utils.checkpoint`): backward then computes the weight again.

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
    from torch.distributed.tensor import Shard  # slow to import

    split = {id(synapses.stored) for synapses in synapses_in(transformed(bio)).values() if synapses.is_split}
    return lambda parameter: Shard(1) if id(parameter) in split else None
