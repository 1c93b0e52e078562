"""Nobody signs a closing checkpoint that says something else about its ledger than what is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from hansa.common.closing import CLOSING_TYPE, closing_payload, read_closing, sign_closing
from hansa.common.errors import MessageError
from hansa.common.identity import Envelope, canonical, strict_json, verify, write_envelope
from support import identity

ADA = identity("ada")
HEAD = {"length": 5, "root": "a" * 64}
CHARTER = "c" * 64
PAYLOAD = closing_payload("run-1", CHARTER, None, {"coordinator": {"length": 9, "root": "b" * 64}, "ada": HEAD})


OWNERS = ["coordinator", "ada"]


def sign(payload: bytes, run: str = "run-1", charter: str = CHARTER, owners: Sequence[str] = OWNERS) -> bytes:
    return sign_closing(ADA, payload, run, charter, owners, HEAD)


def test_what_is_true_is_signed() -> None:
    verify(ADA.key, CLOSING_TYPE, PAYLOAD, sign(PAYLOAD))
    owners = [item["owner"] for item in strict_json(PAYLOAD)["ledgers"]]
    assert owners == ["ada", "coordinator"]


def test_what_is_not_is_refused() -> None:
    body = strict_json(PAYLOAD)
    mine, other = body["ledgers"]
    for changed in (
        {**body, "ledgers": [mine, {**other, "owner": "zeus"}]},
        {**body, "ledgers": [mine, other, {**other, "owner": "zeus"}]},
        {**body, "ledgers": [{**mine, "length": 4}, other]},
        {**body, "ledgers": [{**mine, "root": "d" * 64}, other]},
        {**body, "ledgers": [{**mine, "extra": 1}, other]},
        {**body, "ledgers": [{**mine, "length": 4}]},
        {**body, "ledgers": [{**mine, "root": "d" * 64}]},
        {**body, "ledgers": [mine, mine]},
        {**body, "ledgers": [{**mine, "extra": 1}]},
        {**body, "ledgers": []},
        {**body, "ledgers": [7]},
        {**body, "ledgers": 7},
        {**body, "run_id": "run-2"},
        {**body, "charter_sha256": "e" * 64},
        {**body, "v": 1},
        {**body, "v": 3},
        {**body, "v": "2"},
        {"v": 2},
        [],
    ):
        with pytest.raises(MessageError):
            sign(canonical(changed))
    for payload in (b"", b"{", b"\xff"):
        with pytest.raises(MessageError):
            sign(payload)
    with pytest.raises(MessageError):
        sign(PAYLOAD, run="run-2")
    with pytest.raises(MessageError):
        sign(PAYLOAD, charter="e" * 64)
    with pytest.raises(MessageError):
        sign(PAYLOAD, owners=["coordinator", "ada", "ben"])
    with pytest.raises(MessageError):
        sign_closing(identity("ben"), PAYLOAD, "run-1", CHARTER, OWNERS, HEAD)


# -- read ------------------------------------------------------------------------------------------------------------

BOSS = identity("coordinator")
KEYS = {"coordinator": BOSS.key, "ada": ADA.key}


def sealed(payload: bytes = PAYLOAD, signers: Sequence[Any] = (BOSS, ADA), kind: str = CLOSING_TYPE) -> bytes:
    return write_envelope(Envelope(kind, payload, tuple((who.key, who.sign(kind, payload)) for who in signers)))


def test_a_closing_that_everyone_signed_reads() -> None:
    for data in (sealed(), sealed() + b"\n", sealed(signers=(ADA, BOSS))):
        assert read_closing(data, KEYS, CHARTER) == strict_json(PAYLOAD)


def test_what_is_no_closing_is_refused() -> None:
    body = strict_json(PAYLOAD)
    mine, other = body["ledgers"]
    ben = identity("ben")
    bodies: list[Any] = [
        {**body, "v": 1},
        {**body, "v": True},
        {**body, "extra": 1},
        {k: v for k, v in body.items() if k != "model_sha256"},
        {**body, "ledgers": [other, mine]},
        {**body, "ledgers": [mine]},
        {**body, "ledgers": [mine, other, mine]},
        {**body, "ledgers": [mine, other, {**mine, "owner": "zeus"}]},
        {**body, "ledgers": [{**mine, "extra": 1}, other]},
        {**body, "ledgers": [{**mine, "owner": ["ada"]}, other]},
        {**body, "ledgers": [{**mine, "owner": None}, other]},
        {**body, "ledgers": {"ada": mine}},
        {**body, "ledgers": None},
        {**body, "charter_sha256": "d" * 64},
        [],
        None,
        "closing",
    ]
    wrong = [sealed(canonical(changed)) for changed in bodies]
    wrong += [sealed(payload) for payload in (b"", b"{", b" " + PAYLOAD, b"\xff")]
    wrong += [sealed(signers=who) for who in ([], [ADA], [BOSS], [BOSS, ben], [BOSS, ADA, ben], [BOSS, ADA, ADA])]
    wrong += [sealed(kind="application/other"), b"", b"{}", b"\n", sealed() + b"\n\n", sealed()[:-1]]
    for data in wrong:
        with pytest.raises(MessageError):
            read_closing(data, KEYS, CHARTER)
    with pytest.raises(MessageError, match="another charter"):
        read_closing(sealed(), KEYS, "d" * 64)
    for keys in ({**KEYS, "ben": ben.key}, {"ada": ADA.key}, {"coordinator": BOSS.key, "ida": ADA.key}):
        with pytest.raises(MessageError):
            read_closing(sealed(), keys, CHARTER)


@pytest.mark.parametrize("length", [0, -1, "5", None, [5], True])
@pytest.mark.parametrize("field", ["length", "root", "run_id", "model_sha256"])
def test_a_closing_of_other_types_is_refused_or_says_so(field: str, length: Any) -> None:
    """Everyone signed it: whoever takes it up compares it with a ledger or a model, and nothing crashes."""
    body = strict_json(PAYLOAD)
    mine, other = body["ledgers"]
    changed = {**body, "ledgers": [{**mine, field: length}, other]} if field in mine else {**body, field: length}
    with contextlib.suppress(MessageError):
        assert read_closing(sealed(canonical(changed)), KEYS, CHARTER) == changed
