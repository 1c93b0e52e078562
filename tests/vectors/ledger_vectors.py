"""Golden bytes of ledger format 2, by a writer of another make: nothing of Hansa is imported, only docs/ledger-format.md was read.

    python tests/vectors/ledger_vectors.py        writes ledger_vectors.json beside this file

A ledger with every kind of privacy event, its copy for an auditor of one charter, roots, inclusion and consistency proofs, signed
heads with witnesses, a closing checkpoint. Keys, salts and times are fixed. Change the file only together with the version of the
format.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

NAMES = ("ada", "ben", "coordinator")
PRIVATE = {
    n: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"hansa vector " + n.encode()).digest()) for n in NAMES
}
KEY = {n: k.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex() for n, k in PRIVATE.items()}
OURS, THEIRS = "a" * 64, "b" * 64
"""Two charters."""
LEDGER_ID, LINEAGE, OTHER_LINEAGE, DATASET, OTHER_DATASET = "1" * 32, "2" * 32, "3" * 32, "4" * 32, "5" * 32
EVENT = {"mechanism": "poisson-gaussian/1", "q": "0.1", "sigma": "1.5", "steps": 6}
SCORES = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "40.0", "steps": 1}
BUDGET = {
    "epsilon": "1.0",
    "delta": "0.0001",
    "orders": [["4.0", "0.00002"], ["16.0", "0.00003"]],
    "gaussian_delta": "0.00005",
}


def text(value: object) -> bytes:
    """JSON, sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def signature(name: str, kind: str, payload: bytes) -> dict[str, str]:
    signed = b"DSSEv1 " + b" ".join([str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])
    return {"keyid": KEY[name], "sig": base64.b64encode(PRIVATE[name].sign(signed)).decode()}


def envelope(kind: str, payload: bytes, *names: str) -> dict[str, Any]:
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [signature(name, kind, payload) for name in names],
    }


# -- the tree, as the definitions of RFC 6962 have it: slow, recursive, over the leaves themselves --


def mth(d: list[bytes]) -> bytes:
    if not d:
        return sha(b"")
    if len(d) == 1:
        return sha(b"\x00" + d[0])
    k = split(len(d))
    return sha(b"\x01" + mth(d[:k]) + mth(d[k:]))


