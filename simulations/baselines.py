"""What the federation is compared with: all data pooled in the clear, each partner alone, and the federation without privacy.

Baselines exist only in simulation: they read all data in one place and touch no ledger. All are measured on the same rows,
every partner's held-out ones, and are trained by the federation's own algorithm without clip and noise: so many rounds of so many steps, the
server's strategy between them, and the mean of the last models where that is the result.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..clients.app import round_seed
from ..clients.datasets import Rows
from ..clients.training import LocalSettings, train_locally
from ..common.config import Federation, Privacy
from ..common.model import Arrays
from ..common.plan import first_averaged
from ..common.tasks import Task, initial_model
from ..common.tasks.metrics import evaluate, scores_of
from ..server.checkpoint import Checkpoint
from ..server.strategies import ServerOptimizer
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
    pooled = _join([split.train for split in splits.values()])
    found: dict[str, Any] = {"pooled": _train_and_measure(config, task, pooled, held_out)}
    if alone and len(splits) <= 20:
        found["local"] = {name: _train_and_measure(config, task, one.train, held_out) for name, one in splits.items()}
    found["federated_without_privacy"] = _federated_without_privacy(config, base)
    return found


def _federated_without_privacy(config: Federation, base: Path) -> dict[str, float]:
    """The same federation, the same code, `privacy: none`, no masks and nobody missing, in a folder that is thrown away."""
    if config.privacy.kind == "none":
        return {}
    evaluation = config.evaluation
    if evaluation.kind == "private":
        evaluation = evaluation.model_copy(update={"kind": "public", "noise_multiplier": None})
    evaluation = evaluation.model_copy(update={"every": config.algorithm.rounds})
    open_config = config.model_copy(
        update={
            "privacy": Privacy(kind="none"),
            "evaluation": evaluation,
            "secure_aggregation": None,
            "system": None,
            "quorum": max(1, config.quorum),
        }
    )
    with tempfile.TemporaryDirectory(prefix="hansa-baseline-") as folder:
        simulation = Simulation(open_config, base, Path(folder) / "run")
        try:
            outcome = simulation.run()
        finally:
            simulation.close()
    return dict(outcome.history[-1]["metrics"])


def _train_and_measure(config: Federation, task: Task, rows: Rows, held_out: Rows) -> dict[str, float]:
    model = initial_model(task, config.seed)
    weights = _trained(config, task, model, rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(weights[name]))
        model.eval()
        scores = np.concatenate([scores_of(model(x)) for x in torch.split(held_out.x, 1024)])
    return evaluate(task, scores, held_out.y.numpy())


def _trained(config: Federation, task: Task, model: torch.nn.Module, rows: Rows) -> Arrays:
    """What a federation of one partner with these rows would come to."""
    local, first = config.algorithm.local, first_averaged(config.algorithm)
    settings = LocalSettings(
        steps=local.steps,
        sampling_rate=local.sampling_rate,
        optimizer=local.optimizer.name,
        lr=local.optimizer.lr,
        momentum=local.optimizer.momentum,
    )
    optimizer = ServerOptimizer(config.algorithm.strategy)
    state = Checkpoint("", 0, {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad})
    for number in range(1, config.algorithm.rounds + 1):
        seed = round_seed(config.seed, number, "")
        update = train_locally(model, task.loss, state.model, rows, settings, len(rows), seed=seed)
        state.model = optimizer.step(number, state.model, {n: u.astype(np.float64) for n, u in update.items()})
        if number >= first:
            state.average_in(number - first + 1)
    return state.result


def _join(parts: list[Rows]) -> Rows:
    return Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
