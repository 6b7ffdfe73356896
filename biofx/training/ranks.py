"""Ranks: what the processes of a distributed training exchange at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from biofx.base.shards import is_sharded
from biofx.base.torch_internals import wrapper_under_way
from biofx.model.provenance import record_of
from biofx.model.synapses import Synapses

if TYPE_CHECKING:
    from biofx.training.plastic_weight import PlasticWeight

Groups = tuple[Any, ...]  # process groups, each of which is a part of the ranks


def data_parallel_groups(wrapper: DistributedDataParallel | None, weights: Iterable[Any]) -> Groups:
    """The process groups over which a batch is divided; empty for a process on its own.

    Args:
        wrapper: what the model was attached in, if it was.
        weights: the stored weights. The batch is divided over the meshes of those that are sharded; without any, and
            without a wrapper, over the default group, as for `torch.nn.SyncBatchNorm`: the model may be wrapped later,
            or gradients be reduced by other means. Ranks of tensor parallelism, which have the same share, do no harm.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ()
    meshes = dict.fromkeys(weight.device_mesh for weight in weights if is_sharded(weight))
    if meshes:
        return tuple(dict.fromkeys(mesh.get_group(which) for mesh in meshes for which in range(mesh.ndim)))
    group = dist.group.WORLD if wrapper is None else wrapper.process_group
    return (group,) if dist.get_world_size(group) > 1 else ()


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The data-parallel wrapper around a model, which may be compiled as well."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def stop_broadcasts(wrapper: DistributedDataParallel) -> None:
    """Stop a wrapper from broadcasting the state of passes before each forward: it stays equal on all ranks.

    Not earlier, by a mark on the model that the wrapper reads when it is made: it would not make ranks equal then.
    """
    own = {id(x) for module in wrapper.modules() if isinstance(module, Synapses) for x in module.buffers(recurse=False)}
    names = {name: id(x) in own for name, x in wrapper.module.named_buffers()}
    wrapper.parameters_to_ignore.update(name for name, is_own in names.items() if is_own)
    wrapper.broadcast_buffers &= not wrapper.parameters_to_ignore.issuperset(names)  # it cannot broadcast nothing


def note_wrapper(bio: nn.Module, args: Any) -> None:
    """A hook on an attached model: notify attachments of a wrapper in which the model runs and that they do not know.

    It is a plain function, so pickle can save a model that has it as a hook.
    """
    if torch.compiler.is_compiling() or (wrapper := wrapper_under_way()) is None:
        return
    for attachment in record_of(bio).attachments:
        if attachment.wrapper is not wrapper and any(module is bio for module in wrapper.modules()):
            attachment.wrapper = wrapper
            stop_broadcasts(wrapper)


def average_(tensors: Iterable[Tensor], groups: Groups) -> None:
    """Replace tensors by their means over all ranks, in one all-reduce for each kind."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors if groups else ():
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for own in kinds.values():
        torch._foreach_copy_(own, _reduced(own, groups, dist.ReduceOp.SUM))
        torch._foreach_div_(own, float(_size(groups)))


def is_on_any(flag: bool, groups: Groups) -> bool:
    """Whether a flag is set on any rank."""
    found = [flag]
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, any(found), group)
        found = gathered
    return any(found)


def summed(weights: Sequence[PlasticWeight], numbers: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the parts of weights, given those of the parts of this process: one all-reduce for all of a kind.

    Args:
        weights: the weights, the same on all ranks.
        numbers: a small tensor for each.
    """
    return _over_parts(weights, numbers, "SUM")


def largest(weights: Sequence[PlasticWeight], numbers: Sequence[Tensor]) -> list[Tensor]:
    """The largest numbers of all parts; arguments as of `summed`."""
    return _over_parts(weights, numbers, "MAX")


def _over_parts(weights: Sequence[PlasticWeight], numbers: Sequence[Tensor], operation: str) -> list[Tensor]:
    result = list(numbers)
    kinds: dict[tuple[Groups, torch.device, torch.dtype], list[int]] = {}
    for index, (weight, number) in enumerate(zip(weights, numbers, strict=True)):
        if weight.shard.groups:
            kinds.setdefault((weight.shard.groups, number.device, number.dtype), []).append(index)
    for (groups, *_), own in kinds.items():
        reduced = _reduced([numbers[index] for index in own], groups, getattr(dist.ReduceOp, operation))
        for index, number in zip(own, reduced, strict=True):
            result[index] = number
    return result


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
