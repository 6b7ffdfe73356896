"""Tables: text tables that fit a screen, with long notes below the table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

WIDTH = 120
INLINE = 50  # longest note that stays in its row if the table is too wide

Cell = str | list[str]


@dataclass(frozen=True)
class Table:
    """A table; as a string, it is laid out.

    Attributes:
        headers: the titles of the columns.
        rows: the cells of each row; a list is a cell of notes. A column with no note in any row is omitted.
        limits: widths of columns that are wrapped if the table is too wide with its long notes below it.

    Example:
        >>> print(Table(("weight", "note"), [["0.weight", []], ["2.weight", ["frozen"]]]))
        weight    note
        --------  ------
        0.weight
        2.weight  frozen
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    limits: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        wide = self._text(";\n".join)
        if not (self._has_notes or self.limits) or _fits(wide):
            return wide
        numbers: dict[str, int] = {}

        def numbered(notes: list[str]) -> str:
            short = [note for note in notes if len(note) <= INLINE]
            references = [f"[{numbers.setdefault(note, len(numbers) + 1)}]" for note in notes if note not in short]
            return "\n".join([*([";\n".join(short)] if short else []), *([" ".join(references)] if references else [])])

        narrow = self._text(numbered)
        if not _fits(narrow):
            narrow = self._text(numbered, self.limits)
        notes = "\n".join(wrapped(f"[{number}] {note}") for note, number in numbers.items())
        return f"{narrow}\n\n{notes}" if notes else narrow

    @property
    def _has_notes(self) -> bool:
        return any(isinstance(cell, list) and cell for row in self.rows for cell in row)

    def _text(self, write: Callable[[list[str]], str], limits: Mapping[str, int] | None = None) -> str:
        shown = [i for i in range(len(self.headers)) if not self.rows or any(row[i] != [] for row in self.rows)]
        headers = [self.headers[i] for i in shown]
        cells = [
            [write(cell) if isinstance(cell, list) else cell for cell in (row[i] for i in shown)] for row in self.rows
        ]
        widths = [limits.get(header) for header in headers] if limits else None
        lines = tabulate(cells, headers, disable_numparse=True, maxcolwidths=widths).splitlines()
        return "\n".join(line.rstrip() for line in lines)


def _fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= WIDTH


def wrapped(text: str) -> str:
    """A paragraph that fits a screen; its names are not broken."""
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
