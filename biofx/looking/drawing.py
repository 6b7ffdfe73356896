"""Drawing: a picture of what the compiler added, where, and to which weight; as text, it is written here.

Graphviz reads `.dot`, and Markdown on GitHub shows `.mmd`, the language of Mermaid.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from torch import nn

from biofx.base.errors import ArgumentError
from biofx.base.files import completed, path_of_file
from biofx.looking.page import page
from biofx.looking.roles import Role
from biofx.looking.vector import draw_vector
from biofx.looking.view import Box, View, view_of
from biofx.model.changes import transformed

if TYPE_CHECKING:
    from pathlib import Path

BOXES = 60  # the largest number of boxes that is shown if no depth is given
SUFFIXES = (".html", ".svg", ".png", ".dot", ".mmd")


def draw(bio: nn.Module, path: str | Path, *, depth: int | None = None, example_inputs: Any = None) -> None:
    """Draw the graph of a transformed model: what passes added, where, and to which weight.

    Colour and shape show the role of a node: original, stored weight, sum over synapses, sign constraint, gradient
    hook, observer. Nodes stand in a box for each module. Equal modules in a row are drawn once, with their number. Of a
    module with more than 400 boxes, the first and the last 200 are drawn, and the picture says how many were left out.

    - `.html`: one page that needs no network. Modules open by a click or by the keyboard; there is a search by name,
      and on demand each weight shows which of its presynaptic units are excitatory and which inhibitory.
    - `.svg`, `.png`: a picture by matplotlib.
    - `.dot`, `.mmd`: text for Graphviz and for Mermaid.

    Args:
        bio: a model made by `biofx.transform`.
        path: the file; its folder must exist.
        depth: how many levels of modules are open (in a page: at first). Default: as many as show at most 60 boxes; one
            level in a page.
        example_inputs: arguments of the model, as for `transform`. With them, edges show the shapes of values.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`; the path or depth is invalid, or the example inputs do
            not fit; or a picture would be too large.
        ExportError: matplotlib or igraph is missing (`pip install 'biofx[draw]'`).

    Example:
        >>> import biofx, pathlib, tempfile, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(4, 2), [passes.FuzzyLearningRates()])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.mmd"
        >>> biofx.draw(bio, path)
        >>> print(path.read_text().splitlines()[0])
        flowchart TD
    """
    path = check_path(path, depth)
    write(view_of(transformed(bio), example_inputs), path, depth)


def check_path(path: str | Path, depth: int | None) -> Path:
    """The path of a picture; raises if no picture can be written there, or if the depth is invalid."""
    path = path_of_file(path, SUFFIXES, "draw")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise ArgumentError(f"draw: depth must be an integer ≥ 1, got {depth!r}")
    return path


def write(view: View, path: Path, depth: int | None) -> None:
    """Write a view to a file, in the format of its suffix; the file appears when it is complete."""
    opened = view.opened_to_show(BOXES) if depth is None else view.opened(depth)
    try:
        with completed(path) as unfinished:
            if path.suffix in (".svg", ".png"):
                draw_vector(opened, unfinished)
            else:
                texts = {".html": lambda opened: page(view, depth or 1), ".dot": dot, ".mmd": mermaid}
                unfinished.write_text(texts[path.suffix](opened), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"draw: cannot write {path}: {error.strerror}") from error


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
