"""Heads that are countersigned one round behind: honest partners, lost replies, and partners that roll back, fork or lie."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest

from hansa.common.errors import MessageError
from hansa.common.heads import Head, KeptHeads, read_head, sign_head
from hansa.common.ledger import Ledger
from hansa.common.witness import Asked, signatures, telling, told, with_signatures
from hansa.server.witness import Witnessing
from support import identity

NAMES = ["ada", "ben", "cy", "dee"]
KEYS = {name: identity(name).key for name in [*NAMES, "coordinator"]}


class Partner:
    """A ledger, and the heads of others that were countersigned beside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder
        self.ledger = Ledger(folder / "ledger", identity(name), {"owner": name, "ledger_id": f"{name}'s"})
        self.kept = KeptHeads(folder / "heads.jsonl", identity(name), KEYS)

    def answer(self, fields: Any) -> dict[str, Any]:
        """As a node does in a round: something is recorded, others' heads are signed, its own is told."""
        asked = Asked.parse(fields, KEYS, self.name)
        assert asked.yours is None or self.ledger.states(asked.yours.length, asked.yours.root), "rolled back"
        self.ledger.append("debit", {})
        self.ledger.append("commit", {})
        signed = self.kept.witness(asked.heads)
        said = {"head": telling(identity(self.name), self.ledger, asked.since)}
        heads = {head.owner: self.kept.newest(head.owner) for head, _ in asked.heads if head.owner not in signed}
        stands = {owner: head.length for owner, head in heads.items() if head is not None}
        return {**said, "witnessed": signatures(signed, KEYS[self.name]), "stands": stands}


class Circle:
    """A coordinator and its partners, round by round."""

    def __init__(self, folder: Path, names: list[str] = NAMES) -> None:
        self.partners = {name: Partner(folder / name, name) for name in names}
        me = identity("coordinator")
        self.ledger = Ledger(folder / "ledger", me, {"owner": "coordinator", "ledger_id": "c"})
        self.kept = KeptHeads(folder / "heads.jsonl", me, KEYS)
        self.events: list[dict[str, Any]] = []
        self.witnessing = Witnessing(me, self.ledger, self.kept, KEYS, lambda _, **facts: self.events.append(facts))
        self.asked: dict[str, Any] = {}

    def round(self, *silent: str, lost: tuple[str, ...] = ()) -> None:
        """One round; the `silent` are not reached, and the replies of the `lost` do not arrive."""
        said = {n: p.answer(self.asked.get(n)) for n, p in self.partners.items() if n not in silent}
        said = {name: fields for name, fields in said.items() if name not in lost}
        self.ledger.append("round", {})
        self.witnessing.collect(self.asked, said)
        self.asked = self.witnessing.next_round(list(self.partners), said)

    def covered(self, owner: str) -> int:
        """The longest length of this ledger that the coordinator and as many others as can have signed, in its file."""
        lines = (self.kept._path).read_bytes().splitlines()
        heads = [head for head in (read_head(line, KEYS) for line in lines) if head.owner == owner]
        wanted = min(3 if owner == "coordinator" else 4, len(self.partners) + 1)
        return max((h.length for h in heads if len(h.signers) >= wanted), default=0)


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path)


@pytest.mark.parametrize("names", [NAMES, NAMES[:3], NAMES[:2]], ids=len)
def test_a_head_is_witnessed_one_round_later(tmp_path: Path, names: list[str]) -> None:
    circle = Circle(tmp_path, names)
    for number in range(1, 6):
        before = {name: partner.ledger.length for name, partner in circle.partners.items()}
        length = circle.ledger.length
        circle.round()
        if number > 1:
            assert {name: circle.covered(name) for name in names} == before
            assert circle.covered("coordinator") == length
    assert circle.events == []
    for name, partner in circle.partners.items():
        others = {owner for owner in KEYS if partner.kept.newest(owner) is not None} - {"coordinator"}
        assert name not in others
        assert len(others) == min(2, len(names) - 1)


def test_a_lost_reply_costs_a_round_and_no_more(circle: Circle) -> None:
    circle.round()
    circle.round(lost=("ben",))  # ben signed and kept heads, and the coordinator does not know
    circle.round()
    circle.round()
    at = {name: partner.ledger.length for name, partner in circle.partners.items()}
    circle.round()
    assert {name: circle.covered(name) for name in NAMES} == at
    assert circle.events == []


