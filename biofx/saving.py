"""Saving: a transformed model as a folder, with all that training needs, and without pickle."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.base.copying import copied
from biofx.base.errors import ArgumentError, SavingError
from biofx.base.option_values import read_option, written_options
from biofx.base.packages import require
from biofx.capture.captured_module import refuse_derived
from biofx.capture.tracer import HelperModule
from biofx.compiler import build
from biofx.model.changes import transformed
from biofx.model.fingerprint import fingerprint
from biofx.model.provenance import Request, empty_places, is_transformed, record_of, shapes
from biofx.model.synapses import is_parameter, synapses_in
from biofx.rewrite.registry import Pass, registered_passes

PIPELINE, STATE = "pipeline.json", "state.safetensors"
UNFINISHED = ".biofx-"
FORMAT = 2  # of both files; raised when an older biofx could not read them


def save(bio: nn.Module, folder: str | Path) -> None:
    """Write a transformed model to a folder, from which `biofx.load` builds it again, bit for bit.

    - `pipeline.json`: how the model was made: passes with their options, seed, front end, excluded weights.
    - `state.safetensors`: all values: stored weights, gains, signs, counters, buffers. Buffers that are not persistent
      are in it as well.

    Other files in the folder stay, so the optimizer's state can lie next to them:
    `torch.save(optimizer.state_dict(), folder / "optimizer.pt")`. Whatever happens while they are written, the folder
    holds the old model or the new one. Among several processes, call it in one.

    What the model's class and its constructor define (code, attributes, hooks) is not in the folder; `load` takes it
    from an instance of the original model.

    Args:
        bio: a model made by `biofx.transform`; of a model that is compiled or wrapped in `DistributedDataParallel`, the
            model inside is saved.
        folder: the folder; it is created if its parent exists.

    Raises:
        ArgumentError: the folder cannot be created there, or `bio` was not made by `biofx.transform`.
        SavingError: the files cannot hold the model: its graph was edited, an option has no name, a tensor is sharded
            or has no values …; or they cannot be written.

    Example:
        >>> import biofx, pathlib, tempfile, torch
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), "split-synapses,fuzzy-learning-rates")
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> biofx.save(bio, folder)
        >>> same = biofx.load(folder, torch.nn.Linear(3, 2))
        >>> all(torch.equal(value, same.state_dict()[name]) for name, value in bio.state_dict().items())
        True
    """
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise ArgumentError(f"save: there is no folder {folder.parent}; create it first")
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"save: {folder} is a file; give the path of a folder")
    bio = transformed(bio)
    refuse_derived(bio)
    state = _state(bio)
    _write(folder, _described(bio) | _layouts(bio, state), _tensors(state))


def load(folder: str | Path, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Build the transformed model that `biofx.save` wrote to a folder, bit for bit.

    A copy of `model` is transformed as the saved model was, and gets its values, dtypes, modes, and which parameters
    are frozen. Devices are those of `model`.

    Args:
        folder: the folder.
        model: an instance of the original model; its values do not matter, and it is not changed.
        example_inputs: as for `transform`, and needed where that needed them.

    Returns:
        The model. It has the same parameters in the same order, so that a saved state of the optimizer fits:
        `optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))`, and then `biofx.attach(bio, optimizer)`.

    Raises:
        ArgumentError: `model` is not the original model: names the first weight that differs. Or it is transformed.
        SavingError: a file is missing, damaged, or of a newer biofx; a pass or a function that it names is unknown.
        Whatever `transform` raises.

    Example:
        >>> import biofx, pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> biofx.save(biofx.transform(torch.nn.Linear(3, 2), "split-synapses"), folder)
        >>> biofx.load(folder, torch.nn.Linear(3, 4))
        Traceback (most recent call last):
        biofx.base.errors.ArgumentError: load: Linear is not the saved model: weight is (2, 3) there and (4, 3) here
    """
    folder = Path(folder)
    document = _read_pipeline(folder)
    requests = [_request(folder, each) for each in document["transforms"]]
    state = _read_state(folder, document)
    if is_transformed(model):
        raise ArgumentError("load: model is transformed; give an instance of the original model")
    bio: Any = model
    if isinstance(model, nn.Module):
        ties = document.get("ties", {})
        bio = _untied(model, ties) if ties else model
        _refuse_difference(model, document["parameters"], _written_shapes(shapes(bio.named_parameters())))
    for request in requests:
        bio = build(bio, request, example_inputs, inplace=bio is not model, verify=False, values_will_be_loaded=True)
    for name, first in document.get("ties", {}).items():
        setattr(*_place(bio, name), getattr(*_place(bio, first)))
    bio = transformed(bio)
    hint = ""
    if example_inputs is None and any(request.has_inputs for request in requests):
        hint = "; it was transformed with example_inputs, so give load example_inputs as well"
    _refuse_difference(model, document["weights"], _weights(bio), hint)
    _fill(bio, document, state, hint)
    return bio  # type: ignore[no-any-return]


