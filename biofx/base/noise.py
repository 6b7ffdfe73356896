"""Noise: random numbers that a counter determines: seed, step, purpose, and the place of the entry.

Nothing is stored, and nothing depends on what was drawn before: a part of a tensor, such as the shard of a rank, gets
the numbers that it has in the whole. On a CPU they are sums of two tables of random numbers, at offsets that are hashes
of the counter; elsewhere they are themselves hashes of the counter, so that no number has to be moved. `levels` are
hashes everywhere, so they are the same on every device.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from biofx.base.randomness import generator

TABLE, BLOCK = 1 << 22, 1 << 20  # lengths of a table, and of what is read from one place of it
LEVELS = 1 << 14  # at most 2¹⁵, as two numbers share a word


@dataclass(frozen=True)
class Rows:
    """Where the entries of a part lie in a tensor that is cut along an axis.

    Attributes:
        first: the index in the whole of the first entry.
        length: the entries of a row of the part.
        whole: the entries of a row of the whole.
    """

    first: int
    length: int
    whole: int


@dataclass(frozen=True)
class Counter:
    """What determines the noise of a tensor.

    Attributes:
        seed: the user's seed, an integer on the tensor's device.
        steps: the number of the step, an integer on the tensor's device.
        purpose: who draws: a pass, a weight, and what for.
        start: the index of the first entry, if the tensor is a part of another one.
        rows: where the entries lie in the whole, and if that is cut again, those in the part; empty if side by side.
    """

    seed: Tensor
    steps: Tensor
    purpose: tuple[str, ...]
    start: int = 0
    rows: tuple[Rows, ...] = ()

    def at(self, start: int) -> Counter:
        """The counter of the part that begins at an entry."""
        return replace(self, start=self.start + start) if start else self

    def places(self, count: int) -> Tensor:
        """The indices of entries in the whole, int64."""
        index = torch.arange(self.start, self.start + count, device=self.seed.device)
        for rows in reversed(self.rows):
            index = index + index // max(rows.length, 1) * (rows.whole - rows.length) + rows.first
        return index


def normal(likes: Sequence[Tensor], counters: Sequence[Counter], *, compiled: bool = False) -> list[Tensor]:
    """Standard normal numbers of the shape, dtype and device of each tensor, contiguous.

    Args:
        likes: the tensors, at least one, on one device.
        counters: the counter of each.
        compiled: whether to compile what is computed; on a CPU, numbers are read from tables.
    """
    if likes[0].device.type == "cpu":
        return _of_dtype(_sums(likes, counters, _normal_tables), likes)
    return _split(normal_from_words(likes, counters, compiled=compiled), likes)


def uniform(likes: Sequence[Tensor], counters: Sequence[Counter]) -> list[Tensor]:
    """Numbers in [0, 1), of the shape, dtype and device of each tensor, contiguous; arguments as of `normal`."""
    if likes[0].device.type == "cpu":
        sums = _sums(likes, counters, _uniform_tables)
        torch._foreach_sub_(sums, torch._foreach_floor(sums))
        return _of_dtype(sums, likes)
    return _split(uniform_from_words(likes, counters), likes)


def pairs(likes: Sequence[Tensor], counters: Sequence[Counter]) -> tuple[list[Tensor], list[Tensor]]:
    """Two independent normal numbers of variance ½ for each entry, not to be changed; arguments as of `normal`.

    The sum of their squares is exponential, with mean 1, and independent of the ratio between them.
    """
    if likes[0].device.type == "cpu":
        first, second = _read(likes, counters, _normal_tables())
        return _of_dtype(first, likes), _of_dtype(second, likes)
    one, two = pairs_from_words(likes, counters)
    return _split(one, likes), _split(two, likes)


def _of_dtype(drawn: list[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    return [x if x.dtype is like.dtype else x.to(like.dtype) for x, like in zip(drawn, likes, strict=True)]


# --- On a CPU: tables


def _sums(likes: Sequence[Tensor], counters: Sequence[Counter], tables: Callable[[], list[Tensor]]) -> list[Tensor]:
    return list(torch._foreach_add(*_read(likes, counters, tables())))


def _read(
    likes: Sequence[Tensor], counters: Sequence[Counter], tables: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The entries of both tables for each tensor: views of the tables where possible, else copies."""
    # All counters are read at once: reading a single number costs as much as thousands of entries.
    seeds, steps = (torch.stack(x).tolist() for x in zip(*((c.seed, c.steps) for c in counters), strict=True))
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for like, counter, seed, step in zip(likes, counters, seeds, steps, strict=True):
        if counter.rows:
            for index, table, terms in zip(_scattered(counter, like.numel(), seed, step), tables, found, strict=True):
                terms.append(table[index].view(like.shape))
            continue
        places = [*_places(counter, like.numel(), seed, step)]
        for which, (table, terms) in enumerate(zip(tables, found, strict=True)):
            if len(places) == 1:  # one operator for each of many weights
                terms.append(table.as_strided(like.shape, _strides(like.shape), places[0][0][which]))
            else:
                parts = [table[offsets[which] : offsets[which] + length] for offsets, length in places]
                terms.append(torch.cat(parts).view(like.shape))
    return found


