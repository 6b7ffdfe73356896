"""Dispatcher operators `torch.ops.biofx.*`: the targets of inserted nodes.

An inserted node calls an operator of the dispatcher, not a Python function. So it survives pickling and retracing,
`torch.compile(fullgraph=True)` accepts it, a training `torch.export` keeps it together with its gradient, and an
inference export decomposes hooks to nothing. There are two kinds. A *gradient hook* is a view of a weight in the
forward pass and changes the weight's gradient. An *observer* reads an activation and adds to a buffer.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biofx.base import rule_code
from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.gains import decoded, drawn
from biofx.base.noise import Counter
from biofx.base.shards import is_sharded, local, part_along, placed_like
from biofx.base.torch_internals import (
    below_autograd,
    below_transform,
    is_transformed_by_functions,
    parsed_schema,
    qualified_name,
    runs_backward,
)

NAMESPACE = "biofx"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

GradientRule = Callable[..., Tensor]
Factors = Callable[..., Sequence[Tensor]]
Draw = Callable[..., Sequence[Tensor]]
Observation = Callable[[Tensor, tuple[int, ...]], Tensor]
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


_HOOKS: dict[str, _Hook] = {}  # by the operator's name without its overload
_INVERSES: dict[str, Callable[..., Tensor]] = {}  # by the operator's name
_VERSION = re.compile(r"__\d+$")  # behind the name of an operator that was defined again


_LOOKS: dict[str, Observation] = {}  # what observers compute, by the operator's name
_OBSERVERS: list[str] = []  # the full names of those that do not support DTensors yet


@dataclass
class _Definition:
    """Who defined an operator.

    Attributes:
        origin: the module and the function.
        count: how often it was defined.
    """

    origin: str
    count: int = 0


_DEFINITIONS: dict[str, _Definition] = {}  # by the operator's name as its author wrote it


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
        name = _new_name("gradient_hook", written, own_rule)
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
        _HOOKS[packet] = _Hook(rule, own_rule, factors, draw, drawn_from)
        _show(name)
        return own_rule

    return define


def apply_rule(target: Any, gradient: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Apply the rule of a gradient hook to a gradient."""
    rule = _HOOKS[name_of(target)].rule
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
    hook = _HOOKS[name]
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
    if _HOOKS[name_of(target)].factors is not None:
        return True
    gradient = torch.arange(weight.numel(), device=weight.device).view(weight.shape).cos().to(weight.dtype)
    ones = torch.ones_like(gradient)
    given, factors = (apply_rule(target, g, weight, *others) for g in (gradient, ones))
    return torch.allclose(given, gradient * factors, rtol=1e-2, atol=1e-5, equal_nan=True)


def is_hook(target: Any) -> bool:
    """Whether a node with this target is a gradient hook."""
    return name_of(target) in _HOOKS


def counter_of(target: Any, arguments: Sequence[Any]) -> tuple[Counter | None, tuple[Any, ...], list[Any]]:
    """The counter of a hook's noise, the other arguments of `draw`, and the arguments of its rule.

    Args:
        target: a hook.
        arguments: the operator's arguments after the weight.
    """
    hook = _HOOKS[name_of(target)]
    if hook.draw is None:
        return None, (), list(arguments)
    (seed, steps, site), end = arguments[: len(COUNTER)], len(COUNTER) + hook.drawn_from
    name = written_name(name_of(target))  # of every definition alike
    return Counter(seed, steps, (name, site)), tuple(arguments[len(COUNTER) : end]), list(arguments[end:])


def draw_noise(
    name: str, likes: Sequence[Tensor], counters: Sequence[Counter], others: Sequence[Any], *, compiled: bool = False
) -> list[Tensor]:
    """The noise of a hook, for many weights or parts of them.

    Args:
        name: the name of the hook (`name_of`).
        likes: the weights.
        counters: the counter of each.
        others: the other arguments of `draw`.
        compiled: whether to compile what is computed.
    """
    draw = _HOOKS[name].draw
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


def tell_caches(target: Any) -> None:
    """Add the code of a hook to the key of torch.compile's caches."""
    if is_hook(target):
        hook = _HOOKS[name_of(target)]
        rule_code.tell_caches(name_of(target), hook.own_rule)