def _untied(model: nn.Module, ties: Iterable[str]) -> nn.Module:
    """Return a copy of a model in which the parameters are not tied that a user tied after the transform."""
    result = copied(model)
    first = {id(module): path for path, module in reversed([*result.named_modules()])}
    for name in ties:
        path = name.rpartition(".")[0]
        if not is_parameter(result, name):
            continue
        owner, key = _place(result, name)
        if first.get(id(owner), path) != path:  # the whole module is at two places
            owner = copy.deepcopy(owner)
            setattr(*_place(result, path), owner)
        setattr(owner, key, nn.Parameter(getattr(owner, key).detach().clone(), getattr(owner, key).requires_grad))
    return result


def _described(bio: fx.GraphModule) -> dict[str, Any]:
    """What a folder says of a model besides its values."""
    record = record_of(bio)
    if record.by_hand:
        raise SavingError(
            "save: the rules of this model are called by hand; save its state_dict(), and load that into a model that "
            "BioConverter made with the same options"
        )
    for name, what in record.changed.items():
        raise SavingError(
            f"save: {name} was {what} since the transform, and load makes the model as it was then; use "
            "torch.save(bio, path), or change the original model, and then transform it"
        )
    if fingerprint(bio) != record.captured:
        raise SavingError("save: its graph was edited since the transform; use torch.save(bio, path)")
    for request in record.requests:
        for pass_ in request.passes:
            if registered_passes().get(pass_.name) is not type(pass_):
                raise SavingError(
                    f"save: {type(pass_).__name__} is not registered, so load could not find it; decorate it with "
                    "@passes.register, then transform the model"
                )
    return {
        "transforms": [_written_request(request) for request in record.requests],
        "parameters": _written_shapes(record.original),
        "ties": record.ties,
        "weights": _weights(bio),
        "passes": [{"left": run.left, "remarks": run.remarks} for run in record.passes],
        "nonnegative": record.nonnegative,
        "notes": record.notes,
        "asked": record.asked,
    }


def _written_request(request: Request) -> dict[str, Any]:
    passes = []
    for pass_ in request.passes:
        try:
            options = written_options(pass_)
        except SavingError as error:
            raise SavingError(f"save: {pass_.name}: {error}") from error
        passes.append({"name": pass_.name, "options": options, "module": type(pass_).__module__})
    return {
        "passes": passes,
        "frontend": request.frontend,
        "exclude": list(request.exclude),
        "seed": request.seed,
        "example_inputs": request.has_inputs,
    }


def _request(folder: Path, written: Mapping[str, Any]) -> Request:
    passes = tuple(_pass(folder, each) for each in written["passes"])
    return Request(
        passes, written["frontend"], tuple(written["exclude"]), written["seed"], bool(written["example_inputs"])
    )


def _pass(folder: Path, written: Mapping[str, Any]) -> Pass:
    name, found = written["name"], registered_passes().get(written["name"])
    if found is None:
        raise SavingError(f"load: {folder} needs the pass {name}, which is not registered; import {written['module']}")
    options = {key: read_option(value, f"load: {name}: {key}") for key, value in written["options"].items()}
    try:
        return found(**options)
    except TypeError as error:
        raise SavingError(f"load: {folder} has options that {name} does not have here: {error}") from error


def _written_shapes(given: Mapping[str, torch.Size]) -> dict[str, str]:
    return {name: str(tuple(shape)) for name, shape in given.items()}


def _weights(bio: nn.Module) -> dict[str, str]:
    """What became of each weight that passes changed: its synapses, and the passes."""
    record, synapses = record_of(bio), synapses_in(bio)
    changed = dict.fromkeys(name for run in record.passes for name in sorted(run.weights))
    passes = {name: ", ".join(run.pass_.name for run in record.passes if name in run.weights) for name in changed}
    return {
        name: f"{synapses[name].extra_repr() if name in synapses else 'stored'} by {passes.get(name, 'no pass')}"
        for name in dict.fromkeys([*changed, *synapses])
    }


def _refuse_difference(model: nn.Module, saved: Mapping[str, str], present: Mapping[str, str], hint: str = "") -> None:
    """Refuse a model in which something has another description than in the folder; names the first."""
    for name in dict.fromkeys([*saved, *present]):
        there, here = saved.get(name, "missing"), present.get(name, "missing")
        if there != here:
            raise ArgumentError(
                f"load: {type(model).__name__} is not the saved model: {name} is {there} there and {here} here{hint}"
            )


