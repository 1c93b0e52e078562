"""The ledger: durable before it is believed, and evident when anything is changed."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.common.errors import LedgerError, OutputError
from hansa.common.identity import canonical, sha256, strict_json
from hansa.common.ledger import ENTRY_TYPE, GENESIS_PREV, Ledger, owner_line, read_ledger
from support import identity

ADA, BEN = identity("ada"), identity("ben")
GENESIS = {"owner": "ada", "role": "partner", "simulated": True}


def made(path: Path, entries: int = 4) -> list[bytes]:
    """A closed ledger of so many entries, as its lines."""
    ledger = Ledger(path, ADA, GENESIS)
    for number in range(1, entries):
        ledger.append("refuse", {"number": number})
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    ledger = Ledger(path, ADA, GENESIS)
    entry = ledger.append("refuse", {"reason": "budget", "many": [1, None, {"x": "ü"}]})
    entries, torn = read_ledger(path, ADA.key)
    assert (entries, torn) == (ledger.entries, b"")
    assert [e.seq for e in entries] == [0, 1]
    assert entries[0].body == {**GENESIS, "key": ADA.key}
    assert entries[1] == entry
    assert (ledger.length, ledger.head) == (2, sha256(path.read_bytes().splitlines()[-1]))
    assert [e.body for e in ledger.of("refuse")] == [entry.body]
    assert "ada (partner)" in owner_line(entries[0])
    ledger.close()
    again = Ledger(path, ADA, {"owner": "another genesis is not written"})
    assert (again.entries, again.recovered) == (entries, 0)
    again.close()


def test_a_body_with_a_float_is_no_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", ADA, GENESIS)
    with pytest.raises(TypeError):
        ledger.append("refuse", {"sigma": 1.0})
    ledger.append("refuse", {"sigma": "1.0"})
    assert len(read_ledger(tmp_path / "l")[0]) == 2


# -- one writer ------------------------------------------------------------------------------------------------------

_OTHER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from hansa.common.identity import Identity
    from hansa.common.errors import LedgerError
    from hansa.common.ledger import Ledger
    try:
        Ledger(Path(sys.argv[1]), Identity.load("ada", Path(sys.argv[2])), {}).append("refuse", {})
    except LedgerError as err:
        print(err.message)
        sys.exit(3)
""")


def _other_process(path: Path) -> subprocess.CompletedProcess[str]:
    key = path.with_name("identity.key")
    ADA.save(key)
    return subprocess.run(
        [sys.executable, "-c", _OTHER, str(path), str(key)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / ".dev")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, ADA, GENESIS)
    before = path.read_bytes()
    refused = _other_process(path)
    assert refused.returncode == 3, refused.stderr
    assert "another process is writing this ledger" in refused.stdout
    assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="another process"):
        Ledger(path, ADA, GENESIS)  # in this process, too
    ledger.append("refuse", {})
    ledger.close()
    done = _other_process(path)
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(path, ADA.key)[0]) == 3


def test_a_closed_ledger_takes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", ADA, GENESIS)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.append("refuse", {})


# -- durable ---------------------------------------------------------------------------------------------------------


def test_an_entry_is_acknowledged_after_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path, ADA, GENESIS)
    seen: list[tuple[int, int]] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        seen.append((path.stat().st_size, ledger.length))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    size = path.stat().st_size
    ledger.append("refuse", {})
    ((at, length),) = seen
    assert at == path.stat().st_size > size, "fsync came before the bytes"
    assert length == 1, "the entry counted before it was on disk"


