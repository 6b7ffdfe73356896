"""Blocks: tensors of all weights, in parts that belong together."""

import torch

from biofx.training.blocks import CPU, batches, blocks


def test_every_entry_is_in_one_part():
    shapes = [(3,), (CPU + 5,), (2, CPU), (4, 4), (1,)]
    first = [torch.zeros(shape) for shape in shapes]
    second = [torch.arange(tensor.numel()).float().view(tensor.shape) for tensor in first]
    for block in blocks(first, second):
        a, b = block.parts
        assert sum(part.numel() for part in a) <= CPU
        torch._foreach_add_(a, 1)
        torch._foreach_add_(a, b)
    assert all(torch.equal(a, b + 1) for a, b in zip(first, second, strict=True))


def test_small_tensors_are_put_together():
    assert len(list(blocks([torch.zeros(8, 8)] * 40))) == 1


def test_numbers_go_with_every_part():
    first, *rest = blocks([torch.zeros(2, CPU)], [torch.tensor(3.0)])
    parts, numbers = first.parts
    assert (len(parts), len(numbers), len(rest)) == (1, 1, 1)
    assert numbers[0] == 3


def test_numbers_of_units_are_cut_with_their_weight():
    weight, gain = torch.zeros(2, 3, CPU // 2), torch.arange(3.0).view(3, 1)
    for block in blocks([weight], [gain]):
        parts, gains = block.parts
        assert parts[0].numel() <= CPU
        torch._foreach_add_(parts, gains)
    assert torch.equal(weight, gain.expand_as(weight))


def test_layouts_that_differ_are_cut_alike():
    a, b = torch.zeros(2, CPU, 3, 1), torch.randn(2, CPU, 3, 1).to(memory_format=torch.channels_last)
    found = [*blocks([a], [b])]
    assert len(found) > 6
    for block in found:
        torch._foreach_add_(*block.parts)
    assert torch.equal(a, b)


def test_a_part_says_where_it_comes_from():
    last = torch.arange(4.0 * CPU).view(2, 2, CPU // 4, 4).to(memory_format=torch.channels_last)
    tensors = [torch.zeros(8), torch.arange(float(2 * CPU + 3)), last]
    for block in blocks(tensors):
        for part, place in zip(block.parts[0], block.places, strict=True):
            assert torch.equal(part.flatten(), tensors[place.index].flatten()[place.start :][: part.numel()])


def test_a_batch_has_one_dtype_and_no_more_than_a_block():
    double = torch.zeros(2, dtype=torch.float64)
    tensors = [torch.zeros(2), double, torch.zeros(CPU // 2), torch.zeros(CPU), torch.zeros(3), double]
    assert [*batches(tensors)] == [[0, 2], [3], [1, 5], [4]]


def test_nothing():
    assert list(blocks([], [])) == []
