"""Continual backpropagation: units that contribute little are replaced, so that a network keeps learning."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, fx, nn

from biofx.analysis.wiring import Layer, wire
from biofx.base import noise
from biofx.base.options import check_integer, check_number
from biofx.model.chain import attribute, original_name
from biofx.model.provenance import inserted, record_of
from biofx.model.slots import Slot
from biofx.model.synapses import synapses_in
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.signs.balance import connections
from biofx.signs.constraints import CONSTRAINTS, constraint_of
from biofx.training.blocks import batches
from biofx.training.plastic_weight import forget, memories_of
from biofx.training.statistics import magnitudes_along
from biofx.weights.facts import NOT_RUN, Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight

ACTIVITY = "unit_activity"  # state of a weight that reads units: the activity at its presynaptic positions
BOUNDS = "unit_bounds"  # of a weight that leads into units: the bounds of new synapses
INTO, OUT_OF = "into_units_of_", "out_of_units_of_"  # where the units of a layer are, behind it the name of the layer
UTILITY, AGE, DUE, REPLACED = "unit_utility", "unit_age", "unit_due", "units_replaced"  # of the weight of that name


@register
@dataclass(frozen=True)
class ContinualBackprop(Pass):
    r"""Replace units of low utility at a slow, steady rate, after the optimizer's step.

    $$u_i \leftarrow \eta\, u_i + (1 - \eta)\, \lvert h_i \rvert \sum_k \lvert w_{ki} \rvert, \qquad
    c \leftarrow c + \rho\, n_\mathrm{mature}$$

    with u_i the *contribution utility* of unit i, |h_i| the mean magnitude of its activity over batch, time and space
    (what the weights that read it multiply, so behind its activation function) since the last step, and w_ki its
    outgoing weights, in all layers that read it. A unit is mature when it is older than m steps. While the number c of
    units that are due is at least 1, the mature unit of the layer with the lowest utility is replaced, and c falls by
    1. For a unit that is replaced

    | | |
    |---|---|
    | incoming synapses | drawn anew, as those of the weight were spread at the transform |
    | bias | 0 |
    | outgoing synapses | 0, so that the new unit does not disturb what was learned |
    | utility and age | 0 |
    | what the optimizer remembers of all of these | nothing, as of new parameters |

    *Which synapses are a unit's* is a question about the graph, which `biofx.units` answers. A unit of a convolution is
    a channel; one that is flattened is read at many positions; units that merge, as in a residual stream or a gate, are
    one unit, with the incoming synapses of all of them. The units of one weight are a layer, together with those of
    weights that merge with them. Units of which not all synapses are known are left alone, and so are units that the
    model returns, units that merge with inputs, and a weight whose synapses are all 0; `summary` says why. A layer
    acts at the steps at which all its weights have a gradient, and an observer saw its activity, in training mode.

    *New synapses* are U(−b, b), with b = √3 times the root mean square of the weight at the transform: what
    `kaiming_uniform_` and the default of `nn.Linear` drew it from, if it is new. Under Dale's principle they have the
    signs of their presynaptic units, and magnitudes U(0, 2μ), with μ the mean magnitude of the excitatory or of the
    inhibitory synapses at the transform, so that both totals are what they were on average. Γ synapses add up to a
    connection that is spread alike.

    *With other rules.* `Rejuvenate` would replace outgoing synapses of 0 at once, unless there are signs. Under
    `ExponentiatedGradient` they could never grow, so it leaves these weights alone; weights with interneurons are
    left alone here. A new synapse takes over the gain of its place. Normalisation parameters and statistics stay.
    Under normalisation over units (layer and group norm, softmax, spectral norm), a replacement affects the others.

    *Several optimizers.* A layer acts where one optimizer holds all its weights; for another one, `attach` warns. What
    another optimizer remembers of a bias stays.

    The final version of the paper has this utility; earlier ones, and the authors' code, correct it for the mean
    activity (and move that into the next bias), divide it by the incoming weights, correct it for its start at 0, or
    reset batch norms. If c is above 1 at a step, their code replaces several units, as here; the pseudocode one.
    The reference package has nothing of this kind.

    Args:
        replacement_rate: ρ, the fraction of the mature units that is replaced at a step, in (0, 1]. Default as in the
            paper's experiments on ImageNet and in the authors' code.
        maturity: m, the steps for which a new unit is protected, at least 0. Default as in the paper.
        decay: η, the weight of the past in the utility, in [0, 1). Default as in the paper.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> bio = biofx.transform(model, [passes.ContinualBackprop(replacement_rate=0.25, maturity=0)])
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> bio(torch.randn(8, 3)).sum().backward()
        >>> optimizer.step()  # one of four mature units is due
        >>> int((bio.get_parameter("2.weight") == 0).sum()), int(bio[0].weight_synapses.units_replaced)
        (1, 1)

    References:
        Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood & Sutton, Loss of plasticity in deep continual learning, Nature
        632, 2024, doi 10.1038/s41586-024-07711-7, equation 1 and algorithm 1.
    """

    name: ClassVar[str] = "continual-backprop"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # at insertion: units are replaced from the first mature ones on
    moment: ClassVar[Moment] = Moment.TURNOVER
    sets_zeros: ClassVar[bool] = True

    replacement_rate: float = option(1e-4, check_number, above=0, at_most=1)
    maturity: int = option(100, check_integer, at_least=0)
    decay: float = option(0.99, check_number, at_least=0, below=1)

    def rewrite_model(self, model: ModelEditor) -> None:
        """Find the layers, observe the activity of their units, and keep where these are in each weight."""
        if model.understood is None:
            model.leave(f"it is not judged: {NOT_RUN}")
            return
        gone = dict.fromkeys(model.understood.readings.keys() - model.all_sites.keys(), "it is no weight any more")
        readers: dict[int, list[fx.Node]] = {}  # the nodes that use the value of a parameter, by its id
        for node in model.bio.graph.find_nodes(op="get_attr"):
            readers.setdefault(id(attribute(model.bio, str(node.target))), []).extend(_readers(node))
        fixed = {name: why for name, site in model.all_sites.items() if (why := _why_fixed(model, site, readers))}
        unread = {name: why for name, site in model.all_sites.items() if (why := _why_unread(model, site))}
        layers, reasons = wire(model.understood, gone | fixed, gone | unread)
        reading: set[str] = set()
        for layer in layers:
            self._keep(model, layer)
            reading |= layer.outgoing.keys()
        for name in reading:
            edit = model.edits[name]
            edit.observe_input(torch.ops.biofx.sum_activity, model.sites[name], ACTIVITY)
        for name, edit in model.edits.items():
            reason = reasons.get(name)
            if not edit.changed:
                edit.leave(f"it leads to no unit that can be replaced: {reason or 'no weight reads its units'}")
            elif reason and not model.sites[name].is_output:
                edit.remark(f"its units are not replaced: {reason}")

    def _keep(self, model: ModelEditor, layer: Layer) -> None:
        """Keep the state of a layer."""
        key = _key(layer.name)
        for names, prefix in ((layer.incoming, INTO), (layer.outgoing, OUT_OF)):
            for name, places in names.items():
                model.edits[name].keep(f"{prefix}{key}", places)
        for site in (model.sites[name] for name in layer.incoming):
            weight, sign = connections(site, site.synaptic().detach()), site.sign
            sign = sign if sign is None else connections(site, sign.expand(site.raw.shape)).sign()
            model.edits[site.name].keep(BOUNDS, bounds_of(weight, sign, site.synapses))
        home = model.edits[layer.name]
        dtype = torch.promote_types(home.raw.dtype, torch.float32)
        home.keep(UTILITY, torch.zeros(layer.size, dtype=dtype))
        home.keep(AGE, torch.zeros(layer.size, dtype=torch.int64))
        home.keep(DUE, torch.zeros((), dtype=dtype))
        home.keep(REPLACED, torch.zeros((), dtype=torch.int64))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Age units, and replace those that are due."""
        layers = _layers(weights)
        _look(layers, [weight for weight in weights if ACTIVITY in weight.synapses.users])
        alike: dict[tuple[int, torch.device, torch.dtype], list[_Layer]] = {}
        for layer in layers:
            utility = layer.home.state(UTILITY)
            alike.setdefault((len(utility), utility.device, utility.dtype), []).append(layer)
        for own in alike.values():
            self._judge(own)
        due = [layer for layer in layers if layer.due is not None]
        _renew([(layer, weight, places) for layer in due for weight, places in layer.into])
        # Last, because outgoing synapses of one unit may be incoming ones of another.
        parts = [(layer, weight, places) for layer in due for weight, places in layer.out_of]
        for weight, is_due in _at_places(parts, {weight: weight.site.presynaptic_units for _, weight, _ in parts}):
            mask = weight.site.spread_presynaptic(is_due).expand(weight.raw.shape)
            weight.replace(mask, torch.zeros_like(weight.raw))

    def _judge(self, layers: list[_Layer]) -> None:
        """Move the state of layers of one size on by a step, and find the units that are to be replaced."""
        states = [[layer.home.state(key) for layer in layers] for key in (UTILITY, AGE, DUE)]
        utility, age, due = map(torch.stack, states)
        contributions = torch.stack([layer.contribution.to(utility) for layer in layers])
        looked = torch.stack([layer.looked.to(utility.device) for layer in layers])
        *now, mask = next_layer_state(
            utility, age, due, contributions,
            rate=self.replacement_rate, maturity=self.maturity, decay=self.decay,
        )  # fmt: skip
        for own, old, new in zip(states, (utility, age, due), now, strict=True):
            chosen = torch.where(looked if old.dim() == 1 else looked[:, None], new, old)
            torch._foreach_copy_(own, list(chosen.unbind()))
        mask = mask & looked[:, None]
        torch._foreach_add_([layer.home.state(REPLACED) for layer in layers], list(mask.sum(-1).unbind()))
        # Nobody waits for a device to tell which layers are idle.
        is_due = mask.any(-1).tolist() if mask.device.type == "cpu" else [True] * len(layers)
        for layer, own_mask, is_any in zip(layers, mask.unbind(), is_due, strict=True):
            layer.due = own_mask if is_any else None

    def held_together(self, bio: nn.Module) -> Iterable[Collection[str]]:
        """The weights that lead into the units of each layer, and those that read them."""
        layers: dict[str, dict[str, None]] = {}
        for name, synapses in synapses_in(bio).items():
            for key in synapses.users:
                if key.startswith((INTO, OUT_OF)):
                    layers.setdefault(key.removeprefix(INTO).removeprefix(OUT_OF), {})[name] = None
        return layers.values()

    def violations(self, site: WeightSite) -> Iterator[str]:
        """Utilities are sums of magnitudes."""
        utility = site.state(UTILITY)
        if utility is not None and not bool(((utility >= 0) & torch.isfinite(utility)).all()):
            yield "the utility of its units is negative or not finite"


