"""Attachments: rules act around `optimizer.step()`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.errors import ArgumentError, LifecycleError
from biofx.base.randomness import fixed_defaults
from biofx.base.shards import cut_like, gradient_of, is_sharded, local, shard_of
from biofx.base.torch_internals import runs_step_hooks
from biofx.model.provenance import record_of, transformed
from biofx.model.synapses import Synapses, observers_in, stored
from biofx.rewrite.registry import Moment, Pass
from biofx.signs.constraints import CONSTRAINTS, constraint_of
from biofx.signs.scales import project_scales
from biofx.training.acting import Acting, acting_with
from biofx.training.compiling import check_compiler
from biofx.training.counting import Counters, is_captured
from biofx.training.factors import factors
from biofx.training.finite import Finite, taken_back
from biofx.training.plastic_weight import PlasticWeight
from biofx.training.ranks import average_, data_parallel_groups, is_on_any, stop_broadcasts, wrapper_of
from biofx.training.sharding import check_shards, cut_state
from biofx.training.sleeping import set_attached, with_hooks
from biofx.training.update import Update
from biofx.training.wrappers import held, innermost, inside


def attach(bio: nn.Module, optimizer: Optimizer, *, compile: bool = False) -> Attachment:  # noqa: A002 - torch's word
    r"""Let the rules of a transformed model act around every `optimizer.step()`. No line of the training loop changes.

    The optimizer's own step hooks are used, so this works with gradient accumulation (once for each step, on the
    accumulated gradient), with `GradScaler` (gradients are unscaled, and a step that it skips changes nothing), and
    after the all-reduce of data parallelism. The order at every step:

    1. before it: `L1Regularization`, then `Crystallize`;
    2. the optimizer's step, and gains on what it changed;
    3. after it: `Rejuvenate`, `SynapticScaling`, refresh of the gains of `FuzzyLearningRates`, projection on signs
       (`DalesPrinciple`, `MirrorUnits`), and of the parameters that multiply their units on what is not negative.

    *Gains act on the update.* Adam and its like normalise every entry of the gradient, so a gain on it would cancel.
    While an optimizer is attached, gradient hooks sleep, and for every optimizer alike

    $$w \leftarrow w_\mathrm{old} + c \cdot (w_\mathrm{new} - w_\mathrm{old})$$

    One step moves a synapse by its gain times the distance that it would have moved without, decoupled weight decay
    included. Under momentum, a synapse whose gain becomes small stops at once, where one whose gradients become small
    coasts on. The reference package multiplies `.grad`, which is the same for `SGD` without momentum.

    *Optimizers that keep a copy of the weights* (a slow one, an average, one of higher precision) would undo gains. One
    of the same class is tried on a small weight: gains act on the copy as well, or on the gradient, or the optimizer is
    refused.

    *The loop stays what it was.* `.grad` is what the backward pass computed, and `clip_grad_norm_` sees the norm that
    the plain model would have. Of Γ synapses (`SplitSynapses`), each gets 1/√Γ of the gradient of their connection; in
    the step the optimizer sees Γ·w and that gradient, and the change is divided by Γ, so the connection moves as the
    plain one would.

    *Wrappers* around an optimizer of the same parameters (Lookahead, SAM, those of trainers) leave the steps to that
    one, so rules act at its steps: before what the wrapper does to the weights, and in its two-step forms as well.

    *Data parallelism.* Ranks stay equal, and do what one process would with the whole batch: what observers saw is
    averaged over ranks, in one all-reduce at the steps at which a rule reads it. Attach the
    `DistributedDataParallel(bio)` if you can: its process group is used, and it broadcasts no state of rules before
    each forward any more. Otherwise it is the default group.

    *Shards.* Attach after `fully_shard(bio)`, with an optimizer that is built from its parameters. Rules act on the
    part of every weight that a process holds, and do what they would on the whole: sums over a weight take an
    all-reduce, and random numbers follow from the place in the whole. From then on, gains are cut like their weights,
    and `torch.distributed.checkpoint` saves both. A model with observers is sharded as a whole, not block by block.

    Weights without a gradient (frozen, or not used) take no part in a step. Compile a model after it is attached. A
    later attachment takes the weights that it holds over from earlier ones; `biofx.detach(bio)` ends all of them. If
    `attach` fails, model and optimizers are as they were.

    Args:
        bio: a model made by `biofx.transform`, bare or inside `torch.compile` or a data-parallel wrapper.
        optimizer: an optimizer that holds parameters of `bio`, or a wrapper around one. Several optimizers may hold
            parts of it: attach each.
        compile: whether to compile what rules do to entries: fewer passes over memory, after some seconds in the first
            steps. The numbers are the same to rounding. It needs what `torch.compile` needs, such as a C++ compiler.

    Returns:
        The attachment; `detach()` leaves model and optimizer as they were. It is also a context manager.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, no pass changed a weight of it, the optimizer holds none
            of those weights, or it is a wrapper whose steps run no hooks; or weights are sharded in a way that rules do
            not follow.
        LifecycleError: `LBFGS` and `SparseAdam`, whose updates are not those of one step on dense gradients, and
            optimizers that undo gains whatever these act on; `compile`, where nothing can be compiled. At a step:
            a gradient or weight that is not finite, if a rule acts on it; a sparse gradient; no `backward()` before; a
            weight whose shape, or an optimizer whose parameters, changed since. Nothing has happened then.

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
    model, bio = bio, transformed(bio)
    record = record_of(bio)
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS | SparseAdam):
        why = "evaluates the loss several times in a step" if isinstance(optimizer, LBFGS) else "needs sparse gradients"
        raise LifecycleError(f"attach: {type(optimizer).__name__} {why}, so there is no one update for rules to act on")
    if record.by_hand:
        raise ArgumentError("attach: BioConverter made this model, whose rules are called by hand; use biofx.transform")
    own = held(optimizer)
    sites = {name: site for name, site in find_weights(bio).sites.items() if id(site.raw) in own and site.passes}
    if not sites and not any(id(stored(bio, name)) in own for name in record.nonnegative):
        if not any(run.weights for run in record.passes):
            raise ArgumentError("attach: no pass changed any weight of this model; biofx.summary(bio) says why")
        raise ArgumentError(
            f"attach: {type(optimizer).__name__} holds no weight of this model that a pass changed; "
            "build it from bio.parameters(), after the transform, and after fully_shard if you use that"
        )
    check_shards(bio, sites)
    _check_runs_hooks(optimizer)
    if compile:
        for device in {parameter.device for parameter in bio.parameters()}:
            check_compiler(device)
    wrapper = wrapper_of(model)
    attachment = Attachment(bio, optimizer, acting_with(optimizer), wrapper, compiled=compile)
    learning = {name: synapses for name, synapses in with_hooks(bio).items() if id(synapses.stored) in own}
    with ExitStack() as undo:
        for other in [*record.attachments]:
            undo.callback(other.take, *other.holding)
            other.give_up(own)
        undo.callback(attachment.give_up, own)
        cut_state(sites.values(), undo)
        attachment.take(sites, learning)
        for raw, feasible in _feasible(sites.values()):
            undo.callback(raw.copy_, raw.clone())
            raw.copy_(feasible)
        undo.pop_all()
    if wrapper is not None:
        stop_broadcasts(wrapper)
    return attachment


