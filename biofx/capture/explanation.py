"""Explanations: which line of a forward raised an error, and why."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        text = traceback.FrameSummary(file, number, frame.f_code.co_name).line
        yield Line(str(frame.f_globals.get("__name__", "")), file, number, text or "")


def explain(error: BaseException) -> str:
    """Explain why a forward cannot be traced, and quote the line that failed, if possible one of the user."""
    lines = [line for line in lines_of(error) if not line.module.startswith(("torch.fx", "biofx"))]
    of_user = [line for line in lines if not line.module.startswith("torch")]
    where = "".join(
        f" at {Path(line.file).name}:{line.number}, {_cut(line.text)!r}" for line in (of_user or lines)[-1:]
    )
    message = " ".join(str(error).split()) or type(error).__name__
    return f"its forward cannot be traced{where}: {textwrap.shorten(message, 120)}"


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 1]}…"
