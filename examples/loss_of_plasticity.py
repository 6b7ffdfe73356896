"""Loss of plasticity: does turnover of synapses, or of units, keep a network able to learn?

Run it with `python examples/loss_of_plasticity.py` (five minutes on two CPU cores that were busy otherwise, too;
`--quick` took half of that; `--help` lists the options). A network with 5 hidden units (ReLU) learns the slowly
changing regression problem (Dohare et al. 2024) by gradient descent, from one example after the other: 20 bits, of
which 5 are random; of the other 15, one flips after every 10,000 examples. The target is a network of 100 linear
threshold units, which a small network cannot represent, so it has to follow the flips for ever. Each error is measured
before the example is learned. Five learners see the same 300,000 examples:

- plain gradient descent,
- with `Rejuvenate`, which replaces small synapses, by its exponential or by the paper's threshold rule,
- with `ContinualBackprop`, which replaces units that contribute little,
- a linear one: a network that is no better has lost what its hidden units are for.

Each has as many trials, 9, to choose step size and options by the error over the last third of the examples, on other
seeds than those that are shown. You see

1. the choice of each,
2. the mean squared error early (examples 10,000 to 100,000) and late (the last third), with 95% confidence intervals
   over seeds; how much more it grew than that of the linear learner, which no loss of plasticity can harm; and the late
   error against the plain network's, in paired t tests with Holm's correction,
3. a figure, `loss_of_plasticity.png`: the error over time.

What came out, with the default options (in `results/`): `ContinualBackprop` helps. Its late error is 0.72 ± 0.11, that
of the plain network 0.97 ± 0.11, that of the linear learner 1.18 ± 0.12; the paired difference from plain is
−0.25 ± 0.07 (p = 1e-6). It is as much ahead early (0.64 ± 0.10 against 0.88 ± 0.14, not tested), with a step size of
0.01, the largest of those that it could choose. `Rejuvenate` does not help: by the exponential rule the difference from
plain is +0.05 ± 0.12, which cannot be told from chance, and the threshold rule harms, +0.16 ± 0.10 (p = 0.008). Both
chose the least turnover that was offered.

Loss of plasticity proper was *not* found in the plain network at the step size that was best for it, 0.001: its error
grew no more than the linear learner's (−0.01 ± 0.09); with the threshold rule it did (+0.11 ± 0.10, not tested). On the
10 seeds that served for the choice, the plain network's late error at a step size of 0.01 is above the linear learner's
best (1.66 and 1.50), and that of `ContinualBackprop` is 1.08 to 1.19, depending on its rate. Longer runs may tell more:
the authors' code has a million examples.

Networks that differ in nothing but seed and options are computed side by side, as a step of one network alone takes
almost as long. Their rules are the functions of which the passes are made, with the same random numbers:
`tests/test_loss_of_plasticity.py` compares them with a network that `biofx.transform` and `biofx.attach` made.

References:
    Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood & Sutton, Loss of plasticity in deep continual learning, Nature 632,
    2024. Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
    networks, Nature Communications 16, 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate
from torch import Tensor, nn

from biofx import passes
from biofx.base import noise
from biofx.passes.continual_backprop import bounds_of, fresh, next_layer_state
from biofx.passes.rejuvenate import RULES, turn_over_
from command_line import headline
from evidence import Comparison, Estimate, Report, compare, in_processes, parse_arguments

PLAIN, EXPONENTIAL, THRESHOLD = "plain", "Rejuvenate, exponential", "Rejuvenate, threshold"
CONTINUAL, LINEAR = "ContinualBackprop", "linear"

INPUTS, FLIPPING, HIDDEN = 20, 15, 5  # as in the paper, and so are the next two lines
TARGET_UNITS, BETA = 100, 0.7
EVERY = 10_000  # examples from one flip to the next, and in a bin of the results
BINS, QUICK_BINS = 30, 6
FIRST_TUNING_SEED, TUNING_SEEDS, QUICK_TUNING_SEEDS = 1000, 10, 2

# Colours that colour-blind readers tell apart, and strokes for those who see none.
STYLES: dict[str, dict[str, Any]] = {
    LINEAR: {"color": "black", "linestyle": "--", "linewidth": 1.2},
    PLAIN: {"color": "dimgray", "linewidth": 3},
    EXPONENTIAL: {"color": "#D55E00", "marker": "^"},
    THRESHOLD: {"color": "#E69F00", "marker": "v"},
    CONTINUAL: {"color": "#0072B2", "marker": "o"},
}


@dataclass(frozen=True)
class Setting:
    """How a network learns.

    Attributes:
        step_size: of gradient descent on the squared error.
        rule: what acts at every step, if anything does.
    """

    step_size: float
    rule: passes.Rejuvenate | passes.ContinualBackprop | None = None

    def __str__(self) -> str:
        return f"step size {self.step_size:g}" + (f", {self.rule}" if self.rule else "")


STEP_SIZES = (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03)
FEW_STEP_SIZES = (0.001, 0.003, 0.01)  # the paper's
TURNOVER = ((100.0, 100), (10.0, 1000), (100.0, 1000))  # dre, and steps between two turnovers
CHOICES: dict[str, list[Setting]] = {
    PLAIN: [Setting(size) for size in STEP_SIZES],
    EXPONENTIAL: [Setting(size, passes.Rejuvenate(*options)) for size, options in product(FEW_STEP_SIZES, TURNOVER)],
    THRESHOLD: [
        Setting(size, passes.Rejuvenate(*options, rule="threshold"))
        for size, options in product(FEW_STEP_SIZES, TURNOVER)
    ],
    CONTINUAL: [
        Setting(size, passes.ContinualBackprop(replacement_rate=rate))
        for size, rate in product(FEW_STEP_SIZES, (1e-5, 1e-4, 1e-3))
    ],
    LINEAR: [Setting(size) for size in STEP_SIZES],
}


def problem(seeds: Sequence[int], bins: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples of every bin: inputs (examples, seeds, bits), of which the last is 1, and targets (examples, seeds).

    15 bits keep their values in a bin; between bins, one of them flips. The others are random. The target is a network
    of linear threshold units with weights ±1, one for each seed.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def bits(*shape: int) -> Tensor:
        return torch.stack([torch.randint(2, shape, generator=g).float() for g in generators], -1)

    incoming, outgoing = 2 * bits(TARGET_UNITS, INPUTS + 1) - 1, 2 * bits(TARGET_UNITS + 1) - 1
    thresholds = (INPUTS + 1) * BETA - (incoming < 0).sum(1)
    slow = bits(FLIPPING)
    for _ in range(bins):
        inputs = torch.cat(
            [slow.expand(EVERY, -1, -1), bits(EVERY, INPUTS - FLIPPING), torch.ones(EVERY, 1, len(seeds))], 1
        )
        active = torch.einsum("tis,uis->tus", inputs, incoming) > thresholds
        targets = torch.einsum("tus,us->ts", active.float(), outgoing[:-1]) + outgoing[-1]
        yield inputs.transpose(1, 2).contiguous(), targets
        for index, generator in enumerate(generators):
            which = int(torch.randint(FLIPPING, (), generator=generator))
            slow[which, index] = 1 - slow[which, index]


def network(seed: int) -> nn.Sequential:
    """The network that learns, with the paper's initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        nn.init.kaiming_uniform_(model[0].weight, nonlinearity="relu")
        nn.init.kaiming_uniform_(model[2].weight, nonlinearity="linear")
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


