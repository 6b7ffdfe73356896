"""Explanations: which line of a forward raised an error, and why."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LENGTH = 80  # of a quoted line


@dataclass(frozen=True)
class Line:
    """A line of code in the traceback of an error.

    Attributes:
        module: the name of its Python module.
        file: its file.
        number: its number in the file.
        text: its text.
    """

    module: str
    file: str
    number: int
    text: str


def lines_of(error: BaseException) -> Iterator[Line]:
    """The lines in the traceback of an error, the innermost last."""
    return _lines_of(traceback.walk_tb(error.__traceback__))


def _lines_of(frames: Iterable[tuple[FrameType, int]]) -> Iterator[Line]:
    for frame, number in frames:
        file = frame.f_code.co_filename
        text = traceback.FrameSummary(file, number, frame.f_code.co_name).line
        yield Line(str(frame.f_globals.get("__name__", "")), file, number, text or "")


def explain(error: BaseException) -> str:
    """Explain why a forward cannot be traced, and quote the line that failed, if possible one of the user."""
    return _explained(" ".join(str(error).split()) or type(error).__name__, lines_of(error))


def explain_here(message: str) -> str:
    """Explain why the forward that runs cannot be traced, as `explain` would for an error that is raised here."""
    return _explained(message, _lines_of(reversed([*traceback.walk_stack(None)])))


def _explained(message: str, lines_of_code: Iterable[Line]) -> str:
    lines = [line for line in lines_of_code if not line.module.startswith(("torch.fx", "biofx"))]
    of_user = [line for line in lines if not line.module.startswith("torch")]
    where = "".join(
        f" at {Path(line.file).name}:{line.number}, {_cut(line.text)!r}" for line in (of_user or lines)[-1:]
    )
    return f"its forward cannot be traced{where}: {textwrap.shorten(message, 120)}"


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 1]}…"
