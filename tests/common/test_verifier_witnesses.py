"""Heads, checkpoints and copies in the verdict: who vouches for how much of each ledger, and what shows a rollback or a fork."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hansa.common import verifier
from hansa.common.audit_report import state
from hansa.common.heads import HEAD_TYPE
from hansa.common.identity import Envelope, canonical, sha256, write_envelope
from hansa.common.verifier import Unreadable, verify_bundle

sys.path.insert(0, str(Path(__file__).parent))
from bundles import MODEL, Draft, Kept, Shape, digest, honest, identity

SHAPE = Shape(partners=3, rounds=2, sigma=30.0)
P0, P1, P2, C = "hospital-0", "hospital-1", "hospital-2", "coordinator"
COORD = "coordinator/ledger.jsonl"
L0 = f"partners/{P0}/ledger.jsonl"

_honest: list[Draft] = []


@pytest.fixture
def made() -> Draft:
    """Without heads: each test adds its own."""
    if not _honest:
        _honest.append(honest(SHAPE))
    found = copy.deepcopy(_honest[0])
    found.heads.clear()
    return found


def unclosed(made: Draft) -> Draft:
    """As it is before the run ends: nobody has closed anything."""
    made.drop(C, made.index(C, "close"))
    for name in (P0, P1, P2):
        made.drop(name, made.index(name, "release"))
    made.closings.clear()
    made.model = None
    return made


def found(verdict: dict[str, Any], which: str = "violations") -> set[tuple[str, str, int | None]]:
    return {(v["code"], v["file"], v["line"]) for v in verdict[which]}


# -- who vouches for what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "length", "by"),
    [
        ([], 0, []),
        ([(P0,)], 0, []),
        ([(P0, C)], 0, []),
        ([(P0, P1, P2)], 0, []),  # the coordinator is wanted
        ([(P0, C, P1)], 0, []),  # and two others
        ([(P0, C, P1, P2)], 6, [P1, P2, C]),
        ([(P0, C), (P0, P1), (P0, P2)], 6, [P1, P2, C]),  # each in a file of its own
    ],
)
def test_coverage_of_a_partner(
    tmp_path: Path, made: Draft, heads: list[tuple[str, ...]], length: int, by: list[str]
) -> None:
    unclosed(made).heads = [Kept(P1, P0, 6, signers) for signers in heads]
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert verdict["violations"] == []
    partner, entries = verdict["partners"][P0], len(made.books[P0])
    assert partner["witnessed"] == {"length": length, "by": by, "closing": None}
    assert partner["tail"] == entries - length
    assert ("tail", L0, length + 1) in found(verdict, "warnings")
    (told,) = [w["what"] for w in verdict["warnings"] if (w["code"], w["file"]) == ("tail", L0)]
    assert told.startswith(f"entries {length + 1} to {entries} are covered by no head")


def test_coverage_goes_as_far_as_the_second_witness(tmp_path: Path, made: Draft) -> None:
    """Each signature binds all before it: heads of different lengths count together."""
    made = unclosed(made)
    made.heads = [Kept(C, P0, n, (P0, name)) for name, n in ((C, 8), (P1, 7), (P2, 5), (P2, 4))]
    assert verify_bundle(made.write(tmp_path / "b"))["partners"][P0]["witnessed"]["length"] == 5
    made.heads[1].length = made.heads[2].length = 9
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert verdict["partners"][P0]["witnessed"] == {"length": 8, "by": [P1, P2, C], "closing": None}


def test_coverage_of_the_coordinator(tmp_path: Path, made: Draft) -> None:
    made = unclosed(made)
    made.heads = [Kept(P0, C, 5, (C, P0)), Kept(P1, C, 4, (C, P1))]
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert verdict["coordinator"]["witnessed"] == {"length": 4, "by": [P0, P1], "closing": None}
    assert verdict["coordinator"]["tail"] == len(made.books[C]) - 4
    assert verdict["coordinator"]["entries"] == len(made.books[C])
    assert ("tail", COORD, 5) in found(verdict, "warnings")


def test_two_partners_need_one_other(tmp_path: Path) -> None:
    made = honest(Shape(partners=2, rounds=2, sigma=30.0))
    made.closings.clear()
    made.heads = [Kept(C, P0, 5, (P0, C, P1))]
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert verdict["partners"][P0]["witnessed"]["length"] == 5


def test_a_checkpoint_covers_everything_up_to_it(tmp_path: Path, made: Draft) -> None:
    made.heads = [Kept(P1, P0, 6, (P0, C, P1, P2))]
    made.add(P0, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    verdict = verify_bundle(made.write(tmp_path / "b"))
    entries = len(made.books[P0])
    assert verdict["partners"][P0]["witnessed"] == {"length": entries - 1, "by": [P1, P2, C], "closing": "run-1"}
    assert found(verdict, "warnings") == {("recovered", L0, entries), ("tail", L0, entries)}
    (told,) = [w["what"] for w in verdict["warnings"] if w["code"] == "tail"]
    assert told == f"entry {entries} is covered by no head that others signed, nor by a closing checkpoint"
    made.heads.append(Kept(P1, P0, entries, (P0, C, P1, P2)))  # a later head covers that, too
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert verdict["partners"][P0]["witnessed"] == {"length": entries, "by": [P1, P2, C], "closing": None}
    assert verdict["partners"][P0]["tail"] == 0
    assert found(verdict, "warnings") == {("recovered", L0, entries)}


def test_heads_and_checkpoints_in_the_verdict(tmp_path: Path, made: Draft) -> None:
    made.heads = [Kept(P1, P0, 6, (P0, C)), Kept(C, P2, 4, (P2,))]
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert sorted(verdict["heads"], key=str) == [
        {"owner": P0, "holder": P1, "length": 6, "signers": [P0, C]},
        {"owner": P2, "holder": C, "length": 4, "signers": [P2]},
    ]
    roots = {owner: made.lines(owner)[1] for owner in made.books}
    ledgers = [{"owner": o, "length": len(made.books[o]), "root": roots[o][-1]} for o in made.books]
    assert verdict["closings"] == [{"run_id": "run-1", "ledgers": ledgers}]
    assert verdict["open_runs"] == []
    assert (verdict["checked"]["heads"], verdict["checked"]["proofs"]) == (2, 6)


def test_an_open_run_is_a_warning(tmp_path: Path, made: Draft) -> None:
    verdict = verify_bundle(unclosed(made).write(tmp_path / "b"))
    assert verdict["verified"]
    assert verdict["open_runs"] == ["run-1"]
    assert ("open_run", COORD, made.index(C, "run") + 1) in found(verdict, "warnings")


def test_a_closed_run_without_its_checkpoint_is_a_violation(tmp_path: Path, made: Draft) -> None:
    made.closings.clear()
    verdict = verify_bundle(made.write(tmp_path / "b"))
    assert found(verdict) == {("closing_missing", "closing/run-1.json", None)}


# -- heads that are no good ----------------------------------------------------------------------------------


BAD_HEADS: list[tuple[str, Callable[[Draft, str], bytes]]] = [
    ("no one's", lambda d, root: d.head(P0, 3, root, ())),
    ("not the owner's", lambda d, root: d.head(P0, 3, root, (P1, C))),
    ("owner second", lambda d, root: d.head(P0, 3, root, (C, P0))),
    ("twice the same", lambda d, root: d.head(P0, 3, root, (P0, C, C))),
    ("of a stranger's ledger", lambda d, root: d.head(P0, 3, root, (P0,), owner="mallory")),
    ("another version", lambda d, root: d.head(P0, 3, root, (P0,), v=2)),
    ("length 0", lambda d, root: d.head(P0, 3, root, (P0,), length=0)),
    ("no root", lambda d, root: d.head(P0, 3, root, (P0,), root="x")),
    ("one field more", lambda d, root: d.head(P0, 3, root, (P0,), more=1)),
    ("one with a space", lambda d, root: d.head(P0, 3, root, (P0,)) + b" "),
    ("a bad signature", lambda d, root: d.head(P0, 3, root, (P0,)).replace(b'"sig":"', b'"sig":"AAAA', 1)),
    ("nothing", lambda d, root: b""),
    ("a list", lambda d, root: b"[]"),
]


@pytest.mark.parametrize(("why", "make"), BAD_HEADS, ids=[why for why, _ in BAD_HEADS])
def test_bad_heads(tmp_path: Path, made: Draft, why: str, make: Callable[[Draft, str], bytes]) -> None:
    """The line is named; the good one after it counts."""
    root = made.lines(P0)[1][3]
    folder = made.write(tmp_path / "b")
    (folder / "heads").mkdir()
    good = made.head(P0, 3, root, (P0, C, P1))
    path = folder / f"heads/{P1}.jsonl"
    path.write_bytes(make(made, root) + b"\n" + good + b"\n")
    verdict = verify_bundle(folder)
    assert found(verdict) == {("head", f"heads/{P1}.jsonl", 1)}
    assert [head["signers"] for head in verdict["heads"]] == [[P0, C, P1]]
    path.write_bytes(good + b"\n")
    assert verify_bundle(folder)["violations"] == []


def test_a_stranger_may_not_witness(tmp_path: Path, made: Draft) -> None:
    folder, root = made.write(tmp_path / "b"), made.lines(P0)[1][3]
    stranger = identity("stranger")
    payload = canonical({"v": 1, "owner": P0, "ledger_id": "x", "length": 3, "root": root})
    people = (made.people[P0], stranger)
    sealed = write_envelope(Envelope(HEAD_TYPE, payload, tuple((p.key, p.sign(HEAD_TYPE, payload)) for p in people)))
    (folder / "heads").mkdir()
    (folder / f"heads/{P1}.jsonl").write_bytes(sealed + b"\n")
    assert found(verify_bundle(folder)) == {("head", f"heads/{P1}.jsonl", 1)}


def test_files_of_heads(tmp_path: Path, made: Draft) -> None:
    made.heads = [Kept(P1, P0, 3, (P0, C)), Kept(P1, P0, 4, (P0, C))]
    folder = made.write(tmp_path / "b")
    path = folder / f"heads/{P1}.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert found(verify_bundle(folder)) == {("torn", f"heads/{P1}.jsonl", 2)}
    path.unlink()
    path.symlink_to(folder / L0)
    assert found(verify_bundle(folder)) == {("file", f"heads/{P1}.jsonl", None)}
    path.unlink()
    for name in ("mallory.jsonl", f"{P1}.txt", P1):
        (folder / "heads" / name).write_bytes(b"")
        assert found(verify_bundle(folder)) == {("stranger", f"heads/{name}", None)}
        (folder / "heads" / name).unlink()


# -- ledgers that are not what was signed for ----------------------------------------------------------------


def test_a_ledger_that_is_shorter_than_a_head(tmp_path: Path, made: Draft) -> None:
    """The last head that agrees is where the doubt begins; where it is the end, exactly these entries are missing."""
    made = unclosed(made)
    entries = len(made.books[P0])
    made.heads = [Kept(P1, P0, 4, (P0, C, P1)), Kept(P1, P0, entries, (P0, C, P1)), Kept(P2, P0, entries - 1, (P0, P2))]
    folder = made.write(tmp_path / "b")
    path, lines = folder / L0, (folder / L0).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    verdict = verify_bundle(folder)
    (one,) = [v for v in verdict["violations"] if v["code"] == "entries_missing"]
    assert (one["file"], one["line"]) == (L0, 5)
    for words in (f"entries {entries - 2} to {entries} are missing", "from 5 on", f"heads/{P1}.jsonl:2", P0):
        assert words in one["what"]
    path.write_bytes(b"".join(lines[:-1]))
    (one,) = [v for v in verify_bundle(folder)["violations"] if v["code"] == "entries_missing"]
    assert one["line"] == entries
    assert f"entry {entries} is missing: {P0} signed for {entries}" in one["what"]


def test_a_ledger_that_is_not_read_to_its_end_is_not_called_short(tmp_path: Path, made: Draft) -> None:
    folder = made.write(tmp_path / "b")
    lines = (folder / L0).read_bytes().splitlines(keepends=True)
    (folder / L0).write_bytes(b"".join([*lines[:5], b"[]\n", *lines[6:]]))
    assert {v["code"] for v in verify_bundle(folder)["violations"] if v["file"] == L0} >= {"layout"}
    assert "entries_missing" not in {v["code"] for v in verify_bundle(folder)["violations"]}
    assert "tail" not in {w["code"] for w in verify_bundle(folder)["warnings"] if w["file"] == L0}


@pytest.mark.parametrize("left", [0, 1, 5, -1])
def test_nothing_is_concluded_from_what_is_not_there(tmp_path: Path, made: Draft, left: int) -> None:
    """A ledger that was cut, by the head that shows it: no other file is blamed for what it lacks."""
    model = sha256(MODEL)
    for owner, file in ((C, COORD), (P0, L0)):
        folder = made.write(tmp_path / owner)
        lines = (folder / file).read_bytes().splitlines(keepends=True)
        (folder / file).write_bytes(b"".join(lines[:left]))
        verdict = verify_bundle(folder)
        there = len(lines[:left])
        assert {(v["code"], v["file"]) for v in verdict["violations"]} == {
            ("entries_missing" if there else "genesis", file)
        }
        said = {w["code"] for w in verdict["warnings"] if w["file"] == file}
        assert said <= {"restored", "recovered"}  # not open_run, no_runs, tail, uncommitted, unreleased
        one = verdict["coordinator"] if owner == C else verdict["partners"][owner]
        assert (one["entries"], one["unread"], one["whole"], one["missing"]) == (there, 0, False, len(lines) - there)
        assert one["beyond"] == [name for name in (P0, P1, P2, C) if name != owner]
        assert verdict["checked"]["ledgers"] == (4 if there else 3)
        assert verdict["open_runs"] == []
        assert f"Not here to their end are the ledgers of {owner}:" in " ".join(verdict["limits"])
        assert verdict["claim"] is None
        # by the checkpoint the model still is known
        (folder / "model.safetensors").write_bytes(b"other")
        (what,) = [v["what"] for v in verify_bundle(folder)["violations"] if v["code"] == "model"]
        assert (model[:16] in what) is (owner != C)
        assert ("which no closing checkpoint names" in what) is (owner == C)


def test_a_model_of_a_run_that_was_refused_later_is_no_other_model(tmp_path: Path, made: Draft) -> None:
    """A checkpoint does not say whether its run was completed: where the coordinator's ledger is cut, each of them may be."""
    folder = made.write(tmp_path / "b")
    terms = verifier._load_charter(folder, verifier.Report())
    book = verifier.Coordinator(verifier.Report(), terms)
    later = [{"model_sha256": sha256(MODEL)}, {"model_sha256": digest("given up")}, {"model_sha256": None}]
    for closings, wrong in ((later, False), (later[1:], True), (later[2:], True), ([], False)):
        verifier._check_model(folder, report := verifier.Report(), book, closings)
        assert bool(report.violations) is wrong
    (folder / "model.safetensors").unlink()
    verifier._check_model(folder, report := verifier.Report(), book, later)
    assert report.violations == []


