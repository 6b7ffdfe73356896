"""Attachments: rules act around `optimizer.step()`."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from types import MethodType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.errors import ArgumentError, LifecycleError
from biofx.base.torch_internals import run_hooks_next_to_step, runs_step_hooks
from biofx.model.changes import transformed
from biofx.model.forgotten_attach import note_stale_gradients, warn_if_unattached
from biofx.model.provenance import record_of, unwrapped
from biofx.model.stale_gradients import StaleGradients
from biofx.model.synapses import Synapses, stored, synapses_in
from biofx.rewrite.registry import Moment
from biofx.signs.constraints import rectify_
from biofx.training.compiling import check_compiler
from biofx.training.finite import Finite
from biofx.training.gain_target import GainTarget, gain_target_for, undoes_writes
from biofx.training.hook_switch import set_attached, synapses_with_hooks
from biofx.training.lifecycle import Lifecycle, unprojected
from biofx.training.parallelism import refuse_whole
from biofx.training.ranks import data_parallel_groups, note_wrapper, stop_broadcasts, wrapper_of
from biofx.training.sharded_weights import check_shards, cut_state
from biofx.training.wrappers import innermost, named_inside, parameter_ids, wrapped_optimizers

_ACTING: WeakKeyDictionary[Synapses, Callable[[], Attachment | None]] = WeakKeyDictionary()  # whose rules act on them
_SHAPED_AS_WEIGHTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")


def attach(bio: nn.Module, optimizer: Optimizer, *, compile: bool = False) -> Attachment:  # noqa: A002 - torch's word
    r"""Make the rules of a transformed model act around every `optimizer.step()`. No line of the training loop changes.

    The optimizer's own step hooks are used, so this works with gradient accumulation (once for each step, on the
    accumulated gradient), with `GradScaler` (gradients are unscaled, and a step that it skips changes nothing), and
    after the all-reduce of data parallelism. The order at every step:

    1. before it: `L1Regularization`, then `Crystallize`;
    2. the optimizer's step, gains on what it changed, and `ExponentiatedGradient` on the result;
    3. after it: `ContinualBackprop`, `Rejuvenate`, `SynapticScaling`, refresh of the gains of `FuzzyLearningRates`,
       projection on signs (`DalesPrinciple`, `MirrorUnits`, `InhibitoryInterneurons`), and of the parameters that
       multiply their units on what is not negative.

    *Gains act on the update.* Adam and similar optimizers normalise every entry of the gradient, which cancels gains.
    While an optimizer is attached, gradient hooks sleep, and for every optimizer alike

    $$w \leftarrow w_\mathrm{old} + c \cdot (w_\mathrm{new} - w_\mathrm{old})$$

    One step moves a synapse by its gain times the distance that it would have moved without, decoupled weight decay
    included. Under momentum, a synapse whose gain becomes small stops at once, where one whose gradients become small
    coasts on. The reference package multiplies `.grad`, which is the same for `SGD` without momentum.

    *Optimizers that keep a copy of the weights* (a slow one, an average, one of higher precision) would undo gains. One
    of the same class is tried on a small weight: gains act on the copy as well, or on the gradient, or the optimizer is
    refused. What rules do to weights by themselves is done to the copies as well.

    *The loop does not change.* `.grad` is what the backward pass computed, and `clip_grad_norm_` sees the norm that
    the plain model would have. Of Γ synapses (`SplitSynapses`), each gets 1/√Γ of the gradient of their connection; in
    the step the optimizer sees Γ·w and that gradient, and the change is divided by Γ, so the connection moves as the
    plain one would.

    *Wrappers* around an optimizer of the same parameters (Lookahead, SAM, those of trainers) leave the steps to that
    one, so rules act at its steps: before what the wrapper does to the weights, and in its two-step forms as well.

    *Data parallelism.* Ranks stay equal, and do what one process would with the whole batch: what observers saw is
    averaged over ranks, in one all-reduce at the steps at which a rule reads it. Attach the
    `DistributedDataParallel(bio)`, or `bio` before or after it is wrapped: the process group of the wrapper is used,
    and it broadcasts no state of rules before each forward any more. Without a wrapper it is the default group.

    *Shards.* Attach after `fully_shard(bio)` or `biofx.parallelize`, or both, with an optimizer that is built from its
    parameters. Rules act on the part of every weight that a process holds, and do what they would on the whole: sums
    over a weight take an all-reduce, and random numbers follow from the place in the whole. From then on, gains are cut
    like their weights, and `torch.distributed.checkpoint` saves both. A model with observers is sharded as a whole, not
    block by block.

    *Steps* are counted in the buffers `<weight>_synapses.steps`, which checkpoints hold. To change them on a GPU,
    use `load_state_dict` or `copy_`: a write through `.data` goes unnoticed there, and rules with `every=…` then act
    at other steps.

    Weights without a gradient (frozen, or not used) take no part in a step. What an optimizer does to a frozen weight
    by a gradient that is still there, or by momentum, obeys gains and signs, and no other rule acts on it. Compile a
    model after it is attached. A later attachment takes the weights that it holds over from earlier ones;
    `biofx.detach(bio)` ends all of them. If `attach` fails, model and optimizers are as they were.

    Args:
        bio: a model made by `biofx.transform`, bare or inside `torch.compile` or a data-parallel wrapper.
        optimizer: an optimizer that holds parameters of `bio`, or a wrapper around one. Several optimizers may hold
            parts of it: attach each.
        compile: whether to compile what rules do to entries: fewer passes over memory, after some seconds in the first
            steps. The numbers are the same to rounding. It needs what `torch.compile` needs, such as a C++ compiler.

    Returns:
        The attachment; `detach()` leaves model and optimizer as they were. It is also a context manager. Copied or
        pickled, with its model and optimizer, it is detached: attach the copies again.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, no pass changed a weight of it, the optimizer holds none
            of those weights, or remembers something of the shape of others, or is a wrapper whose steps run no hooks;
            weights are sharded in a way that rules do not follow, or belong to another model that is attached.
        LifecycleError: `LBFGS` and `SparseAdam`, whose updates are not those of one step on dense gradients, and
            optimizers that undo gains whatever these act on; `compile`, where nothing can be compiled. At a step:
            a gradient or weight that is not finite, if a rule acts on it; a gradient that is sparse, or from before the
            attachment; no `backward()` before; a weight whose shape or tensor, or an optimizer whose parameters,
            changed since. Nothing has happened then. If the optimizer itself fails in a step, the weights on which
            gains act are as before it. What else happened stays, as without biofx: in other parameters, in the state of
            the optimizer, and in gains that `Crystallize` dampened.

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
    optimizer = _followed(bio, optimizer)
    sites, own = _sites_of(bio, optimizer), parameter_ids(optimizer)
    refuse_whole(optimizer)
    check_shards(bio, sites)
    _check_runs_hooks(bio, optimizer)
    _check_state(optimizer, sites)
    if compile:
        for device in {parameter.device for parameter in bio.parameters()}:
            check_compiler(device)
    _warn_of_torn_layers(bio, optimizer, sites)
    wrapper = wrapper_of(model)
    gain_target = gain_target_for(optimizer)
    attachment = Attachment(bio, optimizer, gain_target, wrapper, compiled=compile)
    hooked, changed = synapses_with_hooks(bio), attachment.acted_on(Moment.UPDATE)
    followed = {name: s for name, s in synapses_in(bio).items() if name in hooked or name in changed}
    learning = {name: synapses for name, synapses in followed.items() if id(synapses.stored) in own}
    _check_alone(bio, {name: site.known_synapses for name, site in sites.items() if site.child} | learning)
    _refuse_undone(attachment, sites.keys() | learning.keys())
    with ExitStack() as undo:
        undo.callback(attachment.stale.forget)
        attachment.stale.note({name: each for name, each in learning.items() if not each.attached}, watch=True)
        for other in [*record_of(bio).attachments]:
            undo.callback(other.take, *other.holding)
            other.give_up(own)
        undo.callback(attachment.give_up, own)
        cut_state(sites.values(), undo)
        attachment.take(sites, learning)
        stored_values, signs = unprojected(sites.values())
        for values in stored_values:
            undo.callback(values.copy_, values.clone())
        rectify_(stored_values, signs)
        undo.pop_all()
    if wrapper is not None:
        stop_broadcasts(wrapper)
    return attachment