def _new_name(what: str, written: str, function: Callable[..., Any]) -> str:
    """The name of a new operator: as it was written, and the number of the definition: it may be defined again.

    An operator is never changed: a model, compiled or not, runs the code that it was made with. The
    name that was written stands for the last definition (`_show`). Operators of biofx itself have no number.
    """
    origin = f"{function.__module__}.{function.__qualname__}"
    definition = _DEFINITIONS.setdefault(written, _Definition(origin))
    if definition.origin != origin:
        raise ArgumentError(
            f"operators.{what}: {origin} defines biofx.{written}, which {definition.origin} defines already; "
            "give one of them another name"
        )
    definition.count += 1
    packet, dot, overload = written.partition(".")
    is_only = definition.count == 1 and origin.startswith(f"{NAMESPACE}.")
    return packet + ("" if is_only else f"__{definition.count}") + dot + overload


def _show(name: str) -> None:
    """Make `torch.ops.biofx.<name>`, as its author wrote it, the operator that was defined last."""
    packet = name.partition(".")[0]
    if packet != written_name(packet):
        vars(torch.ops.biofx).pop(packet, None)  # it may have got an overload
        setattr(torch.ops.biofx, written_name(packet), getattr(torch.ops.biofx, packet))


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
    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")
    _LIBRARY.impl(name, kernel, "FuncTorchBatched")  # vmap then maps the operators that the kernel calls


def inverse_of(target: Any) -> Callable[..., Tensor] | None:
    """The inverse of an operator, if one was defined with it."""
    return _INVERSES.get(name_of(target))


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


def observer(name: str) -> Callable[[Observation], Observation]:
    r"""Define `torch.ops.biofx.<name>(activity, state, unit_axis, training)`, which adds statistics to a buffer.

    The buffer `state` has shape (2, 2, units) and starts at 0. After calls $k = 1, 2, \ldots$

    $$\mathrm{state}_0 + \mathrm{state}_1 = \Bigl(\sum_k \mathrm{look}(z_k),\ \sum_k n_k\Bigr)$$

    where $n_k$ is the number of positions of the activity $z_k$: all elements of batch, time and space. Sums are
    compensated (Kahan): $\mathrm{state}_1$ holds the rounding errors of $\mathrm{state}_0$. So any number of summands
    of the same sign add up to about a unit in the last place, and integers exactly, up to 2⁴⁸ in float32.

    An activity whose sums are not finite is left out.

    The operator does nothing in evaluation mode and during a backward pass. There, activation checkpointing computes
    activations again, which must not count twice.

    Args:
        name: the operator's name.

    Returns:
        A decorator for `look(activity, positions)`. It gets the activity in the layout of the operator's output, and
        returns a sum over the dimensions `positions`: one number for each unit, shape (units,), in float32 or wider.
        `positions` is never empty. The decorator returns the function unchanged. It may be defined again, as a gradient
        hook may.

    Raises:
        ArgumentError: the name is that of an observer that was written elsewhere. The operator raises it if `look`
            returns another shape.

    Example:
        >>> import torch
        >>> from biofx import operators
        >>> @operators.observer("sum_squares")
        ... def sum_squares(activity, positions):
        ...     return activity.square().sum(positions)
        >>> state = torch.zeros(2, 2, 3)
        >>> torch.ops.biofx.sum_squares(torch.full((5, 3, 4), 0.5), state, 1, True)
        >>> state.sum(0)
        tensor([[ 5.,  5.,  5.],
                [20., 20., 20.]])
    """
    written = name

    def define(look: Observation) -> Observation:
        name = _new_name("observer", written, look)

        def kernel(activity: Tensor, state: Tensor, unit_axis: int, training: bool) -> None:
            if training and not runs_backward():
                with below_autograd():  # no gradients, and no tangents in the state
                    axis = _from_behind(unit_axis, activity)
                    activity = activity[None]  # so that `positions` is never empty: `sum(())` adds up everything
                    positions = tuple(d for d in range(-activity.dim(), 0) if d != axis)
                    sums = look(activity, positions)
                    _check_shape(written, sums, state)
                    _add(state, sums, math.prod(activity.shape[d] for d in positions))

        _LIBRARY.define(f"{name}(Tensor activity, Tensor(a!) state, int unit_axis, bool training) -> ()")
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=_LIBRARY)
        operator = getattr(torch.ops.biofx, name)
        _OBSERVERS.append(f"{NAMESPACE}::{name}")
        _LOOKS[name] = look

        def below_transform(activity: Tensor, state: Tensor, unit_axis: int, training: bool) -> None:
            axis = _from_behind(unit_axis, activity)
            for seen_activity, seen_state in _for_each_model(activity, state):
                operator(seen_activity, seen_state, axis, training)

        # Observers have no gradients, so every transform of torch.func just passes on the tensors that it wraps.
        _LIBRARY.impl(name, below_transform, "FuncTorchDynamicLayerFrontMode")
        _show(name)
        return look

    return define


