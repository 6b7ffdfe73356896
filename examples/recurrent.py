"""Which form of Dale's principle do recurrent networks learn with, at which sizes and fractions, and do spectra tell?

Run it with `python examples/recurrent.py --output examples/results` (12 minutes on two cores; `--quick` takes less
than two; `--help` lists the options). The networks are those of `rate_networks.py`, on its task "context":
50, 100 or 200 rate units decide which of two noisy inputs is the larger one, of that pair to which a cue points. 50%,
80% or 90% of the cells are excitatory:

- "free": no signs, as written;
- "signs only": units are excitatory or inhibitory, with the magnitudes that they had (`DalesPrinciple(balance=False)`);
- "balanced": sparse weights with the free one's spectral radius (`DalesPrinciple`);
- "interneurons": all units are excitatory, and inhibit through linear interneurons (`InhibitoryInterneurons`), of
  which there are as many as make up the rest of the cells, in addition to the units;
- "signs, EG": as "signs only", and learned by exponentiated gradients (`ExponentiatedGradient`).

Per seed, all conditions start from the same free network, and see the same trials in the same order. Each condition has
the learning rate that was the best of LEARNING_RATES on validation trials, with seeds of their own, for 100 units and
80% excitation; the test trials have no part in it. You see

1. the learning rates that were chosen,
2. accuracy on new trials, how many trials the training takes to get to 85%, and, of the recurrent weight W before and
   after training, the spectral radius and the entropy of its singular values (Li et al. 2023): 1 if all directions of
   activity pass alike, 0 if one does. Of interneurons, W is the difference of excitation and inhibition,
3. each condition against the free network of its size: paired t tests, corrected by Holm's method for all of them,
4. a figure, `recurrent.png`, and all numbers, `recurrent.json`.

What came out:

- Signs alone work at 50% excitation and, mostly, at 80%. With 200 units and 90% they stay at chance (50.5%), in all 8
  seeds: the recurrent weight starts with a spectral radius of 13.5. With 50 units and 90%, seeds differ much
  (90.7 ± 3.8%).
- Balanced weights and interneurons learn everywhere, and end 0.1 to 1.0 points below the free network, or 0.2 above;
  the differences that survive correction are of 0.7 points (balanced with 100 units at 80% and 200 at 90%;
  interneurons with 200 at 80%).
- Exponentiated gradients with signs end *above* the free network at 50% and 80% excitation: by 0.2 to 0.7 points, three
  of six after correction. They do not save networks that signs alone keep at chance.
- Spectra: interneurons start with the free network's, and training drives an inhibitory mode to a radius of 7 to 106.
  Balanced weights end within a factor of 1.5 of the free network's radius. The entropy of singular values tells nothing
  of accuracy, before training (rank correlation +0.08, p = 0.6) or after (−0.14, p = 0.4).
- All conditions chose the largest of four learning rates, 0.016, so a larger one may be better for each.

References:
    Cornford et al., Learning to live with Dale's principle: ANNs with separate excitatory and inhibitory units, ICLR
    2021. Li, Cornford, Ghosh & Richards, Learning better with Dale's Law: a spectral perspective, NeurIPS 2023. Song,
    Yang & Wang, Training excitatory-inhibitory recurrent neural networks for cognitive tasks, PLOS Computational
    Biology 12, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from scipy import stats
from tabulate import tabulate

from biofx import passes
from biofx.signs.spectrum import singular_entropy, spectral_radius
from command_line import headline
from evidence import Comparison, Estimate, Report, compare, in_processes, parse_arguments
from rate_networks import BATCH_SIZE, COHERENCES, CRITERION, RateNetwork, draw, eigenvalues, ideal, train

FREE = "free"
CONDITIONS: dict[str, Callable[[float], Sequence[passes.Pass]]] = {  # the passes for a fraction of excitatory cells
    "signs only": lambda excitatory: [passes.DalesPrinciple(excitatory=excitatory, balance=False)],
    "balanced": lambda excitatory: [passes.DalesPrinciple(excitatory=excitatory)],
    "interneurons": lambda excitatory: [passes.InhibitoryInterneurons(fraction=(1 - excitatory) / excitatory)],
    "signs, EG": lambda excitatory: [
        passes.DalesPrinciple(excitatory=excitatory, balance=False),
        passes.ExponentiatedGradient(),
    ],
}

TASK = "context"
SIZES = (50, 100, 200)
FRACTIONS = (0.5, 0.8, 0.9)
SHOWN = (100, 0.8)  # of which eigenvalues are shown, and for which learning rates are chosen
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
TRIALS = 4000  # on which a network is tested, and as many for validation
TEST_SEED, VALIDATION_SEED, TUNING_SEED = 1_000_000, 2_000_000, 3_000_000  # the last: of the first network in tuning
TUNING_SEEDS = 2

# Colours that colour-blind readers tell apart, and markers for those who see none.
LINES: dict[str, dict[str, Any]] = {
    FREE: {"color": "dimgray", "marker": "s"},
    "signs only": {"color": "#D55E00", "marker": "^"},
    "balanced": {"color": "#0072B2", "marker": "o"},
    "interneurons": {"color": "#009E73", "marker": "D"},
    "signs, EG": {"color": "#CC79A7", "marker": "v"},
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        condition: a name in `CONDITIONS`, or `FREE`.
        units: the number of units.
        excitatory: the fraction of excitatory cells; None for a free network.
        seed: of weights, noise and trials.
        learning_rate: the peak of the schedule.
        batches: the length of the training.
        test_seed: of the trials on which the network is tested.
    """

    condition: str
    units: int
    excitatory: float | None
    seed: int
    learning_rate: float
    batches: int
    test_seed: int = TEST_SEED


