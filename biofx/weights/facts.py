"""Facts: what is known of a weight, kept with the transformed model."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from biofx.weights.axes import Axes

NOT_A_SYNAPSE = "one value for each unit, not a synapse"
NOT_RUN = "the model ran with none of the inputs that were tried; give example_inputs"


class Need(enum.Enum):
    """What a pass may need of a weight; `WeightSite.unmet` gives the reason where a weight does not offer it.

    Attributes:
        NODES: its operators are nodes of the graph, and not inside of untraced Python.
        AXES: each of its axes runs over presynaptic or postsynaptic units, or neither; `units`, `spread` and the like
            need it.
        UNITS: the units that it reads are known.
        INPUT: NODES and AXES, and its operators read its presynaptic units on one axis (`Editor.observe_input`).
        OUTPUT: NODES and AXES, and its operators return its postsynaptic units on one axis (`Editor.observe`).
    """

    NODES = "its operators are nodes of the graph"
    AXES = "each of its axes runs over presynaptic or postsynaptic units, or neither"
    UNITS = "the units that it reads are known"
    INPUT = "its operators are nodes, and read its presynaptic units on one axis"
    OUTPUT = "its operators are nodes, and return its postsynaptic units on one axis"


@dataclass(frozen=True)
class WeightFacts:
    """What a run shows about one weight. It holds no tensors, so it can be kept and pickled with the model.

    Attributes:
        operator: name of the operator that reads the weight; of all, joined by ", ", if there are several.
        uses: how often the run used it.
        axes: its axes, or None if its uses do not agree on them.
        unmet: the needs that it does not meet, each with the reason; `Need.AXES` and `Need.UNITS` are known of a run.
        is_free: whether it reads the network's inputs and constants only, which are not units.
        groups: number of groups into which the operator divides an axis of units.
        padding: row that does not learn, because it stands for no token; None if there is none.
        depth: number of weights on the longest path before it, over that of the deepest weight.
        is_output: whether no signal passes another weight after it.
        tied: the weights that were tied to it after the run.
    """

    operator: str
    uses: int
    axes: Axes | None
    unmet: Mapping[Need, str]
    is_free: bool
    groups: int
    padding: int | None
    depth: float
    is_output: bool
    tied: tuple[str, ...] = ()

    def shared_with(self, names: Sequence[str], uses: int) -> WeightFacts:
        """What is known of the weight after others were tied to it, which no run has seen.

        Args:
            names: the others.
            uses: how often all of them were used.
        """
        reason = f"{', '.join(names)} was tied to it after the transform; transform the model again to judge it"
        return replace(self, uses=uses, is_free=False, unmet={**self.unmet, Need.UNITS: reason}, tied=(*names,))