def _followed(bio: fx.GraphModule, given: Any) -> Optimizer:
    """The optimizer whose steps the rules of a model follow."""
    optimizer = innermost(given)
    if not isinstance(optimizer, Optimizer):
        what = f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        raise ArgumentError(f"attach: {what}{_attach_each_inside(bio, optimizer)}")
    if isinstance(optimizer, LBFGS | SparseAdam):
        why = "evaluates the loss several times in a step" if isinstance(optimizer, LBFGS) else "needs sparse gradients"
        raise LifecycleError(
            f"attach: {type(optimizer).__name__} {why}, so there is no one update for rules to act on; use another "
            "optimizer for weights that a pass changed. One that holds none of them needs no attach"
        )
    if record_of(bio).by_hand:
        raise ArgumentError("attach: BioConverter made this model, whose rules are called by hand; use biofx.transform")
    return optimizer


def _refuse_undone(attachment: Attachment, names: Collection[str]) -> None:
    """Refuse rules whose changes of weights would be undone by an optimizer that keeps copies of them."""
    optimizer, gain_target = attachment.optimizer, attachment.gain_target
    if gain_target in (None, GainTarget.UPDATE):
        return
    undone, writing = attachment.acted_on(Moment.UPDATE), [attachment.acted_on(m) for m in Moment if m.writes]
    if any(writing) and undoes_writes(optimizer, gain_target):
        undone = {name: rule for each in (*writing, undone) for name, rule in each.items()}
    for name in sorted(names & undone.keys()):
        raise LifecycleError(
            f"attach: {type(optimizer).__name__} keeps copies of the weights, which undo what {undone[name]} does to "
            f"{name}; use an optimizer that keeps no copy"
        )


