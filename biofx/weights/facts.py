"""Facts: what is known of a weight, kept with the transformed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from biofx.weights.axes import Axes

NOT_A_SYNAPSE = "one value for each unit, not a synapse"
HELD = "a module keeps it in a list or a plain attribute as well, where it stays as it is"
NOT_RUN = "the model ran with none of the inputs that were tried; give example_inputs"


@dataclass(frozen=True)
class WeightFacts:
    """What a run tells of one weight. It holds no tensors, so that it is kept and pickled with the model.

    Attributes:
        operator: name of the operator that reads the weight; of all, joined by ", ", if there are several.
        uses: how often the run used it.
        axes: its axes, or None if its uses do not agree on them.
        why_no_axes: why not, or an empty string.
        why_not_judged: why it cannot be told whose units it reads, or an empty string.
        is_free: whether it reads the network's inputs and constants only, which are no units.
        groups: number of groups into which the operator divides an axis of units.
        padding: row that does not learn, as it stands for no token, or None.
        depth: number of weights on the longest path before it, over that of the deepest weight.
        is_output: whether no signal passes another weight after it.
        place: where the model uses it first, in words.
    """

    operator: str
    uses: int
    axes: Axes | None
    why_no_axes: str
    why_not_judged: str
    is_free: bool
    groups: int
    padding: int | None
    depth: float
    is_output: bool
    place: str
