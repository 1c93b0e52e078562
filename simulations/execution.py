"""How a population's rounds are computed on this machine: many clients at once or one by one, how many, in how many processes.

Nobody knows beforehand what is fastest for a model, so it is tried: a few clients, a fraction of a second each way. What was chosen is
part of the result: with the same plan, a run without noise repeats bit by bit, with any number of workers.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from ..common.config import Section
from ..common.errors import ConfigError, counted
from .trainer import Trainer

_PROBE_S = 0.6
_CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CHUNK_BYTES = 64 * 2**20
_HAND_OVER_S = 0.001
"""What it costs about to give a worker a chunk and to get it back; less work than that is done here."""
_HAND_OVER_RAY_S = 0.01
"""The same with Flower's messages over Ray."""


class Execution(Section):
    """The plan.

    Attributes:
        batched: clients of a chunk are one computation; else one after the other.
        chunk: clients a worker gets at a time. With `batched` it decides how floats are rounded, so it is part of what repeats.
        workers: processes beside this one; 0: this one does it all. Decides nothing but the time.
    """

    batched: bool
    chunk: Annotated[int, Field(ge=1, le=100_000)]
    workers: Annotated[int, Field(ge=0, le=1024)]

    def words(self) -> str:
        """For the screen."""
        how = f"{counted(self.chunk, 'client')} at once" if self.batched else "clients one by one"
        where = "in this process" if not self.workers else f"in {counted(self.workers, 'process', 'processes')}"
        return f"{how}, {where}"


@dataclass(frozen=True)
class Tried:
    """What was measured: milliseconds a client and round, by way."""

    one_by_one_ms: float | None
    batched_ms: dict[int, float]
    seconds: float


def load_execution(path: Path) -> Execution:
    """A plan from a file: an execution, or a `result.json` that has one.

    Raises:
        ConfigError: neither; says which key is wrong, and what it may be.
    """
    hint = 'Give a file of {"batched": true, "chunk": 16, "workers": 2}, or a result.json that was written by a cohort simulation.'
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read: {err}", hint) from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: not JSON: {err}", hint) from err
    if isinstance(said, dict):
        said = said.get("execution", said)
    if not isinstance(said, dict) or not said.keys() & Execution.model_fields.keys():
        raise ConfigError(f"{path}: no execution plan", hint)
    try:
        return Execution.model_validate({key: value for key, value in said.items() if key not in _FOUND})
    except ValidationError as err:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {_WRONG.get(e['type'], e['msg'])}" for e in err.errors()]
        raise ConfigError(f"{path}: execution plan: " + "; ".join(wrong), hint) from err


_FOUND = ("tried", "not_batched_because")
"""What `fields` says besides the plan."""
_WRONG = {"extra_forbidden": "unknown key", "missing": "missing"}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe(
    trainer: Trainer,
    weights: npt.NDArray[np.float32],
    cohort: int,
    clients: Sequence[int],
    steps: int,
    processes: int,
    *,
    ray: bool = False,
) -> tuple[Execution, Tried]:
    """Try, and choose.

    Args:
        cohort: clients a round.
        clients: some that may be tried, as many as a chunk may have.
        steps: of a client's round.
        processes: how many may compute at a time.
        ray: they are Ray's; else this process is one that may do it all.
    """
    began = time.perf_counter()
    tried_steps = min(steps, 2)

    def seconds(some: Sequence[int], batched: bool) -> float:
        """A client's share of a round, the best of some attempts: whatever else the machine does can only add."""
        out = np.empty((len(some), trainer.size), np.float32)
        best, all_s = math.inf, 0.0
        for attempt in range(9):
            at = time.perf_counter()
            trainer.train(1, some, weights, out, batched=batched, most_steps=tried_steps)
            took = time.perf_counter() - at
            all_s += took
            if attempt or took > _PROBE_S / 4:  # the first one warms up
                best = min(best, took)
            if attempt and all_s > _PROBE_S / 12:
                break
        return best / len(some) * steps / tried_steps

    found: dict[int, float] = {}
    most = max(1, min(cohort, len(clients), _CHUNK_BYTES // (16 * trainer.size)))
    for chunk in sorted({c for c in _CHUNKS if c < most} | {most}) if trainer.why_not is None else ():
        if time.perf_counter() - began > _PROBE_S:
            break
        found[chunk] = seconds(clients[:chunk], True)
        if chunk > 4 and found[chunk] > 1.3 * min(found.values()):
            break
    # Per-record gradients one client at a time are several times slower, and Opacus alone takes 1.5 s to import.
    alone = None if found and trainer.private else seconds(clients[:1], False)
    tried = Tried(
        None if alone is None else 1000 * alone, {c: 1000 * s for c, s in found.items()}, time.perf_counter() - began
    )
    return choose(alone, found, cohort, processes, ray=ray), tried


def choose(
    alone_s: float | None, batched_s: dict[int, float], cohort: int, processes: int, *, ray: bool = False
) -> Execution:
    """The fastest plan, by seconds a client.

    Args:
        alone_s: one by one; None: not to be considered.
        batched_s: by chunk.
        cohort: clients a round.
        processes: how many this machine can run at a time, or Ray.
        ray: they are Ray's, and have to do it all.
    """
    best: tuple[float, Execution] | None = None

    def takes(batched: bool, each: float, clients: int) -> float:
        """Seconds of one chunk of so many clients: of fewer than were tried, about what the next larger one that was takes."""
        if not batched or clients in batched_s:
            return clients * (batched_s[clients] if batched else each)
        return min((c * s for c, s in batched_s.items() if c > clients), default=clients * each)

    ways = [(True, chunk, s) for chunk, s in batched_s.items()]
    if alone_s is not None:
        ways.append((False, _alone_chunk(alone_s, cohort), alone_s))
    hand_over_s = _HAND_OVER_RAY_S if ray else _HAND_OVER_S
    for workers in {processes} if ray else {0, min(processes, cohort)} if processes > 1 else {0}:
        for batched, chunk, each in ways:
            jobs = math.ceil(cohort / chunk)
            if not workers:
                whole, rest = divmod(cohort, chunk)
                round_s = whole * chunk * each + (takes(batched, each, rest) if rest else 0.0)
            else:
                # The last ones to finish decide: whole chunks a worker, and handing over.
                round_s = math.ceil(jobs / workers) * (min(chunk, cohort) * each + hand_over_s)
            if best is None or round_s < best[0]:
                best = round_s, Execution(batched=batched, chunk=min(chunk, cohort), workers=workers)
    assert best is not None
    return best[1]


def _alone_chunk(alone_s: float, cohort: int) -> int:
    """So many at a time that handing over does not matter, and few enough that no worker waits long for another."""
    return max(1, min(math.ceil(0.01 / max(alone_s, 1e-6)), math.ceil(cohort / 8)))


def fields(execution: Execution, tried: Tried | None, why_not: str | None) -> dict[str, Any]:
    """As `result.json` has it."""
    return {
        **execution.model_dump(),
        "tried": None if tried is None else asdict(tried),
        "not_batched_because": why_not,
    }
