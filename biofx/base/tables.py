"""Tables and reports: text that fits a screen, with long notes below a table, and the data that it shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from tabulate import tabulate

WIDTH = 100
INLINE = 50  # longest note that stays in its row if the table is too wide

Cell = str | list[str]


@dataclass(frozen=True)
class Table:
    """A table; as a string, it is laid out.

    Attributes:
        headers: the titles of the columns.
        rows: the cells of each row; a list is a cell of notes. A column with no note in any row is omitted.
        limits: widths of columns that are wrapped if the table is too wide with its long notes below it.
        usual: the usual cell of columns that are omitted if no row has another.

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
    usual: Mapping[str, str] = field(default_factory=dict)

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

    def html(self) -> str:
        """The table for a notebook."""
        return str(tabulate(*self._shown("; ".join), tablefmt="html", disable_numparse=True))

    @property
    def _has_notes(self) -> bool:
        return any(isinstance(cell, list) and cell for row in self.rows for cell in row)

    def _text(self, write: Callable[[list[str]], str], limits: Mapping[str, int] | None = None) -> str:
        cells, headers = self._shown(write)
        widths = [limits.get(header) for header in headers] if limits else None
        lines = tabulate(cells, headers, disable_numparse=True, maxcolwidths=widths).splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def _shown(self, write: Callable[[list[str]], str]) -> tuple[list[list[str]], list[str]]:
        """The cells and headers of the columns that are not omitted."""
        shown = [
            index
            for index, header in enumerate(self.headers)
            if not self.rows or any(row[index] not in ([], self.usual.get(header)) for row in self.rows)
        ]
        rows = [[row[index] for index in shown] for row in self.rows]
        cells = [[write(cell) if isinstance(cell, list) else cell for cell in row] for row in rows]
        return cells, [self.headers[i] for i in shown]


class Report(str):
    """A text that is also data: printed, or at a prompt, it is the text; a notebook shows its tables as tables.

    Attributes:
        rows: the rows of its table, with values in place of words.

    Example:
        >>> report = Report([Table(("weight", "Γ"), [["0.weight", "2"]])], [{"weight": "0.weight", "synapses": 2}])
        >>> report.to_dict()
        {'rows': [{'weight': '0.weight', 'synapses': 2}]}
    """

    rows: list[dict[str, Any]]

    def __new__(cls, parts: Sequence[Table | str], rows: Sequence[Mapping[str, Any]], **others: Any) -> Report:
        """Make a report.

        Args:
            parts: tables and paragraphs.
            rows: the rows of its table as data.
            others: other data, by name.
        """
        report = super().__new__(cls, "\n\n".join(map(str, parts)))
        report.rows = [dict(row) for row in rows]
        report._parts, report._others = tuple(parts), others
        return report

    _parts: tuple[Table | str, ...]
    _others: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All that the report says, as data: `rows`, and the text around the table."""
        return {"rows": [dict(row) for row in self.rows], **self._others}

    def __repr__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _report, (self._parts, self.rows, self._others)

    def _repr_html_(self) -> str:
        texts = (part.html() if isinstance(part, Table) else f"<pre>{escape(part)}</pre>" for part in self._parts)
        return "\n".join(texts)


class ShownAsReport:
    """Base of objects that are shown as a report: printed, at a prompt and in a notebook."""

    def _report(self) -> Report:
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self._report())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._report()._repr_html_()


def _report(parts: Sequence[Table | str], rows: Sequence[Mapping[str, Any]], others: dict[str, Any]) -> Report:
    return Report(parts, rows, **others)


def _fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= WIDTH


def wrapped(text: str) -> str:
    """A paragraph that fits a screen; its names are not broken."""
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