def _sites_of(bio: fx.GraphModule, optimizer: Optimizer) -> dict[str, WeightSite]:
    """The weights on which rules act that an optimizer holds."""
    own, record = parameter_ids(optimizer), record_of(bio)
    sites = {name: site for name, site in find_weights(bio).sites.items() if id(site.raw) in own and site.passes}
    if not sites and not any(id(stored(bio, name)) in own for name in record.nonnegative):
        if not any(run.weights for run in record.passes):
            raise ArgumentError("attach: no pass changed any weight of this model; biofx.summary(bio) says why")
        advice = "build it from bio.parameters(), after the transform, and after fully_shard if you use that"
        if any(id(parameter) in own for parameter in bio.parameters()):  # such as biases
            advice = "the parameters of this model that it holds need no attach"
        what = f"{type(optimizer).__name__} holds no weight of this model that a pass changed"
        raise ArgumentError(f"attach: {what}; {advice}")
    return sites


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
    for attachment in [*record_of(unwrapped(bio)).attachments]:
        attachment.detach()


def _check_runs_hooks(bio: fx.GraphModule, optimizer: Optimizer) -> None:
    """Refuse an optimizer that wraps others without being one itself: its steps would run no hooks."""
    if not runs_step_hooks(optimizer):
        what = _attach_each_inside(bio, optimizer) or "; call super().__init__() in its class"
        raise ArgumentError(f"attach: steps of {type(optimizer).__name__} run no hooks, so rules could not act{what}")


