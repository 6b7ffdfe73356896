"""Dale's principle: networks whose units are excitatory or inhibitory learn handwritten digits.

Run it with `python examples/dale.py` (about two minutes on one CPU core; `--help` lists the options). Three networks
are trained with AdamW, on the same minibatches: without signs, with signs and nothing else, with signs and balanced
weights, and with every unit doubled into an excitatory and an inhibitory one. You see

1. whose signs are meant: which units feed each weight, also behind a shortcut,
2. the test accuracy of all of them, over several seeds,
3. what becomes of a trained network that gets the signs closest to its weights, before and after fine-tuning,
4. that no unit of the trained networks has two signs, also after `biofx.fold`, with the same test accuracy,
5. a plot, `dale.png`: the weights of one layer without and with signs, and how far activity gets in 20 layers.

What to expect, measured with the default options: balanced networks end within about one percentage point of those
without signs, and mirrored ones within about two. Signs and nothing else do no harm with 3 layers, leave 8 layers near
chance (21%), and cost the residual network about 20 points, more or less with the seed. With the closest signs, the
network of 3 layers keeps about two thirds of the energy of its weights; and each of the three loses almost all that it
had learned (10% to 20% are correct). Fine-tuning for half as long as the training brings it back, to about one point,
with 3 layers and in the residual network; with 8 layers it depends on the seed. Mirrored instead, a trained network
computes what it did; the price is twice the units, so four times the weights between hidden layers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx
from biofx import passes
from command_line import headline, plot_path, positive
from handwritten_digits import Digits, load

NO_SIGNS, SIGNS_ONLY, BALANCED, MIRRORED = "no signs", "signs only", "balanced", "mirrored"
PASSES: dict[str, passes.Pass | None] = {
    NO_SIGNS: None,
    SIGNS_ONLY: passes.DalesPrinciple(balance=False),
    BALANCED: passes.DalesPrinciple(),
    MIRRORED: passes.MirrorUnits(),
}
CLOSEST = passes.DalesPrinciple(assign="closest")

WIDTH = 128
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
FINE_TUNING = 1 / 2  # of the epochs of the training

SHOWN = "8 layers", "9.weight"  # the weight in the plot: the fifth of eight
SIGNS = "RdBu_r"  # red excites, blue inhibits
DEPTH = 20
# Colours that colour-blind readers tell apart, and strokes for those who see none.
LINES: dict[str, dict[str, Any]] = {
    NO_SIGNS: {"color": "black", "linewidth": 4, "alpha": 0.3, "solid_capstyle": "round"},
    SIGNS_ONLY: {"color": "#D55E00", "linewidth": 1.5, "marker": "^", "markersize": 4.5},
    BALANCED: {"color": "#0072B2", "linewidth": 1.5, "marker": "o", "markersize": 4.5},
    MIRRORED: {"color": "black", "linewidth": 1.5, "linestyle": ":"},
}


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map to the next one."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A convolutional network with shortcuts, for images of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))


def perceptron(layers: int) -> nn.Sequential:
    """A multilayer perceptron for images of 8 × 8 pixels."""
    parts: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise([64, *[WIDTH] * (layers - 1), 10]):
        parts += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


@dataclass(frozen=True)
class Network:
    """A network, and the number of epochs that it is trained for."""

    build: Callable[[], nn.Module]
    epochs: int

    @property
    def fine_tuning(self) -> int:
        """Number of epochs that a trained one is fine-tuned for, once it has signs."""
        return round(FINE_TUNING * self.epochs)


NETWORKS = {
    "3 layers": Network(lambda: perceptron(3), 15),
    "8 layers": Network(lambda: perceptron(8), 30),
    "residual": Network(ResidualNet, 10),
}


@dataclass(frozen=True)
class Run:
    """A trained network, and its test accuracy."""

    model: nn.Module
    accuracy: float


@dataclass(frozen=True)
class Conversion:
    """What signs do to a trained network.

    Attributes:
        summary: what became of every weight with the signs closest to it.
        accuracy: test accuracy without signs, with the closest ones, after fine-tuning; and with mirrored units.
    """

    summary: str
    accuracy: tuple[float, float, float, float]


def train(network: Network, kind: str, digits: Digits, seed: int, bar: tqdm) -> Run:
    """Train a network from the weights, and on the minibatches, that belong to the seed."""
    torch.manual_seed(seed)
    model, pass_ = network.build(), PASSES[kind]
    if pass_ is not None:
        model = biofx.transform(model, [pass_], example_inputs=digits.train_images[:2], seed=seed)
    learn(model, digits, network.epochs, seed, bar)
    return Run(model, accuracy(model, digits))


def convert(network: Network, trained: Run, digits: Digits, seed: int, bar: tqdm) -> Conversion:
    """Give a trained network the closest signs, and fine-tune it with them; or mirror its units."""
    images = digits.train_images[:2]
    bio = biofx.transform(trained.model, [CLOSEST], example_inputs=images)
    summary, before = biofx.summary(bio), accuracy(bio, digits)
    learn(bio, digits, network.fine_tuning, seed, bar)
    biofx.verify(bio)
    mirrored = biofx.transform(trained.model, [passes.MirrorUnits()], example_inputs=images)
    biofx.verify(mirrored)
    return Conversion(summary, (trained.accuracy, before, accuracy(bio, digits), accuracy(mirrored, digits)))


def learn(model: nn.Module, digits: Digits, epochs: int, seed: int, bar: tqdm) -> None:
    """The training loop: the same for all networks, with one line for those that have signs to keep."""
    optimizer = torch.optim.AdamW(model.parameters())
    if isinstance(model, torch.fx.GraphModule):
        biofx.attach(model, optimizer)  # after every step, weights are projected on their signs
    steps = epochs * -(-len(digits.train_labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    shuffling = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_labels), generator=shuffling).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
        bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    return (model.eval()(digits.test_images).argmax(1) == digits.test_labels).float().mean().item()


def train_all(digits: Digits, seeds: int) -> tuple[dict[tuple[str, str], list[Run]], dict[str, list[Conversion]]]:
    """All trainings, by the network and the kind; and those that go on with the closest signs, by the network."""
    runs: dict[tuple[str, str], list[Run]] = {(name, kind): [] for name in NETWORKS for kind in PASSES}
    conversions: dict[str, list[Conversion]] = {name: [] for name in NETWORKS}
    epochs = sum(len(PASSES) * network.epochs + network.fine_tuning for network in NETWORKS.values())
    with tqdm(total=seeds * epochs, unit="epoch") as bar:
        for seed in range(seeds):
            for name, network in NETWORKS.items():
                for kind in PASSES:
                    bar.set_description(f"seed {seed}, {name}, {kind}")
                    runs[name, kind].append(train(network, kind, digits, seed, bar))
                bar.set_description(f"seed {seed}, {name}, closest signs")
                conversions[name].append(convert(network, runs[name, NO_SIGNS][-1], digits, seed, bar))
    return runs, conversions


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    tensor = torch.tensor(values)
    return f"{tensor.mean():.1%} ± {tensor.std(correction=min(1, len(values) - 1)):.1%}"


def results(runs: dict[tuple[str, str], list[Run]]) -> str:
    """A table of test accuracies: one row for each kind, one column for each network."""
    rows = []
    for kind, pass_ in PASSES.items():
        cells = [spread([run.accuracy for run in runs[name, kind]]) for name in NETWORKS]
        rows.append([kind, "–" if pass_ is None else str(pass_), *cells])
    headers = ["", "pass", *(f"{name},\n{network.epochs} epochs" for name, network in NETWORKS.items())]
    return tabulate(rows, headers=headers, disable_numparse=True)


def converted(conversions: dict[str, list[Conversion]]) -> str:
    """A table of the test accuracies of trained networks that got signs: one row for each network."""
    rows = []
    for name, network in NETWORKS.items():
        before, closest, tuned, mirrored = map(spread, zip(*(c.accuracy for c in conversions[name]), strict=True))
        rows.append([name, before, closest, tuned, network.fine_tuning, mirrored])
    headers = ["network", "no signs", "closest signs", "… fine-tuned", "for epochs", "or mirrored,\nnot fine-tuned"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def ambiguous(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """How many units excite some of their targets and inhibit others; and how many units have targets.

    This looks at the effective weights alone, and at nothing that a pass left behind.
    """
    units = biofx.units(model, images)
    kinds = torch.zeros(len(units.owner), 2, dtype=torch.bool)  # excitatory and inhibitory, for every unit
    for name, site in units.sites.items():
        weights = site.outgoing(site.effective().detach())
        for column, kind in enumerate((weights > 0, weights < 0)):
            kinds[units.readings[name].numbers[kind.any(1)], column] = True
    inputs = [index for index, population in enumerate(units.populations) if population.origin == "input"]
    kinds = kinds[~torch.isin(units.owner, torch.tensor(inputs))]
    return int(kinds.all(1).sum()), int(kinds.any(1).sum())


def fold_and_check(runs: dict[tuple[str, str], list[Run]], digits: Digits) -> str:
    """Verify and fold every network, count its units with two signs, and compare the test accuracies."""
    rows, images = [], digits.train_images[:2]
    for (name, kind), trained in runs.items():
        for seed, run in enumerate(trained):
            folded, fits = run.model, "–"
            if kind != NO_SIGNS:
                biofx.verify(run.model)
                folded, fits = biofx.fold(run.model), "no: wider"
            if kind in (SIGNS_ONLY, BALANCED):
                folded, fits = loaded(NETWORKS[name].build(), folded), "yes"
            found, total = ambiguous(folded, images)
            if kind != NO_SIGNS and (found or accuracy(folded, digits) != run.accuracy):
                raise SystemExit(f"error: {name}, {kind}, seed {seed}: folding changed the signs or the accuracy")
            if not seed:
                after = "–" if kind == NO_SIGNS else f"{accuracy(folded, digits):.2%}"
                rows.append((name, kind, f"{run.accuracy:.2%}", after, fits, f"{found} of {total}"))
    headers = ["network", "", "test accuracy", "… folded", "fits the\nplain network", "units with\ntwo signs"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def loaded(plain: nn.Module, folded: nn.Module) -> nn.Module:
    """A plain network with the state of a folded one."""
    try:
        plain.load_state_dict(folded.state_dict(), strict=True)
    except RuntimeError as error:
        raise SystemExit(f"error: the folded state does not fit the plain network: {error}") from error
    return plain


def sign_of_units(weight: Tensor) -> Tensor:
    """By energy, for each column: from −1, it inhibits all its targets, to +1, it excites all."""
    return (weight * weight.abs()).sum(0) / weight.square().sum(0).clamp(min=torch.finfo(weight.dtype).tiny)


def plot_weight(axes: Axes, strip: Axes, weight: Tensor, limit: float) -> None:
    """A weight, postsynaptic × presynaptic, its columns sorted by sign; and above it the sign of each column."""
    order = weight.sum(0).argsort(descending=True, stable=True)
    order = order[sign_of_units(weight)[order].argsort(descending=True, stable=True)]
    weight = weight[:, order]
    axes.imshow(weight, cmap=SIGNS, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    strip.imshow(sign_of_units(weight)[None], cmap=SIGNS, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    for each in (axes, strip):
        each.set(xticks=[], yticks=[])
        each.spines[:].set_color("gray")

    excites, inhibits = (weight > 0).any(0), (weight < 0).any(0)
    count = len(order)
    for members, what, place, alignment, color in (
        (excites & ~inhibits, "only excite", 0, "left", "#67001F"),
        (excites & inhibits, "presynaptic units excite some, inhibit others", count / 2, "center", "black"),
        (inhibits & ~excites, "only inhibit", count, "right", "#053061"),
    ):
        if members.any():
            axes.annotate(
                f"{int(members.sum())} {what}",
                xy=(place - 0.5, 0),
                xytext=(0, -6),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                horizontalalignment=alignment,
                verticalalignment="top",
                color=color,
            )


def spreads(seeds: int, digits: Digits) -> dict[str, Tensor]:
    """How much activity differs between images in networks that have not learned, shape (seeds, DEPTH)."""
    result: dict[str, list[Tensor]] = {kind: [] for kind in PASSES}
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain = perceptron(DEPTH + 1)
        for layer in plain:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for kind, pass_ in PASSES.items():
            model = copy.deepcopy(plain) if pass_ is None else biofx.transform(plain, [pass_], seed=seed)
            result[kind].append(spread_by_depth(model, digits.train_images))
    return {kind: torch.stack(each) for kind, each in result.items()}


@torch.no_grad()
def spread_by_depth(model: nn.Module, images: Tensor) -> Tensor:
    """Standard deviation of activity over images, the root mean square over units, behind each ReLU."""
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _module, _args, out: seen.append(out.var(0).mean().sqrt()))
    model(images)
    return torch.stack(seen)


def plot_spreads(axes: Axes, curves: dict[str, Tensor]) -> None:
    depths = range(1, DEPTH + 1)
    for kind, style in LINES.items():
        curve = curves[kind].log().mean(0).exp()
        axes.fill_between(
            depths, curves[kind].amin(0), curves[kind].amax(0), color=style["color"], alpha=0.15, linewidth=0
        )
        axes.plot(depths, curve, **style, label=kind)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator([1, 5, 10, 15, 20]))
    axes.set(xlabel="layer", ylabel="activity: standard deviation over images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")


def plot(runs: dict[tuple[str, str], list[Run]], curves: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(15, 5.4), layout=ConstrainedLayoutEngine(wspace=0.05))  # without pyplot: no display
    axes = figure.subplot_mosaic([["strip 0", "strip 1", "depth"], ["map 0", "map 1", "depth"]], height_ratios=[1, 20])
    name, weight = SHOWN
    shown = {kind: runs[name, kind][0] for kind in (NO_SIGNS, BALANCED)}
    weights = [run.model.get_parameter(weight).detach() for run in shown.values()]
    limit = max(each.abs().quantile(0.98).item() for each in weights)
    for index, each in enumerate(weights):
        plot_weight(axes[f"map {index}"], axes[f"strip {index}"], each, limit)
    axes["map 0"].set_ylabel(f"{len(weights[0])} postsynaptic units")
    axes["strip 0"].set_ylabel("sign", rotation=0, horizontalalignment="right", verticalalignment="center")
    scale = ScalarMappable(Normalize(-limit, limit), SIGNS)
    figure.colorbar(scale, ax=axes["map 1"], label="weight: inhibitory < 0 < excitatory", extend="both", pad=0.02)
    plot_spreads(axes["depth"], curves)
    axes["strip 0"].set_title("What do units do without signs?", loc="left", fontweight="bold")
    axes["strip 1"].set_title("… and under Dale's principle, balanced?", loc="left", fontweight="bold")
    axes["depth"].set_title("Does activity stay bounded with depth?", loc="left", fontweight="bold")
    accuracies = " and ".join(f"{run.accuracy:.1%}" for run in shown.values())
    figure.supxlabel(
        f"Left and middle: {weight} of {name}, trained with seed 0 (test accuracy {accuracies}); sign: the share of "
        "Σw² that excites, less that which inhibits. Right: before training, mean and range over "
        f"seeds: {len(curves[NO_SIGNS])}",
        fontsize="small",
        color="dimgray",
    )
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Digits with excitatory and inhibitory units: what signs do.")
    parser.add_argument("--seeds", type=positive, default=3, help="number of trainings of each network (default: 3)")
    parser.add_argument("--output", type=plot_path, default=Path("dale.png"), help="the plot (default: dale.png)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are too small to gain from more, and sums are then added in one order
    digits = load()

    headline("Whose signs: biofx.units(ResidualNet(), images)")
    print(biofx.units(ResidualNet(), digits.train_images[:2]))

    headline("Training all networks, on the same minibatches")
    runs, conversions = train_all(digits, arguments.seeds)
    print(f"\nTest accuracy, mean ± standard deviation over seeds: {arguments.seeds}\n")
    print(results(runs))

    headline(f"A trained network that gets the closest signs: {CLOSEST}")
    print(conversions["3 layers"][0].summary)
    print("\nTest accuracy\n")
    print(converted(conversions))

    headline("No unit has two signs, also after biofx.fold")
    print(fold_and_check(runs, digits))

    plot(runs, spreads(arguments.seeds, digits), arguments.output)
    print(f"\nThe plot is in {arguments.output}")


if __name__ == "__main__":
    main()