@dataclass(frozen=True)
class Outcome:
    """What became of it. Spectra are those of the recurrent weight, before and after training.

    Attributes:
        accuracy: on the test trials.
        trials: how many the training took to get to `CRITERION`; None if it did not.
        radii: spectral radii.
        entropies: entropies of singular values.
        eigenvalues: their real and imaginary parts.
    """

    accuracy: float
    trials: float | None
    radii: tuple[float, float]
    entropies: tuple[float, float]
    eigenvalues: tuple[list[list[float]], list[list[float]]]


Cell = tuple[int, str, float | None]
"""Size, condition and fraction."""
Outcomes = dict[Cell, list[Outcome]]
"""One for each seed."""


def run(job: Job) -> Outcome:
    """Train a network, and look at its spectrum."""
    pipeline = [] if job.excitatory is None else CONDITIONS[job.condition](job.excitatory)
    test = draw(TASK, TRIALS, torch.Generator().manual_seed(job.test_seed))
    trained = train(TASK, pipeline, job.seed, job.batches, test, units=job.units, learning_rate=job.learning_rate)
    networks = trained.before, trained.after
    trials = trained.trials_to_criterion()
    return Outcome(
        accuracy=trained.accuracy,
        trials=trials if math.isfinite(trials) else None,
        radii=_of_both(networks, lambda network: spectral_radius(network.recurrent.weight)),
        entropies=_of_both(networks, lambda network: singular_entropy(network.recurrent.weight.detach())),
        eigenvalues=_of_both(networks, lambda network: torch.view_as_real(eigenvalues(network)).tolist()),
    )


def _of_both(networks: tuple[RateNetwork, RateNetwork], measure: Callable[[RateNetwork], Any]) -> tuple[Any, Any]:
    return measure(networks[0]), measure(networks[1])


def tuned(batches: int) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """The best learning rate of each condition, and the validation accuracy of each that was tried."""
    units, excitatory = SHOWN
    jobs = [
        Job(name, units, None if name == FREE else excitatory, TUNING_SEED + seed, rate, batches, VALIDATION_SEED)
        for name in (FREE, *CONDITIONS)
        for rate in LEARNING_RATES
        for seed in range(TUNING_SEEDS)
    ]
    found: dict[str, dict[float, float]] = {name: {} for name in (FREE, *CONDITIONS)}
    for job, outcome in zip(jobs, in_processes(run, jobs), strict=True):
        accuracies = found[job.condition]
        accuracies[job.learning_rate] = accuracies.get(job.learning_rate, 0.0) + outcome.accuracy / TUNING_SEEDS
    return {name: max(tried, key=tried.__getitem__) for name, tried in found.items()}, found


def trained(sizes: Iterable[int], rates: dict[str, float], seeds: int, batches: int) -> Outcomes:
    """All trainings, by size, condition and fraction."""
    cells = [(FREE, None), *((name, excitatory) for name in CONDITIONS for excitatory in FRACTIONS)]
    jobs = [
        Job(name, units, excitatory, seed, rates[name], batches)
        for units in sorted(sizes, reverse=True)  # the longest first, so that no process is left alone with one
        for name, excitatory in cells
        for seed in range(seeds)
    ]
    outcomes: Outcomes = {(units, *cell): [] for units in sizes for cell in cells}
    for job, outcome in zip(jobs, in_processes(run, jobs), strict=True):
        outcomes[job.units, job.condition, job.excitatory].append(outcome)
    return outcomes


