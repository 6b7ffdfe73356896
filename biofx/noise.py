"""Noise: normal numbers that follow from a counter: seed, step, purpose, and the place of the entry.

Nothing is stored, and nothing depends on what was drawn before: a part of a tensor, such as the shard of a rank, gets
the numbers that it has in the whole. On a CPU they are sums of two tables of normal numbers, at offsets that are hashes
of the counter; elsewhere they are hashes of the counter themselves, so that no number has to be moved.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor

from biofx.randomness import generator

TABLE, BLOCK = 1 << 22, 1 << 20  # lengths of a table, and of what is read from one place of it


def normal(like: Tensor, seed: Tensor, steps: Tensor, *purpose: str, start: int = 0) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of a tensor, contiguous.

    Args:
        like: the tensor.
        seed: the user's seed, an integer on the device.
        steps: the number of the step, an integer on the device.
        purpose: who draws: a pass, a weight.
        start: the index of the first entry, if `like` is a part of a tensor.
    """
    count = like.numel()
    if like.device.type == "cpu":
        flat = from_tables(count, int(seed), int(steps), *purpose, start=start)
    else:
        flat = from_words(count, seed, steps, words_of(*purpose), start=start)
    return flat.to(like.dtype).view(like.shape)


def from_tables(count: int, seed: int, step: int, *purpose: str, start: int = 0) -> Tensor:
    """Normal numbers as sums of two tables of them."""
    first, second = _tables()
    result = torch.empty(count, dtype=torch.float32, device="cpu")
    place = start
    while place < start + count:
        block, inside = divmod(place, BLOCK)
        length = min(BLOCK - inside, start + count - place)
        a, b = (word % (TABLE - BLOCK) + inside for word in words_of(seed, step, *purpose, block))
        torch.add(first[a : a + length], second[b : b + length], out=result[place - start :][:length])
        place += length
    return result.mul_(0.5**0.5)


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(TABLE, generator=generator(0, "table", number), device="cpu") for number in (1, 2))
    return first, second


def words_of(*purpose: str | int) -> tuple[int, int]:
    """Two words of 32 bits that are a hash of a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def from_words(count: int, seed: Tensor, steps: Tensor, purpose: tuple[int, int], start: int = 0) -> Tensor:
    """Normal numbers as hashes of the counter, by Box and Muller."""
    first, second = map(_signed, purpose)
    seed, steps = seed.to(torch.int32), steps.to(torch.int32)
    key = _mixed(_mixed(steps + first) ^ seed)
    other = _mixed(_mixed(steps ^ second) + key)
    index = torch.arange(start, start + count, dtype=torch.int32, device=seed.device)
    radius = _mixed(_mixed(index + key) ^ other)
    angle = _mixed(radius + other)
    return torch.sqrt(-2 * torch.log(_uniform(radius))) * torch.cos(_uniform(angle) * (2 * math.pi))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right, filled up with zeros."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def _mixed(words: Tensor) -> Tensor:
    """One round of a hash of 32 bits, each bit of which depends on all bits of the word."""
    words = (words ^ _shifted(words, 16)) * _signed(0x21F0AAAD)
    words = (words ^ _shifted(words, 15)) * _signed(0x735A2D97)
    return words ^ _shifted(words, 15)


def _uniform(words: Tensor) -> Tensor:
    """Numbers between 0 and 1, neither of them included: 23 bits of words."""
    return _shifted(words, 9).float() * 2**-23 + 2**-24
