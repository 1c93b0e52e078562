"""One file a run: model, strategy state, round and metrics so far, replaced atomically after every round."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..common.errors import OutputError
from ..common.identity import sha256, write_whole
from .records import Answer

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Checkpoint:
    """Where a run stands.

    Attributes:
        round: rounds that are complete.
        trained: the next round's updates are in `model` already, its evaluation is still to come.
        accepted: who accepted the run; None until they were asked.
        folded: whose updates are in the last training.
        answers: purpose -> partner -> answer, of the last step; the ledger may not have them yet.
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

    def save(self, path: Path) -> None:
        """Write, whole or not at all.

        Raises:
            OutputError: it could not be written; the previous checkpoint is untouched.
        """
        tensors = {f"model/{k}": _contiguous(v) for k, v in self.model.items()}
        tensors |= {f"strategy/{k}": _contiguous(v) for k, v in self.strategy.items()}
        # asdict would copy every tensor.
        answers = {p: {n: asdict(a) for n, a in given.items()} for p, given in self.answers.items()}
        about = {"run_id": self.run_id, "round": self.round, "history": self.history, "folded": self.folded}
        about |= {"accepted": self.accepted, "trained": self.trained, "answers": answers}
        data = save(tensors, metadata={"hansa": json.dumps(about)})
        write_whole(path, sha256(data).encode() + b"\n" + data)

    @classmethod
    def load(cls, path: Path) -> Checkpoint | None:
        """The checkpoint at `path`, or None when there is none yet.

        Raises:
            OutputError: it is there but damaged.
        """
        if not path.exists():
            return None
        try:
            digest, _, data = path.read_bytes().partition(b"\n")
            if sha256(data).encode() != digest:
                raise ValueError("its bytes have changed")
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["hansa"])
        except (OSError, SafetensorError, ValueError, KeyError) as err:
            raise OutputError(f"{path}: the checkpoint is damaged", "Start the run again in a new folder.") from err
        model = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        strategy = {k.removeprefix("strategy/"): v for k, v in tensors.items() if k.startswith("strategy/")}
        about["answers"] = {
            purpose: {name: Answer(**answer) for name, answer in answers.items()}
            for purpose, answers in about["answers"].items()
        }
        return cls(**about, model=model, strategy=strategy)


def model_bytes(model: Arrays) -> bytes:
    """A model as the bytes of a safetensors file: the same arrays give the same bytes."""
    return save({name: _contiguous(model[name]) for name in sorted(model)})


def _contiguous(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(value, order="C")  # np.ascontiguousarray would make a vector of a scalar


def model_sha256(model: Arrays) -> str:
    """The name of a model in ledgers and closing checkpoints."""
    return sha256(model_bytes(model))
