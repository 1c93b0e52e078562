"""`hansa ledger`: a ledger in words, also a damaged one; and one entry shown to somebody who has no more than a charter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hansa.common.cli import run
from hansa.common.closing import CLOSING_TYPE, closing_payload
from hansa.common.heads import sign_head
from hansa.common.identity import Envelope, public_pem, write_envelope
from hansa.common.ledger import UNDISCLOSED, Ledger, read_ledger, redacted
from hansa.common.ledger_cli import TYPES
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
    said = capsys.readouterr().err
    assert "no head or closing checkpoint of ada's ledger that covers entry 12 (the longest is of 11 entries)" in said
    assert "--heads closing/RUN.json" in said
    assert prove(place, 0) == prove(place, 13) == 2
    assert "has lines 1 to 12, not 13" in capsys.readouterr().err


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
    """Nothing can be judged: bad input, which is no answer."""
    others = [(place / name).read_bytes() for name in ("charter.json", "ledger.jsonl", "heads.jsonl")]
    for data in (b"", b"\xff\n", b"[]\n", b"{}\n", b'{"format":"hansa-inclusion/2"}\n', b'{"format":7}\n', *others):
        (place / "proof.json").write_bytes(data)
        assert check(place) == 2
        assert check(place, "--format", "json") == 2
    (place / "proof.json").unlink()
    assert check(place) == 2


# -- under a closing checkpoint ------------------------------------------------------------------------------------------

EVERYONE = ("ada", "ben", "cy", "coordinator")


def close(place: Path, signers: Sequence[str] = EVERYONE, length: int = 12, **other: Any) -> Path:
    """closing.json of a run at whose end ada's ledger had `length` entries; `other` changes what it states."""
    root = read_ledger(place / "ledger.jsonl")[0][length - 1].root
    heads = {name: {"length": 1, "root": "0" * 64} for name in EVERYONE} | {"ada": {"length": length, "root": root}}
    heads |= other.pop("heads", {})
    payload = closing_payload("run-1", other.get("sha256", charter().sha256), None, heads)
    signed = tuple((identity(name).key, identity(name).sign(CLOSING_TYPE, payload)) for name in signers)
    path = place / "closing.json"
    path.write_bytes(write_envelope(Envelope(CLOSING_TYPE, payload, signed)) + b"\n")
    return path


def prove_under(place: Path, line: int, *files: Path) -> int:
    heads = [word for file in files for word in ("--heads", str(file))]
    rest = ["--charter", str(place / "charter.json"), "--out", str(place / "proof.json")]
    return run(["ledger", "prove", str(place / "ledger.jsonl"), str(line), *heads, *rest])


def test_the_newest_entry_is_proved_under_the_closing_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove_under(place, 12, close(place)) == 0
    assert (
        "the closing checkpoint of run run-1 (at 12 entries) that ada, ben, cy, coordinator signed"
        in capsys.readouterr().out
    )
    assert check(place, "--format", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["owner"], said["entry"], said["body"]["n"]) == ("ada", 12, 10)
    assert (said["head"]["length"], said["head"]["run"]) == (12, "run-1")
    assert said["head"]["signed_by"] == list(EVERYONE)
    assert check(place) == 0
    assert "the closing checkpoint of run run-1" in capsys.readouterr().out


