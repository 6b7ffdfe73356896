"""Export: writes the folded model to a file, for inference without biofx."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from biofx.base.comparison import difference
from biofx.base.errors import ArgumentError, ExportError
from biofx.base.isolation import run_in_eval_mode, split_inputs
from biofx.base.torch_internals import pytree
from biofx.model.provenance import transformed
from biofx.output.fold import fold, why_weights_do_not_suffice
from biofx.output.packages import require


def export(bio: nn.Module, path: str | Path, example_inputs: Any = None) -> None:
    """Write the folded model to a file, in the format of its suffix and without `biofx` operators.

    The file appears when it is complete and checked. An export that fails does not touch an existing file.

    - `.pt2`: a program of `torch.export`, to be loaded with `torch.export.load`.
    - `.onnx`: an ONNX model by PyTorch's exporter, checked against ONNX Runtime on the example inputs.
    - `.safetensors`: the folded state, with the original's names and shapes, to be loaded into the original model.

    Dimensions are fixed to those of the example inputs, except the batch (the first axis of an ONNX model's inputs),
    which is dynamic if the model allows it. A `.pt2` program takes its arguments like the example inputs: by position
    or by keyword.

    Args:
        bio: a model made by `biofx.transform`.
        path: the file; its folder must exist.
        example_inputs: arguments of the model, as for `transform`. Needed for `.pt2` and `.onnx`.

    Raises:
        ArgumentError: the path is invalid, or example inputs are missing or do not fit.
        ExportError: a package is missing, the format cannot hold the model, or ONNX Runtime computes another output.

    Example:
        >>> import biofx, pathlib, tempfile, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), [passes.SplitSynapses()])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt2"
        >>> x = torch.randn(5, 3)
        >>> biofx.export(bio, path, example_inputs=(x,))
        >>> torch.allclose(torch.export.load(path).module()(x), bio(x), atol=1e-6)
        True
    """
    path = Path(path)
    if path.suffix not in {*PROGRAMS, *WEIGHTS}:
        raise ArgumentError(
            f"export: unknown suffix {path.suffix!r} of {path.name}; known are {', '.join([*PROGRAMS, *WEIGHTS])}"
        )
    if not path.parent.is_dir():
        raise ArgumentError(f"export: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ArgumentError(f"export: {path} is a folder; give the path of a file")
    if path.suffix in PROGRAMS and example_inputs is None:
        raise ArgumentError(f"export: {path.suffix} needs example_inputs, such as example_inputs=(x,)")
    rewired = why_weights_do_not_suffice(transformed(bio))
    if path.suffix in WEIGHTS and rewired is not None:
        raise ExportError(f"export: {path.suffix} holds weights only: {rewired}; use {' or '.join(PROGRAMS)}")
    plain = fold(bio).eval()
    with TemporaryDirectory(prefix=".biofx-", dir=path.parent) as folder:
        unchecked = Path(folder) / path.name
        if path.suffix in PROGRAMS:
            PROGRAMS[path.suffix](plain, unchecked, example_inputs)
        else:
            WEIGHTS[path.suffix](plain, unchecked)
        unchecked.replace(path)


@contextmanager
def _export_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ExportError(f"export: {what}: {error}") from error


def _safetensors(plain: nn.Module, path: Path) -> None:
    save_file = require("safetensors.torch", "export").save_file
    state = plain.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ExportError(
                f"export: safetensors holds tensors only, and {name} is an instance of {type(value).__name__}; "
                "use torch.save(biofx.fold(bio).state_dict(), path)"
            )
    with _export_error(f"safetensors cannot hold {type(plain).__name__}"):
        # The format refuses tensors that share memory, so a tied weight is written under each of its names.
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, path)


def _pt2(plain: nn.Module, path: Path, example_inputs: Any) -> None:
    program = _program(plain, *_in_order(plain, example_inputs))
    with _export_error(f"torch.export cannot save {type(plain).__name__}"):
        torch.export.save(program, path)


def _in_order(plain: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checked example inputs, with keyword arguments in the order of the signature."""
    args, kwargs = split_inputs(example_inputs)
    signature = inspect.signature(plain.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"export: example_inputs do not fit {type(plain).__name__}.forward{signature}: {error}"
        ) from error
    return args, {name: kwargs[name] for name in signature.parameters if name in kwargs}


def _program(
    plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any = None
) -> torch.export.ExportedProgram:
    with _export_error(f"torch.export cannot export {type(plain).__name__}"), torch.no_grad():
        return torch.export.export(_as_module(plain), args, kwargs, dynamic_shapes=dynamic)


def _as_module(plain: nn.Module) -> nn.Module:
    """The folded model with its generated code as its forward, but without its graph.

    torch.export would interpret the graph of a `GraphModule`, with keyword arguments by position and without hooks.
    """
    if not isinstance(plain, fx.GraphModule):
        return plain
    module: nn.Module = type(type(plain).__name__, (nn.Module,), {"forward": type(plain).forward})()
    vars(module).update(vars(plain))
    return module


def _onnx(plain: nn.Module, path: Path, example_inputs: Any) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    args, kwargs = _in_order(plain, example_inputs)
    bound = inspect.signature(plain.forward).bind(*args, **kwargs)
    program = _program(plain, args, kwargs, pytree.tree_map(_dynamic_batch, dict(bound.arguments)))
    with _export_error(f"torch.onnx cannot export {type(plain).__name__}"):
        torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    inputs = dict(zip(names, pytree.tree_leaves((args, kwargs)), strict=True))
    found = difference(run_in_eval_mode(plain, example_inputs), _run_onnx(path, inputs))
    if found is not None:
        raise ExportError(f"export: ONNX Runtime disagrees with PyTorch on {path.name}: {found}")


def _dynamic_batch(value: Any) -> dict[int, Any] | None:
    return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.shape[:1] > (1,) else None


def _run_onnx(path: Path, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with _export_error(f"ONNX Runtime cannot run {path.name}"):
        session = require("onnxruntime", "export").InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {port.name: inputs[port.name].detach().cpu().numpy() for port in session.get_inputs()}
        return [torch.from_numpy(output) for output in session.run(None, feed)]


# What writes a folded model, by suffix: as a program, which needs example inputs, or as weights alone.
PROGRAMS: dict[str, Callable[[nn.Module, Path, Any], None]] = {".pt2": _pt2, ".onnx": _onnx}
WEIGHTS: dict[str, Callable[[nn.Module, Path], None]] = {".safetensors": _safetensors}