def test_a_cut_ledger_of_a_population_blames_no_client(tmp_path: Path) -> None:
    folder = honest(Shape(clients=120, rounds=2, sigma=30.0)).write(tmp_path / "b")
    assert verify_bundle(folder)["violations"] == []
    lines = (folder / COORD).read_bytes().splitlines(keepends=True)
    for left in range(4, len(lines)):
        (folder / COORD).write_bytes(b"".join(lines[:left]))
        verdict = verify_bundle(folder)
        assert {v["code"] for v in verdict["violations"]} == {"entries_missing"}
        assert "uncommitted" not in {w["code"] for w in verdict["warnings"]}
        stands = {state(client) for client in verdict["partners"].values()}
        assert stands == {("bad", "LEDGER NOT READ TO ITS END")}


def test_a_ledger_of_holes_takes_no_minutes(tmp_path: Path, made: Draft) -> None:
    folder = made.write(tmp_path / "b")
    os.truncate(folder / L0, 2**40)  # a tar carries it in kilobytes
    began = time.monotonic()
    assert verify_bundle(folder)["partners"][P0]["unread"] == 1
    assert time.monotonic() - began < 20


def test_how_much_was_not_read(tmp_path: Path, made: Draft) -> None:
    folder = made.write(tmp_path / "b")
    lines = (folder / L0).read_bytes().splitlines(keepends=True)
    for bad, end in ((b"[]\n", b""), (b"[]\n", b"half of a line"), (lines[5][:-1], b"")):
        (folder / L0).write_bytes(b"".join([*lines[:5], bad, *(lines[6:] if bad.endswith(b"\n") else []), end]))
        one = verify_bundle(folder)["partners"][P0]
        unread = (len(lines) - 5 if bad.endswith(b"\n") else 1) + bool(end)
        assert (one["entries"], one["unread"], one["whole"]) == (5, unread, False)
    (folder / L0).unlink()
    one = verify_bundle(folder)["partners"][P0]
    assert (one["entries"], one["unread"], one["missing"], one["whole"]) == (0, 0, len(lines), False)
    whole = verify_bundle(made.write(tmp_path / "c"))
    assert {(p["whole"], p["unread"], p["missing"]) for p in whole["partners"].values()} == {(True, 0, 0)}
    assert "Not here to their end" not in " ".join(whole["limits"])