def test_of_heads_and_checkpoints_the_one_that_most_signed_proves(place: Path) -> None:
    for files in ((place / "heads.jsonl", close(place)), (close(place), place / "heads.jsonl")):
        assert prove_under(place, 4, *files) == 0
        assert set(json.loads((place / "proof.json").read_bytes())) == {"format", "entry", "path", "closing", "owner"}
    assert prove_under(place, 4, place / "heads.jsonl") == 0
    assert "head" in json.loads((place / "proof.json").read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        {"signers": EVERYONE[:-1]},
        {"signers": (*EVERYONE, "eve")},
        {"sha256": "d" * 64},
        {"heads": {"zeus": {"length": 1, "root": "0" * 64}}},
        {"heads": {"ada": {"length": True, "root": "0" * 64}}},
        {"heads": {"ada": {"length": "12", "root": "0" * 64}}},
        {"heads": {"ada": {"length": 12, "root": "zz" * 32}}},
        {"heads": {"ada": {"length": 12, "root": 7}}},
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_count_proves_nothing(
    place: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither to whoever makes a proof, nor to whoever is given one."""
    assert prove_under(place, 12, close(place)) == 0
    proof = json.loads((place / "proof.json").read_bytes())
    proof["closing"] = close(place, **change).read_text().removesuffix("\n")
    capsys.readouterr()
    assert prove_under(place, 12, place / "closing.json") == 2
    said = capsys.readouterr().err
    assert "closing.json:1: neither a signed head nor a closing checkpoint that counts under this charter" in said
    assert "heads/NAME.jsonl or closing/RUN.json" in said
    (place / "proof.json").write_text(json.dumps(proof, sort_keys=True, separators=(",", ":")) + "\n")
    assert check(place) == 1


CLOSING_CHANGES: dict[str, Any] = {
    "another body": CHANGES["another body"],
    "a step less": CHANGES["a step less"],
    "another step": CHANGES["another step"],
    "another owner": lambda p: p.update(owner="ben"),
    "an owner who is not there": lambda p: p.update(owner="zeus"),
    "an owner that is none": lambda p: p.update(owner=["ada"]),
    "no owner": lambda p: p.pop("owner"),
    "a head as well": lambda p: p.update(head="{}"),
    "as a head": lambda p: p.update(head=p.pop("closing")) or p.pop("owner"),
    "no checkpoint": lambda p: p.update(closing="{}"),
    "not text": lambda p: p.update(closing=7),
}


@pytest.mark.parametrize("how", list(CLOSING_CHANGES))
def test_an_edited_proof_under_a_checkpoint_proves_nothing(
    place: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove_under(place, 11, close(place)) == 0
    proof = json.loads((place / "proof.json").read_bytes())
    CLOSING_CHANGES[how](proof)
    (place / "proof.json").write_text(json.dumps(proof, sort_keys=True, separators=(",", ":")) + "\n")
    capsys.readouterr()
    assert check(place) == 1
    assert "fault" not in capsys.readouterr().err


def test_a_checkpoint_of_another_history_or_a_longer_ledger(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closing = close(place, heads={"ada": {"length": 12, "root": "0" * 64}})
    assert prove_under(place, 12, closing) == 2
    assert "is not the ledger that ada signed the closing checkpoint of run run-1 of" in capsys.readouterr().err
    closing = close(place)
    path = place / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert prove_under(place, 3, closing) == 2
    assert "has 11 entries, and ada signed that it had 12: it is an older copy, or was cut" in capsys.readouterr().err


def test_a_ledger_of_nobody_in_the_charter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(place / "eve.jsonl", identity("eve"), {"owner": "ada", "role": "partner", "ledger_id": "l"}).close()
    (place / "eve.jsonl").replace(place / "ledger.jsonl")
    assert prove(place, 1) == 2
    assert "who does not stand in" in capsys.readouterr().err


# -- in words ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `hansa ledger show` or `verify`: exit code, output, error output."""

    def go(command: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["ledger", command, str(place / "ledger.jsonl"), *more])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return go


Said = Callable[..., tuple[int, str, str]]


def test_a_ledger_that_was_edited_in_the_middle_is_shown_up_to_there(place: Path, said: Said) -> None:
    path = place / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for edited in (
        [*lines[:4], lines[4].replace(b'"n":3', b'"n":4'), *lines[5:]],
        lines[:4] + lines[5:],
        [*lines[:4], b"\n", *lines[4:]],
    ):
        path.write_bytes(b"".join(edited))
        code, out, err = said("show")
        assert code == 1
        assert [line.split()[0] for line in out.splitlines()[2:]] == ["1", "2", "3", "4"]
        assert "ledger.jsonl:5: " in err
        assert f"Good, and in one tree: lines 1 to 4. Not to be relied on: lines 5 to {len(edited)}." in err
        assert "hansa audit BUNDLE --against PATH" in err
        code, out, _ = said("show", "--format", "json")
        assert (code, len(json.loads(out)["entries"])) == (1, 4)
        assert "ledger.jsonl:5: " in json.loads(out)["problem"]
        assert said("verify")[0] == 1


def test_one_whose_first_line_is_bad_shows_none(place: Path, said: Said) -> None:
    path = place / "ledger.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    code, out, err = said("show")
    assert (code, out) == (1, "")
    assert "Good, and in one tree: no line. Not to be relied on: lines 1 to 13" in err


def test_a_torn_end_may_be_a_crash_or_a_cut_and_both_commands_say_so(place: Path, said: Said) -> None:
    path = place / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    for command in ("show", "verify"):
        code, out, err = said(command)
        assert code == 1
        assert "ledger.jsonl:12: torn last line" in err
        for words in ("crashed", "somebody cut the file", "cannot be told", "head that others hold tells"):
            assert words in err
        assert "never acknowledged" not in out + err
        assert ("  11  " in out) == (command == "show")
    assert json.loads(said("show", "--format", "json")[1])["torn_bytes"] > 0


def test_an_empty_ledger_says_so(place: Path, said: Said) -> None:
    (place / "ledger.jsonl").write_bytes(b"")
    for command in ("show", "verify"):
        code, out, err = said(command)
        assert (code, out) == (1, "")
        assert "has no entries" in err
    assert prove(place, 1) == 2


@pytest.mark.parametrize("data", [b"# a file\n", b"\x00\xff", b"{}\n", b"no line break", "heads.jsonl", "charter.json"])
def test_a_file_of_another_kind_is_bad_input_and_no_answer(place: Path, said: Said, data: bytes | str) -> None:
    (place / "ledger.jsonl").write_bytes(data if isinstance(data, bytes) else (place / data).read_bytes())
    for command in ("show", "verify"):
        code, out, err = said(command)
        assert (code, out) == (2, "")
        assert "not a ledger" in err
    (place / "ledger.jsonl").unlink()
    (place / "ledger.jsonl").mkdir()
    assert said("show")[0] == said("verify")[0] == 2


def test_a_type_that_there_is_not(said: Said) -> None:
    code, out, err = said("show", "--type", "nonsense")
    assert (code, out) == (2, "")
    for kind in TYPES:
        assert kind in err
    code, out, _ = said("show", "--type", "debit")
    assert (code, out.splitlines()[1:]) == (0, ["no entry of type debit among 12 entries"])
    assert said("show", "--type", "note")[0] == 0, "what stands there can be asked for, whatever it is"


def test_the_types_are_those_of_the_format() -> None:
    text = (Path(__file__).parents[2] / "docs" / "ledger-format.md").read_text()
    rows = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \| (?:yes|null|the request's|`|as )", text, re.M)
    listed = {kind for row in rows for kind in re.findall(r"[a-z-]+", row)}
    assert {*TYPES} - {UNDISCLOSED} == listed


def test_what_a_key_that_is_not_its_owners_means(place: Path, said: Said) -> None:
    (place / "ben.pem").write_bytes(public_pem(identity("ben").key))
    code, _, err = said("verify", "--key", str(place / "ben.pem"))
    assert code == 1
    assert "another key than --key has" in err


def test_80_columns_and_none(place: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(place / "ledger.jsonl", identity("ada"), {})
    ledger.append("refuse", {"reason": "budget", "detail": "words " * 30})
    ledger.close()
    monkeypatch.setenv("COLUMNS", "80")
    lines = said("show")[1].splitlines()
    assert max(map(len, lines)) <= 80
    indent = lines[1].index("what")
    assert lines[-1].startswith(" " * indent + "words"), "below its own column"
    monkeypatch.delenv("COLUMNS")
    assert len(said("show")[1].splitlines()) == 2 + 13, "into a pipe: one line an entry"


def test_an_entry_that_does_not_say_what_its_type_says_is_no_fault(place: Path, said: Said) -> None:
    ledger = Ledger(place / "ledger.jsonl", identity("ada"), {})
    for kind in TYPES:
        if kind != UNDISCLOSED:
            ledger.append(kind, {"odd": "field", "plan": 7, "replies": ["x"], "round": 1})
    ledger.close()
    code, out, err = said("show")
    assert (code, err) == (0, "")
    assert "odd field" in out
    key = identity("ada").key
    (place / "ledger.jsonl").write_bytes(redacted((place / "ledger.jsonl").read_bytes(), lambda e: e.seq == 0, key))
    assert said("show", "--type", UNDISCLOSED)[0] == 0


def test_masked_rounds_in_words(place: Path, said: Said) -> None:
    """Who is summed, at which attempt, and that the noise was shared."""
    ledger = Ledger(place / "ledger.jsonl", identity("ada"), {})
    event = {"mechanism": "shared-gaussian/1", "steps": 1, "q": "1.0", "sigma": "15.36", "quorum": 3, "colluding": 1}
    debit = {"round": 4, "purpose": "train", "event": event}
    names = ["ada", "ben", "cid"]
    for attempt in (0, 1):
        ledger.append("debit", {**debit, "masked": {"agreement": "c0ffee" * 8, "attempt": attempt}})
        ledger.append("survivors", {"round": 4, "attempt": attempt, "agreement": "c0ffee" * 8, "survivors": names})
        ledger.append("ask", {"round": 4, "attempt": attempt, "purpose": "agree", "requests": dict.fromkeys(names)})
    ledger.close()
    shown = " ".join(said("show")[1].split())  # a narrow screen breaks lines
    at = 0
    for words in (
        "round 4 train: 1 step, q 1.0, sigma 15.36, shared (quorum 3, colluding 1)",
        "round 4: signed the list ada, ben, cid; agreement c0ffeec0",
        "round 4 agree: ada, ben, cid",
        "round 4 train, attempt 2: 1 step, q 1.0, sigma 15.36, shared (quorum 3, colluding 1)",
        "round 4, attempt 2: signed the list ada, ben, cid; agreement c0ffeec0",
        "round 4 agree, attempt 2: ada, ben, cid",
    ):
        at = shown.index(words, at)
