"""The ledger: durable before it is believed, and evident when anything is changed."""

from __future__ import annotations

import base64
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

from hansa.common.errors import LedgerError, MessageError, OutputError
from hansa.common.identity import canonical, sha256, strict_json
from hansa.common.ledger import (
    ENTRY_TYPE,
    UNDISCLOSED,
    Counter,
    Entry,
    Ledger,
    owner_line,
    read_ledger,
    redacted,
)
from hansa.common.merkle import EMPTY, leaf_hash, verify_consistency, verify_inclusion
from merkle_support import inclusion_proof, root_of
from support import identity, unwrapped

ADA, BEN = identity("ada"), identity("ben")
GENESIS = {"owner": "ada", "role": "partner", "simulated": True}


def made(path: Path, entries: int = 4) -> list[bytes]:
    """A closed ledger of so many entries, as its lines."""
    ledger = Ledger(path, ADA, GENESIS)
    for number in range(1, entries):
        ledger.append("refuse", {"number": number})
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def header_of(line: bytes) -> dict[str, Any]:
    return strict_json(base64.b64decode(strict_json(line)["envelope"]["payload"]))


PRIVACY = {"lineage": "5" * 32, "debit": {"mechanism": "poisson-gaussian/1", "q": "0.1", "sigma": "1.5", "steps": 6}}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    ledger = Ledger(path, ADA, GENESIS)
    entry = ledger.append(
        "refuse", {"reason": "budget", "many": [1, None, {"x": "ü"}]}, charter="c" * 64, privacy=PRIVACY
    )
    entries, torn = read_ledger(path, ADA.key)
    assert (entries, torn) == (ledger.entries, b"")
    assert [e.seq for e in entries] == [0, 1]
    assert entries[0].body == {**GENESIS, "key": ADA.key}
    assert (entries[0].charter, entries[0].privacy) == (None, None)
    assert (entry.charter, entry.privacy) == ("c" * 64, PRIVACY)
    assert entries[1] == entry
    assert (entries[1].leaf, entries[1].root) == (entry.leaf, entry.root)
    assert [e.body for e in ledger.of("refuse")] == [entry.body]
    assert "ada (partner)" in owner_line(entries[0])
    ledger.close()
    again = Ledger(path, ADA, {"owner": "another genesis is not written"})
    assert (again.entries, again.recovered) == (entries, 0)
    again.close()


def test_every_entry_signs_for_all_before_it(tmp_path: Path) -> None:
    """The tree is over the headers as they were signed; each names the root of those before it."""
    path = tmp_path / "l"
    lines = made(path, 9)
    headers = [base64.b64decode(strict_json(line)["envelope"]["payload"]) for line in lines]
    leaves = [leaf_hash(header) for header in headers]
    entries = read_ledger(path, ADA.key)[0]
    for number, entry in enumerate(entries):
        assert entry.leaf == leaves[number]
        assert entry.root == root_of(leaves[: number + 1]).hex()
        assert strict_json(headers[number])["root"] == root_of(leaves[:number]).hex()
    ledger = Ledger(path, ADA, GENESIS)
    assert (ledger.length, ledger.root, ledger.head()) == (9, entries[-1].root, {"length": 9, "root": entries[-1].root})
    top = bytes.fromhex(ledger.root)
    for number in range(9):
        assert ledger.states(number + 1, entries[number].root)
        proof = inclusion_proof([entry.leaf for entry in ledger.entries], number)
        verify_inclusion(leaves[number], number, 9, proof, top)
        proof = [bytes.fromhex(h) for h in ledger.consistency(number + 1)]
        verify_consistency(number + 1, bytes.fromhex(entries[number].root), 9, top, proof)
    first = entries[0].root
    for length, root in ((0, EMPTY.hex()), (-1, first), (10, first), (True, first), ("1", first), (1.0, first),
                         (None, first), (1, entries[1].root), (1, None), (9, first)):  # fmt: skip
        assert not ledger.states(length, root), (length, root)
    with pytest.raises(LedgerError, match="no tree of 10 in one of 9"):
        ledger.consistency(10)


