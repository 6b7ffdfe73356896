"""How much longer a training step takes with biofx than without: paired, interleaved runs, medians of ratios.

    python tests/benchmarks/steps.py                # the table on CPU cores
    python tests/benchmarks/steps.py --compile      # and with compiled rules
    python tests/benchmarks/steps.py --gpu          # on a GPU: ResNet-50, a GPT like GPT-2 small
    python tests/benchmarks/steps.py --rules fuzzy all --models mlp --json steps.json

Every row is one model with one pipeline. In each round the plain model and the transformed one take a step each, in
turn, so that what else the machine does hits both. The floor is what the bytes cost that a rule has to move at least if
it acts on the update of an optimizer: reads and writes of tensors of the size of the weights, each timed as half of a
copy of them.
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
    "split in 2": ("split-synapses{synapses=2}", 12),  # twice the weights: times 2 (2), old (2), the change (2)
    "fuzzy + volume + crystallize": (f"{FUZZY},{VOLUME},crystallize", 15),
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


class Bottleneck(nn.Module):
    """A residual block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        is_same = inputs == 4 * width and stride == 1
        self.short = nn.Identity() if is_same else nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return (self.norm3(self.conv3(y)) + self.short(x)).relu()


class ResNet50(nn.Module):
    """The layout of ResNet-50, for images of 224 × 224."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for index in range(count):
                blocks.append(Bottleneck(inputs, 64 << stage, 2 if stage and not index else 1))
                inputs = 4 * 64 << stage
        self.stages, self.head = nn.Sequential(*blocks), nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.norm(self.stem(x)).relu(), 3, 2, 1)
        z: Tensor = self.head(self.stages(y).mean((2, 3)))
        return z


class Transformer(nn.Module):
    """A transformer on tokens, or on patches of images; as it stands, of about 10 million parameters."""

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
GPU_MODELS: dict[str, Builder] = {
    "resnet50": lambda: (
        ResNet50().to(memory_format=torch.channels_last),
        torch.randn(128, 3, 224, 224).contiguous(memory_format=torch.channels_last),
        torch.randint(1000, (128,)),
    ),
    "gpt2": lambda: (Transformer(50257, 768, 12), torch.randint(50257, (8, 1024)), torch.randint(50257, (8,))),
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


def measured(
    name: str, pipeline: str, passes: float, optimizer: str, rounds: int, device: str, *, compiled: bool
) -> dict[str, Any]:
    """The ratio of the step of a transformed model to that of the plain one, with its quartiles."""
    torch.manual_seed(0)
    model, x, y = (MODELS | GPU_MODELS)[name]()
    model, x, y = model.to(device), x.to(device), y.to(device)
    bio = biofx.transform(model, pipeline, example_inputs=(x,))
    plain_model = copy.deepcopy(model)
    steps = [step_of(plain_model, x, y, OPTIMIZERS[optimizer](plain_model.parameters()))]
    for compile_rules in (False, True)[: 1 + compiled]:
        each = copy.deepcopy(bio)
        own = OPTIMIZERS[optimizer](each.parameters())
        biofx.attach(each, own, compile=compile_rules)
        steps.append(step_of(each, x, y, own))
    for step in steps * 3:
        step()
    weights = [site.raw.detach() for site in biofx.weight_sites(bio).values()]
    copied = [w.clone() for w in weights]
    steps.append(lambda: torch._foreach_copy_(copied, weights))  # as cold as the rules find them
    times = [tuple(seconds(step, device) for step in steps) for _ in range(rounds)]
    plain, *_, copy_time = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [sorted(row[column] / row[0] for row in times) for column in range(1, len(steps) - 1)]
    return {
        "model": name,
        "optimizer": optimizer,
        "ratios": [(r[len(r) // 2], r[len(r) // 4], r[3 * len(r) // 4]) for r in ratios],  # eager, compiled
        "floor": 1 + passes * copy_time / 2 / plain,
        "plain_ms": 1e3 * plain,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *GPU_MODELS])
    parser.add_argument("--rules", nargs="+", default=[*RULES], choices=RULES)
    parser.add_argument("--optimizers", nargs="+", default=["sgd"], choices=OPTIMIZERS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    models = options.models or [*(GPU_MODELS if options.gpu else MODELS)]
    jobs = [(m, r, o) for m in models for o in options.optimizers for r in options.rules]
    rows = []
    for model, rule, optimizer in tqdm(jobs, desc="pipelines"):
        job = *RULES[rule], optimizer, options.rounds, device
        rows.append({"rules": rule, **measured(model, *job, compiled=options.compile)})
    where = torch.cuda.get_device_name() if options.gpu else f"{options.threads} CPU threads"
    print(f"torch {torch.__version__}, {where}; step of the transformed model ÷ step of the plain one")
    columns = "".join(f"  {name:18}" for name in ("eager", "compiled")[: 1 + options.compile])
    print(f"{'model':10}{'optimizer':11}{'rules':30}{columns}{'floor':>6}  {'plain ms':>8}")
    for row in rows:
        ratios = "".join(f"  {f'{middle:.2f} ({low:.2f}–{high:.2f})':18}" for middle, low, high in row["ratios"])
        own = f"{row['model']:10}{row['optimizer']:11}{row['rules']:30}"
        print(f"{own}{ratios}{row['floor']:6.2f}  {row['plain_ms']:8.1f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
