"""What the examples share: headlines, and options that are checked before the training rather than after."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg


def headline(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {number}: one value has no interval")
    return number


def plot_path(text: str) -> Path:
    """A place to write to, checked before training rather than after."""
    path = Path(text)
    if path.suffix[1:].lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or another format of matplotlib, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def folder(text: str) -> Path:
    """A folder to write to, checked before training rather than after."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path
