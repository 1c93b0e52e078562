"""Golden bytes of the core: an envelope, a charter and a message. Those of ledgers, heads and closings: ledger_vectors.py.

    python tests/vectors/core_vectors.py        writes core_vectors.json beside this file

Keys and times are fixed. Change the file only together with the version of the format.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / ".dev"), str(HERE.parent)]

import numpy as np  # noqa: E402

import support  # noqa: E402
from hansa.common.identity import public_pem  # noqa: E402
from hansa.common.messages import SignedWire  # noqa: E402


def make() -> dict[str, Any]:
    """Every vector by name, as text or hex."""
    ada = support.identity("ada")
    signed = support.charter(expires=datetime(2027, 1, 1, tzinfo=UTC))
    wire = SignedWire(support.identity("coordinator"), {}, signed.sha256)
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)}
    packed = wire.pack(tensors)
    records, digest = wire.encode(support.request(signed, "train", 1), packed)
    return {
        "public_key": ada.key,
        "public_pem": public_pem(ada.key).decode(),
        "envelope": ada.seal("application/x-test", "payload é".encode()).decode(),
        "charter": signed.to_bytes().decode(),
        "charter_sha256": signed.sha256,
        "message": records["manifest"]["sealed"].decode(),
        "message_sha256": digest,
        "chunks": {key: array.data.hex() for key, array in records["chunks"].items()},
    }


if __name__ == "__main__":
    (HERE / "core_vectors.json").write_text(json.dumps(make(), indent=1) + "\n")
