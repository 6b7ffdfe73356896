"""Graphs as text: for Graphviz (`.dot`) and for Mermaid (`.mmd`), which Markdown on GitHub shows."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from biofx.looking.roles import Role
from biofx.looking.view import Box, View, shown_at


def dot(view: View, depth: int) -> str:
    """The graph in the language of Graphviz, with modules opened to a depth."""
    numbers = {box.name: f"n{index}" for index, box in enumerate(view.root.walk())}
    lines = ["digraph {", "  node [style=filled, fontname=Helvetica, fontsize=10];", "  edge [color=gray40];"]
    lines += _dot_boxes(view.root, depth, numbers, "  ")
    for (source, target), label in view.lifted(shown_at(view.root, depth)).items():
        lines.append(f"  {numbers[source]} -> {numbers[target]}" + (f" [label={_quoted(label)}];" if label else ";"))
    return "\n".join([*lines, "}"]) + "\n"


def _dot_boxes(box: Box, depth: int, numbers: dict[str, str], indent: str) -> Iterator[str]:
    style = box.role.style
    if not box.children or depth < 1:
        rounded = ', style="filled,rounded"' if style.corners == "round" else ""
        yield (
            f"{indent}{numbers[box.name]} [label={_quoted(box.label)}, shape={style.dot}, "
            f'fillcolor="{style.colour}", tooltip={_quoted(_tip(box))}{rounded}];'
        )
        return
    yield f"{indent}subgraph cluster_{numbers[box.name]} {{"
    yield f"{indent}  label={_quoted(box.label)};"
    for child in box.children:
        yield from _dot_boxes(child, depth - 1, numbers, f"{indent}  ")
    yield f"{indent}}}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _tip(box: Box) -> str:
    return ", ".join(f"{key} {value}" for key, value in box.facts.items())


def mermaid(view: View, depth: int) -> str:
    """The graph in the language of Mermaid, with modules opened to a depth."""
    numbers = {box.name: f"n{index}" for index, box in enumerate(view.root.walk())}
    lines = ["flowchart TD", *_mermaid_boxes(view.root, depth, numbers, "  ")]
    for (source, target), label in view.lifted(shown_at(view.root, depth)).items():
        arrow = f"-->|{_mermaid_text(label)}|" if label else "-->"
        lines.append(f"  {numbers[source]} {arrow} {numbers[target]}")
    lines += [f"  classDef {role.name} fill:{role.style.colour},color:#000,stroke:#555" for role in Role]
    return "\n".join(lines) + "\n"


def _mermaid_boxes(box: Box, depth: int, numbers: dict[str, str], indent: str) -> Iterator[str]:
    if not box.children or depth < 1:
        before, after = box.role.style.mermaid
        yield f"{indent}{numbers[box.name]}{before}{_mermaid_text(box.label)}{after}:::{box.role.name}"
        return
    yield f"{indent}subgraph {numbers[box.name]}[{_mermaid_text(box.label)}]"
    for child in box.children:
        yield from _mermaid_boxes(child, depth - 1, numbers, f"{indent}  ")
    yield f"{indent}end"


def _mermaid_text(text: str) -> str:
    return '"' + escape(" ".join(text.split())).replace("&#x27;", "'").replace("&quot;", "#quot;") + '"'
