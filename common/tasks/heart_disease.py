"""Heart disease from 13 clinical measurements: logistic regression on 35 features with missing indicators."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from . import Task
from .schema import load_schema

SCHEMA = load_schema(Path(__file__).with_suffix(".yaml"))


def build_model() -> nn.Module:
    """Logistic regression, starting at zero: the loss is convex, a random start would only add variance."""
    model = nn.Linear(SCHEMA.shape[0], len(SCHEMA.label.classes))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


task = Task(
    name="heart-disease",
    title="Heart disease from 13 clinical measurements (UCI, four hospitals)",
    schema=SCHEMA,
    classes=SCHEMA.label.classes,
    build_model=build_model,
)
