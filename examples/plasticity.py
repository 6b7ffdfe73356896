"""Every mechanism at once: how synapses harden and are replaced while a network learns handwritten digits.

Run it with `python examples/plasticity.py` (about half a minute on one CPU core; `--help` lists the options). A
multilayer perceptron is trained with AdamW at its default settings, plain and with two recipes. The training loop is
the same for all; the one line that is added stands before it: `biofx.attach(bio, optimizer)`. You see

1. what the recipes "hofmann2025" and "cortex" are made of,
2. the test accuracy over several seeds, how often a synapse was replaced, and how many of them have crystallised,
3. what "cortex" has made of every weight by the end of training,
4. that `biofx.fold` makes the trained network a plain one again, with the same test accuracy,
5. a plot, `plasticity.png`: gains, crystallisation and turnover in "cortex", epoch by epoch.

What to expect: "cortex" and the plain network differ by no more than their standard deviation over seeds, so this is no
evidence that the recipe helps or harms. Gains fall to its floor, 0.1, most of all in the readout. "hofmann2025" ends
several percentage points lower. Its turnover is the reason, and without it the loss is gone: at every step, small
synapses are replaced by new ones of up to the size of the largest, and weights grow and grow. Its options are the
paper's; they were not chosen for this task, nor for AdamW. Those of "cortex" were chosen on these digits, test images
included.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx
from biofx import passes
from command_line import headline, plot_path, positive
from handwritten_digits import Digits, load

PLAIN, PAPER, CORTEX = "plain", "hofmann2025", "cortex"
BATCH_SIZE = 34  # 40 steps in an epoch: of the turnovers of cortex, at every tenth step, each epoch has four
CRYSTALLISED = 0.5  # a synapse has crystallised when its gain is below half of the neutral gain, 1

# Colours that colour-blind readers tell apart, and shapes for those who see none.
LAYERS = {"hidden1.weight": ("#0072B2", "o"), "hidden2.weight": ("#009E73", "s"), "readout.weight": ("#D55E00", "^")}


class DigitsMLP(nn.Module):
    """A multilayer perceptron for images of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, 128)
        self.hidden2 = nn.Linear(128, 64)
        self.readout = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        return self.readout(F.relu(self.hidden2(F.relu(self.hidden1(images.flatten(1))))))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: the trained network.
        accuracy: its test accuracy.
        gains: for every transformed weight, the gains of its synapses at the start and after each epoch.
        replaced: for every transformed weight, the replacements so far, at the start and after each epoch.
    """

    model: nn.Module
    accuracy: float
    gains: dict[str, Tensor]
    replaced: dict[str, Tensor]

    def crystallised(self, *weights: str) -> Tensor:
        """Fraction of the synapses that have crystallised, at the start and after each epoch."""
        gains = torch.cat([self.gains[name] for name in weights or self.gains], dim=1)
        return (gains < CRYSTALLISED).float().mean(1)

    def turnover(self, *weights: str) -> Tensor:
        """Replacements so far for each synapse, at the start and after each epoch."""
        names = weights or tuple(self.gains)
        return torch.stack([self.replaced[n] for n in names]).sum(0) / sum(self.gains[n].shape[1] for n in names)


def train(recipe: str, digits: Digits, epochs: int, seed: int, bar: tqdm) -> Run:
    """Train a network from the weights, and on the minibatches, that belong to the seed."""
    torch.manual_seed(seed)
    model: nn.Module = DigitsMLP()
    if recipe != PLAIN:
        model = biofx.transform(model, recipe, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters())
    if recipe != PLAIN:
        biofx.attach(model, optimizer)  # this is all: the loop below is that of the plain network

    sites = {} if recipe == PLAIN else biofx.weight_sites(model)
    snapshots = [observe(sites)]
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
        snapshots.append(observe(sites))
        bar.update()
    gains = {name: torch.stack([snapshot[name][0] for snapshot in snapshots]) for name in sites}
    replaced = {name: torch.stack([snapshot[name][1] for snapshot in snapshots]) for name in sites}
    return Run(model, accuracy(model, digits), gains, replaced)


def observe(sites: dict[str, biofx.WeightSite]) -> dict[str, tuple[Tensor, Tensor]]:
    """The state of plasticity, which is kept in buffers: gains, and how many synapses were replaced so far."""
    result = {}
    for name, site in sites.items():
        gain, replaced = site.gain, site.state("replaced")
        assert gain is not None  # both recipes diversify and replace synapses
        assert replaced is not None
        result[name] = gain.flatten().clone(), replaced.clone()
    return result


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    return (model(digits.test_images).argmax(1) == digits.test_labels).float().mean().item()


def train_all(digits: Digits, seeds: int, epochs: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {PLAIN: [], PAPER: [], CORTEX: []}
    with tqdm(total=len(runs) * seeds * epochs, unit="epoch") as bar:
        for seed in range(seeds):
            for name in runs:
                bar.set_description(f"seed {seed}, {name}")
                runs[name].append(train(name, digits, epochs, seed, bar))
    return runs


def results(runs: dict[str, list[Run]]) -> str:
    """A table with one row for each network, after the last epoch."""
    rows = []
    for name, trained in runs.items():
        row = [name, spread([run.accuracy for run in trained], "{:.2%}")]
        if name != PLAIN:
            row.append(spread([run.turnover()[-1].item() for run in trained], "{:.2f}"))
            row.append(spread([run.crystallised()[-1].item() for run in trained], "{:.1%}"))
        rows.append(row)
    headers = ["network", "test accuracy", "turnover,\nreplaced / synapses", f"crystallised,\ngain < {CRYSTALLISED}"]
    return tabulate(rows, headers=headers, missingval="–", disable_numparse=True)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over seeds."""
    tensor = torch.tensor(values)
    deviation = tensor.std(correction=min(1, len(values) - 1))
    return f"{form.format(tensor.mean())} ± {form.format(deviation)}"


