"""Closing checkpoints: every ledger's length and root at the end of a run, signed by all (docs/ledger-format.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import MessageError
from .identity import Identity, canonical, read_envelope, strict_json

CLOSING_TYPE = "application/vnd.hansa.closing+json"
_ROOT = re.compile("[0-9a-f]{64}")


def closing_payload(
    run_id: str, charter_sha256: str, model_sha256: str | None, heads: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """The bytes that everyone signs. `heads`: owner -> {"length", "root"}."""
    ledgers = [{"owner": name, "length": h["length"], "root": h["root"]} for name, h in sorted(heads.items())]
    return canonical(
        {
            "v": 2,
            "run_id": run_id,
            "charter_sha256": charter_sha256,
            "model_sha256": model_sha256,
            "ledgers": ledgers,
        }
    )


def sign_closing(
    identity: Identity,
    payload: bytes,
    run_id: str,
    charter_sha256: str,
    owners: Iterable[str],
    head: Mapping[str, Any],
) -> bytes:
    """Sign a closing checkpoint, if it says about the signer's own ledger what is true.

    Args:
        owners: everyone who stands in the charter: the checkpoint names these ledgers and no other.

    Raises:
        MessageError: it is of another run or charter, names other ledgers, or states another length or root.
    """
    body = strict_json(payload)
    try:
        mine = [item for item in body["ledgers"] if item["owner"] == identity.name]
        named = [item["owner"] for item in body["ledgers"]]
        same = (body["v"], body["run_id"], body["charter_sha256"]) == (2, run_id, charter_sha256)
    except (KeyError, TypeError) as err:
        raise MessageError("a malformed closing checkpoint") from err
    if named != sorted(owners):
        raise MessageError("a closing checkpoint that does not name the ledgers of its charter")
    if not same or mine != [{"owner": identity.name, "length": head["length"], "root": head["root"]}]:
        raise MessageError("a closing checkpoint that does not state this ledger as it is")
    return identity.sign(CLOSING_TYPE, payload)


def read_closing(sealed: bytes, keys: Mapping[str, str], charter_sha256: str) -> dict[str, Any]:
    """What a sealed closing checkpoint says, if everyone who stands in its charter signed it, and nobody else.

    Args:
        keys: name -> public key of everyone in the charter: the checkpoint names these ledgers and no other.

    Raises:
        MessageError: malformed, not signed by all of them, or of another charter.
    """
    envelope = read_envelope(sealed.removesuffix(b"\n"), CLOSING_TYPE)
    for key in keys.values():
        envelope.signed_by(key)
    if len(envelope.signatures) != len(keys):
        raise MessageError("a closing checkpoint with a signature too many")
    body = strict_json(envelope.payload)
    try:
        heads = {item["owner"]: {"length": item["length"], "root": item["root"]} for item in body["ledgers"]}
        again = closing_payload(body["run_id"], body["charter_sha256"], body["model_sha256"], heads)
    except (KeyError, TypeError) as err:
        raise MessageError("a malformed closing checkpoint") from err
    if again != envelope.payload:
        raise MessageError("a closing checkpoint in an unusual layout")
    for head in heads.values():
        length, root = head["length"], head["root"]
        if type(length) is not int or length < 1 or not (isinstance(root, str) and _ROOT.fullmatch(root)):
            raise MessageError("a closing checkpoint with a length or root that is none")
    if body["charter_sha256"] != charter_sha256 or sorted(heads) != sorted(keys):
        raise MessageError("a closing checkpoint of another charter")
    return dict(body)
