"""Export: writes the folded model to a file, for inference without biofx."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from biofx.base.contents import tensors_in
from biofx.base.errors import ArgumentError, ExportError
from biofx.base.files import completed, path_of_file
from biofx.base.isolation import refuse_misfit, run_in_mode, split_inputs
from biofx.base.packages import require
from biofx.base.precision import amplification, outputs_differ
from biofx.base.torch_internals import pytree
from biofx.output.fold import fold, folded_for_original

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a call, by position and by keyword


def export(bio: nn.Module, path: str | Path, example_inputs: Any = None) -> None:
    """Write the folded model to a file, in the format of its suffix and without `biofx` operators.

    The file appears when it is complete and checked. An export that fails does not touch an existing file.

    - `.pt2`: a program of `torch.export`, to be loaded with `torch.export.load`.
    - `.onnx`: an ONNX model by PyTorch's exporter, checked against ONNX Runtime on the example inputs.
    - `.safetensors`: the folded state, with the original's names and shapes, to be loaded into the original model.

    A program takes inputs of any sizes that the model allows: batches, and sequences or images where no weight fixes
    them. If the exporter cannot follow that, only the batch (the first axis of each tensor) is dynamic, or nothing is.
    Numbers of axes, dtypes and arguments that are not tensors are those of the example inputs; so are the decisions
    that the model takes by sizes. A `.pt2` program takes its arguments like the example inputs: by position or by
    keyword. A batch of 1 is as good an example as any.

    Args:
        bio: a model made by `biofx.transform`.
        path: the file; its folder must exist.
        example_inputs: arguments of the model, as for `transform`. Needed for `.pt2` and `.onnx`.

    Raises:
        ArgumentError: the path is invalid, or example inputs are missing or do not fit.
        ExportError: a package is missing, the format cannot hold the model, the original could not load the weights, or
            the written program computes another output.

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
    path = path_of_file(path, [*PROGRAMS, *WEIGHTS], "export")
    if path.suffix in PROGRAMS and example_inputs is None:
        raise ArgumentError(f"export: {path.suffix} needs example_inputs, such as example_inputs=(x,)")
    is_program = path.suffix in PROGRAMS
    plain = fold(bio) if is_program else folded_for_original(bio, "export", f"use {' or '.join(PROGRAMS)}")
    plain.eval()
    with completed(path) as unchecked:
        if is_program:
            _write_program(plain, unchecked, example_inputs)
        else:
            WEIGHTS[path.suffix](plain, unchecked)


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


def _write_program(plain: nn.Module, path: Path, example_inputs: Any) -> None:
    """Write a program with as many dynamic axes as the exporter can follow, and check it on the example inputs."""
    args, kwargs = split_inputs(example_inputs)
    try:
        expected = run_in_mode(plain, example_inputs)
    except Exception as error:
        refuse_misfit(plain, args, kwargs, by="export: ")
        raise ArgumentError(f"export: example_inputs do not fit {type(plain).__name__}.forward: {error}") from error
    names = [*inspect.signature(plain.forward).parameters, *kwargs]
    given = args, {name: kwargs[name] for name in names if name in kwargs}  # in the order of the signature
    for inputs, axes in _attempts(given):
        try:
            actual = PROGRAMS[path.suffix](_program(plain, *inputs, axes), path, given)
            found = outputs_differ(plain, example_inputs, expected, actual)
        except ExportError as error:
            failure = error
        else:
            if found is None:
                return
            advice = amplification(plain, example_inputs, expected)
            failure = ExportError(
                f"export: {path.name} computes something else than {type(plain).__name__}: {found}{advice}"
            )
    raise failure


def _attempts(given: Inputs) -> Iterator[tuple[Inputs, slice]]:
    """Example inputs, and the axes of each tensor that are to be dynamic; the best comes first."""
    twice = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x]) if x.shape[:1] == (1,) else x, given)
    if any(old is not new for old, new in zip(*map(pytree.tree_leaves, (given, twice)), strict=True)):
        yield from ((twice, axes) for axes in (slice(None), slice(1)))  # as torch.export takes a size of 1 for constant
    yield from ((given, axes) for axes in (slice(None), slice(1), slice(0)))


def _pt2(program: torch.export.ExportedProgram, path: Path, given: Inputs) -> list[torch.Tensor]:
    with _export_error("torch.export cannot save the model"):
        torch.export.save(program, path)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, given)
    failed = _export_error("torch.export cannot run its program on the example inputs")
    with failed, torch.no_grad(), torch.random.fork_rng():
        return tensors_in(program.module()(*args, **kwargs))


def _program(
    plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: slice
) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            shapes[leaf] = dict.fromkeys(range(leaf.dim())[axes], torch.export.Dim.AUTO)
    name = type(plain).__name__
    with _export_error(f"torch.export cannot export {name}; .safetensors holds weights alone"), torch.no_grad():
        module = _as_module(plain)
        dynamic = shapes.dynamic_shapes(module, args, kwargs)
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)


def _as_module(plain: nn.Module) -> nn.Module:
    """The folded model with its generated code as its forward, but without its graph.

    torch.export would interpret the graph of a `GraphModule`, with keyword arguments by position and without hooks.
    """
    if not isinstance(plain, fx.GraphModule):
        return plain
    module: nn.Module = type(type(plain).__name__, (nn.Module,), {"forward": type(plain).forward})()
    vars(module).update(vars(plain))
    return module


def _onnx(program: torch.export.ExportedProgram, path: Path, given: Inputs) -> list[torch.Tensor]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    with _export_error("torch.onnx cannot export the model; .pt2 holds all that torch.export can"):
        torch.onnx.export(program, (), path, dynamo=True, verbose=False, external_data=False)
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    inputs = dict(zip(names, pytree.tree_leaves(given), strict=True))
    with _export_error(f"ONNX Runtime cannot run {path.name}"):
        session = require("onnxruntime", "export").InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {port.name: inputs[port.name].detach().cpu().numpy() for port in session.get_inputs()}
        return [torch.from_numpy(output) for output in session.run(None, feed)]


# What writes a folded model, by suffix: as a program, which needs example inputs, or as weights alone. A program is run
# on the example inputs when it is written, and its outputs are returned.
PROGRAMS: dict[str, Callable[[torch.export.ExportedProgram, Path, Inputs], list[torch.Tensor]]] = {
    ".pt2": _pt2,
    ".onnx": _onnx,
}
WEIGHTS: dict[str, Callable[[nn.Module, Path], None]] = {".safetensors": _safetensors}
