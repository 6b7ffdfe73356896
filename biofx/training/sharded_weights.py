"""Shards: what `attach` does with weights of which every process holds a part."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from biofx.base.errors import ArgumentError
from biofx.base.shards import cut_like, is_placed_like, is_sharded, local, shard_of
from biofx.model.observers import observe_shards
from biofx.model.provenance import record_of
from biofx.model.slots import Slot
from biofx.model.synapses import State, observers_in
from biofx.training.ranks import is_on_any

if TYPE_CHECKING:
    from contextlib import ExitStack

    from biofx.analysis.sites import WeightSite


def check_shards(bio: fx.GraphModule, sites: Mapping[str, WeightSite]) -> None:
    """Refuse weights that are sharded in a way that rules do not support.

    Raises:
        ArgumentError: names the weight, and what to do instead.
    """
    sharded = {name for name, site in sites.items() if is_sharded(site.raw)}
    for name in sorted(sharded):
        _refuse_mixed_up(name, sites[name].raw)
    for run in record_of(bio).passes:
        rule, weights = run.pass_, run.weights & sharded
        if weights and rule.moment and rule.acts_at_step and not rule.works_on_shards:
            raise ArgumentError(
                f"attach: {min(weights)} is sharded, and {rule.name} acts on whole weights: train with "
                f"DistributedDataParallel, which keeps them whole, or transform the model without {rule.name}. A pass "
                "of your own works on parts of weights if its class says works_on_shards = True and it takes sums over "
                "weights with biofx.training.ranks.summed"
            )
    if sharded:
        observe_shards()
        _refuse_blocks(bio, {path for path, _ in observers_in(bio.graph)})


def _refuse_mixed_up(name: str, weight: Any) -> None:
    """Refuse a weight that PyTorch puts together in another order than it was cut, as 2.9 does with unequal blocks."""
    own = shard_of(name, weight)
    if len(own.groups) < 2 or all(n % weight.device_mesh.size() == 0 for n in (weight.shape[c.axis] for c in own.cuts)):
        return
    whole = weight.detach().full_tensor()
    if is_on_any(not torch.equal(own.part(whole), local(weight.detach())), own.groups):
        raise ArgumentError(
            f"attach: PyTorch {torch.__version__} mixes up the unequal parts of {name} of shape {tuple(weight.shape)}, "
            f"placed as {weight.placements}; give it lengths that {weight.device_mesh.size()} divides, or use a "
            "newer one"
        )


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
        if site.child is None or not is_sharded(site.raw):
            continue
        # In forward, weights are whole, and what is read there stays so; a backward pass gathers what it needs.
        links = [link for link in site.links if link.origin.slot is not Slot.HOOK]
        read = {argument.key for link in links for argument in link.args if isinstance(argument, State)}
        shard = shard_of(site.name, site.raw)
        for key in site.child.users.keys() - read:
            value: Any = site.state(key)
            if value is None or value.shape != site.raw.shape or is_placed_like(value, site.raw):
                continue
            undo.callback(site.child.register_buffer, key, value)
            with torch.no_grad():
                whole = value.full_tensor() if is_sharded(value) else value  # cut before the weight was cut again
                site.child.register_buffer(key, cut_like(site.raw, shard.part(whole).clone()))
