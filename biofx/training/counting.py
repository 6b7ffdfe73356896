"""Counts steps on the device, and knows the number without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Counters:
    """The numbers of steps that weights have made.

    Counters on a CPU are read at every step. Others would have to be waited for, so they are read once, and again
    after something else wrote to them, such as a checkpoint. A write through `.data` goes unnoticed there.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, int, int]] = {}  # the counter, its version, its number
        self._was_captured = False

    def read(self, counters: dict[str, Tensor]) -> dict[str, int]:
        """The numbers in some counters, by name."""
        numbers = {name: self._known[name][2] for name, counter in counters.items() if self._knows(name, counter)}
        unknown = {name: counter for name, counter in counters.items() if name not in numbers}
        for (name, counter), number in zip(unknown.items(), on_host(unknown.values()), strict=True):
            numbers[name] = int(number)
            if not counter.is_cpu:
                self._known[name] = counter, counter._version, int(number)
        return numbers

    def _knows(self, name: str, counter: Tensor) -> bool:
        known = self._known.get(name)
        # A CUDA graph that is replayed counts unnoticed.
        return known is not None and not self._was_captured and known[0] is counter and known[1] == counter._version

    def add(self, counters: dict[str, Tensor]) -> None:
        """Count one step."""
        if not counters:
            return
        before = {name: self._known[name][2] for name, counter in counters.items() if self._knows(name, counter)}
        torch._foreach_add_([*counters.values()], 1)
        self._was_captured |= is_captured()
        self._known |= {name: (counters[name], counters[name]._version, n + 1) for name, n in before.items()}


def is_captured() -> bool:
    """Whether a CUDA graph is being captured, whose operations run later."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on_host(numbers: Iterable[Tensor]) -> Sequence[float]:
    """Numbers from devices, with one wait for all of a kind."""
    numbers = list(numbers)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, number in enumerate(numbers):
        kinds.setdefault((number.device, number.dtype), []).append(index)
    result = [0.0] * len(numbers)
    for indices in kinds.values():
        values = torch.stack([numbers[index] for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            result[index] = value
    return result
