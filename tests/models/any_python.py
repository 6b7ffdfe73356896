"""Networks whose forward symbolic tracing cannot follow: decisions on shapes, loops, containers, side effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShapeBranch(nn.Module):
    """Takes another path for long inputs, and asserts something of all."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long, self.head = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return self.head(F.dropout((self.long(x) if x.shape[1] > 5 else self.short(x)).relu(), 0.5, self.training))


class Loop(nn.Module):
    """A recurrent network in Python, over the steps of a sequence of known length, with one layer for all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(4, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            state = torch.tanh(self.inner(step) + self.outer(state))
        return self.norm(state)


class Containers(nn.Module):
    """A dict that contains a list, a keyword-only argument, more arguments and more keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def forward(self, batch: dict, *others: Tensor, scale: float = 1.0, **named: Tensor) -> dict:
        total = sum((self.right(x) for x in [*batch["more"], *others]), self.left(batch["x"]))
        results = {f"{name}_right": self.right(x) for name, x in named.items()}
        return {"sum": total * scale, "parts": [total.exp(), None], **results}


@dataclass
class Prediction:
    """A plain dataclass."""

    logits: Tensor
    hidden: Tensor | None = None


class Pair(NamedTuple):
    """A named tuple."""

    first: Tensor
    second: Prediction


class Returns(nn.Module):
    """Returns a named tuple that contains a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Pair:
        hidden = self.fc(x).relu()
        return Pair(hidden, Prediction(logits=self.head(hidden)))


class Auxiliary(nn.Module):
    """Has a head that is used in training only, noise in training only, and another result in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        if not self.training:
            return self.head(hidden)
        hidden = hidden + 0.1 * torch.randn_like(hidden)
        return self.head(hidden), self.auxiliary(hidden)


class Counting(nn.Module):
    """Counts its calls in a buffer, averages in another one that is not saved, and has constants of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.fc.weight
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        y = self.fc(x - self.average) + self.constant.to(x.dtype) + torch.tensor([1, 2, 3, 4]).to(x.dtype)
        return self.tied(torch.tanh(y)) * self.calls


class Gated(nn.Module):
    """Uses a gate that gradients do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
        return self.fc(x) * gate
