"""Export of the folded model, for inference elsewhere."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from biofx.capture import split_inputs
from biofx.errors import ArgumentError, ExportError
from biofx.fold import fold

SUFFIXES = (".pt2", ".onnx", ".safetensors")


def export(bio: nn.Module, path: str | Path, example_inputs: Any = None) -> None:
    """Write the folded model to a file whose suffix says how. It holds no `biofx` operator.

    - `.pt2`: a program of `torch.export`, to be loaded with `torch.export.load`.
    - `.onnx`: an ONNX model by PyTorch's exporter, checked against ONNX Runtime on the example inputs.
    - `.safetensors`: the folded state, with the original's names and shapes.

    Dimensions are fixed to those of the example inputs, but for the first axis of an ONNX model's inputs, the batch,
    which is dynamic where the model allows it.

    Args:
        bio: a model made by `biofx.transform`.
        path: the file; its folder must exist.
        example_inputs: arguments of the model, as for `transform`. Needed for `.pt2` and `.onnx`.

    Raises:
        ArgumentError: unknown suffix, or no example inputs where they are needed.
        ExportError: a package is missing, the exporter refuses the model, or ONNX Runtime disagrees with it.

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
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"export: unknown suffix {path.suffix!r} of {path.name}; known are {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"export: there is no folder {path.parent}; create it first")
    if path.suffix != ".safetensors" and example_inputs is None:
        raise ArgumentError(f"export: {path.suffix} needs example_inputs, such as example_inputs=(x,)")
    args, kwargs = split_inputs(example_inputs)
    plain = fold(bio).eval()
    if path.suffix == ".safetensors":
        _safetensors(plain, path)
    elif path.suffix == ".pt2":
        torch.export.save(_program(plain, args, kwargs), path)
    else:
        _onnx(plain, path, args, kwargs)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"export: {package} is not installed; pip install 'biofx[export]'") from error


def _safetensors(plain: nn.Module, path: Path) -> None:
    save_file = _require("safetensors.torch").save_file
    # The format refuses tensors that share memory, so a tied weight is written under each of its names.
    save_file({name: value.detach().clone().contiguous() for name, value in plain.state_dict().items()}, path)


def _program(plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(plain, args, kwargs)
    except Exception as error:
        raise ExportError(f"export: torch.export cannot export {type(plain).__name__}: {error}") from error


def _onnx(plain: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    shapes = {
        name: {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.shape[:1] > (1,) else None
        for name, value in inspect.signature(plain.forward).bind(*args, **kwargs).arguments.items()
    }
    try:
        torch.onnx.export(
            plain, args, path, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False
        )
    except Exception as error:
        raise ExportError(f"export: torch.onnx cannot export {type(plain).__name__}: {error}") from error
    _check_onnx(plain, path, args, kwargs)


def _check_onnx(plain: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    session = _require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    feed = {port.name: x.detach().cpu().numpy() for port, x in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        outputs = [x for x in pytree.tree_leaves(plain(*args, **kwargs)) if isinstance(x, torch.Tensor)]
    for index, (ours, theirs) in enumerate(zip(outputs, session.run(None, feed), strict=True)):
        reference = ours.detach().cpu()
        tolerance = torch.finfo(reference.dtype).eps ** 0.5 * max(1.0, float(reference.abs().max()))
        if not torch.allclose(torch.from_numpy(theirs), reference, rtol=0, atol=tolerance):
            raise ExportError(f"export: output {index} of {path.name} differs between ONNX Runtime and PyTorch")
