"""Finished replies on the node's disk."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from hansa.clients.outbox import Outbox
from hansa.common.errors import MessageError, OutputError
from hansa.common.flower import RecordDict
from hansa.common.messages import SignedWire, to_bytes
from support import charter, identity, request, weights

WIRE = SignedWire(identity("ada"), {}, charter().sha256)


def reply(value: float = 1.0) -> RecordDict:
    return WIRE.encode(request(charter(), "train", 1), WIRE.pack(weights(value)))[0]


def test_what_is_put_is_what_is_got(tmp_path: Path) -> None:
    box, made = Outbox(tmp_path / "outbox"), reply()
    box.put("run", "a", made)
    assert to_bytes(Outbox(tmp_path / "outbox").get("run", "a")) == to_bytes(made)
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_run_is_dropped_whole_and_alone(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    for run in ("one", "two"):
        for name in ("a", "b"):
            box.put(run, name, reply())
    box.drop("one")
    box.drop("one")
    box.drop("never")
    with pytest.raises(MessageError, match="no longer in the outbox"):
        box.get("one", "a")
    assert box.get("two", "b")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", ".", "a" * 5000, "a\0b", "é\n"])
def test_names_from_a_peer_are_no_paths(tmp_path: Path, name: str) -> None:
    box = Outbox(tmp_path / "deep" / "outbox")
    box.put(name, name, reply())
    assert box.get(name, name)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1
    assert files[0].is_relative_to(tmp_path / "deep" / "outbox")


def test_a_damaged_file(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.put("run", "a", reply())
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    for spoilt in (b"", b"nonsense", file.read_bytes()[:60], file.read_bytes()[:-1]):
        file.write_bytes(spoilt)
        with pytest.raises(MessageError):
            box.get("run", "a")


def test_a_full_disk_keeps_the_earlier_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(tmp_path)
    box.put("run", "a", reply(1.0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            box.put("run", "a", reply(2.0))
    assert to_bytes(box.get("run", "a")) == to_bytes(reply(1.0))
