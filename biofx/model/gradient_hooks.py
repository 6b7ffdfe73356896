"""Gradient hooks: the identity on a weight in the forward pass, and a factor on its gradient in the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biofx.base import rule_code
from biofx.base.errors import ArgumentError
from biofx.base.gains import decoded, drawn
from biofx.base.noise import Counter
from biofx.base.shards import is_sharded, local, placed_like
from biofx.base.torch_internals import is_transformed_by_functions, parsed_schema
from biofx.model.definitions import NAMESPACE, define_operator, name_of, new_name, show, written_name

GradientRule = Callable[..., Tensor]
Factors = Callable[..., Sequence[Tensor]]
Draw = Callable[..., Sequence[Tensor]]
COUNTER = ("Tensor seed", "Tensor steps", "str site")  # arguments of a hook with noise


@dataclass(frozen=True)
class _Hook:
    """A gradient hook.

    Attributes:
        rule: its rule, called with the arguments of the operator.
        own_rule: its rule, called with the noise in place of the counter; the same if it takes no noise.
        factors: computes the factors for many weights at once, or None.
        draw: draws its noise, or None.
        drawn_from: the number of arguments that `draw` takes in addition to the counter.
    """

    rule: GradientRule
    own_rule: GradientRule
    factors: Factors | None
    draw: Draw | None
    drawn_from: int


HOOKS: dict[str, _Hook] = {}  # by the operator's name without its overload


def gradient_hook(
    schema: str, *, factors: Factors | None = None, draw: Draw | None = None
) -> Callable[[GradientRule], GradientRule]:
    r"""Define `torch.ops.biofx.<name>_grad`: the identity on a weight, and a rule for the weight's gradient.

    The operator computes $y = w$, without a copy, and in the backward pass

    $$\frac{\partial L}{\partial w} = \mathrm{rule}\!\left(\frac{\partial L}{\partial y}, \ldots\right).$$

    The rule has to multiply every entry of the gradient by a factor that does not depend on it: then it commutes with
    gradient accumulation, with loss scaling and with the all-reduce of data parallelism, and can act on an update.

    While an optimizer is attached (`biofx.attach`), hooks are inactive, and the factors act on its updates.

    The same function may be defined again, with other code or another schema, as when a notebook cell is run again.
    Models that are transformed from then on run the new rule. Models that were transformed before run the old one, as
    do their copies and their compiled code. A model loaded from a file runs the definition that has the name then.

    Args:
        schema: the operator's signature in the dispatcher's language. The first argument is the weight and is
            aliased by the result: `"name_grad(Tensor(a) weight, Tensor gain) -> Tensor(a)"`.
        factors: computes the factors for many weights at once: `factors(weights, *others)`, where `weights` and every
            other tensor is a list with one for each weight. None: the rule is called on ones, weight by weight.
        draw: draws the noise that the rule takes, one number for each entry, such as `biofx.noise.normal`. Then the
            arguments after the weight are `Tensor seed, Tensor steps, str site`, and others of `draw`, if it takes
            some; the rule and `factors` get the noise in place of all of these. It is called as
            `draw(likes, counters, *others, compiled=compiled)`, for many weights at once.

    Returns:
        A decorator for the rule, `rule(gradient, *others)`, with the arguments of the schema that follow the weight. If
        its second parameter is called `weight`, it gets the weight there. The decorator returns the rule unchanged, so
        it can still be called as a pure function.

    Raises:
        ArgumentError: the name does not end in `_grad`, or is that of a hook that was written elsewhere; the rule does
            not take the arguments of the schema.

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
    written, _, signature = schema.partition("(")

    def define(own_rule: GradientRule) -> GradientRule:
        takes_weight, drawn_from = _check_rule(own_rule, schema, draw)
        name = new_name("gradient_hook", written, own_rule)
        packet = name.partition(".")[0]
        rule = own_rule if draw is None else _with_noise(own_rule, packet, schema, draw, drawn_from)

        class Hook(torch.autograd.Function):
            @staticmethod  # with `setup_context`, PyTorch asks for the signature at each call: 52 instead of 22 µs
            def forward(ctx: Any, weight: Tensor, *others: Any) -> Tensor:
                used = (weight, *others) if takes_weight else others
                ctx.arity = 1 + len(others)
                ctx.save_for_backward(*(x for x in used if isinstance(x, Tensor)))
                ctx.constants = [None if isinstance(x, Tensor) else x for x in used]
                return weight.view_as(weight)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
                tensors = iter(ctx.saved_tensors)
                others = placed_like([next(tensors) if x is None else x for x in ctx.constants], gradient)
                return (rule(gradient, *others).to(gradient.dtype), *[None] * (ctx.arity - 1))

        Hook.__name__ = Hook.__qualname__ = name.replace(".", "_")

        def hook(weight: Tensor, *others: Any) -> Tensor:
            if not is_transformed_by_functions():
                result: Tensor = Hook.apply(weight, *others)  # type: ignore[no-untyped-call]
                return result
            # Under torch.func transforms, the dispatcher finds no kernel of an autograd.Function. `scaled` carries the
            # gradient and adds exactly zero, so the value is the weight's to the last bit.
            scaled = rule(weight, weight.detach(), *others) if takes_weight else rule(weight, *others)
            scaled = scaled.to(weight.dtype)
            return weight.detach() + (scaled - scaled.detach())

        define_operator(name, "(" + signature, hook)
        HOOKS[packet] = _Hook(rule, own_rule, factors, draw, drawn_from)
        show(name)
        return own_rule

    return define