def test_salts_are_new_in_every_entry(tmp_path: Path) -> None:
    lines = made(tmp_path / "l", 20)
    salts = {strict_json(line)["body"]["salt"] for line in lines}
    assert len(salts) == 20
    assert all(len(bytes.fromhex(salt)) == 16 for salt in salts)


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
    before, length, head = path.read_bytes(), ledger.length, ledger.head()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 1, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limit[1]))
            with pytest.raises(OutputError):
                ledger.append("debit", {"big": "x" * 1000})
            assert path.read_bytes() == before
            assert (ledger.length, ledger.head()) == (length, head)
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


BODY = {"salt": "5" * 32, "time": "2026-01-01T00:00:00Z", "type": "refuse", "charter": None, "data": {}}


def joined(envelope: bytes, body: Any = None) -> bytes:
    """A line of these two."""
    return b'{"body":' + canonical(body) + b',"envelope":' + envelope + b"}\n"


def sealed(seq: Any, root: Any, body: Any = BODY, who: Any = ADA, shown: Any = None, **more: Any) -> bytes:
    """A line that its signer made up; `shown`: another body than was signed."""
    header = {"v": 2, "seq": seq, "root": root, "body_sha256": sha256(canonical(body)), "privacy": None}
    return joined(who.seal(ENTRY_TYPE, canonical({**header, **more})), body if shown is None else shown)


def bare(line: bytes) -> bytes:
    """The line without its body."""
    return b'{"envelope":' + canonical(strict_json(line)["envelope"]) + b"}\n"


