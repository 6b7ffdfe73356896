"""Dale's principle: a unit is excitatory, or inhibitory, for all its targets."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.options import check_choice, check_number
from biofx.model.provenance import record_of
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.signs.balance import balance
from biofx.signs.constraints import CONSTRAINTS, constrain, known_signs, project_, remark_on_units, renumber, why_free
from biofx.signs.scales import keep_scales_nonnegative
from biofx.weights.facts import NOT_RUN, Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.analysis.units import Population, PresynapticUnits, Units
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight


@register
@dataclass(frozen=True)
class DalesPrinciple(Pass):
    r"""Give every unit a sign, and keep all its outgoing weights, in whichever layers, to it.

    $$w_{ij} = s_j\, f(r_{ij}), \qquad s_j \in \{+1, -1\}, \quad f \ge 0$$

    with $r_{ij}$ the stored weight from presynaptic unit j to postsynaptic unit i. Which weights leave one unit is a
    question about the graph: all weights that read a tensor share its units; so do the positions of a feature map that
    was flattened, and the parts of a concatenation. `biofx.units` answers it, and shows the answer. A split weight has
    its unit's sign in each of its synapses. Signs are in the buffer `<weight>_synapses.sign`, and the folded model
    obeys the principle as well.

    | constraint | weight | stored |
    |---|---|---|
    | `"project"` | relu(r·s)·s | projected after every step; feels the weight's gradient at 0 too: no synapse dies |
    | `"abs"` | \|r\|·s | r of either sign |
    | `"softplus"` | ln(1 + eʳ)·s | never reaches 0, starts with 1% of the mean magnitude at least |

    *Signs.* `"random"` draws them for each population: exactly the fraction `excitatory` of its units, rounded, but at
    least one of each kind. `"closest"` is for a trained network: a unit gets the sign of the larger part of the energy
    of its outgoing weights, $\sum_i w_{ij}^2$, and the rest of them becomes 0; `summary` says how much was kept.
    Signs that are given, by the name of the population that `biofx.units` shows, hold; others are drawn.

    *Balance.* A network whose weights just get signs does not train if it is deep: all units read the rest through the
    same signs, so one common mode grows with every layer. With `balance`, rows are sparse: of each sign they keep the
    fraction `density` of their synapses, and the others start at 0 and may grow. What is kept is scaled, the excitatory
    and the inhibitory part of each row by a number each, so that the net input of every unit has the mean and the
    variance that it had without signs, for normal inputs to the network; what is left of the mean goes into the bias
    (`biofx/signs/balance.py`). In networks of 20 layers activity is then within a factor of 3 of what it was at every
    depth, and 8 layers learn as they did.

    *What can turn a sign over.* A parameter that multiplies units on their way, such as γ of a batch norm, is kept
    from being negative; one that is negative already, and cannot be turned over together with the weights before it, is
    left alone, and `summary` says so. Where a unit's activity can be negative (tanh, no activation), its *effect*
    changes sign although its weights do not; `summary` says so, and also where forward subtracts or negates what a
    weight returns, as in `excite(e) - inhibit(i)`: signs are those of weights. A weight that is used on different units
    would need two signs: its positions get signs of their own. A weight that is not alone between two populations (a
    sum of two parameters, a product with two activations, an embedding that is tied to an output layer) is left alone.

    The reference package gives signs to the rows of a linear weight, which are postsynaptic, and to single kernels of a
    convolution, so no unit ends up excitatory or inhibitory, and its rejuvenation overwrites them.

    Args:
        excitatory: fraction of excitatory units, in [0, 1]. Default: about that of cortex.
        assign: `"random"`, `"closest"`, or signs by population: `{"fc1.weight": [1, 1, -1, …]}`.
        constraint: `"project"`, `"abs"` or `"softplus"`.
        balance: draw the magnitudes for balance. None: unless the signs are `"closest"`. False keeps them.
        density: fraction of the synapses that a balanced weight starts with, in (0, 1]; the others start at 0.
        inputs: what the model's inputs are: `"free"` (no units, so no constraint), `"excitatory"`, or `"mixed"`, with
            signs like all units.
        readouts: `"all"`, or `"excitatory"`: only excitatory units project to the model's output layers, as long-range
            projections of cortex are excitatory (Song et al. 2016). Needs weights behind which there is no other.
        sites: glob patterns over names of weights; others are left alone.

    Raises:
        ArgumentError: an option out of its range.
        PipelineError: at transform, if a population has only one unit and cannot hold a fraction, if given signs do not
            fit, if no weight matches `sites`, or one that it names has no presynaptic axis.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
        >>> bio = biofx.transform(model, [passes.DalesPrinciple(excitatory=0.8)])
        >>> bool((bio.get_parameter("2.weight").sign() * bio.get_buffer("2.weight_synapses.sign") >= 0).all())
        True
        >>> int((biofx.weight_sites(bio)["2.weight"].sign > 0).sum())
        8

    References:
        Song, Yang & Wang, Training excitatory-inhibitory recurrent neural networks for cognitive tasks, PLOS
        Computational Biology 12, 2016. Cornford et al., Learning to live with Dale's principle, ICLR 2021. Li et al.,
        Learning better with Dale's Law: a spectral perspective, NeurIPS 2023.
    """

    name: ClassVar[str] = "dales-principle"
    slot: ClassVar[Slot] = Slot.SIGN
    moment: ClassVar[Moment] = Moment.PROJECTION
    works_on_shards: ClassVar[bool] = True

    excitatory: float = option(0.8, check_number, at_least=0, at_most=1)
    assign: str | Mapping[str, Sequence[int]] = "random"
    constraint: str = option("project", check_choice, choices=CONSTRAINTS)
    balance: bool | None = None
    density: float = option(0.1, check_number, above=0, at_most=1)
    inputs: str = option("free", check_choice, choices=("free", "excitatory", "mixed"))
    readouts: str = option("all", check_choice, choices=("all", "excitatory"))
    sites: str | Sequence[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance is not None and not isinstance(self.balance, bool):
            raise ArgumentError(f"passes.DalesPrinciple: balance must be True, False or None, got {self.balance!r}")
        if isinstance(self.assign, Mapping):
            object.__setattr__(self, "assign", {name: _signs(name, given) for name, given in self.assign.items()})
        else:
            check_choice(self, "assign", ("random", "closest"))
        if self.assign == "closest" and self.balance:
            raise ArgumentError(
                'passes.DalesPrinciple: assign="closest" keeps the weights of a trained network, and balance=True '
                "draws others; drop one"
            )
        patterns = (self.sites,) if isinstance(self.sites, str) else self.sites
        if not isinstance(patterns, Collection) or not patterns or not all(isinstance(p, str) for p in patterns):
            raise ArgumentError(f"passes.DalesPrinciple: sites must be glob patterns, got {self.sites!r}")

    @property
    def instead(self) -> str:
        """Random signs suit a network before training."""
        if self.assign == "closest":
            return "mirror-units keeps the function"
        return 'for a trained network, assign="closest" keeps most of each weight, and mirror-units keeps the function'

    def rewrite_model(self, model: ModelEditor) -> None:
        """Assign signs to units, and weights to signs."""
        units = model.units
        if units is None:
            model.leave(f"not judged: {NOT_RUN}")
            return
        chosen = self._chosen(model, units)
        if not chosen:
            return
        neural = {name for name in chosen if self.inputs != "free" or not bool(units.readings[name].is_free.all())}
        scales = {name: read & neural for name, read in units.scales.items() if name not in model.excluded}
        keep_scales_nonnegative(model, scales)
        signs = self._assign(model, units, {name: units.readings[name] for name in chosen})
        constrained: dict[str, Tensor] = {}
        for name in chosen:
            reading, edit = units.readings[name], model.edits[name]
            sign = signs[reading.classes]
            if self.inputs == "free":
                sign = sign.masked_fill(reading.is_free, 0)
            if not bool(sign.any()):
                edit.leave(why_free(units, reading))
                continue
            constrained[name] = sign
            if reading.remark:
                edit.remark(f"{reading.remark}, so its positions have signs of their own")
        remark_on_units(model, units, constrained)
        self._set_weights(model, units, constrained)
        renumber(model, units)
        for name, sign in constrained.items():
            site, edit = chosen[name], model.edits[name]
            spread = site.spread_presynaptic(sign).to(site.raw.device, site.raw.dtype)
            raw = site.raw.detach()
            if self.constraint == "softplus":  # what it cuts off could never come back
                raw = torch.where(spread == 0, raw, spread * (raw * spread).clamp(min=FLOOR * float(raw.abs().mean())))
            edit.replace_raw(CONSTRAINTS[self.constraint].store(raw, spread))
            constrain(edit, site, sign, units.readings[name].classes, self.constraint)
            if self.readouts == "excitatory" and site.is_output and bool((sign > 0).any()):
                edit.remark("only its excitatory units project")
                edit.insert(torch.mul, edit.state("projects", (spread >= 0).to(spread)))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Project stored weights on their signs."""
        if self.constraint == "project":
            project_(weights)

    def _chosen(self, model: ModelEditor, units: Units) -> dict[str, WeightSite]:
        patterns = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        for pattern in patterns:
            if not fnmatch.filter(model.sites, pattern):
                raise PipelineError(
                    f'{self.name}: no weight matches sites="{pattern}"; there are {", ".join(model.sites)}'
                )
        chosen = {n: site for n, site in model.sites.items() if any(fnmatch.fnmatch(n, p) for p in patterns)}
        for name in model.sites.keys() - chosen.keys():
            model.edits[name].leave("it is not among the sites that were asked for")
        for name, site in list(chosen.items()):
            reason = site.unmet(Need.AXES) or (NOT_RUN if name not in units.readings else None)
            if reason is not None and name in patterns:
                raise PipelineError(f"{self.name}: {name} cannot have signs: {reason}; leave it out of sites")
            unjudged = site.unmet(Need.UNITS)
            if reason is None and unjudged is not None and name not in patterns:
                reason = f"not judged: {unjudged}"
            if reason is not None:
                model.edits[name].leave(reason)
                del chosen[name]
        return chosen

    def _assign(self, model: ModelEditor, units: Units, readings: Mapping[str, PresynapticUnits]) -> Tensor:
        """Sign of every class of units, by the number that stands for it: +1, −1, or 0 if it is free."""
        signs = torch.zeros(len(units.classes))
        is_free = torch.zeros(len(units.classes), dtype=torch.bool)
        for reading in readings.values():
            is_free[reading.classes[reading.is_free]] = True
        read = torch.cat([reading.classes for reading in readings.values()]).unique()
        energies = _energies(model, readings, len(units.classes)) if self.assign == "closest" else None
        given = dict(self.assign) if isinstance(self.assign, Mapping) else {}
        known = known_signs(model, units)
        for index, population in enumerate(units.populations[1:], 1):  # the first is nobody
            members = units.classes[units.members(index)]
            numbers = read[torch.isin(read, members)]
            if population.name in given:
                wanted = _fitting(population.name, given.pop(population.name), len(members))
                if bool((known[members] * wanted < 0).any()) or bool((signs[members] * wanted < 0).any()):
                    raise PipelineError(
                        f"{self.name}: assign[{population.name!r}] differs from the signs that they have"
                    )
                signs[members] = wanted
                continue
            numbers = numbers[signs[numbers] == 0]
            if not len(numbers):
                continue
            if bool(is_free[numbers].all()) and self.inputs != "mixed":
                signs[numbers] = float(self.inputs == "excitatory")
            elif energies is not None:
                signs[numbers] = torch.where(energies[numbers, 0] >= energies[numbers, 1], 1.0, -1.0)
            else:
                signs[numbers] = self._draw(model, population, len(numbers), len(members))
        if given:
            names = ", ".join(population.name for population in units.populations[1:])
            raise PipelineError(f"{self.name}: assign names {next(iter(given))!r}, but the populations are {names}")
        return torch.where(known != 0, known, signs)

    def _draw(self, model: ModelEditor, population: Population, count: int, members: int) -> Tensor:
        name = population.name
        if count == 1 and 0 < self.excitatory < 1:
            problem, times = f"{name} is a population of one unit, which", ""
            if members > 1:
                problem, times = (
                    f"the {members} units of {name} that a weight reads need one sign, so they",
                    f" * {members}",
                )
            raise PipelineError(
                f"{self.name}: {problem} cannot be {self.excitatory:.0%} excitatory; give it a sign with "
                f'assign={{"{name}": [1]{times}}}, or leave the weights that read it alone with sites or exclude'
            )
        excitatory = round(self.excitatory * count)
        if 0 < self.excitatory < 1:
            excitatory = min(max(excitatory, 1), count - 1)
        signs = torch.full((count,), -1.0)
        signs[torch.randperm(count, generator=model.generator(name))[:excitatory]] = 1.0
        return signs

    def _set_weights(self, model: ModelEditor, units: Units, signs: Mapping[str, Tensor]) -> None:
        """Give the weights magnitudes, with the signs of their units."""
        sites = {name: model.sites[name] for name in signs}
        agreeing = {name: _agreeing(site, signs[name]) for name, site in sites.items()}
        if self.assign == "closest":
            for name, (kept, energy) in agreeing.items():
                model.edits[name].remark(
                    f"{kept / energy:.0%} of its energy was kept" if energy else "it has no energy"
                )
            return
        kept, energy = map(sum, zip(*agreeing.values(), strict=True)) if agreeing else (0.0, 0.0)
        if energy:
            text = f"{self.name}: {kept / energy:.0%} of the energy of the weights had the signs of their units"
            record_of(model.bio).notes.append(text)
        if self.balance is False or model.values_will_be_loaded:  # to balance takes most of the time
            for name, site in sites.items():
                sign = site.spread_presynaptic(signs[name]).to(site.raw)
                model.edits[name].replace_raw(torch.where(sign == 0, site.raw, site.raw.abs() * sign))
        else:
            balance(model, units, signs, self.density)


