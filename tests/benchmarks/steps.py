"""What a training step costs with biofx, relative to one without: time, and memory at its peak.

    python tests/benchmarks/steps.py                          # perceptron and ResNet, every rule, eager: some minutes
    python tests/benchmarks/steps.py --compile-rules          # and with attach(compile=True)
    python tests/benchmarks/steps.py --compile-model          # torch.compile around plain and transformed models
    python tests/benchmarks/steps.py --models gpt vit --batch small large --optimizers sgd adamw
    python tests/benchmarks/steps.py --memory --optimizers adamw    # the peak of memory, in multiples of the parameters
    python tests/benchmarks/steps.py --gpu                    # on a GPU: ResNet-50, a GPT of the size of GPT-2 small

Every row is one model with one pipeline. In each round the plain model, the transformed one, and that of the reference
package (where it is installed and has the rule; else a dash) take a step each, in turn, so that what else the machine
does hits all of them. The row `folded` compares `biofx.fold(bio)` with the original in evaluation mode. The floor is
what the bytes cost that a rule has to move at least if it acts on the update of an optimizer: reads and writes of
tensors of the size of the weights, each timed as half of a copy of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import memory
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx
from models import GPU_MODELS, MODELS, task

FUZZY, VOLUME = "fuzzy-learning-rates{distribution=lognormal}", "volume-dependent-learning-rates"
RULES: dict[str, tuple[str, float]] = {  # the pipeline, and how many times it reads or writes the weights at least
    # A gain: the old weights are copied (2), and old, new and gain are read and the weight is written (4).
    "fuzzy": (FUZZY, 6),
    "fuzzy, 8 bits": (FUZZY.replace("}", ",dtype=uint8}"), 5.25),
    "fuzzy, unstored": (FUZZY.replace("}", ",dtype=unstored}"), 5),
    # Besides: whether all is finite (2), the mean (1), and weight, gradient and gain are read, the gain is written (4).
    "crystallize": ("crystallize", 13),
    "volume": (VOLUME, 7),  # two tables of noise in place of the gain
    "rejuvenate every step": ("rejuvenate", 11),  # finite (2), statistics (1), noise (4), weight and momentum (2 each)
    "rejuvenate every 100": ("rejuvenate{every=100}", 0),
    "dale, project": ("dales-principle{balance=False}", 4),  # finite (2), projection (2)
    "scaling": ("synaptic-scaling", 7),  # one gain for each unit (5), finite (2)
    "exponentiated": ("exponentiated-gradient", 7),  # the old weights (2), old and new read, written (3), finite (2)
    "continual backprop": ("continual-backprop", 3),  # finite (2), the sum over outgoing weights (1)
    "interneurons": ("inhibitory-interneurons", 4),  # finite (2), projection (2)
    "split in 2": ("split-synapses{synapses=2}", 12),  # twice the weights: times 2 (2), old (2), the change (2)
    "fuzzy + volume + crystallize": (f"{FUZZY},{VOLUME},crystallize", 15),
}
FOLDED = "folded, inference"
RECIPES = {"cortex": ("cortex", None)}  # no floor is known

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
}
COLUMNS = ("eager", "compiled", "reference")
Step = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """One row of a table."""

    model: str
    batch: str
    optimizer: str
    rule: str

    def built(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        """The model, its input, and what it is to find."""
        torch.manual_seed(0)
        model, x, y = task(self.model, self.batch)
        return model.to(device), x.to(device), y.to(device)


def step_of(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, act: Step = lambda: None) -> Step:
    """One step of training, with what a loop calls before that of the optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        act()
        optimizer.step()

    return step


def seconds(step: Step, device: str) -> float:
    """How long a step takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of steps that are run in turn, by their names."""
    for step in [*steps.values()] * 3:
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(seconds(step, device))
    return found