def apply_rule(target: Any, gradient: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Apply the rule of a gradient hook to a gradient."""
    rule = HOOKS[name_of(target)].rule
    return rule(gradient, weight, *others) if _takes_weight(rule) else rule(gradient, *others)


def factors_of(
    name: str, weights: list[Tensor], others: Sequence[Any], *, one_by_one: bool = False
) -> Sequence[Tensor]:
    """Return the factors by which a gradient hook multiplies the gradients of weights, entry by entry.

    Args:
        name: the name of the hook (`name_of`).
        weights: the weights.
        others: the other arguments of its rule: a list with one tensor for each weight, or one value for all.
        one_by_one: call the rule separately for each weight.
    """
    hook = HOOKS[name]
    if hook.factors is not None and not one_by_one:
        return hook.factors(weights, *others)
    rule = hook.own_rule
    own = [[x[index] if isinstance(x, list) else x for x in others] for index in range(len(weights))]
    return [
        rule(torch.ones_like(w), *([w] if _takes_weight(rule) else []), *args)
        for w, args in zip(weights, own, strict=True)
    ]


@torch.no_grad()
def multiplies_entries(target: Any, weight: Tensor, *others: Any) -> bool:
    """Whether a gradient hook multiplies each entry of a gradient by a factor, judged by one trial."""
    if HOOKS[name_of(target)].factors is not None:
        return True
    gradient = torch.arange(weight.numel(), device=weight.device).view(weight.shape).cos().to(weight.dtype)
    ones = torch.ones_like(gradient)
    given, factors = (apply_rule(target, g, weight, *others) for g in (gradient, ones))
    return torch.allclose(given, gradient * factors, rtol=1e-2, atol=1e-5, equal_nan=True)


def is_hook(target: Any) -> bool:
    """Whether a node with this target is a gradient hook."""
    return name_of(target) in HOOKS


def counter_of(target: Any, arguments: Sequence[Any]) -> tuple[Counter | None, tuple[Any, ...], list[Any]]:
    """The counter of a hook's noise, the other arguments of `draw`, and the arguments of its rule."""
    hook = HOOKS[name_of(target)]
    if hook.draw is None:
        return None, (), list(arguments)
    (seed, steps, site), end = arguments[: len(COUNTER)], len(COUNTER) + hook.drawn_from
    name = written_name(name_of(target))  # of every definition alike
    return Counter(seed, steps, (name, site)), tuple(arguments[len(COUNTER) : end]), list(arguments[end:])


def draw_noise(
    name: str, likes: Sequence[Tensor], counters: Sequence[Counter], others: Sequence[Any], *, compiled: bool = False
) -> list[Tensor]:
    """The noise of the hook of a name (`name_of`) for many weights or parts of them, each with its counter."""
    draw = HOOKS[name].draw
    assert draw is not None, f"{name} takes no noise"
    return list(draw(likes, counters, *others, compiled=compiled))


def _with_noise(rule: GradientRule, name: str, schema: str, draw: Draw, drawn_from: int) -> GradientRule:
    """A rule that draws its noise itself, by an operator of its own."""
    end = len(COUNTER) + drawn_from
    arguments = ["Tensor like", *(f"{a.type} {a.name}" for a in parsed_schema(schema).arguments[1 : 1 + end])]

    def noise(like: Tensor, seed: Tensor, steps: Tensor, site: str, *others: Any) -> Tensor:
        return draw([like], [Counter(seed, steps, (written_name(name), site))], *others)[0]

    operator: Any = torch.library.custom_op(
        f"{NAMESPACE}::{name.removesuffix('_grad')}_noise",
        noise,
        mutates_args=(),
        schema=f"({', '.join(arguments)}) -> Tensor",
    )
    operator.register_fake(lambda like, *_: torch.empty_like(like, memory_format=torch.contiguous_format))

    def mapped(info: Any, in_dims: Sequence[int | None], like: Tensor, *own: Any) -> tuple[Tensor, int]:
        """Models under `vmap` draw as they do on their own."""
        tensors = zip((like, *own[:2]), in_dims, strict=False)
        models = zip(*(x.unbind(dim) if dim is not None else [x] * info.batch_size for x, dim in tensors), strict=True)
        return torch.stack([operator(*model, *own[2:]) for model in models]), 0

    operator.register_vmap(mapped)

    def drawn_for(like: Tensor, own: Sequence[Any]) -> Tensor:
        if not is_sharded(like):
            return operator(like.detach(), *own)  # type: ignore[no-any-return]
        whole = local(like).new_empty(like.shape)  # every rank draws all of it, and keeps its part
        return placed_like([operator(whole, *map(local, own))], like)[0]  # type: ignore[no-any-return]

    if not _takes_weight(rule):
        return lambda gradient, *own: rule(gradient, drawn_for(gradient, own[:end]), *own[end:])

    def drawing(gradient: Tensor, weight: Tensor, *own: Any) -> Tensor:
        return rule(gradient, weight.detach(), drawn_for(weight, own[:end]), *own[end:])

    return drawing


def tell_caches(target: Any) -> None:
    """Add the code of a hook to the key of torch.compile's caches."""
    if is_hook(target):
        hook = HOOKS[name_of(target)]
        rule_code.tell_caches(name_of(target), hook.own_rule)


def _takes_weight(rule: GradientRule) -> bool:
    return list(inspect.signature(rule).parameters)[1:2] == ["weight"]


def _check_rule(rule: GradientRule, schema: str, draw: Draw | None) -> tuple[bool, int]:
    """Whether a rule takes the weight, and how many arguments, in addition to the counter, its noise is drawn from."""
    parsed = parsed_schema(schema)
    if not parsed.name.endswith("_grad"):
        raise ArgumentError(f"operators.gradient_hook: the name of a hook ends in _grad, got {parsed.name!r}")
    takes_weight, drawn_from = _takes_weight(rule), []
    expected = [argument.name for argument in parsed.arguments][1:]
    if draw is not None:
        parameters = [*inspect.signature(draw).parameters.values()][2:]
        drawn_from = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        end = len(COUNTER) + len(drawn_from)
        is_counter = [f"{a.type} {a.name}" for a in parsed.arguments[1 : 1 + len(COUNTER)]] == [*COUNTER]
        if not is_counter or expected[len(COUNTER) : end] != drawn_from:
            raise ArgumentError(
                f"operators.gradient_hook: the schema of a rule with noise has {', '.join((*COUNTER, *drawn_from))} "
                f"after the weight; got {schema!r}"
            )
        expected = ["noise", *expected[end:]]
    given = list(inspect.signature(rule).parameters)[2 if takes_weight else 1 :]
    if given != expected:
        raise ArgumentError(
            f"operators.gradient_hook: the rule takes {given} after the gradient, its schema {schema!r} says {expected}"
        )
    return takes_weight, len(drawn_from)


def _gains(weights: Sequence[Tensor], gains: Sequence[Tensor] | float) -> Sequence[Tensor]:
    if isinstance(gains, float | int):
        return [w.new_full((), gains) for w in weights]
    return [decoded(gain) for gain in gains]


@gradient_hook("scale_grad.Scalar(Tensor(a) weight, float gain) -> Tensor(a)", factors=_gains)
@gradient_hook(
    "scale_grad(Tensor(a) weight, Tensor gain) -> Tensor(a)", factors=_gains
)  # first: a call tries overloads in order
def scale_grad(gradient: Tensor, gain: Tensor | float) -> Tensor:
    """Gain on every synapse: g ← c·g, with c a number for all, or broadcast against g."""
    return gradient * (decoded(gain) if isinstance(gain, Tensor) else gain)


@gradient_hook(
    "drawn_grad(Tensor(a) weight, Tensor seed, Tensor steps, str site,"
    " str distribution, float nu, float minimum, float maximum) -> Tensor(a)",
    factors=_gains,
    draw=drawn,
)
def drawn_grad(gradient: Tensor, noise: Tensor) -> Tensor:
    """Gain on every synapse that is stored nowhere (`biofx.base.gains.drawn`): g ← c·g."""
    return gradient * noise


@gradient_hook("share_grad(Tensor(a) weight, float share) -> Tensor(a)", factors=_gains)
def share_grad(gradient: Tensor, share: float) -> Tensor:
    """Share of one synapse in the gradient of its connection: g ← s·g."""
    return gradient * share
