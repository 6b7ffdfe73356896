"""Sharding: what `attach` does with weights of which every process holds a part, as under `fully_shard`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from biofx.base.errors import ArgumentError
from biofx.base.shards import cut_like, is_sharded, shard_of
from biofx.model.operators import observe_shards
from biofx.model.provenance import record_of
from biofx.model.slots import Slot
from biofx.model.synapses import State, observers_in
from biofx.rewrite.registry import Pass

if TYPE_CHECKING:
    from contextlib import ExitStack

    from biofx.analysis.sites import WeightSite


def check_shards(bio: fx.GraphModule, sites: Mapping[str, WeightSite]) -> None:
    """Refuse weights that are sharded in a way in which rules cannot act on them.

    Raises:
        ArgumentError: names the weight, and what to do instead.
    """
    sharded = {name for name, site in sites.items() if is_sharded(site.raw)}
    for name in sorted(sharded):
        shard_of(name, sites[name].raw)
    for run in record_of(bio).passes:
        rule, weights = run.pass_, run.weights & sharded
        if weights and isinstance(rule, Pass) and rule.moment and rule.acts_at_step and not rule.works_on_shards:
            raise ArgumentError(
                f"attach: {min(weights)} is sharded, and {rule.name} does not say that it works on a part of a weight: "
                "take sums over weights with biofx.training.ranks.summed, and set works_on_shards = True in its class"
            )
    if sharded:
        observe_shards()
        _refuse_blocks(bio, {path for path, _ in observers_in(bio.graph)})


def _refuse_blocks(bio: fx.GraphModule, observed: Collection[str]) -> None:
    """Refuse blocks that are sharded on their own, if observers need the graph, which runs no hooks of blocks."""
    for path, module in bio.named_modules():
        is_block = path and any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)  # slow to import
        if is_block and any(each.startswith(f"{path}.") for each in observed):
            raise ArgumentError(
                f"attach: {path} is sharded as a block of its own, and rules observe its activity in the graph of the "
                "model, which runs no hooks of blocks; shard the model as a whole, with fully_shard(bio)"
            )


def cut_state(sites: Iterable[WeightSite], undo: ExitStack) -> None:
    """Keep only this process's part of state that has a number for every synapse of a sharded weight.

    Args:
        sites: the weights.
        undo: closing it makes the state whole again.
    """
    for site in sites:
        if site.learning is None or not is_sharded(site.raw):
            continue
        # In forward, weights are whole, and what is read there stays so; a backward pass gathers what it needs.
        links = [link for link in site.links if link.origin.slot is not Slot.HOOK]
        read = {argument.key for link in links for argument in link.args if isinstance(argument, State)}
        shard = shard_of(site.name, site.raw)
        for key in site.learning.users.keys() - read:
            whole = site.state(key)
            if whole is not None and whole.shape == site.raw.shape and not is_sharded(whole):
                undo.callback(site.learning.register_buffer, key, whole)
                with torch.no_grad():
                    site.learning.register_buffer(key, cut_like(site.raw, shard.part(whole).clone()))
