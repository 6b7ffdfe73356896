"""Diverse learning rates under five optimizers: why gains act on updates, not on gradients.

Run it with `python examples/diversity.py` (about 20 seconds on two CPU cores; `--help` lists the options). A
multilayer perceptron learns handwritten digits. Each synapse has a gain of its own, lognormal with mean 1
(`FuzzyLearningRates`), and should learn that many times as fast as in the plain network, which starts from the same
weights and sees the same minibatches. It is trained twice:

- gains on the gradient: hooks multiply gradients in the backward pass, as the reference package does. This is what a
  transformed model does without `biofx.attach`;
- gains on the update: with `biofx.attach(bio, optimizer)`, they multiply what the optimizer changed.

You see, after 1 and after 50 steps, for all synapses how far they moved, divided by how far they moved in the plain
network, against their gain: a regression line's slope, and the correlation. Synapses count in proportion to the square
of their displacement in the plain network, as the ratio says little where that is close to 0. A slope of 1 means that
synapses learn as their gains say, a slope of 0 that gains have no effect.

What came out (10 seeds, mean and 95% interval; `examples/results/diversity.json`): under SGD, with or without momentum,
it makes no difference where gains act, as SGD is linear in gradients and gains are constant: the slope is 1 after one
step, and 0.998 ± 0.007 after 50. Under Adagrad, RMSprop and AdamW, gains on the gradient have no effect at all: the
slope is at most 0.001 after one step and after 50, as these optimizers divide each gradient by its own size. Gains on
the update have their full effect under all of them: a slope of 1 after one step; after 50, when the networks have gone
apart and see other gradients, 0.988 ± 0.005 under AdamW and 0.97 ± 0.02 under Adagrad and RMSprop, whose displacement
scatters most (correlation 0.77 and 0.76).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

import biofx
from biofx import passes
from command_line import headline
from evidence import Estimate, Report, in_processes, parse_arguments
from handwritten_digits import load

GAINS = passes.FuzzyLearningRates(nu=0.4, distribution="lognormal")
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.05),
    "SGD, momentum 0.9": functools.partial(SGD, lr=0.02, momentum=0.9),
    "Adagrad": functools.partial(Adagrad, lr=0.01),
    "RMSprop": functools.partial(RMSprop, lr=1e-3),
    "AdamW": functools.partial(AdamW, lr=1e-3),
}
PLAIN, GRADIENT, UPDATE = "plain", "on the gradient", "on the update"
STEPS = (1, 50)
BATCH_SIZE = 64
SHOWN = 150  # synapses in a panel, drawn in proportion to their weight in the statistics

# Colours that colour-blind readers tell apart, and shapes for those who see none.
STYLES: dict[str, dict[str, Any]] = {
    GRADIENT: {"facecolors": "none", "edgecolors": "#D55E00", "marker": "^", "s": 18, "linewidths": 0.5},
    UPDATE: {"color": "#0072B2", "marker": "o", "s": 9, "linewidths": 0, "alpha": 0.6},
}


@dataclass(frozen=True)
class Job:
    """One network, trained in three ways."""

    optimizer: str
    seed: int


@dataclass(frozen=True)
class Found:
    """How far synapses moved after a number of steps, by where gains acted.

    Attributes:
        slope: of displacement ÷ plain displacement on the gain.
        correlation: of the two.
        shown: some of the synapses: gain and ratio, shape (2, SHOWN).
    """

    slope: float
    correlation: float
    shown: Tensor


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def run(job: Job) -> dict[tuple[int, str], Found]:
    """Train a plain network and two transformed ones, and compare how far their synapses moved."""
    torch.manual_seed(job.seed)
    digits, plain = load(), network().double()  # in double precision, rounding blurs no ratio
    bio = biofx.transform(plain, [GAINS], seed=job.seed)
    models = {PLAIN: plain, GRADIENT: bio, UPDATE: copy.deepcopy(bio)}
    names = [*biofx.weight_sites(bio)]
    gain = torch.cat([site.gain.flatten() for site in biofx.weight_sites(bio).values()])
    start = weights(plain, names)
    optimizers = {name: OPTIMIZERS[job.optimizer](model.parameters()) for name, model in models.items()}
    biofx.attach(models[UPDATE], optimizers[UPDATE])
    images, found = digits.train_images.double(), {}
    for step in range(1, max(STEPS) + 1):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        for name, model in models.items():
            optimizers[name].zero_grad()
            F.cross_entropy(model(images[batch]), digits.train_labels[batch]).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one warns that gains on gradients cancel, which is to be seen here
                optimizers[name].step()
        if step in STEPS:
            moved = {name: weights(model, names) - start for name, model in models.items()}
            for name in STYLES:
                found[step, name] = compare(gain, moved[name], moved[PLAIN])
    return found


def weights(model: nn.Module, names: list[str]) -> Tensor:
    """All weights of a model in one vector."""
    return torch.cat([model.get_parameter(name).detach().flatten() for name in names])


def compare(gain: Tensor, moved: Tensor, plain: Tensor) -> Found:
    """Relate displacement ÷ plain displacement to the gain, with weights plain²."""
    moves = plain != 0  # some pixels are dark in all images
    gain, ratio = gain[moves], moved[moves] / plain[moves]
    share = plain[moves].square() / plain[moves].square().sum()
    x, y = gain - (share * gain).sum(), ratio - (share * ratio).sum()
    covariance, gain_variance, ratio_variance = ((share * each).sum() for each in (x * y, x * x, y * y))
    which = torch.multinomial(share, SHOWN, generator=torch.Generator().manual_seed(0))
    slope, correlation = covariance / gain_variance, covariance / (gain_variance * ratio_variance).sqrt()
    return Found(slope.item(), correlation.item(), torch.stack([gain[which], ratio[which]]))


Results = dict[tuple[str, int, str], list[Found]]


def rows_of(results: Results) -> list[dict[str, str]]:
    """What came out, as people read it: one row for each optimizer and number of steps."""
    rows = []
    for optimizer in OPTIMIZERS:
        for steps in STEPS:
            row = {"optimizer": optimizer, "steps": str(steps)}
            for where in STYLES:
                for value in ("slope", "correlation"):
                    estimate = Estimate.of(getattr(each, value) for each in results[optimizer, steps, where])
                    row[f"{value}, gains {where}"] = estimate.text("{:.3f}").replace("-0.000", "0.000")
            rows.append(row)
    return rows


def numbers(results: Results) -> Mapping[str, Any]:
    return {
        "rows": rows_of(results),
        "results": [
            {
                "optimizer": optimizer,
                "steps": steps,
                "gains": where,
                "slope": Estimate.of(each.slope for each in found),
                "correlation": Estimate.of(each.correlation for each in found),
            }
            for (optimizer, steps, where), found in results.items()
        ],
    }


def plot_synapses(axes: Axes, found: Mapping[str, list[Found]]) -> None:
    """Displacement ÷ plain displacement against gain, and what it would be if gains had full effect, or none."""
    span = torch.tensor([0.3, 3.0])
    axes.plot(span, span, color="gray", linewidth=0.8)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    for where, style in STYLES.items():
        slope = Estimate.of(each.slope for each in found[where])
        label = f"{where}: {slope.text()}".replace("-0.00", "0.00")
        axes.scatter(*found[where][0].shown, label=label, **style)
    axes.set(xscale="log", yscale="log", xlim=(0.3, 3), ylim=(0.3, 5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0.5, 1, 2]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper left",
        fontsize="x-small",
        handletextpad=0.1,
        borderpad=0.3,
        title="slope, gains …",
        title_fontsize="x-small",
        alignment="left",
    )


def plot(results: Results, seeds: int) -> Figure:
    figure = Figure(figsize=(12.5, 6.2), layout=ConstrainedLayoutEngine(h_pad=0.06))  # without pyplot
    panels = figure.subplots(len(STEPS), len(OPTIMIZERS), sharex=True, sharey=True)
    for row, steps in zip(panels, STEPS, strict=True):
        for axes, optimizer in zip(row, OPTIMIZERS, strict=True):
            plot_synapses(axes, {where: results[optimizer, steps, where] for where in STYLES})
        row[0].set_ylabel(f"displacement ÷ plain displacement\nafter {steps} step{'s' * (steps > 1)}")
    for axes, optimizer in zip(panels[0], OPTIMIZERS, strict=True):
        axes.set_title(optimizer, fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("gain")
    figure.suptitle(
        "Does a synapse learn as fast as its gain says?", x=0.01, ha="left", fontsize="large", fontweight="bold"
    )
    figure.supxlabel(
        f"Points: {SHOWN} synapses, seed 0, drawn in proportion to the square of their plain displacement. Slopes: all "
        f"synapses, mean and 95% interval over {seeds} seeds. Solid: gains have their full effect; dotted: none",
        fontsize="small",
        color="dimgray",
    )
    return figure


def main() -> None:
    arguments = parse_arguments("Gains on gradients and on updates, under five optimizers.", 10, 2)
    report = Report("diversity", arguments)
    headline(f"Training plain and with {GAINS}")
    jobs = [Job(optimizer, seed) for optimizer in OPTIMIZERS for seed in range(arguments.seeds)]
    results: Results = {}
    for job, found in zip(jobs, in_processes(run, jobs), strict=True):
        for (steps, where), each in found.items():
            results.setdefault((job.optimizer, steps, where), []).append(each)
    headline("Displacement ÷ plain displacement against gain, mean and 95% interval")
    print(tabulate(rows_of(results), headers="keys", disable_numparse=True, maxheadercolwidths=14))
    report.write(numbers(results), plot(results, arguments.seeds))


if __name__ == "__main__":
    main()
