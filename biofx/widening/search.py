"""The search for the units that can be doubled: trials, each without those that failed before."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from biofx.dry_run import Values
from biofx.operator_kinds import operation
from biofx.trial import undisturbed
from biofx.weights.sites import WeightSite
from biofx.widening.plan import Widening
from biofx.widening.trial import Trial


def find_widening(
    bio: fx.GraphModule, sites: dict[str, WeightSite], editable: Collection[str], values: Values
) -> Widening:
    """The widening that doubles the units of as many weights as possible, of those whose units a weight reads.

    Args:
        bio: a captured model; it stays as it is.
        sites: all its weights.
        editable: the names of those that may change.
        values: what its nodes compute, from `dry_run`.
    """
    opaque = {name: reason for name, site in sites.items() if (reason := _why_opaque(site)) is not None}
    left = {name: "something else reads it as well" for name in editable if _is_shared(bio, sites[name])}
    left |= {name: reason for name, reason in opaque.items() if name in editable}
    fixed = {name: left.get(name, "it may not change") for name in sites if name not in editable or name in left}
    doubled = frozenset(editable) - left.keys()
    while True:
        trial = Trial(bio, sites, doubled, fixed, opaque, values)
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
    if site.why_no_source is not None or site.why_no_output is not None:
        return site.why_no_source or site.why_no_output
    sources = [source for use in site.calls for source in use.call.sources]
    if any(source.is_tokens for source in sources):
        return "the units of an embedding stay as they are"
    if not all(use.is_direct for use in site.calls):
        return "its operator reads what forward computes from it"
    if any(len(source.axes) != 1 for source in sources):
        return f"{site.operator} does not read its units on one axis"
    return None


def _is_shared(bio: fx.GraphModule, site: WeightSite) -> bool:
    """Whether something else than its operator reads a weight, such as an embedding that is tied to it."""
    called = {str(node.target) for node in bio.graph.find_nodes(op="call_module")}
    inside = {id(p) for path in called for p in bio.get_submodule(path).parameters()}
    others = [user for user in site.node.users if user not in site.uses]
    return id(site.raw) in inside or any(operation(user, bio).key not in ("dtype", "device") for user in others)