def trials_of(outcome: Outcome, batches: int) -> float:
    """The number of trials to the criterion; of a network that did not get there, that of the whole training."""
    return float(BATCH_SIZE * batches) if outcome.trials is None else outcome.trials


def against_free(outcomes: Outcomes, value: Callable[[Outcome], float]) -> dict[Cell, Comparison]:
    """Each condition against the free network of its size and seed, corrected for all comparisons."""
    differences = {
        key: [value(own) - value(free) for own, free in zip(found, outcomes[key[0], FREE, None], strict=True)]
        for key, found in outcomes.items()
        if key[1] != FREE
    }
    zeros = [0.0] * len(next(iter(differences.values())))
    compared = compare({FREE: zeros} | {str(key): values for key, values in differences.items()}, FREE)
    return {key: compared[str(key)] for key in differences}


def results(outcomes: Outcomes, batches: int, compared: dict[Cell, Comparison]) -> list[dict[str, str]]:
    """What came out, as people read it: one row for each size, condition and fraction."""
    rows = []
    for (units, condition, excitatory), found in outcomes.items():
        comparison = compared.get((units, condition, excitatory))
        against = "–", "–"
        if comparison is not None:
            against = f"{100 * comparison.difference.mean:+.1f}", f"{comparison.corrected:.2g}"
        rows.append(
            {
                "units": str(units),
                "condition": condition,
                "excitatory": "–" if excitatory is None else f"{excitatory:.0%}",
                "accuracy (%)": Estimate.of(100 * outcome.accuracy for outcome in found).text("{:.1f}"),
                "against free (points)": against[0],
                "p, corrected": against[1],
                f"trials to {CRITERION:.0%}": Estimate.of(trials_of(each, batches) for each in found).text("{:,.0f}"),
                "reached": f"{sum(outcome.trials is not None for outcome in found)} of {len(found)}",
                "spectral radius": f"{_mean(found, 'radii', 0):.2f} → {_mean(found, 'radii', 1):.2f}",
                "entropy": f"{_mean(found, 'entropies', 0):.3f} → {_mean(found, 'entropies', 1):.3f}",
            }
        )
    return rows


def _mean(found: Sequence[Outcome], measure: str, when: int) -> float:
    return sum(getattr(outcome, measure)[when] for outcome in found) / len(found)


def correlation(outcomes: Outcomes, when: int) -> dict[str, float]:
    """Spearman's rank correlation of entropy and accuracy, over the means of all sizes, conditions and fractions."""
    entropies = [_mean(found, "entropies", when) for found in outcomes.values()]
    accuracies = [sum(outcome.accuracy for outcome in found) / len(found) for found in outcomes.values()]
    found = stats.spearmanr(entropies, accuracies)
    return {"rho": float(found.statistic), "p": float(found.pvalue)}


def plot_accuracy(axes: Axes, outcomes: Outcomes, units: int) -> None:
    """Accuracy by the fraction of excitatory cells: means and intervals; the free network is a band."""
    free = Estimate.of(outcome.accuracy for outcome in outcomes[units, FREE, None])
    axes.axhspan(free.low, free.high, color=LINES[FREE]["color"], alpha=0.2, linewidth=0)
    axes.axhline(free.mean, color=LINES[FREE]["color"], label=FREE)
    for place, condition in enumerate(CONDITIONS):
        found = [Estimate.of(o.accuracy for o in outcomes[units, condition, fraction]) for fraction in FRACTIONS]
        means = [each.mean for each in found]
        errors = [[each.mean - each.low for each in found], [each.high - each.mean for each in found]]
        shift = 0.006 * (place - (len(CONDITIONS) - 1) / 2)
        axes.errorbar([f + shift for f in FRACTIONS], means, errors, capsize=3, label=condition, **LINES[condition])
    axes.set_xticks(FRACTIONS)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="excitatory cells", ylim=(0.45, 1), title=f"{units} units: who decides well?")


