"""Lifecycle: what rules do around `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam

from biofx.errors import ArgumentError, LifecycleError
from biofx.operators import is_hook, is_marker, twin
from biofx.plastic_weight import PlasticWeight, scale_learning
from biofx.provenance import number_nodes, record_of, transformed
from biofx.randomness import fixed_defaults
from biofx.registry import Pass
from biofx.weight_sites import WeightSite, find


def attach(bio: nn.Module, optimizer: Optimizer) -> Attachment:
    r"""Let the rules of a transformed model act around every `optimizer.step()`. No line of the training loop changes.

    The optimizer's own step hooks are used, so this works with gradient accumulation (once for each step, on the
    accumulated gradient), with `GradScaler` (gradients are unscaled, and a step that it skips changes nothing), after
    the all-reduce of data parallelism, and with trainers that own the loop. The order at every step:

    1. before it: `L1Regularization`, then `Crystallize`;
    2. the optimizer's step, with gains on the update where the optimizer is adaptive (below);
    3. after it: `Rejuvenate`, `SynapticScaling`, refresh of the gains of `FuzzyLearningRates`.

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
        ArgumentError: `bio` was not made by `biofx.transform`, the optimizer holds none of its weights, or a weight is
            attached already.
        LifecycleError: `LBFGS` and `SparseAdam`, whose updates are not those of one step on dense gradients. At a
            step: a gradient or weight that is not finite, a sparse gradient, a step without `backward()`, a weight
            whose shape changed. Nothing has happened then.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), [passes.FuzzyLearningRates(), passes.Rejuvenate()])
        >>> optimizer = torch.optim.AdamW(bio.parameters(), lr=0.01)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> bio(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(bio.weight_steps)
        1
    """
    bio = transformed(bio)
    record = record_of(bio)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS | SparseAdam):
        why = "evaluates the loss several times in a step" if isinstance(optimizer, LBFGS) else "needs sparse gradients"
        raise LifecycleError(f"attach: {type(optimizer).__name__} {why}, so there is no one update for rules to act on")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sites = {name: site for name, site in find(bio)[0].items() if id(site.raw) in held and site.passes}
    if not sites:
        raise ArgumentError(
            f"attach: {type(optimizer).__name__} holds no weight of this model that a pass changed; "
            "build it from bio.parameters(), after the transform"
        )
    taken = sorted(set(sites) & record.attached)
    if taken:
        raise ArgumentError(f"attach: {taken[0]} is attached already; call detach() on that attachment first")
    return Attachment(bio, optimizer, sites)


@dataclass(eq=False)
class _Running:
    """A step under way: the weights that take part in it, and what they were before, if gains act on the update."""

    weights: list[PlasticWeight]
    old: list[Tensor]


class Attachment:
    """The connection between a transformed model and an optimizer; `biofx.attach` makes it."""

    def __init__(self, bio: fx.GraphModule, optimizer: Optimizer, sites: dict[str, WeightSite]) -> None:
        self.optimizer = optimizer
        self.weights = tuple(sites)
        self._bio = bio
        self._on_update = not _is_linear(optimizer)
        self._swapped = _swap(bio, sites, is_hook if self._on_update else is_marker)
        self._sites = {name: site for name, site in find(bio)[0].items() if name in sites}
        self._shapes = {name: site.raw.shape for name, site in self._sites.items()}
        runs = [(run.pass_, run.weights) for run in record_of(bio).passes if isinstance(run.pass_, Pass)]
        acting = [(pass_, weights) for pass_, weights in runs if pass_.acts_at_step and pass_.moment is not None]
        self._rules = sorted(acting, key=lambda rule: rule[0].moment or 0)
        self._running: _Running | None = None
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        record_of(bio).attached |= set(sites)

    def detach(self) -> None:
        """Leave the model and the optimizer as they were before `attach`; their values stay. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self._swapped:
            sites = {name: site for name, site in find(self._bio)[0].items() if name in self._sites}
            _swap(self._bio, sites, is_marker if self._on_update else is_hook)
        record_of(self._bio).attached -= set(self.weights)
        self._hooks = []

    def __repr__(self) -> str:
        mode = "update" if self._on_update else "gradient"
        return f"<{type(self.optimizer).__name__} on {', '.join(self.weights)}; gains act on the {mode}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
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
        self._running = None
        if _is_skipped(self.optimizer):
            return
        self._check_shapes()
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer unscales gradients itself
        weights = []
        for site in self._sites.values():
            raw = site.raw
            if raw.grad is not None:
                if raw.grad.layout is not torch.strided:
                    raise LifecycleError(f"{site.name}: its gradient is sparse, and rules act on every entry")
                gradient = raw.grad if scale is None else raw.grad / scale
                steps = site.state("steps")
                step = 1 if steps is None else int(steps) + 1
                weights.append(PlasticWeight(site, raw, gradient, self.optimizer, step, self._on_update))
        if not weights:
            raise LifecycleError(
                f"optimizer.step() without backward(): none of the {len(self._sites)} weights has a gradient"
            )
        if self._rules or self._on_update:
            _check_finite(weights)
        self._act(weights, before_step=True)
        if scale is not None:
            for weight in weights:
                weight.raw.grad.copy_(weight.gradient * scale)  # type: ignore[union-attr]
        old = [weight.raw.detach().clone() for weight in weights] if self._on_update else []
        self._running = _Running(weights, old)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        for weight, old in zip(running.weights, running.old, strict=False):
            weight.raw.copy_(old + scale_learning(weight.site, weight.raw - old, old))
        self._act(running.weights, before_step=False)
        counters = [steps for w in running.weights if (steps := w.site.state("steps")) is not None]
        if counters:
            torch._foreach_add_(counters, 1)

    def _act(self, weights: Sequence[PlasticWeight], *, before_step: bool) -> None:
        for pass_, names in self._rules:
            if pass_.moment is not None and pass_.moment.before_step is before_step:
                chosen = [replace(w, by=pass_.name) for w in weights if w.name in names]
                if chosen:
                    with fixed_defaults():
                        pass_.at_step(chosen)

    def _check_shapes(self) -> None:
        for name, site in self._sites.items():
            if site.raw.shape != self._shapes[name]:
                raise LifecycleError(
                    f"{name} was {tuple(self._shapes[name])} when it was attached and is {tuple(site.raw.shape)}; "
                    "detach, build the optimizer again, and attach"
                )


def use_markers(bio: nn.Module) -> None:
    """Let no gradient hook act in the backward pass, for those who call the rules themselves."""
    bio = transformed(bio)
    _swap(bio, find(bio)[0], is_hook)


def _swap(bio: fx.GraphModule, sites: dict[str, WeightSite], which: Callable[[Any], bool]) -> bool:
    """Exchange hooks for markers, or back, in the chains of weights; say whether there was any."""
    nodes = [node for site in sites.values() for node in site.chain if which(node.target)]
    for node in nodes:
        node.target = twin(node.target)
    if nodes:
        number_nodes(bio)
    return bool(nodes)


def _is_linear(optimizer: Optimizer) -> bool:
    return type(optimizer) is SGD and not any(group["weight_decay"] for group in optimizer.param_groups)


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip its step, as `GradScaler` found gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


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
