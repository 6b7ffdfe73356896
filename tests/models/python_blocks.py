"""Blocks that do what no graph holds, or what a trace easily gets wrong, around a block of a random network.

Each keeps the shape of its input; inputs are vectors (N, 4) or images (N, 4, 4, 4).
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SCHEDULE = {"temperature": 1.5}


class Block(nn.Module):
    """Does something around an inner block, which `kind` says."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind
        self.calls, self.options, self.last = 0, {"scale": 0.5}, torch.zeros(())
        self.state = torch.zeros(())  # not a buffer
        self.register_buffer("count", torch.zeros(()))
        if kind == "hook":
            inner.register_forward_hook(lambda module, args, result: result * 1.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, f"_{self.kind}")(x)
        return result

    def _hook(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def _memory(self, x: Tensor) -> Tensor:
        memory = torch.zeros_like(x)
        memory[:, :2] = self.inner(x)[:, :2]
        memory.index_add_(1, torch.arange(2, 4), x[:, 2:])
        return memory

    def _constant(self, x: Tensor) -> Tensor:
        steps = torch.arange(4.0).view(1, 4, *[1] * (x.dim() - 2)).to(x)
        steps += 1
        return self.inner(x) * steps

    def _optional(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.inner(x)
        return y if mask is None else y * mask

    def _structure(self, x: Any) -> Tensor:
        parts = {"x": x, "none": None}
        match parts:
            case {"none": None, "x": value} if torch.is_tensor(value):
                return self.inner(value) * len(parts)
        return x

    def _attribute(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.options["scale"] * SCHEDULE["temperature"]

    def _counter(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls

    def _buffer(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x) * self.count.clone()

    def _remembers(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.last
        self.last = y.detach().mean()
        return y

    def _state_in_place(self, x: Tensor) -> Tensor:
        self.state += 1
        return self.inner(x) * self.state.clone()

    def _caught(self, x: Tensor) -> Tensor:
        try:
            factor = 2.0 if x.sum() > 0 else 3.0
        except Exception:  # noqa: BLE001 - as libraries do it
            factor = 4.0
        return self.inner(x) * factor

    def _forward_mode(self, x: Tensor) -> Tensor:
        y, tangent = torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))
        return y + tangent  # type: ignore[no-any-return]

    def _noise(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.1 * torch.randn_like(x))

    def _python_noise(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.1 * random.random())

    def _training(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(x)) if self.training else self.inner(x).relu()

    def _gradients(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2.0 if torch.is_grad_enabled() else 3.0)

    def _without_gradients(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.inner(x)
        return self.inner(x) - 0.5 * target

    def _checkpoint(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    def _loop(self, x: Tensor) -> Tensor:
        steps = 0
        while steps < 3 and float(x.detach().abs().sum()) > 1e-3:
            x, steps = torch.tanh(self.inner(x)), steps + 1
        return x

    def _in_place(self, x: Tensor) -> Tensor:
        y = self.inner(x).clone()
        y.mul_(0.5).add_(x)
        y[y > 1] = 1
        return y

    def _shape(self, x: Tensor) -> Tensor:
        batch, *rest = x.shape
        return self.inner(x).reshape(len(x), -1).view(batch, *rest)

    def _weight(self, x: Tensor) -> Tensor:
        weights = [m.weight for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return self.inner(x) + sum((w.square().mean() for w in weights), torch.zeros(()).to(x))

    def _slopes(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.inner(x)
        value = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(value).tanh().sum(), value, create_graph=True)
        return self.inner(x) + 0.1 * slope


KINDS = sorted(name.removeprefix("_") for name, value in vars(Block).items() if name[0] == "_" and name[1] != "_")


class StochasticDepth(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full_like(x, 0.5))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), StochasticDepth()

    def forward(self, x):
        return F.dropout(x + self.drop(self.fc(x)), 0.5, self.training)