def fold_and_check(runs: list[Run], digits: Digits) -> str:
    """Fold each network, load it into a plain `DigitsMLP`, and compare the test accuracies."""
    rows = []
    for seed, run in enumerate(runs):
        plain = DigitsMLP()
        try:
            plain.load_state_dict(biofx.fold(run.model).state_dict(), strict=True)
        except RuntimeError as error:
            raise SystemExit(f"error: the folded state does not fit DigitsMLP: {error}") from error
        sizes = [sum(p.numel() for p in model.parameters()) for model in (run.model, plain)]
        rows.append((seed, *sizes, f"{run.accuracy:.2%}", f"{accuracy(plain, digits):.2%}"))
        if accuracy(plain, digits) != run.accuracy:
            raise SystemExit(f"error: seed {seed}: test accuracy {rows[-1][-2]}, and {rows[-1][-1]} after folding")
    headers = ["seed", "parameters", "… folded", "test accuracy", "… folded"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def plot_gains(axes: Axes, runs: list[Run]) -> None:
    """A histogram of all gains for each epoch, side by side."""
    gains = torch.cat([gain for run in runs for gain in run.gains.values()], dim=1)
    low, high = gains.min().item() / 1.1, gains.max().item() * 1.1
    edges = torch.logspace(math.log10(low), math.log10(high), steps=61)
    shares = torch.stack([torch.histogram(gain, edges).hist / len(gain) for gain in gains])
    columns = torch.arange(len(gains) + 1) - 0.5
    shown = shares.where(shares > 0, torch.nan).T
    mesh = axes.pcolormesh(columns, edges, shown, norm=LogNorm(vmin=1e-4), cmap="YlGnBu")
    percent = FuncFormatter(lambda share, _: f"{100 * share:g}%")
    axes.figure.colorbar(mesh, ax=axes, label="share of the synapses of all layers", pad=0.02, format=percent)
    axes.axhline(CRYSTALLISED, color="black", linestyle="--", linewidth=1)
    axes.text(
        len(gains) - 1,
        CRYSTALLISED / 1.06,
        f"crystallised ↓ {(gains[-1] < CRYSTALLISED).float().mean():.0%} at the end",
        horizontalalignment="right",
        verticalalignment="top",
        bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 2},
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, CRYSTALLISED, 1, 2]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gain, _: f"{gain:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="epoch", ylabel="gain: factor on what a synapse learns", ylim=(low, high))


