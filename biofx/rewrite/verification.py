"""Verification: checks the invariants of a transformed model."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from biofx.analysis.sites import WeightSite, find_weights
from biofx.analysis.units import Verdict
from biofx.base.errors import ArgumentError, VerificationError
from biofx.base.gains import decoded
from biofx.base.shards import extremes
from biofx.model.chain import callee, chain, is_current, parameter_nodes
from biofx.model.changes import ASSIGNED, follow, lost_parts
from biofx.model.definitions import NAMESPACE
from biofx.model.provenance import inserted, inserted_nodes, record_of, unwrapped
from biofx.model.slots import Slot
from biofx.model.synapses import broadcasts, stored, stored_parameters, synapses_in, synapses_of
from biofx.signs.constraints import sign_violations
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.rewrite.registry import Pass


def verify(bio: nn.Module) -> dict[str, Verdict]:
    """Check every invariant of a transformed model.

    - Every rewritten weight, and the state that passes keep for it, is stored as the passes left it.
    - The graph is well formed (`graph.lint`).
    - Every weight has one chain, with its nodes in canonical order, and every inserted node is in use.
    - Every `biofx` operator in the graph was inserted by a pass that ran.
    - No parameter of the original model is gone, and the weights that passes changed are finite.
    - All outgoing effective weights of a unit with a sign, in all weights that read it, have one sign; if it inhibits
      through interneurons, its own synapses have. Scale parameters that passes keep from being negative are not
      negative.
    - Gains are finite and not negative, and the invariants of each pass hold (`Pass.violations`).

    Args:
        bio: a model made by `biofx.transform`.

    Returns:
        For each weight, whether it obeys Dale's principle: `"obeys"` was checked; `"free"` weights read inputs and
        constants; `"not constrained"` ones have no signs; for those that are `"not judged"`, the units that they read
        are unknown, as of those that were assigned after the transform. `Units.verdicts` runs the model, and judges
        weights without signs as well.

    Raises:
        VerificationError: an invariant is broken; the message lists all, each with the pass and the parameter.
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(2, 2), [passes.FuzzyLearningRates()])
        >>> {name: str(verdict) for name, verdict in biofx.verify(bio).items()}
        {'weight': 'free'}
        >>> bio.weight_synapses.gain[0, 0] = float("nan")
        >>> biofx.verify(bio)
        Traceback (most recent call last):
        biofx.base.errors.VerificationError: the transformed model is not valid:
          - fuzzy-learning-rates: weight: gain is not finite
    """
    bio = unwrapped(bio)
    for attachment in record_of(bio).attachments:
        attachment.check()
    not_followed = follow(bio)
    refuse_violations(bio, [] if not_followed is None else [not_followed])
    assigned = {name for name, why in record_of(bio).others.items() if why == ASSIGNED and stored(bio, name).dim() > 1}
    unjudged = {name: Verdict("not judged", reason=ASSIGNED) for name in sorted(assigned)}
    return {name: _verdict(site) for name, site in find_weights(bio).sites.items()} | unjudged


def refuse_violations(bio: fx.GraphModule, known: Sequence[str] = ()) -> None:
    """Raise if an invariant is broken; `known` says which are known to be."""
    violations = [*known] or [*lost_parts(bio)] or [*_graph(bio)] or [*_chains(bio), *_parameters(bio), *_passes(bio)]
    if violations:
        raise VerificationError(violations)


def _verdict(site: WeightSite) -> Verdict:
    unjudged = site.unmet(Need.UNITS)
    if site.sign is not None and bool((site.sign != 0).any()) and not site.facts.tied:
        return Verdict("obeys", has_interneurons=site.has_interneurons)
    if unjudged is not None:
        return Verdict("not judged", reason=unjudged)
    return Verdict("free" if site.facts.is_free else "not constrained")


def _graph(bio: fx.GraphModule) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lint warns about plain tensors in attributes, which are legal
            bio.graph.lint()
    except RuntimeError as error:
        yield f"the graph is malformed: {error}"


def _chains(bio: fx.GraphModule) -> Iterator[str]:
    for name, count in Counter(str(n.target) for n in bio.graph.find_nodes(op="get_attr")).items():
        if count > 1:
            yield f"{name}: read by {count} nodes, must be read by one"
    on_chain: set[fx.Node] = set()
    for name, start in parameter_nodes(bio).items():
        nodes = chain(start)
        on_chain.update(nodes)
        slots = [origin.slot for n in nodes if (origin := inserted(n)) is not None]
        if slots != sorted(slots):
            yield f"{name}: its chain is not in canonical order: {', '.join(s.label for s in slots)}"
        if not is_current(start, synapses_of(bio, name)):
            yield f"{name}: the graph does not compute it from its synapses as its module does"
    for node, origin in inserted_nodes(bio.graph):
        where = f"{origin.by}: {origin.parameter}: {node.name}"
        if not node.users and origin.slot is not Slot.OBSERVER:
            yield f"{where} is not used by any node"
        if origin.slot.on_chain and node.op != "get_attr" and node not in on_chain:
            yield f"{where} is not on the one chain of the weight"
    ran = {run.pass_.name for run in record_of(bio).passes}
    for node in bio.graph.nodes:
        origin = inserted(node)
        if origin is None and node.op == "call_function" and callee(node).startswith(f"{NAMESPACE}."):
            yield f"{node.name} is a biofx operator that no pass inserted"
        if origin is not None and not ran.issuperset(origin.passes):
            yield f"{origin.by}: {origin.parameter}: {node.name} was inserted by a pass that did not run"


def _parameters(bio: fx.GraphModule) -> Iterator[str]:
    record, present = record_of(bio), {name for name, _ in stored_parameters(bio)}
    for name in record.original:
        if name not in present and name not in record.changed and name not in record.ties:
            yield f"{name}: a parameter of the original model is gone"


def _passes(bio: fx.GraphModule) -> Iterator[str]:
    record = record_of(bio)
    for weight, synapses in synapses_in(bio).items():
        gain, by = synapses.state("gain"), ", ".join(synapses.users.get("gain", ()))
        if gain is not None:
            shape = synapses.stored.shape
            if not broadcasts(gain.shape, shape):
                yield f"{by}: {weight}: gain has the shape {tuple(gain.shape)}, and what is stored {tuple(shape)}"
            lowest = _lowest(decoded(gain))
            if lowest is None:
                yield f"{by}: {weight}: gain is not finite"
            elif lowest < 0:
                yield f"{by}: {weight}: gain is negative ({lowest:g})"
    for name, by in record.nonnegative.items():
        lowest = _lowest(stored(bio, name))
        if lowest is not None and lowest < 0:
            yield f"{by}: {name}: a scale parameter is negative ({lowest:g})"
    sites = find_weights(bio).sites
    yield from sign_violations(sites)
    for name in sorted(frozenset[str]().union(*(run.weights for run in record.passes)) & sites.keys()):
        if _lowest(sites[name].raw) is None:
            state = None if sites[name].child is None else sites[name].known_synapses.not_finite()
            yield f"{name}: the weight is not finite" + (f", nor is {state}" if state else "")
    for run in record.passes:
        for name in sorted(run.weights):
            if name not in sites:
                yield f"{run.pass_.name}: {name}: no operator uses the weight any more"
                continue
            yield from (f"{run.pass_.name}: {name}: {v}" for v in _violations(run.pass_, sites[name]))


def _violations(pass_: Pass, site: WeightSite) -> list[str]:
    given: Any = pass_.violations(site)
    sentences = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if isinstance(given, str) or not all(isinstance(sentence, str) for sentence in sentences):
        raise ArgumentError(
            f'{pass_.name}: violations(site) yields a sentence for each broken invariant (yield "its trace is '
            f'negative"), and nothing if none is broken; for {site.name} it gave {given!r}'
        )
    return sentences


def _lowest(values: Tensor) -> float | None:
    """The lowest of some values; infinity if there are none, None if any is not finite."""
    if not values.numel():
        return math.inf
    lowest, highest = extremes(values)  # much cheaper than isfinite
    return lowest if math.isfinite(lowest) and math.isfinite(highest) else None