def _places(counter: Counter, count: int, seed: int, step: int) -> Iterator[tuple[tuple[int, int], int]]:
    """The places in both tables from which a tensor is read, and the number of entries from each."""
    place, left = counter.start, count
    while True:
        block, inside = divmod(place, BLOCK)
        length = min(BLOCK - inside, left)
        # A block that begins below `TABLE - BLOCK` ends within the table.
        first, second = words_of(seed, step, *counter.purpose, block)
        yield (first % (TABLE - BLOCK) + inside, second % (TABLE - BLOCK) + inside), length
        place, left = place + length, left - length
        if not left:
            return


def _scattered(counter: Counter, count: int, seed: int, step: int) -> Tensor:
    """The places in both tables from which each entry is read."""
    places = counter.places(count)
    block, inside = places // BLOCK, places % BLOCK
    first, last = (int(block[0]), int(block[-1])) if count else (0, 0)
    words = [words_of(seed, step, *counter.purpose, each) for each in range(first, last + 1)]
    return (torch.tensor(words) % (TABLE - BLOCK))[block - first].T + inside


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@functools.cache
def _normal_tables() -> list[Tensor]:
    return [torch.randn(TABLE, generator=generator(0, "table", i), device="cpu").mul_(0.5**0.5) for i in (1, 2)]


@functools.cache
def _uniform_tables() -> list[Tensor]:
    return [torch.rand(TABLE, generator=generator(0, "table", i), device="cpu") for i in (3, 4)]


def words_of(*purpose: str | int) -> tuple[int, int]:
    """Two words of 32 bits that are a hash of a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


# --- Elsewhere: words


def normal_from_words(likes: Sequence[Tensor], counters: Sequence[Counter], *, compiled: bool = False) -> Tensor:
    """Standard normal numbers as hashes of the counters, by Box and Muller, for all tensors side by side.

    Args:
        likes: the tensors.
        counters: the counter of each.
        compiled: whether to compute them in one compiled kernel instead of about 50.
    """
    return (_compiled(_normal) if compiled else _normal)(*_keys(_sizes(likes), counters))


def pairs_from_words(likes: Sequence[Tensor], counters: Sequence[Counter]) -> tuple[Tensor, Tensor]:
    """Pairs of normal numbers of variance ½ as hashes of the counters, for all tensors side by side."""
    radius, angle = (_fraction(words) for words in _words(*_keys(_sizes(likes), counters)))
    radius, angle = torch.sqrt(-torch.log(radius)), angle * (2 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def uniform_from_words(likes: Sequence[Tensor], counters: Sequence[Counter]) -> Tensor:
    """Numbers between 0 and 1 as hashes of the counters, for all tensors side by side."""
    return _fraction(_first_words(*_keys(_sizes(likes), counters)))


def levels(likes: Sequence[Tensor], counters: Sequence[Counter], *, compiled: bool = False) -> Iterator[Tensor]:
    """Whole numbers from 0 to `LEVELS` − 1, all equally probable, one for each entry of every tensor.

    Each tensor gets a vector of int32, which is equal bit for bit on every device. A word holds two of them, so an
    entry costs half a hash.

    Args:
        likes: the tensors, at least one, on one device.
        counters: the counter of each.
        compiled: whether to compile what is computed; on a CPU, that would not be faster.
    """
    if any(counter.rows for counter in counters):
        for counter, like in zip(counters, likes, strict=True):
            places = counter.places(like.numel())
            key, other, *_ = _keys([1], [replace(counter, rows=())])
            pairs_of_levels = _word((places >> 1).to(torch.int32), key, other)
            yield (pairs_of_levels >> (places % 2 * 16).to(torch.int32)).bitwise_and_(LEVELS - 1)
        return
    halves = [replace(counter, start=counter.start // 2) for counter in counters]
    sizes = [(c.start % 2 + like.numel() + 1) // 2 for c, like in zip(counters, likes, strict=True)]
    if likes[0].device.type == "cpu":
        words = _words_one_by_one(sizes, halves)
    else:
        words = iter((_compiled(_first_words) if compiled else _first_words)(*_keys(sizes, halves)).split(sizes))
    for own, counter, like in zip(words, counters, likes, strict=True):
        # A word holds two levels; a part that begins at an odd place begins with the second.
        own_levels = own.view(torch.int16)[counter.start % 2 :][: like.numel()]
        yield own_levels.to(torch.int32).bitwise_and_(LEVELS - 1)


def _sizes(likes: Sequence[Tensor]) -> list[int]:
    return [like.numel() for like in likes]


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def _normal(*keys: Any) -> Tensor:
    radius, angle = _words(*keys)
    return torch.sqrt(-2 * torch.log(_fraction(radius))) * torch.cos(_fraction(angle) * (2 * math.pi))


def _first_words(*keys: Any) -> Tensor:
    return _words(*keys)[0]


def _keys(
    sizes: Sequence[int], counters: Sequence[Counter]
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None]:
    """The numbers from which words are computed, for tensors laid end to end.

    They are two keys of each tensor, its end, the shift from an index to its place, the number of all entries, and the
    places if they are scattered.
    """
    device = counters[0].seed.device
    seeds = torch.stack([c.seed for c in counters]).to(torch.int32)
    steps = torch.stack([c.steps for c in counters]).to(torch.int32)
    hashes = [tuple(map(_signed, words_of(*c.purpose))) for c in counters]
    key, other = _pair(seeds, steps, *(_on_device(device, torch.int32, each) for each in zip(*hashes, strict=True)))
    ends = tuple(itertools.accumulate(sizes))
    lacks = (c.start - end + size for c, end, size in zip(counters, ends, sizes, strict=True))
    shifts = tuple(_signed(lack % (1 << 32)) for lack in lacks)
    is_scattered = any(counter.rows for counter in counters)
    places = torch.cat([c.places(size) for c, size in zip(counters, sizes, strict=True)]) if is_scattered else None
    return key, other, _on_device(device, torch.int32, ends), _on_device(device, torch.int32, shifts), ends[-1], places


def _pair(seeds: Tensor, steps: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The two keys of each tensor, of its seed, its step and both words of its purpose."""
    # Two keys of 32 bits: one alone would collide among some 65,000 tensors and steps.
    key = _mixed(_mixed(steps + first) ^ seeds)
    return key, _mixed(_mixed(steps ^ second) + key)