def detach(bio: nn.Module) -> None:
    """End all attachments of a model: it and its optimizers are as they were before `attach`, with today's values.

    Args:
        bio: a model made by `biofx.transform`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> bio = biofx.transform(torch.nn.Linear(8, 2), "fuzzy-learning-rates")
        >>> attachment = biofx.attach(bio, torch.optim.AdamW(bio.parameters()))
        >>> biofx.detach(bio)
        >>> attachment.weights
        ()
    """
    for attachment in [*record_of(transformed(bio)).attachments]:
        attachment.detach()


def _check_runs_hooks(optimizer: Optimizer) -> None:
    """Refuse an optimizer that wraps another one without being one itself: its steps would run no hooks."""
    if runs_step_hooks(optimizer):
        return
    shared = [each for each in inside(optimizer) if held(each) & held(optimizer)]
    names = [f".{name}" for name, value in vars(optimizer).items() if any(value is each for each in shared)]
    what = f"attach each one that it wraps: {', '.join(names)}" if names else "call super().__init__() in its class"
    raise ArgumentError(f"attach: steps of {type(optimizer).__name__} run no hooks, so rules could not act; {what}")


@dataclass(eq=False)
class _Step:
    """A step under way.

    Attributes:
        weights: the weights that take part, once their gradients are there.
        gradients: what the backward pass computed, of parameters that have another gradient for the optimizer.
        finite: whether all gradients and weights are finite, for each device that is not waited for.
    """

    weights: list[PlasticWeight] | None = None
    gradients: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    finite: dict[torch.device, Tensor] = field(default_factory=dict)


