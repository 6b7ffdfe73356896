"""Dale's principle over time: a recurrent network of excitatory and inhibitory units decides what it sees.

Run it with `python examples/decision.py` (about a minute on two CPU cores; `--quick` takes half a
minute; `--help` lists the options). The network is written by hand, as one would without biofx: 100 rate units with a
leak and noise, in a loop over time (`rate_networks.py`). It learns two tasks, in which each of 40 time steps shows no
more than noisy evidence:

- "perceptual": which of two inputs is the larger one? Coherence says by how much, from 3.2% to 51.2%.
- "context": two such pairs at once, motion and colour, and a cue that says which of them counts (Mante et al. 2013).

It is trained with AdamW as it is ("free"), with units that are excitatory (80%) or inhibitory and nothing else ("signs
only"), and with balanced weights ("balanced"). Per seed, all of them see the same trials in the same order, with the
same learning rate. A unit's sign holds for the recurrent weights and for the readout alike; inputs stay free. You see

1. whose signs are meant: biofx follows units over time, so that both weights read the same 100 units,
2. for each task the accuracy on new trials, beside that of an observer who adds up all the evidence; how many trials
   the training takes to get to 85%; the spectral radius of the recurrent weight before and after; and the number of
   units that excite some of their targets and inhibit others, counted in the weights after `biofx.fold`,
3. a plot, `decision.png`: choices by coherence, learning, the recurrent weight of a balanced network, its eigenvalues.

What to expect, measured with the default options: balanced networks end at 99.3% ("perceptual") and 99.0% ("context")
of the accuracy of free ones, above the bar of 97%, and get to 85% after 1.7 and 1.1 times as many trials. With signs
and nothing else, an eigenvalue of about 7 lets activity grow in every time step, as all units read the others through
the same signs. Those networks stay near chance for the first 1,500 and 2,000 trials, and need 2.7 and 2.2 times as many
as free ones. AdamW and clipping get them out of it, so that in the end they are as good as balanced ones (99.5% and
98.7%): here signs alone cost time rather than accuracy. Free networks do not reach the ideal observer either, as their
units are noisy and forget.

References:
    Song, Yang & Wang, Training excitatory-inhibitory recurrent neural networks for cognitive tasks, PLOS Computational
    Biology 12, 2016. Mante, Sussillo, Shenoy & Newsome, Context-dependent computation by recurrent dynamics in
    prefrontal cortex, Nature 503, 2013.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import biofx
from biofx import passes
from command_line import headline, plot_path, positive
from rate_networks import (
    BATCH_SIZE,
    COHERENCES,
    CRITERION,
    GAIN,
    TASKS,
    TEST_SEED,
    UNITS,
    WINDOW,
    RateNetwork,
    Run,
    Trials,
    draw,
    eigenvalues,
    ideal,
    train,
)

FREE, SIGNS_ONLY, BALANCED = "free", "signs only", "balanced"
PASSES: dict[str, passes.Pass | None] = {
    FREE: None,
    SIGNS_ONLY: passes.DalesPrinciple(excitatory=0.8, balance=False),
    BALANCED: passes.DalesPrinciple(excitatory=0.8),
}

TEST_TRIALS = 8000
SHOWN = "context"  # the task whose weights are in the plot
SIGNS = "RdBu_r"  # red excites, blue inhibits
# Colours that colour-blind readers tell apart, and strokes for those who see none.
LINES: dict[str, dict[str, Any]] = {
    FREE: {"color": "black", "linewidth": 4, "alpha": 0.3, "solid_capstyle": "round"},
    SIGNS_ONLY: {"color": "#D55E00", "linewidth": 1.5, "marker": "^", "markersize": 4.5},
    BALANCED: {"color": "#0072B2", "linewidth": 1.5, "marker": "o", "markersize": 4.5},
}


def train_all(tests: dict[str, Trials], seeds: int, batches: int) -> dict[tuple[str, str], list[Run]]:
    """All trainings, by the task and the condition."""
    runs: dict[tuple[str, str], list[Run]] = {(task, condition): [] for task in tests for condition in PASSES}
    with tqdm(total=len(runs) * seeds * batches, unit="batch") as bar:
        for seed in range(seeds):
            for (task, condition), trained in runs.items():
                bar.set_description(f"seed {seed}, {task}, {condition}")
                pass_ = PASSES[condition]
                pipeline = [] if pass_ is None else [pass_]
                trained.append(train(task, pipeline, seed, batches, tests[task], after_batch=bar.update))
    return runs


def two_signs(network: RateNetwork) -> int:
    """How many units excite some of their targets, units or choices, and inhibit others: by the weights alone."""
    outgoing = torch.cat([network.recurrent.weight, network.readout.weight])
    return int(((outgoing > 0).any(0) & (outgoing < 0).any(0)).sum())


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over seeds; or each of them, if there is one, or not all are finite."""
    tensor = torch.tensor(values)
    if len(values) == 1 or not bool(tensor.isfinite().all()):
        return ", ".join(form.format(value) for value in values)
    return f"{form.format(tensor.mean())} ± {form.format(tensor.std())}"


