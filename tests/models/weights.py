"""Every kind of operator on a weight, and every way in which a weight gets there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

aten = torch.ops.aten
Function = Callable[[Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One parameter, and what is done with it."""

    def __init__(self, shape: tuple[int, ...], function: Function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Network(nn.Module):
    """A layer with a readout, so that it is no output layer."""

    def __init__(self, layer: nn.Module, unit_axis: int, units: int) -> None:
        super().__init__()
        self.layer, self.unit_axis = layer, unit_axis
        self.head = nn.Linear(units, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).movedim(self.unit_axis, -1))


@dataclass(frozen=True)
class Kind:
    """An operator on a weight.

    Attributes:
        shape: the weight's shape.
        function: function(x, weight).
        inputs: shape of x.
        pre, post: the weight's axes that run over presynaptic and postsynaptic units.
        source, output: the axes of x and of the result that run over the same units.
        name: what the summary calls the operator.
    """

    shape: tuple[int, ...]
    function: Function
    inputs: tuple[int, ...]
    pre: int
    post: int
    source: int
    output: int
    name: str


def _kind(
    name: str, shape: Any, function: Function, inputs: Any, axes: Any, source: int = -1, output: int = -1
) -> Kind:
    return Kind(shape, function, inputs, *axes, source, output, name)


