"""Ranks: what the processes of a distributed training tell each other at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biofx.model.synapses import Synapses

Groups = tuple[Any, ...]  # process groups, each of which is a part of the ranks


def data_parallel_groups(wrapper: DistributedDataParallel | None) -> Groups:
    """The process groups over which a batch is divided; empty for a process on its own.

    Args:
        wrapper: what the model was attached in, if it was. Without, the batch is divided over the default group, as for
            `torch.nn.SyncBatchNorm`: the model may be wrapped later, or gradients be reduced by other means.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ()
    group = dist.group.WORLD if wrapper is None else wrapper.process_group
    return (group,) if dist.get_world_size(group) > 1 else ()


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The data-parallel wrapper around a model, which may be compiled as well."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def stop_broadcasts(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper not broadcast the state of passes before each forward: it is equal on all ranks, and stays so."""
    own = {id(x) for module in wrapper.modules() if isinstance(module, Synapses) for x in module.buffers(recurse=False)}
    names = {name: id(x) in own for name, x in wrapper.module.named_buffers()}
    wrapper.parameters_to_ignore.update(name for name, is_own in names.items() if is_own)
    wrapper.broadcast_buffers &= not wrapper.parameters_to_ignore.issuperset(names)  # it cannot broadcast nothing


def average_(tensors: Iterable[Tensor], groups: Groups) -> None:
    """Replace tensors by their means over all ranks, in one all-reduce for each kind."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors if groups else ():
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for own in kinds.values():
        torch._foreach_copy_(own, _reduced(own, groups, dist.ReduceOp.SUM))
        torch._foreach_div_(own, float(_size(groups)))


def _size(groups: Groups) -> int:
    size = 1
    for group in groups:
        size *= dist.get_world_size(group)
    return size


def _reduced(tensors: Sequence[Tensor], groups: Groups, operation: Any) -> list[Tensor]:
    """Tensors of one kind, reduced over groups side by side."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for group in groups:
        dist.all_reduce(flat, operation, group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