def results(task: str, runs: dict[tuple[str, str], list[Run]]) -> str:
    """A table for one task: one row for each condition."""
    free = torch.tensor([run.accuracy for run in runs[task, FREE]]).mean()
    best = ideal(torch.tensor(COHERENCES)).mean()
    rows = [["ideal observer", "–", f"{best:.1%}", f"{best / free:.1%}", "–", "–", "–", "–"]]
    for condition, pass_ in PASSES.items():
        trained = runs[task, condition]
        accuracies = [run.accuracy for run in trained]
        radii = ([eigenvalues(n).abs().max().item() for n in (run.before, run.after)] for run in trained)
        before, after = (spread(values, "{:.2f}") for values in zip(*radii, strict=True))
        rows.append(
            [
                condition,
                "–" if pass_ is None else str(pass_),
                spread(accuracies, "{:.1%}"),
                f"{torch.tensor(accuracies).mean() / free:.1%}",
                spread([run.trials_to_criterion() for run in trained], "{:,.0f}").replace("inf", "never"),
                before,
                after,
                f"{sum(two_signs(run.after) for run in trained)} of {UNITS * len(trained)}",
            ]
        )
    headers = [
        "condition",
        "pass",
        "accuracy",
        "ratio\nto free",
        f"trials\nto {CRITERION:.0%}",
        "spectral radius\nbefore training",
        "… after",
        "units with\ntwo signs",
    ]
    return tabulate(rows, headers=headers, disable_numparse=True)


def chosen(trained: list[Run], coherences: Tensor) -> tuple[Tensor, Tensor]:
    """The signed coherences, and for each the fraction of trials in which choice 1 was made, shape (seeds, levels)."""
    levels = coherences.unique()
    shares = [[run.choices[coherences == level].float().mean() for level in levels] for run in trained]
    return levels, torch.tensor(shares)


def plot_curves(axes: Axes, x: Tensor, curves: Tensor, label: str | None, **style: Any) -> None:
    """The mean over seeds, and their range."""
    axes.fill_between(x, curves.amin(0), curves.amax(0), color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(x, curves.mean(0), label=label, **style)


def plot_choices(axes: Axes, task: str, runs: dict[tuple[str, str], list[Run]], test: Trials) -> None:
    """Psychometric curves: how often choice 1 is made, by the coherence that counts, and by the one that does not."""
    counts, *others = test.coherences
    fine = torch.linspace(-max(COHERENCES), max(COHERENCES), 1001)
    axes.plot(fine, ideal(fine), color="black", linewidth=1, linestyle=":", label="ideal observer")
    for condition, style in LINES.items():
        plot_curves(axes, *chosen(runs[task, condition], counts), condition, **style)
        for other in others:
            plot_curves(axes, *chosen(runs[task, condition], other), None, **style | {"linestyle": "--"})
    if others:
        axes.plot([], [], color="dimgray", linestyle="--", label="… by the other modality")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=min(COHERENCES), linscale=0.5)
    axes.set_xticks([sign * coherence for sign in (-1, 1) for coherence in COHERENCES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize="small")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda coherence, _: f"{100 * coherence:+.0f}".replace("-", "−")))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.set(xlabel="signed coherence: (input 1 − input 0) / their sum (%)", ylabel="P(choose 1)", ylim=(-0.03, 1.03))
    axes.set(xlim=(-1.15 * max(COHERENCES), 1.15 * max(COHERENCES)))