BIAS = torch.arange(8.0)
KINDS = {
    "linear": _kind("linear", (8, 4), F.linear, (3, 5, 4), (1, 0)),
    "x @ W": _kind("matmul", (4, 8), lambda x, w: x @ w, (3, 5, 4), (0, 1)),
    "torch.matmul": _kind("matmul", (4, 8), lambda x, w: torch.matmul(input=x, other=w), (3, 4), (0, 1)),
    "x.matmul(W)": _kind("matmul", (4, 8), lambda x, w: x.matmul(w), (3, 5, 4), (0, 1)),
    "x.mm(W)": _kind("mm", (4, 8), lambda x, w: x.mm(w), (3, 4), (0, 1)),
    "W @ x": _kind("matmul", (8, 4), lambda x, w: w @ x, (3, 4, 5), (1, 0), -2, -2),
    "torch.mm(W, x)": _kind("mm", (8, 4), lambda x, w: torch.mm(w, x), (4, 5), (1, 0), -2, -2),
    "torch.mv(W, x)": _kind("mv", (8, 4), lambda x, w: torch.mv(w, x), (4,), (1, 0)),
    "addmm": _kind("addmm", (4, 8), lambda x, w: torch.addmm(BIAS.to(x), x, w), (3, 4), (0, 1)),
    "b.addmm(x, W)": _kind("addmm", (4, 8), lambda x, w: BIAS.to(x).addmm(x, w, alpha=0.5), (3, 4), (0, 1)),
    "einsum": _kind("einsum", (8, 4), lambda x, w: torch.einsum("bti,oi->bto", x, w), (3, 5, 4), (1, 0)),
    "einsum, implicit": _kind("einsum", (4, 8), lambda x, w: torch.einsum("bi,io", x, w), (3, 4), (0, 1)),
    "einsum, ellipsis": _kind("einsum", (4, 8), lambda x, w: torch.einsum("io,...i->...o", w, x), (3, 5, 4), (0, 1)),
    "einsum, o first": _kind(
        "einsum", (4, 8), lambda x, w: torch.einsum("io, i...->o...", w, x), (4, 5, 3), (0, 1), 0, 0
    ),
    "einsum, open axes": _kind("einsum", (4, 8), lambda x, w: torch.einsum("bi,i...->b...", x, w), (3, 4), (0, 1)),
    "aten.linear": _kind("linear", (8, 4), aten.linear.default, (3, 4), (1, 0)),
    "aten.mm": _kind("mm", (4, 8), aten.mm.default, (3, 4), (0, 1)),
    "aten.matmul": _kind("matmul", (4, 8), aten.matmul.default, (3, 5, 4), (0, 1)),
    "aten.addmm": _kind("addmm", (4, 8), lambda x, w: aten.addmm.default(BIAS.to(x), x, w), (3, 4), (0, 1)),
    "aten.einsum": _kind("einsum", (4, 8), lambda x, w: aten.einsum.default("bi,io->bo", [x, w]), (3, 4), (0, 1)),
    "aten.conv2d": _kind("conv2d", (8, 4, 3, 3), aten.conv2d.default, (2, 4, 7, 7), (1, 0), -3, -3),
    "aten.conv1d.padding": _kind(
        "conv1d", (8, 4, 3), lambda x, w: aten.conv1d.padding(x, w, None, [1], "same"), (2, 4, 7), (1, 0), -2, -2
    ),
    "aten.conv_transpose2d": _kind(
        "conv_transpose2d", (4, 8, 3, 3), aten.conv_transpose2d.input, (2, 4, 5, 5), (0, 1), -3, -3
    ),
    "aten.convolution": _kind(
        "conv1d",
        (8, 4, 3),
        lambda x, w: aten.convolution.default(x, w, None, [1], [0], [1], False, [0], 1),
        (2, 4, 7),
        (1, 0),
        -2,
        -2,
    ),
    "aten.convolution, transposed": _kind(
        "conv_transpose1d",
        (4, 8, 3),
        lambda x, w: aten.convolution.default(x, w, None, [1], [0], [1], True, [0], 1),
        (2, 4, 7),
        (0, 1),
        -2,
        -2,
    ),
}
PATHS = {
    "W.t()": _kind("linear", (4, 8), lambda x, w: F.linear(x, w.t()), (3, 4), (0, 1)),
    "x @ W.T": _kind("matmul", (8, 4), lambda x, w: x @ w.T, (3, 5, 4), (1, 0)),
    "x @ W.mT": _kind("matmul", (8, 4), lambda x, w: x @ w.mT, (3, 5, 4), (1, 0)),
    "permute": _kind(
        "conv2d", (3, 3, 4, 8), lambda x, w: F.conv2d(x, w.permute(3, 2, 0, 1)), (2, 4, 7, 7), (2, 3), -3, -3
    ),
    "transpose, contiguous": _kind(
        "linear", (4, 8), lambda x, w: F.linear(x, w.transpose(0, 1).contiguous()), (3, 4), (0, 1)
    ),
    "view": _kind("linear", (8, 4, 1, 1), lambda x, w: F.linear(x, w.view(8, 4)), (3, 4), (1, 0)),
    "reshape": _kind("conv1d", (8, 4), lambda x, w: F.conv1d(x, w.reshape(8, 4, 1)), (2, 4, 7), (1, 0), -2, -2),
    "unsqueeze": _kind("conv1d", (8, 4), lambda x, w: F.conv1d(x, w.unsqueeze(-1)), (2, 4, 7), (1, 0), -2, -2),
    "squeeze": _kind("linear", (8, 1, 4), lambda x, w: F.linear(x, w.squeeze(1)), (3, 4), (2, 0)),
    "expand": _kind(
        "bmm", (4, 8), lambda x, w: torch.bmm(x, w.unsqueeze(0).expand(x.size(0), -1, -1)), (3, 5, 4), (0, 1)
    ),
    "cast": _kind("linear", (8, 4), lambda x, w: F.linear(x, w.to(x.dtype)), (3, 4), (1, 0)),
    "half and back": _kind("linear", (8, 4), lambda x, w: F.linear(x, w.float().type_as(x)), (3, 4), (1, 0)),
    "gather": _kind("linear", (8, 4), lambda x, w: F.linear(x, w[list(range(8))]), (3, 4), (1, 0)),
    "mask": _kind("linear", (8, 4), lambda x, w: F.linear(x, w.triu(-7)), (3, 4), (1, 0)),
    "scale": _kind("linear", (8, 4), lambda x, w: F.linear(x, w * 0.25), (3, 4), (1, 0)),
    "scale from the left": _kind("linear", (8, 4), lambda x, w: F.linear(x, 2 * w / 3), (3, 4), (1, 0)),
    "normalize": _kind("linear", (8, 4), lambda x, w: F.linear(x, F.normalize(w, dim=1)), (3, 4), (1, 0)),
    "aten.t": _kind("linear", (4, 8), lambda x, w: aten.linear.default(x, aten.t.default(w)), (3, 4), (0, 1)),
    "flatten and unflatten": _kind(
        "linear", (8, 4), lambda x, w: F.linear(x, w.flatten().unflatten(0, (8, 4))), (3, 4), (1, 0)
    ),
}