class Networks:
    """Networks that learn side by side, one for each setting and seed: what `network` does with rules attached.

    Gradients are written out, and rules are the functions of
    which the passes are made, with the same random numbers; `tests/test_loss_of_plasticity.py` compares the two.

    Attributes:
        incoming: weights and bias of the hidden units, shape (settings, seeds, units, inputs + 1).
        outgoing: weights and bias of the output, shape (settings, seeds, units + 1).
    """

    def __init__(self, settings: Sequence[Setting], seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.settings, self.seeds = settings, seeds
        layers = [[(m.weight.detach(), m.bias.detach()) for m in (net[0], net[2])] for net in map(network, seeds)]
        incoming, outgoing = (
            torch.stack([torch.cat([w, b[:, None]], 1) for w, b in own]).to(dtype) for own in zip(*layers, strict=True)
        )
        self.incoming = incoming.repeat(len(settings), 1, 1, 1)
        self.outgoing = outgoing[:, 0].repeat(len(settings), 1, 1)
        self._steps = 0
        self._rates = torch.tensor([2 * each.step_size for each in settings], dtype=dtype)[:, None]
        self._hidden = torch.ones(len(settings), len(seeds), HIDDEN + 1, dtype=dtype)
        rules = [each.rule for each in settings]
        self._turning = [(i, rule) for i, rule in enumerate(rules) if isinstance(rule, passes.Rejuvenate)]
        renewing = [(i, rule) for i, rule in enumerate(rules) if isinstance(rule, passes.ContinualBackprop)]
        self._renewing = [i for i, _ in renewing]
        self._options = [rule for _, rule in renewing]
        self._replaced = torch.tensor([rule.replacement_rate for _, rule in renewing], dtype=dtype)[:, None]
        shape = len(renewing), len(seeds), HIDDEN
        self._utility, self._due = torch.zeros(shape, dtype=dtype), torch.zeros(shape[:2], dtype=dtype)
        self._age = torch.zeros(shape, dtype=torch.int64)
        self._bounds = [bounds_of(w[:, :INPUTS]) for w in incoming]

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Learn one example for each seed; returns the errors before, shape (settings, seeds)."""
        self._steps += 1
        hidden = self._hidden[..., :HIDDEN]
        torch.clamp(torch.matmul(self.incoming, inputs[..., None])[..., 0], min=0, out=hidden)
        error = torch.linalg.vecdot(self.outgoing, self._hidden) - targets
        slope = (self._rates * error)[..., None]
        back = slope * self.outgoing[..., :HIDDEN] * (hidden > 0)
        self.outgoing.addcmul_(slope, self._hidden, value=-1)
        self.incoming.addcmul_(back[..., None], inputs[:, None], value=-1)
        for index, rule in self._turning:
            if self._steps % rule.every == 0:
                self._turn_over(index, rule)
        if self._renewing:
            self._renew(hidden[self._renewing])
        return error

    def _counter(self, seed: int, *purpose: str) -> noise.Counter:
        return noise.Counter(torch.tensor(seed), torch.tensor(self._steps - 1), purpose)  # the steps before this one

    def _turn_over(self, index: int, options: passes.Rejuvenate) -> None:
        """What `Rejuvenate` does in the networks of a setting."""
        rule = RULES[options.rule]
        first = [("0.weight", seed, w[:, :INPUTS]) for seed, w in zip(self.seeds, self.incoming[index], strict=True)]
        second = [
            ("2.weight", seed, w[None, :HIDDEN]) for seed, w in zip(self.seeds, self.outgoing[index], strict=True)
        ]
        values = [w for *_, w in first + second]
        numbers = rule.numbers([*rule.statistics.of_parts(values)], [w.numel() for w in values], options.dre)
        which, new = (
            [self._counter(seed, options.name, name, purpose) for name, seed, _ in first + second]
            for purpose in ("which", "new")
        )
        turn_over_(rule, noise.pairs(values, which), noise.normal(values, new), values, values, *numbers)

    def _renew(self, hidden: Tensor) -> None:
        """What `ContinualBackprop` does, given the activity of the networks that have it."""
        outgoing = self.outgoing[self._renewing, :, :HIDDEN]
        maturity, decay = self._options[0].maturity, self._options[0].decay
        self._utility, self._age, self._due, masks = next_layer_state(
            self._utility, self._age, self._due, hidden * outgoing.abs(),
            rate=self._replaced, maturity=maturity, decay=decay,
        )  # fmt: skip
        for index, seed, unit in masks.nonzero().tolist():
            weight = self.incoming[self._renewing[index], seed]
            counter = self._counter(self.seeds[seed], passes.ContinualBackprop.name, "0.weight", "fresh")
            (uniform,) = noise.uniform([weight[:, :INPUTS]], [counter])
            weight[unit, :INPUTS] = fresh(uniform, None, self._bounds[seed])[unit]
            weight[unit, INPUTS] = 0
            self.outgoing[self._renewing[index], seed, unit] = 0


class LinearModels:
    """The same for linear models."""

    def __init__(self, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
        self._rates = torch.tensor([2 * each.step_size for each in settings])[:, None]
        self._weights = torch.zeros(len(settings), len(seeds), INPUTS + 1)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Learn one example for each seed; returns the errors before, shape (settings, seeds)."""
        error = torch.linalg.vecdot(self._weights, inputs) - targets
        self._weights.addcmul_((self._rates * error)[..., None], inputs, value=-1)
        return error


@dataclass(frozen=True)
class Job:
    """Learners of one kind.

    Attributes:
        condition: which.
        settings: how each learns.
        seeds: of the problem and of the initial weights.
        bins: how many times 10,000 examples.
    """

    condition: str
    settings: Sequence[Setting]
    seeds: Sequence[int]
    bins: int


@torch.no_grad()
def learn(job: Job) -> Tensor:
    """The mean squared error in each bin, shape (settings, seeds, bins)."""
    learners = (LinearModels if job.condition == LINEAR else Networks)(job.settings, job.seeds)
    found = []
    for inputs, targets in problem(job.seeds, job.bins):
        total = torch.zeros(len(job.settings), len(job.seeds))
        for one, target in zip(inputs, targets, strict=True):
            total += learners.step(one, target).square()
        found.append(total / EVERY)
    return torch.stack(found, -1).nan_to_num(nan=torch.inf)


def late(errors: Tensor) -> Tensor:
    """The mean over the last third of the bins."""
    return errors[..., -(errors.shape[-1] // 3) :].mean(-1)


def early(errors: Tensor) -> Tensor:
    """The mean over the first third of the bins, without the first one."""
    return errors[..., 1 : errors.shape[-1] // 3].mean(-1)


def choose(bins: int, seeds: int) -> dict[str, tuple[Setting, list[dict[str, Any]]]]:
    """The best setting of each condition on seeds that nothing else uses, and what came out for all of them."""
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
    jobs = [Job(condition, settings, tuning, bins) for condition, settings in CHOICES.items()]
    found = {}
    for job, errors in zip(jobs, in_processes(learn, jobs, unit="kind"), strict=True):
        means = late(errors).mean(1)
        tried = [
            {"setting": str(setting), "late error": mean if mean < torch.inf else None}
            for setting, mean in zip(job.settings, means.tolist(), strict=True)
        ]
        found[job.condition] = job.settings[int(means.argmin())], tried
    return found


def rows_of(errors: Mapping[str, Tensor], chosen: Mapping[str, Setting], against: Mapping[str, Comparison]) -> Any:
    """A row for each condition."""
    rows = []
    for condition, own in errors.items():
        growth = (late(own) - early(own)) - (late(errors[LINEAR]) - early(errors[LINEAR]))
        row: dict[str, Any] = {"condition": condition, "setting": str(chosen[condition])}
        row["early error"] = Estimate.of(early(own).tolist()).text()
        row["late error"] = Estimate.of(late(own).tolist()).text()
        row["growth beyond linear"] = "" if condition == LINEAR else Estimate.of(growth.tolist()).text()
        compared = against.get(condition)
        row["late − plain"] = "" if compared is None else compared.difference.text()
        row["p, corrected"] = "" if compared is None else f"{compared.corrected:.2g}"
        rows.append(row)
    return rows


def plot_errors(axes: Axes, errors: Mapping[str, Tensor], base: Tensor | None = None) -> None:
    """The mean over seeds with its confidence interval, of the error or of its difference from another."""
    for condition in STYLES:
        own = errors[condition] if base is None else errors[condition] - base
        if condition == LINEAR and base is not None:
            axes.axhline(0, **STYLES[LINEAR])
            continue
        estimates = [Estimate.of(values) for values in own.T.tolist()]
        examples = (numpy.arange(len(estimates)) + 0.5) * EVERY / 1000
        style = STYLES[condition]
        axes.plot(examples, [e.mean for e in estimates], label=condition, markersize=4, markevery=3, **style)
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(examples, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="examples so far (thousands)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def drawn(errors: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout=ConstrainedLayoutEngine(wspace=0.05))  # without pyplot
    left, right = figure.subplots(1, 2)
    plot_errors(left, errors)
    left.set(ylabel="mean squared error", ylim=(0, None))
    left.legend(fontsize="small")
    left.set_title("Do networks stay able to learn?", loc="left", fontweight="bold")
    plot_errors(right, errors, errors[LINEAR])
    right.set(ylabel="error − that of the linear learner")
    right.set_title("… and better than a linear one?", loc="left", fontweight="bold")
    count = len(errors[PLAIN])
    figure.supxlabel(
        f"An input bit flips every {EVERY:,} examples. Mean and 95% interval, {count} seeds; dashed: linear learner",
        fontsize="small",
        color="dimgray",
    )
    return figure


def main() -> None:
    arguments = parse_arguments("Do networks lose the ability to learn?", seeds=20, quick_seeds=3)
    report = Report("loss_of_plasticity", arguments)
    bins, tuning = (QUICK_BINS, QUICK_TUNING_SEEDS) if arguments.quick else (BINS, TUNING_SEEDS)

    headline(f"Choosing settings: {len(CHOICES[PLAIN])} for each learner, {tuning} seeds, {bins * EVERY:,} examples")
    choices = choose(bins, tuning)
    chosen = {condition: setting for condition, (setting, _) in choices.items()}
    print("\n" + tabulate(list(chosen.items()), headers=("learner", "best setting")))

    headline(f"Learning {bins * EVERY:,} examples, {arguments.seeds} seeds")
    jobs = [Job(condition, [setting], range(arguments.seeds), bins) for condition, setting in chosen.items()]
    results = in_processes(learn, jobs, unit="kind")
    errors = {job.condition: found[0] for job, found in zip(jobs, results, strict=True)}
    against = compare({condition: late(own).tolist() for condition, own in errors.items()}, PLAIN)
    rows = rows_of(errors, chosen, against)
    print("\n" + tabulate(rows, headers="keys"))

    numbers = {
        "rows": rows,
        "tried": {condition: tried for condition, (_, tried) in choices.items()},
        "late error against plain": against,
        "mean error by bin": {condition: own.mean(0) for condition, own in errors.items()},
        "late error by seed": {condition: late(own) for condition, own in errors.items()},
    }
    report.write(numbers, drawn(errors))


if __name__ == "__main__":
    main()
