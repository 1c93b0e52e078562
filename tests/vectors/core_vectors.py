"""Golden bytes of the core: an envelope, ledger lines, a charter, a closing checkpoint and a message.

    python tests/vectors/core_vectors.py        writes core_vectors.json beside this file

Keys and times are fixed. Change the file only together with the version of the format.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / ".dev"), str(HERE.parent)]

import numpy as np  # noqa: E402

import support  # noqa: E402
from hansa.common import ledger  # noqa: E402
from hansa.common.closing import CLOSING_TYPE, closing_payload  # noqa: E402
from hansa.common.identity import public_pem  # noqa: E402
from hansa.common.messages import SignedWire  # noqa: E402


class _Clock:
    @staticmethod
    def now(_: object) -> datetime:
        return datetime(2026, 11, 22, 1, 50, tzinfo=UTC)


def make() -> dict[str, Any]:
    """Every vector by name, as text or hex."""
    ada = support.identity("ada")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(ledger, "datetime", _Clock):
        book = ledger.Ledger(Path(folder) / "l.jsonl", ada, {"owner": "ada", "role": "partner", "simulated": True})
        book.append("refuse", {"reason": "budget", "detail": "naïve", "round": None, "sigma": "0.1"})
        book.close()
        lines = (Path(folder) / "l.jsonl").read_text().splitlines()
    signed = support.charter(expires=datetime(2027, 1, 1, tzinfo=UTC))
    wire = SignedWire(support.identity("coordinator"), {}, signed.sha256)
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)}
    packed = wire.pack(tensors)
    records, digest = wire.encode(support.request(signed, "train", 1), packed)
    closing = closing_payload("run-1", signed.sha256, None, {"ada": {"length": 2, "head": "0" * 64}})
    return {
        "public_key": ada.key,
        "public_pem": public_pem(ada.key).decode(),
        "envelope": ada.seal("application/x-test", "payload é".encode()).decode(),
        "ledger": lines,
        "charter": signed.to_bytes().decode(),
        "charter_sha256": signed.sha256,
        "closing": ada.seal(CLOSING_TYPE, closing).decode(),
        "message": records["manifest"]["sealed"].decode(),
        "message_sha256": digest,
        "chunks": {key: array.data.hex() for key, array in records["chunks"].items()},
    }


if __name__ == "__main__":
    (HERE / "core_vectors.json").write_text(json.dumps(make(), indent=1) + "\n")