def test_well_signed_lines_that_do_not_belong(tmp_path: Path) -> None:
    path = tmp_path / "l"
    (first,) = made(path, 1)
    root = read_ledger(path)[0][0].root
    good = sealed(1, root)
    for line in (good, bare(good), sealed(1, root, privacy={"any": []}), sealed(1, root, {**BODY, "charter": "c"})):
        path.write_bytes(first + line)
        assert len(read_ledger(path)[0]) == 2
    header = {"v": 2, "seq": 1, "root": root, "body_sha256": sha256(canonical(BODY)), "privacy": None}
    spaced = ADA.seal(ENTRY_TYPE, b" " + canonical(header))
    envelope = strict_json(good)["envelope"]
    twice = {**envelope, "signatures": envelope["signatures"] * 2}
    for line, words in (
        (sealed(1, "f" * 64), "does not follow"),
        (sealed(1, EMPTY.hex()), "does not follow"),
        (sealed(1, root.upper()), "does not follow"),
        (sealed(1, None), "does not follow"),
        (sealed(2, root), "sequence number 2, wanted 1"),
        (sealed(0, root), "sequence number 0, wanted 1"),
        (sealed(True, root), "sequence number True"),
        (sealed("1", root), "sequence number '1'"),
        (sealed(1, root, who=BEN), "not signed by"),
        (sealed(1, root, v=1), "unknown version"),
        (sealed(1, root, v=3), "unknown version"),
        (sealed(1, root, v="2"), "unknown version"),
        (sealed(1, root, v=True), "unknown version"),
        (sealed(1, root, extra=1), "other fields"),
        (sealed(1, root, prev="0" * 64), "other fields"),
        (sealed(1, root, privacy=[]), "unusual layout"),
        (sealed(1, root, privacy="debit"), "unusual layout"),
        (sealed(1, root, privacy=0), "unusual layout"),
        (sealed(1, root, shown={**BODY, "type": "commit"}), "another body"),
        (sealed(1, root, shown={**BODY, "salt": "6" * 32}), "another body"),
        (sealed(1, root, shown={}), "another body"),
        (sealed(1, root, body_sha256=None), "another body"),
        (sealed(1, root, {k: v for k, v in BODY.items() if k != "salt"}), "other fields"),
        (sealed(1, root, {**BODY, "extra": 1}), "other fields"),
        (sealed(1, root, []), "other fields"),
        (sealed(1, root, None), "other fields"),
        (sealed(1, root, 7), "other fields"),
        (sealed(1, root, {**BODY, "type": 7}), "wrong type"),
        (sealed(1, root, {**BODY, "time": 7}), "wrong type"),
        (sealed(1, root, {**BODY, "salt": 7}), "wrong type"),
        (sealed(1, root, {**BODY, "charter": 7}), "wrong type"),
        (sealed(1, root, {**BODY, "data": [1]}), "wrong type"),
        (sealed(1, root, {**BODY, "data": None}), "wrong type"),
        (sealed(1, root, {**BODY, "type": UNDISCLOSED}), "no type"),
        (joined(ADA.seal(ENTRY_TYPE, b"[]"), BODY), "other fields"),
        (joined(ADA.seal(ENTRY_TYPE, b""), BODY), "not valid JSON"),
        (joined(ADA.seal(ENTRY_TYPE, b'{"a":"\\ud800"}'), BODY), "not valid JSON"),
        (joined(ADA.seal(ENTRY_TYPE, b"[" * 400 + b"]" * 400), BODY), "deep"),
        (joined(ADA.seal("application/other", b"{}"), BODY), "type"),
        (joined(ADA.seal("application/vnd.hansa.entry+json", canonical(header)), BODY), "type"),
        (joined(spaced, BODY), "unusual layout"),
        (joined(canonical(twice), BODY), "exactly one signature"),
        (joined(canonical({**envelope, "signatures": []}), BODY), "exactly one signature"),
        (canonical({"body": BODY}) + b"\n", "not an entry"),
        (canonical({"envelope": envelope, "body": BODY, "more": 1}) + b"\n", "not an entry"),
        (canonical({"envelope": "text"}) + b"\n", "not a signed envelope"),
        (canonical({"envelope": []}) + b"\n", "not a signed envelope"),
        (canonical(envelope) + b"\n", "not an entry"),
        (b"[]\n", "not an entry"),
        (b"7\n", "not an entry"),
        (good.replace(b'{"body"', b'{ "body"'), "unusual layout"),
        (b'{"envelope":' + canonical(envelope) + b',"body":' + canonical(BODY) + b"}\n", "unusual layout"),
        (good.replace(b'"type":"refuse"', b'"type":"ref\\u0075se"'), "unusual layout"),
        (good.replace(b'"body":{', b'"body":{"salt":"",'), "given twice"),
        (good.replace(b'"data":{}', b'"data":{"x":1.0}'), "not an integer"),
    ):
        path.write_bytes(first + line)
        fails(path, 2, words)