def path(m: int, d: list[bytes]) -> list[bytes]:
    if len(d) == 1:
        return []
    k = split(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def proof(m: int, d: list[bytes]) -> list[bytes]:
    return subproof(m, d, True)


def subproof(m: int, d: list[bytes], b: bool) -> list[bytes]:
    if m == len(d):
        return [] if b else [mth(d)]
    k = split(len(d))
    return [*subproof(m, d[:k], b), mth(d[k:])] if m <= k else [*subproof(m - k, d[k:], False), mth(d[:k])]


def split(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


# -- a ledger --

HELD = [[EVENT, 3], [SCORES, 1]]
LEFT = [[EVENT, 2], [SCORES, 1]]
REQUEST = {"request_id": "run-1.1.train.ada", "request_sha256": "6" * 64, "run_id": "run-1"}
ENTRIES: list[tuple[str, str | None, Any, dict[str, Any]]] = [
    (
        "genesis",
        None,
        None,
        {
            "owner": "ada",
            "role": "partner",
            "key": KEY["ada"],
            "ledger_id": LEDGER_ID,
            "simulated": False,
            "software": "another make",
        },
    ),
    (
        "dataset",
        None,
        {"lineage": LINEAGE, "open": "first"},
        {
            "dataset": DATASET,
            "lineage": LINEAGE,
            "task": "heart-disease",
            "commitment": "7" * 64,
            "held_out": {"kind": "private", "commitment": "8" * 64},
            "declared": {"kind": "first", "of": None, "cutoff": None},
        },
    ),
    ("charter", OURS, None, {"name": "Krankenhäuser „Nord“ \n\t\\ \u007f\u2028", "expires": "2027-11-22T00:00:00Z"}),
    (
        "budget",
        OURS,
        {"lineage": LINEAGE, "budget": BUDGET},
        {"lineage": LINEAGE, "unit": "record", "adjacency": "add-or-remove-one", "budget": BUDGET},
    ),
    (
        "hold",
        OURS,
        {"lineage": LINEAGE, "hold": HELD},
        {
            **REQUEST,
            "request_id": "run-1.0.open.ada",
            "dataset": DATASET,
            "plan": [
                {"purpose": "train", "count": 3, "event": EVENT},
                {"purpose": "evaluate", "count": 1, "event": SCORES},
            ],
            "plan_sha256": sha(
                text(
                    [
                        {"purpose": "train", "count": 3, "event": EVENT},
                        {"purpose": "evaluate", "count": 1, "event": SCORES},
                    ]
                )
            ).hex(),
            "software": "another make",
        },
    ),
    ("charter", THEIRS, None, {"name": "another agreement", "expires": "2028-01-01T00:00:00Z"}),
    (
        "debit",
        OURS,
        {"lineage": LINEAGE, "debit": EVENT},
        {
            **REQUEST,
            "round": 1,
            "purpose": "train",
            "plan_sha256": "9" * 64,
            "dataset": DATASET,
            "event": EVENT,
            "clip_norm": "1.0",
            "declared_records": 240,
        },
    ),
    (
        "dataset",
        None,
        {"lineage": OTHER_LINEAGE, "open": "disjoint"},
        {
            "dataset": OTHER_DATASET,
            "lineage": OTHER_LINEAGE,
            "task": "heart-disease",
            "commitment": "c" * 64,
            "held_out": {"kind": "none", "commitment": None},
            "declared": {"kind": "disjoint", "of": None, "cutoff": "2026-06-01"},
        },
    ),
    ("commit", OURS, None, {**REQUEST, "round": 1, "reply_sha256": "d" * 64}),
    (
        "hold",
        THEIRS,
        {"lineage": LINEAGE, "hold": [[{"mechanism": "none/1"}, 1]]},
        {**REQUEST, "run_id": "their-run", "request_id": "x", "dataset": DATASET, "plan": [], "software": "s"},
    ),
    (
        "refuse",
        THEIRS,
        None,
        {**REQUEST, "run_id": "their-run", "round": None, "reason": "budget", "detail": "übrig: 0.1"},
    ),
    ("release", OURS, {"lineage": LINEAGE, "release": LEFT}, {"run_id": "run-1", "why": "closed"}),
    ("recovered", None, None, {"torn_bytes": 30, "torn_sha256": "e" * 64}),
]


def make() -> dict[str, Any]:
    """Every vector by name."""
    kind = "application/vnd.hansa.entry.v2+json"
    headers: list[bytes] = []
    lines, bare = [], []
    for seq, (event, charter, privacy, data) in enumerate(ENTRIES):
        body = {
            "salt": sha(b"salt %d" % seq)[:16].hex(),
            "time": f"2026-11-22T01:50:{seq:02d}Z",
            "type": event,
            "charter": charter,
            "data": data,
        }
        header = {
            "v": 2,
            "seq": seq,
            "root": mth(headers).hex(),
            "body_sha256": sha(text(body)).hex(),
            "privacy": privacy,
        }
        signed = envelope(kind, text(header), "ada")
        lines.append(text({"body": body, "envelope": signed}).decode())
        shown = charter in (OURS, None) and data.get("lineage") != OTHER_LINEAGE
        bare.append(lines[-1] if shown else text({"envelope": signed}).decode())
        headers.append(text(header))
    size = len(headers)
    roots = [mth(headers[:n]).hex() for n in range(size + 1)]

    def head(length: int, *witnesses: str) -> str:
        said = {"v": 1, "owner": "ada", "ledger_id": LEDGER_ID, "length": length, "root": roots[length]}
        return text(envelope("application/vnd.hansa.head+json", text(said), "ada", *witnesses)).decode()

    closing = {
        "v": 2,
        "run_id": "run-1",
        "charter_sha256": OURS,
        "model_sha256": "f" * 64,
        "ledgers": [
            {"owner": "ada", "length": size, "root": roots[size]},
            {"owner": "ben", "length": 7, "root": "1" * 64},
            {"owner": "coordinator", "length": 9, "root": "2" * 64},
        ],
    }
    return {
        "keys": KEY,
        "charter": OURS,
        "salts_and_times": [[sha(b"salt %d" % n)[:16].hex(), f"2026-11-22T01:50:{n:02d}Z"] for n in range(size)],
        "entries": [{"type": t, "charter": c, "privacy": p, "data": d} for t, c, p, d in ENTRIES],
        "ledger": lines,
        "for_an_auditor": bare,
        "leaves": [sha(b"\x00" + header).hex() for header in headers],
        "roots": roots,
        "inclusion": [[h.hex() for h in path(n, headers)] for n in range(size)],
        "consistency": {str(n): [h.hex() for h in proof(n, headers)] for n in range(1, size + 1)},
        "heads": [head(4), head(7, "coordinator"), head(size, "coordinator", "ben")],
        "closing": text(envelope("application/vnd.hansa.closing+json", text(closing), *NAMES)).decode(),
    }


if __name__ == "__main__":
    made = json.dumps(make(), indent=1, ensure_ascii=True)
    (Path(__file__).parent / "ledger_vectors.json").write_text(made + "\n")
