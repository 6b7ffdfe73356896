"""Files that biofx writes: where they may be, and that they appear when they are complete."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from biofx.base.errors import ArgumentError


def path_of_file(path: str | Path, suffixes: Collection[str], by: str) -> Path:
    """The path of a file that `by` can write.

    Raises:
        ArgumentError: it has none of the suffixes, there is no folder for it, or it is a folder.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ArgumentError(f"{by}: unknown suffix {path.suffix!r} of {path.name}; known are {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"{by}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ArgumentError(f"{by}: {path} is a folder; give the path of a file")
    return path


@contextmanager
def completed(path: Path) -> Iterator[Path]:
    """Yield another path to write to; that file takes the place of `path` when the block ends without an error."""
    with TemporaryDirectory(prefix=".biofx-", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        unfinished.replace(path)
