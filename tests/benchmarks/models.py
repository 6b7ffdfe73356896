"""Models that benchmarks train, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp() -> nn.Module:
    """A perceptron with little arithmetic for each weight: the hardest case."""
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


def deep() -> nn.Module:
    """Many weights with next to no arithmetic: what Python does for each."""
    return nn.Sequential(*[layer for _ in range(50) for layer in (nn.Linear(8, 8), nn.Tanh())])


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


class Layer(nn.Module):
    """A layer of a transformer."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.wide = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """The layout of GPT-2, with a head of its own; as it stands, of 10 million parameters."""

    def __init__(self, tokens: int = 1000, width: int = 352, layers: int = 6, heads: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(1024, width)
        self.layers = nn.Sequential(*(Layer(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        y: Tensor = self.head(self.norm(self.layers(self.tokens(x) + places)))
        return y


class ViT(nn.Module):
    """A vision transformer on images of 32 × 32, of 10 million parameters."""

    def __init__(self, width: int = 368, layers: int = 6, heads: int = 8) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(64, width))
        self.layers = nn.Sequential(*(Layer(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.places
        z: Tensor = self.head(self.norm(self.layers(y)).mean(1))
        return z


Task = tuple[nn.Module, Tensor, Tensor]  # a model, its input, and the classes that it is to find


def images(model: nn.Module, batch: int) -> Task:
    """A model of small images."""
    return model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def text(model: nn.Module, batch: int, length: int, tokens: int) -> Task:
    """A model of language."""
    return model, torch.randint(tokens, (batch, length)), torch.randint(tokens, (batch, length))


def resnet50(batch: int) -> Task:
    """ResNet-50 on photographs."""
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    return ResNet50().to(memory_format=torch.channels_last), x, torch.randint(1000, (batch,))


SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # of a small and of a large batch
    "mlp": ((16,), (128,)),
    "deep": ((4,), (4,)),
    "resnet": ((4,), (32,)),
    "gpt": ((1, 64), (8, 64)),
    "vit": ((2,), (16,)),
    "resnet50": ((8,), (128,)),
    "gpt2": ((1, 64), (8, 1024)),
}
MODELS: dict[str, Callable[..., Task]] = {
    "deep": lambda batch: (deep(), torch.randn(batch, 8), torch.randint(8, (batch,))),
    "mlp": lambda batch: (mlp(), torch.randn(batch, 784), torch.randint(10, (batch,))),
    "resnet": lambda batch: images(ResNet(16), batch),
    "gpt": lambda batch, length: text(GPT(), batch, length, 1000),
    "vit": lambda batch: images(ViT(), batch),
    "resnet50": resnet50,
    "gpt2": lambda batch, length: text(GPT(50257, 768, 12, 12), batch, length, 50257),
}
GPU_MODELS = ("resnet50", "gpt2")


def task(name: str, batch: str) -> Task:
    """A model with one batch.

    Args:
        name: its name.
        batch: `"small"` or `"large"`.
    """
    small, large = SIZES[name]
    return MODELS[name](*(small if batch == "small" else large))
