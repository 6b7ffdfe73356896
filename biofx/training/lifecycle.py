"""The lifecycle: what rules do around each step of an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from biofx.base.errors import LifecycleError
from biofx.base.randomness import fixed_defaults
from biofx.base.shards import cut_like, gradient_of, is_sharded, local, shard_of
from biofx.base.torch_internals import steps_under_way
from biofx.model.changes import INSTEAD, moved_synapses
from biofx.model.provenance import record_of
from biofx.model.stale_gradients import StaleGradients
from biofx.model.synapses import Synapses, is_parameter, observers_in, stored, synapses_of
from biofx.rewrite.registry import Moment, Pass
from biofx.signs.constraints import CONSTRAINTS, constraint_of, rectify_
from biofx.signs.scales import project_scales, scales_of
from biofx.training.copies import Copies
from biofx.training.counting import Counters, is_captured
from biofx.training.factors import factors
from biofx.training.finite import Finite, undone_unless_finite
from biofx.training.gain_target import GainTarget, keys_of_copies
from biofx.training.plan import Plan, period_of
from biofx.training.plastic_weight import PlasticWeight
from biofx.training.ranks import average_, data_parallel_groups, is_on_any
from biofx.training.update import Update
from biofx.training.wrappers import parameter_ids

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite

AGAIN = "detach, build the optimizer again, and attach"


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


class Lifecycle:
    """What rules do around the steps of one optimizer, on the weights of one model.

    Attributes:
        bio: the model.
        optimizer: the optimizer.
        gain_target: on what gains act; None if that is not known.
        sites: the weights on which rules act, by name.
        with_gains: the synapses on whose learning gains act, by the weight's name.
        held: the parameters of the optimizer, by id.
        finite: what is known of gradients and weights that were not finite.
        wrapper: the data-parallel wrapper of the model, if it is known.
        stale: gradients from before the attachment, which hooks changed.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        optimizer: Optimizer,
        gain_target: GainTarget | None,
        wrapper: nn.parallel.DistributedDataParallel | None,
        *,
        compiled: bool,
    ) -> None:
        self.held = parameter_ids(optimizer)
        self.finite = Finite()
        self.bio = bio
        self.optimizer = optimizer
        self.gain_target = gain_target
        self.wrapper = wrapper
        self.stale = StaleGradients()
        self._compiled = compiled
        self._keys_of_copies = None if gain_target in (None, GainTarget.UPDATE) else keys_of_copies(optimizer)
        self._observed = {
            (id(synapses), key) for path, key in observers_in(bio.graph) for synapses in [bio.get_submodule(path)]
        }
        self._step: _Step | None = None
        self._nested = 0  # steps of a base class in a step
        self._is_observing = False  # whether it is known that observers see something
        self._counters = Counters()
        runs = [(run.pass_, run.weights) for run in record_of(bio).passes]
        self._rules = sorted((r for r in runs if r[0].moment and r[0].acts_at_step), key=lambda r: r[0].moment or 0)
        self.hold({}, {})

    def hold(self, sites: dict[str, WeightSite], with_gains: dict[str, Synapses]) -> None:
        """Act on these weights from now on, with gains on these synapses."""
        self.sites = sites
        self.with_gains = with_gains
        self._shapes = {name: site.raw.shape for name, site in sites.items()}
        self._attached = {name: self._found(name) for name in (*sites, *with_gains)}
        self._copies = Copies(dict(self._changed()), self.optimizer, self._keys_of_copies)
        copies = self._copies if self.gain_target is GainTarget.COPIES else None
        self._update = Update(with_gains.values(), copies=copies, compiled=self._compiled)
        self._plan: Plan | None = None

    def _changed(self) -> Iterator[tuple[nn.Parameter, int]]:
        """The parameters that gains or rules change after a step, with the number of synapses of their connections."""
        if not self.held:  # a detached copy, of a model that may still be incomplete
            return
        yield from ((scale, 1) for scale in scales_of(self.bio) if id(scale) in self.held)
        written = {name for moment in Moment if moment.writes for name in self.acted_on(moment)}
        for name, site in self.sites.items():
            if name in written or constraint_of(site) is CONSTRAINTS["project"]:
                yield site.raw, 1
        yield from ((synapses.stored, synapses.shares) for synapses in self.with_gains.values())

    def acted_on(self, moment: Moment) -> dict[str, str]:
        """The rule that acts last at a moment, by the name of the weight."""
        return {name: rule.name for rule, names in self._rules if rule.moment is moment for name in names}

    def undo(self) -> None:
        """Restore the weights and gradients that the optimizer saw changed, after its step failed."""
        self._put_back()
        self._update.undo()
        self._project(site for site in self.sites.values())
        self._step, self._nested = None, 0

    @torch.no_grad()
    def _project(self, sites: Iterable[WeightSite]) -> None:
        """Give weights the signs of their units, where no rule does."""
        rectify_(*unprojected(sites))

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Before a step: act on gradients, which may come from the closure, whose arguments are returned then."""
        if self._step is not None:
            self._refuse_after_failure()
            self._nested += 1
            return None
        if _is_skipped(optimizer) or self._trains_nothing():
            return None
        self.finite.refuse_if_known()
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

    def _refuse_after_failure(self) -> None:
        """Refuse a step if the one before failed, and was called by a bound method from before the attachment."""
        if steps_under_way(self.optimizer) != 1:  # none is seen if it is compiled
            return
        self.undo()
        name = type(self.optimizer).__name__
        raise LifecycleError(
            f"the last step of {name} failed, and `step` was taken from it before attach, so nobody put the weights "
            "back. Now they are: call zero_grad() and backward() again, and take `step` after attach"
        )

    @torch.no_grad()
    def _trains_nothing(self) -> bool:
        """Whether a step only creates the optimizer's state, as those of `torch.distributed.checkpoint` do."""
        groups = self.optimizer.param_groups
        if any((isinstance(lr := group.get("lr"), Tensor) and lr.device.type != "cpu") or lr != 0 for group in groups):
            return False
        gradients = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        learns = any(bool(gradient.any()) for gradient in gradients)
        sharded = [parameter for parameter, _ in self._attached.values() if is_sharded(parameter)]
        return bool(gradients) and not (is_on_any(learns, data_parallel_groups(None, sharded)) if sharded else learns)

    @torch.no_grad()
    def _prepare(self) -> None:
        """Act on the gradients, now that they are computed."""
        assert self._step is not None
        if self._step.weights is not None:
            name = type(self.optimizer).__name__
            raise LifecycleError(f"{name} evaluates its closure twice in a step, so there is no one gradient to act on")
        weights = self._weights()
        if not weights:
            self._refuse_unlearned()
        self._refuse_stale_gradients()
        self._refuse_gradients_of_copies()
        if self._rules and weights:
            periods = self.plan.periods
            acted_on = [w for w in weights if any(w.step % period == 0 for period in periods[w.name])]
            self._step.finite = self.finite.look(weights, acted_on)
            groups = data_parallel_groups(self.wrapper, [weight.site.raw for weight in weights])
            if self.plan.seen and (groups or not self._is_observing):
                read = [*self._read_now(weights)]
                average_((state for _, _, state in read), groups)
                self._tell_unseen(read)
        self._act(weights, self._step.finite, before_step=True)
        scale = _gradient_scale(self.optimizer)
        for weight in weights:
            if weight.gradient is not local(weight.site.raw.grad):
                self._give(weight.site.raw, weight.gradient if scale is None else weight.gradient * scale)
        self._prepare_gains()
        self._step.weights = weights

    def _prepare_gains(self) -> None:
        """Show the optimizer gradients of biases that were split, and gains where they act on gradients."""
        for name, synapses in self.with_gains.items():  # biases that were split with their weights
            if name not in self.sites and synapses.shares > 1 and synapses.stored.grad is not None:
                self._give(synapses.stored, gradient_of(synapses.stored) * synapses.shares**0.5)
        if self.gain_target is GainTarget.GRADIENT:
            learning = [s for s in self.with_gains.values() if s.stored.grad is not None]
            shards = [shard_of(synapses.stored_name, synapses.stored) for synapses in learning]
            gains = factors(learning, shards, [local(synapses.stored.detach()) for synapses in learning])
            for synapses, gain in zip(learning, gains, strict=True):
                if gain is not None and synapses.stored.grad is not None:
                    self._give(synapses.stored, gradient_of(synapses.stored) * gain)

    def _refuse_unlearned(self) -> None:
        """Refuse a step for which no gradient was computed, unless everything is frozen."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in held) and any(p.requires_grad for p in held):
            raise LifecycleError(
                f"optimizer.step() without backward(): none of the {len(self.sites)} weights has a gradient"
            )

    def _refuse_stale_gradients(self) -> None:
        name = self.stale.first(self.with_gains)
        if name is not None:
            raise LifecycleError(
                f"{name}: its gradient was computed before the optimizer was attached, with gains; call "
                "zero_grad() after attach, and backward() again"
            )
        self.stale.forget()

    def _refuse_gradients_of_copies(self) -> None:
        """Refuse per-sample gradients of opacus, which it computes on copies of layers, where hooks act."""
        for name, synapses in self.with_gains.items():
            if getattr(synapses.stored, "grad_sample", None) is not None:
                raise LifecycleError(
                    f"{name}: its gradient for each sample was computed on a copy of its layer, to which no optimizer "
                    "is attached, so gains would act twice; train without attach, where they act in the backward pass"
                )

    def _give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Show the optimizer another gradient than the backward pass computed."""
        assert self._step is not None
        assert parameter.grad is not None
        self._step.gradients.append((parameter, parameter.grad))
        parameter.grad = cut_like(parameter, gradient.to(parameter.grad.dtype))

    def _put_back(self) -> None:
        """Give parameters back the gradients that the backward pass computed."""
        # A parameter may have been given several gradients in turn; the first in the list is that of the backward pass.
        for parameter, gradient in reversed(self._step.gradients if self._step is not None else []):
            parameter.grad = gradient

    def _weights(self) -> list[PlasticWeight]:
        """The weights that the optimizer moves in this step: those that have a gradient."""
        plan, scale = self.plan, _gradient_scale(self.optimizer)
        counts = self._counters.read(plan.counters)
        weights: list[PlasticWeight] = []
        for name, site in plan.sites.items():
            raw = site.raw
            if raw.grad is None or raw.numel() == 0:
                continue
            if raw.grad.layout is not torch.strided:
                raise LifecycleError(f"{name}: its gradient is sparse, and rules act on every entry")
            gradient = gradient_of(raw)
            if scale is not None:
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale
            weight = PlasticWeight(
                site,
                local(raw),
                gradient,
                self.optimizer,
                counts.get(name, 0) + 1,
                compiled=self._compiled,
                group=self._groups[id(raw)],
                is_frozen=not raw.requires_grad,
            )
            weights.append(weight)
        # Hooks give each synapse 1/√Γ; the optimizer sees the connection's gradient. Rules add to a copy.
        other = [w for w in weights if w.site.shares > 1 or (scale is None and w.name in plan.pulled)]
        if other:
            factors = [weight.site.shares**0.5 for weight in other]
            for weight, gradient in zip(other, torch._foreach_mul([w.gradient for w in other], factors), strict=True):
                weight.gradient = gradient
        return weights

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: apply gains to what it changed, and rules to the weights."""
        if self._nested:
            self._nested -= 1
            return
        self._put_back()
        step, self._step = self._step, None
        if step is None or step.weights is None:
            self._update.undo()
            return
        on_update = self.gain_target is not GainTarget.GRADIENT
        self._update.end([on_update and s.stored.grad is not None for s in self.with_gains.values()], step.finite)
        if self.gain_target is None:
            self._refuse_copies()
        plan = self.plan
        counted = (weight.name for weight in step.weights if not weight.is_frozen)
        counters = {name: plan.counters[name] for name in counted if name in plan.counters}
        others = [weight for weight in step.weights if weight.name in plan.unprojected]
        try:
            with nullcontext() if self.gain_target is GainTarget.UPDATE else self._copies.following():
                try:
                    self._act(step.weights, step.finite, before_step=False)
                except BaseException:  # such as Ctrl-C
                    self._project(weight.site for weight in step.weights)
                    raise
                with undone_unless_finite(step.finite, [*(w.raw for w in others), *map(local, plan.scales)]):
                    self._project(weight.site for weight in others)
                    project_scales(plan.scales)
        finally:
            self._counters.add(counters)

    def _refuse_copies(self) -> None:
        """Refuse an optimizer that could not be tried if it keeps copies of the weights."""
        for _, key, _ in self._copies.found():
            raise LifecycleError(
                f"{type(self.optimizer).__name__} keeps a copy of the weights ({key!r} in its state), which undoes "
                "gains and rules; no other optimizer of its class could be made from its defaults to try where they "
                "have to act; use another optimizer, or let its constructor take what is in `defaults`"
            )

    def _act(self, weights: Sequence[PlasticWeight], finite: dict[torch.device, Tensor], *, before_step: bool) -> None:
        for pass_, names in self._rules:
            if pass_.moment is None or pass_.moment.before_step is not before_step:
                continue
            old = dict(zip(self.with_gains, self._update.old, strict=True)) if pass_.moment is Moment.UPDATE else {}
            chosen = [
                weight.seen_by(pass_.name, finite.get(weight.raw.device) if finite else None, old.get(weight.name))
                for weight in weights
                if weight.name in names and _acts(pass_, weight)
            ]
            if not chosen:
                continue
            _refuse_captured(pass_)
            if pass_.moment is Moment.TURNOVER:
                self._check_can_forget(pass_, chosen)
            changing = [x for w in chosen for x in w.own_state()] if finite else []
            changing += [w.raw for w in chosen] if finite and not before_step else []
            changing += [w.gradient for w in chosen] if finite and pass_.moment is Moment.GRADIENT else []
            with fixed_defaults(), undone_unless_finite(finite, changing):
                pass_.at_step(chosen)

    def _check_can_forget(self, pass_: Pass, weights: Sequence[PlasticWeight]) -> None:
        """Refuse optimizer state that a rule could not reset: at the first step, and whenever the rule acts."""
        is_known, period = pass_.name in self.plan.turning, period_of(pass_)
        for weight in weights if not is_known else [w for w in weights if w.step % period == 0]:
            weight.check_can_forget()
        self.plan.turning.add(pass_.name)

    def _tell_unseen(self, read: Sequence[tuple[str, str, Tensor]]) -> None:
        """Warn if observers saw nothing up to the first step at which a rule reads them; later ones do not wait."""
        if not read or self._is_observing or is_captured():
            return
        self._is_observing = True
        seen = torch.stack([state.any().to(read[0][2].device) for _, _, state in read]).tolist()
        unseen = next((where for where, is_seen in zip(read, seen, strict=True) if not is_seen), None)
        if unseen is not None:
            rule, name, _ = unseen
            warnings.warn(
                f"{rule} saw no activity at {name} before this step, so it does not act as it should. Call the model "
                "itself, in training mode: observers see nothing in evaluation mode, or if its layers or other methods "
                "than forward are called",
                UserWarning,
                stacklevel=2,
            )

    def _read_now(self, weights: Sequence[PlasticWeight]) -> Iterator[tuple[str, str, Tensor]]:
        """What observers saw that a rule reads in this step, with the names of the rule and the weight."""
        for weight in weights:
            for pass_, key in self.plan.seen.get(weight.name, ()):
                if weight.step % period_of(pass_) == 0 and _acts(pass_, weight):
                    yield pass_.name, weight.name, weight.state(key)

    @property
    def plan(self) -> Plan:
        """What was looked up for this step."""
        if self._plan is None:
            self._update.look_again()
            self._plan = Plan(self.bio, self.sites, self.with_gains, self._rules, self.held, self._observed)
        return self._plan

    def _check_unchanged(self) -> None:
        """Refuse a step if the weights or the optimizer are not those of the attachment."""
        if self._plan is None or not self._plan.is_right:
            self._check_found()
            self._plan = None
        for name, site in self.plan.sites.items():
            if site.raw.shape != self._shapes[name]:
                before, now = tuple(self._shapes[name]), tuple(site.raw.shape)
                raise LifecycleError(f"{name} was {before} when it was attached and is {now}; {AGAIN}")
        self._groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        if self._groups.keys() != self.held:
            raise LifecycleError(
                "the optimizer holds other parameters than when it was attached; detach and attach again"
            )

    def _found(self, name: str) -> tuple[Any, Synapses | None]:
        """The parameter that has a name now, and its synapses."""
        return stored(self.bio, name) if is_parameter(self.bio, name) else None, synapses_of(self.bio, name)

    def _check_found(self) -> None:
        """Refuse a step if a parameter is not the one that was attached."""
        for name in (*self._attached, *record_of(self.bio).nonnegative):
            now, synapses = self._found(name)
            before = self._attached.get(name, (now, synapses))
            if now is not None and now is before[0] and synapses is before[1]:
                continue
            moved = next(moved_synapses(self.bio), None)
            if moved is not None:
                raise LifecycleError(f"{moved}; {INSTEAD}")
            if now is None:
                raise LifecycleError(f"{name} was removed after it was attached; {AGAIN}")
            if _dimensions(now) < _dimensions(before[0]):
                raise LifecycleError(
                    f"{name} is whole on every rank, as no backward pass followed the last forward pass; call "
                    "reshard() of the model before optimizer.step()"
                )
            raise LifecycleError(
                f"{name} is another tensor than the optimizer holds, as after an assignment, "
                f"load_state_dict(assign=True) or fully_shard; {AGAIN}"
            )


def _dimensions(parameter: Any) -> int:
    """The number of dimensions of the mesh over which a parameter is cut."""
    return parameter.device_mesh.ndim if is_sharded(parameter) else 0


def _acts(pass_: Pass, weight: PlasticWeight) -> bool:
    """Whether a rule acts on a weight: a frozen one only follows what an optimizer does to it, as by momentum."""
    return not weight.is_frozen or (pass_.moment is not None and pass_.moment.follows)


def _refuse_captured(pass_: Pass) -> None:
    """Refuse a rule that does not act at every step while a CUDA graph is captured, which is one step for all."""
    if period_of(pass_) != 1 and is_captured():
        raise LifecycleError(
            f"{pass_.name} acts every {period_of(pass_)} steps, and a CUDA graph replays the step that was captured; "
            "use every=1, or do not capture the optimizer's step"
        )


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip its step, because `GradScaler` found gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The loss scale that a fused optimizer takes out of the gradients itself."""
    return getattr(optimizer, "grad_scale", None)


def unprojected(sites: Iterable[WeightSite]) -> tuple[list[Tensor], list[Tensor]]:
    """What is stored, and the signs of units behind it, where the projection in forward sleeps."""
    stored_values, signs = list[Tensor](), list[Tensor]()
    for site in sites:
        if constraint_of(site) is CONSTRAINTS["project"] and site.sign is not None:
            stored_values.append(local(site.raw).detach())
            signs.append(shard_of(site.name, site.raw).part(site.sign))
    return stored_values, signs
