"""Accuracy and learning speed: does a mechanism help, harm or change nothing, each at its own learning rate?

Run it with `python examples/accuracy.py` (a quarter of an hour on two CPU cores; `--quick` takes about a minute and
is no evidence; `--help` lists the options). Every pass alone with its default options, the paper's recipe and "cortex",
which is all rules of synapses that preserve the function, are compared with the plain network, with SGD (momentum 0.9)
and AdamW, in three tasks:

- "digits, MLP" and "digits, ResNet": scikit-learn's 8 × 8 digits, by two hidden layers of 64 units, or by two residual
  blocks of 8 channels; the score is the accuracy,
- "diabetes, MLP": scikit-learn's regression of the progression of diabetes on ten measurements; the score is R². Ten
  columns have no neighbourhood for a convolution, so there is no ResNet.

Trainings are short, 100 or 150 steps, with a learning rate that falls linearly to zero. The learning rate is tuned for
each condition, task and optimizer on its own: the same six values and two seeds for all, judged on a validation split.
The grid spans a factor of 300, as volume-dependent rates make all gains small and group units make gradients large.
Then 20 other seeds train with the chosen rate, and the test split is looked at for the first time. A seed sets initial
weights, minibatches and what passes draw, so conditions are paired. You see

1. for each task and optimizer the score, the difference to the plain network with its interval and p value, the steps
   to a fixed score on the validation split, and the learning rate; "(end)" if it is an end of the grid, so that a
   better one may lie beyond,
2. a figure, `accuracy.png`: all differences, coloured where they are significant; and all numbers in `accuracy.json`.

What came out, with default options and 20 seeds (`results/accuracy.json`):

- On digits, splitting, gains (`FuzzyLearningRates`), homeostasis, L1, continual backprop and "cortex" cannot be told
  from the plain network, in accuracy or speed. So far they do no harm, and no good.
- Volume-dependent rates cost 1 to 3 points (less in the ResNet with AdamW), crystallization up to 0.8, turnover at
  every step 4 to 18, and the paper's recipe, which has it, 5 to 14.
- Under Dale's principle, signs alone cost 1.4 to 3.9 points, and more steps. What balanced weights cost cannot be told
  from chance after correction; interneurons cost up to 1.6 points. Mirrored units *gain* 1.2 and 0.9 points in the
  ResNet, with twice the units, and lose 0.8 in the MLP with AdamW.
- Exponentiated gradients end up to 1.1 points lower, but for the MLP with SGD: 9 of 20 trainings diverged there, at a
  learning rate with which neither of the two seeds for tuning did.
- Nothing learned digits faster, but crystallization with SGD in the MLP (50 instead of 55 steps).
- On diabetes with AdamW, the plain network overfits its 248 patients (R² 0.27; with SGD 0.32), and whatever holds
  learning back helps, by up to 0.06. With SGD nothing helps by more than 0.005.

How the tests are done: scores by paired t tests, steps by Wilcoxon's signed-rank test, as a seed that never reaches the
criterion has a rank but no number (it counts as later than all others). Holm's correction holds for all differences of
scores in all tables together, and likewise for all differences of steps. A training that diverges counts as a network
that gives one answer to all inputs. The splits are fixed, so the intervals are about seeds, not about other data.
Learning rates are tuned for the score at the end; steps are counted with the same ones.

References:
    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1, 1945. Efron, Hastie, Johnstone &
    Tibshirani, Least angle regression, Annals of Statistics 32, 2004 (the diabetes data).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
import handwritten_digits
from command_line import headline
from evidence import Comparison, Estimate, Report, compare, holm, in_processes, parse_arguments, signed_rank_p

PLAIN = "plain"
CONDITIONS: dict[str, str | None] = {  # one line each: every pass with its default options, then the recipes
    PLAIN: None,
    "split synapses": "split-synapses",
    "fuzzy learning rates": "fuzzy-learning-rates",
    "volume-dependent rates": "volume-dependent-learning-rates",
    "crystallize": "crystallize",
    "rejuvenate": "rejuvenate",
    "synaptic scaling": "synaptic-scaling",
    "L1": "l1-regularization",
    "exponentiated gradient": "exponentiated-gradient",
    "continual backprop": "continual-backprop",
    "Dale, balanced": "dales-principle",
    "Dale, signs only": "dales-principle{balance=False}",
    "mirror units": "mirror-units",
    "interneurons": "inhibitory-interneurons",
    "group units": "group-units",
    "the paper's recipe": "hofmann2025",
    "everything: cortex": "cortex",
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
LEARNING_RATES = (1, 3, 10, 30, 100, 300)  # times the slowest of the task; so many, as some gains are all small
TUNING_SEEDS = (1000, 1001)  # none of them is a seed of the results
QUICK_STEPS = 1 / 4  # of the steps of a training
EVERY = 5  # steps from one look at the validation split to the next
DIVERGED = 1e6  # a loss beyond it ends the training
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Split:
    """Inputs and targets, one row for each example."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Data:
    """What is learned from, what learning rates and speed are judged by, and what the results are measured on."""

    train: Split
    validation: Split
    test: Split