def _attach_each_inside(bio: fx.GraphModule, container: Any) -> str:
    """Advice for somebody who gave a container of optimizers; empty if none of them holds a weight of the model."""
    weights = {id(each.stored) for each in synapses_in(bio).values()}
    weights |= {id(stored(bio, name)) for name in record_of(bio).nonnegative}
    calls = [
        f"biofx.attach(bio, optimizer{at})" for at, x in named_inside(container).items() if parameter_ids(x) & weights
    ]
    return f"; attach each one in it: {'; '.join(calls)}" if calls else ""


def _check_state(optimizer: Optimizer, sites: Mapping[str, WeightSite]) -> None:
    """Refuse an optimizer that remembers something of the shape of another parameter."""
    for name, site in sites.items():
        for key, memory in optimizer.state.get(site.raw, {}).items():
            if key in _SHAPED_AS_WEIGHTS and isinstance(memory, Tensor) and memory.shape != site.raw.shape:
                raise ArgumentError(
                    f"attach: the optimizer's {key} of {name} is {tuple(memory.shape)}, and {name} is "
                    f"{tuple(site.raw.shape)}; the state of an optimizer of the plain model belongs to other parameters"
                )


def _check_alone(bio: nn.Module, synapses: Mapping[str, Synapses]) -> None:
    """Refuse weights on which the rules of another model with the same layer act already."""
    for name, each in synapses.items():
        other = _ACTING.get(each, lambda: None)()
        if other is not None and other.bio is not bio:
            raise ArgumentError(
                f"attach: {name} is a weight of another transformed model as well, which is attached, so rules would "
                "act twice; detach that model first (biofx.detach)"
            )
        if each.shares > 1 and each.stored.device.type == "cpu" and each.stored.is_shared():
            raise ArgumentError(
                f"attach: {name} lies in memory that other processes share, and these would see it {each.shares} times "
                "as large while the optimizer steps; share a copy, or leave out SplitSynapses"
            )


def _warn_of_torn_layers(bio: fx.GraphModule, optimizer: Optimizer, sites: Collection[str]) -> None:
    """Warn of weights on which a rule acts together, if an optimizer holds only some of them."""
    rules = [run.pass_ for run in record_of(bio).passes]
    for rule, group in [(each, group) for each in rules for group in each.held_together(bio)]:
        missing = [name for name in group if name not in sites]
        present = [name for name in group if name in sites]
        if missing and present:
            warnings.warn(
                f"attach: {rule.name} does not act on {', '.join(present)} together with {', '.join(missing)}, which "
                f"{type(optimizer).__name__} does not hold. Let one optimizer hold all of them; groups of its "
                "parameters may have options of their own",
                UserWarning,
                stacklevel=3,
            )