@pytest.mark.parametrize("key", ["zz", 7, None, [], "é", "ab" * 32, "AB" * 32])
def test_a_genesis_with_a_key_that_is_none(tmp_path: Path, key: object) -> None:
    path = tmp_path / "l"
    path.write_bytes(sealed(0, EMPTY.hex(), {**BODY, "type": "genesis", "data": {"key": key}}))
    fails(path, 1, key=None)


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b'"x"', b"7", b'{"body":7}', b'{"body":{"data":[]}}', b'{"envelope":{}}']
)
def test_a_first_line_that_names_no_key(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(line + b"\n")
    fails(path, 1, "names no key", key=None)


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


# -- a copy for an auditor -------------------------------------------------------------------------------------------


def shared_ledger(path: Path) -> tuple[bytes, list[Entry]]:
    """Entries of two charters and of none."""
    ledger = Ledger(path, ADA, GENESIS)
    for number, charter in enumerate(("a" * 64, "b" * 64, None, "b" * 64, "a" * 64, "b" * 64)):
        privacy = {**PRIVACY, "number": number} if number % 2 else None
        ledger.append("debit", {"run_id": f"secret-{number}"}, charter=charter, privacy=privacy)
    ledger.close()
    return path.read_bytes(), ledger.entries


def test_a_redacted_copy_has_the_same_roots(tmp_path: Path) -> None:
    """Of what is not disclosed a reader sees what it does to a budget, and that it is signed and in the tree."""
    data, entries = shared_ledger(tmp_path / "l")
    hidden = {i for i, entry in enumerate(entries) if entry.charter == "b" * 64}
    copy = tmp_path / "copy"
    copy.write_bytes(redacted(data, lambda entry: entry.charter != "b" * 64, ADA.key))
    shown, torn = read_ledger(copy, ADA.key)
    assert torn == b""
    assert hidden == {2, 4, 6}
    for number, (entry, whole) in enumerate(zip(shown, entries, strict=True)):
        assert (entry.seq, entry.root, entry.leaf, entry.privacy) == (number, whole.root, whole.leaf, whole.privacy)
        if number in hidden:
            assert (entry.type, entry.time, entry.charter, entry.body) == (UNDISCLOSED, "", None, {})
        else:
            assert entry == whole
    lines = copy.read_bytes().splitlines()
    for number, line in enumerate(lines):
        assert (b"secret-" in unwrapped(line) or number == 0) == (number not in hidden)
        if number in hidden:
            assert set(strict_json(line)) == {"envelope"}
            assert set(header_of(line)) == {"v", "seq", "root", "body_sha256", "privacy"}
    assert redacted(data, lambda _: True, ADA.key) == data
    everything = redacted(data, lambda _: False, ADA.key)
    again = redacted(copy.read_bytes(), lambda _: False, ADA.key)
    assert again == everything
    assert redacted(data + b'{"torn', lambda _: True, ADA.key) == data
    assert redacted(b"", lambda _: True, ADA.key) == redacted(b"torn", lambda _: True, ADA.key) == b""


def test_what_is_hidden_cannot_be_guessed(tmp_path: Path) -> None:
    """Whoever knows a body but for its salt cannot see whether it is the one: the header's hash is of both."""
    data, _ = shared_ledger(tmp_path / "l")
    body = strict_json(data.splitlines()[2])["body"]
    digest = header_of(data.splitlines()[2])["body_sha256"]
    assert sha256(canonical(body)) == digest
    for guess in ("", "0" * 32, None):
        assert sha256(canonical({**body, "salt": guess})) != digest
    assert sha256(canonical({k: v for k, v in body.items() if k != "salt"})) != digest
    same = Ledger(tmp_path / "same", ADA, GENESIS)
    one, other = (same.append("refuse", {"reason": "budget"}) for _ in range(2))
    same.close()
    hashes = [header_of(line)["body_sha256"] for line in (tmp_path / "same").read_bytes().splitlines()]
    assert one.body == other.body
    assert hashes[1] != hashes[2]


def test_a_body_cannot_be_given_to_another_entry(tmp_path: Path) -> None:
    """Nor taken from one entry and shown with another's header, in a copy where both could be hidden."""
    data, _ = shared_ledger(tmp_path / "l")
    lines = data.splitlines(keepends=True)
    one, other = (strict_json(line) for line in lines[2:4])
    path = tmp_path / "copy"
    path.write_bytes(b"".join([*lines[:2], canonical({**one, "body": other["body"]}) + b"\n", *lines[3:]]))
    fails(path, 3, "another body")
    for swapped in ([lines[0], bare(lines[2]), bare(lines[1])], [lines[0], bare(lines[2])]):
        path.write_bytes(b"".join(swapped))
        fails(path, 2, "out of order")


def test_a_copy_is_not_written_to(tmp_path: Path) -> None:
    data, _ = shared_ledger(tmp_path / "l")
    copy = tmp_path / "copy"
    for disclose in (lambda entry: entry.charter != "b" * 64, lambda entry: entry.seq != 3):
        copy.write_bytes(redacted(data, disclose, ADA.key))
        before = copy.read_bytes()
        with pytest.raises(LedgerError, match=r"(?s)copy for an auditor.*hansa node restore"):
            Ledger(copy, ADA, GENESIS)
        assert copy.read_bytes() == before
    copy.write_bytes(redacted(data, lambda entry: False, ADA.key))
    with pytest.raises(LedgerError, match="names no key"):
        read_ledger(copy)  # nobody can say whose it is; with its owner's key it reads
    assert {e.type for e in read_ledger(copy, ADA.key)[0]} == {UNDISCLOSED}


def test_only_a_ledger_is_redacted(tmp_path: Path) -> None:
    data, _ = shared_ledger(tmp_path / "l")
    lines = data.splitlines(keepends=True)
    for wrong in (b"\n", b"{}\n", b"".join([lines[0], lines[2]]), data.replace(b"secret-1", b"secret-9")):
        with pytest.raises(MessageError):
            redacted(wrong, lambda _: True, ADA.key)
    with pytest.raises(MessageError, match="not signed by"):
        redacted(data, lambda _: True, BEN.key)


# -- a counter against older copies ----------------------------------------------------------------------------------


class Counted:
    """A ledger with a counter beside it."""

    def __init__(self, folder: Path, entries: int = 4) -> None:
        self.path, self.counter = folder / "ledger.jsonl", folder / "ledger.counter"
        folder.mkdir(exist_ok=True)
        self.write(entries)

    def open(self) -> Ledger:
        return Ledger(self.path, ADA, GENESIS, Counter(self.counter))

    def write(self, entries: int) -> None:
        ledger = self.open()
        for number in range(ledger.length, entries):
            ledger.append("refuse", {"number": number})
        ledger.close()

    def lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)

    def refused(self, words: str) -> None:
        before = self.path.read_bytes(), self.counter.read_bytes() if self.counter.is_file() else None
        with pytest.raises(LedgerError, match=words):
            self.open()
        assert (self.path.read_bytes(), self.counter.read_bytes() if self.counter.is_file() else None) == before
        with pytest.raises(LedgerError, match=words):
            self.open()  # and the lock is free again, and it is still refused


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "node")


