"""Blocks: tensors of all weights, in parts that belong together."""

import torch

from biofx.training.blocks import CPU, blocks


def test_every_entry_is_in_one_part():
    shapes = [(3,), (CPU + 5,), (2, CPU), (4, 4), (1,)]
    first = [torch.zeros(shape) for shape in shapes]
    second = [torch.arange(tensor.numel()).float().view(tensor.shape) for tensor in first]
    for a, b in blocks(first, second):
        assert sum(part.numel() for part in a) < 2 * CPU
        torch._foreach_add_(a, 1)
        torch._foreach_add_(a, b)
    assert all(torch.equal(a, b + 1) for a, b in zip(first, second, strict=True))


def test_small_tensors_are_put_together():
    assert len(list(blocks([torch.zeros(8, 8)] * 40))) == 1


def test_numbers_go_with_every_part():
    (parts, numbers), *rest = blocks([torch.zeros(2, CPU)], [torch.tensor(3.0)])
    assert (len(parts), len(numbers), len(rest)) == (1, 1, 1)
    assert numbers[0] == 3


def test_layouts_that_differ_are_not_cut():
    a, b = torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 5).to(memory_format=torch.channels_last)
    ((first, second),) = blocks([a], [b])
    assert first[0] is a
    assert second[0] is b


def test_nothing():
    assert list(blocks([], [])) == []
