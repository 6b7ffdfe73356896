"""Random small networks, as a Hypothesis strategy.

A network is built from a *plan*: nested tuples, so that Hypothesis can shrink it, and a failing one can be copied into
a test. Every block keeps the shape of its input, so any plan is a valid network:

    ("residual", ("linear", "tanh"))                    x + tanh(W x + b)
    ("island", ("branches", ("qkv",), ("tied",)))       decides by values which way to go
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models import python_blocks

WIDTH = 4
Plan = tuple[Any, ...]

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu, "none": lambda x: x}


class Linear(nn.Module):
    """A layer and an activation."""

    def __init__(self, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(WIDTH, WIDTH, bias=bias), activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.layer(x))


class Conv(nn.Module):
    """A convolution with groups and padding of some kind, and an activation."""

    def __init__(self, groups: int = 1, padding_mode: str = "zeros", activation: str = "relu") -> None:
        super().__init__()
        self.layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=groups, padding_mode=padding_mode)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.layer(x))


class Resample(nn.Module):
    """Down by a stride and up again by a transposed convolution."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 2, stride=2, groups=groups, bias=False)
        self.up = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu())


class Residual(nn.Module):
    """A shortcut around a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Branches(nn.Module):
    """Two blocks side by side, concatenated and mixed."""

    def __init__(self, left: nn.Module, right: nn.Module, mix: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.mix = left, right, mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.left(x), self.right(x)], dim=1))


class Reused(nn.Module):
    """One block that is applied again and again."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return x


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Linear(WIDTH, WIDTH) if kind == "vectors" else nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(2)
        )
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Functional(nn.Module):
    """Bare parameters: used as they are, scaled, transposed, or by a matrix product."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.5)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "product":
            return x @ self.weight + self.bias
        weight = {
            "plain": self.weight,
            "scaled": self.weight * 0.5,
            "transposed": self.weight.t(),
            "view": self.weight.view(WIDTH // 2, 2, WIDTH).reshape(WIDTH, WIDTH),
        }
        return F.linear(x, weight[self.how], self.bias)


class FunctionalConv(nn.Module):
    """A kernel that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, WIDTH // 2, 3, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding="same", groups=2)


class QKV(nn.Module):
    """Attention over two positions of half the width: one projection, chunks, views and transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 2, 3 * WIDTH // 2).chunk(3, dim=-1)
        attention = (q @ k.transpose(1, 2)).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).contiguous().view(-1, WIDTH))


class Gated(nn.Module):
    """Units that multiply units, from the halves of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(self.layer(x), 2, dim=1)
        return a * torch.sigmoid(b)


class Excite(nn.Module):
    """Channels that are scaled by what all positions say."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.expand(self.squeeze(x.mean((2, 3))).relu()))
        return x * scale[:, :, None, None]


class Island(nn.Module):
    """Goes one way or another, by the values that come in, with a weight of its own for each."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.flatten()[0] > 0:
            return self.inner(x)
        return self.inner(-x) * self.weight.mean()


def build(plan: Plan, kind: str) -> nn.Module:
    """The module of a plan, for `"vectors"` (N, 4) or `"images"` (N, 4, 4, 4)."""
    name, *rest = plan
    images = kind == "images"
    if name == "sequence":
        return nn.Sequential(*(build(inner, kind) for inner in rest))
    if name == "branches":
        mix = nn.Conv2d(2 * WIDTH, WIDTH, 1) if images else nn.Linear(2 * WIDTH, WIDTH)
        return Branches(build(rest[0], kind), build(rest[1], kind), mix)
    if name in ("residual", "island"):
        return {"residual": Residual, "island": Island}[name](build(rest[0], kind))
    if name == "python":
        return python_blocks.Block(build(rest[1], kind), rest[0])
    if name == "reused":
        return Reused(build(rest[0], kind), rest[1])
    if name == "tied":
        return Tied(kind)
    if name == "norm":
        norms = {
            "batch": nn.BatchNorm2d if images else nn.BatchNorm1d,
            "group": lambda width: nn.GroupNorm(2, width),
            "layer": lambda width: nn.LayerNorm([width] * (3 if images else 1)),
        }
        return norms[rest[0]](WIDTH)
    if name == "dropout":
        return nn.Dropout(0.3)
    return {
        "linear": Linear,
        "conv": Conv,
        "resample": Resample,
        "functional": FunctionalConv if images else Functional,
        "qkv": QKV,
        "gated": Gated,
        "excite": Excite,
    }[name](*rest)


