"""Random numbers that depend on the seed and on who draws, and on nothing else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_LOCK = threading.Lock()
_fixed: list[tuple[torch.dtype, torch.device]] = []  # the defaults of the caller, once for each block that runs


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, independent of the global one and of every other purpose.

    The stream is a hash of the seed and the purpose, so adding a layer changes no other layer's draw, and every rank
    of a distributed run draws the same. It lives on the CPU because the same seed gives other numbers on other devices.

    Args:
        seed: the user's seed.
        purpose: who draws: a pass, a weight, a step.

    Example:
        >>> from biofx.base.randomness import generator
        >>> import torch
        >>> a, b = (torch.rand(3, generator=generator(0, "fuzzy", site)) for site in ("fc1.weight", "fc2.weight"))
        >>> bool((a == b).any())
        False
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))


@contextmanager
def fixed_defaults() -> Iterator[None]:
    """Make float32 and the CPU the defaults of new tensors in the block, whatever the caller's defaults are.

    A draw of another dtype, or on another device, would give other numbers.
    """
    device = torch.get_default_device()
    with torch.device("cpu") if device.type != "cpu" else nullcontext():  # it costs time at every call of a function
        with _LOCK:  # all threads have one default, and the last to leave the block restores it
            _fixed.append(_fixed[0] if _fixed else (torch.get_default_dtype(), device))
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with _LOCK:
                dtype, _ = _fixed.pop()
                if not _fixed:
                    torch.set_default_dtype(dtype)


@contextmanager
def callers_defaults() -> Iterator[None]:
    """Run a user's model with the user's defaults, inside of `fixed_defaults`."""
    if not _fixed:
        yield
        return
    dtype, device = _fixed[0]
    with torch.device(device) if device.type != "cpu" else nullcontext():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
