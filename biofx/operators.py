"""Dispatcher operators `torch.ops.biofx.*`: what a pass puts into a graph in order to change a gradient.

An inserted node calls an operator of the dispatcher, not a Python function: it survives pickling and re-tracing,
`torch.compile(fullgraph=True)` fuses it, a training `torch.export` keeps it together with its gradient, and an
inference export decomposes it to nothing. Every one is a view of the weight in the forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biofx.errors import ArgumentError

NAMESPACE = "biofx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

GradientRule = Callable[..., Tensor]


def gradient_hook(schema: str) -> Callable[[GradientRule], GradientRule]:
    r"""Define `torch.ops.biofx.<name>`: the identity on a weight, and a rule for the weight's gradient.

    The operator computes $y = w$, without a copy, and in the backward pass

    $$\frac{\partial L}{\partial w} = \mathrm{rule}\!\left(\frac{\partial L}{\partial y}, \ldots\right).$$

    The rule has to be linear in the gradient, with coefficients that do not depend on it: then it commutes with
    gradient accumulation, with loss scaling and with the all-reduce of data parallelism.

    Args:
        schema: the operator's signature in the dispatcher's language. The first argument is the weight and is
            aliased by the result: `"name(Tensor(a) weight, Tensor gain) -> Tensor(a)"`.

    Returns:
        A decorator for the rule, `rule(gradient, *others)`, with the arguments of the schema that follow the weight.
        The rule itself is returned unchanged, so it stays callable as the pure function that it is.

    Example:
        >>> import torch
        >>> from biofx import operators
        >>> @operators.gradient_hook("reverse_grad(Tensor(a) weight) -> Tensor(a)")
        ... def reverse_grad(gradient):
        ...     return -gradient
        >>> w = torch.ones(2, requires_grad=True)
        >>> torch.ops.biofx.reverse_grad(w).sum().backward()
        >>> w.grad
        tensor([-1., -1.])
    """
    name = schema.partition("(")[0]

    def define(rule: GradientRule) -> GradientRule:
        class Hook(torch.autograd.Function):
            @staticmethod
            def forward(weight: Tensor, *others: Any) -> Tensor:
                return weight.view_as(weight)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
                ctx.arity = len(inputs)
                ctx.save_for_backward(*(x for x in inputs[1:] if isinstance(x, Tensor)))
                ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[1:]]

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
                tensors = iter(ctx.saved_tensors)
                others = [next(tensors) if x is None else x for x in ctx.others]
                return (rule(gradient, *others).to(gradient.dtype), *[None] * (ctx.arity - 1))

        Hook.__name__ = Hook.__qualname__ = name.replace(".", "_")

        def kernel(weight: Tensor, *others: Any) -> Tensor:
            if torch._C._functorch.peek_interpreter_stack() is None:
                result: Tensor = Hook.apply(weight, *others)  # type: ignore[no-untyped-call]
                return result
            # Inside torch.func transforms an autograd.Function has no kernel behind the dispatcher. `scaled` carries
            # the gradient and adds zero to the value, which stays the weight's to the last bit.
            scaled = rule(weight, *others)
            return weight.detach() + (scaled - scaled.detach())

        def vmap(info: Any, in_dims: tuple[int | None, ...], weight: Tensor, *others: Any) -> tuple[Tensor, int]:
            weight_dim, *other_dims = in_dims
            if weight_dim is None:
                weight = weight.unsqueeze(0).expand(info.batch_size, *weight.shape)
            else:
                weight = weight.movedim(weight_dim, 0)
            batched = []
            for other, dim in zip(others, other_dims, strict=True):
                if dim is not None:  # keep the other axes aligned with the weight's last ones
                    other = other.movedim(dim, 0)
                    padding = [1] * (weight.dim() - other.dim())
                    other = other.reshape(other.shape[0], *padding, *other.shape[1:])
                batched.append(other)
            return operator(weight, *batched), 0

        _check_signature(rule, schema)
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap)
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.biofx, packet), overload or "default")
        return rule

    return define


def _check_signature(rule: GradientRule, schema: str) -> None:
    expected = [argument.name for argument in torch._C.parse_schema(schema).arguments][1:]
    given = list(inspect.signature(rule).parameters)[1:]
    if given != expected:
        raise ArgumentError(
            f"operators.gradient_hook: the rule takes {given} after the gradient, its schema {schema!r} says {expected}"
        )


@gradient_hook("scale_grad(Tensor(a) weight, Tensor gain) -> Tensor(a)")
def scale_grad(gradient: Tensor, gain: Tensor) -> Tensor:
    """Gain on every synapse: g ← c·g, with c broadcast against g."""
    return gradient * gain


@gradient_hook("scale_grad.Scalar(Tensor(a) weight, float gain) -> Tensor(a)")
def scale_grad_scalar(gradient: Tensor, gain: float) -> Tensor:
    """One gain for all synapses of a weight: g ← c·g, with a number c."""
    return gradient * gain
