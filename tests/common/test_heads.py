"""Signed heads: who rolls back or forks a ledger contradicts what somebody else kept."""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.common.errors import LedgerError, MessageError, OutputError
from hansa.common.heads import HEAD_TYPE, MAX_PROOF, MAX_UNSIGNED, Head, KeptHeads, read_head, sign_head
from hansa.common.identity import Envelope, canonical, read_envelope, strict_json, verify, write_envelope
from hansa.common.ledger import Ledger
from support import identity

NAMES = ("ada", "ben", "cy", "coordinator")
ADA, BEN, CY, BOSS = (identity(name) for name in NAMES)
EVE = identity("eve")
KEYS = {name: identity(name).key for name in NAMES}
GENESIS = {"owner": "ada", "role": "partner", "ledger_id": "1" * 32, "simulated": True, "software": "test"}
STATED = {"v": 1, "owner": "ada", "ledger_id": "1" * 32, "length": 1, "root": "a" * 64}


def grown(ledger: Ledger, entries: int) -> Ledger:
    while ledger.length < entries:
        ledger.append("refuse", {"number": ledger.length})
    return ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ada.jsonl", ADA, GENESIS)
    yield made
    made.close()


@pytest.fixture
def forked(tmp_path: Path, ledger: Ledger) -> Iterator[Ledger]:
    """A second ledger of the same owner that goes another way after three entries."""
    grown(ledger, 3)
    (tmp_path / "fork.jsonl").write_bytes((tmp_path / "ada.jsonl").read_bytes())
    made = Ledger(tmp_path / "fork.jsonl", ADA, GENESIS)
    yield made
    made.close()


def sealed(said: Any = STATED, *signers: Any) -> bytes:
    payload = said if isinstance(said, bytes) else canonical(said)
    pairs = tuple((who.key, who.sign(HEAD_TYPE, payload)) for who in signers or (ADA,))
    return write_envelope(Envelope(HEAD_TYPE, payload, pairs))


def signed_line(ledger: Ledger) -> dict[str, Any]:
    return strict_json(base64.b64decode(strict_json(sign_head(ADA, ledger).sealed)["payload"]))


# -- one head --------------------------------------------------------------------------------------------------------


def test_a_head_says_where_the_ledger_stands(ledger: Ledger) -> None:
    grown(ledger, 5)
    head = sign_head(ADA, ledger)
    assert (head.owner, head.ledger_id, head.length, head.root) == ("ada", "1" * 32, 5, ledger.root)
    assert signed_line(ledger) == {**STATED, "length": 5, "root": ledger.root}
    assert head.signers == (ADA.key,)
    assert read_head(head.sealed, KEYS) == head
    assert ledger.states(head.length, head.root)
    with pytest.raises(MessageError):
        read_head(head.sealed + b"\n", KEYS)


def test_countersignatures_are_over_the_same_bytes(ledger: Ledger) -> None:
    head = sign_head(ADA, ledger)
    seen = head.countersigned(BOSS).countersigned(BEN)
    assert seen.signers == (ADA.key, BOSS.key, BEN.key)
    assert read_head(seen.sealed, KEYS) == seen
    payloads = {read_envelope(x.sealed, HEAD_TYPE).payload for x in (head, seen)}
    assert len(payloads) == 1
    assert seen.countersigned(BEN) is seen
    assert seen.countersigned(ADA) is seen
    signature = seen.signature(BEN.key)
    verify(BEN.key, HEAD_TYPE, payloads.pop(), signature)
    again = head.with_signature(BEN.key, signature)
    assert again.signers == (ADA.key, BEN.key)
    assert read_head(again.sealed, KEYS) == again
    assert seen.with_signature(BEN.key, b"ignored: it has this one") is seen


@pytest.mark.parametrize(
    ("key", "signature"),
    [
        (CY.key, BEN.sign(HEAD_TYPE, canonical(STATED))),
        (BEN.key, BEN.sign("application/other", canonical(STATED))),
        (BEN.key, BEN.sign(HEAD_TYPE, canonical({**STATED, "length": 2}))),
        (BEN.key, b""),
        (BEN.key, b"\x00" * 64),
        (BEN.key, b"\x00" * 63),
        ("no key", b"\x00" * 64),
        ("", b""),
        ("00" * 32, b"\x00" * 64),
    ],
)
def test_a_signature_of_somebody_else_is_checked(key: str, signature: bytes) -> None:
    head = read_head(sealed(), KEYS)
    with pytest.raises(MessageError):
        head.with_signature(key, signature)


