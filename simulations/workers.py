"""Processes that train chunks of clients. Parameters and updates are in memory that all share; only a few words are sent.

Workers are forked, so they have the model and the data as they are. One that dies is replaced and its chunk is trained again; what it
had written is overwritten, and nothing of it was read before. None outlives its parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import mmap
import multiprocessing
import os
import signal
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..clients.app import without_words
from ..common.errors import RunFailed, counted
from .libc import die_with
from .trainer import Outcome, Trainer

_log = logging.getLogger("hansa.node")

Floats = npt.NDArray[np.float32]
Done = tuple[Sequence[int], Floats, list[Outcome]]
"""Clients, their updates [clients, parameters], and how each one's work ended."""

_TRIES = 3
_AHEAD = 2
"""Chunks that a worker has at most: it need not be woken for the next one, which takes longer than a small chunk."""
_PLACES = 3
"""Places for updates a worker: one is being filled, one is for the chunk that follows, one is read."""


def can_fork() -> bool:
    """Whether this system can make workers."""
    return "fork" in multiprocessing.get_all_start_methods() and os.name == "posix" and os.uname().sysname == "Linux"


class Here:
    """Trains in this process."""

    def __init__(self, trainer: Trainer, *, batched: bool) -> None:
        self._trainer, self._batched = trainer, batched

    def train(self, number: int, weights: Floats, chunks: Sequence[Sequence[int]]) -> Iterator[Done]:
        """Chunks in order."""
        for chunk in chunks:
            yield chunk, *_anew(self._trainer, number, weights, chunk, self._batched)

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last call, added up over processes."""
        return self._trainer.phases()

    def close(self) -> None:
        """Nothing to end."""


def _anew(
    trainer: Trainer, number: int, weights: Floats, chunk: Sequence[int], batched: bool
) -> tuple[Floats, list[Outcome]]:
    out = np.empty((len(chunk), trainer.size), np.float32)
    return out, trainer.train(number, chunk, weights, out, batched=batched)


class Workers:
    """Trains in processes of their own.

    Args:
        chunk: clients a chunk has at most.

    Raises (by train):
        RunFailed: a chunk's workers were killed again and again.
    """

    def __init__(self, trainer: Trainer, count: int, chunk: int, *, batched: bool) -> None:
        self._trainer, self._batched, self._chunk = trainer, batched, chunk
        self._weights_memory = mmap.mmap(-1, max(1, 4 * trainer.size))
        self._weights = np.frombuffer(self._weights_memory, np.float32, trainer.size)
        self._places = [mmap.mmap(-1, max(1, 4 * trainer.size * chunk)) for _ in range(count * _PLACES)]
        self._free = deque(range(len(self._places)))
        self._workers: list[_Worker] = []
        self._spent: dict[str, float] = {}
        # Until `close` nobody looks through what is there by now for garbage: each process would get a copy of every page.
        gc.collect()
        gc.freeze()
        try:
            for _ in range(count):
                self._workers.append(self._hire())
        except OSError as err:
            self.close()
            raise RunFailed(f"a worker cannot be started: {err}", "Use fewer: --workers 1, or 0 for none.") from err

    def train(self, number: int, weights: Floats, chunks: Sequence[Sequence[int]]) -> Iterator[Done]:
        """Chunks in order. While the first is waited for, others are trained, as many as there are places for their updates."""
        self._weights[:] = weights
        waiting = deque(range(len(chunks)))
        tries = [0] * len(chunks)
        finished: dict[int, tuple[int, list[Outcome]]] = {}
        try:
            for turn in range(len(chunks)):
                while turn not in finished:
                    self._give(number, waiting, chunks, turn)
                    busy = [w for w in self._workers if w.jobs]
                    if not busy:  # every place is somebody's who kept the updates
                        waiting.remove(turn)
                        yield chunks[turn], *_anew(self._trainer, number, self._weights, chunks[turn], self._batched)
                        break
                    for worker in self._ready(busy):
                        if (said := worker.receive()) is not None:
                            job, place = worker.jobs.popleft()
                            finished[job] = place, [Outcome.from_fields(one) for one in said["outcomes"]]
                            for phase, seconds in said["spent_s"].items():
                                self._spent[phase] = self._spent.get(phase, 0.0) + seconds
                            continue
                        job, _ = worker.jobs[0]  # it died over that one; what it had not begun is as good as new
                        tries[job] += 1
                        waiting.extendleft(job for job, _ in reversed(worker.jobs))
                        self._free.extend(place for _, place in worker.jobs)
                        self._replace(worker)
                        if tries[job] == _TRIES:
                            raise RunFailed(
                                f"round {number}: {counted(_TRIES, 'worker')} died over the same clients",
                                "Out of memory, perhaps: fewer workers or smaller chunks (--workers, --execution). Go on with --resume.",
                            )
                else:
                    place, outcomes = finished.pop(turn)
                    yield chunks[turn], self._updates(place, len(chunks[turn])), outcomes
        except BaseException:  # Ctrl-C above all: nobody waits for what is being trained
            for worker in [w for w in self._workers if w.jobs]:
                self._free.extend(place for _, place in worker.jobs)
                self._replace(worker)
            raise
        finally:
            for place, _ in finished.values():
                self._free.append(place)

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last call, added up over processes."""
        spent, self._spent = self._spent, {}
        return spent

    def close(self) -> None:
        """End every worker, and let go of what was shared with them."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._places.clear()
        gc.unfreeze()

    def _give(self, number: int, waiting: deque[int], chunks: Sequence[Sequence[int]], turn: int) -> None:
        idle = [worker for worker in self._workers if not worker.jobs]
        # Near the end of a round whoever is done first takes what is left.
        ahead = [w for w in self._workers if len(w.jobs) < _AHEAD] if len(waiting) > 2 * len(self._workers) else []
        for worker in (*idle, *ahead):
            if waiting and self._free:
                # The last place is for whose turn it is: everything else could wait for it for ever.
                if len(self._free) == 1 and turn in waiting and waiting[0] != turn:
                    waiting.remove(turn)
                    waiting.appendleft(turn)
                job, place = waiting.popleft(), self._free.popleft()
                worker.send(job, place, {"round": number, "clients": list(chunks[job]), "place": place})

    def _ready(self, busy: list[_Worker]) -> list[_Worker]:
        ready = set(map(id, wait([w.pipe for w in busy])))
        return [w for w in busy if id(w.pipe) in ready]

    def _updates(self, place: int, rows: int) -> Floats:
        """What is in a place, which is free again when nobody has a part of it any more."""
        whole = np.frombuffer(self._places[place], np.float32, rows * self._trainer.size)
        whole.flags.writeable = False
        weakref.finalize(whole, self._free.append, place)  # every view of it, and of a view of it, holds it
        return whole.reshape(rows, -1)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = self._hire()

    def _hire(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("fork")
        others = [w.pipe for w in self._workers]
        process = context.Process(target=self._work, args=(theirs, [ours, *others], os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _work(self, pipe: Connection, not_mine: list[Connection], parent: int) -> None:
        """A worker's life."""
        die_with(parent)  # it would else finish its chunk, and hold the run's lock as long
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in not_mine:  # or we would keep each other alive when the parent is gone
            other.close()
        torch.set_num_threads(1)
        try:
            while True:
                job = json.loads(pipe.recv_bytes())
                shape = len(job["clients"]), self._trainer.size
                out = np.frombuffer(self._places[job["place"]], np.float32, shape[0] * shape[1]).reshape(shape)
                outcomes = self._trainer.train(job["round"], job["clients"], self._weights, out, batched=self._batched)
                said = {"outcomes": [asdict(one) for one in outcomes], "spent_s": self._trainer.phases()}
                pipe.send_bytes(json.dumps(said).encode())
        except (EOFError, OSError):
            os._exit(0)
        except Exception as err:
            _log.error("a worker failed: %s", without_words(err))
            os._exit(1)


class _Worker:
    """A process, and what it has to do, the first of it now: (chunk, place)."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.jobs = deque[tuple[int, int]]()

    def send(self, job: int, place: int, words: dict[str, Any]) -> None:
        """Give it a chunk. That it is dead already shows when its answer is read."""
        self.jobs.append((job, place))
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(json.dumps(words).encode())

    def receive(self) -> dict[str, Any] | None:
        """What it says of its first chunk; None: it died over it."""
        try:
            said: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError, ValueError):
            return None
        return said

    def end(self) -> None:
        """At once."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
