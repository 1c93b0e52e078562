"""Handwritten digits, 8 x 8 pixels (scikit-learn): a small convolutional network."""

from __future__ import annotations

from torch import nn

from . import Task
from .schema import ArraySchema


def build_model() -> nn.Module:
    """Two convolutions and a linear layer, 6,090 parameters; no layer mixes records (Opacus needs that)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


task = Task(
    name="digits",
    title="Handwritten digits, 8 x 8 pixels (scikit-learn)",
    schema=ArraySchema(shape=(1, 8, 8), value_range=(0.0, 1.0)),
    classes=tuple("0123456789"),
    build_model=build_model,
)