def defined_by(function: Any) -> str | None:
    """The name of the operator that a Python function defines, as a rule or as an observer; None if it defines none."""
    functions = {name: hook.own_rule for name, hook in _HOOKS.items()} | _LOOKS
    return next((written_name(name) for name, own in functions.items() if own is function), None)


@torch.no_grad()
def check_observer(target: Any, like: Tensor, units: int, unit_axis: int) -> None:
    """Refuse what is no observer, and an observer that returns no sum, judged by one trial.

    Args:
        target: the observer.
        like: a tensor of the dtype and on the device of the activity.
        units: the number of units.
        unit_axis: their axis, counted from the end.

    Raises:
        ArgumentError: the observer is refused.
    """
    name = name_of(target)
    if name not in _LOOKS:
        raise ArgumentError(f"{target!r} is no observer; give torch.ops.biofx.<name> (help(operators.observer))")
    shape = 2, 3, units, *[2] * (-unit_axis - 1)
    activity = torch.arange(math.prod(shape), device=like.device).view(shape).cos().mul(2).to(like.dtype)

    def seen(activity: Tensor) -> Tensor:
        state = like.new_zeros((2, 2, units), dtype=torch.promote_types(like.dtype, torch.float32))
        target(activity, state, unit_axis, True)
        return state.sum(0)[0]

    if not torch.allclose(seen(torch.cat((activity, activity))), 2 * seen(activity), rtol=1e-2, atol=1e-3):
        raise ArgumentError(
            f"the observer biofx.{written_name(name)} returns no sum over positions: it does not return twice as much "
            "if all are there twice; biofx computes the mean itself, so return a sum, such as activity.sum(positions)"
        )


def observe_shards() -> None:
    """Register observers for DTensors. Each process observes its part; the mean over processes is that of the whole."""
    from torch.distributed.tensor import DTensor  # slow to import

    while _OBSERVERS:
        torch.library.register_torch_dispatch(_OBSERVERS.pop(), DTensor, _look_at_part)


def _look_at_part(cls: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    activity, state, unit_axis, training = args
    if training:
        part, units = part_along(activity, unit_axis)
        operator(part, local(state)[..., units], unit_axis, training)


def _check_shape(observer: str, sums: Tensor, state: Tensor) -> None:
    if sums.shape != state.shape[-1:]:
        raise ArgumentError(
            f"the observer biofx.{observer} returns a tensor of shape {tuple(sums.shape)}; it has to return a sum for "
            f"each unit, shape {tuple(state.shape[-1:])}, such as activity.sum(positions)"
        )


def _from_behind(axis: int, activity: Tensor) -> int:
    """Return an axis as a negative number, which stays valid if dimensions are added in front."""
    return axis if axis < 0 else axis - activity.dim()


def _add(state: Tensor, sums: Tensor, positions: int) -> None:
    """Add to the totals of an observer's state, and keep the rounding errors in its rest."""
    total, rest = state.unbind()
    seen = torch.stack((sums, torch.full_like(sums, positions)))
    # A batch that is not finite ends in a step that is refused; what rules remember must not keep it. If one sum is not
    # finite, all become NaN, and then 0; to ask whether they are finite takes more operators.
    seen += (sums * 0).sum()
    rest += seen.nan_to_num_(0.0)
    before = total.clone()
    total += rest
    rest -= total - before


def _for_each_model(activity: Tensor, state: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Unwrap the innermost transform of torch.func: yield each state with the activity that belongs to it."""
    with below_transform(activity, state) as ((activity, of_activity), (state, of_state)):
        if of_state is None:  # one model on many samples
            yield activity if of_activity is None else activity.movedim(of_activity, 0), state
            return
        for model in range(state.shape[of_state]):  # many models, each with a state of its own
            own = activity if of_activity is None else activity.select(of_activity, model)
            yield own, state.select(of_state, model)