def test_a_new_ledgers_name_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        folders.append(os.readlink(f"/proc/self/fd/{handle}"))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    Ledger(tmp_path / "l", ADA, GENESIS)
    assert str(tmp_path) in folders


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_torn_last_line_is_cut_and_recorded(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "l"
    lines = made(path)
    torn = lines[-1][:cut]
    path.write_bytes(b"".join(lines[:-1]) + torn)
    entries, rest = read_ledger(path, ADA.key)
    assert (len(entries), rest) == (3, torn)
    ledger = Ledger(path, ADA, GENESIS)
    assert ledger.recovered == len(torn)
    ledger.append("refuse", {"after": 1})
    ledger.close()
    entries, rest = read_ledger(path, ADA.key)
    assert rest == b""
    assert [e.type for e in entries] == ["genesis", "refuse", "refuse", "recovered", "refuse"]
    assert entries[3].body == {"torn_bytes": len(torn), "torn_sha256": sha256(torn)}


@pytest.mark.parametrize("kept", [b"", b'{"payl', b"\x00" * 50])
def test_a_crash_in_the_first_line(tmp_path: Path, kept: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(kept)
    Ledger(path, ADA, GENESIS).close()
    kinds = [e.type for e in read_ledger(path, ADA.key)[0]]
    assert kinds == (["genesis", "recovered"] if kept else ["genesis"])


def test_a_full_disk_leaves_it_intact(tmp_path: Path) -> None:
    """The kernel cuts the write short and then says no (RLIMIT_FSIZE); later there is room again."""
    path = tmp_path / "l"
    ledger = Ledger(path, ADA, GENESIS)
    ledger.append("refuse", {})
    before, length, head = path.read_bytes(), ledger.length, ledger.head
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 1, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limit[1]))
            with pytest.raises(OutputError):
                ledger.append("debit", {"big": "x" * 1000})
            assert path.read_bytes() == before
            assert (ledger.length, ledger.head) == (length, head)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    ledger.append("refuse", {})
    assert len(read_ledger(path, ADA.key)[0]) == 3