def test_who_was_away_for_long_is_given_a_proof_from_where_it_stood(circle: Circle) -> None:
    for _ in range(3):
        circle.round()
    for _ in range(9):
        circle.round("cy")
    circle.round()
    circle.round()
    assert all(circle.covered(name) == circle.partners[name].ledger.length - 2 for name in NAMES)
    assert circle.events == []


def test_the_next_run_goes_on_where_the_last_one_ended(circle: Circle) -> None:
    """What came with the last round was handed to nobody; the next run, by another process, begins with no replies."""
    for _ in range(3):
        circle.round()
    for _ in range(2):  # a run that is opened again, too
        circle.ledger.append("run", {})
        circle.witnessing = Witnessing(
            identity("coordinator"), circle.ledger, circle.kept, KEYS, lambda _, **facts: circle.events.append(facts)
        )
        circle.asked = circle.witnessing.next_round(NAMES, {})
    circle.round()
    at = {name: partner.ledger.length for name, partner in circle.partners.items()}
    circle.round()
    assert {name: circle.covered(name) for name in NAMES} == at
    assert circle.covered("coordinator") > 0
    assert circle.events == []


def test_the_same_request_again_gets_the_same_signatures(circle: Circle) -> None:
    circle.round()
    circle.round()
    ben = circle.partners["ben"]
    first, again = ben.answer(circle.asked["ben"]), ben.answer(circle.asked["ben"])
    assert first["witnessed"] == again["witnessed"] != {}


def _rolled_back(partner: Partner, to: int) -> None:
    """Its ledger put back to `to` lines, as a thief of its disk would; its heads stay."""
    partner.ledger.close()
    path = partner.folder / "ledger"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:to]))
    partner.ledger = Ledger(path, identity(partner.name), {})


def test_a_partner_that_rolls_back_and_goes_on_is_not_countersigned_any_more(circle: Circle) -> None:
    for _ in range(4):
        circle.round()
    ada = circle.partners["ada"]
    stood = ada.ledger.length
    _rolled_back(ada, 3)
    with pytest.raises(AssertionError, match="rolled back"):  # an honest node sees it by the head that it signed itself
        ada.answer(circle.asked["ada"])
    ada.answer = lambda fields: Partner.answer(ada, {**fields, "yours": None})  # type: ignore[method-assign]
    for _ in range(12):
        circle.round()
    assert ada.ledger.length > stood
    assert circle.covered("ada") == stood
    assert {"partner": "ada", "length": ada.ledger.length} in circle.events
    # What it signed since then is kept as evidence, with nobody's signature but its own.
    lines = circle.kept._path.read_bytes().splitlines()
    alone = [h for h in (read_head(line, KEYS) for line in lines) if h.owner == "ada" and h.signers == (KEYS["ada"],)]
    assert alone
    assert not ada.ledger.states(
        stood, next(h.root for h in map(_head, lines) if (h.owner, h.length) == ("ada", stood))
    )


def _head(line: bytes) -> Head:
    return read_head(line, KEYS)


def test_a_coordinator_that_forks_its_ledger_is_not_countersigned_by_who_saw_the_other(
    circle: Circle, tmp_path: Path
) -> None:
    for _ in range(3):
        circle.round()
    other = tmp_path / "other"
    shutil.copy(tmp_path / "ledger", other)
    lines = other.read_bytes().splitlines(keepends=True)
    other.write_bytes(b"".join(lines[:2]))
    forked = Ledger(other, identity("coordinator"), {})
    for _ in range(9):
        forked.append("round", {"another": 1})
    head = sign_head(identity("coordinator"), forked)
    witness = next(p for p in circle.partners.values() if p.kept.newest("coordinator"))
    stood = witness.kept.newest("coordinator")
    assert stood is not None
    for proof in (forked.consistency(stood.length), [], [head.root] * 3):
        assert witness.kept.witness([(head, proof)]) == {}
    assert witness.kept.newest("coordinator") == stood
    assert head.sealed in (witness.folder / "heads.jsonl").read_bytes().splitlines()