def _state(bio: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not persistent last; tied ones are the same object."""
    transient = {name: value for name, value in _transient(bio).items() if not _is_of_capture(bio, name)}
    state = _persistent(bio) | transient
    for name, value in state.items():
        what = None
        if type(value) not in (Tensor, nn.Parameter):
            what = f"is an instance of {type(value).__name__}"
        elif value.is_meta:
            what = "is on the meta device and has no values"
        elif value.layout is not torch.strided or value.is_quantized or value.is_nested:
            what = "is not a plain dense tensor"
        elif not _has_written_form(value.dtype):
            what = f"has the dtype {value.dtype}"
        if what is not None:
            raise SavingError(
                f"save: {name} {what}, which {STATE} cannot hold; use torch.save, or for a sharded model "
                "torch.distributed.checkpoint"
            )
    return state


def _persistent(bio: nn.Module) -> dict[str, Tensor]:
    """The `state_dict`, and the model's own tensors where a hook or an override leaves them out, or has others."""
    state: dict[str, Tensor] = bio.state_dict(keep_vars=True)
    state.update(bio.named_parameters())
    state.update((name, value) for name, value in bio.named_buffers() if name in state)
    return state


def _transient(bio: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not persistent."""
    persistent = bio.state_dict(keep_vars=True)
    return {name: x for name, x in bio.named_buffers(remove_duplicate=False) if name not in persistent}


def _is_of_capture(bio: nn.Module, name: str) -> bool:
    """Whether a buffer is a constant of the graph; it follows from example inputs, and load may get other ones."""
    return name in record_of(bio).constants or isinstance(_place(bio, name)[0], HelperModule)


@functools.cache
def _has_written_form(dtype: torch.dtype) -> bool:
    """Whether safetensors can hold numbers of a dtype; complex ones are written as pairs of real ones."""
    try:
        require("safetensors.torch", "save").save({"": _written(torch.empty(0, dtype=dtype))})
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def _written(value: Tensor) -> Tensor:
    plain = value.detach().resolve_conj().resolve_neg().contiguous()
    return torch.view_as_real(plain) if plain.is_complex() else plain


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that have an earlier name as well."""
    first: dict[int, str] = {}
    return {name: first[id(value)] for name, value in state.items() if first.setdefault(id(value), name) != name}


def _ties(aliases: Mapping[str, str]) -> dict[str, str]:
    return {name: f"tied to {first}" for name, first in aliases.items()}


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to be written: each once, and none that is a view of another."""
    aliases, storages, tensors = _aliases(state), set(), {}
    for name, value in state.items():
        if name not in aliases:
            tensor = _written(value)
            tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
            storages.add(tensor.untyped_storage().data_ptr())
    return tensors


def _layouts(bio: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a folder says of tensors and modules that safetensors does not."""
    empty = record_of(bio).empty
    strides = {  # of other memory formats than the default, such as channels_last
        name: list(value.stride())
        for name, value in state.items()
        if value.stride() != torch.empty(value.shape, device="meta").stride()
        and value.stride() == torch.empty_like(value).stride()
    }
    return {
        "tied": _aliases(state),
        "complex": [name for name, value in state.items() if value.is_complex()],
        "empty": empty,
        "emptied": [name for name in empty_places(bio) if name not in empty],
        "strides": strides,
        "transient": {name: str(value.dtype).removeprefix("torch.") for name, value in _transient(bio).items()},
        "frozen": [n for n, x in state.items() if isinstance(x, nn.Parameter) and not x.requires_grad],
        "training": bio.training,
        "other_mode": [name for name, module in bio.named_modules() if module.training is not bio.training],
    }


def _fill(bio: nn.Module, document: Mapping[str, Any], saved: dict[str, Tensor], hint: str) -> None:
    """Give a transformed model the values, and everything else that depended on them or was set since the transform."""
    saved = saved | {name: torch.view_as_complex(saved[name]) for name in document.get("complex", ()) if name in saved}
    tied = document["tied"]
    saved = saved | {name: saved[first] for name, first in tied.items()}
    _fill_places(bio, document, saved)
    state = _persistent(bio)
    values = {name: saved.pop(name) for name in document.get("transient", {}) if name in saved}
    tied = {name: first for name, first in tied.items() if name not in values}
    there, here = (_written_shapes(shapes(each.items())) for each in (saved, state))
    _refuse_difference(bio, there, here, hint)
    _refuse_difference(bio, _ties(tied), _ties(_aliases(state)))
    for name, value in saved.items():
        own, strides = state[name], tuple(document["strides"].get(name, value.stride()))
        if own.dtype is not value.dtype or own.stride() != strides:
            own.data = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=own.device)
    filled = OrderedDict(saved)
    # Modules take a state without metadata for one of an early version, and convert it.
    vars(filled)["_metadata"] = getattr(state, "_metadata", None)
    bio.load_state_dict(filled, strict=False)  # names were compared
    with torch.no_grad():
        for name, value in saved.items():  # which code of the model may have changed while it loaded
            state[name].copy_(value)
    _fill_transient(bio, document, values)
    frozen, other_mode = set(document["frozen"]), set(document["other_mode"])
    for name, own in state.items():
        if isinstance(own, nn.Parameter):
            own.requires_grad_(name not in frozen)
    for name, module in bio.named_modules():
        module.training = document["training"] is not (name in other_mode)
    record = record_of(bio)
    record.nonnegative, record.notes = dict(document["nonnegative"]), list(document["notes"])
    record.asked = document.get("asked", "")
    record.passes = [replace(run, **kept) for run, kept in zip(record.passes, document["passes"], strict=True)]


def _fill_places(bio: nn.Module, document: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Register what has become a tensor since the transform, and None for what has become None."""
    for name in document.get("emptied", ()):
        owner, key = _place(bio, name)
        if key in owner._buffers:
            owner._buffers[key] = None
    device = next(iter((*bio.parameters(), *bio.buffers()))).device
    for name in saved.keys() & set(document.get("empty", ())) & set(empty_places(bio)):
        (owner, key), value = _place(bio, name), torch.empty_like(saved[name], device=device)
        if key in owner._buffers:
            owner._buffers[key] = value
        else:
            owner._parameters[key] = nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())


def _fill_transient(bio: nn.Module, document: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Give buffers that are not persistent their dtypes and values, if the model has them: forward makes the others."""
    dtypes = document.get("transient", {})  # which folders of format 1 do not have
    filled: dict[int, Tensor] = {}  # so that tied ones stay tied
    for name, own in _transient(bio).items():
        if name not in dtypes:
            continue
        given = values.get(name, own)
        value = given.to(own.device, getattr(torch, dtypes[name]))
        if value.dtype is not own.dtype or (given is not own and not torch.equal(value, own)):
            owner, key = _place(bio, name)
            strides = document["strides"].get(name, value.stride())
            placed = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
            owner._buffers[key] = filled.setdefault(id(given), placed.copy_(value))


def _place(bio: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return bio.get_submodule(path), key


def _write(folder: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace both files by renaming one: the pipeline says which state belongs to it."""
    safetensors, save_file = require("safetensors", "save"), require("safetensors.torch", "save").save_file
    try:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(f"{UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(left)
        with TemporaryDirectory(prefix=UNFINISHED, dir=folder) as temporary:
            state, pipeline = Path(temporary) / STATE, Path(temporary) / PIPELINE
            save_file(tensors, state)
            digest = _digest(state)
            pipeline.write_text(_signed({"format": FORMAT, "biofx": version("biofx"), **document, "state": digest}))
            for path in (state, pipeline):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            named = folder / _named(digest)
            state.replace(named)
            pipeline.replace(folder / PIPELINE)  # now the folder holds the new model
            named.replace(folder / STATE)
        for left in folder.glob(_named("*")):
            left.unlink()
    except (OSError, safetensors.SafetensorError) as error:
        raise SavingError(f"save: {folder} cannot be written: {error}") from error


def _named(digest: str) -> str:
    """The name of a state until it has taken the place of the one before."""
    return f"state-{digest[:16]}.safetensors"


def _signed(document: dict[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    return json.dumps(document | {"checksum": checksum}, indent=2) + "\n"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_pipeline(folder: Path) -> dict[str, Any]:
    path = folder / PIPELINE
    if not path.is_file():
        raise SavingError(f"load: there is no {path}; give a folder that biofx.save wrote")
    try:
        document = json.loads(path.read_text())
        written, checksum = int(document["format"]), document.pop("checksum")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SavingError(f"load: {path} is damaged: {error!r}") from error
    if written > FORMAT:
        raise SavingError(
            f"load: {path} has format {written}, by biofx {document.get('biofx')}, and this biofx {version('biofx')} "
            f"reads {FORMAT}; upgrade it"
        )
    if hashlib.sha256(json.dumps(document).encode()).hexdigest() != checksum:
        raise SavingError(f"load: {path} is damaged, or was edited: its checksum differs")
    return document  # type: ignore[no-any-return]


def _read_state(folder: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    load_file = require("safetensors.torch", "load").load_file
    digest = document["state"]
    path = next((path for path in (folder / _named(digest), folder / STATE) if path.is_file()), None)
    if path is None:
        raise SavingError(f"load: there is no {folder / STATE}, to which {PIPELINE} belongs")
    if _digest(path) != digest:
        raise SavingError(f"load: {path} is damaged, or belongs to another {PIPELINE}: its checksum differs")
    return load_file(path)  # type: ignore[no-any-return]
