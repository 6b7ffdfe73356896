"""The peak of memory of a training step: all that is held then, in multiples of the parameters of the plain model.

On a CPU, what is held between two steps is the storages of all tensors that Python knows, without the two tables of
noise that a process has once (32 MB), and the peak of a step above that is the sum of what PyTorch's allocator hands
out and takes back, as its profiler sees it, operators' own buffers included. On a GPU both are the allocator's numbers.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def held(device: str) -> int:
    """Bytes of all tensors."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.layout is torch.strided]
    return sum(
        {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x.device.type == device}.values()
    )


def above(step: Callable[[], None], device: str) -> int:
    """Bytes at the peak of a step, above what was held before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))
