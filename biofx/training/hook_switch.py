"""Hook switch: gradient hooks are switched off while an optimizer is attached."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from biofx.model import chain
from biofx.model.changes import transformed
from biofx.model.gradient_hooks import is_hook
from biofx.model.provenance import record_of
from biofx.model.synapses import Synapses, synapses_in


def switch_hooks_on(bio: nn.Module) -> None:
    """Make all gains act in the backward pass, as they do while no optimizer is attached."""
    set_attached(transformed(bio), synapses_in(bio), attached=False)


def leave_rules_to_caller(bio: nn.Module) -> None:
    """Switch off all gradient hooks, for users who call the rules themselves."""
    bio = transformed(bio)
    record_of(bio).by_hand = True
    for synapses in synapses_in(bio).values():
        synapses.by_hand = True
    chain.update_chains(bio)


def synapses_with_hooks(bio: fx.GraphModule) -> dict[str, Synapses]:
    """The synapses with gains, of weights and of biases that were split with them, by the parameter's name."""
    return {n: s for n, s in synapses_in(bio).items() if any(is_hook(link.target) for link in s.links)}


def set_attached(bio: fx.GraphModule, names: Collection[str], *, attached: bool) -> None:
    """Make rules on some weights act at the steps of an optimizer, or in the backward pass."""
    for name, synapses in synapses_in(bio).items():
        if name in names:
            synapses.attached = attached
    chain.update_chains(bio)