class Attachment(Lifecycle):
    """The connection between a transformed model and an optimizer; `biofx.attach` makes it."""

    _hooks: tuple[RemovableHandle, ...] = ()
    _hooks_of_model: tuple[RemovableHandle, ...] = ()
    _guarded: MethodType | None = None
    _step_before: Any = None  # a `step` that other code has set on the optimizer

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: it is detached, as copies of optimizers have no hooks."""
        return {name: vars(self)[name] for name in ("bio", "optimizer", "gain_target", "_compiled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            state, held=set(), finite=Finite(), wrapper=None, _rules=[], _keys_of_copies=None, stale=StaleGradients()
        )
        self.hold({}, {})

    def take(self, sites: dict[str, WeightSite], learning: dict[str, Synapses]) -> None:
        """Make rules act on weights at the steps of the optimizer, and gains on these synapses."""
        self.hold(sites, learning)
        if not self._hooks:
            # Rules compile their own arithmetic. As decorators these would import the compiler with biofx.
            before, after = torch.compiler.disable(self.before), torch.compiler.disable(self.after)
            self._hooks = (self.optimizer.register_step_pre_hook(before),)
            self._hooks += (self.optimizer.register_step_post_hook(after),)  # if this fails, the first is known
            if data_parallel_groups(None, ()):
                self._hooks_of_model = (self.bio.register_forward_pre_hook(note_wrapper),)
            self._step_before = vars(self.optimizer).get("step")
            self._guarded = self._with_undo(self.optimizer)
            self.optimizer.step = self._guarded  # type: ignore[method-assign]  # no hook runs after a step that fails
        record_of(self.bio).attachments.add(self)
        for synapses in self._acted_synapses():
            _ACTING[synapses] = weakref.ref(self)
        set_attached(self.bio, {*sites, *learning}, attached=True)

    @property
    def holding(self) -> tuple[dict[str, WeightSite], dict[str, Synapses]]:
        """The weights on which rules act, and the synapses on which gains do."""
        return self.sites, self.with_gains

    def _acted_synapses(self) -> Iterator[Synapses]:
        """The synapses on which rules or gains act."""
        yield from (site.known_synapses for site in self.sites.values() if site.child is not None)
        yield from self.with_gains.values()

    def acts_for(self, optimizer: Optimizer) -> bool:
        """Whether rules act at the steps of an optimizer: it is the attached one, around that, or inside of it."""
        known = {id(each) for each in (self.optimizer, *wrapped_optimizers(self.optimizer))}
        return not known.isdisjoint({id(optimizer), id(innermost(optimizer))})

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights on which rules act."""
        return tuple(self.sites)

    def detach(self) -> None:
        """Leave the model and the optimizer as they were before `attach`; their values stay. Idempotent.

        Raises:
            LifecycleError: a gradient or weight was not finite at an earlier step, after everything is done.
        """
        self.give_up(self.held)
        self.check()

    def check(self) -> None:
        """Wait for the device, and raise if a gradient or weight was not finite at an earlier step.

        Steps on a CPU are checked at once. Others do not wait: the error comes at one of the steps that follow, here,
        or from `detach` and `verify`.

        Raises:
            LifecycleError: something was not finite. Rules did not act at that step.
        """
        self.finite.check()

    def give_up(self, parameters: set[int]) -> None:
        """Stop acting on the parameters with these ids; if none is left, remove all hooks from the optimizer."""
        sites, learning = self.holding
        for synapses in [each for each in self._acted_synapses() if id(each.stored) in parameters]:
            if _ACTING.get(synapses, lambda: None)() is self:
                del _ACTING[synapses]
        given = {name for name, synapses in learning.items() if id(synapses.stored) in parameters}
        given |= {name for name, site in sites.items() if site.is_gone or id(site.raw) in parameters}
        set_attached(self.bio, given, attached=False)
        note_stale_gradients(self.bio, {name: each for name, each in learning.items() if name in given})
        sites = {name: site for name, site in sites.items() if name not in given}
        learning = {name: synapses for name, synapses in learning.items() if name not in given}
        self.hold(sites, learning)
        if self.held <= parameters or not (sites or learning):
            for hook in (*self._hooks, *self._hooks_of_model):
                hook.remove()
            self._hooks = self._hooks_of_model = ()
            self.stale.forget()
            if self._guarded is not None and vars(self.optimizer).get("step") is self._guarded:
                del self.optimizer.step
                if self._step_before is not None:
                    self.optimizer.step = self._step_before  # type: ignore[method-assign]
            record_of(self.bio).attachments.discard(self)
        warn_if_unattached(self.bio)

    def _with_undo(self, optimizer: Optimizer) -> MethodType:
        """The step of an optimizer, undone if it fails; a method of the optimizer, because schedulers take it apart."""
        step = optimizer.step

        @functools.wraps(step)  # schedulers mark a step that they know
        def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._hooks:  # others must not see what the optimizer is shown
                run_hooks_next_to_step(optimizer, *self._hooks)
            try:
                return step(*args, **kwargs)
            except BaseException:
                self.undo()
                raise

        return MethodType(guarded, optimizer)

    def __repr__(self) -> str:
        where = (self.gain_target or GainTarget.UPDATE).value
        return (
            f"<{type(self.optimizer).__name__} on {', '.join(self.weights) or 'no weights'}; gains act on the {where}>"
        )

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.detach()
        else:
            self.give_up(self.held)
