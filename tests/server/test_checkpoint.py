"""One file a run: whole, or the one before it."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from hansa.common.errors import OutputError
from hansa.common.identity import sha256
from hansa.server.checkpoint import Checkpoint
from hansa.server.records import Answer
from support import same_arrays

MODEL = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([0.1, np.pi], np.float32),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}
STATE = {"m_t/weight": np.arange(6, dtype=np.float64).reshape(2, 3), "momentum_vector/0": np.array(1.0, np.float32)}
HISTORY = [{"round": 1, "metrics": {"auc": 0.1 + 0.2}, "partners": 3}]


def made() -> Checkpoint:
    return Checkpoint("run-1", 1, dict(MODEL), dict(STATE), list(HISTORY), ["ada", "ben"])


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c"
    assert Checkpoint.load(path) is None
    made().save(path)
    again = Checkpoint.load(path)
    assert again is not None
    assert (again.run_id, again.round, again.history, again.folded) == ("run-1", 1, HISTORY, ["ada", "ben"])
    assert (again.accepted, again.trained, again.answers) == (None, False, {})
    same_arrays(again.model, MODEL)
    same_arrays(again.strategy, STATE)


def test_the_middle_of_a_round(tmp_path: Path) -> None:
    before = made()
    before.accepted, before.trained = ["ada"], True
    before.answers = {"train": {"ada": Answer("q", "ok", "b" * 64, "é"), "ben": Answer("q2", "timeout")}}
    before.save(tmp_path / "c")
    again = Checkpoint.load(tmp_path / "c")
    assert again is not None
    assert (again.accepted, again.trained, again.answers) == (before.accepted, True, before.answers)


def test_every_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "c"
    made().save(path)
    data = path.read_bytes()
    spoilt = [data[:n] for n in range(0, len(data), 7)] + [data + b"x", b"", b"\n", b"x\n", b"\xff" * 100]
    spoilt += [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in range(0, len(data), 3)]
    for bad in spoilt:
        path.write_bytes(bad)
        with pytest.raises(OutputError, match=r"(?s)c: the checkpoint is damaged.*new folder"):
            Checkpoint.load(path)


def test_a_full_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    made().save(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    later = made()
    later.round = 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            later.save(path)
    again = Checkpoint.load(path)
    assert again is not None
    assert again.round == 1
    assert os.listdir(tmp_path) == ["c"]


def test_the_file_is_a_hash_and_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "c"
    made().save(path)
    digest, _, data = path.read_bytes().partition(b"\n")
    assert digest.decode() == sha256(data)
    tensors = load(data)
    same_arrays({n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")}, MODEL)


def test_saving_copies_no_tensor(tmp_path: Path) -> None:
    big = Checkpoint("run-1", 1, {"w": np.zeros(4_000_000, np.float32)}, {"m_t/w": np.zeros(2_000_000)})
    tracemalloc.start()
    try:
        big.save(tmp_path / "c")
        saved = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        Checkpoint.load(tmp_path / "c")
        loaded = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved < 4e6, "32 MB of tensors"
    assert loaded < 36e6, "read once"
