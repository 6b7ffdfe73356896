"""Several processes over gloo: rules do the same on every rank, and the same as one process with the whole batch."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import biofx
from biofx import passes
from models.small import mlp

OPTIONS = {
    "fuzzy-learning-rates": {"distribution": "activity", "every": 4},
    "volume-dependent-learning-rates": {"base_lr": 0.9},
    "rejuvenate": {"dre": 6.0},
    "synaptic-scaling": {"every": 2},
    "l1-regularization": {"strength": 1e-4},
}
STEPS = 20


def everything(*without: str) -> list[passes.Pass]:
    """All registered passes, but for those that the others exclude."""
    return [cls(**OPTIONS.get(name, {})) for name, cls in passes.registered_passes().items() if name not in without]


def spawn(function, ranks: int, folder) -> list:
    """What a function of rank, number of ranks and port returns on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked processes start in no time, but must not be used where threads for a GPU run.
    method = "spawn" if torch.accelerator.is_available() else "fork"
    mp.start_processes(_work, args=(function, ranks, port, str(folder)), nprocs=ranks, start_method=method)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]


def _work(rank: int, function, ranks: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# --- Data parallel


DATA_PARALLEL = {  # the optimizer, the passes that are left out, and what is attached
    "SGD": ("SGD", ("mirror-units",), "wrapper"),
    "attached before": ("AdamW", ("dales-principle", "group-units"), "before"),
    "attached after": ("AdamW", ("mirror-units", "split-synapses"), "after"),
}


def train_data_parallel(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Train on a share of every batch, in two micro-batches."""
    optimizer_name, without, attached = DATA_PARALLEL[name]
    seed = rank if attached == "wrapper" else 0  # wrapping makes ranks equal
    torch.manual_seed(seed)
    bio = biofx.transform(mlp(6, 8, 8, 4).double(), everything(*without), seed=seed, verify=False)
    optimizer = getattr(torch.optim, optimizer_name)(bio.parameters(), lr=0.01)
    if attached == "before":
        biofx.attach(bio, optimizer)
    model = DistributedDataParallel(bio) if ranks > 1 else bio
    if attached != "before":
        biofx.attach(model if attached == "wrapper" else bio, optimizer)
    torch.manual_seed(1)
    labels = torch.arange(32) % 4
    for batch in torch.randn(STEPS, 32, 6, dtype=torch.float64):
        optimizer.zero_grad()
        for images, own in zip(batch.chunk(2), labels.chunk(2), strict=True):
            F.cross_entropy(model(images.chunk(ranks)[rank]), own.chunk(ranks)[rank]).backward()
        optimizer.step()
    return bio.state_dict()


def train_all_data_parallel(rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train_data_parallel(name, rank, ranks) for name in DATA_PARALLEL}


def test_data_parallel_ranks_agree_with_one_process(tmp_path):
    trained = train_all_data_parallel(0, 1)  # before others start, which are forked and know its tables of noise
    first, second = spawn(train_all_data_parallel, 2, tmp_path)
    for name, alone in trained.items():
        for key, value in alone.items():
            assert torch.equal(first[name][key], second[name][key]), f"{name}: {key}"
            if not key.endswith((".seen", ".active")):  # sums of a whole batch, or its mean over ranks
                torch.testing.assert_close(
                    first[name][key], value, rtol=1e-7, atol=1e-10, msg=lambda m, k=key, n=name: f"{n}: {k}: {m}"
                )
        assert sum(int(value) for key, value in alone.items() if key.endswith(".replaced")) > 0


# --- Shards


def train_sharded(rank: int, ranks: int, dtype: str | None) -> tuple[list[tuple[int, ...]], dict[str, torch.Tensor]]:
    """Four steps on the whole batch, each block a shard of its own; local shapes of split weights, and all values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

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


def train_both_sharded(rank: int, ranks: int):
    return [train_sharded(rank, ranks, dtype) for dtype in (None, "unstored")]


def test_shards_learn_as_one_process_does_and_none_is_empty(tmp_path):
    torch.manual_seed(0)
    bio = biofx.transform(mlp(6, 9, 3).double(), [passes.SplitSynapses(2), passes.FuzzyLearningRates()])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    for images in torch.randn(4, 16, 6, dtype=torch.float64):
        optimizer.zero_grad()
        bio(images).square().sum().backward()
        optimizer.step()
    for results in spawn(train_both_sharded, 3, tmp_path):  # more than there are synapses
        for local, values in results:
            assert all(0 not in shape and shape[0] == 2 for shape in local)
            for name, parameter in bio.named_parameters():
                torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-10, atol=1e-10)
