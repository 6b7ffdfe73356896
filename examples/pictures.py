"""The pictures of the README: a network for digits, transformed, trained and looked at.

Run it with `python examples/pictures.py` (about a minute on one CPU core). It writes `overview.png` to the folder that
`--output` names:

1. what `biofx.transform` inserted for one weight, by `biofx.draw`,
2. the weights of a trained layer under Dale's principle, sorted by the signs of their units, by `biofx.plot.weights`,
3. how gains fell while synapses crystallized, by `biofx.record` and `biofx.plot.history`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx
from biofx import passes
from command_line import folder
from handwritten_digits import Digits, load

EPOCHS = 15


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))


def train(bio: torch.fx.GraphModule, digits: Digits) -> biofx.History:
    """Train a network, and record what becomes of its synapses."""
    optimizer = torch.optim.AdamW(bio.parameters(), lr=3e-3)
    biofx.attach(bio, optimizer)
    history = biofx.record(bio, optimizer, every=5)
    for _ in tqdm(range(EPOCHS), unit="epoch"):
        for batch in torch.randperm(len(digits.train_labels)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(bio(digits.train_images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
    biofx.verify(bio)
    return history


def draw_graph(ax: Axes) -> None:
    """One weight with its synapses, their gains and signs, as `biofx.draw` shows it."""
    pipeline = "split-synapses{synapses=4},fuzzy-learning-rates,dales-principle{balance=False,inputs=mixed}"
    bio = biofx.transform(nn.Linear(96, 48), pipeline)
    with TemporaryDirectory() as place:
        path = Path(place) / "graph.png"
        biofx.draw(bio, path)
        ax.imshow(imread(path))
    ax.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of the README.")
    parser.add_argument("--output", type=folder, default=Path(), help="the folder to write to (default: .)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = load()

    dale = biofx.transform(network(), [passes.DalesPrinciple()], example_inputs=digits.train_images[:2])
    train(dale, digits)
    pipeline = "fuzzy-learning-rates{distribution=lognormal},crystallize{threshold=1e-3,dampening=0.99,floor=0.1}"
    history = train(biofx.transform(network(), pipeline), digits)

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    graph, weights, gains = figure.subplots(1, 3, width_ratios=[0.75, 1.3, 1])
    draw_graph(graph)
    biofx.plot.weights(dale, "3.weight", ax=weights)
    biofx.plot.history(history, "gain", ax=gains)
    graph.set_title("A weight is synapses", loc="left", fontweight="bold")
    weights.set_title("Units excite or inhibit", loc="left", fontweight="bold", pad=16)
    gains.set_title("Synapses harden as they learn", loc="left", fontweight="bold")
    path = arguments.output / "overview.png"
    figure.savefig(path, dpi=120)
    print(f"The picture is in {path}")


if __name__ == "__main__":
    main()
