"""Handwritten digits: a convolutional network learns them twice, plain and with biological synapses.

Run it with `python examples/digits.py` (about half a minute on one CPU core; `--help` lists the options). You see

1. what `biofx.transform` made of every weight, and the graph nodes that it inserted,
2. the test accuracy of both networks, trained from the same weights on the same minibatches, over several seeds,
3. that `biofx.fold` makes the trained network a plain one again, which computes the same and loads into `DigitsNet`,
4. a plot, `digits.png`: the accuracy while training, and how the synapses of one connection learn at different speeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx
from biofx import passes
from command_line import headline, plot_path, positive
from handwritten_digits import Digits, load

SYNAPSES = 4
PASSES = [passes.SplitSynapses(synapses=SYNAPSES), passes.FuzzyLearningRates(nu=0.16, distribution="lognormal")]

BATCH_SIZE = 32
LEARNING_RATE = 0.01
MOMENTUM = 0.9
TOLERANCE = 1e-4  # on the folded model's outputs, which are of the order of 10

SHOWN = "readout.weight"  # the weight whose synapses the plot follows
# Colours that colour-blind readers tell apart, and shapes that stay visible where the curves lie on each other.
LINES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#56B4E9", "linewidth": 3.5, "marker": "o", "markersize": 6.5},
    "transformed": {"color": "#D55E00", "linewidth": 1.5, "marker": "o", "markersize": 3.5},
}
BANDS: dict[str, dict[str, Any]] = {
    "plain": {"color": "#56B4E9", "alpha": 0.2, "linewidth": 0},
    "transformed": {"facecolor": "none", "edgecolor": "#D55E00", "linestyle": ":"},
}


class DigitsNet(nn.Module):
    """A small convolutional network for images of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.readout = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.max_pool2d(x, 2).flatten(1)
        return self.readout(F.relu(self.hidden(x)))


@dataclass(frozen=True)
class Run:
    """What is kept of one training.

    Attributes:
        accuracy: test accuracy after each epoch.
        shown: the stored weight `SHOWN` at the start and after each epoch.
    """

    accuracy: Tensor
    shown: Tensor


def build_pair(seed: int) -> dict[str, nn.Module]:
    """A plain network, and its transformed copy that computes the same before training."""
    torch.manual_seed(seed)
    plain = DigitsNet()
    return {"plain": plain, "transformed": biofx.transform(plain, passes=PASSES, seed=seed)}


def train(model: nn.Module, digits: Digits, epochs: int, seed: int, bar: tqdm) -> Run:
    # Plain gradient descent, with or without momentum, turns a gain on the gradient into the same gain on the learning
    # rate. Adam would divide it out again.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    shuffling = torch.Generator().manual_seed(seed)
    shown = model.get_parameter(SHOWN)
    accuracies, snapshots = [], [shown.detach().clone()]
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(digits.train_labels), generator=shuffling).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
        schedule.step()
        accuracies.append(accuracy(predict(model, digits), digits))
        snapshots.append(shown.detach().clone())
        bar.update()
    return Run(torch.tensor(accuracies), torch.stack(snapshots))


@torch.no_grad()
def predict(model: nn.Module, digits: Digits) -> Tensor:
    """The model's logits for the test images."""
    return model.eval()(digits.test_images)


def accuracy(logits: Tensor, digits: Digits) -> float:
    return (logits.argmax(1) == digits.test_labels).float().mean().item()


def train_all(pairs: Sequence[dict[str, nn.Module]], digits: Digits, epochs: int) -> dict[str, list[Run]]:
    """Train both networks of every pair: the same minibatches in the same order, with the same options."""
    runs: dict[str, list[Run]] = {name: [] for name in pairs[0]}
    with tqdm(total=sum(map(len, pairs)) * epochs, unit="epoch") as bar:
        for seed, pair in enumerate(pairs):
            for name, model in pair.items():
                bar.set_description(f"seed {seed}, {name}")
                runs[name].append(train(model, digits, epochs, seed, bar))
    return runs


def final_accuracy(runs: list[Run]) -> str:
    """Mean ± standard deviation over seeds, after the last epoch."""
    final = torch.stack([run.accuracy[-1] for run in runs])
    return f"{final.mean():.2%} ± {final.std(correction=min(1, len(runs) - 1)):.2%}"