def test_a_counted_ledger_opens_again(counted: Counted) -> None:
    for entries in (4, 5, 6, 9):
        counted.write(entries)
        assert counted.open().length == entries
    assert counted.counter.stat().st_mode & 0o777 == 0o600
    assert counted.counter.stat().st_size <= 512


@pytest.mark.parametrize("entries", [2, 3, 4, 5, 8])
def test_an_older_copy_is_refused(tmp_path: Path, entries: int) -> None:
    """Any beginning of the ledger, cut or put back from a backup."""
    counted = Counted(tmp_path / "node", entries)
    lines = counted.lines()
    for kept in range(1, entries):
        counted.path.write_bytes(b"".join(lines[:kept]))
        counted.refused(f"has {kept} entries and had {entries} before: it is an older copy, or was cut")
    counted.path.write_bytes(b"".join(lines))
    assert counted.open().length == entries


def test_an_emptied_ledger_is_refused(counted: Counted) -> None:
    """An empty or missing file is the oldest copy: no genesis is written over what was counted."""
    counted.path.write_bytes(b"")
    counted.refused("has 0 entries and had 4 before")
    counted.path.unlink()
    with pytest.raises(LedgerError, match="has 0 entries and had 4 before"):
        counted.open()


def test_a_cut_in_the_last_entry_is_refused_and_a_torn_one_is_not(counted: Counted) -> None:
    """A torn line was never acknowledged nor counted; half of one that was is a cut."""
    lines = counted.lines()
    counted.path.write_bytes(b"".join(lines)[:-10])
    counted.refused("has 3 entries and had 4 before")
    counted.path.write_bytes(b"".join(lines) + lines[0][:30])
    ledger = counted.open()
    assert (ledger.length, ledger.recovered) == (5, 30)
    ledger.close()
    assert counted.open().length == 5


def test_another_ledger_of_the_same_owner_is_refused(counted: Counted, tmp_path: Path) -> None:
    """As long, or longer: a fork, or the one that was there before the node was set up again."""
    for entries in (4, 5, 9):
        other = Counted(tmp_path / f"other-{entries}", entries)
        counted.path.write_bytes(other.path.read_bytes())
        counted.refused("the ledger's first 4 entries are not those that were there before")
    lines = counted.lines()[:3]
    counted.path.write_bytes(b"".join(lines[:3]))
    counted.refused("had 4 before")


