"""What the experiments share: many trainings at once, honest statistics, and files of what came out."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

import biofx
from command_line import folder, several

Job = TypeVar("Job")
Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95


def in_processes(
    run: Callable[[Job], Result], jobs: Sequence[Job], *, processes: int | None = None, unit: str = "training"
) -> list[Result]:
    """What `run` returns for each job, in the order of the jobs, by one process for each core.

    Each process computes with one thread, so results do not depend on the number of cores. `run` and the jobs are
    pickled: `run` is a function of a module, or a `functools.partial` of one.
    """
    results: dict[int, Result] = {}
    context = multiprocessing.get_context("spawn")  # forked threads of PyTorch hang
    workers = processes or os.cpu_count() or 1
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=len(jobs), unit=unit) as bar,
    ):
        places = {pool.submit(run, job): place for place, job in enumerate(jobs)}
        for done in as_completed(places):
            results[places[done]] = done.result()
            bar.update()
    return [results[place] for place in range(len(jobs))]


@dataclass(frozen=True)
class Estimate:
    """The mean over two or more seeds, with the 95% confidence interval of Student's t distribution."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """The estimate from one value for each seed."""
        sample = numpy.asarray(list(values), dtype=float)
        mean, error = sample.mean().item(), stats.sem(sample)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1) * error)
        return cls(mean, mean - half, mean + half)

    def text(self, form: str = "{:.2f}") -> str:
        """The mean and half the width of the interval, such as 97.1 ± 0.3."""
        return f"{form.format(self.mean)} ± {form.format((self.high - self.low) / 2)}"


@dataclass(frozen=True)
class Comparison:
    """A condition against the plain network, with the same seeds.

    Attributes:
        difference: the mean of the paired differences, condition − plain, with its interval.
        p: of a paired t test, two-sided.
        corrected: p after Holm's correction for all comparisons that were made together.
    """

    difference: Estimate
    p: float
    corrected: float


def compare(conditions: Mapping[str, Sequence[float]], plain: str) -> dict[str, Comparison]:
    """Paired tests of every condition against the plain one, corrected for their number (Holm 1979).

    The values of a condition belong to the same seeds, in the same order.
    """
    base = numpy.asarray(conditions[plain], dtype=float)
    differences = {name: numpy.asarray(values) - base for name, values in conditions.items() if name != plain}
    p_values = {name: _paired_p(difference) for name, difference in differences.items()}
    return {
        name: Comparison(Estimate.of(differences[name]), p_values[name], corrected)
        for name, corrected in holm(p_values).items()
    }


def _paired_p(differences: numpy.ndarray) -> float:
    if numpy.ptp(differences) == 0:  # the t statistic is 0/0 or infinite
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences, for values whose ranks alone mean something.

    Such are times to an event that some seeds never reach: give those the same time, later than all others.
    """
    if not numpy.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Correct p values so that they hold for all tests together: the k-th smallest of n is multiplied by n − k + 1."""
    corrected: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def parse_arguments(description: str, seeds: int, quick_seeds: int) -> argparse.Namespace:
    """The options of every experiment: `quick`, `seeds`, and `output`, the folder for its files."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller run, to see how it works; no evidence")
    parser.add_argument("--seeds", type=several, help=f"number of seeds (default: {seeds}, quick: {quick_seeds})")
    parser.add_argument("--output", type=folder, default=Path(), help="the folder for table and figure (default: .)")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (quick_seeds if arguments.quick else seeds)
    return arguments


class Report:
    """The files of one experiment: NAME.json with all numbers, NAME.png with the figure."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        self._started = time.monotonic()

    def write(self, numbers: Mapping[str, Any], figure: Figure) -> None:
        """Write both files, and say where they are."""
        head = {
            "command": " ".join(["python", *sys.argv]),
            "options": {name: value for name, value in vars(self.arguments).items() if name != "output"},
            "seconds": round(time.monotonic() - self._started),
            "versions": {"biofx": biofx.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        data = self.arguments.output / f"{self.name}.json"
        picture = data.with_suffix(".png")
        text = json.dumps(head | dict(numbers), indent=1, ensure_ascii=False, default=_plain, allow_nan=False)
        data.write_text(text + "\n", encoding="utf-8")
        figure.savefig(picture, dpi=110)
        print(f"\nThe numbers are in {data}, the figure is in {picture} ({head['seconds']} s)")


def _plain(value: object) -> Any:
    """Results as JSON: dataclasses by their fields, tensors and arrays as lists."""
    if isinstance(value, Estimate | Comparison):
        return vars(value)
    if isinstance(value, torch.Tensor | numpy.ndarray | numpy.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
