"""Compiled arithmetic: one kernel for everything that a rule does to the entries of weights, whatever their number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from biofx.base.errors import LifecycleError
from biofx.base.torch_internals import recompile_limit
from biofx.training import blocks

CPU = 1 << 20  # entries in a block: what is compiled goes over memory once
VARIANTS = 256  # of a kernel: by hooks, options, dtypes and ranks
ALONE = 1 << 16  # entries of a weight that is worth a call of its own; smaller ones are put side by side


def over_blocks(
    each: Callable[..., Tensor],
    many_: Callable[..., None],
    *lists: Sequence[Tensor],
    compiled: bool,
    **options: Any,
) -> None:
    """Change the entries of weights, block by block; arguments as of `run_kernel`."""
    for block in blocks.blocks(*lists, cpu=CPU if compiled else blocks.CPU):
        run_kernel(each, many_, *block.parts, compiled=compiled, **options)


def run_kernel(
    each: Callable[..., Tensor],
    many_: Callable[..., None],
    *lists: list[Tensor],
    compiled: bool,
    **options: Any,
) -> None:
    """Replace the tensors of the first of some lists by new ones.

    The tensors of one weight have one shape, or broadcast to that of the first.

    Args:
        each: computes the new tensor of one weight, entry by entry: `each(*tensors, **options)`. This is compiled.
        many_: does the same for many weights, in place and in multi-tensor operations: `many_(*lists, **options)`.
        lists: the lists, all of one length.
        compiled: whether to run `each` as one compiled kernel on vectors of any length, or on tensors that broadcast.
            Small tensors are put side by side then: the time to compile does not grow with their number.
        options: their other arguments.
    """
    if not compiled:
        many_(*lists, **options)
        return
    groups = [list(tensors) for tensors in zip(*lists, strict=True)]
    small = []
    for group in groups:
        if group[0].numel() < ALONE:
            small.append(group)
        else:
            _kernel(each)(*(blocks.lines(group) or group), **options)
    if small:
        firsts = [group[0] for group in small]
        columns = zip(*small, strict=True)
        joined = [torch.cat([x.expand_as(y).reshape(-1) for x, y in zip(xs, firsts, strict=True)]) for xs in columns]
        _kernel(each)(*joined, **options)
        parts = joined[0].split([first.numel() for first in firsts])
        torch._foreach_copy_(firsts, [part.view(first.shape) for part, first in zip(parts, firsts, strict=True)])


@functools.cache
def _kernel(each: Callable[..., Tensor]) -> Callable[..., None]:
    def in_place(first: Tensor, *others: Tensor, **options: Any) -> None:
        first.copy_(each(first, *others, **options))

    compiled = torch.compile(in_place, dynamic=True)

    def run(*tensors: Tensor, **options: Any) -> None:
        with recompile_limit(VARIANTS):  # one for each pipeline of a process
            compiled(*tensors, **options)

    return run


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        LifecycleError: that is not possible.
    """
    try:
        torch.compile(torch.neg, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LifecycleError(
            f"attach: compile=True needs a compiler that torch.compile can use on {device.type}, and compiling failed: "
            f"{reason}; install one, or leave compile out"
        ) from error