@functools.cache
def digits() -> Data:
    """Images of 8 × 8 pixels: 1,010 to learn from, 337 for validation, 450 for testing."""
    data = handwritten_digits.load()
    labels = data.train_labels
    learned, held = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return Data(
        Split(data.train_images[learned], labels[learned]),
        Split(data.train_images[held], labels[held]),
        Split(data.test_images, data.test_labels),
    )


@functools.cache
def diabetes() -> Data:
    """Ten measurements of a patient and the progression of diabetes a year later: 248 patients, 83, and 111.

    Inputs and targets are standardised by what is learned from.
    """
    table = load_diabetes()
    rest, test = train_test_split(range(len(table.target)), test_size=0.25, random_state=0)
    learned, held = train_test_split(rest, test_size=0.25, random_state=0)

    def standardised(values: numpy.ndarray) -> Tensor:
        return torch.tensor((values - values[learned].mean(0)) / values[learned].std(0), dtype=torch.float32)

    inputs, targets = standardised(table.data), standardised(table.target[:, None])
    return Data(*(Split(inputs[rows], targets[rows]) for rows in (learned, held, test)))


def perceptron(inputs: int, outputs: int) -> nn.Module:
    """Two hidden layers of 64 units."""
    layers = (nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))
    return nn.Sequential(nn.Flatten(), *layers)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map to one of the same shape."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


class ResidualNet(nn.Module):
    """A small convolutional network with two shortcuts, for images of 8 × 8 pixels."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))
        self.readout = nn.Linear(4 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 2)
        logits: Tensor = self.readout(F.max_pool2d(self.blocks(x), 2).flatten(1))
        return logits


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent."""
    return 100 * (outputs.argmax(1) == labels).float().mean().item()


def determination(outputs: Tensor, targets: Tensor) -> float:
    """R²: 1 for predictions without error, 0 for the mean of the targets; four digits, as the rest is rounding."""
    return round(1 - (F.mse_loss(outputs, targets) / targets.var(correction=0)).item(), 4)


@dataclass(frozen=True)
class Task:
    """A network, its data and its training.

    Attributes:
        score: what is compared between conditions; larger is better.
        constant: the score of a network that always gives one answer, which is what a training that diverges counts as.
        criterion: the score on the validation split whose first reaching counts as having learned.
        slowest: the smallest learning rate that is tried, for each optimizer.
        linear: the figure's axis is linear up to this difference, logarithmic beyond.
    """

    data: Callable[[], Data]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    measure: str
    form: str
    constant: float
    criterion: float
    steps: int
    batch_size: int
    slowest: Mapping[str, float]
    linear: float