FLOOR = 0.01  # of the mean magnitude: the least with which a softplus weight starts, since it never reaches 0


def _agreeing(site: WeightSite, signs: Tensor) -> tuple[float, float]:
    """The energy of the entries of a weight that have the signs of their units, and of all."""
    raw = site.raw.detach()
    energy = raw.square()
    sign = site.spread_presynaptic(signs).to(raw)
    return float(energy.where(raw * sign >= 0, 0).sum()), float(energy.sum())


def _signs(name: str, given: Any) -> tuple[int, ...]:
    values = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(values, Collection) or isinstance(values, str) or not all(v in (1, -1) for v in values):
        raise ArgumentError(f"passes.DalesPrinciple: assign[{name!r}] must be signs, +1 or −1, got {given!r}")
    return tuple(int(v) for v in values)


def _fitting(name: str, signs: Sequence[int], count: int) -> Tensor:
    if len(signs) != count:
        raise PipelineError(f"dales-principle: assign[{name!r}] has {len(signs)} signs for {count} units")
    return torch.tensor(signs, dtype=torch.float32)


def _energies(model: ModelEditor, readings: Mapping[str, PresynapticUnits], count: int) -> Tensor:
    """Energy of the positive and of the negative outgoing weights of every class of units, shape (classes, 2)."""
    result = torch.zeros(count, 2, dtype=torch.float64)
    for name, reading in readings.items():
        site = model.sites[name]
        weight = site.outgoing(site.effective().detach().double().cpu())
        for column, part in enumerate((weight.clamp(min=0), weight.clamp(max=0))):
            result[:, column].index_add_(0, reading.classes, part.square().sum(1))
    return result
