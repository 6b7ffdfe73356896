"""Modules that symbolic tracing cannot follow, each for another reason, inside of networks of a few weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint


class Branch(nn.Module):
    """Control flow on a value; input and output (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) if x.sum() > 0 else self.b(torch.tanh(self.a(x)))


class Loop(nn.Module):
    """Iteration over the rows of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.step(row)) for row in x])


class Sizes(nn.Module):
    """len() and int() of what it is given, numpy, and an assignment to a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(np.sqrt(len(x))) / int(x.shape[0])
        y = self.mix(x * scale)
        y[:, 0] = 1.0
        return y


class Nested(nn.Module):
    """An island inside of an island, and a traceable child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Branch(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x)) if len(x) else x


@dataclass
class Result:
    """What an island returns."""

    hidden: Tensor
    extra: dict[str, Tensor]


class Structured(nn.Module):
    """Takes keyword arguments and `*args`, and returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, *more: Tensor, scale: float, shift: Tensor | None = None, **others: Tensor) -> Result:
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        y = self.fc(x) * scale + sum(more) + sum(others.values())
        return Result(y if shift is None else y + shift, {"twice": 2 * y, "pair": (y, y + 1)[1]})


class Structures(nn.Module):
    """Hands structures to an island, and takes what it returns apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Structured(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        result = self.inner(x, x, 2 * x, scale=0.5, shift=x, other=x)
        return {"y": self.head(result.hidden), "twice": result.extra["twice"], "pair": result.extra["pair"]}


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.a(x), self.b(x)) if x.mean() < 10 else (x, x)


class Unpacks(nn.Module):
    """Takes a tuple of an island apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(x)
        return self.head(a * b)


class Iterates(nn.Module):
    """Iterates over what an island returns, so it is one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(part for part in self.pair(x)))


class Reads(nn.Module):
    """Reads the weights of its children directly, one of them tied to another, and calls other methods than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.second.weight

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first.weight).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        if x.sum() < 0:
            return x
        return F.linear(x, self.second.weight, self.second.bias) + self.last(x)


class CallsMethods(nn.Module):
    """Calls a method of a child that takes decisions."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Reads(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child.encode(x)
        return self.head(self.child(y) if y.sum() > 0 else y)


class Shared(nn.Module):
    """One island called twice, and a weight inside of it that is used outside of it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.inner(x)), self.inner.a.weight)


class Hidden(nn.Module):
    """Keeps a module of its parent where nobody registers it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.fc, self.others = nn.Linear(4, 4), [other]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.others[0](x)) if len(x) else x


class HasHidden(nn.Module):
    """Has a child that refers to another child."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.child = Hidden(self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.encoder(x))


class Checkpointed(nn.Module):
    """Computes its activations again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = Branch(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class CheckpointedFunction(nn.Module):
    """Computes a function of its own again in the backward pass, one that reads a weight of a child."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.fc, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        return checkpoint(lambda y: torch.tanh(y @ self.fc.weight) @ self.fc.weight.T, x, use_reentrant=self.reentrant)


class Registered(nn.Module):
    """Finds weights by their names, and calls a child with other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        others = {name: 1.5 * parameter for name, parameter in self.b.named_parameters()}
        y = functional_call(self.b, others, (F.linear(x, self.get_parameter("a.weight")),))
        y = y @ self.a._parameters["weight"] + self.b(x)
        return y + sum(parameter.square().sum() for parameter in self.parameters())


class Hooked(nn.Module):
    """Weights that hooks of PyTorch compute, and one of the cell of which they compute it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.b, self.c = old_weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4))
        self.rnn = prune.l1_unstructured(nn.RNN(4, 4, batch_first=True), "weight_hh_l0", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.c(torch.tanh(self.b(self.a(x))))[None])[0] if len(x) else x


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """`torch.nn.utils.weight_norm`, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        return self(torch.tanh(self.fc(x)), times - 1) if times else x


class Kernels(nn.Module):
    """Convolutions of several kinds behind a decision."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(1, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(4, 4, 3, padding="same", groups=2)
        self.down = nn.ConvTranspose1d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.grouped(self.up(x[:, None])).relu())[:, 0] if len(x) else x


class Recurrent(nn.Module):
    """A recurrent layer of torch.nn; input (N, 4) is one sequence for each of 2 features."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(-1, 2, 2))[0])


class Cell(nn.Module):
    """A recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.cell(x)
        return hidden


class Attention(nn.Module):
    """Attention of torch.nn over the rows of its input."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        y, weights = self.attention(x, x, x)
        return y + weights.sum()


class Encoder(nn.Module):
    """The transformer layers of torch.nn, which have a path of their own in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[None])


class Pairs(nn.Module):
    """A bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, 2 * x)


class Tokens(nn.Module):
    """Embeddings behind a decision; a sparse one and one that renormalises itself among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.bag = nn.EmbeddingBag(5, 4)
        self.sparse = nn.Embedding(5, 4, sparse=True)
        self.bounded = nn.Embedding(5, 4, max_norm=1.0)
        self.own = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.abs().long().clamp(max=4)
        if not len(x):
            return x
        embedded = self.embedding(tokens) + self.sparse(tokens) + self.bounded(tokens)
        return embedded.sum(1) @ self.own + self.bag(tokens)


class Around(nn.Module):
    """A network with one of the above in its middle."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(3, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x))


ISLANDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "branch": (Branch, ["inner"]),
    "loop": (Loop, ["inner"]),
    "sizes": (Sizes, ["inner"]),
    "nested": (Nested, ["inner"]),
    "structures": (Structures, ["inner.inner"]),
    "tuple": (Unpacks, ["inner.pair"]),
    "iterates": (Iterates, ["inner"]),
    "reads": (Reads, ["inner"]),
    "calls_methods": (CallsMethods, ["inner"]),
    "shared": (Shared, ["inner.inner"]),
    "hidden": (HasHidden, ["inner.child"]),
    "checkpointed": (lambda: Checkpointed(False), ["inner"]),
    "checkpointed_reentrant": (lambda: Checkpointed(True), ["inner"]),
    "checkpointed_function": (lambda: CheckpointedFunction(False), ["inner"]),
    "checkpointed_function_reentrant": (lambda: CheckpointedFunction(True), ["inner"]),
    "registered": (Registered, ["inner"]),
    "hooked": (Hooked, ["inner"]),
    "recursive": (Recursive, []),
    "kernels": (Kernels, ["inner"]),
    "lstm": (lambda: Recurrent(nn.LSTM(2, 5, 2, bidirectional=True, proj_size=3), 6), ["inner.rnn"]),
    "gru": (lambda: Recurrent(nn.GRU(2, 5, bias=False, batch_first=True), 5), ["inner.rnn"]),
    "rnn": (lambda: Recurrent(nn.RNN(2, 5), 5), ["inner.rnn"]),
    "cell": (Cell, ["inner.cell"]),
    "attention": (Attention, ["inner.attention"]),
    "attention_separate": (lambda: Attention(kdim=4, vdim=4, add_bias_kv=True), ["inner.attention"]),
    "encoder": (Encoder, ["inner.encoder"]),
    "bilinear": (Pairs, []),
    "tokens": (Tokens, ["inner"]),
}
"""Modules to put into `Around`, each with the paths of the islands that there are then."""
