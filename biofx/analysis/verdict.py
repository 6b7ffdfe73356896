"""Verdicts: whether a weight obeys Dale's principle, or why that cannot be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a weight obeys Dale's principle.

    Attributes:
        kind: `"obeys"`; `"breaks"`; `"free"`: it reads inputs and constants only, which are no units of the network;
            `"not constrained"`: no pass gave it signs, and `verify` does not look at its units; or `"not judged"`.
        mixed: the number of its presynaptic units that excite and inhibit, through this weight or others.
        reason: why it is not judged, or an empty string.
        has_interneurons: of a weight that obeys, whether its units inhibit through interneurons, so that its effective
            values have both signs.
    """

    kind: str
    mixed: int = 0
    reason: str = ""
    has_interneurons: bool = False

    def __str__(self) -> str:
        if self.kind == "breaks":
            return f"breaks: {self.mixed} of its units excite and inhibit"
        if self.has_interneurons:
            return f"{self.kind}, with inhibition by interneurons"
        return f"not judged: {self.reason}" if self.kind == "not judged" else self.kind
