"""Checkpoints: a model with synapses loads its own, those of earlier versions of biofx, and the original model's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.errors import ArgumentError
from biofx.base.option_values import described_options
from biofx.model.plain_weights import PLAIN_CHECKPOINT, stored_for
from biofx.model.provenance import record_of
from biofx.model.synapses import CHILD, Synapses, child_of

METADATA_KEY = "biofx"  # the key of `passes_of` in the metadata of a `state_dict`, which `torch.save` keeps


def converted_checkpoint(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool, assign: bool = False
) -> Mapping[str, Any]:
    """Convert a checkpoint to the names and shapes of a transformed model.

    A checkpoint of the original model has weights and no state of passes. Each weight is distributed over its synapses
    in proportion to their present sizes, and the state keeps its present values.

    Args:
        model: the transformed model.
        state_dict: the checkpoint.
        strict: refuse a checkpoint that does not fit.
        assign: whether its tensors become those of the model, which would separate tied weights.

    Raises:
        ArgumentError: if `strict`, the checkpoint is from another pipeline, or from the same passes with other options;
            names the first difference. Or a weight of the original model violates the signs of its units.
    """
    result = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    owned = list(_owned(model))
    vars(result)["_metadata"] = _metadata_of_owners(model, owned) if metadata is None else metadata
    ours = f"{CHILD.format('')}."
    is_plain = not any(ours in name for name in state_dict) and not any(_has_old_state(*each, result) for each in owned)
    waits = is_plain and any(_loads_itself(module) for module in model.modules())
    for name, child in owned:
        place = _child_path(name)
        if is_plain:
            _refuse_without_values(model, name, child)
        for key in child.users:
            _rename(result, f"{name}_{key}", f"{place}.{key}")
            if is_plain and f"{place}.{key}" not in result:
                result[f"{place}.{key}"] = getattr(child, key)
        if waits:  # for the model's own code to see the weight under its name; then its module distributes it
            continue
        _rename(result, name, f"{place}.{child.stored_name}")
        given = result.get(f"{place}.{child.stored_name}")
        if isinstance(given, Tensor) and is_plain:
            result[f"{place}.{child.stored_name}"] = stored_for(name, child, given)
    if assign:
        _refuse_untied(owned, result)
    if strict:
        title = PLAIN_CHECKPOINT if is_plain else f"the checkpoint is from another pipeline than {record_of(model)}"
        _refuse_difference(model, owned, result, title)
        _refuse_other_options(model, (metadata or {}).get(""))
    return result


def passes_of(model: nn.Module) -> list[dict[str, Any]]:
    """The passes that made a model, with all options and the weights that each changed, for the metadata of a state."""
    return [
        {
            "pass": run.pass_.name,
            "options": described_options(run.pass_, run.pass_.converted),
            "weights": sorted(run.weights),
        }
        for run in record_of(model).passes
    ]


def other_option(model: nn.Module, metadata: Mapping[str, Any] | None) -> str | None:
    """Describe the first option in which a checkpoint differs from a model, by its metadata; None if none does."""
    theirs = (metadata or {}).get(METADATA_KEY, ())
    for own, other in ((own, other) for own in passes_of(model) for other in theirs):
        shared = sorted({*own["weights"]}.intersection(other["weights"]))
        if own["pass"] == other["pass"] and shared:
            for option, value in own["options"].items():
                given = other["options"].get(option, value)
                if given != value:
                    return f"{own['pass']} of {shared[0]} has {option}={given} in it and {option}={value} here"
    return None


def _owned(model: nn.Module) -> Iterator[tuple[str, Synapses]]:
    """All synapses, once for each name of their weight in the original model."""
    for path, owner in model.named_modules(remove_duplicate=False):
        for key in owner._parameters:
            child = child_of(owner, key)
            if child is not None:
                yield f"{path}.{key}".lstrip("."), child


def _metadata_of_owners(model: nn.Module, owned: list[tuple[str, Synapses]]) -> dict[str, Any]:
    """The present metadata of the modules with synapses.

    Without it, `torch.nn.utils.spectral_norm` tells the version of a checkpoint by the names of parameters, which are
    those of synapses.
    """
    paths = {name.rpartition(".")[0] for name, _ in owned}
    present = getattr(model.state_dict(keep_vars=True), "_metadata", {})
    return {path: metadata for path, metadata in present.items() if path in paths}


def _child_path(name: str) -> str:
    path, _, key = name.rpartition(".")
    return f"{path}.{CHILD.format(key)}".lstrip(".")


def _loads_itself(module: nn.Module) -> bool:
    """Whether code of the model looks at what a module loads, as to rename, scale or reshape it."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] not in ("torch", "biofx")]
    overrides = any(name in vars(cls) for cls in classes for name in ("load_state_dict", "_load_from_state_dict"))
    return overrides or bool(module._load_state_dict_pre_hooks)


def _has_old_state(name: str, child: Synapses, state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint names state as earlier versions of biofx did, such as `fc.weight_gain`."""
    return any(f"{name}_{key}" in state for key in child.users)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    if old in state and new not in state:
        state[new] = state.pop(old)


def _refuse_without_values(model: nn.Module, name: str, child: Synapses) -> None:
    if child.stored.is_meta and (child.users or child.is_computed):
        raise ArgumentError(
            f"{PLAIN_CHECKPOINT}: what {record_of(model)} keeps with {name} has values neither in this checkpoint nor "
            "on the meta device"
        )


def _refuse_other_options(model: nn.Module, metadata: Mapping[str, Any] | None) -> None:
    found = other_option(model, metadata)
    if found is not None:
        raise ArgumentError(
            f"the checkpoint is from the same passes with other options: {found}; transform the model with those, "
            "or load it with strict=False"
        )


def _refuse_untied(owned: list[tuple[str, Synapses]], state: Mapping[str, Any]) -> None:
    first: dict[Synapses, tuple[str, Tensor]] = {}
    for name, child in owned:
        given = state.get(name, state.get(f"{_child_path(name)}.{child.stored_name}"))
        other, value = first.setdefault(child, (name, given))
        is_other = given is not value and isinstance(given, Tensor) and isinstance(value, Tensor)
        if is_other and not torch.equal(given, value):
            raise ArgumentError(
                f"{name} is tied to {other} in this model, and has other values in the checkpoint; load it into the "
                "original model with assign=True, which separates them, and transform that"
            )


def _refuse_difference(
    model: nn.Module, owned: list[tuple[str, Synapses]], state: Mapping[str, Any], title: str
) -> None:
    def error(difference: str) -> ArgumentError:
        return ArgumentError(f"{title}: {difference}")

    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    of_synapses = (f"{_child_path(name)}.{key}" for name, child in owned for key in child.state_dict())
    own = {*of_synapses, *(name for name, _ in tensors)}
    for name, child in owned:
        place = _child_path(name)
        for key, by in child.users.items():
            if f"{place}.{key}" not in state:
                raise error(f"it has no {place}.{key}, which {', '.join(by)} keeps here")
        given = state.get(f"{place}.{child.stored_name}")
        if isinstance(given, Tensor) and given.shape != child.stored.shape:
            raise error(f"{name} is {tuple(given.shape)} in it and {tuple(child.stored.shape)} here")
    ends = CHILD.format("")
    for name in state:
        if name not in own and f"{ends}." in name:
            raise error(f"it has {name}, which no pass keeps here")
