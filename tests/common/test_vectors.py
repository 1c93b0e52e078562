"""Golden vectors of ledger format 2: what a writer of another make wrote is read, and written again byte for byte."""

from __future__ import annotations

import importlib.util
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hansa.common import ledger as ledger_module
from hansa.common.closing import read_closing
from hansa.common.heads import KeptHeads, read_head, sign_head
from hansa.common.identity import Identity
from hansa.common.ledger import UNDISCLOSED, Ledger, read_ledger, redacted
from hansa.common.merkle import verify_consistency, verify_inclusion
from merkle_support import inclusion_proof

VECTORS = Path(__file__).parents[1] / "vectors"


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("ledger_vectors", VECTORS / "ledger_vectors.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


WRITER = generator()
WANTED: dict[str, Any] = json.loads((VECTORS / "ledger_vectors.json").read_text())
ADA = Identity("ada", WRITER.PRIVATE["ada"])
WHOLE = "".join(line + "\n" for line in WANTED["ledger"]).encode()


def test_the_generator_makes_them() -> None:
    """And imports nothing of Hansa: it is a second reader of the page."""
    assert WRITER.make() == WANTED
    assert "hansa" not in {
        word for line in Path(WRITER.__file__).read_text().splitlines() if "import" in line for word in line.split()
    }


def test_the_ledger_reads(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_bytes(WHOLE)
    entries, torn = read_ledger(path)
    assert torn == b""
    for entry, said in zip(entries, WANTED["entries"], strict=True):
        assert (entry.type, entry.charter, entry.privacy, entry.body) == tuple(
            said[key] for key in ("type", "charter", "privacy", "data")
        )
    assert [entry.leaf.hex() for entry in entries] == WANTED["leaves"]
    assert [entry.root for entry in entries] == WANTED["roots"][1:]


def test_we_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = iter(WANTED["salts_and_times"])
    times: list[str] = []

    def salt(size: int) -> str:
        made, time = next(known)
        assert len(made) == 2 * size
        times.append(time)
        return str(made)

    class Clock:
        @staticmethod
        def now(_: object) -> datetime:
            return datetime.fromisoformat(WANTED["salts_and_times"][len(times)][1])

    monkeypatch.setattr(ledger_module.secrets, "token_hex", salt)
    monkeypatch.setattr(ledger_module, "datetime", Clock)
    first, *rest = WANTED["entries"]
    book = Ledger(tmp_path / "l", ADA, {k: v for k, v in first["data"].items() if k != "key"})
    for said in rest:
        book.append(said["type"], said["data"], charter=said["charter"], privacy=said["privacy"])
    assert (tmp_path / "l").read_bytes() == WHOLE


def test_the_copy_for_an_auditor(tmp_path: Path) -> None:
    wanted = "".join(line + "\n" for line in WANTED["for_an_auditor"]).encode()
    made = redacted(
        WHOLE,
        lambda entry: entry.charter in (WANTED["charter"], None) and entry.body.get("lineage") != WRITER.OTHER_LINEAGE,
        ADA.key,
    )
    assert made == wanted
    path = tmp_path / "l"
    path.write_bytes(wanted)
    entries, _ = read_ledger(path)
    assert [entry.root for entry in entries] == WANTED["roots"][1:]
    assert [entry.seq for entry in entries if entry.type == UNDISCLOSED] == [5, 7, 9, 10]
    assert [entry.privacy for entry in entries] == [said["privacy"] for said in WANTED["entries"]]


def test_the_proofs(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_bytes(WHOLE)
    entries, _ = read_ledger(path)
    book = Ledger(path, ADA, {})
    roots = [bytes.fromhex(root) for root in WANTED["roots"]]
    size = len(entries)
    for number, wanted in enumerate(WANTED["inclusion"]):
        assert [h.hex() for h in inclusion_proof([e.leaf for e in entries], number)] == wanted
        verify_inclusion(entries[number].leaf, number, size, [bytes.fromhex(h) for h in wanted], roots[size])
    for first, wanted in WANTED["consistency"].items():
        assert book.consistency(int(first)) == wanted
        verify_consistency(int(first), roots[int(first)], size, roots[size], [bytes.fromhex(h) for h in wanted])
    book.close()


def test_the_heads(tmp_path: Path) -> None:
    heads = [read_head(sealed.encode(), WANTED["keys"]) for sealed in WANTED["heads"]]
    assert [(head.length, len(head.signers)) for head in heads] == [(4, 1), (7, 2), (13, 3)]
    assert [head.root for head in heads] == [WANTED["roots"][head.length] for head in heads]
    path = tmp_path / "l"
    path.write_bytes(WHOLE)
    book = Ledger(path, ADA, {})
    coordinator, ben = (Identity(name, WRITER.PRIVATE[name]) for name in ("coordinator", "ben"))
    made = sign_head(ADA, book).countersigned(coordinator).countersigned(ben)
    assert made == heads[-1]
    made.extends(heads[0], book.consistency(4))
    made.extends(heads[1], WANTED["consistency"]["7"])
    book.close()
    kept = tmp_path / "heads.jsonl"
    kept.write_text("".join(sealed + "\n" for sealed in WANTED["heads"]))
    holder = KeptHeads(kept, ben, WANTED["keys"])
    assert holder.newest("ada") == heads[-1]
    holder.close()


def test_the_closing() -> None:
    said = read_closing(WANTED["closing"].encode() + b"\n", WANTED["keys"], WANTED["charter"])
    assert said["ledgers"][0] == {"owner": "ada", "length": 13, "root": WANTED["roots"][-1]}