def test_a_shorter_head_is_not_signed_again(circle: Circle) -> None:
    """Nothing is signed that is behind what was signed, whoever asks: two heads of one length can never both be signed."""
    for _ in range(3):
        circle.round()
    ben = circle.partners["ben"]
    newest = ben.kept.newest("ada")
    assert newest is not None
    ledger = circle.partners["ada"].ledger
    short = Ledger(ben.folder / "copy", identity("ada"), {"owner": "ada", "ledger_id": "ada's"})
    assert short.length < newest.length < ledger.length
    assert ben.kept.witness([(sign_head(identity("ada"), short), [])]) == {}


STRANGE_REPLIES: dict[str, Any] = {
    "nothing": {},
    "no fields": {"head": {}, "witnessed": {}},
    "a list": {"head": [], "witnessed": []},
    "not a head": {"head": {"head": "x", "proofs": []}, "witnessed": {"ada": "x"}},
    "a proof of numbers": {"head": {"head": "x", "proofs": [[1, [2]]]}},
    "lengths beyond all that there is": {"stands": {"coordinator": 10**9}},
    "a proof that is no hash": "proof",
    "lengths that are none": {"stands": {"coordinator": True}},
    "a signature under what nobody asked": {"witnessed": {"eve": base64.b64encode(b"0" * 64).decode()}},
    "a bad signature": {"witnessed": {"coordinator": base64.b64encode(b"0" * 64).decode()}},
}


@pytest.mark.parametrize("how", list(STRANGE_REPLIES))
def test_strange_replies_leave_the_others_alone(circle: Circle, how: str) -> None:
    circle.round()
    circle.round()
    stood = circle.covered("ben")
    said = {name: partner.answer(circle.asked[name]) for name, partner in circle.partners.items()}
    if STRANGE_REPLIES[how] == "proof":
        said["ben"]["head"]["proofs"] = [[length, ["zz"]] for length, _ in said["ben"]["head"]["proofs"]]
    else:
        said["ben"] |= STRANGE_REPLIES[how]
    if how == "nothing":
        said["ben"] = {}
    circle.witnessing.collect(circle.asked, said)
    circle.asked = circle.witnessing.next_round(NAMES, said)
    circle.round()
    circle.round()
    assert circle.covered("ben") > stood
    assert circle.covered("dee") > 0


def test_a_head_of_another_ledger_is_not_taken_for_ones_own(circle: Circle) -> None:
    said = telling(identity("ada"), circle.partners["ada"].ledger, [])
    with pytest.raises(MessageError, match="another ledger"):
        told(said, KEYS, "ben")
    request = {"yours": said["head"], "since": [], "heads": []}
    with pytest.raises(MessageError, match="another ledger"):
        Asked.parse(request, KEYS, "ben")
    with pytest.raises(MessageError, match="another ledger"):
        Asked.parse({"yours": None, "since": [], "heads": [[said["head"], []]]}, KEYS, "ada")
    with pytest.raises(MessageError, match="two heads"):
        Asked.parse({"yours": None, "since": [], "heads": [[said["head"], []]] * 2}, KEYS, "ben")
    with pytest.raises(MessageError, match="proof"):
        Asked.parse({"yours": None, "since": [], "heads": [[said["head"], ["zz"]]]}, KEYS, "ben")


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {"yours": None, "since": []},
        {"yours": None, "since": [0], "heads": []},
        {"yours": None, "since": [True], "heads": []},
        {"yours": None, "since": list(range(1, 18)), "heads": []},
        {"yours": 1, "since": [], "heads": []},
        {"yours": None, "since": [], "heads": [["x"]]},
        {"yours": None, "since": [], "heads": [["x", []]]},
        {"yours": None, "since": [], "heads": [[]] * 6},
    ],
    ids=str,
)
def test_strange_requests_are_refused(fields: Any) -> None:
    with pytest.raises(MessageError):
        Asked.parse(fields, KEYS, "ben")


def test_signatures_are_taken_under_what_was_asked_only(circle: Circle) -> None:
    head = sign_head(identity("ada"), circle.partners["ada"].ledger)
    signed = head.countersigned(identity("ben"))
    made = signatures({"ada": signed}, KEYS["ben"])
    assert with_signatures(made, {"ada": head}, KEYS["ben"]) == {"ada": signed}
    with pytest.raises(MessageError, match="not asked"):
        with_signatures(made, {}, KEYS["ben"])
    with pytest.raises(MessageError, match="bad signature"):
        with_signatures(made, {"ada": head}, KEYS["cy"])
