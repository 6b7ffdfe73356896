"""Tensor parallelism: `biofx.parallelize` cuts the weights of a transformed model over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from biofx.base.copying import keep_attributes
from biofx.base.errors import ArgumentError
from biofx.base.shards import is_sharded
from biofx.model.changes import transformed
from biofx.model.islands import GUARD
from biofx.model.provenance import record_of
from biofx.model.synapses import CHILD, Synapses, child_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement
    from torch.optim import Optimizer

_IS_CUT = "_biofx_is_cut"  # an attribute of a stored tensor that was replaced by one that is cut


def parallelize(bio: nn.Module, mesh: DeviceMesh, plan: Any) -> None:
    """Cut weights of a transformed model over processes by `torch.distributed.tensor.parallel.parallelize_module`.

    Use this in place of that function, which looks for the weights in their modules: here these are stored by their
    synapses. A weight in several synapses is cut along its connections. Build the optimizer afterwards, and then
    `attach` it.

    To divide the batch as well, give `mesh["tp"]` of a mesh of two dimensions, and then call
    `fully_shard(bio, mesh=mesh["dp"], shard_placement_fn=biofx.shard_placement(bio))`. Rules act on the blocks of
    weights that this leaves to each process.

    Args:
        bio: a model made by `biofx.transform`, changed in place. Not with passes that need the graph of the model,
            such as those that observe activity: the styles of a plan hook modules, which the graph does not call. For
            these, let all parameters and the inputs be DTensors.
        mesh: the mesh of the processes, of one dimension.
        plan: as for `parallelize_module`: a style, such as `ColwiseParallel()`, for each module by its name.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, is attached, or needs its graph; or a tied weight would
            be cut in two ways.
        Whatever `parallelize_module` raises, after which some modules are cut: make the model again.
    """
    from torch.distributed.tensor.parallel import parallelize_module  # slow to import

    model = transformed(bio)
    _refuse_others(model, mesh)
    with _in_their_modules(model) as placeholders:
        parallelize_module(model, mesh, plan)
    for synapses, own in placeholders.items():
        placed = {(each.device_mesh, each.placements) for each in own if is_sharded(each)}
        if placed:
            _cut(synapses, own[0].shape, *placed)


def _refuse_others(model: fx.GraphModule, mesh: DeviceMesh) -> None:
    """Refuse models and meshes that cannot be cut.

    Raises:
        ArgumentError: says what to do instead.
    """
    if record_of(model).attached:
        raise ArgumentError(
            "parallelize: an attached optimizer holds the whole weights; biofx.detach(bio), parallelize, then build "
            "another optimizer and attach it"
        )
    if mesh.ndim != 1:
        raise ArgumentError(
            f"parallelize: {mesh} has {mesh.ndim} dimensions; give the one of tensor parallelism, such as mesh['tp']"
        )
    if any(is_sharded(parameter) and parameter.device_mesh != mesh for parameter in model.parameters()):  # type: ignore[attr-defined]
        raise ArgumentError(
            "parallelize: weights are cut over another mesh already; call biofx.parallelize first, and then "
            "fully_shard(bio) over another dimension of the same mesh"
        )
    guard = vars(model).get(GUARD)
    if guard is not None and guard.needs is not None:
        raise ArgumentError(
            f"parallelize: {guard.needs}, and the styles of a plan hook modules, which the graph does not call; leave "
            "that pass out, or let all parameters and the inputs be DTensors instead"
        )


@contextmanager
def _in_their_modules(bio: nn.Module) -> Iterator[dict[Synapses, list[Any]]]:
    """Put parameters without values in the place of weights while the block runs; yield them in the end."""
    all_places = ((owner, key, child_of(owner, key)) for owner in bio.modules() for key in owner._parameters)
    places = [(owner, key, child) for owner, key, child in all_places if child is not None]
    found: dict[Synapses, list[Any]] = {}
    for owner, key, child in places:
        empty = torch.empty_like(child(), device="meta")
        owner._modules[CHILD.format(key)] = None
        owner._parameters[key] = nn.Parameter(empty, child.stored.requires_grad)
    try:
        yield found
    finally:
        for owner, key, child in places:
            found.setdefault(child, []).append(owner._parameters[key])
            owner._parameters[key], owner._modules[CHILD.format(key)] = None, child


def _cut(synapses: Synapses, shape: torch.Size, *placed: tuple[DeviceMesh, tuple[Placement, ...]]) -> None:
    """Distribute a stored tensor with the placements of its weight, and replicate its trained state."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if len(placed) > 1:
        raise ArgumentError(
            f"parallelize: {synapses.stored_name} is tied, and the plan cuts it in several ways; use one: {placed}"
        )
    ((mesh, placements),) = placed
    first = synapses.stored.dim() - len(shape)  # behind the axis of synapses
    along = [Shard(each.dim + first) if isinstance(each, Shard) else each for each in placements]
    for key, parameter in [*synapses.named_parameters()]:
        own = along if parameter is synapses.stored else [Replicate()] * mesh.ndim
        cut = nn.Parameter(distribute_tensor(parameter.detach(), mesh, own), requires_grad=parameter.requires_grad)
        keep_attributes(cut, parameter)
        synapses.register_parameter(key, cut)
        setattr(parameter, _IS_CUT, True)


def refuse_whole(optimizer: Optimizer) -> None:
    """Refuse an optimizer from before `parallelize`, which would train tensors that no model has any more.

    Raises:
        ArgumentError: it holds such a tensor.
    """
    if any(hasattr(parameter, _IS_CUT) for group in optimizer.param_groups for parameter in group["params"]):
        raise ArgumentError(
            f"attach: {type(optimizer).__name__} holds weights as they were before biofx.parallelize cut them; build "
            "it from bio.parameters() afterwards"
        )