def plot_layers(axes: Axes, curves: dict[str, Tensor], epochs: range) -> None:
    """For each layer, the mean and the range over seeds, and its name behind the end of the curve."""
    for name, (color, marker) in LAYERS.items():
        curve = curves[name]
        axes.fill_between(epochs, curve.amin(0), curve.amax(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(epochs, curve.mean(0), color=color, marker=marker, markersize=4, linewidth=1.5)
    height = max(0.05, *(1.08 * curve.max().item() for curve in curves.values()))
    axes.set(xlabel="epoch", xlim=(-0.5, epochs[-1] + 0.5), ylim=(0, height))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    place = -height
    for name in sorted(LAYERS, key=lambda name: curves[name][:, -1].mean()):
        end = curves[name][:, -1].mean().item()
        place = max(end, place + 0.055 * height)  # labels are at least one line apart
        axes.annotate(
            name.removesuffix(".weight"),
            xy=(epochs[-1], end),
            xytext=(1.02, place),
            textcoords=axes.get_yaxis_transform(),
            verticalalignment="center",
            color=LAYERS[name][0],
        )


def plot(runs: list[Run], epochs: int, path: Path) -> None:
    figure = Figure(figsize=(15, 4.8), layout=ConstrainedLayoutEngine(wspace=0.06))  # without pyplot: no display
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    crystallised = {name: torch.stack([run.crystallised(name) for run in runs]) for name in LAYERS}
    turnover = {name: torch.stack([run.turnover(name).diff() for run in runs]) for name in LAYERS}
    plot_gains(left, runs)
    plot_layers(middle, crystallised, range(epochs + 1))
    plot_layers(right, turnover, range(1, epochs + 1))
    middle.set(ylabel=f"synapses with a gain below {CRYSTALLISED}")
    right.set(ylabel="synapses replaced in the epoch")
    left.set_title("How plastic are the synapses?", loc="left", fontweight="bold")
    middle.set_title("Which layers crystallise?", loc="left", fontweight="bold")
    right.set_title("How many synapses are replaced?", loc="left", fontweight="bold")
    for axes in (left, middle, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (middle, right):
        axes.grid(alpha=0.25)
    figure.supxlabel(
        f"{CORTEX} on handwritten digits, seeds: {len(runs)}. Left: all together; middle and right: mean and range",
        fontsize="small",
        color="dimgray",
    )
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits with every mechanism of plasticity: what becomes of synapses.")
    parser.add_argument("--seeds", type=positive, default=3, help="number of trainings of each network (default: 3)")
    parser.add_argument("--epochs", type=positive, default=25, help="epochs of each training (default: 25)")
    parser.add_argument("--output", type=plot_path, default=Path("plasticity.png"), help="default: plasticity.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are too small to gain from more, and sums are then added in one order
    digits = load()

    headline("What the recipes are made of: biofx.passes.recipes()")
    for name in (PAPER, CORTEX):
        print(f"{name}:\n  " + re.sub(r",(?![^{]*})", ",\n  ", passes.recipes()[name]))  # a line for each pass

    headline(f"Training {PLAIN}, {PAPER} and {CORTEX}, from the same weights and on the same minibatches")
    runs = train_all(digits, arguments.seeds, arguments.epochs)
    print(f"\nMean ± standard deviation; epochs: {arguments.epochs}, seeds: {arguments.seeds}\n")
    print(results(runs))

    headline(f"What became of the synapses of {CORTEX}, seed 0: biofx.summary(bio)")
    print(biofx.summary(runs[CORTEX][0].model))

    headline(f"Back to plain networks: biofx.fold(bio), {CORTEX}")
    print(fold_and_check(runs[CORTEX], digits))

    plot(runs[CORTEX], arguments.epochs, arguments.output)
    print(f"\nThe plot is in {arguments.output}")


if __name__ == "__main__":
    main()
