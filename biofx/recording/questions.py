"""Questions: what Python asks about a parameter apart from its numbers: whether it is frozen, a leaf, its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from biofx.base.torch_internals import ASKED_OF_LEAVES, VERSION

CHANGING: dict[Any, str] = {
    Tensor.requires_grad.__get__: "asks whether a parameter is frozen",  # type: ignore[attr-defined]
    Tensor.grad.__get__: "reads the gradient of a parameter",  # type: ignore[union-attr]
    VERSION: "asks whether a parameter was written to",
}
"""The questions whose answers change later, in words."""

_ATTRIBUTES = [getattr(Tensor, name) for name in ASKED_OF_LEAVES]
QUESTIONS = (*CHANGING, *(each if inspect.isroutine(each) else each.__get__ for each in _ATTRIBUTES))


class Questions(TorchFunctionMode):
    """Notes which questions Python asks about the parameters of a model.

    PyTorch's own modules ask as well, to choose an implementation that computes the same.

    Args:
        model: the model.
        note: called with the name of a parameter and the question, one of `QUESTIONS`.
    """

    def __init__(self, model: nn.Module, note: Callable[[str, Any], object]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        if function in QUESTIONS and id(args[0]) in self._names:
            here = inspect.currentframe()  # the mode does not receive the caller
            assert here is not None
            assert here.f_back is not None
            package = str(here.f_back.f_globals.get("__name__")).partition(".")[0]
            del here  # a frame that refers to itself would keep the parameter alive
            if package not in ("torch", "biofx"):
                self._note(self._names[id(args[0])], function)
        return function(*args, **(kwargs or {}))
