"""Optional packages: those that only some outputs need."""

from __future__ import annotations

import importlib
from typing import Any

from biofx.base.errors import ExportError


def require(package: str, by: str, extra: str = "export") -> Any:
    """Import a package.

    Args:
        package: its name, or that of a module in it.
        by: the function that needs it, for the message.
        extra: the extra of biofx that installs it.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ExportError(f"{by}: {name} is not installed; pip install 'biofx[{extra}]'") from error
