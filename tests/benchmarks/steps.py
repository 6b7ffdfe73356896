"""How much longer a training step takes with biofx than without: paired, interleaved runs, medians of ratios.

    python tests/benchmarks/steps.py                # the table of DESIGN on CPU cores
    python tests/benchmarks/steps.py --gpu          # on a GPU
    python tests/benchmarks/steps.py --rules fuzzy all --models mlp --json steps.json

Every row is one model with one pipeline. In each round the plain model and the transformed one take a step each, in
turn, so that what else the machine does hits both. The floor is what the bytes cost that a rule has to move at least:
reads and writes of tensors of the weights' size, each timed as half of a copy of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import biofx

FUZZY, VOLUME = "fuzzy-learning-rates{distribution=lognormal}", "volume-dependent-learning-rates"
RULES: dict[str, tuple[str, int]] = {  # the pipeline, and how many times it reads or writes the weights at least
    "fuzzy": (FUZZY, 3),
    "crystallize": ("crystallize", 8),
    "volume": (VOLUME, 5),
    "rejuvenate every step": ("rejuvenate", 5),
    "rejuvenate every 100": ("rejuvenate{every=100}", 0),
    "dale, project": ("dales-principle{balance=False}", 2),
    "scaling": ("synaptic-scaling", 0),
    "split in 2": ("split-synapses{synapses=2}", 6),
    "fuzzy + volume + crystallize": (f"{FUZZY},{VOLUME},crystallize", 9),
}


class Block(nn.Module):
    """A residual block with two 3×3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        is_same = inputs == outputs and stride == 1
        self.short = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


class ResNet(nn.Module):
    """The layout of ResNet-18, for images of 32 × 32."""

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base, base, 2 * base, 4 * base, 8 * base]
        self.stem, self.norm = nn.Conv2d(3, base, 3, padding=1, bias=False), nn.BatchNorm2d(base)
        stages = [
            block for i, (a, b) in enumerate(pairwise(widths)) for block in (Block(a, b, 1 + (i > 0)), Block(b, b, 1))
        ]
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stages(self.norm(self.stem(x)).relu()).mean((2, 3)))
        return y


class Transformer(nn.Module):
    """A transformer on tokens, or on patches of images, of about 10 million parameters."""

    def __init__(self, tokens: int | None, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width) if tokens else nn.Linear(3 * 4 * 4, width)
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens or 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embed(x)).mean(1))
        return y


def mlp() -> nn.Module:
    """A perceptron with little arithmetic for each weight: the hardest case."""
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


Builder = Callable[[], tuple[nn.Module, Tensor, Tensor]]
MODELS: dict[str, Builder] = {
    "mlp": lambda: (mlp(), torch.randn(128, 784), torch.randint(10, (128,))),
    "resnet": lambda: (ResNet(16), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))),
    "gpt": lambda: (Transformer(1000), torch.randint(1000, (4, 64)), torch.randint(1000, (4,))),
    "vit": lambda: (Transformer(None), torch.randn(8, 64, 48), torch.randint(10, (8,))),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


def step_of(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One step of training."""

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """How long a step takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(name: str, pipeline: str, passes: int, optimizer: str, rounds: int, device: str) -> dict[str, Any]:
    """The ratio of the step of a transformed model to that of the plain one, with its quartiles."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    model, x, y = model.to(device), x.to(device), y.to(device)
    bio = biofx.transform(model, pipeline, example_inputs=(x,))
    steps = []
    for each in (copy.deepcopy(model), bio):
        own = OPTIMIZERS[optimizer](each.parameters())
        if each is bio:
            biofx.attach(bio, own)
        steps.append(step_of(each, x, y, own))
    for step in steps * 3:
        step()
    weights = [site.raw.detach() for site in biofx.weight_sites(bio).values()]
    copied = [w.clone() for w in weights]
    steps.append(lambda: torch._foreach_copy_(copied, weights))  # as cold as the rules find them
    times = [tuple(seconds(step, device) for step in steps) for _ in range(rounds)]
    ratios = sorted(bio_time / plain_time for plain_time, bio_time, _ in times)
    plain, _, copy_time = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "model": name,
        "optimizer": optimizer,
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[3 * len(ratios) // 4],
        "floor": 1 + passes * copy_time / 2 / plain,
        "plain_ms": 1e3 * plain,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--rules", nargs="+", default=[*RULES], choices=RULES)
    parser.add_argument("--optimizers", nargs="+", default=["sgd"], choices=OPTIMIZERS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    jobs = [(m, r, o) for m in options.models for o in options.optimizers for r in options.rules]
    rows = []
    for model, rule, optimizer in tqdm(jobs, desc="pipelines"):
        rows.append({"rules": rule, **measured(model, *RULES[rule], optimizer, options.rounds, device)})
    where = torch.cuda.get_device_name() if options.gpu else f"{options.threads} CPU threads"
    print(f"torch {torch.__version__}, {where}; step of the transformed model ÷ step of the plain one")
    print(f"{'model':8}{'optimizer':11}{'rules':32}{'ratio':>7}  {'quartiles':13}{'floor':>6}  {'plain ms':>8}")
    for row in rows:
        spread = f"{row['low']:.2f}–{row['high']:.2f}"
        print(
            f"{row['model']:8}{row['optimizer']:11}{row['rules']:32}{row['ratio']:7.2f}  {spread:13}{row['floor']:6.2f}"
            f"  {row['plain_ms']:8.1f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
