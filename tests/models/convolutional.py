"""Convolutional networks with the structure of the published ones, a few channels wide; inputs (N, 3, 32, 32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VGG(nn.Module):
    """Convolutions and max pooling in one Sequential, and a classifier with dropout."""

    def __init__(self, plan: Sequence[int | str] = (8, "M", 12, "M", 16, 16, "M"), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in plan:
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(channels, step, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                channels = step
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 2 * 2, 32),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(32, 32),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(32, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class ConvNorm(nn.Sequential):
    """A convolution that keeps the resolution, up to its stride, with batch norm and an activation."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(n_out),
        )
        if activation is not None:
            self.append(activation())


def projection(n_in: int, n_out: int, stride: int) -> nn.Module | None:
    """What a shortcut needs where the shape changes, or None where it does not."""
    return None if stride == 1 and n_in == n_out else ConvNorm(n_in, n_out, 1, stride, activation=None)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with one ReLU for both places."""

    expansion: ClassVar[int] = 1

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(n_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class GroupedBottleneck(nn.Module):
    """A grouped 3x3 convolution between two 1x1 convolutions, beside a shortcut."""

    expansion: ClassVar[int] = 2

    def __init__(self, n_in: int, width: int, stride: int = 1, groups: int = 4) -> None:
        super().__init__()
        n_out = width * self.expansion
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.downsample = projection(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """Stages of residual blocks, of which the first block in a stage may change the shape."""

    block: ClassVar[type[BasicBlock] | type[GroupedBottleneck]] = BasicBlock

    def __init__(self, widths: Sequence[int] = (8, 16), blocks: Sequence[int] = (2, 2), classes: int = 10) -> None:
        super().__init__()
        self.inplanes = widths[0]
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self.stage(widths[0], blocks[0], stride=1)
        self.layer2 = self.stage(widths[1], blocks[1], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stage(self, width: int, blocks: int, stride: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index in range(blocks):
            layers.append(self.block(self.inplanes, width, stride if index == 0 else 1))
            self.inplanes = width * self.block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        return self.fc(x.view(x.size(0), -1))


class ResNeXt(ResNet):
    """A ResNet of grouped bottlenecks."""

    block: ClassVar[type[GroupedBottleneck]] = GroupedBottleneck


class DenseLayer(nn.Module):
    """A bottleneck that reads all feature maps made so far, and makes a few new ones."""

    def __init__(self, n_in: int, growth: int, drop: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.drop = drop

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        x = self.conv2(F.relu(self.norm2(x)))
        return F.dropout(x, p=self.drop, training=self.training) if self.drop > 0 else x


class DenseBlock(nn.ModuleDict):
    """Layers that each read the results of all before."""

    def __init__(self, n_in: int, growth: int, layers: int) -> None:
        super().__init__({f"denselayer{i}": DenseLayer(n_in + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Half of the channels, at half of the resolution."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(n_in)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(n_in, n_out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """Dense blocks with transitions between them."""

    def __init__(self, growth: int = 4, layers: Sequence[int] = (3, 3), classes: int = 10) -> None:
        super().__init__()
        channels = 8
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False))
        for index, depth in enumerate(layers):
            if index > 0:
                self.features.add_module(f"transition{index}", Transition(channels, channels // 2))
                channels //= 2
            self.features.add_module(f"denseblock{index}", DenseBlock(channels, growth, depth))
            channels += depth * growth
        self.features.add_module("norm", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        return self.classifier(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection; without expansion, a depthwise separable convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = n_in * expand
        layers = [] if expand == 1 else [ConvNorm(n_in, hidden, 1, activation=nn.ReLU6)]
        layers += [
            ConvNorm(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            ConvNorm(hidden, n_out, 1, activation=None),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNet(nn.Module):
    """MobileNet v2."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(3, 8, stride=2, activation=nn.ReLU6),
            InvertedResidual(8, 8, stride=1, expand=1),
            InvertedResidual(8, 12, stride=2, expand=4),
            InvertedResidual(12, 12, stride=1, expand=4),
            ConvNorm(12, 32, kernel=1, activation=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1)
        return self.classifier(x)


