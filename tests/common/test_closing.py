"""Nobody signs a closing checkpoint that says something else about its ledger than what is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hansa.common.closing import CLOSING_TYPE, closing_payload, sign_closing
from hansa.common.errors import MessageError
from hansa.common.identity import canonical, strict_json, verify
from support import identity

ADA = identity("ada")
HEAD = {"length": 5, "head": "a" * 64}
CHARTER = "c" * 64
PAYLOAD = closing_payload("run-1", CHARTER, None, {"coordinator": {"length": 9, "head": "b" * 64}, "ada": HEAD})


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
        {**body, "ledgers": [{**mine, "head": "d" * 64}, other]},
        {**body, "ledgers": [{**mine, "extra": 1}, other]},
        {**body, "ledgers": [{**mine, "length": 4}]},
        {**body, "ledgers": [{**mine, "head": "d" * 64}]},
        {**body, "ledgers": [mine, mine]},
        {**body, "ledgers": [{**mine, "extra": 1}]},
        {**body, "ledgers": []},
        {**body, "ledgers": [7]},
        {**body, "ledgers": 7},
        {**body, "run_id": "run-2"},
        {**body, "charter_sha256": "e" * 64},
        {**body, "v": 2},
        {"v": 1},
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
