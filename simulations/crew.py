"""Who trains a population's clients, and by which plan: the one of an earlier start, the one that was given, or what a trial finds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..clients.app import local_settings
from ..clients.training import check_records_apart
from ..common.charter import Charter
from ..common.errors import ConfigError
from ..common.identity import write_whole
from ..common.tasks import Task, initial_model
from .clients import Clients
from .execution import Execution, Tried, cores, fields, load_execution, probe
from .ray_engine import RayEngine, RayExecutor
from .trainer import Trainer
from .workers import Here, Workers, can_fork


class Crew:
    """Trains a population's clients.

    Args:
        kept: where the plan is kept, so that a run that goes on goes on by it.
        given: a plan; None: an earlier start's, or what a trial finds.
        workers: so many processes, whatever the plan says, but no more than a round has chunks.
        ray: whose processes train, instead of this machine's.

    Attributes:
        plan: what is done.
        tried: what the trial found, if there was one.
        why_not: why clients are not computed many at once; None where they could be.
        shapes: names and shapes of the model's tensors.
        executor: does it.

    Raises:
        ConfigError: the plan does not fit the model.
        TaskError: the model cannot be trained with protection.
    """

    def __init__(
        self,
        task: Task,
        clients: Clients,
        charter: Charter,
        kept: Path,
        given: Execution | None,
        workers: int | None,
        ray: RayEngine | None = None,
    ) -> None:
        model = initial_model(task, charter.model_seed)
        settings = local_settings(charter)
        assert charter.population is not None
        trainer = Trainer(task, model, clients, settings, charter.population.declared_records, charter.model_seed)
        self.shapes, self.why_not = trainer.shapes(), trainer.why_not
        self.tried: Tried | None = None
        self._too_many: int | None = None
        before = load_execution(kept) if kept.exists() else None
        if given and before and (given.batched, given.chunk) != (before.batched, before.chunk):
            raise ConfigError(
                f"the run began with {before.words()}; the plan that was given has {given.words()}",
                "A run keeps its plan, so that it repeats: leave --execution out. --workers may change.",
            )
        plan = given or before
        cohort = max(1, round(charter.algorithm.participation * len(clients)))
        weights = np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters() if p.requires_grad])
        if trainer.private and (self.why_not is not None or (plan is not None and not plan.batched)):
            # Every client would fail by it, after it was paid. Many at once it was tried already, and without Opacus.
            check_records_apart(model, task.loss, task.schema.shape)
        if plan is None:
            some, most = range(min(len(clients), 256)), cores() if ray is None else ray.count
            plan, self.tried = probe(trainer, weights, cohort, some, settings.steps, most, ray=ray is not None)
            trainer.forget()
        trainer.secret = charter.privacy.unit == "client"
        if ray is not None:
            plan = plan.model_copy(update={"workers": ray.count})
        else:
            asked = plan.workers if workers is None else workers
            plan = plan.model_copy(update={"workers": min(asked, math.ceil(cohort / plan.chunk))})
            self._too_many = asked if workers is not None and asked > plan.workers else None
        if ray is None and plan.workers and not can_fork():
            plan = plan.model_copy(update={"workers": 0})
        if plan.batched and trainer.why_not is not None:
            raise ConfigError(
                f"the execution plan has many clients at once, but the model cannot: {trainer.why_not}",
                "Set batched to false, or leave --execution out.",
            )
        self.plan: Execution = plan
        write_whole(kept, json.dumps(plan.model_dump()).encode())
        self._ray = ray is not None
        self.executor: Here | Workers | RayExecutor
        if ray is not None:
            self.executor = ray.executor(trainer.size, plan)
        elif plan.workers:
            self.executor = Workers(trainer, plan.workers, plan.chunk, batched=plan.batched)
        else:
            self.executor = Here(trainer, batched=plan.batched)

    def words(self) -> str:
        """The plan, for the screen."""
        why = "" if self.why_not is None else f" (many at once is not possible: {self.why_not})"
        if self._too_many is not None:
            why = f" ({self._too_many} would find no more chunks in a round){why}"
        return f"execution: {self.plan.words()}{' of Ray' if self._ray else ''}{why}"

    def to_fields(self) -> dict[str, Any]:
        """As `result.json` has it."""
        return fields(self.plan, self.tried, self.why_not)

    def close(self) -> None:
        """End the workers."""
        self.executor.close()
