"""Drawing: a picture of what the compiler added, where, and to which weight."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from biofx.base.errors import ArgumentError
from biofx.looking.page import page
from biofx.looking.text_graphs import dot, mermaid
from biofx.looking.vector import draw_vector
from biofx.looking.view import View, depth_that_shows, view_of
from biofx.model.changes import transformed

BOXES = 60  # at most so many boxes are shown if no depth is given
SUFFIXES = (".html", ".svg", ".png", ".dot", ".mmd")


def draw(bio: nn.Module, path: str | Path, *, depth: int | None = None, example_inputs: Any = None) -> None:
    """Draw the graph of a transformed model: what passes added, where, and to which weight.

    Colour and shape tell the role of a node: original, stored weight, sum over synapses, sign constraint, gradient
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
    """The path of a picture; refuses what no picture can be written to, and a depth that is not one."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"draw: unknown suffix {path.suffix!r} of {path.name}; known are {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"draw: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ArgumentError(f"draw: {path} is a folder; give the path of a file")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise ArgumentError(f"draw: depth must be an integer ≥ 1, got {depth!r}")
    return path


def write(view: View, path: Path, depth: int | None) -> None:
    """Write a view to a file, in the format of its suffix; the file appears when it is complete."""
    opened = depth or (1 if path.suffix == ".html" else depth_that_shows(view.root, BOXES))
    try:
        with TemporaryDirectory(prefix=".biofx-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            if path.suffix in (".svg", ".png"):
                draw_vector(view, unfinished, opened)
            else:
                texts = {".html": page, ".dot": dot, ".mmd": mermaid}
                unfinished.write_text(texts[path.suffix](view, opened), encoding="utf-8")
            unfinished.replace(path)
    except OSError as error:
        raise ArgumentError(f"draw: cannot write {path}: {error.strerror}") from error
