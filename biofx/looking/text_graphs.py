"""Graphs as text: for Graphviz (`.dot`) and for Mermaid (`.mmd`), which Markdown on GitHub shows."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from biofx.looking.roles import Role

if TYPE_CHECKING:
    from biofx.looking.view import Box, View


def dot(view: View) -> str:
    """The graph in the language of Graphviz."""
    numbers = {box.name: f"n{index}" for index, box in enumerate(view.root.walk())}
    lines = ["digraph {", "  node [style=filled, fontname=Helvetica, fontsize=10];", "  edge [color=gray40];"]
    lines += _dot_boxes(view.root, numbers, "  ")
    for (source, target), label in view.edges.items():
        lines.append(f"  {numbers[source]} -> {numbers[target]}" + (f" [label={_quoted(label)}];" if label else ";"))
    return "\n".join([*lines, "}"]) + "\n"


def _dot_boxes(box: Box, numbers: dict[str, str], indent: str) -> Iterator[str]:
    style = box.role.style
    if not box.children:
        rounded = ', style="filled,rounded"' if style.corners == "round" else ""
        tip = _quoted(", ".join(f"{key} {value}" for key, value in box.facts.items()))
        yield (
            f"{indent}{numbers[box.name]} [label={_quoted(box.label)}, shape={style.dot}, "
            f'fillcolor="{style.colour}", tooltip={tip}{rounded}];'
        )
        return
    yield f"{indent}subgraph cluster_{numbers[box.name]} {{"
    yield f"{indent}  label={_quoted(box.label)};"
    for child in box.children:
        yield from _dot_boxes(child, numbers, f"{indent}  ")
    yield f"{indent}}}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def mermaid(view: View) -> str:
    """The graph in the language of Mermaid."""
    numbers = {box.name: f"n{index}" for index, box in enumerate(view.root.walk())}
    lines = ["flowchart TD", *_mermaid_boxes(view.root, numbers, "  ")]
    for (source, target), label in view.edges.items():
        arrow = f"-->|{_mermaid_text(label)}|" if label else "-->"
        lines.append(f"  {numbers[source]} {arrow} {numbers[target]}")
    lines += [f"  classDef {role.name} fill:{role.style.colour},color:#000,stroke:#555" for role in Role]
    return "\n".join(lines) + "\n"


def _mermaid_boxes(box: Box, numbers: dict[str, str], indent: str) -> Iterator[str]:
    if not box.children:
        before, after = box.role.style.mermaid
        yield f"{indent}{numbers[box.name]}{before}{_mermaid_text(box.label)}{after}:::{box.role.name}"
        return
    yield f"{indent}subgraph {numbers[box.name]}[{_mermaid_text(box.label)}]"
    for child in box.children:
        yield from _mermaid_boxes(child, numbers, f"{indent}  ")
    yield f"{indent}end"


def _mermaid_text(text: str) -> str:
    return '"' + escape(" ".join(text.split())).replace("&#x27;", "'").replace("&quot;", "#quot;") + '"'