class RandomNetwork(nn.Module):
    """Images through blocks, if there are any, then vectors through blocks, then a head; inputs (N, 2, 4, 4).

    Args:
        images: plans of the blocks on images.
        vectors: plans of the blocks on vectors.
        outputs: `"one"`; `"tuple"` or `"dict"` with hidden units as well; or `"twice"`, from two heads.
        flatten: how images become vectors: `"flatten"` or `"mean"` over positions.
    """

    def __init__(
        self, images: tuple[Plan, ...] = (), vectors: tuple[Plan, ...] = (), outputs: str = "one", flatten: str = "mean"
    ) -> None:
        super().__init__()
        self.outputs, self.flatten = outputs, flatten
        self.stem = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.images = nn.ModuleList(build(plan, "images") for plan in images)
        self.bridge = nn.Linear(WIDTH * 16 if flatten == "flatten" else WIDTH, WIDTH)
        self.vectors = nn.Sequential(*(build(plan, "vectors") for plan in vectors))
        self.head = nn.Linear(WIDTH, 3)
        self.second = nn.Linear(WIDTH, 1) if outputs == "twice" else None

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        for block in self.images:
            x = block(x)
        x = x.flatten(1) if self.flatten == "flatten" else x.mean((2, 3))
        hidden = self.vectors(torch.tanh(self.bridge(x)))
        logits = self.head(hidden)
        if self.outputs == "tuple":
            return logits, hidden
        if self.outputs == "dict":
            return {"logits": logits, "state": (hidden, {"mean": hidden.mean(0)})}
        return (logits, self.second(hidden)) if self.second is not None else logits


def around(blocks: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    """Blocks that are made of blocks."""
    return st.one_of(
        st.tuples(st.just("residual"), blocks),
        st.tuples(st.just("branches"), blocks, blocks),
        st.tuples(st.just("reused"), blocks, st.integers(2, 3)),
        st.tuples(st.just("island"), blocks),
        st.tuples(st.just("sequence"), blocks, blocks),
    )


activations = st.sampled_from(sorted(ACTIVATIONS))
either = st.one_of(
    st.just(("tied",)), st.just(("dropout",)), st.tuples(st.just("norm"), st.sampled_from(["batch", "group", "layer"]))
)
image_blocks: st.SearchStrategy[Plan] = st.recursive(
    st.one_of(
        st.tuples(st.just("conv"), st.sampled_from([1, 2, 4]), st.sampled_from(["zeros", "circular"]), activations),
        st.tuples(st.just("resample"), st.sampled_from([1, 2])),
        st.sampled_from([("functional",), ("excite",)]),
        either,
    ),
    around,
    max_leaves=4,
)
vector_blocks: st.SearchStrategy[Plan] = st.recursive(
    st.one_of(
        st.tuples(st.just("linear"), activations, st.booleans()),
        st.tuples(st.just("functional"), st.sampled_from(["plain", "scaled", "transposed", "view", "product"])),
        st.sampled_from([("qkv",), ("gated",)]),
        either,
    ),
    around,
    max_leaves=4,
)


def with_python(blocks: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    """Blocks around which Python does what no graph holds."""
    return st.tuples(st.just("python"), st.sampled_from(python_blocks.KINDS), blocks).filter(_pytorch_runs_it)


def _pytorch_runs_it(plan: Plan) -> bool:
    """Whether PyTorch can run a block: in forward mode, batch norm counts nothing, and no slope or checkpoint works."""
    return plan[1] != "forward_mode" or not any(word in str(plan) for word in ("'batch'", "'checkpoint'", "'slopes'"))


plans: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "images": st.lists(image_blocks, max_size=2).map(tuple),
        "vectors": st.lists(vector_blocks, max_size=3).map(tuple),
        "outputs": st.sampled_from(["one", "tuple", "dict", "twice"]),
        "flatten": st.sampled_from(["mean", "flatten"]),
    }
)
"""Arguments of `RandomNetwork`."""

python_plans: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "images": st.lists(st.one_of(image_blocks, with_python(image_blocks)), max_size=1).map(tuple),
        "vectors": st.lists(
            st.one_of(with_python(vector_blocks), with_python(with_python(vector_blocks))), min_size=1, max_size=2
        ).map(tuple),
    }
)
"""The same, with blocks in which Python does what no graph holds."""
