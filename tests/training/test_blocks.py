"""Blocks: tensors of all weights, in parts that belong together."""

import torch

from biofx.training.blocks import CPU, blocks


def test_every_entry_is_in_one_part():
    shapes = [(3,), (CPU + 5,), (2, CPU), (4, 4), (1,)]
    first = [torch.zeros(shape) for shape in shapes]
    second = [torch.arange(tensor.numel()).float().view(tensor.shape) for tensor in first]
    for block in blocks(first, second):
        a, b = block.parts
        assert sum(part.numel() for part in a) < 2 * CPU
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


def test_layouts_that_differ_are_not_cut():
    a, b = torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 5).to(memory_format=torch.channels_last)
    (block,) = blocks([a], [b])
    first, second = block.parts
    assert first[0] is a
    assert second[0] is b


def test_a_part_says_where_it_comes_from():
    tensors = [torch.zeros(8), torch.arange(float(2 * CPU + 3))]
    for block in blocks(tensors):
        for part, place in zip(block.parts[0], block.places, strict=True):
            assert torch.equal(part, tensors[place.index].flatten()[place.start :][: part.numel()])


def test_layouts_whose_memory_has_another_order_may_stay_whole():
    tensor = torch.zeros(64, 64, 16, 16).to(memory_format=torch.channels_last)
    assert len(list(blocks([tensor]))) > 1
    assert len(list(blocks([tensor], in_order=True))) == 1


def test_nothing():
    assert list(blocks([], [])) == []
