"""Search: finds the units that can be doubled, by propagations that each leave out what failed before."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from biofx.analysis.understanding import Run, recorded
from biofx.base.isolation import undisturbed
from biofx.base.randomness import callers_defaults
from biofx.model.chain import attribute
from biofx.model.synapses import stored_parameters
from biofx.weights.facts import Need
from biofx.widening.execution import Execution
from biofx.widening.propagation import Propagation

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.widening.plan import WideningPlan


def find_widening(
    bio: fx.GraphModule, sites: dict[str, WeightSite], excluded: dict[str, str], run: Run
) -> WideningPlan:
    """The plan that doubles the units of as many weights as possible, among those whose units a weight reads."""
    editable = [name for name in sites if name not in excluded]
    opaque = {name: reason for name, site in sites.items() if (reason := _why_opaque(site)) is not None}
    with callers_defaults():
        execution = Execution(bio, recorded(bio, run, by_node=True))
    called = {str(node.target) for node in bio.graph.find_nodes(op="call_module")}
    inside = {id(parameter) for path in called for parameter in bio.get_submodule(path).parameters()}
    read_elsewhere = (name for name in editable if _has_other_readers(sites[name], inside))
    reasons = dict.fromkeys(read_elsewhere, "something else reads it as well")
    reasons |= {name: reason for name, reason in opaque.items() if name in editable}
    unseen = next((name for name, site in sites.items() if site.node is None and not site.inside), None)
    if unseen is not None:
        reasons |= dict.fromkeys(editable, f"{unseen} is used by other methods than forward, which may read its units")
    fixed = {name: reasons.get(name, "it may not change") for name in sites if name not in editable or name in reasons}
    doubled = frozenset(editable) - reasons.keys()
    while True:
        propagation = Propagation(bio, sites, doubled, fixed, opaque, execution)
        with undisturbed(bio), torch.no_grad(), callers_defaults():
            bio.eval()
            propagation.run()
        failures = [*propagation.failures, *_doubled_but(bio, excluded, propagation.plan)]
        # Units that no weight reads are left out last: a failure elsewhere may be why none does.
        for weights, reason in failures or [(doubled - propagation.read, "no weight reads its units")]:
            reasons |= dict.fromkeys(weights - reasons.keys(), reason)
        if doubled.isdisjoint(reasons):
            propagation.plan.reasons = reasons
            return propagation.plan
        doubled -= reasons.keys()


def _doubled_but(
    bio: fx.GraphModule, excluded: dict[str, str], plan: WideningPlan
) -> Iterator[tuple[frozenset[str], str]]:
    """The weights whose units need other parameters to be doubled that may not change, with the reason."""
    kept = {id(parameter): name for name, parameter in stored_parameters(bio) if name in excluded}
    for tensor, weights in plan.reaching.items():
        name = kept.get(id(attribute(bio, tensor)))
        if name is not None:
            yield weights, f"{name} would have to be doubled: {excluded[name]}"


def _why_opaque(site: WeightSite) -> str | None:
    """Why the axis of units in the input or in the output of a weight's operator is unknown; None if both are known."""
    if any(call.use.is_embedding for call in site.calls):
        return "the units of an embedding are not doubled"
    unmet = site.unmet(Need.OUTPUT)
    if unmet is not None:
        return unmet
    if not all(site.chain[-1] in call.node.all_input_nodes for call in site.calls):
        return "its operator reads what forward computes from it"
    unmet = site.unmet(Need.INPUT)
    return unmet and (site.unmet(Need.UNITS) or unmet)


def _has_other_readers(site: WeightSite, inside: Collection[int]) -> bool:
    """Whether a weight is read by something other than its operators, such as an embedding that is tied to it.

    Args:
        site: the weight.
        inside: the ids of the parameters that modules read which the graph calls.
    """
    others = [user for user in site.readers if user not in site.uses]
    return id(site.raw) in inside or not all(n.target is getattr and n.args[1] in ("dtype", "device") for n in others)
