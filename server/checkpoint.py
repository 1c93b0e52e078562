"""One file a run: model, strategy state, round and metrics so far, replaced atomically after every round."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..common.errors import OutputError
from ..common.identity import sha256, write_whole

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Checkpoint:
    """Where a run stands after `round` rounds.

    Attributes:
        folded: whose updates are in the last of them.
    """

    run_id: str
    round: int
    model: Arrays
    strategy: Arrays = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write, whole or not at all.

        Raises:
            OutputError: it could not be written; the previous checkpoint is untouched.
        """
        tensors = {f"model/{k}": _contiguous(v) for k, v in self.model.items()}
        tensors |= {f"strategy/{k}": _contiguous(v) for k, v in self.strategy.items()}
        about = {"run_id": self.run_id, "round": self.round, "history": self.history, "folded": self.folded}
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
        return cls(about["run_id"], about["round"], model, strategy, about["history"], about["folded"])


def model_bytes(model: Arrays) -> bytes:
    """A model as the bytes of a safetensors file: the same arrays give the same bytes."""
    return save({name: _contiguous(model[name]) for name in sorted(model)})


def _contiguous(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(value, order="C")  # np.ascontiguousarray would make a vector of a scalar


def model_sha256(model: Arrays) -> str:
    """The name of a model in ledgers and closing checkpoints."""
    return sha256(model_bytes(model))
