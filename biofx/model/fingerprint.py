"""Fingerprints: whether a graph is still the captured one, apart from the nodes that passes inserted."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx

from biofx.model.chain import original_name
from biofx.model.provenance import inserted

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def fingerprint(model: fx.GraphModule) -> str:
    """Return a digest of a graph: its calls in order, with their arguments. The names of nodes do not count."""
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in model.graph.nodes:
        if inserted(node) is not None:
            source = node.args[0] if node.args else None
            numbers[node] = numbers[source] if isinstance(source, fx.Node) else ""
            continue
        if node.op == "get_attr":  # identified by its attribute, since its position in the graph is arbitrary
            numbers[node] = f"@{original_name(model, node)}"
            continue
        numbers[node] = f"%{len(lines)}"
        lines.append(f"{node.op} {_described(node.target, numbers)} {_described((node.args, node.kwargs), numbers)}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _described(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_described(item, numbers) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_described(item, numbers)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_described((value.start, value.stop, value.step), numbers)}"
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
