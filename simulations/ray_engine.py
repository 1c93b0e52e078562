"""Chunks of clients trained by Ray's processes, on this machine or a cluster, as Flower's simulation runtime runs them.

One Flower message a chunk goes to a worker and one comes back; models and updates travel as raw bytes. A worker makes its Trainer from
the charter and the configuration, once: population data sets are packaged, so every machine has them. A worker that dies is started
anew by Ray and gets its chunk again; a chunk is answered once, so nothing is counted twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..clients.app import local_settings, without_words
from ..common.charter import SignedCharter
from ..common.config import Federation
from ..common.errors import ConfigError, HansaError, RunFailed
from ..common.flower import ClientApp, ConfigRecord, Context, Message, RecordDict
from ..common.identity import sha256
from ..common.plan import SOFTWARE
from ..common.tasks import code_sha256, initial_model, load_task
from .clients import Clients, clients_of
from .execution import Execution, cores
from .sources import data_sha256
from .trainer import Outcome, Trainer

if TYPE_CHECKING:
    from .runtime import Runtime


Floats = npt.NDArray[np.float32]
_AHEAD = 3
"""Chunks on their way a worker: one is being trained while others are sent and read."""
_AHEAD_BYTES = 256 * 2**20
_DAY_S = 86400.0
_POLL_S = 0.002
_CHECK_S = 3.0
"""Without an answer for so long, it is looked after whether all machines are there."""


class RayEngine:
    """Flower's runtime, running; `executor` trains with it.

    Args:
        workers: processes; None: one a core, of this machine or of the cluster.

    Attributes:
        count: how many there are.

    Raises:
        ConfigError: Ray is not installed or cannot be started.
    """

    def __init__(
        self, signed: SignedCharter, config: Federation, clients: Clients, base: Path, workers: int | None
    ) -> None:
        try:
            from .runtime import Runtime
        except ImportError as err:
            if (err.name or "").partition(".")[0] != "ray":
                raise
            raise ConfigError("the engine ray needs Ray, which is not installed", "pip install 'hansa[ray]'") from err
        self._setup = setup(signed, config, clients, base)
        self._runtime: Runtime = Runtime(CohortApp(), workers, cores())
        self.count = self._runtime.count
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        """Have every worker make its Trainer: what a machine lacks shows before anything is spent."""
        everybody = RayExecutor(self._runtime, self._setup, 0, 1, batched=False)
        try:
            for _ in everybody.train(0, np.empty(0, np.float32), [[]] * self.count):
                pass
        except RunFailed as err:
            raise ConfigError(err.message, err.hint) from err

    def executor(self, size: int, plan: Execution) -> RayExecutor:
        """Who trains by this plan; parameters `size`."""
        return RayExecutor(self._runtime, self._setup, size, plan.chunk, batched=plan.batched)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._runtime.close()


class RayExecutor:
    """See `grid.Executor`.

    Args:
        setup: what a worker makes its Trainer from.
        size: parameters.
        chunk: clients a chunk has at most.

    Raises (by train):
        RunFailed: a chunk's workers were killed again and again, a worker has other code or data, or machines went away.
    """

    def __init__(self, runtime: Runtime, setup: bytes, size: int, chunk: int, *, batched: bool) -> None:
        self._runtime, self._setup, self._size, self._batched = runtime, setup, size, batched
        self._nodes = list(runtime.grid.get_node_ids())
        fit = _AHEAD_BYTES // max(1, 4 * size * chunk)
        self._ahead = max(runtime.count, min(_AHEAD * runtime.count, fit))
        self._left: set[str] = set()  # asked for by a round that was not finished: nobody wants their answers
        self._spent: dict[str, float] = {}

    def train(
        self, number: int, weights: Floats, chunks: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], Floats, list[Outcome]]]:
        """Chunks in order. While the first is waited for, others are trained."""
        model = weights.tobytes()
        asked: dict[str, int] = {}
        finished: dict[int, tuple[Floats, list[Outcome]]] = {}
        following = 0
        try:
            for turn, clients in enumerate(chunks):
                heard = time.monotonic()
                while turn not in finished:
                    while following < len(chunks) and len(asked) + len(finished) < self._ahead:
                        asked[self._ask(number, model, chunks[following], following)] = following
                        following += 1
                    replies = list(self._runtime.grid.pull_messages([*asked, *self._left]))
                    for reply in replies:
                        self._left.discard(name := reply.metadata.reply_to_message_id)
                        if (job := asked.pop(name, None)) is not None:
                            finished[job] = self._read(number, reply, chunks[job])
                    if replies:
                        heard = time.monotonic()
                    elif time.monotonic() - heard > _CHECK_S:
                        self._runtime.check()
                        heard = time.monotonic()
                    else:
                        time.sleep(_POLL_S)
                yield clients, *finished.pop(turn)
        finally:
            self._left.update(asked)

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last call, added up over processes."""
        spent, self._spent = self._spent, {}
        return spent

    def close(self) -> None:
        """Nothing: the engine is closed by who made it."""

    def _ask(self, number: int, model: bytes, clients: Sequence[int], job: int) -> str:
        told: dict[str, Any] = {
            "round": number,
            "clients": np.asarray(clients, np.int64).tobytes(),
            "batched": self._batched,
        }
        content = RecordDict({"chunk": ConfigRecord({**told, "setup": self._setup, "model": model})})
        node = self._nodes[job % len(self._nodes)]
        message = self._runtime.grid.create_message(content, "train", node, str(number), _DAY_S)
        return next(iter(self._runtime.grid.push_messages([message])))

    def _read(self, number: int, reply: Message, clients: Sequence[int]) -> tuple[Floats, list[Outcome]]:
        if reply.has_error():
            self._runtime.check()  # or is it that a machine is gone?
            raise RunFailed(
                f"round {number}: Ray's workers died over the same clients again and again",
                "Out of memory, perhaps: fewer workers or smaller chunks (--workers, --execution). Go on with --resume.",
            )
        record: Any = reply.content["chunk"]
        if "failed" in record:
            raise RunFailed(f"round {number}: a Ray worker cannot train: {record['failed']}", record["hint"])
        updates = np.frombuffer(record["updates"], np.float32).reshape(len(clients), self._size)
        said = json.loads(record["said"])
        for phase, seconds in said["spent_s"].items():
            self._spent[phase] = self._spent.get(phase, 0.0) + seconds
        return updates, [Outcome.from_fields(one) for one in said["outcomes"]]


