"""Networks of a few hundred weights. Module-level classes, so that they can be pickled."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, (7,)),
    "conv2d": (nn.Conv2d, (7, 7)),
    "conv3d": (nn.Conv3d, (5, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d, (7,)),
    "conv_transpose2d": (nn.ConvTranspose2d, (5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d, (3, 3, 3)),
}
GROUPS = {"dense": 1, "grouped": 2, "depthwise": 4}


def layer_and_input(kind: str, grouping: str = "dense", dtype: torch.dtype = torch.float32, **options):
    """One weight-owning layer of a kind, and a batch for it."""
    if kind == "linear":
        return nn.Linear(4, 8, dtype=dtype, **options), torch.randn(3, 4, dtype=dtype)
    cls, spatial = CONVOLUTIONS[kind]
    layer = cls(4, 8, kernel_size=3, groups=GROUPS[grouping], dtype=dtype, **options)
    return layer, torch.randn(3, 4, *spatial, dtype=dtype)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ConvNet(nn.Module):
    """Convolutions with batch norm, pooling and dropout, and a linear head; inputs (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = F.dropout(F.relu(self.depthwise(x)), 0.5, self.training)
        return self.head(x.flatten(1))


class Functional(nn.Module):
    """Weights that are bare parameters, used by functional operators."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 2, 3) * 0.3)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 6) * 0.3), nn.Parameter(torch.randn(3, 8) * 0.3)])
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel, padding="same", groups=2).relu().mean(-1)
        x = F.linear(input=x, weight=self.weights[0], bias=self.bias).relu()
        return F.linear(x, self.weights[1])


class Reused(nn.Module):
    """One layer that is applied three times, and two layers tied to one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return self.second(torch.tanh(self.first(x)))


class Residual(nn.Module):
    """Two branches that meet again, with keyword-only and default arguments, and a dict for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Tensor]:
        hidden = x + torch.relu(self.inner(x)) * self.scale
        return {"hidden": hidden, "logits": self.outer(hidden) + shift}


class Chaotic(nn.Module):
    """A network of firing rates that amplifies rounding: after 300 steps its outputs are those of the last digits."""

    def __init__(self, units: int = 200) -> None:
        super().__init__()
        self.rec, self.out = nn.Linear(units, units, bias=False), nn.Linear(units, 2)
        nn.init.normal_(self.rec.weight, std=4 / units**0.5)

    def forward(self, h: Tensor, steps: int = 300) -> Tensor:
        """The readout after some steps from a state."""
        for _ in range(steps):
            h = h + 0.5 * (self.rec(torch.tanh(h)) - h)
        return self.out(h)


def keep_logits(module: nn.Module, args: object, output: dict[str, Tensor]) -> None:
    """A forward hook."""
    module.hooked = output["logits"].detach()


ZOO = {
    "mlp": (lambda: mlp(4, 8, 6, 3), (5, 4)),
    "convnet": (ConvNet, (5, 1, 8, 8)),
    "functional": (Functional, (5, 4, 7)),
    "reused": (Reused, (5, 4)),
    "residual": (Residual, (5, 4)),
}
