"""Fold: replaces every chain by the plain weight that it computes."""

from __future__ import annotations

import torch
from torch import fx, nn

from biofx.base.copying import copied
from biofx.base.errors import ArgumentError, ExportError
from biofx.base.references import enclosed
from biofx.base.shards import is_sharded
from biofx.capture.captured_module import CapturedModule, original_form
from biofx.model.chain import number_nodes, parameter_nodes, write_chain
from biofx.model.changes import transformed
from biofx.model.fingerprint import fingerprint
from biofx.model.islands import GUARD
from biofx.model.owners import remove_synapses
from biofx.model.provenance import RECORD, inserted_nodes, record_of, shapes
from biofx.model.slots import Slot
from biofx.model.synapses import stored_parameters


def fold(bio: nn.Module, into: nn.Module | None = None) -> nn.Module:
    """A plain model of the original's class with the transformed model's outputs, at the original's cost.

    Every chain becomes one weight with the values that its operator received; gains, signs and hooks are gone. Names,
    order and shapes of the state are the original's, so `original.load_state_dict(fold(bio).state_dict())` works; only
    units that `MirrorUnits` doubled stay doubled.

    Some passes change the output of an operator, which no weight can express: `GroupUnits` adds sums, and an activation
    per synapse needs the wider operator. Then the folded model is a `GraphModule` that computes these outputs, and
    `into` is refused, because the original with the folded state would compute something else. The result is a
    `GraphModule` as well if you edited the graph, or transformed a `GraphModule`. Such a graph has no guard: it does
    not notice attributes, hooks and layers that you change in it.

    `torch.save(fold(bio), path)` can be loaded where biofx is not installed, a `GraphModule` without the methods of the
    original's class. Not so a `GraphModule` that follows `.train()` and `.eval()` or checks its arguments by modules of
    biofx, as those of `frontend="export"` do; export it as `.pt2`.

    Args:
        bio: a model made by `biofx.transform`, which is not changed.
        into: an instance of the original model to fill with the folded parameters and buffers, instead of building a
            new one.

    Returns:
        `into`, or a new module that shares no tensor with `bio`, in the same mode: an instance of the original's class
        with the hooks and attributes of `bio`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform` or cannot be copied, or `into` cannot give its
            outputs: a tensor does not fit, or a pass changed the output of an operator.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Linear(3, 2)
        >>> bio = biofx.transform(model, [passes.SplitSynapses(synapses=4)])
        >>> plain = biofx.fold(bio)
        >>> {name: tuple(value.shape) for name, value in plain.state_dict().items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> biofx.fold(bio, into=model) is model
        True
    """
    bio = transformed(bio)
    if into is not None and not isinstance(into, nn.Module):
        raise ArgumentError(f"fold: into must be an instance of the original model, got {into!r}")
    rewired = why_weights_do_not_suffice(bio)
    if into is not None and rewired is not None:
        raise ArgumentError(
            f"fold: {type(into).__name__} would compute something else: {rewired}; use fold(bio), which keeps the graph"
        )
    with torch.inference_mode(False):  # so that the result can be trained
        found = enclosed(bio) if into is None else None
        if found is not None:
            raise ArgumentError(
                f"fold: {found[0]} is or holds a function that refers to {found[1]}, and its copy would refer to it "
                "as well; make the function a method, or give the original model as into"
            )
        plain = _copy(bio)
        _drop_observers(plain.graph)
        for name, start in parameter_nodes(plain).items():
            write_chain(start, name, ())
        with torch.no_grad():
            remove_synapses(plain)
        record = record_of(plain)
        is_as_captured = rewired is None and fingerprint(plain) == record.captured
        _drop_state(plain)
        if record.model_class is not None and is_as_captured:
            for name in record.constants:
                del plain._buffers[name]
            result = original_form(plain, record.model_class)
        else:
            vars(plain).pop(GUARD, None)  # the graph runs, and not its Python
            number_nodes(plain)
            result = plain
        return result if into is None else _fill(into, result)


