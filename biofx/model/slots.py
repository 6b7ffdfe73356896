"""Slots: the places between a stored tensor and the output of its operator where passes may insert nodes."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Slot(enum.IntEnum):
    """A place where a pass acts on a weight; the values are the canonical order.

        raw [Γ, *shape] → gradient hooks → sign constraint → sum over synapses → interneurons → operator → output

    The sign constraint, the sum and the interneurons are exclusive: only one pass of a weight may claim each. Observers
    receive the output of the operator.

    Attributes:
        HOOK: the identity, with a factor for each entry of the gradient; any number of passes.
        SIGN: what keeps the shape, such as a projection onto signs.
        SUM: the sum over the synapses of each connection.
        INTERNEURONS: what follows the sum and keeps the shape. It may have its own parameters.
        OUTPUT: behind the operator.
        OBSERVER: nothing is changed.
    """

    HOOK = 1
    SIGN = 2
    SUM = 3
    INTERNEURONS = 4
    OUTPUT = 5
    OBSERVER = 6

    @property
    def label(self) -> str:
        """The slot's name in tables."""
        return {
            Slot.HOOK: "gradient hook",
            Slot.SIGN: "sign constraint",
            Slot.SUM: "sum over synapses",
            Slot.INTERNEURONS: "pool of interneurons",
            Slot.OUTPUT: "operator output",
            Slot.OBSERVER: "observer",
        }[self]

    @property
    def on_chain(self) -> bool:
        """Whether the slot lies between the stored weight and its operator."""
        return self < Slot.OUTPUT

    @property
    def exclusive(self) -> bool:
        """Whether only one pass may claim the slot of a weight."""
        return self in (Slot.SIGN, Slot.SUM, Slot.INTERNEURONS)


@dataclass(frozen=True)
class Inserted:
    """The origin of an inserted node.

    Attributes:
        passes: the names of the passes that share the node.
        parameter: the weight's name in the original model.
        slot: the slot of the node.
    """

    passes: tuple[str, ...]
    parameter: str
    slot: Slot

    @property
    def by(self) -> str:
        """The names of the passes, for messages."""
        return ", ".join(self.passes)
