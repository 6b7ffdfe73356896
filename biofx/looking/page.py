"""A page that shows a view: modules open by a click, and nothing is loaded from a network.

The browser lays out boxes in rows and draws modules as `details` elements, which the keyboard and screen readers know.
The script in `page.js` draws the edges between the boxes that are visible, searches, and shows what is known of a box.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from biofx.looking.layout import Gap, entrance, exit_of, rows_by_box
from biofx.looking.roles import Role

if TYPE_CHECKING:
    from biofx.looking.view import Box, View

SEGMENTS = 64  # at most so many colours in the strip of a weight's units


def page(view: View, depth: int) -> str:
    """The page, with modules opened to a depth."""
    numbers = {box.name: f"b{index}" for index, box in enumerate(view.root.walk())}
    numbers |= {end(name): end(number) for name, number in numbers.items() for end in (entrance, exit_of)}
    edges = [[numbers[a], numbers[b], label] for (a, b), label in view.edges.items()]
    used = {box.role for box in view.root.walk()} - {Role.MODULE}
    legend = "".join(f"<li>{_marker(role)} {escape(role.value)}</li>" for role in Role if role in used)
    body = "".join(_box(view.root, depth, numbers, rows_by_box(view)))
    colours = "\n".join(f".{role.name} {{ --fill: {role.style.colour}; }}" for role in Role)
    return _resource("page.html").format(
        title=escape(view.root.label),
        style=f"{_resource('page.css')}\n{colours}",
        legend=legend,
        body=body,
        edges=json.dumps(edges).replace("<", "\\u003c"),
        script=_resource("page.js"),
    )


def _resource(name: str) -> str:
    return (files("biofx.looking") / name).read_text(encoding="utf-8")


def _marker(role: Role) -> str:
    return f'<span class="marker {role.name} {role.style.corners}"></span>'


def _box(box: Box, depth: int, numbers: Mapping[str, str], rows: Mapping[str, list[list[str | Gap]]]) -> Iterator[str]:
    facts = escape(json.dumps(dict(box.facts)), quote=True)
    common = f'id="{numbers[box.name]}" data-name="{escape(_search(box), quote=True)}" data-facts="{facts}"'
    if not box.children:
        role = box.role
        label = escape(box.label)
        shape = f"<small>{escape(box.facts['shape'])}</small>" if role is Role.WEIGHT and "shape" in box.facts else ""
        yield (
            f'<button type="button" class="box {role.name} {role.style.corners}" {common} '
            f'aria-label="{escape(f"{box.label}, {role.value}", quote=True)}">{label}{shape}{_units(box)}</button>'
        )
        return
    counts = box.inserted_roles()
    chips = "".join(
        f'<span class="chip" title="{count} × {escape(role.value)}">{_marker(role)}{count}</span>'
        for role, count in counts.items()
    )
    is_open = " open" if depth > 0 else ""
    yield f'<details class="box {box.role.name}" {common}{is_open}><summary>{escape(box.label)} {chips}</summary>'
    children = {child.name: child for child in box.children}
    for row in rows[box.name]:
        yield '<div class="row">'
        for item in row:
            if isinstance(item, Gap):
                yield f'<i class="way" data-way="{escape(f"{numbers[item.source]} {numbers[item.target]}")}"></i>'
            else:
                yield from _box(children[item], depth - 1, numbers, rows)
        yield "</div>"
    yield "</details>"


def _search(box: Box) -> str:
    """What a search finds a box by."""
    return " ".join([box.name.removeprefix("module "), box.label, *box.facts.values(), box.role.value])


def _units(box: Box) -> str:
    """A strip with the sign of each presynaptic unit of a weight, or of each few if there are many."""
    if not box.signs:
        return ""
    count = min(SEGMENTS, len(box.signs))
    stops = []
    for index in range(count):
        part = box.signs[index * len(box.signs) // count : (index + 1) * len(box.signs) // count]
        mean = sum(part) / len(part)
        colour = "#bbbbbb" if mean == 0 else "#d55e00" if mean > 0 else "#0072b2"
        stops.append(f"{colour} {100 * index / count:.4g}% {100 * (index + 1) / count:.4g}%")
    excitatory, inhibitory = sum(s > 0 for s in box.signs), sum(s < 0 for s in box.signs)
    text = f"{excitatory} excitatory units, {inhibitory} inhibitory"
    return f'<span class="units" title="{text}" style="background:linear-gradient(90deg,{",".join(stops)})"></span>'