# -- in a worker -----------------------------------------------------------------------------------------------------------


class CohortApp(ClientApp):
    """Trains the chunk that a message has, on whatever machine it is."""

    def __reduce__(self) -> tuple[type[CohortApp], tuple[()]]:
        return CohortApp, ()

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, whatever happens."""
        record: Any = message.content["chunk"]
        try:
            made = _work(record)
        except HansaError as err:
            made = {"failed": err.message, "hint": err.hint}
        except Exception as err:
            made = {"failed": without_words(err), "hint": "This is a fault in Hansa, or in the task."}
        return Message(RecordDict({"chunk": ConfigRecord(made)}), reply_to=message)


_trainers: dict[str, Trainer] = {}


def _work(record: Any) -> dict[str, Any]:
    trainer = _trainer_of(record["setup"])
    clients = np.frombuffer(record["clients"], np.int64).tolist()
    weights = np.frombuffer(record["model"], np.float32).copy()  # torch wants what it could write to
    out = np.empty((len(clients), trainer.size), np.float32)
    outcomes = trainer.train(record["round"], clients, weights, out, batched=record["batched"]) if clients else []
    said = {"outcomes": [asdict(one) for one in outcomes], "spent_s": trainer.phases()}
    return {"updates": out.tobytes(), "said": json.dumps(said)}


def _trainer_of(data: bytes) -> Trainer:
    """The Trainer of this setup, made once.

    Raises:
        ConfigError: this machine has other code or rows than the one that leads.
        HansaError: as `clients_of` and `load_task`.
    """
    key = sha256(data)
    if key not in _trainers:
        torch.set_num_threads(1)
        said = json.loads(data)
        signed = SignedCharter.parse(said["charter"].encode())
        charter, task = signed.charter, load_task(signed.charter.task.name)
        here = {**_software(), "task": code_sha256(charter.task.name)}
        if wrong := [f"{what} {is_!r} instead of {said[what]!r}" for what, is_ in here.items() if said[what] != is_]:
            raise ConfigError(
                f"its machine has {', '.join(wrong)}", "Install the same on every machine of the cluster."
            )
        config, base = Federation.model_validate(said["config"]), Path(said["base"])
        clients = clients_of(config, base, task)
        if (_rows(clients), data_sha256(config, base)) != (said["rows"], said["data"]):
            raise ConfigError(
                "its machine has other rows", "Install the same data set on every machine of the cluster."
            )
        assert charter.population is not None
        model = initial_model(task, charter.model_seed)
        _trainers.clear()
        _trainers[key] = Trainer(
            task,
            model,
            clients,
            local_settings(charter),
            charter.population.declared_records,
            charter.model_seed,
        )
        _trainers[key].secret = charter.privacy.unit == "client"
    return _trainers[key]


def setup(signed: SignedCharter, config: Federation, clients: Clients, base: Path) -> bytes:
    """What a worker makes its Trainer from: charter and configuration, and what its machine must have as this one does."""
    told = {
        "charter": signed.to_bytes().decode(),
        "config": config.model_dump(mode="json"),
        "base": str(base.resolve()),
        "task": code_sha256(signed.charter.task.name),
        "rows": _rows(clients),
        "data": data_sha256(config, base),
        **_software(),
    }
    return json.dumps(told).encode()


def _software() -> dict[str, str]:
    return {"software": SOFTWARE, "torch": torch.__version__, "numpy": np.__version__}


def _rows(clients: Clients) -> str:
    """A digest of the first and the last client's rows."""
    ends = [clients.open(number).train for number in (0, len(clients) - 1)]
    return sha256(b"".join(part.contiguous().numpy().tobytes() for rows in ends for part in (rows.x, rows.y)))
