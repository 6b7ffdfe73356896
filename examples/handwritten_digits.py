"""The data of the examples: scikit-learn's handwritten digits, a quarter of them held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images (count, 1, 8, 8) from 0 to 1 and labels (count,), split for training and testing."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load() -> Digits:
    """The data set; the split is the same every time."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    return Digits(*train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0))
