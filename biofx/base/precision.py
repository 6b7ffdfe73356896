"""Precision: the dtypes in which a model computes, and a comparison of its outputs that takes them into account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.comparison import difference
from biofx.base.contents import tensors_in
from biofx.base.isolation import arguments_kept, is_function, parameters_kept, run_in_mode, split_inputs
from biofx.base.torch_internals import TorchDispatchMode, WeakTensorKeyDictionary


def outputs_differ(model: nn.Module, inputs: Any, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str | None:
    """How outputs of a model differ by more than rounding in the dtypes in which it computes; None if they do not.

    Args:
        model: the model; it runs once more if the dtypes of the outputs alone do not explain the difference.
        inputs: arguments of the model, or a function that runs it.
        expected: its outputs.
        actual: the outputs to compare with them.
    """
    found = difference(expected, actual)
    return found and difference(expected, actual, coarsest_dtype(model, inputs))


def amplification(model: nn.Module, inputs: Any, expected: Sequence[Tensor]) -> str:
    """Advice on a difference, if the model amplifies rounding to its size; "" if it does not.

    Args:
        model: the model; it does not change.
        inputs: arguments of the model, or a function that runs it.
        expected: its outputs.
    """
    with parameters_kept(model):
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if _is_rounded(parameter.dtype) and parameter.layout is torch.strided and not parameter.is_inference():
                signs = torch.randint(2, parameter.shape, generator=generator).mul_(2).sub_(1).to(parameter)
                parameter.data = torch.addcmul(parameter.data, parameter.data, signs, value=_epsilon(parameter.dtype))
        found = outputs_differ(model, inputs, expected, run_in_mode(model, inputs))
    if found is None:
        return ""
    return (
        f". The model amplifies rounding, as chaotic networks do: with the last digit of its weights changed, {found}. "
        "Give it example_inputs on which it runs for fewer steps"
    )


def coarsest_dtype(model: nn.Module, inputs: Any) -> torch.dtype | None:
    """The floating-point dtype of least precision that takes part when a model runs; None if there is none.

    Args:
        model: the model; it does not change.
        inputs: arguments of the model, or a function that runs it.
    """
    noted = _DtypeRecorder()

    def run(model: nn.Module) -> Any:
        with noted:  # only here: `run_in_mode` also copies tensors with which the model does not compute
            if is_function(inputs):
                return inputs(model)
            with arguments_kept(split_inputs(inputs)) as (args, kwargs):
                return model(*args, **kwargs)

    run_in_mode(model, run)
    return max(noted.found, key=_epsilon, default=None)


def _epsilon(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


class _DtypeRecorder(TorchDispatchMode):
    """Records the floating-point dtypes that operators read and return, except for constants that forward creates.

    Such constants are the same in every run. A number of float32 does not make a product with float64 less precise.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()
        self._constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        operands = [x for x in tensors_in((args, kwargs)) if _is_rounded(x.dtype) and x not in self._constants]
        made = tensors_in(result)
        if not operands or function is torch.ops.aten.lift_fresh.default:  # `torch.tensor` of numbers of Python
            self._constants.update(dict.fromkeys(made))
            return result
        for tensor in made:
            self._constants.pop(tensor, None)  # it was written into
        self.found |= {x.dtype for x in (*operands, *made) if _is_rounded(x.dtype)}
        return result


def _is_rounded(dtype: torch.dtype) -> bool:
    """Whether operators compute in a dtype, by rounding; 8-bit numbers are stored, and not computed with."""
    return (dtype.is_floating_point or dtype.is_complex) and _epsilon(dtype) <= torch.finfo(torch.bfloat16).eps
