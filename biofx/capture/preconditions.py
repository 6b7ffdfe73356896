"""Preconditions: which models can be captured."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.base.copying import has_strides
from biofx.base.errors import ArgumentError
from biofx.base.isolation import tensors_in_attributes
from biofx.base.modules import check_module
from biofx.base.shards import is_sharded
from biofx.base.torch_internals import memory_of
from biofx.capture.captured_module import RESERVED
from biofx.model.provenance import RECORD

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: importing torch.distributed.fsdp takes long

_UNESCAPED = set('"\\\n\r')  # torch.fx writes names into code between double quotes, and does not escape them


def check_model(model: Any) -> None:
    """Raise for a model that cannot be captured, before anything is copied.

    Raises:
        ArgumentError: the model is not a module, is wrapped, sharded or TorchScript, has parameters without values, or
            has an attribute whose name the result needs.
    """
    check_module(model)
    for path, module in model.named_modules():
        where = path or "model"
        if not _UNESCAPED.isdisjoint(path):
            raise ArgumentError(f"the name {path!r} of a module has a quote, a backslash or a line break; rename it")
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{where} is a TorchScript module, which has no Python forward; use the original module"
            )
        if path and isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ArgumentError(
                f"{where} is wrapped in {type(module).__name__}; put its .module there, transform, then wrap the result"
            )
    refuse_sharded(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError(f"{name} is lazy and has no shape yet; call the model once, then transform it")
        if tensor.is_meta:
            raise ArgumentError(f"{name} is on the meta device and has no values; use model.to_empty(device=...) first")
    refuse_replaced_forward(model)
    _check_names(model)


def refuse_replaced_forward(model: nn.Module) -> None:
    """Raise for a model that has another forward than its class.

    Raises:
        ArgumentError: says what to do instead.
    """
    if "forward" in vars(model) and model.forward != MethodType(type(model).forward, model):
        raise ArgumentError(
            "model.forward was replaced on the instance, and only that of the class can be traced; subclass it, or "
            "take the wrapper off, as accelerator.unwrap_model(model, keep_fp32_wrapper=False) does"
        )


def refuse_sharded(model: nn.Module) -> None:
    """Raise for a model that is sharded, so that no process has whole weights.

    Raises:
        ArgumentError: says what to do instead.
    """
    for path, module in model.named_modules():
        if not SHARDED.isdisjoint(cls.__name__ for cls in type(module).__mro__):
            raise ArgumentError(
                f"{path or 'model'} is sharded (FSDP); transform the original model, then shard the result: "
                "fully_shard(bio)"
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ArgumentError(
                f"{name} is a DTensor; transform the original model, then cut the result: "
                "biofx.parallelize(bio, mesh, plan), or fully_shard(bio)"
            )


def _check_names(model: nn.Module) -> None:
    own = {*vars(model), *dir(type(model)), *model._parameters, *model._buffers, *model._modules}
    taken = own & ({RECORD} if isinstance(model, fx.GraphModule) else {RECORD, *RESERVED})
    if taken:
        name = min(taken)
        user = "the record of biofx" if name == RECORD else "the torch.fx.GraphModule that the result is"
        raise ArgumentError(f'model has an attribute "{name}", a name that {user} needs; rename it')


def refuse_shared_memory(model: nn.Module, read: Collection[str]) -> None:
    """Refuse trained parameters in the memory of other tensors: they change as one, and the result would separate them.

    Of tensors in attributes, those count whose names are in `read`, because forward reads them.

    Raises:
        ArgumentError: says what to do instead.
    """
    places: dict[tuple[int, torch.dtype], dict[int, tuple[str, Tensor]]] = {}
    attributes = ((name, tensor) for name, tensor in tensors_in_attributes(model) if name in read)
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *attributes):
        if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and has_strides(tensor) and tensor.numel():
            places.setdefault((memory_of(tensor), tensor.dtype), {}).setdefault(id(tensor), (name, tensor))
    for named in places.values():
        for (first, one), (second, other) in _overlapping([*named.values()]):
            if one.requires_grad or other.requires_grad:
                raise ArgumentError(
                    f"{second} lies in the memory of {first}, so training changes both at once, and the result would "
                    f"part them; let forward read {first} in its place, such as self.{first}.t() for a tied decoder"
                )


def _overlapping(named: list[tuple[str, Tensor]]) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pairs of tensors of one storage that have entries in common, in the order in which they are given."""
    order = {name: i for i, (name, _) in enumerate(named)}  # tensors cannot be compared
    furthest = -1
    before = named[0]
    for each in sorted(named, key=lambda pair: pair[1].storage_offset()):
        start = int(each[1].storage_offset())
        if start <= furthest and _have_common_entries(before[1], each[1]):
            yield (before, each) if order[before[0]] < order[each[0]] else (each, before)
        end = start + sum(int((n - 1) * step) for n, step in zip(each[1].shape, each[1].stride(), strict=True))
        furthest, before = max((furthest, before), (end, each), key=lambda pair: pair[0])


def _have_common_entries(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors with overlapping ranges share entries; the columns of one matrix overlap, but share none."""
    entries = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool)
    entries.as_strided(first.shape, first.stride(), first.storage_offset()).fill_(True)
    return bool(entries.as_strided(second.shape, second.stride(), second.storage_offset()).any())
