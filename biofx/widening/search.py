"""The search for the units that can be doubled: trials, each without those that failed before."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import fx

from biofx.analysis.nodes import Nodes
from biofx.analysis.understanding import Run, recorded
from biofx.base.isolation import undisturbed
from biofx.weights.facts import Need
from biofx.widening.doubling import Trial

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.widening.plan import Widening


def find_widening(bio: fx.GraphModule, sites: dict[str, WeightSite], editable: Collection[str], run: Run) -> Widening:
    """The widening that doubles the units of as many weights as possible, of those whose units a weight reads.

    Args:
        bio: a captured model; it stays as it is.
        sites: all its weights.
        editable: the names of those that may change.
        run: runs the model.
    """
    opaque = {name: reason for name, site in sites.items() if (reason := _why_opaque(site)) is not None}
    nodes = Nodes(bio, recorded(bio, run))
    left = {name: "something else reads it as well" for name in editable if _is_shared(bio, sites[name])}
    left |= {name: reason for name, reason in opaque.items() if name in editable}
    fixed = {name: left.get(name, "it may not change") for name in sites if name not in editable or name in left}
    doubled = frozenset(editable) - left.keys()
    while True:
        trial = Trial(bio, sites, doubled, fixed, opaque, nodes)
        with undisturbed(bio), torch.no_grad():
            bio.eval()
            trial.run()
        for units, reason in trial.failures or [(doubled - trial.read, "no weight reads its units")]:
            left |= dict.fromkeys(units - left.keys(), reason)
        if doubled.isdisjoint(left):
            trial.result.left = left
            return trial.result
        doubled -= left.keys()


def _why_opaque(site: WeightSite) -> str | None:
    """Why it is not told on which axis of its input and of its output an operator has units, or None if it is."""
    if any(call.use.is_embedding for call in site.calls):
        return "the units of an embedding stay as they are"
    unmet = site.unmet(Need.OUTPUT)
    if unmet is not None:
        return unmet
    if not all(site.chain[-1] in call.node.all_input_nodes for call in site.calls):
        return "its operator reads what forward computes from it"
    if any(len(call.use.source_axes) != 1 or call.source is None for call in site.calls):
        return site.unmet(Need.UNITS) or f"{site.operator} does not read its units on one axis"
    return None


def _is_shared(bio: fx.GraphModule, site: WeightSite) -> bool:
    """Whether something else than its operator reads a weight, such as an embedding that is tied to it."""
    called = {str(node.target) for node in bio.graph.find_nodes(op="call_module")}
    inside = {id(p) for path in called for p in bio.get_submodule(path).parameters()}
    others = [user for user in site.readers if user not in site.uses]
    return id(site.raw) in inside or not all(n.target is getattr and n.args[1] in ("dtype", "device") for n in others)
