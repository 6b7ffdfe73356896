"""Lifecycle: what rules do around `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam

from biofx import chain
from biofx.chain import number_nodes
from biofx.errors import ArgumentError, LifecycleError
from biofx.model.synapses import Synapses, stored, stored_name, synapses_in
from biofx.operators import is_hook, is_marker, twin
from biofx.plastic_weight import PlasticWeight, scale_learning
from biofx.provenance import record_of, transformed
from biofx.randomness import fixed_defaults
from biofx.registry import Pass
from biofx.signs.scales import project_scales
from biofx.weights.sites import WeightSite, find


def attach(bio: nn.Module, optimizer: Optimizer) -> Attachment:
    r"""Let the rules of a transformed model act around every `optimizer.step()`. No line of the training loop changes.

    The optimizer's own step hooks are used, so this works with gradient accumulation (once for each step, on the
    accumulated gradient), with `GradScaler` (gradients are unscaled, and a step that it skips changes nothing), and
    after the all-reduce of data parallelism. The order at every step:

    1. before it: `L1Regularization`, then `Crystallize`;
    2. the optimizer's step, with gains on the update where the optimizer is adaptive (below);
    3. after it: `Rejuvenate`, `SynapticScaling`, refresh of the gains of `FuzzyLearningRates`, projection on signs
       (`DalesPrinciple`, `MirrorUnits`), and of the parameters that multiply their units on what is not negative.

    *Adaptive optimizers.* Adam and its like normalise every entry of the gradient, so a gain on it would cancel. When
    the optimizer is not linear in the gradient (anything but `SGD` without weight decay), gains act on the update
    instead:

    $$w \leftarrow w_\mathrm{old} + c \cdot (w_\mathrm{new} - w_\mathrm{old})$$

    and the graph shows `biofx.scale_update` instead of `biofx.scale_grad`: nothing happens in the backward pass. So for
    every optimizer, one step moves a synapse by its gain times the distance that it would have moved without, decoupled
    weight decay included.

    Weights without a gradient (frozen, or not used) take no part in a step. Compile a model after it is attached.

    Args:
        bio: a model made by `biofx.transform`.
        optimizer: an optimizer that holds parameters of `bio`. Several optimizers may hold parts of it: attach each.

    Returns:
        The attachment; `detach()` leaves model and optimizer as they were. It is also a context manager.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, no pass changed a weight of it, the optimizer holds none
            of those weights, or one is attached already.
        LifecycleError: `LBFGS` and `SparseAdam`, whose updates are not those of one step on dense gradients. At a step:
            a gradient or weight that is not finite, if a rule acts on it; a sparse gradient; no `backward()` before; a
            weight whose shape, or an optimizer whose parameters or use of weight decay, changed since. Nothing has
            happened then.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), [passes.FuzzyLearningRates(), passes.Rejuvenate()])
        >>> optimizer = torch.optim.AdamW(bio.parameters(), lr=0.01)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> bio(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(bio.weight_synapses.steps)
        1
    """
    if isinstance(bio, Optimizer):
        raise ArgumentError("attach: the arguments are swapped; write attach(bio, optimizer)")
    bio = transformed(bio)
    record = record_of(bio)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS | SparseAdam):
        why = "evaluates the loss several times in a step" if isinstance(optimizer, LBFGS) else "needs sparse gradients"
        raise LifecycleError(f"attach: {type(optimizer).__name__} {why}, so there is no one update for rules to act on")
    if record.by_hand:
        raise ArgumentError("attach: BioConverter made this model, whose rules are called by hand; use biofx.transform")
    held = _held(optimizer)
    sites = {name: site for name, site in find(bio)[0].items() if id(site.raw) in held and site.passes}
    if not sites and not any(id(stored(bio, name)) in held for name in record.nonnegative):
        if not any(run.weights for run in record.passes):
            raise ArgumentError("attach: no pass changed any weight of this model; biofx.summary(bio) says why")
        raise ArgumentError(
            f"attach: {type(optimizer).__name__} holds no weight of this model that a pass changed; "
            "build it from bio.parameters(), after the transform"
        )
    taken = sorted(set(sites) & record.attached)
    if taken:
        raise ArgumentError(f"attach: {taken[0]} is attached already; call detach() on that attachment first")
    return Attachment(bio, optimizer, sites)


@dataclass(eq=False)
class _Step:
    """A step under way.

    Attributes:
        old: the parameters with gains, before the optimizer changed them; empty if gains act on the gradient.
        weights: the weights that take part, once their gradients are there.
    """

    old: dict[str, Tensor]
    weights: list[PlasticWeight] | None = None


class Attachment:
    """The connection between a transformed model and an optimizer; `biofx.attach` makes it."""

    def __init__(self, bio: fx.GraphModule, optimizer: Optimizer, sites: dict[str, WeightSite]) -> None:
        self.optimizer = optimizer
        self.weights = tuple(sites)
        self._bio = bio
        self._held = _held(optimizer)
        self._on_update = not _is_linear(optimizer)
        _swap(bio, self._held, is_hook if self._on_update else is_marker)
        self._sites = {name: site for name, site in find(bio)[0].items() if name in sites}
        self._learning = _learning(bio, self._held)
        self._shapes = {name: site.raw.shape for name, site in self._sites.items()}
        runs = [(run.pass_, run.weights) for run in record_of(bio).passes if isinstance(run.pass_, Pass)]
        self._rules = sorted((r for r in runs if r[0].moment and r[0].acts_at_step), key=lambda r: r[0].moment or 0)
        self._step: _Step | None = None
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        record_of(bio).attached |= set(sites)

    def detach(self) -> None:
        """Leave the model and the optimizer as they were before `attach`; their values stay. Idempotent."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        _swap(self._bio, self._held, is_marker)
        record_of(self._bio).attached -= set(self.weights)

    def __repr__(self) -> str:
        mode = "update" if self._on_update else "gradient"
        return f"<{type(self.optimizer).__name__} on {', '.join(self.weights)}; gains act on the {mode}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._step = None
        if _is_skipped(optimizer):
            return None
        self._check_unchanged()
        # Before the optimizer does anything: one that takes a closure may move the weights before it calls it.
        parameters = {name: each.stored for name, each in self._learning.items()} if self._on_update else {}
        self._step = _Step({name: p.detach().clone() for name, p in parameters.items()})
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare()
            return None

        def evaluate_then_prepare() -> Any:  # the gradients come from the closure, so the rules wait for it
            loss = closure()
            self._prepare()
            return loss

        return (args[0], evaluate_then_prepare), {k: v for k, v in kwargs.items() if k != "closure"}

    @torch.no_grad()
    def _prepare(self) -> None:
        """Act on the gradients, which are there now."""
        assert self._step is not None
        if self._step.weights is not None:
            name = type(self.optimizer).__name__
            raise LifecycleError(f"{name} evaluates its closure twice in a step, so there is no one gradient to act on")
        weights = [w for site in self._sites.values() if (w := self._weight(site)) is not None]
        if not weights and all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            self._step = None
            raise LifecycleError(
                f"optimizer.step() without backward(): none of the {len(self._sites)} weights has a gradient"
            )
        if self._rules or self._on_update:
            _check_finite(weights)
        acted = self._act(weights, before_step=True)
        scale = _gradient_scale(self.optimizer)
        if acted and scale is not None:
            for weight in weights:
                weight.raw.grad.copy_(weight.gradient * scale)  # type: ignore[union-attr]
        self._step.weights = weights

    def _weight(self, site: WeightSite) -> PlasticWeight | None:
        """A weight that takes part in this step, or None if it has no gradient."""
        raw, scale = site.raw, _gradient_scale(self.optimizer)
        if raw.grad is None or raw.numel() == 0:
            return None
        if raw.grad.layout is not torch.strided:
            raise LifecycleError(f"{site.name}: its gradient is sparse, and rules act on every entry")
        gradient = raw.grad if scale is None else raw.grad.float() / scale
        steps = site.state("steps")
        step = 1 if steps is None else int(steps) + 1
        return PlasticWeight(site, raw, gradient, self.optimizer, step, self._on_update)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step, self._step = self._step, None
        if step is None or step.weights is None:
            return
        for name, old in step.old.items():
            synapses = self._learning[name]
            parameter = synapses.stored
            if parameter.grad is not None:
                change = scale_learning(synapses, parameter - old, old)
                parameter.copy_(old + change)
        counters = [steps for w in step.weights if (steps := w.site.state("steps")) is not None]
        try:
            self._act(step.weights, before_step=False)
            project_scales(self._bio, self._held)
        finally:
            if counters:
                torch._foreach_add_(counters, 1)

    def _act(self, weights: Sequence[PlasticWeight], *, before_step: bool) -> bool:
        acted = False
        for pass_, names in self._rules:
            chosen = [replace(w, by=pass_.name) for w in weights if w.name in names]
            if chosen and pass_.moment is not None and pass_.moment.before_step is before_step:
                acted = True
                with fixed_defaults():
                    pass_.at_step(chosen)
        return acted

    def _check_unchanged(self) -> None:
        """Refuse a step for which the attachment was not made."""
        for name, site in self._sites.items():
            if site.raw.shape != self._shapes[name]:
                raise LifecycleError(
                    f"{name} was {tuple(self._shapes[name])} when it was attached and is {tuple(site.raw.shape)}; "
                    "detach, build the optimizer again, and attach"
                )
        if _held(self.optimizer) != self._held:
            raise LifecycleError(
                "the optimizer holds other parameters than when it was attached; detach and attach again"
            )
        if _is_linear(self.optimizer) is self._on_update:
            raise LifecycleError(
                "the optimizer's weight_decay was switched on or off since attach; detach and attach again"
            )


def use_hooks(bio: nn.Module) -> None:
    """Let all gains act in the backward pass, as they do while no optimizer is attached."""
    bio = transformed(bio)
    _swap(bio, {id(p) for p in bio.parameters()}, is_marker)


def use_markers(bio: nn.Module) -> None:
    """Let no gradient hook act in the backward pass, for those who call the rules themselves."""
    bio = transformed(bio)
    record_of(bio).by_hand = True
    _swap(bio, {id(p) for p in bio.parameters()}, is_hook)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _learning(bio: fx.GraphModule, held: set[int]) -> dict[str, Synapses]:
    """The synapses with gains, of weights and of biases that were split with them, by the parameter's name."""
    found = {name: each for name, each in synapses_in(bio).items() if id(each.stored) in held}
    return {n: s for n, s in found.items() if any(is_hook(link.target) or is_marker(link.target) for link in s.links)}


def _swap(bio: fx.GraphModule, held: set[int], which: Callable[[Any], bool]) -> None:
    """Exchange hooks for markers, or back, in the synapses of parameters."""
    starts, has_changed = chain.parameter_nodes(bio), False
    for name, synapses in _learning(bio, held).items():
        links = [replace(link, target=twin(link.target)) if which(link.target) else link for link in synapses.links]
        if links != [*synapses.links]:
            synapses.links = tuple(links)
            if name in starts:
                chain.show(starts[name], stored_name(bio, name), synapses)
            has_changed = True
    if has_changed:
        number_nodes(bio)


def _is_linear(optimizer: Optimizer) -> bool:
    return type(optimizer) is SGD and not any(group["weight_decay"] for group in optimizer.param_groups)


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip its step, as `GradScaler` found gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that a fused optimizer takes out of the gradients itself."""
    return getattr(optimizer, "grad_scale", None)


def _check_finite(weights: Sequence[PlasticWeight]) -> None:
    """Refuse to act on what is not finite: a rule would spread it, or hide it."""
    for weight in weights:
        for what, values in (("gradient", weight.gradient), ("weight", weight.raw)):
            # A sum costs a fraction of looking at every entry. It can overflow, so it only acquits.
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise LifecycleError(
                    f"{weight.name}: its {what} is not finite, so rules cannot act on it; nothing was changed. "
                    "Lower the learning rate, clip gradients, or use torch.amp.GradScaler in half precision"
                )