def test_a_fork_at_the_last_entry_is_refused(counted: Counted) -> None:
    whole = counted.lines()
    fork = counted.path.with_name("fork")
    fork.write_bytes(b"".join(whole[:3]))
    ledger = Ledger(fork, ADA, GENESIS)
    ledger.append("refuse", {"instead": 3})
    ledger.append("refuse", {"instead": 4})
    ledger.close()
    counted.path.write_bytes(fork.read_bytes())
    counted.refused("not those that were there before")


def test_an_entry_that_was_written_and_not_counted_counts(counted: Counted) -> None:
    """A crash between both: the ledger is one ahead."""
    before = counted.counter.read_bytes()
    counted.write(5)
    counted.counter.write_bytes(before)
    ledger = counted.open()
    assert ledger.length == 5
    ledger.close()
    assert counted.counter.read_bytes() != before
    counted.path.write_bytes(b"".join(counted.lines()[:4]))
    counted.refused("had 5 before")


def test_a_counter_that_is_missing_or_damaged_is_refused(counted: Counted) -> None:
    data = counted.counter.read_bytes()
    for damaged in (b"x", b"\x00" * 512, b"\n", b"0" * 512, data[:40], data[:85] + b"0" * 600, b"\xff" * 512, data[1:]):
        counted.counter.write_bytes(damaged)
        counted.refused("damaged; it says how long the ledger must be")
    counted.counter.unlink()
    counted.refused("missing, and it says how long the ledger must be")
    counted.counter.mkdir()
    counted.refused("Is a directory")
    counted.counter.rmdir()
    counted.counter.write_bytes(data)
    assert counted.open().length == 4


@pytest.mark.parametrize("torn", range(0, 256, 15))
def test_a_torn_slot_leaves_the_other(counted: Counted, torn: int) -> None:
    """A crash in the middle of a slot's bytes: the other slot knows the entry before, and the ledger goes on from it."""
    before = counted.counter.read_bytes()
    counted.write(5)
    after = counted.counter.read_bytes()
    slot = 256 * (4 % 2)
    assert before[256:] == after[256:]
    counted.counter.write_bytes(before[:slot] + after[slot : slot + torn] + before[slot + torn :])
    assert counted.open().length == 5
    counted.path.write_bytes(b"".join(counted.lines()[:3]))
    counted.refused("had [45] before")


def test_every_byte_of_a_slot_counts(counted: Counted) -> None:
    """Nobody but a crash writes half of it, yet no edited byte makes it say something else."""
    data = counted.counter.read_bytes()
    for at in range(150):
        counted.counter.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 : 256])
        counted.refused("damaged")


def test_an_empty_counter_is_refused_where_there_are_entries(counted: Counted) -> None:
    """Emptied is as good as missing, and easier to do."""
    counted.counter.write_bytes(b"")
    counted.refused("empty, and it says how long the ledger must be")


def test_a_counter_beside_a_new_ledger(tmp_path: Path) -> None:
    """A crash after the counter's file was made, before its first entry was counted."""
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "ledger.counter").touch()
    assert Counted(tmp_path / "node").open().length == 4


def test_what_cannot_be_counted_stops_the_ledger(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry stands, but it is not acknowledged, and nothing is written behind it."""
    ledger = counted.open()

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(OutputError, match="disk is full"):
            ledger.append("debit", {})
    with pytest.raises(LedgerError, match="closed"):
        ledger.append("refuse", {})
    again = counted.open()
    assert [e.type for e in again.entries][3:] == ["refuse", "debit"]


def test_an_entry_is_counted_after_it_is_on_disk(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted first, a crash between both would lock the owner out."""
    order: list[str] = []
    fsync, fdatasync = os.fsync, os.fdatasync
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("ledger"), fsync(handle))[1])
    monkeypatch.setattr(os, "fdatasync", lambda handle: (order.append("counter"), fdatasync(handle))[1])
    ledger = counted.open()
    order.clear()
    ledger.append("refuse", {})
    assert order == ["ledger", "counter"]


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