def _words(
    key: Tensor, other: Tensor, ends: Tensor, shifts: Tensor, count: int, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Two words for every entry of all tensors, side by side."""
    index = torch.arange(count, dtype=torch.int32, device=key.device)
    tensor = torch.bucketize(index, ends, right=True, out_int32=True)
    place = index + shifts[tensor] if places is None else places.to(torch.int32)
    word = _word(place, key[tensor], other[tensor])
    return word, _mixed(word + other[tensor])


def _words_one_by_one(sizes: Sequence[int], counters: Sequence[Counter]) -> Iterator[Tensor]:
    """The first words of each tensor, on a CPU: less memory than side by side, and nothing to look up for an entry."""
    seeds, steps = (torch.stack(x).tolist() for x in zip(*((c.seed, c.steps) for c in counters), strict=True))
    for size, counter, seed, step in zip(sizes, counters, seeds, steps, strict=True):
        index = torch.arange(size, dtype=torch.int32, device="cpu").add_(_signed(counter.start % (1 << 32)))
        yield _word(index, *_known_pair(seed, step, counter.purpose))


@functools.lru_cache(maxsize=4096)  # it takes 60 operators, and is the same for all parts of a tensor
def _known_pair(seed: int, step: int, purpose: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    numbers = (seed, step, *words_of(*purpose))
    first, second = _pair(*(torch.tensor(_signed(n % (1 << 32)), dtype=torch.int32, device="cpu") for n in numbers))
    return first, second


def _word(index: Tensor, key: Tensor, other: Tensor) -> Tensor:
    """Replace the index of every entry by its word."""
    return _mixed(_mixed(index.add_(key)).bitwise_xor_(other))


@functools.lru_cache(maxsize=4096)  # so that no step has to copy numbers to the device
def _on_device(device: torch.device, dtype: torch.dtype, numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _split(flat: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([like.numel() for like in likes])
    return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, likes, strict=True)]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right, filled up with zeros."""
    return (words >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mixed(words: Tensor) -> Tensor:
    """One round of a hash of 32 bits, each bit of which depends on all bits of the word; in place."""
    # Multipliers and shifts found with hash-prospector (github.com/skeeto/hash-prospector).
    words.bitwise_xor_(_shifted(words, 16)).mul_(_signed(0x21F0AAAD))
    words.bitwise_xor_(_shifted(words, 15)).mul_(_signed(0x735A2D97))
    return words.bitwise_xor_(_shifted(words, 15))


def _fraction(words: Tensor) -> Tensor:
    """Numbers between 0 and 1, neither of them included: 23 bits of words."""
    # Midpoints of 2²³ intervals: never 0, whose logarithm is infinite; of 2²⁴, the last would be 1 in float32.
    return _shifted(words, 9).float() * 2**-23 + 2**-24
