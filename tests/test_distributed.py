"""Two processes over gloo: rules do the same on every rank, and the same as one process with the whole batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import biofx
from biofx import passes
from models.small import mlp

PIPELINE = [
    passes.SplitSynapses(2),
    passes.FuzzyLearningRates(distribution="temporal", every=2),
    passes.VolumeDependentLearningRates(base_lr=0.9),
    passes.Crystallize(),
    passes.Rejuvenate(dre=6.0),
    passes.L1Regularization(1e-4),
]


def train(rank: int, ranks: int, optimizer_name: str) -> dict[str, torch.Tensor]:
    """Four steps, each rank on its share of the batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bio = biofx.transform(mlp(6, 8, 4).double(), PIPELINE)
    model = DistributedDataParallel(bio) if ranks > 1 else bio
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=0.01)
    biofx.attach(model, optimizer)
    images, labels = torch.randn(4, 16, 6, dtype=torch.float64), torch.arange(16) % 4
    for batch in images:
        optimizer.zero_grad()
        F.cross_entropy(model(batch.chunk(ranks)[rank]), labels.chunk(ranks)[rank]).backward()
        optimizer.step()
    return bio.state_dict()


def work(rank: int, ranks: int, port: int, optimizer_name: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(train(rank, ranks, optimizer_name), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_sharded(rank: int, ranks: int, dtype: str | None) -> tuple[list[tuple[int, ...]], dict[str, torch.Tensor]]:
    """Four steps on the whole batch, each block a shard of its own; local shapes of split weights, and all values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.manual_seed(0)
    bio = biofx.transform(mlp(6, 9, 3).double(), [passes.SplitSynapses(2), passes.FuzzyLearningRates(dtype=dtype)])
    placement = biofx.shard_placement(bio)
    mesh = init_device_mesh("cpu", (ranks,))
    for block in (bio[0], bio[2]):
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    fully_shard(bio, mesh=mesh, shard_placement_fn=placement)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    for images in torch.randn(4, 16, 6, dtype=torch.float64):
        optimizer.zero_grad()
        bio(images).square().sum().backward()
        optimizer.step()
    local = [tuple(p.to_local().shape) for p in bio.parameters() if p.dim() == 3]
    return local, {name: p.full_tensor().detach() for name, p in bio.named_parameters()}


def work_sharded(rank: int, ranks: int, port: int, dtype: str | None, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(train_sharded(rank, ranks, dtype), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, "unstored"])
def test_shards_learn_as_one_process_does_and_none_is_empty(tmp_path, dtype):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work_sharded, args=(3, port, dtype, str(tmp_path)), nprocs=3)  # more than there are synapses
    torch.manual_seed(0)
    bio = biofx.transform(mlp(6, 9, 3).double(), [passes.SplitSynapses(2), passes.FuzzyLearningRates()])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    for images in torch.randn(4, 16, 6, dtype=torch.float64):
        optimizer.zero_grad()
        bio(images).square().sum().backward()
        optimizer.step()
    for rank in range(3):
        local, values = torch.load(tmp_path / f"{rank}.pt")
        assert all(0 not in shape and shape[0] == 2 for shape in local)
        for name, parameter in bio.named_parameters():
            torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
def test_data_parallel_ranks_agree_with_one_process(tmp_path, optimizer_name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(2, port, optimizer_name, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = train(0, 1, optimizer_name)
    assert first.keys() == second.keys() == alone.keys()
    for name in alone:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(int(v) for n, v in alone.items() if n.endswith(".replaced")) > 0
