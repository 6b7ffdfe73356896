"""Well-known architectures by name, each with inputs for a batch of two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import attention, composite, convolutional, recurrent


def images(size: int, channels: int = 3, count: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """Random images."""
    return lambda: tuple(torch.randn(2, channels, size, size) for _ in range(count))


def tokens(length: int = 12) -> tuple[Tensor]:
    """Random tokens out of 32."""
    return (torch.randint(32, (2, length)),)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "vgg": (convolutional.VGG, images(32)),
    "resnet": (convolutional.ResNet, images(32)),
    "resnext": (convolutional.ResNeXt, images(32)),
    "densenet": (convolutional.DenseNet, images(32)),
    "mobilenet": (convolutional.MobileNet, images(32)),
    "efficientnet": (convolutional.EfficientNet, images(32)),
    "shufflenet": (convolutional.ShuffleNet, images(32)),
    "convnext": (convolutional.ConvNeXt, images(32)),
    "unet": (convolutional.UNet, images(32)),
    "autoencoder": (convolutional.Autoencoder, images(32)),
    "generator": (convolutional.Generator, images(1, channels=16)),
    "vit": (attention.ViT, images(16)),
    "swin": (attention.Swin, images(16)),
    "mlp_mixer": (attention.MLPMixer, images(16)),
    "gpt": (attention.GPT, tokens),
    "llama": (attention.Llama, tokens),
    "lstm": (recurrent.LSTMLanguageModel, tokens),
    "mixture_of_experts": (composite.MixtureOfExperts, lambda: (torch.randn(2, 6, 8),)),
    "siamese": (composite.Siamese, images(16, channels=1, count=2)),
    "graph_convolution": (
        composite.GraphConvolution,
        lambda: (torch.randn(2, 7, 6), composite.normalised_adjacency(2, 7)),
    ),
}