class Conv1D(nn.Module):
    """GPT-2's linear layer, with the weight the other way round."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * 0.3)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.n_out,)  # noqa: RUF005 - as it is written there
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class FeedForward(nn.Module):
    """GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(16, 4), Conv1D(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)))


class TiedLanguageModel(nn.Module):
    """Tokens are embedded and predicted by one weight."""

    def __init__(self, vocabulary: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embedding(tokens))))


class FusedAttention(nn.Module):
    """Queries, keys and values from the parts of one weight; the parts may read two sequences."""

    def __init__(self, width: int = 4, crossed: bool = False) -> None:
        super().__init__()
        self.crossed = crossed
        self.embed = nn.Linear(3, width)
        self.context = nn.Linear(3, width)
        self.qkv = nn.Parameter(torch.randn(3 * width, width) * 0.5)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = F.relu(self.embed(x)), F.relu(self.context(y))
        w_q, w_k, w_v = self.qkv.chunk(3)
        context = y if self.crossed else x
        q, k, v = F.linear(x, w_q), F.linear(context, w_k), F.linear(context, w_v)
        return self.out(F.softmax(q @ k.mT, -1) @ v)


class LoRA(nn.Module):
    """A frozen weight and a low-rank change, each applied on its own or merged before."""

    def __init__(self, merged: bool, n_in: int = 6, n_out: int = 5, rank: int = 2) -> None:
        super().__init__()
        self.merged = merged
        self.base = nn.Parameter(torch.randn(n_out, n_in) * 0.3, requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, n_in) * 0.3)
        self.b = nn.Parameter(torch.randn(n_out, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base + 0.5 * (self.b @ self.a))
        return F.linear(x, self.base) + 0.5 * F.linear(F.linear(x, self.a), self.b)


class LearnedScale(nn.Module):
    """A weight whose rows are scaled by learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4) * 0.5)
        self.scale = nn.Parameter(torch.rand(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.scale)


class StandardisedConv(nn.Conv2d):
    """A convolution with a standardised kernel."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Collections(nn.Module):
    """Weights in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(4, 6) * 0.4, torch.randn(6, 6) * 0.4])
        self.heads = nn.ParameterDict({"mean": torch.randn(6, 2) * 0.4, "scale": torch.randn(2, 6) * 0.4})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = torch.relu(x @ weight)
        return torch.addmm(F.linear(x, self.heads["scale"]), x, self.heads["mean"])


class Experts(nn.Module):
    """Experts in one weight, each of which reads units of its own."""

    def __init__(self, experts: int = 3, n_in: int = 4, n_out: int = 6) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, n_in, n_out) * 0.4)
        self.w2 = nn.Parameter(torch.randn(experts, n_out, n_in) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(F.relu(x @ self.w1), self.w2)


class HeadProjection(nn.Module):
    """Heads as an axis of the weight, on the way out of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, 2, 3) * 0.4)
        self.o = nn.Parameter(torch.randn(2, 3, 4) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        heads = F.relu(torch.einsum("btd,dhk->bhtk", x, self.q))
        return torch.einsum("bhtk,hkd->btd", heads, self.o)


class Bilinear(nn.Module):
    """Two activations, multiplied with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 5)
        self.pair = nn.Bilinear(6, 5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.pair(self.a(x), self.b(x))))


class Words(nn.Module):
    """Words and bags of words."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, **options)
        self.bags = nn.EmbeddingBag(9, 6, **{k: v for k, v in options.items() if k != "padding_idx"})
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.words(tokens).mean(1) + self.bags(tokens)))


