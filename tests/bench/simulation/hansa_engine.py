"""Hansa's own simulation engine: what `hansa simulate` trains a population with, without ledger, Grid and checkpoint (those are
measured by `tests/bench/simulation/whole.py`).

python hansa_engine.py --workload w1 [--workers 2]

The plan (many clients at once or one by one, how many, in how many processes) is what its own trial finds; --workers 1 allows this
process alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor
from workloads import CLIP_NORM, NOISE_MULTIPLIER, Workload, loss

from hansa.clients.datasets import Rows, Split
from hansa.clients.training import LocalSettings
from hansa.common.tasks import Task, cross_entropy
from hansa.common.tasks.schema import ArraySchema
from hansa.simulations.cohort import Member
from hansa.simulations.execution import probe
from hansa.simulations.trainer import Trainer
from hansa.simulations.workers import Here, Workers


class InMemory:
    """All clients' rows, as every runner here has them."""

    def __init__(self, clients: list[tuple[Tensor, Tensor]]) -> None:
        self.rows = [Rows(x, y) for x, y in clients]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, number: int) -> Split:
        return Split(self.rows[number], self.rows[number])


class Epochs(Trainer):
    """One epoch of consecutive batches, or as many Poisson batches, instead of a configuration's steps."""

    workload: Workload

    @functools.cache  # noqa: B019  as long as the process
    def _member(self, number: int, client: int, settings: LocalSettings) -> Member:
        rows, batch = self._clients.open(client).train, self.workload.batch
        n = len(rows)
        if self.workload.private:
            steps = min(self.workload.steps(n), settings.steps)
            # The divisor, rate times declared records, is the batch.
            return Member(rows, replace(settings, steps=steps, sampling_rate=min(1.0, batch / n)), n, None)
        batches = [np.arange(at, min(at + batch, n)) for at in range(0, n, batch)][: settings.steps]
        return Member(rows, settings, n, number, batches)


def run(workload: Workload, watch: harness.Stopwatch, workers: int) -> Mapping[str, Tensor]:
    """Simulate `watch.rounds` rounds; the mean is weighted by rows and added up in float64, in the order of clients."""
    model, clients = workload.model(), InMemory(workload.data())
    shape = clients.rows[0].x.shape[1:]
    plain = clients.rows[0].y.dim() == 1
    task = Task("bench", "bench", ArraySchema(shape=tuple(shape), value_range=(-99, 99)), ("a", "b"), workload.build)
    task = replace(task, loss=cross_entropy if plain else lambda output, y: loss(output, y, "none"))
    protected: dict[str, Any] = (
        {"clip_norm": CLIP_NORM, "noise_multiplier": NOISE_MULTIPLIER} if workload.private else {}
    )
    most = max(workload.steps(len(r)) for r in clients.rows)
    settings = LocalSettings(most, 1.0, "sgd", workload.lr, **protected)
    trainer = Epochs(task, model, clients, settings, workload.batch, 0)
    trainer.workload = workload
    names = [(n, p.shape) for n, p in model.named_parameters()]
    weights = np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])
    cohort = min(workload.cohort_size, len(clients))
    plan, tried = probe(trainer, weights, cohort, range(min(len(clients), 256)), most, workers)
    print(plan.words(), tried, trainer.why_not or "", file=sys.stderr)
    executor: Here | Workers = (
        Workers(trainer, plan.workers, plan.chunk, batched=plan.batched)
        if plan.workers
        else Here(trainer, batched=plan.batched)
    )
    watch.tick()
    for number in range(watch.rounds):
        chosen = workload.cohort(number, len(clients))
        total, everyone = np.zeros(trainer.size), 0
        chunks = [chosen[at : at + plan.chunk] for at in range(0, len(chosen), plan.chunk)]
        for some, updates, outcomes in executor.train(number, weights, chunks):
            for client, update, outcome in zip(some, updates, outcomes, strict=True):
                assert not outcome.failed
                assert outcome.refused is None
                n = len(clients.rows[client])
                total += np.multiply(update, n, dtype=np.float64)
                everyone += n
            del updates
        weights = (weights + total / everyone).astype(np.float32)
        watch.tick()
    executor.close()
    found, at = {}, 0
    for name, size in names:
        found[name] = torch.from_numpy(weights[at : at + size.numel()]).view(size)
        at += size.numel()
    return found


def _run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    return run(workload, watch, options.workers)


if __name__ == "__main__":
    parser = harness.arguments()
    parser.add_argument("--workers", type=int, default=1)
    harness.main("Hansa", lambda: version("hansa"), _run, parser)
