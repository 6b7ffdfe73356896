"""Definitions: the operators `torch.ops.biofx.*`, and the functions that stand behind their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.torch_internals import qualified_name

NAMESPACE = "biofx"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_INVERSES: dict[str, Callable[..., Tensor]] = {}  # by the operator's name
_VERSION = re.compile(r"__\d+$")  # behind the name of an operator that was defined again
_ORIGINS: dict[str, str] = {}  # the module and the function that define an operator, by its name as the author wrote it
_COUNTS: Counter[str] = Counter()  # how often each was defined


def name_of(target: Any) -> str:
    """Return the name of an operator of biofx without its overload; empty for other targets."""
    namespace, _, name = (qualified_name(target) or "").partition("::")
    return name if namespace == NAMESPACE else ""


def written_name(name: str) -> str:
    """The name of an operator as its author wrote it, without the number of its definition."""
    return _VERSION.sub("", name)


def operator_of(name: str) -> Any:
    """The operator of biofx that has a name now.

    Raises:
        PipelineError: there is none.
    """
    operator = getattr(torch.ops.biofx, written_name(name), None)
    if operator is None:
        raise PipelineError(
            f"the model uses the operator biofx.{written_name(name)}, which nobody has defined here; "
            "import the module, or run the cell, that defines it, and load the model again"
        )
    return operator


def new_name(what: str, written: str, function: Callable[..., Any]) -> str:
    """The name of a new operator: as it was written, and the number of the definition: it may be defined again.

    An operator is never changed: a model, compiled or not, runs the code that it was made with. The
    name that was written stands for the last definition (`show`). Operators of biofx itself have no number.
    """
    origin = f"{function.__module__}.{function.__qualname__}"
    if _ORIGINS.setdefault(written, origin) != origin:
        raise ArgumentError(
            f"operators.{what}: {origin} defines biofx.{written}, which {_ORIGINS[written]} defines already; "
            "give one of them another name"
        )
    _COUNTS[written] += 1
    packet, dot, overload = written.partition(".")
    is_only = _COUNTS[written] == 1 and origin.startswith(f"{NAMESPACE}.")
    return packet + ("" if is_only else f"__{_COUNTS[written]}") + dot + overload


def show(name: str) -> None:
    """Make `torch.ops.biofx.<name>`, as its author wrote it, the operator that was defined last."""
    packet = name.partition(".")[0]
    if packet != written_name(packet):
        vars(torch.ops.biofx).pop(packet, None)  # it may have got an overload
        setattr(torch.ops.biofx, written_name(packet), getattr(torch.ops.biofx, packet))


def define_operator(
    name: str, signature: str, kernel: Callable[..., Tensor], inverse: Callable[..., Tensor] | None = None
) -> None:
    """Register `torch.ops.biofx.<name>`, an operator on a weight; its other arguments broadcast against the weight.

    Args:
        name: the operator's name; an overload follows after a dot.
        signature: its arguments and result in the dispatcher's language: `"(Tensor weight) -> Tensor"`.
        kernel: its implementation, in operators that autograd differentiates.
        inverse: with the same arguments, a weight from which the operator computes the given one, where there is one.
    """
    if inverse is not None:
        _INVERSES[name] = inverse
    LIBRARY.define(name + signature)
    LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
    LIBRARY.impl(name, kernel, "FuncTorchBatched")  # vmap then maps the operators that the kernel calls


def inverse_of(target: Any) -> Callable[..., Tensor] | None:
    """The inverse of an operator, if one was defined with it."""
    return _INVERSES.get(name_of(target))
