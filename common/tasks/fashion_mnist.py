"""Fashion-MNIST, 28 x 28 pixels: a LeNet-like convolutional network."""

from __future__ import annotations

from torch import nn

from . import Task
from .schema import ArraySchema


def build_model() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, 44,426 parameters; no layer mixes records."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


task = Task(
    name="fashion-mnist",
    title="Articles of clothing, 28 x 28 pixels (Fashion-MNIST)",
    schema=ArraySchema(shape=(1, 28, 28), value_range=(0.0, 1.0)),
    classes=(
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    build_model=build_model,
)