class SqueezeExcite(nn.Module):
    """A gate for every channel, computed from the means of all."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gate = self.fc2(F.silu(self.fc1(gate)))
        return x * gate.sigmoid()


class StochasticDepth(nn.Module):
    """Drops a residual branch for some examples of the batch, in training."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        keep = 1 - self.drop
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class MBConv(nn.Module):
    """An inverted residual with a squeeze-excite gate and stochastic depth."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expand: int, drop: float = 0.2) -> None:
        super().__init__()
        hidden = n_in * expand
        self.has_skip = stride == 1 and n_in == n_out
        self.expand = ConvNorm(n_in, hidden, 1, activation=nn.SiLU) if expand > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU)
        self.gate = SqueezeExcite(hidden, n_in // 4)
        self.project = ConvNorm(hidden, n_out, 1, activation=None)
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.project(self.gate(self.depthwise(self.expand(x))))
        if self.has_skip:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    """MBConv blocks with growing kernels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, stride=2, activation=nn.SiLU)
        self.blocks = nn.ModuleList(
            [
                MBConv(8, 8, kernel=3, stride=1, expand=1),
                MBConv(8, 12, kernel=5, stride=2, expand=4),
                MBConv(12, 12, kernel=5, stride=1, expand=4),
            ]
        )
        self.head = ConvNorm(12, 32, kernel=1, activation=nn.SiLU)
        self.classifier = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.head(x).mean([2, 3])
        x = F.dropout(x, 0.2, self.training)
        return self.classifier(x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups, in turn."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass as they are, or all are downsampled in two branches; then channels are shuffled."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        half = n_out // 2
        n_read = half if stride == 1 else n_in
        self.stride = stride
        self.branch1: nn.Module = nn.Identity()
        if stride > 1:
            depthwise = ConvNorm(n_in, n_in, 3, stride, groups=n_in, activation=None)
            self.branch1 = nn.Sequential(depthwise, ConvNorm(n_in, half, 1))
        self.branch2 = nn.Sequential(
            ConvNorm(n_read, half, 1),
            ConvNorm(half, half, 3, stride, groups=half, activation=None),
            ConvNorm(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        return channel_shuffle(torch.cat((self.branch1(first), self.branch2(second)), dim=1), 2)


class ShuffleNet(nn.Module):
    """ShuffleNet v2."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, 8, stride=2)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, stride=2), ShuffleUnit(16, 16, stride=1))
        self.stage3 = nn.Sequential(ShuffleUnit(16, 32, stride=2), ShuffleUnit(32, 32, stride=1))
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, stride=2, padding=1)
        x = self.stage3(self.stage2(x))
        x = x.mean([2, 3])
        return self.fc(x)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of images."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """A wide depthwise convolution, and an MLP with channels last, scaled by a learned factor for each channel."""

    def __init__(self, channels: int, layer_scale: float = 0.1) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(layer_scale * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = (self.gamma * x).permute(0, 3, 1, 2)
        return shortcut + x


class ConvNeXt(nn.Module):
    """A patch stem, stages of blocks, and downsampling by a norm and a strided convolution."""

    def __init__(self, widths: Sequence[int] = (8, 16), classes: int = 10) -> None:
        super().__init__()
        first, second = widths
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, first, 4, stride=4), ChannelNorm(first)),
                nn.Sequential(ChannelNorm(first), nn.Conv2d(first, second, 2, stride=2)),
            ]
        )
        self.stages = nn.ModuleList([nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width)) for width in widths])
        self.norm = nn.LayerNorm(second, eps=1e-6)
        self.head = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean([-2, -1])))


def double_convolution(n_in: int, n_out: int) -> nn.Sequential:
    """Two convolutions at one resolution."""
    return nn.Sequential(ConvNorm(n_in, n_out), ConvNorm(n_out, n_out))


class Up(nn.Module):
    """Twice the resolution, by a transposed convolution or by interpolation, joined with a skip connection."""

    def __init__(self, n_in: int, n_out: int, transposed: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(n_in, n_out, 2, stride=2) if transposed else nn.Conv2d(n_in, n_out, 1)
        self.conv = double_convolution(2 * n_out, n_out)
        self.transposed = transposed

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if not self.transposed:
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        x = self.up(x)
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """A path down and a path up, with skip connections between them; a mask of the size of the image."""

    def __init__(self, channels: int = 4, classes: int = 2) -> None:
        super().__init__()
        self.inc = double_convolution(3, channels)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_convolution(channels, 2 * channels))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_convolution(2 * channels, 4 * channels))
        self.up1 = Up(4 * channels, 2 * channels, transposed=True)
        self.up2 = Up(2 * channels, channels, transposed=False)
        self.outc = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x)


class Autoencoder(nn.Module):
    """A code of a few numbers between strided and transposed convolutions; the reconstruction and the code."""

    def __init__(self, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.to_code = nn.Linear(8 * 8 * 8, code)
        self.from_code = nn.Linear(code, 8 * 8 * 8)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1, output_padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        code = self.to_code(features.view(features.size(0), -1))
        features = F.relu(self.from_code(code)).view_as(features)
        return torch.sigmoid(self.decoder(features)), code


class Generator(nn.Module):
    """The generator of a DCGAN: an image from noise; inputs (N, 16, 1, 1)."""

    def __init__(self, noise: int = 16, channels: int = 4) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(noise, 4 * channels, 4, stride=1, padding=0, bias=False),
            nn.BatchNorm2d(4 * channels),
            nn.ReLU(True),
            nn.ConvTranspose2d(4 * channels, 2 * channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * channels, 3, 4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        )
        self.apply(self.initialise)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.2)

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(noise)