class Attachment:
    """The connection between a transformed model and an optimizer; `biofx.attach` makes it."""

    def __init__(
        self,
        bio: fx.GraphModule,
        optimizer: Optimizer,
        acting: Acting | None,
        wrapper: nn.parallel.DistributedDataParallel | None,
        *,
        compiled: bool,
    ) -> None:
        self.optimizer = optimizer
        self._wrapper = wrapper
        self._compiled = compiled
        self._bio = bio
        self._held = held(optimizer)
        self._acting = acting
        self._observed = {
            (id(synapses), key) for path, key in observers_in(bio.graph) for synapses in [bio.get_submodule(path)]
        }
        self._step: _Step | None = None
        self._nested = 0  # steps of a base class in a step
        self._counters = Counters()
        self._finite = Finite()
        self._hooks: list[RemovableHandle] = []
        self._guarded: MethodType | None = None
        self._hold({}, {})
        runs = [(run.pass_, run.weights) for run in record_of(bio).passes if isinstance(run.pass_, Pass)]
        self._rules = sorted((r for r in runs if r[0].moment and r[0].acts_at_step), key=lambda r: r[0].moment or 0)

    def take(self, sites: dict[str, WeightSite], learning: dict[str, Synapses]) -> None:
        """Let rules act on weights at the steps of the optimizer, and gains on what holds these synapses."""
        self._hold(sites, learning)
        if not self._hooks:
            # Rules compile their own arithmetic. As decorators these would import the compiler with biofx.
            before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
            self._hooks.append(self.optimizer.register_step_pre_hook(before))
            self._hooks.append(self.optimizer.register_step_post_hook(after))
            self._guarded = _guarded(self, self.optimizer)
            self.optimizer.step = self._guarded  # type: ignore[method-assign]  # no hook runs after a step that fails
        record_of(self._bio).attachments.add(self)
        set_attached(self._bio, {*sites, *learning}, attached=True)

    def _hold(self, sites: dict[str, WeightSite], learning: dict[str, Synapses]) -> None:
        self._sites = sites
        self._learning = learning
        self._shapes = {name: site.raw.shape for name, site in sites.items()}
        self._is_sharded = any(is_sharded(parameter) for _, parameter in self._parameters())
        self._update = Update(
            learning.values(), self.optimizer, with_copies=self._acting is Acting.COPIES, compiled=self._compiled
        )

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stored parameters on which rules or gains act, by name."""
        yield from ((name, site.raw) for name, site in self._sites.items())
        yield from ((name, synapses.stored) for name, synapses in self._learning.items())

    @property
    def holding(self) -> tuple[dict[str, WeightSite], dict[str, Synapses]]:
        """The weights on which rules act, and the synapses on which gains do."""
        return self._sites, self._learning

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights on which rules act."""
        return tuple(self._sites)

    def detach(self) -> None:
        """Leave the model and the optimizer as they were before `attach`; their values stay. Idempotent.

        Raises:
            LifecycleError: a gradient or weight was not finite at an earlier step, after everything is done.
        """
        self.give_up(self._held)
        self.check()

    def check(self) -> None:
        """Wait for the device, and raise if a gradient or weight was not finite at an earlier step.

        Steps on a CPU are checked at once. Others do not wait: the error comes at one of the steps that follow, here,
        or from `detach` and `verify`.

        Raises:
            LifecycleError: something was not finite. Rules did not act at that step.
        """
        self._finite.check()

    def give_up(self, parameters: set[int]) -> None:
        """Let rules not act on some parameters any more, given by id; without any left, leave the optimizer alone."""
        given = {name for name, synapses in self._learning.items() if id(synapses.stored) in parameters}
        given |= {name for name, site in self._sites.items() if id(site.raw) in parameters}
        set_attached(self._bio, given, attached=False)
        self._hold(
            {name: site for name, site in self._sites.items() if id(site.raw) not in parameters},
            {name: synapses for name, synapses in self._learning.items() if name not in given},
        )
        if self._held <= parameters or not (self._sites or self._learning):
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            if self._guarded is not None and vars(self.optimizer).get("step") is self._guarded:
                del self.optimizer.step
            record_of(self._bio).attachments.discard(self)

    def __repr__(self) -> str:
        where = (self._acting or Acting.UPDATE).value
        return (
            f"<{type(self.optimizer).__name__} on {', '.join(self.weights) or 'no weights'}; gains act on the {where}>"
        )

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.detach()
        else:
            self.give_up(self._held)

    def undo(self) -> None:
        """Leave no weight and no gradient as the optimizer saw it, as its step failed."""
        self._put_back()
        self._update.undo()
        self._step, self._nested = None, 0

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._step is not None:
            self._nested += 1
            return None
        if _is_skipped(optimizer) or self._trains_nothing():
            return None
        self._finite.refuse_if_known()
        self._check_unchanged()
        self._step = _Step()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            try:
                self._prepare()
            except BaseException:
                self.undo()
                raise
            self._update.begin()
            return None
        # Before the optimizer does anything: it may move the weights before it calls the closure.
        self._update.begin()

        def evaluate_then_prepare() -> Any:  # the gradients come from the closure, so the rules wait for it
            self._update.pause()
            loss = closure()
            self._prepare()
            self._update.resume()
            return loss

        return (args[0], evaluate_then_prepare), {k: v for k, v in kwargs.items() if k != "closure"}

    @torch.no_grad()
    def _trains_nothing(self) -> bool:
        """Whether a step lets the optimizer make its state and no more, as one of `torch.distributed.checkpoint`."""
        groups = self.optimizer.param_groups
        if any((isinstance(lr := group.get("lr"), Tensor) and lr.device.type != "cpu") or lr != 0 for group in groups):
            return False
        gradients = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        learns = any(bool(gradient.any()) for gradient in gradients)
        ranks = data_parallel_groups(None, (parameter for _, parameter in self._parameters()))
        return bool(gradients) and not (is_on_any(learns, ranks) if self._is_sharded else learns)

    @torch.no_grad()
    def _prepare(self) -> None:
        """Act on the gradients, which are there now."""
        assert self._step is not None
        if self._step.weights is not None:
            name = type(self.optimizer).__name__
            raise LifecycleError(f"{name} evaluates its closure twice in a step, so there is no one gradient to act on")
        counters = {name: steps for name, site in self._sites.items() if (steps := site.state("steps")) is not None}
        counts = self._counters.read(counters)
        found = (self._weight(site, counts.get(name, 0) + 1) for name, site in self._sites.items())
        weights = [weight for weight in found if weight is not None]
        if not weights and all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            raise LifecycleError(
                f"optimizer.step() without backward(): none of the {len(self._sites)} weights has a gradient"
            )
        if self._rules and weights:
            self._step.finite = self._finite.look(weights)
            groups = data_parallel_groups(self._wrapper, [weight.site.raw for weight in weights])
            average_(self._read_now(weights), groups)
        self._act(weights, self._step.finite, before_step=True)
        scale = _gradient_scale(self.optimizer)
        for weight in weights:
            if weight.gradient is not local(weight.site.raw.grad):
                self._give(weight.site.raw, weight.gradient if scale is None else weight.gradient * scale)
        for name, synapses in self._learning.items():  # biases that were split with their weights
            if name not in self._sites and synapses.shares > 1 and synapses.stored.grad is not None:
                self._give(synapses.stored, gradient_of(synapses.stored) * synapses.shares**0.5)
        if self._acting is Acting.GRADIENT:
            learning = [s for s in self._learning.values() if s.stored.grad is not None]
            shards = [shard_of(synapses.stored_name, synapses.stored) for synapses in learning]
            gains = factors(learning, shards, [local(synapses.stored.detach()) for synapses in learning])
            for synapses, gain in zip(learning, gains, strict=True):
                if gain is not None and synapses.stored.grad is not None:
                    self._give(synapses.stored, gradient_of(synapses.stored) * gain)
        self._step.weights = weights

    def _give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Let the optimizer see another gradient than the backward pass computed."""
        assert self._step is not None
        assert parameter.grad is not None
        self._step.gradients.append((parameter, parameter.grad))
        parameter.grad = cut_like(parameter, gradient.to(parameter.grad.dtype))

    def _put_back(self) -> None:
        """Give parameters the gradients back that the backward pass computed."""
        # A parameter may have been given several gradients in turn; the first in the list is that of the backward pass.
        for parameter, gradient in reversed(self._step.gradients if self._step is not None else []):
            parameter.grad = gradient

    def _weight(self, site: WeightSite, step: int) -> PlasticWeight | None:
        """A weight that takes part in this step, by its number, or None if it has no gradient."""
        raw, scale = site.raw, _gradient_scale(self.optimizer)
        if raw.grad is None or raw.numel() == 0:
            return None
        if raw.grad.layout is not torch.strided:
            raise LifecycleError(f"{site.name}: its gradient is sparse, and rules act on every entry")
        given = gradient_of(raw)
        gradient = given if scale is None else given.float() / scale
        shares = site.known_synapses.shares if site.learning is not None else 1
        if shares > 1:
            gradient = gradient * shares**0.5  # hooks give each synapse 1/√Γ; the optimizer sees the connection's
        elif scale is None and any(r.moment is Moment.GRADIENT and site.name in names for r, names in self._rules):
            gradient = gradient.clone()
        return PlasticWeight(site, local(raw), gradient, self.optimizer, step, compiled=self._compiled)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._nested:
            self._nested -= 1
            return
        self._put_back()
        step, self._step = self._step, None
        if step is None or step.weights is None:
            self._update.undo()
            return
        on_update = self._acting is not Acting.GRADIENT
        self._update.end([on_update and s.stored.grad is not None for s in self._learning.values()], step.finite)
        if self._acting is None and (key := self._update.copied()) is not None:
            raise LifecycleError(
                f"{type(optimizer).__name__} keeps a copy of the weights ({key!r} in its state), which undoes gains; "
                "no other optimizer of its class could be made from its defaults to try where gains have to act; use "
                "another optimizer, or let its constructor take what is in `defaults`"
            )
        counters = {w.name: steps for w in step.weights if (steps := w.site.state("steps")) is not None}
        try:
            self._act(step.weights, step.finite, before_step=False)
            projected = {name for rule, names in self._rules if rule.moment is Moment.PROJECTION for name in names}
            others = [weight for weight in step.weights if weight.name not in projected]
            with taken_back(step.finite, (weight.raw for weight in others)):
                for raw, feasible in _feasible(weight.site for weight in others):
                    raw.copy_(feasible)
            with taken_back(step.finite, (local(stored(self._bio, n)) for n in record_of(self._bio).nonnegative)):
                project_scales(self._bio, self._held)
        finally:
            self._counters.add(counters)

    def _act(self, weights: Sequence[PlasticWeight], finite: dict[torch.device, Tensor], *, before_step: bool) -> None:
        for pass_, names in self._rules:
            chosen = [replace(w, by=pass_.name, finite=finite.get(w.raw.device)) for w in weights if w.name in names]
            if not chosen or pass_.moment is None or pass_.moment.before_step is not before_step:
                continue
            _refuse_captured(pass_)
            if pass_.moment is Moment.TURNOVER:
                for weight in chosen:
                    weight.check_can_forget()
            changing = [x for w in chosen for x in w.own_state()] if finite else []
            changing += [w.raw for w in chosen] if not before_step else []
            changing += [w.gradient for w in chosen] if pass_.moment is Moment.GRADIENT else []
            with fixed_defaults(), taken_back(finite, changing):
                pass_.at_step(chosen)

    def _read_now(self, weights: Sequence[PlasticWeight]) -> Iterator[Tensor]:
        """What observers saw that a rule reads in this step."""
        for weight in weights:
            for pass_, names in self._rules:
                if weight.name in names and weight.step % _every(pass_) == 0:
                    for key, users in weight.synapses.users.items():
                        if pass_.name in users and (id(weight.synapses), key) in self._observed:
                            yield weight.state(key)

    def _check_unchanged(self) -> None:
        """Refuse a step for which the attachment was not made."""
        for name, parameter in self._parameters():
            if self._is_sharded and id(parameter) not in self._held:
                raise LifecycleError(
                    f"{name} is whole on every rank, as no backward pass followed the last forward pass; call "
                    "reshard() of the model before optimizer.step()"
                )
        for name, site in self._sites.items():
            if site.raw.shape != self._shapes[name]:
                raise LifecycleError(
                    f"{name} was {tuple(self._shapes[name])} when it was attached and is {tuple(site.raw.shape)}; "
                    "detach, build the optimizer again, and attach"
                )
        if held(self.optimizer) != self._held:
            raise LifecycleError(
                "the optimizer holds other parameters than when it was attached; detach and attach again"
            )


def _guarded(attachment: Attachment, optimizer: Optimizer) -> MethodType:
    """The step of an optimizer, undone if it fails; a method of the optimizer, as schedulers take it apart."""
    step = optimizer.step

    @functools.wraps(step)  # schedulers mark a step that they know
    def guarded(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except BaseException:
            attachment.undo()
            raise

    return MethodType(guarded, optimizer)


def _refuse_captured(pass_: Pass) -> None:
    """Refuse a rule that does not act at every step while a CUDA graph is captured, which is one step for all."""
    if _every(pass_) != 1 and is_captured():
        raise LifecycleError(
            f"{pass_.name} acts every {_every(pass_)} steps, and a CUDA graph replays the step that was captured; "
            "use every=1, or do not capture the optimizer's step"
        )


def _every(pass_: Pass) -> int:
    """The number of steps from one at which a rule acts to the next."""
    every: int = getattr(pass_, "every", 1)
    return every


def _feasible(sites: Iterable[WeightSite]) -> Iterator[tuple[Tensor, Tensor]]:
    """What is stored, and the same with the signs of units, where the projection in forward sleeps."""
    for site in sites:
        constraint, sign = constraint_of(site), site.sign
        if constraint is CONSTRAINTS["project"] and sign is not None:
            raw = local(site.raw).detach()
            yield raw, constraint.store(raw, shard_of(site.name, site.raw).part(sign))


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip its step, as `GradScaler` found gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that a fused optimizer takes out of the gradients itself."""
    return getattr(optimizer, "grad_scale", None)
