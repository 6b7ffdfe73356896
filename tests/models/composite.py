"""Networks made of other networks, or of operators on bare parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MixtureOfExperts(nn.Module):
    """All experts on every input, weighted by a router that keeps the best few of them; inputs (N, T, 8)."""

    def __init__(self, n_in: int = 8, hidden: int = 16, n_out: int = 4, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(n_in, experts, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, n_out)) for _ in range(experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        probabilities = F.softmax(self.router(x), dim=-1)
        best, indices = torch.topk(probabilities, self.chosen, dim=-1)
        gates = torch.zeros_like(probabilities).scatter(-1, indices, best / best.sum(-1, keepdim=True))
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return torch.einsum("...e,...eo->...o", gates, outputs)


class Siamese(nn.Module):
    """One encoder for two images, and the probability that they show the same; inputs twice (N, 1, 16, 16)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 5 * 5, width),
            nn.Tanh(),
        )
        self.head = nn.Linear(width, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        distance = torch.abs(self.encoder(first) - self.encoder(second))
        return torch.sigmoid(self.head(distance)).squeeze(-1)


class GraphLayer(nn.Module):
    """Features of the neighbours, mixed by a bare weight of shape (n_in, n_out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (features @ self.weight) + self.bias


class GraphConvolution(nn.Module):
    """Graph layers and a head that reads each node; inputs (N, nodes, 6) and normalised_adjacency."""

    def __init__(self, n_in: int = 6, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.gc1 = GraphLayer(n_in, hidden)
        self.gc2 = GraphLayer(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(self.gc1(features, adjacency))
        x = F.dropout(x, 0.5, training=self.training)
        x = F.relu(self.gc2(x, adjacency))
        return F.log_softmax(adjacency @ self.head(x), dim=-1)


def normalised_adjacency(batch: int, nodes: int) -> Tensor:
    """Random undirected graphs with self-loops, D^(−1/2) (A + I) D^(−1/2); shape (batch, nodes, nodes)."""
    edges = torch.rand(batch, nodes, nodes).triu(1) > 0.6
    adjacency = (edges | edges.mT).float() + torch.eye(nodes)
    degree = adjacency.sum(-1).rsqrt()
    return degree[:, :, None] * adjacency * degree[:, None, :]
