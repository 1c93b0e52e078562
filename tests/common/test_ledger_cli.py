"""`hansa ledger prove` and `check-proof`: one entry shown to somebody who has no more than a charter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hansa.common.cli import run
from hansa.common.heads import sign_head
from hansa.common.ledger import Ledger
from support import charter, identity

SECRET = "what nobody else shall see"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """ada's ledger of 12 entries, a head at 5 that two signed and one at 11 that only she did, and the charter."""
    ada, ben = identity("ada"), identity("ben")
    ledger = Ledger(tmp_path / "ledger.jsonl", ada, {"owner": "ada", "role": "partner", "ledger_id": "l"})
    heads = []
    for number in range(11):
        ledger.append("note", {"n": number, "text": SECRET if number != 2 else "shown"})
        if ledger.length == 5:
            heads.append(sign_head(ada, ledger).countersigned(ben))
        if ledger.length == 11:
            heads.append(sign_head(ada, ledger))
    ledger.close()
    (tmp_path / "heads.jsonl").write_bytes(b"".join(head.sealed + b"\n" for head in heads))
    charter().save(tmp_path / "charter.json")
    return tmp_path


def prove(place: Path, line: int) -> int:
    files = ["--heads", str(place / "heads.jsonl"), "--charter", str(place / "charter.json")]
    return run(["ledger", "prove", str(place / "ledger.jsonl"), str(line), *files, "--out", str(place / "proof.json")])


def check(place: Path, *more: str) -> int:
    return run(["ledger", "check-proof", str(place / "proof.json"), "--charter", str(place / "charter.json"), *more])


def test_one_entry_is_shown_and_proved_and_no_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove(place, 4) == 0
    capsys.readouterr()
    assert check(place, "--format", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["owner"], said["entry"], said["body"]) == ("ada", 4, {"n": 2, "text": "shown"})
    assert (said["head"]["length"], said["head"]["signed_by"]) == (5, ["ada", "ben"]), "the head that most signed"
    assert SECRET.encode() not in (place / "proof.json").read_bytes()


def test_what_only_its_owner_signed_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove(place, 9) == 0
    assert check(place) == 0
    assert "the head of 11 entries that ada signed" in capsys.readouterr().out


def test_what_no_head_covers_cannot_be_proved_yet(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove(place, 12) == 2
    assert "no head of ada's ledger that covers entry 12" in capsys.readouterr().err
    assert prove(place, 0) == prove(place, 13) == 2


def test_a_ledger_that_was_rewritten_cannot_prove_under_the_heads_of_the_other(place: Path) -> None:
    path = place / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    again = Ledger(path, identity("ada"), {})
    for number in range(9):
        again.append("note", {"n": number, "text": "another"})
    again.close()
    assert prove(place, 4) == 2


CHANGES: dict[str, Any] = {
    "another body": lambda p: p["entry"]["body"]["data"].update(text="other"),
    "another header": lambda p: p["entry"]["envelope"].update(
        payload=p["entry"]["envelope"]["payload"][:-8] + "AAAAAAA="
    ),
    "a step less": lambda p: p["path"].pop(),
    "a step more": lambda p: p["path"].append("0" * 64),
    "another step": lambda p: p["path"].__setitem__(0, "0" * 64),
    "no hex": lambda p: p["path"].__setitem__(0, "zz"),
    "no head": lambda p: p.update(head="{}"),
    "a format of the future": lambda p: p.update(format="hansa-inclusion/2"),
    "a field more": lambda p: p.update(more=1),
    "no path": lambda p: p.update(path=None),
    "a body left out": lambda p: p["entry"].update(body=None),
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_an_edited_proof_proves_nothing(place: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prove(place, 4) == 0
    proof = json.loads((place / "proof.json").read_bytes())
    CHANGES[how](proof)
    (place / "proof.json").write_text(json.dumps(proof, sort_keys=True, separators=(",", ":")) + "\n")
    capsys.readouterr()
    assert check(place) == 1
    assert "fault" not in capsys.readouterr().err


def test_bytes_that_are_no_proof(place: Path) -> None:
    for data in (b"", b"\xff\n", b"[]\n", b"{}\n"):
        (place / "proof.json").write_bytes(data)
        assert check(place) == 1
    (place / "proof.json").unlink()
    assert check(place) == 2