def plot_learning(axes: Axes, task: str, runs: dict[tuple[str, str], list[Run]]) -> None:
    """Accuracy in training, by the number of trials so far."""
    for condition, style in LINES.items():
        trials, curves = zip(*(run.curve() for run in runs[task, condition]), strict=True)
        plot_curves(axes, trials[0] / 1000, torch.stack(curves), condition, **style | {"markevery": 0.1})
    axes.axhline(CRITERION, color="dimgray", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"trials so far (thousands; mean over {WINDOW * BATCH_SIZE:,})", ylabel="correct choices")
    axes.set(xlim=(0, None), ylim=(0.45, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def plot_weight(axes: Axes, network: RateNetwork) -> None:
    """The recurrent weight, excitatory units first, and among those of one sign, by the choice that they favour."""
    weight, readout = network.recurrent.weight.detach(), network.readout.weight.detach()
    excites = torch.cat([weight, readout]).sum(0) > 0
    order = (readout[1] - readout[0]).argsort(stable=True)
    order = order[(~excites[order]).long().argsort(stable=True)]
    limit = weight.abs().quantile(0.98).item()
    image = axes.imshow(weight[order][:, order], cmap=SIGNS, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="weight: inhibitory < 0 < excitatory", extend="both", pad=0.02)
    count = int(excites.sum())
    for line in (axes.axvline, axes.axhline):
        line(count - 0.5, color="black", linewidth=0.8)
    centres = [(count - 1) / 2, (UNITS + count - 1) / 2]
    axes.set_xticks(centres, [f"{count} excitatory", f"{UNITS - count} inh."])
    axes.set_yticks(centres, [f"{count} excitatory", f"{UNITS - count} inh."], rotation=90, verticalalignment="center")
    axes.tick_params(length=0)
    axes.set(xlabel="presynaptic unit", ylabel="postsynaptic unit")


def plot_eigenvalues(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """Eigenvalues of the recurrent weight: of the balanced network after training, of the free one before."""
    free, balanced = eigenvalues(runs[FREE][0].before), eigenvalues(runs[BALANCED][0].after)
    axes.scatter(free.real, free.imag, s=22, facecolors="none", edgecolors="gray", label="free, before training")
    axes.scatter(balanced.real, balanced.imag, s=14, color="#0072B2", label="balanced, after training")
    angles = torch.linspace(0, 2 * math.pi, 201)
    axes.plot(GAIN * angles.cos(), GAIN * angles.sin(), color="gray", linewidth=0.8, linestyle=":")
    axes.axvline(1, color="dimgray", linewidth=0.8, linestyle="--")
    reach = 1.25 * max(each.abs().max().item() for each in (free, balanced))
    axes.set(xlabel="real part", ylabel="imaginary part", xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    largest = eigenvalues(runs[SIGNS_ONLY][0].before).real.max()
    axes.text(
        0.98,
        0.03,
        f"signs only, before training:\none of them at {largest:.1f} →",
        transform=axes.transAxes,
        horizontalalignment="right",
        color="#D55E00",
        fontsize="small",
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 2},
    )
    axes.legend(loc="upper left", fontsize="small")


def plot(runs: dict[tuple[str, str], list[Run]], tests: dict[str, Trials], path: Path) -> None:
    figure = Figure(figsize=(15, 9), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.06))  # without pyplot
    axes = figure.subplots(2, 3)
    for column, task in enumerate(tests):
        plot_choices(axes[0, column], task, runs, tests[task])
        plot_learning(axes[1, column], task, runs)
    shown = {condition: runs[SHOWN, condition] for condition in PASSES}
    plot_weight(axes[0, 2], shown[BALANCED][0].after)
    plot_eigenvalues(axes[1, 2], shown)
    titles = [
        "Perceptual: do they see which is larger?",
        "Context: do they heed what counts?",
        "Balanced, trained: recurrent weight",
        "Perceptual: how fast is it learned?",
        "Context: how fast is it learned?",
        "… and its eigenvalues",
    ]
    for each, title in zip(axes.flat, titles, strict=True):
        each.set_title(title, loc="left", fontweight="bold")
    for each in axes[:, :2].flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    for each in axes[0, :2]:
        each.legend(loc="lower right", fontsize="small")
    figure.supxlabel(
        f"Mean and range over seeds: {len(shown[FREE])}. Right: task {SHOWN}, seed 0; units of one sign are sorted by "
        "the choice that they favour; right of the dashed line, activity grows where all units are active",
        fontsize="small",
        color="dimgray",
    )
    figure.savefig(path, dpi=150)


def check_signs(runs: dict[tuple[str, str], list[Run]]) -> None:
    """Under Dale's principle no unit has two signs."""
    for (task, condition), trained in runs.items():
        found = sum(two_signs(run.after) for run in trained)
        if condition != FREE and found:
            raise SystemExit(f"error: {task}, {condition}: {found} units have weights of both signs")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perceptual decisions by excitatory and inhibitory units.")
    parser.add_argument("--quick", action="store_true", help="a first look: 1 seed and 100 batches, unless given")
    parser.add_argument("--seeds", type=positive, help="number of trainings of each network (default: 3)")
    parser.add_argument("--batches", type=positive, help=f"of {BATCH_SIZE} trials, for each training (default: 250)")
    parser.add_argument("--figure", type=plot_path, default=Path("decision.png"), help="default: decision.png")
    arguments = parser.parse_args()
    seeds, batches = (1, 100) if arguments.quick else (3, 250)
    arguments.seeds, arguments.batches = arguments.seeds or seeds, arguments.batches or batches
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are too small to gain from more, and sums are then added in one order
    tests = {task: draw(task, TEST_TRIALS, torch.Generator().manual_seed(TEST_SEED)) for task in TASKS}

    headline("Whose signs: biofx.units(RateNetwork(2), stimuli)")
    print(biofx.units(RateNetwork(2), tests["perceptual"].stimuli[:BATCH_SIZE]))

    headline("Training all networks, on the same trials")
    runs = train_all(tests, arguments.seeds, arguments.batches)
    print(f"\nMean ± standard deviation; seeds: {arguments.seeds}, trials: {arguments.batches * BATCH_SIZE:,} for each")
    for task in TASKS:
        headline(f"{task}: accuracy on {TEST_TRIALS:,} new trials, recurrent weights, signs")
        print(results(task, runs))

    plot(runs, tests, arguments.figure)
    print(f"\nThe plot is in {arguments.figure}")
    check_signs(runs)


if __name__ == "__main__":
    main()