def test_a_ledger_that_is_another_than_a_head(tmp_path: Path, made: Draft) -> None:
    """The first entry that can differ follows the last head before it that agrees; the shortest that does not, ends it."""
    before = copy.deepcopy(unclosed(made))
    entries = len(made.books[P0])
    heads = [Kept(P1, P0, n, (P0, C, P1)) for n in (3, 5, 7, entries)]
    made.heads = heads
    folder = made.write(tmp_path / "b")
    before.entry(P0, "charter")["expires"] = "never"  # the third entry
    shutil.copy(before.write(tmp_path / "c") / L0, folder / L0)
    (one,) = verify_bundle(folder)["violations"]
    assert (one["code"], one["file"], one["line"]) == ("entry_differs", L0, 1)
    before = copy.deepcopy(before)
    before.entry(P0, "charter")["expires"] = made.entry(P0, "charter")["expires"]
    before.entry(P0, "hold")["software"] = "other"
    place = made.index(P0, "hold") + 1
    assert place == 5
    shutil.copy(before.write(tmp_path / "c") / L0, folder / L0)
    (one,) = verify_bundle(folder)["violations"]
    assert (one["code"], one["file"], one["line"]) == ("entry_differs", L0, 4)
    for words in (f"entries 4 to 5 is not the one that {P0}, {C}, {P1} signed for", f"heads/{P1}.jsonl:2"):
        assert words in one["what"]
    assert verify_bundle(folder)["partners"][P0]["witnessed"]["length"] == 0  # P2 signed nothing


