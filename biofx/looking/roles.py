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
    """What a node is there for. The colours are those of Okabe and Ito, which the colour-blind can tell apart."""

    ORIGINAL = "original"
    WEIGHT = "stored weight"
    SYNAPSES = "sum over synapses"
    SIGN = "sign constraint"
    INTERNEURONS = "pool of interneurons"
    HOOK = "gradient hook"
    OBSERVER = "observer"
    OUTPUT = "operator output"
    ISLAND = "island"
    MODULE = "module"
    OMITTED = "left out"

    @property
    def style(self) -> Style:
        """How pictures show it."""
        return _STYLES[self]

    @property
    def is_inserted(self) -> bool:
        """Whether passes insert nodes of this role."""
        return self in _OF_SLOT.values()


_STYLES = {
    Role.ORIGINAL: Style("#ffffff", "box", ("[", "]"), "square"),
    Role.WEIGHT: Style("#f0e442", "cylinder", ("[(", ")]"), "oval"),
    Role.SYNAPSES: Style("#56b4e9", "hexagon", ("{{", "}}"), "cut"),
    Role.SIGN: Style("#cc79a7", "diamond", ("{", "}"), "cut"),
    Role.INTERNEURONS: Style("#d55e00", "invtriangle", ("[\\", "/]"), "cut"),
    Role.HOOK: Style("#e69f00", "house", ("[/", "/]"), "round"),
    Role.OBSERVER: Style("#009e73", "ellipse", ("([", "])"), "oval"),
    Role.OUTPUT: Style("#8fb8de", "octagon", ("[[", "]]"), "cut"),
    Role.ISLAND: Style("#d9d9d9", "component", ("[[", "]]"), "square"),
    Role.MODULE: Style("#f4f4f4", "box", ("(", ")"), "round"),
    Role.OMITTED: Style("#ffffff", "plaintext", ("[", "]"), "square"),
}

_OF_SLOT = {
    Slot.HOOK: Role.HOOK,
    Slot.SIGN: Role.SIGN,
    Slot.SUM: Role.SYNAPSES,
    Slot.INTERNEURONS: Role.INTERNEURONS,
    Slot.OUTPUT: Role.OUTPUT,
    Slot.OBSERVER: Role.OBSERVER,
}


def role_of(node: fx.Node, model: fx.GraphModule) -> Role:
    """The role of a node: that of the slot in which a pass inserted it, or what it is in the original model."""
    origin = inserted(node)
    if origin is not None:
        return _OF_SLOT[origin.slot]
    if node.op == "get_attr":
        is_weight = original_name(model, node) in record_of(model).weights if is_transformed(model) else False
        return Role.WEIGHT if is_weight else Role.ORIGINAL
    is_island = is_transformed(model) and island_path(model, node) is not None
    return Role.ISLAND if is_island else Role.ORIGINAL