WRONG: dict[str, bytes] = {
    "no JSON": sealed(b"x"),
    "empty": b"",
    "a list": sealed([]),
    "a field less": sealed({k: v for k, v in STATED.items() if k != "ledger_id"}),
    "a field more": sealed({**STATED, "time": ""}),
    "version 2": sealed({**STATED, "v": 2}),
    "version true": sealed({**STATED, "v": True}),
    "length 0": sealed({**STATED, "length": 0}),
    "length -1": sealed({**STATED, "length": -1}),
    "length true": sealed({**STATED, "length": True}),
    "length as text": sealed({**STATED, "length": "1"}),
    "no length": sealed({**STATED, "length": None}),
    "root too short": sealed({**STATED, "root": "a" * 63}),
    "root of other digits": sealed({**STATED, "root": "A" * 64}),
    "root with a space": sealed({**STATED, "root": "a" * 63 + " "}),
    "root a number": sealed({**STATED, "root": 7}),
    "root a list": sealed({**STATED, "root": ["a"] * 64}),
    "ledger_id a number": sealed({**STATED, "ledger_id": 7}),
    "ledger_id too long": sealed({**STATED, "ledger_id": "1" * 201}),
    "owner a list": sealed({**STATED, "owner": ["ada"]}),
    "owner a dict": sealed({**STATED, "owner": {"ada": 1}}),
    "owner a stranger": sealed({**STATED, "owner": "eve"}, EVE),
    "signed by nobody": write_envelope(Envelope(HEAD_TYPE, canonical(STATED), ())),
    "signed by another": sealed(STATED, BEN),
    "owner not first": sealed(STATED, BEN, ADA),
    "a stranger too": sealed(STATED, ADA, EVE),
    "owner twice": sealed(STATED, ADA, ADA),
    "witness twice": sealed(STATED, ADA, BEN, BEN),
    "spaces": sealed(b" " + canonical(STATED)),
    "another order": sealed(b'{"v":1,' + canonical({k: v for k, v in STATED.items() if k != "v"})[1:]),
    "another type": ADA.seal("application/vnd.hansa.closing+json", canonical(STATED)),
    "bad signature": write_envelope(Envelope(HEAD_TYPE, canonical(STATED), ((ADA.key, b"\x00" * 64),))),
    "bad witness": write_envelope(
        Envelope(HEAD_TYPE, canonical(STATED), ((ADA.key, ADA.sign(HEAD_TYPE, canonical(STATED))), (BEN.key, b"")))
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_head_is_refused(how: str) -> None:
    with pytest.raises(MessageError):
        read_head(WRONG[how], KEYS)


def test_a_head_reads(tmp_path: Path) -> None:
    assert read_head(sealed(), KEYS).length == 1
    assert read_head(sealed(STATED, ADA, CY, BEN), KEYS).signers == (ADA.key, CY.key, BEN.key)


# -- extends ---------------------------------------------------------------------------------------------------------


def test_every_later_head_extends_every_earlier_one(ledger: Ledger) -> None:
    heads = [sign_head(ADA, grown(ledger, n)) for n in range(1, 14)]
    for at, late in enumerate(heads):
        for early in heads[: at + 1]:
            entries = ledger.entries[: late.length]
            short = Prefix(entries)
            late.extends(early, short.consistency(early.length))
            if early is not late:
                with pytest.raises(LedgerError):
                    early.extends(late, short.consistency(early.length))  # a rollback
                with pytest.raises(LedgerError):
                    late.extends(early, [])


class Prefix:
    """The first entries of a ledger."""

    def __init__(self, entries: Any) -> None:
        self.leaves = [entry.leaf for entry in entries]

    def consistency(self, first: int) -> list[str]:
        from merkle_support import consistency_proof

        return [h.hex() for h in consistency_proof(self.leaves, first)]


def test_a_fork_does_not_extend(ledger: Ledger, forked: Ledger) -> None:
    common = sign_head(ADA, ledger)
    mine, other = sign_head(ADA, grown(ledger, 6)), None
    forked.append("refuse", {"instead": True})
    for entries in (4, 6, 7):
        other = sign_head(ADA, grown(forked, entries))
        other.extends(common, forked.consistency(3))
        for late, early, book in ((mine, other, ledger), (other, mine, forked)):
            for proof in ([], book.consistency(3), book.consistency(min(early.length, book.length))):
                with pytest.raises(LedgerError):
                    late.extends(early, proof)
    mine.extends(common, ledger.consistency(3))


def test_another_ledger_does_not_extend() -> None:
    head = read_head(sealed(), KEYS)
    for other in (
        sealed({**STATED, "ledger_id": "2" * 32, "length": 2}),
        sealed({**STATED, "owner": "ben"}, BEN),
        sealed({**STATED, "ledger_id": "2" * 32}),
    ):
        with pytest.raises(LedgerError, match="began another ledger"):
            read_head(other, KEYS).extends(head, [])
    with pytest.raises(LedgerError, match="contradict"):
        read_head(sealed({**STATED, "root": "b" * 64}), KEYS).extends(head, [])


@pytest.mark.parametrize(
    "proof", [["zz"], [7], [None], ["a" * 63], [b"a" * 64], [["a" * 64]], ["a" * 64] * (MAX_PROOF + 1), 7, None]
)
def test_a_malformed_proof_is_refused(ledger: Ledger, proof: Any) -> None:
    early = sign_head(ADA, grown(ledger, 2))
    late = sign_head(ADA, grown(ledger, 5))
    with pytest.raises((MessageError, LedgerError)):
        late.extends(early, proof)


@given(st.lists(st.text(alphabet="0123456789abcdef ", max_size=64) | st.text(max_size=70), max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_proof(ledger: Ledger, proof: list[str]) -> None:
    head = sign_head(ADA, grown(ledger, 5))
    early = Head(head.owner, head.ledger_id, 2, ledger.entries[1].root, b"", ())
    with pytest.raises((MessageError, LedgerError)):
        head.extends(early, proof)


# -- kept ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptHeads]:
    made = KeptHeads(tmp_path / "new" / "heads.jsonl", BEN, KEYS)
    yield made
    made.close()


def lines_of(path: Path) -> list[Head]:
    return [read_head(line, KEYS) for line in path.read_bytes().splitlines()]


def test_a_witness_signs_what_extends_what_it_signed(tmp_path: Path, ledger: Ledger, kept: KeptHeads) -> None:
    path = tmp_path / "new" / "heads.jsonl"
    assert kept.newest("ada") is None
    first = sign_head(ADA, grown(ledger, 2))
    signed = kept.witness([(first, [])])
    assert signed == {"ada": first.countersigned(BEN)}
    assert lines_of(path) == [signed["ada"]]
    assert kept.newest("ada") == kept.newest("ada", BEN.key) == kept.newest("ada", ADA.key) == signed["ada"]
    assert kept.newest("ada", CY.key) is None
    second = sign_head(ADA, grown(ledger, 5))
    assert kept.witness([(second, [])]) == {}, "nothing shows that it extends the first"
    assert kept.newest("ada") == signed["ada"]
    assert kept.newest("ada", ADA.key) == second
    assert lines_of(path)[1:] == [second], "kept, as its owner signed it"
    signed = kept.witness([(second, ledger.consistency(2))])
    assert signed == {"ada": second.countersigned(BEN)}
    assert kept.newest("ada") == signed["ada"]
    assert kept.witness([(second, [])]) == signed, "asked again"
    assert len(lines_of(path)) == 3


def test_several_heads_at_once(ledger: Ledger, tmp_path: Path, kept: KeptHeads) -> None:
    other = Ledger(tmp_path / "cy.jsonl", CY, {**GENESIS, "owner": "cy", "ledger_id": "3" * 32})
    offers = [(sign_head(ADA, grown(ledger, 2)), []), (sign_head(CY, other), [])]
    offers.append((sign_head(ADA, grown(ledger, 4)), ledger.consistency(2)))
    signed = kept.witness(offers)
    assert {name: head.length for name, head in signed.items()} == {"ada": 4, "cy": 1}
    assert [head.length for head in lines_of(tmp_path / "new" / "heads.jsonl")] == [2, 1, 4]
    assert kept.witness([]) == {}


def test_no_witness_signs_a_rollback_or_a_fork(tmp_path: Path, ledger: Ledger, forked: Ledger, kept: KeptHeads) -> None:
    """Both heads are kept: that is the proof against their owner."""
    rolled = sign_head(ADA, ledger)
    honest = sign_head(ADA, grown(ledger, 5))
    assert kept.witness([(honest, [])])
    forked.append("refuse", {"instead": True})
    fork, longer = sign_head(ADA, forked), sign_head(ADA, grown(forked, 9))
    began = Ledger(tmp_path / "again.jsonl", ADA, {**GENESIS, "ledger_id": "9" * 32})
    again = sign_head(ADA, grown(began, 7))
    began.close()
    for lie, proof in ((rolled, ledger.consistency(3)), (fork, forked.consistency(3)), (longer, forked.consistency(5)),
                       (longer, forked.consistency(3)), (again, [])):  # fmt: skip
        assert kept.witness([(lie, proof)]) == {}
        newest = kept.newest("ada")
        assert newest is not None
        assert newest.root == honest.root
    sealed_lies = {head.sealed for head in (rolled, fork, longer, again)}
    assert sealed_lies < {head.sealed for head in lines_of(tmp_path / "new" / "heads.jsonl")}
    assert kept.witness([(sign_head(ADA, grown(ledger, 6)), ledger.consistency(5))])


def test_a_lie_in_between_does_not_stop_the_others(ledger: Ledger, forked: Ledger, kept: KeptHeads) -> None:
    kept.witness([(sign_head(ADA, grown(ledger, 5)), [])])
    forked.append("refuse", {"instead": True})
    fork = sign_head(ADA, grown(forked, 6)), forked.consistency(3)
    late = sign_head(ADA, grown(ledger, 8)), ledger.consistency(5)
    assert kept.witness([fork, late, fork])["ada"].length == 8


def test_a_malformed_proof_shows_nothing_and_stops_nothing(tmp_path: Path, ledger: Ledger, kept: KeptHeads) -> None:
    kept.witness([(sign_head(ADA, grown(ledger, 2)), [])])
    later = sign_head(ADA, grown(ledger, 3))
    assert kept.witness([(later, ["zz"])]) == {}
    assert lines_of(tmp_path / "new" / "heads.jsonl")[-1].signers == (ADA.key,), "kept, and not countersigned"


def test_what_was_kept_is_there_again(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "h"
    kept = KeptHeads(path, BEN, KEYS)
    kept.witness([(sign_head(ADA, grown(ledger, 2)), [])])
    kept.keep([sign_head(ADA, grown(ledger, 4)).countersigned(CY)])
    newest = [kept.newest("ada", key) for key in (None, ADA.key, CY.key, BOSS.key)]
    size = path.stat().st_size
    kept.close()
    again = KeptHeads(path, BEN, KEYS)
    assert [again.newest("ada", key) for key in (None, ADA.key, CY.key, BOSS.key)] == newest
    again.keep(lines_of(path))
    assert path.stat().st_size == size, "what is kept already is not written again"
    again.close()


def test_who_signs_heads_by_the_thousand_does_not_fill_the_disk(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "h"
    kept = KeptHeads(path, BEN, KEYS)
    kept.witness([(sign_head(ADA, grown(ledger, 2)), [])])
    for number in range(3 * MAX_UNSIGNED):
        assert kept.witness([(sign_head(ADA, grown(ledger, 3 + number)), [])]) == {}
        if number == MAX_UNSIGNED:  # also over restarts
            kept.close()
            kept = KeptHeads(path, BEN, KEYS)
    kept.close()
    assert len(path.read_bytes().splitlines()) == 1 + MAX_UNSIGNED


@pytest.mark.parametrize("whole", [0, 1, 2])
@pytest.mark.parametrize("torn", [b"x", b'{"payload":"', b"\x00" * 700])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, ledger: Ledger, whole: int, torn: bytes) -> None:
    path = tmp_path / "h"
    good = b"".join(sign_head(ADA, grown(ledger, n + 1)).sealed + b"\n" for n in range(whole))
    path.write_bytes(good + torn)
    kept = KeptHeads(path, BEN, KEYS)
    assert path.read_bytes() == good
    kept.keep([sign_head(ADA, grown(ledger, 7))])
    kept.close()
    assert [head.length for head in lines_of(path)] == [*range(1, whole + 1), 7]


@pytest.mark.parametrize("how", WRONG)
def test_a_damaged_line_is_not_passed_over(tmp_path: Path, how: str) -> None:
    path = tmp_path / "h"
    data = sealed() + b"\n" + WRONG[how].replace(b"\n", b"") + b"\n" + sealed({**STATED, "length": 2}) + b"\n"
    path.write_bytes(data)
    for _ in range(2):  # and the lock is let go
        with pytest.raises(LedgerError, match=rf"{path}:2: "):
            KeptHeads(path, BEN, KEYS)
    assert path.read_bytes() == data


def test_one_writer(tmp_path: Path, kept: KeptHeads) -> None:
    with pytest.raises(LedgerError, match="another process"):
        KeptHeads(tmp_path / "new" / "heads.jsonl", BEN, KEYS)
    kept.close()
    KeptHeads(tmp_path / "new" / "heads.jsonl", BEN, KEYS).close()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        KeptHeads(tmp_path / "file" / "h", BEN, KEYS)
    with pytest.raises(OutputError):
        KeptHeads(tmp_path, BEN, KEYS)


def test_a_signature_leaves_after_it_is_on_disk(
    tmp_path: Path, ledger: Ledger, kept: KeptHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A witness that forgets what it signed would sign the fork, too."""
    path = tmp_path / "new" / "heads.jsonl"
    head = sign_head(ADA, ledger)
    before = path.read_bytes()

    def broken(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OutputError, match="disk is full"):
            kept.witness([(head, [])])
    assert path.read_bytes() == before
    assert kept.newest("ada") is None
    assert kept.witness([(head, [])])["ada"].signers == (ADA.key, BEN.key)
    assert len(lines_of(path)) == 1