def quartiles(times: list[float], plain: list[float]) -> tuple[float, float, float]:
    """The median of the ratios, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(times, plain, strict=True))
    return ratios[len(ratios) // 2], ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]


def measured(job: Job, rounds: int, device: str, *, compile_rules: bool, compile_model: bool) -> dict[str, Any]:
    """The ratios of steps to that of the plain model."""
    model, x, y = job.built(device)
    run: Callable[[nn.Module], Any] = torch.compile if compile_model else lambda each: each
    if job.rule == FOLDED:
        folded = biofx.fold(biofx.transform(model, "fuzzy-learning-rates,split-synapses", example_inputs=(x,)))
        calls = {name: _inference(run(each.eval()), x) for name, each in (("plain", model), ("eager", folded))}
        return _row(in_turn(calls, rounds, device), moves=0)
    pipeline, moves = (RULES | RECIPES)[job.rule]
    bio = biofx.transform(model, pipeline, example_inputs=(x,))
    steps: dict[str, Step] = {}
    for name in ("plain", *COLUMNS[: 1 + compile_rules]):
        each = copy.deepcopy(model if name == "plain" else bio)
        optimizer = OPTIMIZERS[job.optimizer](each.parameters())
        if name != "plain":
            biofx.attach(each, optimizer, compile=name == "compiled")
        steps[name] = step_of(run(each), x, y, optimizer)
    if theirs := reference.converted(model, job.rule):
        each, act = theirs
        steps["reference"] = step_of(run(each), x, y, OPTIMIZERS[job.optimizer](each.parameters()), act)
    weights = [site.raw.detach() for site in biofx.weight_sites(bio).values()]
    copied = [w.clone() for w in weights]
    steps["copy"] = lambda: torch._foreach_copy_(copied, weights)  # as cold as the rules find them
    return _row(in_turn(steps, rounds, device), moves)


def _inference(model: nn.Module, x: Tensor) -> Step:
    def call() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            model(x)

    return call


def _row(times: dict[str, list[float]], moves: float | None) -> dict[str, Any]:
    """What is printed of a row; its floor counts how many times weights are read or written, if that is known."""
    plain = statistics.median(times["plain"])
    copy_time = statistics.median(times.get("copy", [0.0]))
    ratios = {name: quartiles(times[name], times["plain"]) for name in COLUMNS if name in times}
    floor = None if moves is None else 1 + moves * copy_time / 2 / plain
    return {"ratios": ratios, "floor": floor, "plain_ms": 1e3 * plain}


def peaks(job: Job, device: str) -> dict[str, Any]:
    """Memory between steps and at the peak of one, in multiples of the parameters, plain and transformed."""
    found: dict[str, Any] = {}
    pipeline, _ = (RULES | RECIPES)[job.rule]
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    example = torch.ones(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    _train(small, *example, job.optimizer, pipeline)()  # makes the tables of noise
    for name in ("plain", "eager"):
        before = memory.held(device)
        model, x, y = job.built(device)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        step = _train(model, x, y, job.optimizer, pipeline if name == "eager" else None)
        del model
        for _ in range(2):
            step()
        between = memory.held(device) - before
        found[name] = {"held": between / size, "peak": (between + memory.above(step, device)) / size}
        del step, x, y
        gc.collect()
    return found


def _train(model: nn.Module, x: Tensor, y: Tensor, optimizer: str, pipeline: str | None) -> Step:
    """A step that leaves no gradients behind."""
    trained = model if pipeline is None else biofx.transform(model, pipeline, example_inputs=(x,))
    used = OPTIMIZERS[optimizer](trained.parameters())
    if pipeline is not None:
        biofx.attach(trained, used)
    step = step_of(trained, x, y, used)

    def whole() -> None:
        step()
        used.zero_grad()

    return whole


def print_times(rows: list[dict[str, Any]]) -> None:
    """Print the table of times."""
    columns = [name for name in COLUMNS if name == "reference" or any(name in row["ratios"] for row in rows)]
    head = "".join(f"  {name:18}" for name in columns)
    print(f"{'model':10}{'batch':7}{'optimizer':11}{'rules':30}{head}{'floor':>6}  {'plain ms':>8}")
    for row in rows:
        cells = (row["ratios"].get(name) for name in columns)
        ratios = "".join(f"  {'–' if c is None else f'{c[0]:.2f} ({c[1]:.2f}–{c[2]:.2f})':18}" for c in cells)
        own = f"{row['model']:10}{row['batch']:7}{row['optimizer']:11}{row['rule']:30}"
        floor = "–" if row["floor"] is None else f"{row['floor']:.2f}"
        print(f"{own}{ratios}{floor:>6}  {row['plain_ms']:8.1f}")


def print_peaks(rows: list[dict[str, Any]]) -> None:
    """Print the table of memory."""
    print("memory in multiples of the plain model's parameters: between steps, and at the peak of a step")
    print(f"{'model':10}{'batch':7}{'optimizer':11}{'rules':30}{'plain':>14}{'transformed':>14}")
    for row in rows:
        cells = (f"{row[name]['held']:.2f}, {row[name]['peak']:.2f}" for name in ("plain", "eager"))
        own = f"{row['model']:10}{row['batch']:7}{row['optimizer']:11}{row['rule']:30}"
        print(own + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--batch", nargs="+", default=["large"], choices=["small", "large"])
    parser.add_argument("--rules", nargs="+", choices=[*RULES, *RECIPES, FOLDED])
    parser.add_argument("--optimizers", nargs="+", default=["sgd"], choices=OPTIMIZERS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--compile-rules", action="store_true")
    parser.add_argument("--compile-model", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    models = options.models or (GPU_MODELS if options.gpu else ("mlp", "resnet"))
    rules = options.rules or [*RULES, *(RECIPES if options.memory else (FOLDED,))]
    if options.memory and FOLDED in rules:
        parser.error(f"{FOLDED} is measured without --memory only")
    jobs = [Job(m, b, o, r) for m in models for b in options.batch for o in options.optimizers for r in rules]
    compiled = {"compile_rules": options.compile_rules, "compile_model": options.compile_model}
    rows = []
    for job in tqdm(jobs, desc="pipelines"):
        if options.compile_model:
            torch.compiler.reset()  # models of other rows count as variants of the same code
        found = peaks(job, device) if options.memory else measured(job, options.rounds, device, **compiled)
        rows.append({**vars(job), **found})
    where = torch.cuda.get_device_name() if options.gpu else f"{options.threads} CPU threads"
    how = "compiled models" if options.compile_model else "eager models"
    print(f"torch {torch.__version__}, {where}, {how}; time or memory relative to the plain model")
    (print_peaks if options.memory else print_times)(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
