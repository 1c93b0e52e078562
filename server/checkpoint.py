"""One file a run: model, strategy state, round and metrics so far, replaced atomically after every round."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import OutputError
from ..common.identity import write_whole
from ..common.model import Arrays, file_sha256, tensor_bytes, tensors_from
from .records import Answer

_DIGEST_BYTES = 65
"""The file begins with the SHA-256 of what follows, in hex, and a line break."""


@dataclass
class Checkpoint:
    """Where a run stands.

    Attributes:
        round: rounds that are complete.
        trained: the next round's updates are in `model` already, its evaluation is still to come.
        accepted: who accepted the run; None until they were asked, and where nobody is (a million names would stand here).
        folded: whose updates are in the last training.
        answers: purpose -> partner -> answer, of the last step; the ledger may not have them yet.
        witness: partner -> what the next request to train asks of it about heads; asked again, it is the same.
        keys: partner -> its signed key of secure aggregation, in base64, as it accepted the run.
        average: mean of the models of the rounds that count for the result, float64 by name; empty before the first of them.
    """

    run_id: str
    round: int
    model: Arrays
    strategy: Arrays = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    accepted: list[str] | None = None
    trained: bool = False
    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)
    witness: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    average: Arrays = field(default_factory=dict)

    @property
    def result(self) -> Arrays:
        """The model that a run which ended here would come to."""
        return {n: self.average[n].astype(np.float32) for n in self.model} if self.average else self.model

    def average_in(self, which: int) -> None:
        """Take the model into the mean as its `which`-th, from 1."""
        for name, value in self.model.items():
            mean = self.average.setdefault(name, np.zeros(value.shape))
            mean += (value - mean) / which

    def save(self, path: Path) -> None:
        """Write, whole or not at all; no tensor is copied for it.

        Raises:
            OutputError: it could not be written; the previous checkpoint is untouched.
        """
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)

        def whole() -> Iterator[bytes | memoryview]:
            yield digest.hexdigest().encode() + b"\n"
            yield from self._parts()

        write_whole(path, whole())

    def _parts(self) -> Iterator[bytes | memoryview]:
        tensors = {f"model/{k}": v for k, v in self.model.items()}
        tensors |= {f"strategy/{k}": v for k, v in self.strategy.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        # asdict would copy every tensor.
        answers = {p: {n: dict(vars(a)) for n, a in given.items()} for p, given in self.answers.items()}
        about = {"run_id": self.run_id, "round": self.round, "history": self.history, "folded": self.folded}
        about |= {"accepted": self.accepted, "trained": self.trained, "answers": answers, "witness": self.witness}
        about |= {"keys": self.keys}
        return tensor_bytes(tensors, json.dumps(about))

    @classmethod
    def load(cls, path: Path) -> Checkpoint | None:
        """The checkpoint at `path`, or None when there is none yet.

        Raises:
            OutputError: it is there but damaged.
        """
        if not path.exists():
            return None
        try:
            with path.open("rb") as file:
                stated = file.read(_DIGEST_BYTES)
            if file_sha256(path, _DIGEST_BYTES).encode() + b"\n" != stated:
                raise ValueError("its bytes have changed")
            tensors, text = tensors_from(path, _DIGEST_BYTES)
            about = _about(json.loads(text or ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise OutputError(f"{path}: the checkpoint is damaged", "Start the run again in a new folder.") from err
        model = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        strategy = {k.removeprefix("strategy/"): v for k, v in tensors.items() if k.startswith("strategy/")}
        average = {k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")}
        return cls(**about, model=model, strategy=strategy, average=average)


_ABOUT: dict[str, type | tuple[type, ...]] = {
    "run_id": str,
    "round": int,
    "history": list,
    "folded": list,
    "accepted": (list, type(None)),
    "trained": bool,
    "answers": dict,
    "witness": dict,
    "keys": dict,
}


def _about(said: Any) -> dict[str, Any]:
    """What a checkpoint says besides its tensors, of the types that it was saved with."""
    if set(said) != set(_ABOUT) or not all(isinstance(said[name], kind) for name, kind in _ABOUT.items()):
        raise ValueError("other fields than a checkpoint has")
    answers = {
        purpose: {name: Answer(**answer) for name, answer in given.items()}
        for purpose, given in said["answers"].items()
    }
    return {**said, "answers": answers}
