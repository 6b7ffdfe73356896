"""Tables of what came out of the experiments, for README files.

Run `python examples/report.py` after an experiment that wrote to `examples/results`. In every README.md of the
repository it writes each table anew that stands between two comments:

    <!-- results: accuracy -->
    | condition | … |
    <!-- end of results -->

A table shows the key `rows` of `examples/results/NAME.json`: a list of flat objects, one for each row, whose keys are
the columns. `<!-- results: accuracy, steps -->` shows the key `steps` instead. So no number is copied by hand;
`tests/test_examples.py` fails where a table and its file differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"

Value = str | float | bool | None

BEGIN = "<!-- results:"
TABLE = re.compile(rf"^({BEGIN} (\w+)(?:, ([^\n]+?))? -->)$.*?^(<!-- end of results -->)$", re.MULTILINE | re.DOTALL)


def documents(root: Path = ROOT) -> list[Path]:
    """The README files that may show results."""
    return sorted([*root.glob("README.md"), *root.glob("*/README.md")])


def updated(text: str, results: Path = RESULTS) -> str:
    """A document with all its tables of results as the files in the folder `results` have them.

    Raises:
        ValueError: a table has no end, or its rows are not flat.
        FileNotFoundError, KeyError: there is no such file, or it has no such list.
    """
    new, count = TABLE.subn(lambda found: _table(found, results), text)
    if count != text.count(BEGIN):
        raise ValueError(f"{text.count(BEGIN)} tables begin with {BEGIN!r}, but {count} are complete")
    return new


def _table(found: re.Match[str], results: Path) -> str:
    begin, name, key, end = found.groups()
    numbers = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return f"{begin}\n{markdown(numbers[key or 'rows'])}\n{end}"


def markdown(rows: Sequence[Mapping[str, Value]]) -> str:
    """A table in Markdown: one column for each key of any row, in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Value) -> str:
    """A value as people read it: three digits of a float, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}".replace("-", "−")
    if not isinstance(value, str | int):
        raise ValueError(f"rows must be flat, got a {type(value).__name__} in one: {value!r:.60}")
    return str(value).replace("|", "\\|")


def main() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        path.write_text(updated(text), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {text.count(BEGIN)} tables")


if __name__ == "__main__":
    main()
