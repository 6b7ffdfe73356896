"""What a transform costs: time by the number of nodes, memory by the size of the parameters, and the import of biofx.

    python tests/benchmarks/transform.py                       # the tables of the README
    python tests/benchmarks/transform.py --nodes 100 1600 --models resnet18 --json transform.json
    python tests/benchmarks/transform.py --nodes --models billion --pipelines rejuvenate --inplace yes no

Nodes: chains of small linear layers and rectifiers; CPU seconds of one thread, and the exponent with which they grow.
Models: each row is a process of its own. Its memory is the peak of the resident set above what the model occupies, in
multiples of the bytes of the parameters, and next to it the bytes that the result holds beyond the model's own: its
copy of them, or the synapses in their place, and the state of passes. Large blocks go back to the system when they are
freed, so that this is what is alive.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from models import ResNet

PIPELINES = ("rejuvenate", "fuzzy-learning-rates", "dales-principle{balance=False}", "dales-principle", "cortex")
OPERATIONS = ("symbolic_trace", "transform", "units", "verify", "fold", "summary")


def chain(nodes: int, width: int = 8, bias: bool = True) -> nn.Module:
    """Linear layers and rectifiers in turn."""
    pairs = ((nn.Linear(width, width, bias), nn.ReLU()) for _ in range(nodes // 2))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def gpt2() -> tuple[nn.Module, Tensor]:
    """GPT-2 small, 124 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()), torch.randint(50257, (1, 16))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18": lambda: (ResNet(64), torch.randn(2, 3, 32, 32)),
    "gpt2": gpt2,
    "billion": lambda: (chain(120, 4096, bias=False), torch.randn(2, 4096)),
}


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a function computes, and what it returns."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def by_nodes(nodes: int) -> dict[str, float]:
    """CPU seconds of each operation on a chain."""
    import biofx

    model, x = chain(nodes), torch.randn(2, 8)
    run: dict[str, Callable[[], Any]] = {
        "symbolic_trace": lambda: fx.symbolic_trace(model),
        "transform": lambda: biofx.transform(model, "fuzzy-learning-rates", example_inputs=(x,)),
        "units": lambda: str(biofx.units(model, (x,))),
    }
    found = {name: cpu_seconds(function) for name, function in run.items()}
    bio = found["transform"][1]
    for operation in (biofx.verify, biofx.fold, biofx.summary):
        found[operation.__name__] = cpu_seconds(lambda each=operation: each(bio))  # type: ignore[misc]
    return {"nodes": nodes, **{name: seconds for name, (seconds, _) in found.items()}}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of a line through the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def resident(key: str) -> int:
    """Bytes of the resident set: `VmRSS` now, `VmHWM` at its peak. Linux only."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def measured(name: str, pipeline: str, inplace: bool) -> dict[str, Any]:
    """Time and memory of a transform, in this process."""
    import biofx

    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    biofx.transform(small, pipeline, example_inputs=torch.randn(2, 3, 4, 4))  # imports what is imported at first use
    model, x = MODELS[name]()
    with torch.no_grad():
        model(x)
    gc.collect()
    own, size, before = held(model), sum(p.numel() * p.element_size() for p in model.parameters()), resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    seconds, bio = cpu_seconds(lambda: biofx.transform(model, pipeline, example_inputs=(x,), inplace=inplace))
    peak = resident("VmHWM") - before
    return {
        "model": name,
        "pipeline": pipeline,
        "inplace": inplace,
        "cpu_s": seconds,
        "peak": peak / size,
        "held": (held(bio) - own * inplace) / size,
    }


def in_process_of_its_own(*arguments: str) -> dict[str, Any]:
    """A row of the table of models."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, "-W", "ignore", __file__, "--row", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def import_seconds(name: str, rounds: int = 5) -> float:
    """The least CPU seconds that importing a package takes in a new process."""
    code = f"import time; t = time.process_time(); import {name}; print(time.process_time() - t)"
    runs = (subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True) for _ in range(rounds))
    return min(float(run.stdout) for run in runs)


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured."""
    print(f"torch {torch.__version__}, one thread; CPU seconds")
    if result["nodes"]:
        print(f"\n{'nodes':>8}", *(f"{name:>15}" for name in OPERATIONS))
        for row in result["nodes"]:
            print(f"{row['nodes']:8}", *(f"{row[name]:15.2f}" for name in OPERATIONS))
        print(f"{'exponent':8}", *(f"{result['exponents'].get(name, math.nan):15.2f}" for name in OPERATIONS))
    if result["models"]:
        print(f"\n{'model':10}{'pipeline':32}{'in place':>9}{'seconds':>9}{'peak':>7}{'held':>7}")
    for row in result["models"]:
        where = "yes" if row["inplace"] else "no"
        print(f"{row['model']:10}{row['pipeline']:32}{where:>9}{row['cpu_s']:9.1f}{row['peak']:7.2f}{row['held']:7.2f}")
    print("\nimport", *(f"{name} {seconds:.2f} s" for name, seconds in result["imports"].items()))


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", nargs="*", type=int, default=[100, 400, 1600, 6400, 20000])
    parser.add_argument("--models", nargs="*", default=["resnet18", "gpt2"], choices=MODELS)
    parser.add_argument("--pipelines", nargs="+", default=PIPELINES)
    parser.add_argument("--inplace", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.row:
        name, pipeline, inplace = options.row
        print(json.dumps(measured(name, pipeline, inplace == "yes")))
        return
    warnings.filterwarnings("ignore")
    if options.nodes:
        by_nodes(8)  # warms up
    nodes = [by_nodes(n) for n in tqdm(options.nodes, desc="chains")]
    jobs = [(m, p, i) for m in options.models for p in options.pipelines for i in options.inplace]
    result: dict[str, Any] = {"nodes": nodes, "exponents": {}}
    if len(nodes) > 1:
        sizes = [row["nodes"] for row in nodes]
        result["exponents"] = {name: exponent(sizes, [row[name] for row in nodes]) for name in OPERATIONS}
    result["models"] = [in_process_of_its_own(*job) for job in tqdm(jobs, desc="models")]
    result["imports"] = {name: import_seconds(name) for name in ("torch", "biofx")}
    print_tables(result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