_classify = functools.partial(
    Task, digits, loss=F.cross_entropy, score=accuracy, measure="accuracy in %", form=".2f", constant=10.0, linear=1.0
)
TASKS = {
    "digits, MLP": _classify(
        functools.partial(perceptron, 64, 10),
        criterion=90.0,
        steps=150,
        batch_size=64,
        slowest={"SGD": 0.03, "AdamW": 1e-3},
    ),
    "digits, ResNet": _classify(
        ResidualNet, criterion=90.0, steps=100, batch_size=64, slowest={"SGD": 3e-3, "AdamW": 1e-3}
    ),
    "diabetes, MLP": Task(
        diabetes,
        functools.partial(perceptron, 10, 1),
        loss=F.mse_loss,
        score=determination,
        measure="R²",
        form=".3f",
        constant=0.0,
        criterion=0.4,
        steps=150,
        batch_size=32,
        slowest={"SGD": 3e-3, "AdamW": 3e-4},
        linear=0.02,
    ),
}


@dataclass(frozen=True)
class Training:
    """One training: what is trained, how, from which seed, for how many steps."""

    task: str
    optimizer: str
    condition: str
    learning_rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What came out of a training.

    Attributes:
        validation: the score on the validation split at the end.
        test: the score on the test split at the end.
        learned: the steps to the criterion on the validation split, or None if it was not reached.
        diverged: whether the loss became too large or not finite.
        seconds: of computing time.
    """

    validation: float
    test: float
    learned: int | None
    diverged: bool
    seconds: float


def train(training: Training) -> Outcome:
    """Train a network from the weights, the draws of its passes and the minibatches that belong to the seed."""
    started, task = time.process_time(), TASKS[training.task]
    data, passes = task.data(), CONDITIONS[training.condition]
    torch.manual_seed(training.seed)
    model = task.build()
    if passes is not None:
        model = biofx.transform(model, passes, example_inputs=data.train.inputs[:2], seed=training.seed)
    optimizer = OPTIMIZERS[training.optimizer](model.parameters(), lr=training.learning_rate)
    if passes is not None:
        biofx.attach(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, training.steps)
    learned: int | None = None
    diverged = False
    for step, batch in enumerate(minibatches(len(data.train.inputs), task.batch_size, training), start=1):
        optimizer.zero_grad()
        loss = task.loss(model(data.train.inputs[batch]), data.train.targets[batch])
        diverged = not loss.item() < DIVERGED
        if diverged:
            break
        loss.backward()
        try:
            optimizer.step()
        except biofx.LifecycleError:  # the plain network would notice at its next loss
            diverged = not finite(model)
            if not diverged:
                raise
            break
        schedule.step()
        if learned is None and step % EVERY == 0 and evaluate(model, task, data.validation) >= task.criterion:
            learned = step
    validation = task.constant if diverged else evaluate(model, task, data.validation)
    test = task.constant if diverged else evaluate(model, task, data.test)
    return Outcome(validation, test, learned, diverged, time.process_time() - started)


def finite(model: nn.Module) -> bool:
    """Whether all parameters and their gradients are finite."""
    tensors = [tensor for p in model.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def minibatches(count: int, size: int, training: Training) -> Iterator[Tensor]:
    """Rows of as many minibatches as the training has steps, shuffled anew in every epoch."""
    shuffling = torch.Generator().manual_seed(training.seed)
    epochs = (torch.randperm(count, generator=shuffling).split(size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), training.steps)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: Split) -> float:
    model.eval()
    score = task.score(model(split.inputs), split.targets)
    model.train()
    return score


Cell = tuple[str, str, str]  # task, optimizer, condition


@dataclass(frozen=True)
class Result:
    """What one condition gave in one task with one optimizer.

    Attributes:
        learning_rate: the chosen one.
        tuning: the mean score on the validation split with each learning rate, from seeds of their own.
        outcomes: one for each seed.
    """

    learning_rate: float
    tuning: dict[float, float]
    outcomes: list[Outcome]

    @property
    def scores(self) -> list[float]:
        """The score on the test split, for each seed."""
        return [outcome.test for outcome in self.outcomes]

    @property
    def reached(self) -> float:
        """Share of the seeds that reached the criterion."""
        return statistics.fmean(outcome.learned is not None for outcome in self.outcomes)

    def steps(self, never: int) -> list[int]:
        """The steps to the criterion for each seed, `never` for those that did not reach it."""
        return [outcome.learned or never for outcome in self.outcomes]


@dataclass(frozen=True)
class Effect:
    """A condition against the plain network, with the same seeds.

    Attributes:
        score: the difference of the test scores, with p of a paired t test.
        saved: the median over seeds of the steps to the criterion that are saved.
        saved_p: of Wilcoxon's signed-rank test of the steps saved, corrected for all such tests.
    """

    score: Comparison
    saved: float
    saved_p: float


BETTER, WORSE, SAME = "better", "worse", "no difference"
MARKS = {BETTER: " ▲", WORSE: " ▼", SAME: ""}


def verdict(difference: float, p: float) -> str:
    return SAME if p >= SIGNIFICANCE or not difference else BETTER if difference > 0 else WORSE


class Experiment:
    """All trainings of all conditions: which there are, and what comes out."""

    def __init__(self, seeds: int, quick: bool) -> None:
        self.seeds, self.quick = seeds, quick
        self.cells: list[Cell] = list(itertools.product(TASKS, OPTIMIZERS, CONDITIONS))
        self.spent = 0.0  # seconds of computing

    def steps(self, task: str) -> int:
        """Number of steps of a training."""
        return math.ceil(TASKS[task].steps * (QUICK_STEPS if self.quick else 1))

    def never(self, task: str) -> int:
        """What counts as the steps to a criterion that is not reached: one look after the last."""
        return self.steps(task) + EVERY

    def learning_rates(self, task: str, optimizer: str) -> list[float]:
        """Those that are tried; every second of them if quick."""
        slowest = TASKS[task].slowest[optimizer]
        return [slowest * factor for factor in (LEARNING_RATES[1::2] if self.quick else LEARNING_RATES)]

    def run(self) -> dict[Cell, Result]:
        """Tune the learning rate of every condition on the validation split, then train with it from other seeds."""
        headline("Tuning: every condition with every learning rate, scored on the validation split")
        tuning_seeds = TUNING_SEEDS[: 1 if self.quick else None]
        trials = [
            (cell, rate, seed)
            for cell in self.cells
            for rate in self.learning_rates(*cell[:2])
            for seed in tuning_seeds
        ]
        tuning: dict[Cell, dict[float, float]] = {cell: {} for cell in self.cells}
        for (cell, rate, _), outcome in zip(trials, self._train(trials), strict=True):
            tuning[cell][rate] = tuning[cell].get(rate, 0) + outcome.validation / len(tuning_seeds)
        chosen = {cell: max(means, key=means.__getitem__) for cell, means in tuning.items()}  # of equals, the smallest

        headline("Training with the chosen learning rates, from new seeds, scored on the test split")
        outcomes = iter(self._train([(cell, chosen[cell], seed) for cell in self.cells for seed in range(self.seeds)]))
        return {
            cell: Result(chosen[cell], tuning[cell], list(itertools.islice(outcomes, self.seeds)))
            for cell in self.cells
        }

    def _train(self, trials: Sequence[tuple[Cell, float, int]]) -> list[Outcome]:
        outcomes = in_processes(
            train, [Training(*cell, rate, seed, self.steps(cell[0])) for cell, rate, seed in trials]
        )
        self.spent += sum(outcome.seconds for outcome in outcomes)
        return outcomes

    def effects(self, results: Mapping[Cell, Result]) -> dict[Cell, Effect]:
        """Every condition against the plain network of its task and optimizer, corrected for all of them together."""
        scores: dict[Cell, Comparison] = {}
        saved: dict[Cell, list[int]] = {}
        for task, optimizer in itertools.product(TASKS, OPTIMIZERS):
            its = {name: results[task, optimizer, name] for name in CONDITIONS}
            for name, comparison in compare({name: each.scores for name, each in its.items()}, PLAIN).items():
                scores[task, optimizer, name] = comparison
                pairs = zip(*(its[each].steps(self.never(task)) for each in (PLAIN, name)), strict=True)
                saved[task, optimizer, name] = [plain - steps for plain, steps in pairs]
        corrected = holm({cell: comparison.p for cell, comparison in scores.items()})
        saved_p = holm({cell: signed_rank_p(differences) for cell, differences in saved.items()})
        return {
            cell: Effect(
                dataclasses.replace(comparison, corrected=corrected[cell]),
                statistics.median(saved[cell]),
                saved_p[cell],
            )
            for cell, comparison in scores.items()
        }

    def records(self, results: Mapping[Cell, Result], effects: Mapping[Cell, Effect]) -> list[dict[str, Any]]:
        """All numbers, one flat record for each condition, task and optimizer."""
        records = []
        for (task, optimizer, condition), result in results.items():
            score, never = Estimate.of(result.scores), self.never(task)
            median = statistics.median_high(result.steps(never))  # no mean with one that never came
            record: dict[str, Any] = {
                "task": task,
                "optimizer": optimizer,
                "condition": condition,
                "passes": CONDITIONS[condition],
                "measure": TASKS[task].measure,
                "learning rate": result.learning_rate,
                "at an end of the grid": result.learning_rate in (min(result.tuning), max(result.tuning)),
                "score": score.mean,
                "score, half interval": score.high - score.mean,
                "diverged": sum(outcome.diverged for outcome in result.outcomes),
                "median steps": median if median < never else None,
                "share that reached": result.reached,
            }
            if effect := effects.get((task, optimizer, condition)):
                difference = effect.score.difference
                record |= {
                    "difference": difference.mean,
                    "difference, half interval": difference.high - difference.mean,
                    "p": effect.score.p,
                    "corrected p": effect.score.corrected,
                    "verdict": verdict(difference.mean, effect.score.corrected),
                    "median steps saved": effect.saved,
                    "steps, corrected p": effect.saved_p,
                    "steps, verdict": verdict(effect.saved, effect.saved_p),
                }
            records.append({key: _rounded(value) for key, value in record.items()})
        return records


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def score_cell(record: Mapping[str, Any]) -> str:
    """The score of the plain network, or the difference to it, such as −0.4 ± 0.1 ▼."""
    form = TASKS[record["task"]].form
    if record["condition"] == PLAIN:
        return f"{record['score']:{form}} ± {record['score, half interval']:{form}}"
    difference = f"{record['difference']:+{form}}".replace("-", "−")
    return f"{difference} ± {record['difference, half interval']:{form}}{MARKS[record['verdict']]}"


def steps_cell(record: Mapping[str, Any]) -> str:
    """The median steps to the criterion, or how many seeds never reached it, such as 60 ▲."""
    median = "never" if record["median steps"] is None else f"{record['median steps']:.0f}"
    return median + MARKS[record.get("steps, verdict", SAME)]


def pivoted(records: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> list[dict[str, str]]:
    """A table of one row for each condition, one column for each task and optimizer."""
    rows: dict[str, dict[str, str]] = {name: {"condition": name} for name in CONDITIONS}
    for record in records:
        rows[record["condition"]][f"{record['task']}, {record['optimizer']}"] = cell(record)
    return list(rows.values())


def table(records: Sequence[Mapping[str, Any]], task: str, optimizer: str) -> str:
    """All that is compared in one task with one optimizer: one row for each condition."""
    form, rows = TASKS[task].form, []
    for record in records:
        if (record["task"], record["optimizer"]) == (task, optimizer):
            plain = record["condition"] == PLAIN
            rows.append(
                [
                    record["condition"],
                    f"{record['score']:{form}} ± {record['score, half interval']:{form}}",
                    "" if plain else score_cell(record),
                    "" if plain else f"{record['corrected p']:.2g}",
                    steps_cell(record),
                    f"{record['share that reached']:.0%}",
                    "" if plain else f"{record['steps, corrected p']:.2g}",
                    f"{record['learning rate']:g}{' (end)' if record['at an end of the grid'] else ''}",
                    record["diverged"] or "",
                ]
            )
    headers = [
        "",
        f"test {TASKS[task].measure}",
        "difference to plain",
        "p of the\ndifference",
        "median\nsteps",
        "seeds that\nreached",
    ]
    return tabulate(rows, headers=[*headers, "p of the\nsteps", "learning\nrate", "diverged"], disable_numparse=True)


# Colours that colour-blind readers tell apart, and shapes for those who see none.
STYLES: dict[str, dict[str, Any]] = {
    BETTER: {"color": "#0072B2", "marker": "^"},
    WORSE: {"color": "#D55E00", "marker": "v"},
    SAME: {"color": "#777777", "marker": "o"},
}


def plot(records: Sequence[Mapping[str, Any]], seeds: int) -> Figure:
    """For each task and optimizer, every condition's difference to the plain network, with its interval."""
    figure = Figure(figsize=(15, 3 + 0.45 * len(CONDITIONS)), layout=ConstrainedLayoutEngine(hspace=0.05))
    grid = figure.subplots(len(OPTIMIZERS), len(TASKS), sharey=True)
    names = [name for name in CONDITIONS if name != PLAIN]
    for row, optimizer in zip(grid, OPTIMIZERS, strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            its = {
                each["condition"]: each for each in records if (each["task"], each["optimizer"]) == (task, optimizer)
            }
            plot_panel(axes, TASKS[task], [its[name] for name in names])
            axes.set_title(f"{task}, {optimizer} (plain: {score_cell(its[PLAIN])})", fontsize="medium", loc="left")
            axes.set_yticks(range(len(names)), names)
    for axes, compared in zip(grid[-1], TASKS.values(), strict=True):
        axes.set_xlabel(f"difference in test {compared.measure}")
    grid[0, 0].invert_yaxis()
    handles = [Line2D([], [], linestyle="", label=what, **style) for what, style in STYLES.items()]
    caption = (
        f"Mean of {seeds} paired seeds with 95% intervals. Coloured where a paired t test is significant (p < "
        f"{SIGNIFICANCE}) after Holm's correction for all {len(names) * grid.size} comparisons"
    )
    figure.legend(handles=handles, title=caption, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Does a mechanism help, harm or change nothing, each at its best learning rate?", fontweight="bold")
    return figure


def plot_panel(axes: Axes, task: Task, records: Sequence[Mapping[str, Any]]) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    for place, record in enumerate(records):
        interval = record["difference, half interval"]
        axes.errorbar(record["difference"], place, xerr=interval, linewidth=1.5, **STYLES[record["verdict"]])
    axes.set_xscale("symlog", linthresh=task.linear, linscale=1.5)
    low, high = axes.get_xlim()
    ticks = [sign * task.linear * 10**power for power in range(4) for sign in (-1, 1)]
    axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.set_xlim(min(low, -task.linear), max(high, task.linear))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def main() -> None:
    arguments = parse_arguments("What every mechanism does to accuracy and speed of learning.", seeds=20, quick_seeds=2)
    report = Report("accuracy", arguments)
    experiment = Experiment(arguments.seeds, arguments.quick)
    results = experiment.run()
    records = experiment.records(results, experiment.effects(results))
    for task, optimizer in itertools.product(TASKS, OPTIMIZERS):
        criterion = f"steps to {TASKS[task].criterion:g} on the validation split"
        headline(f"{task}, {optimizer}: {experiment.steps(task)} steps; {criterion}")
        print(table(records, task, optimizer))
    print(f"\nIntervals: 95%, over {arguments.seeds} seeds. p: corrected for all comparisons of all tables.")
    numbers = {
        "core seconds": round(experiment.spent),
        "rows": pivoted(records, score_cell),
        "steps": pivoted(records, steps_cell),
        "results": records,
        "scores of the seeds": {
            ", ".join(cell): " ".join(f"{score:.4g}" for score in result.scores) for cell, result in results.items()
        },
        "tuning": {
            ", ".join(cell): {f"{rate:g}": _rounded(score) for rate, score in result.tuning.items()}
            for cell, result in results.items()
        },
    }
    report.write(numbers, plot(records, arguments.seeds))


if __name__ == "__main__":
    main()
