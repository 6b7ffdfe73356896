"""The plan of a step: what it would look up by name for each weight, looked up once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from biofx.model.provenance import record_of
from biofx.model.synapses import places_of
from biofx.rewrite.registry import Moment, Pass
from biofx.signs.constraints import CONSTRAINTS, constraint_of
from biofx.signs.scales import scales_of

if TYPE_CHECKING:
    from torch import Tensor, fx

    from biofx.analysis.sites import WeightSite
    from biofx.model.synapses import Synapses


class Plan:
    """What the steps of an attachment need of its model, until something else is assigned there.

    Args:
        bio: the model.
        sites: the weights on which rules act, by name.
        with_gains: the synapses on whose learning gains act, by the weight's name.
        rules: the rules, in order, each with the names of its weights.
        held: ids of the parameters that the optimizer holds.
        observed: the states in which observers accumulate: the id of the synapses, and the name of the state.

    Attributes:
        sites: the same sites, bound.
        periods: the numbers of steps from one action of a rule to the next, of the rules on a weight, by its name.
        counters: the counters of steps, by the weight's name.
        pulled: the names of the weights to whose gradients a rule adds.
        unprojected: the names of the weights whose signs no rule restores.
        seen: what observers saw that a rule reads, the rule with the name of the state, by the weight's name.
        scales: the parameters that the optimizer holds and that must not be negative.
        turning: the names of the rules for which the optimizer is known to be able to forget.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        sites: Mapping[str, WeightSite],
        with_gains: Mapping[str, Synapses],
        rules: Sequence[tuple[Pass, Collection[str]]],
        held: Collection[int],
        observed: Collection[tuple[int, str]],
    ) -> None:
        self.sites = {name: site.bound() for name, site in sites.items()}
        names = dict.fromkeys((*sites, *with_gains, *record_of(bio).nonnegative))
        self._places = [place for name in names for place in places_of(bio, name)]
        own = (site.known_synapses for site in self.sites.values() if site.child is not None)
        self._places += [
            place for synapses in dict.fromkeys((*own, *with_gains.values())) for place in synapses.places()
        ]
        self._rules = {name: [rule for rule, own in rules if name in own] for name in sites}
        self.periods = {name: {period_of(rule) for rule in own} for name, own in self._rules.items()}
        found = ((name, site.state("steps")) for name, site in self.sites.items())
        self.counters: dict[str, Tensor] = {name: steps for name, steps in found if steps is not None}
        self.pulled = self._acted_on(Moment.GRADIENT)
        is_projected = {n for n, site in self.sites.items() if constraint_of(site) is CONSTRAINTS["project"]}
        self.unprojected = is_projected - self._acted_on(Moment.PROJECTION)
        self.seen = {name: seen for name in sites if (seen := [*self._seen_by_rules(name, observed)])}
        self.scales = [scale for scale in scales_of(bio) if id(scale) in held]
        self.turning: set[str] = set()

    @property
    def is_right(self) -> bool:
        """Whether everything is where it was found."""
        return all(container.get(key) is value for container, key, value in self._places)

    def _acted_on(self, moment: Moment) -> set[str]:
        return {name for name, rules in self._rules.items() if any(rule.moment is moment for rule in rules)}

    def _seen_by_rules(self, name: str, observed: Collection[tuple[int, str]]) -> Iterator[tuple[Pass, str]]:
        synapses = self.sites[name].known_synapses
        for rule in self._rules[name]:
            for key, users in synapses.users.items():
                if rule.name in users and (id(synapses), key) in observed:
                    yield rule, key


def period_of(rule: Pass) -> int:
    """The number of steps from one action of a rule to the next."""
    every: int = getattr(rule, "every", 1)
    return every
