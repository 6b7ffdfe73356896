"""Roles: what a node of the graph is there for, and how tables and pictures show it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import fx

from biofx.model.chain import original_name
from biofx.model.islands import island_path
from biofx.model.provenance import inserted, is_transformed, record_of
from biofx.model.slots import Slot


@dataclass(frozen=True)
class Style:
    """How pictures show a role: by colour and by shape, so that either alone is enough.

    Attributes:
        colour: the fill.
        dot: the shape in Graphviz.
        mermaid: the brackets in Mermaid.
        corners: how the corners are drawn on a page and in a vector graphic: `square`, `round`, `cut` or `oval`.
    """

    colour: str
    dot: str
    mermaid: tuple[str, str]
    corners: str


class Role(enum.Enum):
    """What a node is there for; of inserted nodes, the label of their slot.

    The colours are those of Okabe and Ito, which the colour-blind can tell apart.

    Attributes:
        style: how pictures show it.
    """

    style: Style

    ORIGINAL = "original", Style("#ffffff", "box", ("[", "]"), "square")
    WEIGHT = "stored weight", Style("#f0e442", "cylinder", ("[(", ")]"), "oval")
    SYNAPSES = Slot.SUM.label, Style("#56b4e9", "hexagon", ("{{", "}}"), "cut")
    SIGN = Slot.SIGN.label, Style("#cc79a7", "diamond", ("{", "}"), "cut")
    INTERNEURONS = Slot.INTERNEURONS.label, Style("#d55e00", "invtriangle", ("[\\", "/]"), "cut")
    HOOK = Slot.HOOK.label, Style("#e69f00", "house", ("[/", "/]"), "round")
    OBSERVER = Slot.OBSERVER.label, Style("#009e73", "ellipse", ("([", "])"), "oval")
    OUTPUT = Slot.OUTPUT.label, Style("#8fb8de", "octagon", ("[[", "]]"), "cut")
    ISLAND = "island", Style("#d9d9d9", "component", ("[[", "]]"), "square")
    MODULE = "module", Style("#f4f4f4", "box", ("(", ")"), "round")
    OMITTED = "left out", Style("#ffffff", "plaintext", ("[", "]"), "square")

    def __new__(cls, text: str, style: Style | None = None) -> Role:
        """A role by its text; the style is that of its definition."""
        role = object.__new__(cls)
        role._value_ = text
        if style is not None:
            role.style = style
        return role

    @property
    def is_inserted(self) -> bool:
        """Whether passes insert nodes of this role."""
        return self.value in [slot.label for slot in Slot]


def role_of(node: fx.Node, model: fx.GraphModule) -> Role:
    """The role of a node: that of the slot in which a pass inserted it, or what it is in the original model."""
    origin = inserted(node)
    if origin is not None:
        return Role(origin.slot.label)
    if node.op == "get_attr":
        is_weight = original_name(model, node) in record_of(model).weights if is_transformed(model) else False
        return Role.WEIGHT if is_weight else Role.ORIGINAL
    is_island = is_transformed(model) and island_path(model, node) is not None
    return Role.ISLAND if is_island else Role.ORIGINAL
