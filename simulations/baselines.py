"""What the federation is compared with: all data pooled in the clear, each partner alone, and the federation without privacy.

Baselines exist only in simulation: they read all data in one place and touch no ledger. All are measured on the same rows,
every partner's held-out ones, and take as many optimiser steps as the federation does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..clients.datasets import Rows
from ..clients.training import LocalSettings, train_locally
from ..common.config import Federation, Privacy
from ..common.tasks import Task, initial_model
from ..common.tasks.metrics import evaluate, scores_of
from .federation import Simulation, parts_of


def baselines(config: Federation, base: Path, task: Task, alone: bool = True) -> dict[str, Any]:
    """`pooled` metrics, `local` metrics by partner, `federated_without_privacy` metrics.

    Empty when the configuration holds no rows out.

    Args:
        alone: also each partner alone (up to 20 of them).
    """
    splits = {name: part.source() for name, part in parts_of(config, base, task).items()}
    held_out = _join([split.held_out for split in splits.values()])
    if not len(held_out):
        return {}
    settings = _settings(config)
    pooled = _join([split.train for split in splits.values()])
    found: dict[str, Any] = {"pooled": _train_and_measure(task, config.seed, pooled, settings, held_out)}
    if alone and len(splits) <= 20:
        found["local"] = {
            name: _train_and_measure(task, config.seed, split.train, settings, held_out)
            for name, split in splits.items()
        }
    found["federated_without_privacy"] = _federated_without_privacy(config, base)
    return found


def _federated_without_privacy(config: Federation, base: Path) -> dict[str, float]:
    """The same federation, the same code, `privacy: none`, in a folder that is thrown away."""
    if config.privacy.kind == "none":
        return {}
    evaluation = config.evaluation
    if evaluation.kind == "private":
        evaluation = evaluation.model_copy(update={"kind": "public", "noise_multiplier": None})
    evaluation = evaluation.model_copy(update={"every": config.algorithm.rounds})
    open_config = config.model_copy(update={"privacy": Privacy(kind="none"), "evaluation": evaluation})
    with tempfile.TemporaryDirectory(prefix="hansa-baseline-") as folder:
        simulation = Simulation(open_config, base, Path(folder) / "run")
        try:
            outcome = simulation.run()
        finally:
            simulation.close()
    return dict(outcome.history[-1]["metrics"])


def _settings(config: Federation) -> LocalSettings:
    local = config.algorithm.local
    return LocalSettings(
        steps=local.steps * config.algorithm.rounds,
        sampling_rate=local.sampling_rate,
        optimizer=local.optimizer.name,
        lr=local.optimizer.lr,
        momentum=local.optimizer.momentum,
    )


def _train_and_measure(task: Task, seed: int, rows: Rows, settings: LocalSettings, held_out: Rows) -> dict[str, float]:
    model = initial_model(task, seed)
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad}
    update = train_locally(model, task.loss, weights, rows, settings, len(rows), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(weights[name] + update[name]))
        model.eval()
        scores = np.concatenate([scores_of(model(x)) for x in torch.split(held_out.x, 1024)])
    return evaluate(task, scores, held_out.y.numpy())


def _join(parts: list[Rows]) -> Rows:
    return Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
