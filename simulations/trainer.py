"""The local work of a round for some clients of a population: many at once where the model allows it, one by one where not.

One object does it wherever it is done: in the simulation's own process, in a worker, on another machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..clients.app import round_seed, without_words
from ..clients.training import NOT_FINITE, LocalSettings, train_locally
from ..common.errors import Refusal, Refused
from ..common.tasks import Task
from .clients import Clients
from .cohort import Cohort, Member
from .layers import Unsupported
from .libc import keep_memory
from .population import client_name

_log = logging.getLogger("hansa.node")


@dataclass(frozen=True)
class Outcome:
    """How one client's work ended; `refused` is the reason and detail of a no, `failed` that something went wrong."""

    refused: tuple[str, str] | None = None
    failed: bool = False

    @classmethod
    def from_fields(cls, said: dict[str, Any]) -> Outcome:
        """Inverse of `asdict`, as JSON gives it back."""
        refused = said["refused"]
        return cls(None if refused is None else (refused[0], refused[1]), said["failed"])


class Trainer:
    """Trains clients.

    Args:
        model: an instance of the task's model, used as scratch.
        settings: of every client.
        model_seed: for the batches of unprotected work.

    Attributes:
        private: records are protected.
        secret: nobody may learn who is in a round, so nothing is said of who fails.
        why_not: why clients cannot be trained many at once; None where they can.
        spent_s: seconds by phase since the last `phases()`.
    """

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        clients: Clients,
        settings: LocalSettings,
        declared_records: int,
        model_seed: int,
    ) -> None:
        keep_memory()
        self._task, self._model, self._clients = task, model, clients
        self._settings, self._declared, self._seed = settings, declared_records, model_seed
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self._parameters.values())
        self.spent_s: dict[str, float] = {}
        self.why_not: str | None = None
        self.secret = False
        self._said: set[str] = set()
        self.private = settings.event is not None
        self._cohort: Cohort | None = None
        try:
            self._cohort = Cohort(model, task.loss, clients.open(0).train.x[:6], private=self.private)
        except Unsupported as err:
            self.why_not = str(err)

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the trainable parameters, in the order in which a row has them."""
        return [(name, tuple(p.shape)) for name, p in self._parameters.items()]

    def train(
        self,
        number: int,
        clients: Sequence[int],
        weights: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
        *,
        batched: bool,
        most_steps: int | None = None,
    ) -> list[Outcome]:
        """Round `number` of these clients; each one's update goes to its row of `out`.

        Args:
            weights: [parameters], what everybody starts from.
            out: [clients, parameters].
            batched: many at once; the model must allow it.
            most_steps: no more optimiser steps than that: to find out how long they take.
        """
        began = time.perf_counter()
        torch.set_num_threads(1)  # whoever computes: how a sum is divided among threads decides how it is rounded
        settings = self._settings
        if most_steps is not None:
            settings = replace(settings, steps=min(settings.steps, most_steps))
        members: list[Member | None] = [self._member(number, client, settings) for client in clients]
        read = time.perf_counter()
        there = [i for i, member in enumerate(members) if member is not None]
        outcomes = [Outcome(failed=member is None) for member in members]
        if batched and there:
            for i in (failed := self._together(weights, [(i, m) for i, m in enumerate(members) if m is not None], out)):
                outcomes[i] = Outcome(failed=True)
            there = [i for i in there if i not in failed]
            # A sum is finite only if all of it is, and takes a third of the time; it may overflow, so a no is looked at again.
            with np.errstate(over="ignore", invalid="ignore"):
                for i in there:
                    if not np.isfinite(np.dot(out[i], out[i])) and not np.isfinite(out[i]).all():
                        outcomes[i] = _NOT_FINITE
        else:
            views, at = {}, 0
            for name, shape in self.shapes():
                views[name] = weights[at : at + int(np.prod(shape, dtype=np.int64))].reshape(shape)
                at += views[name].size
            for i in there:
                member = members[i]
                assert member is not None
                outcomes[i] = self._alone(member, views, out[i])
        done = time.perf_counter()
        for phase, seconds in (("reading rows", read - began), ("training", done - read)):
            self.spent_s[phase] = self.spent_s.get(phase, 0.0) + seconds
        return outcomes

    def forget(self) -> None:
        """Let go of what a trial left behind; processes that are forked afterwards would each keep it."""
        if self._cohort is not None:
            self._cohort.forget()
        keep_memory(trim=True)

    def phases(self) -> dict[str, float]:
        """Seconds by phase, and begin again."""
        spent, self.spent_s = self.spent_s, {}
        return spent

    def _say(self, what: str, err: Exception) -> None:
        said = f"{what}: {without_words(err)}"
        # In which rounds something is wrong tells in which of them that client was drawn. What is wrong with all is said once.
        if not self.secret and said not in self._said:
            self._said.add(said)
            _log.error("%s", said)

    def _member(self, number: int, client: int, settings: LocalSettings) -> Member | None:
        try:
            rows = self._clients.open(client).train
        except Exception as err:
            self._say("a client's rows cannot be read", err)
            return None
        seed = None if settings.event else round_seed(self._seed, number, client_name(client, len(self._clients)))
        return Member(rows, settings, self._declared, seed)

    def _together(
        self,
        weights: npt.NDArray[np.float32],
        members: Sequence[tuple[int, Member]],
        out: npt.NDArray[np.float32],
    ) -> set[int]:
        """Train these, each to its row of `out`; who failed. What fails for many is tried for each: it may be one's rows alone."""
        assert self._cohort is not None
        rows = [i for i, _ in members]
        some = out if rows == list(range(len(out))) else np.empty((len(rows), out.shape[1]), out.dtype)
        try:
            self._cohort.train(torch.from_numpy(weights), [m for _, m in members], torch.from_numpy(some))
        except MemoryError:
            raise
        except Exception as err:
            if len(members) > 1:
                return set().union(*(self._together(weights, [one], out) for one in members))
            self._say("a client failed", err)
            return set(rows)
        if some is not out:
            out[rows] = some
        return set()

    def _alone(
        self, member: Member, weights: dict[str, npt.NDArray[np.float32]], out: npt.NDArray[np.float32]
    ) -> Outcome:
        try:
            update = train_locally(
                self._model,
                self._task.loss,
                weights,
                member.rows,
                member.settings,
                member.declared_records,
                seed=member.seed,
                batches=member.batches,
            )
        except Refused as refused:
            return Outcome(refused=(refused.reason.value, refused.detail))
        except Exception as err:
            self._say("a client failed", err)
            return Outcome(failed=True)
        np.concatenate([part.reshape(-1) for part in update.values()], out=out)
        return Outcome()


_NOT_FINITE = Outcome(refused=(Refusal.NUMERIC.value, NOT_FINITE))
