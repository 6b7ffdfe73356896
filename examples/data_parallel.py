"""Handwritten digits on several processes: every rank learns from its share of each batch, and all agree with one.

Run it with `torchrun --nproc-per-node 2 examples/data_parallel.py` (some seconds; `--help` lists the options). You see
that rules of synapses change nothing about data parallelism: after training

1. all ranks hold the same parameters, gains and counters, to the last bit,
2. a process that learned alone from the whole batches holds the same parameters, to rounding.

The rules observe activity, replace synapses at random, and dampen gains, all of which could tell ranks apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import biofx
from biofx import passes
from handwritten_digits import Digits, load

PASSES = [
    passes.SplitSynapses(synapses=2),
    passes.FuzzyLearningRates(distribution="activity", every=10),
    passes.Crystallize(threshold=1e-3, dampening=0.995, floor=0.1),
    passes.Rejuvenate(dre=100.0, every=10),
    passes.SynapticScaling(),
    passes.L1Regularization(strength=1e-5),
]
BATCH_SIZE = 64
TOLERANCE = 1e-6  # on parameters in double precision: rounding grows while a network learns


def train(digits: Digits, steps: int, rank: int, ranks: int) -> nn.Module:
    """Train on the share of every batch that a rank has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    bio = biofx.transform(model.double(), PASSES)
    trained = bio if ranks == 1 else DistributedDataParallel(bio)
    optimizer = torch.optim.AdamW(bio.parameters(), lr=1e-3)
    biofx.attach(trained, optimizer)
    images, labels = digits.train_images.double(), digits.train_labels
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH_SIZE,))
        own = batch.chunk(ranks)[rank]
        optimizer.zero_grad()
        F.cross_entropy(trained(images[own]), labels[own]).backward()
        optimizer.step()
    return bio


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> str:
    logits = model.eval()(digits.test_images.double())
    return f"{(logits.argmax(1) == digits.test_labels).float().mean().item():.2%}"


def difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference between two models in any number."""
    return max(float((x.detach().double() - other[name].detach()).abs().max()) for name, x in state.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits on several processes, which agree with one.")
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default: 300)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    digits = load()
    alone = train(digits, arguments.steps, rank=0, ranks=1)  # before there is a group: it is a process on its own
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BATCH_SIZE % ranks:
        raise SystemExit(f"error: batches of {BATCH_SIZE} cannot be divided evenly among {ranks} processes")
    bio = train(digits, arguments.steps, rank, ranks)
    states: list[Mapping[str, Tensor]] = [{}] * ranks
    # What observers count is each rank's own until a rule reads it.
    state = {name: x for name, x in bio.state_dict().items() if not name.endswith((".seen", ".active"))}
    dist.all_gather_object(states, state)
    dist.destroy_process_group()
    if rank:
        return
    between = max(difference(states[0], other) for other in states)
    to_alone = difference(dict(bio.named_parameters()), dict(alone.named_parameters()))
    rows = [
        ("one process, whole batches", accuracy(alone, digits), ""),
        (f"{ranks} ranks, a share of each batch", accuracy(bio, digits), f"{to_alone:.1g} from one process"),
        ("one rank and another", "", f"{between:.1g}"),
    ]
    print(tabulate(rows, headers=["after training", "test accuracy", "largest difference"]))
    if between or to_alone > TOLERANCE:
        raise SystemExit("error: the ranks do not agree with each other and with one process")


if __name__ == "__main__":
    main()
