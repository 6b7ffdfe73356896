"""Call sites: the function and the line of source by which people know an operation."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import torch

from biofx.base.torch_internals import OpOverload, schema_of

_REFLECTED = {f"r{name}": name for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "floordiv", "mod")}
_OWN = tuple(
    os.path.join(os.path.dirname(str(package.__file__)), "")
    for package in (torch, sys.modules[str(__package__).partition(".")[0]])
)


def short_name(function: Any) -> str:
    """The name of a function or an operator, without underscores around it."""
    if isinstance(function, OpOverload):
        return str(schema_of(function).name).rpartition("::")[2]
    name = str(getattr(function, "__name__", function))
    if not name.startswith("__"):
        return name
    name = name.strip("_")
    return _REFLECTED.get(name, name)


def place_in_source() -> tuple[str, int] | None:
    """The innermost line outside of PyTorch and biofx that runs."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if not file.startswith(("<", *_OWN)) and not file.endswith(("contextlib.py",)):
            return file, line
    return None