def why_weights_do_not_suffice(bio: fx.GraphModule) -> str | None:
    """Why the original model with folded weights has other outputs than the transformed one; None if not."""
    for _, origin in inserted_nodes(bio.graph):
        if origin.slot is Slot.OUTPUT:
            return f"{origin.by} changed what the operator of {origin.parameter} returns, which no weight can express"
    return None


def why_architecture_differs(bio: fx.GraphModule) -> str | None:
    """Why the original model has other parameters than this one, in which a user replaced some; None if not."""
    record, present = record_of(bio), shapes(stored_parameters(bio, remove_duplicate=False))
    for name in record.changed:
        now = present.get(name)
        if now is None:
            return f"{name} was removed since the transform"
        if now != record.original.get(name, now):
            return f"{name} is {tuple(now)} now and {tuple(record.original[name])} in the original"
    return None


def folded_for_original(bio: nn.Module, by: str, instead: str = "keep it with biofx.save(bio, folder)") -> nn.Module:
    """Fold a model whose weights will be loaded into the original model.

    The message of the error names the function that needs it (`by`), and says what to do `instead`.

    Raises:
        ExportError: the original model would compute something else, or its weights have other shapes.
    """
    bio = transformed(bio)
    plain, reason = fold(bio), why_weights_do_not_suffice(bio) or why_architecture_differs(bio)
    if isinstance(plain, fx.GraphModule) and record_of(bio).model_class is not None:
        reason = reason or "the graph was edited, which no weight can express"
    for run in record_of(bio).passes:
        if run.pass_.changes_units and run.weights:
            reason = f"{run.pass_.name} changed the number of units of {', '.join(sorted(run.weights))}"
    if reason is not None:
        raise ExportError(
            f"{by}: {type(bio).__name__} cannot load the weights of this model: {reason}; {instead}, or "
            "torch.save(biofx.fold(bio), path)"
        )
    return plain


def _copy(bio: fx.GraphModule) -> CapturedModule:
    try:
        plain = copied(bio)
    except Exception as error:
        advice = "remove what copy.deepcopy refuses"
        if any(is_sharded(parameter) for parameter in bio.parameters()):
            advice = (
                "it is sharded, so transform the original model again, load the whole state into it, and fold it: "
                "other.load_state_dict(get_model_state_dict(bio, options=StateDictOptions(full_state_dict=True))), "
                "on all ranks, with torch.distributed.checkpoint.state_dict"
            )
        raise ArgumentError(f"fold: {type(bio).__name__} cannot be copied: {error}; {advice}") from error
    assert isinstance(plain, CapturedModule)
    return plain


def _drop_observers(graph: fx.Graph) -> None:
    for node, origin in reversed(list(inserted_nodes(graph))):
        if origin.slot is Slot.OBSERVER or (node.op == "get_attr" and not node.users):  # or their state
            graph.erase_node(node)


def _drop_state(plain: fx.GraphModule) -> None:
    delattr(plain, RECORD)
    plain.meta.pop(RECORD, None)
    for node in plain.graph.nodes:
        node.meta.pop(RECORD, None)
    for key, hook in list(plain._forward_pre_hooks.items()):
        if str(getattr(hook, "__module__", "")).partition(".")[0] == "biofx":  # as of an attachment, not of the user
            del plain._forward_pre_hooks[key]


def _fill(into: nn.Module, plain: nn.Module) -> nn.Module:
    ours, theirs = _tensors(plain), _tensors(into)
    persistent = plain.state_dict().keys() | into.state_dict().keys()
    for name in dict.fromkeys([*ours, *theirs]):
        here, there = (f"{tuple(x[name].shape)}" if name in x else "missing" for x in (ours, theirs))
        if here != there and (name in persistent or "missing" not in (here, there)):
            raise ArgumentError(
                f"fold: {type(into).__name__} is not the model that was transformed: "
                f"{name} is {here} in the folded model and {there} in this one"
            )
    into.load_state_dict(plain.state_dict(), strict=False)  # shapes were checked; extra state may be missing in one
    theirs = _tensors(into)
    with torch.no_grad():
        for name in ours.keys() & theirs.keys():  # also what hooks left out of the state, or changed in it
            theirs[name].copy_(ours[name])
    return into


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all their names, whether `state_dict` holds them or not."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