class Readout(nn.Module):
    """A vector of weights that belong to one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.score = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) @ self.score


def pruned() -> nn.Sequential:
    """Layers whose weights are multiplied with masks, one of them twice."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2], "weight", 0.3)
    prune.ln_structured(model[2], "weight", 0.25, n=2, dim=0)
    return model


def weight_normed() -> nn.Sequential:
    """Layers whose weights are stored as a direction and a length."""
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*[parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m for m in layers])


def old_weight_normed() -> nn.Sequential:
    """The same by the older function, which uses hooks."""
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*[nn.utils.weight_norm(m) if isinstance(m, nn.Linear) else m for m in layers])


def spectral_normed() -> nn.Sequential:
    """Layers whose weights are divided by their largest singular value."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 3))
    )


def orthogonal() -> nn.Sequential:
    """Weights that are orthogonal matrices, computed from what is learned by each of three maps, and plain ones."""
    return nn.Sequential(
        *(nn.Linear(4, 4), nn.ReLU()),
        *(parametrizations.orthogonal(nn.Linear(4, 6), orthogonal_map="matrix_exp"), nn.ReLU()),
        *(parametrizations.orthogonal(nn.Linear(6, 4), "weight", "cayley", use_trivialization=False), nn.ReLU()),
        *(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder"), nn.ReLU()),
        nn.Linear(4, 3),
    )


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randint(9, (5, 7)),)


def _floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], set[str]]] = {
    "gpt-2 feed-forward": (FeedForward, _floats((3, 5, 4)), {"c_fc.weight", "c_proj.weight"}),
    "tied": (TiedLanguageModel, _tokens, {"embedding.weight", "hidden.weight"}),
    "fused": (
        FusedAttention,
        _floats((2, 5, 3), (2, 5, 3)),
        {"embed.weight", "qkv", "out.weight"},
    ),
    "fused, crossed": (
        lambda: FusedAttention(crossed=True),
        _floats((2, 5, 3), (2, 6, 3)),
        {"embed.weight", "context.weight", "qkv", "out.weight"},
    ),
    "lora": (lambda: LoRA(merged=False), _floats((3, 6)), {"base", "a", "b"}),
    "lora, merged": (lambda: LoRA(merged=True), _floats((3, 6)), {"base"}),
    "learned scale": (LearnedScale, _floats((3, 4)), {"w"}),
    "standardised": (lambda: StandardisedConv(3, 4, 3), _floats((2, 3, 6, 6)), {"weight"}),
    "collections": (Collections, _floats((3, 4)), {"layers.0", "layers.1", "heads.mean", "heads.scale"}),
    "experts": (Experts, _floats((3, 5, 4)), {"w1", "w2"}),
    "heads": (HeadProjection, _floats((2, 5, 4)), {"q", "o"}),
    "bilinear": (Bilinear, _floats((3, 4)), {"a.weight", "b.weight", "pair.weight", "head.weight"}),
    "words": (Words, _tokens, {"words.weight", "bags.weight", "head.weight"}),
    "readout": (Readout, _floats((3, 4)), {"layer.weight", "score"}),
    "pruned": (pruned, _floats((3, 4)), {"0.weight_orig", "2.weight_orig", "4.weight"}),
    "weight norm": (
        weight_normed,
        _floats((3, 4)),
        {"0.parametrizations.weight.original1", "2.parametrizations.weight.original1"},
    ),
    "old weight norm": (old_weight_normed, _floats((3, 4)), {"0.weight_v", "2.weight_v"}),
    "spectral norm": (
        spectral_normed,
        _floats((3, 4)),
        {"0.parametrizations.weight.original", "2.parametrizations.weight.original"},
    ),
    "orthogonal": (
        orthogonal,
        _floats((3, 4)),
        {"0.weight", "2.parametrizations.weight.original", "4.parametrizations.weight.original", "8.weight"},
    ),
}
"""Models by name, with inputs and the parameters that are synapses."""
