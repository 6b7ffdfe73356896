"""Slots: where on the way from what is stored to what an operator returns passes act, and who did."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Slot(enum.IntEnum):
    """Where on the way from a stored weight to its operator a pass acts; the value is the canonical order.

        raw [Γ, *shape] → gradient hooks → sign constraint → sum over synapses → operator → output

    The sign constraint and the sum are exclusive: one pass for each weight. Observers look at what the operator
    returns.
    """

    HOOK = 1
    SIGN = 2
    SUM = 3
    OUTPUT = 4
    OBSERVER = 5

    @property
    def label(self) -> str:
        """The slot's name in tables."""
        return {
            Slot.HOOK: "gradient hook",
            Slot.SIGN: "sign constraint",
            Slot.SUM: "sum over synapses",
            Slot.OUTPUT: "operator output",
            Slot.OBSERVER: "observer",
        }[self]

    @property
    def on_chain(self) -> bool:
        """Whether the slot lies between the stored weight and its operator."""
        return self in (Slot.HOOK, Slot.SIGN, Slot.SUM)

    @property
    def exclusive(self) -> bool:
        """Whether only one pass may claim the slot of a weight."""
        return self in (Slot.SIGN, Slot.SUM)


@dataclass(frozen=True)
class Inserted:
    """Who inserted a node.

    Attributes:
        passes: the pass's name; the names of all, if several passes share the node.
        parameter: the weight's name in the original model.
        slot: where the node stands.
    """

    passes: tuple[str, ...]
    parameter: str
    slot: Slot

    @property
    def by(self) -> str:
        """The names of the passes, in words."""
        return ", ".join(self.passes)