def test_another_ledger_under_the_same_name(tmp_path: Path, made: Draft) -> None:
    made.heads = [Kept(P1, P0, 3, (P0, C))]
    folder = made.write(tmp_path / "b")
    root = made.lines(P0)[1][3]
    (folder / f"heads/{P1}.jsonl").write_bytes(made.head(P0, 3, root, (P0, C), ledger_id="another") + b"\n")
    assert found(verify_bundle(folder)) == {("entry_differs", L0, 1)}


def test_two_heads_that_contradict_one_another(tmp_path: Path, made: Draft) -> None:
    """Whatever the ledger says: their owner signed both."""
    folder, root = made.write(tmp_path / "b"), made.lines(P0)[1][3]
    (folder / "heads").mkdir()
    (folder / f"heads/{P1}.jsonl").write_bytes(made.head(P0, 3, root, (P0, P1)) + b"\n")
    (folder / f"heads/{P2}.jsonl").write_bytes(made.head(P0, 3, digest("x"), (P0, P2)) + b"\n")
    verdict = verify_bundle(folder)
    assert found(verdict) == {("contradiction", f"heads/{P2}.jsonl", 1), ("entry_differs", L0, 1)}
    (told,) = [v["what"] for v in verdict["violations"] if v["code"] == "contradiction"]
    assert P0 in told
    assert f"heads/{P1}.jsonl:1" in told