def next_layer_state(
    utility: Tensor,
    age: Tensor,
    due: Tensor,
    contribution: Tensor,
    *,
    rate: float | Tensor,
    maturity: int,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the state of layers on by one step, and choose the units that are replaced.

    Args:
        utility: u of each unit, shape (…, units). Each index of the other axes is a layer.
        age: steps since each unit was new, in the same shape.
        due: c, the number of units to be replaced, shape (…).
        contribution: |h|·Σ|w| of each unit at this step, shape (…, units).
        rate: ρ, at most 1; one for all layers, or of shape (…).
        maturity: m.
        decay: η.

    Returns:
        The new utility, age and number due, and a mask of the units to replace.

    Example:
        >>> import torch
        >>> from biofx.passes.continual_backprop import next_layer_state
        >>> utility, age = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([9, 9, 1])
        >>> *_, mask = next_layer_state(utility, age, torch.tensor(0.9), utility, rate=0.1, maturity=5, decay=0.5)
        >>> mask  # the third unit is too young
        tensor([False,  True, False])
    """
    utility = decay * utility + (1 - decay) * contribution
    age = age + 1
    mature = age > maturity
    due = due + rate * mature.sum(-1).to(due)
    count = due.floor()  # never above the number of mature units: the rate is at most 1, and the rest was below 1
    order = torch.where(mature, utility, torch.inf).sort(dim=-1, stable=True).indices
    is_low = torch.arange(utility.shape[-1], device=utility.device) < count[..., None]
    mask = torch.zeros_like(mature).scatter(-1, order, is_low)
    return utility.masked_fill(mask, 0), age.masked_fill(mask, 0), due - count, mask


def fresh(uniform: Tensor, sign: Tensor | None, bounds: Tensor) -> Tensor:
    """New incoming synapses.

    Args:
        uniform: numbers in [0, 1), one for each.
        sign: the sign of the presynaptic unit of each; None if all are free.
        bounds: the largest magnitude of a free, an excitatory and an inhibitory synapse.
    """
    free = (2 * uniform - 1) * bounds[0]
    if sign is None:
        return free
    return torch.where(sign == 0, free, sign * uniform * torch.where(sign > 0, bounds[1], bounds[2]))


def bounds_of(weight: Tensor, sign: Tensor | None = None, synapses: int = 1) -> Tensor:
    """The bounds of `fresh` for new synapses of a weight, so that connections are spread as they are now.

    Args:
        weight: the weight of every connection.
        sign: the sign of the presynaptic unit of each, if they have signs.
        synapses: Γ, the number of synapses that add up to a connection.
    """
    bounds = [(3 * weight.square().mean() / synapses).sqrt()]
    for positive in (True, False):
        mask = torch.ones_like(weight, dtype=torch.bool) if sign is None else (sign > 0 if positive else sign < 0)
        bounds.append(2 * (weight.abs() * mask).sum() / mask.sum().clamp(min=1) / synapses)
    return torch.stack(bounds)


@dataclass(eq=False)
class _Layer:
    """The units of a layer at a step.

    Attributes:
        home: the weight that has its state.
        into: the weights that lead into its units, each with their places.
        out_of: the weights that read them, likewise.
        contribution: |h|·Σ|w| of each unit.
        looked: whether observers saw its activity.
        due: which units are to be replaced; None if it is known that none is.
    """

    home: PlasticWeight
    into: list[tuple[PlasticWeight, Tensor]] = field(default_factory=list)
    out_of: list[tuple[PlasticWeight, Tensor]] = field(default_factory=list)
    contribution: Tensor = field(init=False)
    looked: Tensor = field(init=False)
    due: Tensor | None = None


Part = tuple[_Layer, "PlasticWeight", Tensor]  # of a layer: a weight, and the places of the units there


def _key(name: str) -> str:
    """The name of a layer as a part of the name of a buffer, which may hold no dot; no two names become one."""
    return name.replace("_", "_1").replace(".", "_0")


@functools.cache
def _side(key: str) -> tuple[str, str] | None:
    """Where a state says that units are, and the key of their layer; None for other state."""
    for side, prefix in (("into", INTO), ("out_of", OUT_OF)):
        if key.startswith(prefix):
            return side, key.removeprefix(prefix)
    return None


def _layers(weights: Sequence[PlasticWeight]) -> list[_Layer]:
    """The layers of which all weights take part in a step."""
    layers = {_key(w.name): _Layer(w) for w in weights if UTILITY in w.synapses.users}
    for weight in weights:
        for key in weight.synapses.users:
            found = _side(key)
            if found is not None and found[1] in layers:
                getattr(layers[found[1]], found[0]).append((weight, weight.state(key)))
    runs = [run for run in record_of(weights[0].site.bio).passes if run.pass_.name == weights[0].by]
    if sum(len(run.weights) for run in runs) > len(weights):
        present = {weight.name for weight in weights}
        for name, synapses in synapses_in(weights[0].site.bio).items():
            for key in synapses.users if name not in present else ():
                layers.pop((_side(key) or ("", ""))[1], None)
    return list(layers.values())


def _look(layers: Sequence[_Layer], weights: Sequence[PlasticWeight]) -> None:
    """Take what was seen since the last step, and find out what the units of layers contribute."""
    alike: dict[tuple[torch.device, torch.dtype], list[PlasticWeight]] = {}
    for weight in weights:
        state = weight.state(ACTIVITY)
        alike.setdefault((state.device, state.dtype), []).append(weight)
    parts = [(layer, weight, places) for layer in layers for weight, places in layer.out_of]
    looked: dict[PlasticWeight, Tensor] = {}
    contributions: dict[tuple[_Layer, PlasticWeight], Tensor] = {}
    for own in alike.values():
        states = [weight.state(ACTIVITY) for weight in own]
        sizes = [state.shape[-1] for state in states]
        sums, positions = torch.cat(states, -1).sum(0)
        torch._foreach_zero_(states)
        products = sums / positions.clamp(min=1) * torch.cat([_outgoing(weight) for weight in own]).to(sums)
        values = dict(zip(own, products.split(sizes), strict=True))
        contributions |= _sums_at_places([part for part in parts if part[1] in values], values)
        fewest = torch._foreach_norm(positions.split(sizes), -math.inf)
        looked |= zip(own, (torch.stack(fewest) > 0).unbind(), strict=True)
    for layer in layers:
        first, *others = [weight for weight, _ in layer.out_of]
        layer.contribution, layer.looked = contributions[layer, first], looked[first]
        for weight in others:
            layer.contribution = layer.contribution + contributions[layer, weight].to(layer.contribution)
            layer.looked = layer.looked & looked[weight].to(layer.looked.device)


def _end_to_end(parts: Sequence[Part], sizes: Mapping[PlasticWeight, int]) -> Iterator[tuple[list[Part], Tensor]]:
    """Where units are if weights are laid end to end, each with one place more, for units that have fewer places.

    Args:
        parts: the units, on one device.
        sizes: the number of places in each weight.

    Yields:
        Parts with as many places for each unit, and the places of the units of all of them, shape (units, places).
    """
    starts = dict(zip(sizes, itertools.accumulate((size + 1 for size in sizes.values()), initial=0), strict=False))
    moved = torch._foreach_add([places for *_, places in parts], [starts[weight] for _, weight, _ in parts])
    widths: dict[int, list[int]] = {}
    for index, places in enumerate(moved):
        widths.setdefault(places.shape[1], []).append(index)
    for own in widths.values():
        yield [parts[index] for index in own], torch.cat([moved[index] for index in own])


def _sums_at_places(
    parts: Sequence[Part], values: Mapping[PlasticWeight, Tensor]
) -> Iterator[tuple[tuple[_Layer, PlasticWeight], Tensor]]:
    """For each unit of the layers the sum of values at its places in a weight."""
    if not parts:
        return
    zero = next(iter(values.values())).new_zeros(1)
    flat = torch.cat([x for own in values.values() for x in (own, zero)])
    for alike, places in _end_to_end(parts, {weight: len(own) for weight, own in values.items()}):
        sums = flat.index_select(0, places.flatten()).view(places.shape).sum(1)
        for (layer, weight, _), own in zip(alike, sums.split([len(each) for *_, each in alike]), strict=True):
            yield (layer, weight), own


def _at_places(parts: Sequence[Part], sizes: Mapping[PlasticWeight, int]) -> Iterator[tuple[PlasticWeight, Tensor]]:
    """Which units of each weight are due, from those of its layers that are.

    Args:
        parts: the units of these layers.
        sizes: the number of units of each weight.
    """
    devices: dict[torch.device, list[Part]] = {}
    for part in parts:
        devices.setdefault(part[1].raw.device, []).append(part)
    for device, own in devices.items():
        held = {weight: sizes[weight] for _, weight, _ in own}
        flat = torch.zeros(sum(held.values()) + len(held), dtype=torch.bool, device=device)
        for alike, places in _end_to_end(own, held):
            due = torch.cat([layer.due.to(device) for layer, *_ in alike if layer.due is not None])
            flat.scatter_(0, places.flatten(), due[:, None].expand_as(places).flatten())
        yield from zip(held, flat.split([n for size in held.values() for n in (size, 1)])[::2], strict=True)


def _outgoing(weight: PlasticWeight) -> Tensor:
    """The sum of the magnitudes of the connections that leave each presynaptic position."""
    return magnitudes_along(weight.site.outgoing(connections(weight.site, weight.value)), (1,))


def _renew(parts: Sequence[Part]) -> None:
    """Give units that are due new incoming synapses, and no bias."""
    due = dict(_at_places(parts, {weight: weight.site.units for _, weight, _ in parts}))
    weights = list(due)
    for batch in batches([weight.raw for weight in weights]):
        own = [weights[index] for index in batch]
        drawn = noise.uniform([weight.raw for weight in own], [weight.counter("fresh") for weight in own])
        for weight, uniform in zip(own, drawn, strict=True):
            mask = weight.without_padding(weight.site.spread(due[weight]).expand(weight.raw.shape).clone())
            weight.replace(mask, fresh(uniform, weight.sign, weight.state(BOUNDS).to(uniform)))
            for bias in _biases(weight.site):
                if bias.requires_grad:
                    mask = (due[weight] if weight.finite is None else due[weight] & weight.finite).expand(bias.shape)
                    bias.masked_fill_(mask, 0)
                    forget(weight.optimizer, bias, mask, memories_of(weight.optimizer, bias))


def _bias_nodes(site: WeightSite) -> Iterator[fx.Node]:
    """The nodes that read the biases of a weight's operators."""
    for node in site.biases:
        while node.op == "call_function" and inserted(node) is not None:
            node = node.args[0]  # type: ignore[assignment]
        yield node


def _biases(site: WeightSite) -> list[nn.Parameter]:
    """The biases of a weight's operators."""
    return [attribute(site.bio, str(node.target)) for node in _bias_nodes(site)]


def _why_fixed(model: ModelEditor, site: WeightSite, readers: Mapping[int, Sequence[fx.Node]]) -> str | None:
    """Why the incoming synapses of a weight's units cannot be drawn anew, or None.

    Args:
        model: the model.
        site: the weight.
        readers: the nodes that use the value of each parameter, by its id.
    """
    assert model.understood is not None
    reason = _why_untouched(model, site) or site.unmet(Need.NODES) or site.unmet(Need.AXES)
    if reason is not None:
        return reason
    if site.name not in model.understood.readings:
        return NOT_RUN
    if len(model.understood.unit_readings.units.orientations[site.name]) > 1:
        return "operators read it along different axes"
    if any(site.name in run.weights for run in record_of(model.bio).passes if run.pass_.slot is Slot.OUTPUT):
        return "other units have a part in what they return"
    if not bool(site.synaptic().detach().any()):
        return "all its synapses are 0, so new ones would be, too"
    if any(call.computes_bias for call in site.calls):
        return "its operator's bias is computed"
    operators = {call.node for call in site.calls}
    for node in _bias_nodes(site):
        bias = attribute(site.bio, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(bias, nn.Parameter) or bias.shape[-1:] != (site.units,):
            return "its operator's bias is computed"
        if original_name(model.bio, node) in model.excluded:
            return f"its bias is excluded: {model.excluded[original_name(model.bio, node)]}"
        if not operators.issuperset(readers[id(bias)]):
            return "its operator's bias is also that of others"
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that use the value of a node, behind what passes inserted."""
    for user in node.users:
        yield from [user] if inserted(user) is None else _readers(user)


def _why_unread(model: ModelEditor, site: WeightSite) -> str | None:
    """Why the outgoing synapses of the units that a weight reads cannot be set to 0, or None."""
    reason = _why_untouched(model, site) or site.unmet(Need.INPUT) or site.unmet(Need.UNITS)
    if reason is None and constraint_of(site) is CONSTRAINTS["softplus"]:
        return "under softplus, synapses of 0 could never grow"
    return reason


def _why_untouched(model: ModelEditor, site: WeightSite) -> str | None:
    if site.name in model.excluded:
        return model.excluded[site.name]
    if site.has_interneurons:
        return "its interneurons would go on inhibiting"
    return None if site.raw.requires_grad else "it is frozen"