def plot_eigenvalues(axes: Axes, outcomes: Outcomes, when: int) -> None:
    units, excitatory = SHOWN
    for condition, style in LINES.items():
        outcome = outcomes[units, condition, None if condition == FREE else excitatory][0]
        real, imaginary = zip(*outcome.eigenvalues[when], strict=True)
        size = {"s": 34, "facecolors": "none"} if condition == FREE else {"s": 12, "alpha": 0.7}
        axes.scatter(real, imaginary, label=condition, **style | size)
    axes.axvline(1, color="dimgray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="real part", ylabel="imaginary part")
    axes.set_title(f"Which modes grow {'after' if when else 'before'} training?")


def plot_entropy(axes: Axes, outcomes: Outcomes) -> None:
    """Mean accuracy by the mean entropy before training: one mark for each size, condition and fraction."""
    largest = max(key[0] for key in outcomes)
    for condition, style in LINES.items():
        chosen = {key: found for key, found in outcomes.items() if key[1] == condition}
        axes.scatter(
            [_mean(found, "entropies", 0) for found in chosen.values()],
            [sum(outcome.accuracy for outcome in found) / len(found) for found in chosen.values()],
            [90 * key[0] / largest for key in chosen],
            alpha=0.8,
            label=condition,
            **style,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="entropy of singular values before training", ylabel="accuracy (large marks: many units)")
    axes.set_title("Does the spectrum tell who decides well?")


def picture(outcomes: Outcomes, seeds: int) -> Figure:
    sizes = sorted({key[0] for key in outcomes})
    figure = Figure(figsize=(14, 8.5), layout=ConstrainedLayoutEngine(wspace=0.04, hspace=0.06))
    above, below = figure.subfigures(2, 1)
    row = above.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, units in zip(row, sizes, strict=True):
        plot_accuracy(axes, outcomes, units)
    row[0].set_ylabel("correct choices")
    row[0].legend(fontsize="small")
    left, middle, right = below.subplots(1, 3)
    plot_eigenvalues(left, outcomes, 0)
    plot_eigenvalues(middle, outcomes, 1)
    plot_entropy(right, outcomes)
    left.legend(fontsize="small")
    for axes in (*row, left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.title.set_fontweight("bold")
    figure.supxlabel(
        f"Means over {seeds} seeds, with 95% intervals. Eigenvalues: {SHOWN[0]} units, {SHOWN[1]:.0%} excitatory, seed "
        "0; right of the dashed line, a mode grows while all units are active",
        fontsize="small",
        color="dimgray",
    )
    return figure


def numbers(outcomes: Outcomes, compared: dict[str, dict[Cell, Comparison]]) -> list[dict[str, Any]]:
    """All outcomes; eigenvalues of the networks that are shown."""
    rows = []
    for key, found in outcomes.items():
        row: dict[str, Any] = dict(zip(("units", "condition", "excitatory"), key, strict=True))
        row |= {name: each[key] for name, each in compared.items() if key in each}
        row["runs"] = [{n: v for n, v in asdict(outcome).items() if n != "eigenvalues"} for outcome in found]
        if key[0] == SHOWN[0] and key[2] in (None, SHOWN[1]):
            row["eigenvalues"] = torch.tensor(found[0].eigenvalues).round(decimals=3).flatten(1).tolist()
        rows.append(row)
    return rows


def main() -> None:
    arguments = parse_arguments("Recurrent networks under three forms of Dale's principle.", seeds=8, quick_seeds=2)
    report = Report("recurrent", arguments)
    sizes, batches = ((SHOWN[0],), 60) if arguments.quick else (SIZES, 250)

    headline(f"Learning rates, on validation trials ({SHOWN[0]} units, {SHOWN[1]:.0%} excitatory)")
    rates, tried = tuned(batches)
    chosen = [[name, *(f"{each:.1%}" for each in found.values()), f"{rates[name]:g}"] for name, found in tried.items()]
    headers = ["condition", *(f"{rate:g}" for rate in LEARNING_RATES), "chosen"]
    print(tabulate(chosen, headers=headers, disable_numparse=True))

    headline("Training all networks, on the same trials")
    outcomes = trained(sizes, rates, arguments.seeds, batches)
    compared = {
        "accuracy_against_free": against_free(outcomes, lambda outcome: outcome.accuracy),
        "trials_against_free": against_free(outcomes, lambda outcome: trials_of(outcome, batches)),
    }
    rows = results(outcomes, batches, compared["accuracy_against_free"])
    headline(f"Mean ± 95% interval; seeds: {arguments.seeds}, trials: {BATCH_SIZE * batches:,}")
    print(tabulate(rows, headers="keys", disable_numparse=True, maxheadercolwidths=10))
    correlations = {name: correlation(outcomes, when) for when, name in enumerate(("before", "after"))}
    best = ideal(torch.tensor(COHERENCES)).mean().item()
    print(f"\nAn ideal observer is right in {best:.1%}. Rank correlation of accuracy with the entropy:")
    for name, found in correlations.items():
        print(f"  {name} training: {found['rho']:+.2f} (p = {found['p']:.2g})")
    report.write(
        {
            "task": TASK,
            "ideal_observer": best,
            "learning_rates": rates,
            "validation_accuracies": tried,
            "entropy_and_accuracy": correlations,
            "rows": rows,
            "results": numbers(outcomes, compared),
        },
        picture(outcomes, arguments.seeds),
    )


if __name__ == "__main__":
    main()