def fold_and_check(bio: nn.Module, digits: Digits) -> None:
    """Fold the trained network, load the result into a `DigitsNet`, and compare what the three compute."""
    folded = biofx.fold(bio)
    loaded = DigitsNet()
    try:
        matched = loaded.load_state_dict(folded.state_dict(), strict=True)
    except RuntimeError as error:
        raise SystemExit(f"error: the folded state does not fit DigitsNet: {error}") from error
    expected, rows, same = predict(bio, digits), [], True
    for name, model in {"transformed": bio, "folded": folded, "DigitsNet, loaded": loaded}.items():
        logits = predict(model, digits)
        score, difference = accuracy(logits, digits), (logits - expected).abs().max().item()
        rows.append((name, sum(p.numel() for p in model.parameters()), f"{score:.2%}", f"{difference:.2g}"))
        same = same and score == accuracy(expected, digits) and difference <= TOLERANCE
    print(
        tabulate(
            rows, headers=["network", "parameters", "test accuracy", "max |output difference|"], disable_numparse=[3]
        )
    )
    print(f"\nDigitsNet().load_state_dict(folded.state_dict(), strict=True): {matched}")
    if not same:
        raise SystemExit("error: the folded network does not compute what the transformed one computes")


def plot_accuracy(axes: Axes, runs: dict[str, list[Run]]) -> None:
    for name, style in LINES.items():
        curves = torch.stack([run.accuracy for run in runs[name]])
        epochs = range(1, curves.shape[1] + 1)
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), **BANDS[name])
        axes.plot(epochs, curves.mean(0), **style, label=f"{name}: {final_accuracy(runs[name])}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="epoch", ylabel="test accuracy")
    axes.set_title("Does synaptic diversity cost accuracy?", loc="left", fontweight="bold")
    axes.legend(loc="lower right", title=f"mean and range over seeds (n = {len(runs['plain'])})", alignment="left")


def plot_synapses(axes: Axes, plain: Run, transformed: Run, gain: Tensor) -> None:
    """Follow the connection whose synapses end furthest from each other."""
    changes = transformed.shown - transformed.shown[0]
    gaps = changes[-1].sort(dim=0).values.diff(dim=0).amin(0)
    unit, source = divmod(int(gaps.argmax()), gaps.shape[1])
    epochs = range(len(changes))
    share = (plain.shown - plain.shown[0])[:, unit, source] / SYNAPSES
    axes.plot(epochs, share, **LINES["plain"], label=f"plain: the weight ÷ {SYNAPSES}")
    curves = changes[:, :, unit, source]
    first, *_ = axes.plot(epochs, curves, **LINES["transformed"])
    first.set_label(f"transformed: its {SYNAPSES} synapses")
    for change, c in zip(curves[-1].tolist(), gain[:, unit, source].tolist(), strict=True):
        axes.annotate(
            f"gain {c:.2f}",
            xy=(epochs[-1], change),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=LINES["transformed"]["color"],
        )
    axes.set(xlabel="epoch", ylabel="change of the weight since the start")
    axes.set_title("How fast does each synapse learn?", loc="left", fontweight="bold")
    axes.legend(title=f"{SHOWN}[{unit}, {source}], seed 0", alignment="left")


def plot(runs: dict[str, list[Run]], gain: Tensor, path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout=ConstrainedLayoutEngine(wspace=0.08))  # without pyplot: needs no display
    left, right = figure.subplots(1, 2)
    plot_accuracy(left, runs)
    plot_synapses(right, runs["plain"][0], runs["transformed"][0], gain)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits with a plain and with a transformed network, side by side.")
    parser.add_argument("--seeds", type=positive, default=5, help="number of trainings of each network (default: 5)")
    parser.add_argument("--epochs", type=positive, default=12, help="epochs of each training (default: 12)")
    parser.add_argument("--output", type=plot_path, default=Path("digits.png"), help="the plot (default: digits.png)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are too small to gain from more, and sums are then added in one order
    digits = load()
    pairs = [build_pair(seed) for seed in range(arguments.seeds)]
    bio = pairs[0]["transformed"]

    headline("What the passes made of every weight: biofx.summary(bio)")
    print(biofx.summary(bio))

    headline("The nodes that they inserted into the graph: biofx.table(bio)")
    print(biofx.table(bio))

    headline("Training both networks, from the same weights and on the same minibatches")
    runs = train_all(pairs, digits, arguments.epochs)
    rows = [(name, len(runs[name]), final_accuracy(runs[name])) for name in runs]
    print(tabulate(rows, headers=["network", "seeds", "test accuracy, mean ± standard deviation"]))

    headline("Back to a plain network, shown with the first seed: biofx.fold(bio)")
    fold_and_check(bio, digits)

    gain = biofx.weight_sites(bio)[SHOWN].gain
    assert gain is not None  # FuzzyLearningRates drew it
    plot(runs, gain, arguments.output)
    print(f"\nThe plot is in {arguments.output}")


if __name__ == "__main__":
    main()