# -- what is given beside the bundle -------------------------------------------------------------------------


def write_copy(made: Draft, owner: str, path: Path) -> Path:
    lines, _ = made.lines(owner, full=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_good_copies(tmp_path: Path, made: Draft) -> None:
    """Longer or shorter in what they disclose, and a beginning: nothing is wrong."""
    folder = made.write(tmp_path / "b")
    whole = write_copy(made, P0, tmp_path / "copy.jsonl")
    half = tmp_path / "half.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    half.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # torn while it was copied
    for given in ([whole], [half], [whole, half], [folder], [folder / "closing/run-1.json"], [folder / L0]):
        verdict = verify_bundle(folder, given)
        assert verdict["violations"] == []
    assert verify_bundle(folder, [whole])["checked"]["proofs"] == verify_bundle(folder)["checked"]["proofs"] + 1


def test_a_copy_that_differs_is_proof_of_a_fork(tmp_path: Path, made: Draft) -> None:
    other = copy.deepcopy(made)
    other.entry(P0, "hold")["software"] = "other"
    given = write_copy(other, P0, tmp_path / "copy.jsonl")
    folder = made.write(tmp_path / "b")
    verdict = verify_bundle(folder, [given])
    place = made.index(P0, "hold") + 1
    assert found(verdict) == {("fork", L0, place)}
    assert verdict["violations"][0]["what"] == f"another entry than in {given}:{place}: {P0} signed both"


def test_a_copy_that_is_longer(tmp_path: Path, made: Draft) -> None:
    longer = copy.deepcopy(made)
    longer.add(P0, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    longer.add(P0, "recovered", torn_bytes=2, torn_sha256=digest("x"))
    given = write_copy(longer, P0, tmp_path / "copy.jsonl")
    entries = len(made.books[P0])
    verdict = verify_bundle(made.write(tmp_path / "b"), [given])
    assert found(verdict) == {("entries_missing", L0, entries + 1)}
    what = f"entries {entries + 1} to {entries + 2} are missing: {P0} signed for {entries + 2} ({given})"
    assert verdict["violations"][0]["what"] == what


def test_a_copy_that_agrees_narrows_down_what_a_head_says(tmp_path: Path, made: Draft) -> None:
    made = unclosed(made)
    other = copy.deepcopy(made)
    other.books[P0][-1].data["reply_sha256"] = digest("x")
    folder, given = made.write(tmp_path / "b"), tmp_path / "given"
    given.mkdir()
    lines = (folder / L0).read_bytes().splitlines(keepends=True)
    (given / "half.jsonl").write_bytes(b"".join(lines[:6]))
    root = other.lines(P0)[1][-1]
    (given / "heads.jsonl").write_bytes(made.head(P0, len(lines), root, (P0, C)) + b"\n")
    assert found(verify_bundle(folder, [given])) == {("entry_differs", L0, 7)}
    (given / "half.jsonl").unlink()
    assert found(verify_bundle(folder, [given])) == {("entry_differs", L0, 1)}


def test_a_copy_that_its_owner_did_not_sign(tmp_path: Path, made: Draft) -> None:
    """It says nothing against the bundle; what stands before it counts."""
    folder = made.write(tmp_path / "b")
    lines = (folder / L0).read_bytes().splitlines(keepends=True)
    given = tmp_path / "copy.jsonl"
    given.write_bytes(b"".join([*lines[:4], lines[5]]))
    verdict = verify_bundle(folder, [given])
    assert found(verdict) == set()
    assert found(verdict, "warnings") == {("copy", str(given), 5)}
    assert P0 in verdict["warnings"][0]["what"]
    other = copy.deepcopy(made)
    other.entry(P0, "charter")["expires"] = "never"
    given.write_bytes(write_copy(other, P0, given).read_bytes().replace(b'"never"', b'"later"'))
    verdict = verify_bundle(folder, [given])
    assert found(verdict) == set()
    assert found(verdict, "warnings") == {("copy", str(given), 3)}
    # what its owner signed otherwise still counts, though its end is worthless
    given.write_bytes(write_copy(other, P0, given).read_bytes() + b"{}\n")
    verdict = verify_bundle(folder, [given])
    assert found(verdict) == {("fork", L0, 3)}
    assert [w["code"] for w in verdict["warnings"]] == ["copy"]


def test_heads_and_checkpoints_beside_the_bundle(tmp_path: Path, made: Draft) -> None:
    longer = copy.deepcopy(made)
    longer.add(P0, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    longer.close_later(P0)
    entries = len(made.books[P0])
    folder, given = made.write(tmp_path / "b"), tmp_path / "head.jsonl"
    given.write_bytes(longer.head(P0, entries + 1, longer.lines(P0)[1][-1], (P0, P1)) + b"\n")
    for path in (given, longer.write(tmp_path / "c") / "closing/run-1.json"):
        verdict = verify_bundle(folder, [path])
        assert ("entries_missing", L0, entries + 1) in found(verdict)
        assert str(path) in str(verdict["violations"])
    # as what a node keeps of a run, and as a folder with anything else in it
    kept = tmp_path / "models" / "run-1"
    kept.mkdir(parents=True)
    shutil.move(tmp_path / "c/closing/run-1.json", kept / "closing.json")
    (kept / "model.json").write_bytes(b"{}")
    assert ("entries_missing", L0, entries + 1) in found(verify_bundle(folder, [tmp_path / "models"]))


def test_another_bundle_folder(tmp_path: Path, made: Draft) -> None:
    other = copy.deepcopy(made)
    other.entry(P1, "hold")["software"] = "other"
    folder, there = made.write(tmp_path / "b"), other.write(tmp_path / "c")
    verdict = verify_bundle(folder, [there])
    place = made.index(P1, "hold") + 1
    assert ("fork", f"partners/{P1}/ledger.jsonl", place) in found(verdict)
    assert ("contradiction", str(there / "closing/run-1.json"), 1) in found(verdict)


def test_what_belongs_to_others_is_not_compared(tmp_path: Path, made: Draft) -> None:
    """A folder of another federation: said; where nothing can be compared, there is no answer."""
    stranger = honest(Shape(partners=2, rounds=1, sigma=30.0, seed=9)).write(tmp_path / "c")
    folder = made.write(tmp_path / "b")
    with pytest.raises(Unreadable, match=r"nothing in it can be compared.*another charter.*hospital-1"):
        verify_bundle(folder, [stranger])
    shutil.copy(folder / L0, stranger / "mine")  # whatever it is called
    verdict = verify_bundle(folder, [stranger])
    assert verdict["violations"] == []
    assert found(verdict, "warnings") == {
        ("unrelated", str(stranger / name), line)
        for name, line in ((COORD, 1), (L0, 1), (f"partners/{P1}/ledger.jsonl", 1), ("closing/run-1.json", None))
    }
    other = copy.deepcopy(made)
    other.entry(P0, "charter")["expires"] = "never"
    shutil.copy(other.write(tmp_path / "d") / L0, stranger / "mine")
    assert found(verify_bundle(folder, [stranger])) == {("fork", L0, 3)}


@pytest.mark.parametrize(
    "data", [b"", b"x\n", b"[]\n", b"{}\n", b'{"envelope":1}\n', b'{"payloadType":"x"}\n', b"\xff" * 99]
)
def test_what_is_given_is_nonsense(tmp_path: Path, made: Draft, data: bytes) -> None:
    folder, given = made.write(tmp_path / "b"), tmp_path / "given"
    given.write_bytes(data)
    with pytest.raises(Unreadable, match="nothing in it can be compared"):
        verify_bundle(folder, [given])
    # beside what can be, nonsense is no reason to distrust anybody
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(folder / L0, both / "ledger.jsonl")
    shutil.copy(given, both / "nonsense.jsonl")
    verdict = verify_bundle(folder, [both])
    assert verdict["violations"] == []
    assert found(verdict, "warnings") == {("copy", str(both / "nonsense.jsonl"), 1)}  # but it is told
    (folder / L0).unlink()  # nor does it hide what is wrong
    verdict = verify_bundle(folder, [given])
    assert ("file", L0, None) in found(verdict)
    assert ("copy", str(given), None) in found(verdict, "warnings")


def test_anothers_bundle_is_unrelated_and_junk_is_worthless(tmp_path: Path, made: Draft) -> None:
    """Where something is wrong anyway each is told by its own code, also when one path begins as the other does."""
    stranger = honest(Shape(partners=2, rounds=1, sigma=30.0, seed=9)).write(tmp_path / "given2")
    folder, junk = made.write(tmp_path / "b"), tmp_path / "given"
    junk.write_bytes(b"x\n")
    (folder / L0).unlink()
    warned = found(verify_bundle(folder, [junk, stranger]), "warnings")
    assert {("copy", str(junk), None), ("unrelated", str(stranger), None)} <= warned
    assert warned == found(verify_bundle(folder, [stranger, junk]), "warnings")


@pytest.mark.parametrize("how", ["blank", "bom", "torn", "genesis", "link", "linked folder", "unreadable name"])
def test_evidence_in_a_folder_that_cannot_be_used_is_told(tmp_path: Path, made: Draft, how: str) -> None:
    """Beside a head that can: nobody may think that everything was compared."""
    folder, given = made.write(tmp_path / "b"), tmp_path / "given"
    given.mkdir()
    data = (folder / L0).read_bytes()
    (given / "heads.jsonl").write_bytes(made.head(P0, 3, made.lines(P0)[1][3], (P0, C)) + b"\n")
    path = given / ("copy" if how == "unreadable name" else "copy.jsonl")
    match how:
        case "blank":
            path.write_bytes(b"\n" + data)
        case "bom" | "unreadable name":
            path.write_bytes(b"\xef\xbb\xbf" + data)
        case "torn":
            path.write_bytes(data[:200])
        case "genesis":
            path.write_bytes(data[:40] + data[41:])
        case "link":
            path.symlink_to(folder / L0)
        case "linked folder":
            path.symlink_to(folder)
    verdict = verify_bundle(folder, [given])
    assert found(verdict) == set()
    code = "unrelated" if how == "genesis" else "copy"  # of another key, as far as it can be read
    assert found(verdict, "warnings") == {(code, str(path), None if "link" in how else 1)}


def test_what_its_owner_signed_counts_though_another_signature_is_bad(tmp_path: Path, made: Draft) -> None:
    longer = copy.deepcopy(made)
    longer.add(P0, "recovered", torn_bytes=1, torn_sha256=digest("x"))
    entries = len(made.books[P0])
    folder, given = made.write(tmp_path / "b"), tmp_path / "head.jsonl"
    head = json.loads(longer.head(P0, entries + 1, longer.lines(P0)[1][-1], (P0, P1)))
    for at, counts in ((1, True), (0, False)):
        bad = copy.deepcopy(head)
        sig = bytearray(base64.b64decode(bad["signatures"][at]["sig"]))
        sig[5] ^= 1
        bad["signatures"][at]["sig"] = base64.b64encode(sig).decode()
        given.write_bytes(canonical(bad) + b"\n")
        if counts:
            verdict = verify_bundle(folder, [given])
            assert found(verdict) == {("entries_missing", L0, entries + 1)}
            assert found(verdict, "warnings") == {("copy", str(given), 1)}
        else:
            with pytest.raises(Unreadable, match="hospital-0 did not sign it"):
                verify_bundle(folder, [given])
    # a closing checkpoint of a longer ledger, without somebody's signature
    longer.close_later(P0)
    roots = {owner: longer.lines(owner)[1] for owner in longer.books}
    stated = [{"owner": o, "length": len(r) - 1, "root": r[-1]} for o, r in roots.items()]
    given = tmp_path / "closing.json"
    given.write_bytes(longer.closing("run-1", sha256(MODEL), stated, list(made.people.values())[:2]))
    verdict = verify_bundle(folder, [given])
    assert ("entries_missing", L0, entries + 1) in found(verdict)
    assert ("copy", str(given), 1) in found(verdict, "warnings")
    assert verdict["partners"][P0]["witnessed"]["closing"] == "run-1"  # that of the bundle, not this one


def test_what_is_given_is_not_there_or_too_much(tmp_path: Path, made: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.write(tmp_path / "b")
    with pytest.raises(Unreadable, match="not there"):
        verify_bundle(folder, [tmp_path / "none"])
    many = tmp_path / "many"
    many.mkdir()
    with pytest.raises(Unreadable, match="nothing in it"):
        verify_bundle(folder, [many])
    monkeypatch.setattr(verifier, "MAX_COPIES", 3)
    for number in range(4):
        shutil.copy(folder / L0, many / f"{number}.jsonl")
    with pytest.raises(Unreadable, match="more than 3 files"):
        verify_bundle(folder, [many])
    (many / "3.jsonl").unlink()
    assert verify_bundle(folder, [many])["violations"] == []


def test_a_checkpoint_given_that_not_everyone_signed(tmp_path: Path, made: Draft) -> None:
    folder, given = made.write(tmp_path / "b"), tmp_path / "closing.json"
    roots = {owner: made.lines(owner)[1] for owner in made.books}
    stated = [{"owner": o, "length": len(r) - 1, "root": r[-1]} for o, r in roots.items()]
    given.write_bytes(made.closing("run-1", sha256(MODEL), stated, list(made.people.values())[1:]))
    verdict = verify_bundle(folder, [folder / L0, folder, given.parent])
    assert found(verdict) == set()
    assert found(verdict, "warnings") == {("copy", str(given), 1)}
    verdict = verify_bundle(folder, [given])  # who did sign it is bound by it
    assert found(verdict, "warnings") == {("copy", str(given), 1)}
    assert "not signed by hospital-0" in verdict["warnings"][0]["what"]
    given.write_bytes(made.closing("run-1", sha256(MODEL), stated, []))
    with pytest.raises(Unreadable, match="not signed by hospital-0"):
        verify_bundle(folder, [given])


def test_every_code_is_told_and_used() -> None:
    source = Path(verifier.__file__).read_text()
    body = source.split('"""What a code of a violation or warning means to a reader."""')[1]
    assert [code for code in verifier.MEANS if f'"{code}"' not in body and code != "more"] == []
    assert all(text.endswith(".") and code == code.lower() for code, text in verifier.MEANS.items())