def test_what_could_not_be_synced_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path, ADA, GENESIS)
    before, original, failed = path.read_bytes(), os.fsync, []

    def once(handle: int) -> None:
        if not failed:
            failed.append(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(OutputError, match=r"(?s)disk is full; nothing that was recorded is lost.*--resume"):
        ledger.append("debit", {})
    assert path.read_bytes() == before
    ledger.append("refuse", {})
    assert [e.type for e in read_ledger(path, ADA.key)[0]] == ["genesis", "refuse"]


def test_nothing_is_written_behind_what_cannot_be_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When not even the cut succeeds, the file may end in half a line; going on would bury it."""
    path = tmp_path / "l"
    ledger = Ledger(path, ADA, GENESIS)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        patch.setattr(os, "ftruncate", broken)
        with pytest.raises(OutputError, match="Input/output error"):
            ledger.append("debit", {})
    with pytest.raises(LedgerError, match="Open it again"):
        ledger.append("refuse", {})
    again = Ledger(path, ADA, GENESIS)
    again.append("refuse", {})
    assert [e.seq for e in read_ledger(path, ADA.key)[0]] == list(range(again.length))


# -- evident ---------------------------------------------------------------------------------------------------------


def fails(path: Path, line: int, words: str = "", key: str | None = ADA.key) -> None:
    with pytest.raises(LedgerError, match=words or None) as caught:
        read_ledger(path, key)
    assert caught.value.message.startswith(f"{path}:{line}: "), caught.value.message


def test_edits_reorder_duplicates_and_deletions(tmp_path: Path) -> None:
    path = tmp_path / "l"
    a, b, c, d = made(path)
    for lines, line, words in (
        ([a, c, b, d], 2, "out of order"),
        ([a, b, b, c, d], 3, "out of order"),
        ([a, c, d], 2, "missing"),
        ([b, c, d], 1, "missing"),
        ([a, b, d], 3, "missing"),
        ([a, b, b"\n", c, d], 3, "JSON"),
        ([b"\n", a, b, c, d], 1, "JSON"),
        ([a, b + b" ", c, d], 3, ""),
        ([a, b.replace(b"\n", b"\r\n"), c, d], 2, "layout"),
    ):
        path.write_bytes(b"".join(lines))
        fails(path, line, words)
        with pytest.raises(LedgerError):
            Ledger(path, ADA, GENESIS)
    path.write_bytes(b"".join([a, b]))
    assert len(read_ledger(path)[0]) == 2, "a cut end alone is not seen here: closing checkpoints are for that"


def test_every_byte_of_a_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lines = made(path, 3)
    start = len(lines[0])
    data = b"".join(lines)
    rng = random.Random(0)
    for place in range(start, start + len(lines[1])):
        value = rng.choice([v for v in range(256) if v != data[place]])
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        with pytest.raises(LedgerError) as caught:
            read_ledger(path, ADA.key)
        assert caught.value.message.startswith(f"{path}:2: ")


def sealed(seq: Any = 1, prev: str = "", kind: Any = "refuse", body: Any = None, who: Any = ADA, **more: Any) -> bytes:
    """A line that its signer made up."""
    payload = {"v": 1, "seq": seq, "prev": prev, "time": "2026-01-01T00:00:00Z", "type": kind, "body": body or {}}
    made: bytes = who.seal(ENTRY_TYPE, canonical({**payload, **more}))
    return made + b"\n"


def test_well_signed_lines_that_do_not_belong(tmp_path: Path) -> None:
    path = tmp_path / "l"
    (first,) = made(path, 1)
    prev = sha256(first[:-1])
    good = sealed(1, prev)
    path.write_bytes(first + good)
    assert len(read_ledger(path)[0]) == 2
    for line, words in (
        (sealed(1, "f" * 64), "does not follow"),
        (sealed(1, GENESIS_PREV), "does not follow"),
        (sealed(2, prev), "sequence number 2, wanted 1"),
        (sealed(True, prev), "sequence number True"),
        (sealed("1", prev), "sequence number '1'"),
        (sealed(1, prev, who=BEN), "not signed by"),
        (sealed(1, prev, v=2), "unknown version"),
        (sealed(1, prev, v=True), "unknown version"),
        (sealed(1, prev, extra=1), "other fields"),
        (sealed(1, prev, kind=7), "wrong type"),
        (sealed(1, prev, time=7), "wrong type"),
        (sealed(1, prev, body=[1]), "wrong type"),
        (ADA.seal(ENTRY_TYPE, b"[]") + b"\n", "other fields"),
        (ADA.seal(ENTRY_TYPE, b"") + b"\n", "not valid JSON"),
        (ADA.seal(ENTRY_TYPE, b'{"a":"\\ud800"}') + b"\n", "not valid JSON"),
        (ADA.seal(ENTRY_TYPE, b"[" * 400 + b"]" * 400) + b"\n", "deep"),
        (ADA.seal("application/other", b"{}") + b"\n", "type"),
    ):
        path.write_bytes(first + line)
        fails(path, 2, words)
    envelope = strict_json(good)
    spaced = ADA.seal(
        ENTRY_TYPE, b" " + canonical({"v": 1, "seq": 1, "prev": prev, "time": "", "type": "", "body": {}})
    )
    path.write_bytes(first + spaced + b"\n")
    fails(path, 2, "unusual layout")
    envelope["signatures"] *= 2
    path.write_bytes(first + canonical(envelope) + b"\n")
    fails(path, 2, "exactly one signature")


@pytest.mark.parametrize("key", ["zz", 7, None, [], "é", "ab" * 32, "AB" * 32])
def test_a_genesis_with_a_key_that_is_none(tmp_path: Path, key: object) -> None:
    path = tmp_path / "l"
    path.write_bytes(sealed(0, GENESIS_PREV, "genesis", {"key": key}))
    fails(path, 1, key=None)


def test_another_owner(tmp_path: Path) -> None:
    path = tmp_path / "l"
    made(path)
    fails(path, 1, "not signed by", key=BEN.key)
    with pytest.raises(LedgerError):
        Ledger(path, BEN, GENESIS)
    Ledger(path, ADA, GENESIS).close()  # the failed one let go of the lock


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"(?s)No such file.*ledger.jsonl"):
        read_ledger(tmp_path / "none")
    with pytest.raises(LedgerError, match="Is a directory"):
        read_ledger(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        Ledger(tmp_path / "file" / "l", ADA, GENESIS)


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(data)
    if b"\n" in data:
        with pytest.raises(LedgerError):
            read_ledger(path)
    else:
        assert read_ledger(path) == ([], data)
