"""Bad input gets a clear error and loses nothing: each item of the issue's list, through the command line."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from e2e_support import (
    DATA,
    HOSPITALS,
    Fault,
    Forked,
    Result,
    call,
    federation,
    ledgers,
    of_type,
    resize_disk,
    rows_of,
    small_disk,
    whole_lines,
    write,
    write_rows,
)
from hansa.common.charter import CHARTER_TYPE, SignedCharter
from hansa.common.identity import Envelope, Identity, write_envelope

Rows = list[dict[str, str]]
GOOD = federation(rounds=1)


def refused(folder: Path, text: str, code: int, *words: str) -> None:
    """`plan` or `simulate` says these words, and leaves nothing that would be in the way of the corrected command."""
    config = write(folder / "c.yaml", text)
    call("simulate", config, "--out", folder / "out").expect(code).says(*words)
    assert not (folder / "out").exists()
    assert not (folder / "out.private").exists()


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("rounds: 1", "rounds: [1", ["c.yaml:11:8: not valid YAML", "Check indentation and quotes at this place"]),
        ("  rounds: 1", "\trounds: 1", ["c.yaml:10:1: not valid YAML", "'\\t'"]),
        ("quorum: 2", "quorum: 2\nqourum: 3", ["c.yaml:15: qourum: unknown key (found 3)", "docs/configuration.md"]),
        ("lr: 0.2", "lr: 0.2, leraning: 1", ["c.yaml:11: algorithm.local.optimizer.leraning: unknown key"]),
        (
            "clip_norm: 1.0",
            "clip_norm: 1.0, sigma: 2",
            ["privacy.sigma: unknown key (found 2); here: noise_multiplier, the"],
        ),
        ("clip_norm: 1.0", "clip_norm: 1.0, eps: 2", ["privacy.eps: unknown key (found 2); here: epsilon"]),
        ("quorum: 2", "quorum: 2\nquorum: 3", ["c.yaml:15:1", "key 'quorum' given twice"]),
        ("quorum: 2\n", "", ["c.yaml:1: quorum: missing; it is required"]),
        ("quorum: 2", "quorum: 9", ["quorum 9 is more than the 4 partners asked in a round"]),
        ("rounds: 1", "rounds: many", ["c.yaml:10: algorithm.rounds", "valid integer", "found 'many'"]),
        ("epsilon: 1.0", "epsilon: 0", ["c.yaml:12: privacy.epsilon", "greater than 0 (found 0)"]),
        ("epsilon: 1.0", "epsilon: -1", ["c.yaml:12: privacy.epsilon", "greater than 0 (found -1)"]),
        ("epsilon: 1.0", "epsilon: .nan", ["c.yaml:12: privacy.epsilon", "finite", "found nan"]),
        ("delta: 1.0e-4", "delta: 0.01", ["c.yaml:12", "0.01 is not below 1/n = 0.0042 for 240 records"]),
        ("delta: 1.0e-4", "delta: 0", ["c.yaml:12: privacy.delta", "greater than 0"]),
        ("clip_norm: 1.0", "clip_norm: 1, noise_multiplier: 0.2", ["c.yaml:12", "0.3 (found 0.2)"]),
        (
            "task: heart-disease",
            "task: heart-disaese",
            ["no task 'heart-disaese' is installed; installed are", "pip install"],
        ),
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
def test_configuration(before: str, after: str, words: list[str], tmp_path: Path) -> None:
    assert before in GOOD
    refused(tmp_path, GOOD.replace(before, after), 2, *words)
    # A delta that is no privacy claim is an answer of the linter: the file is readable, and the answer is no.
    call("plan", tmp_path / "c.yaml").expect(1 if before.startswith("delta") else 2).says(*words)


@pytest.mark.parametrize("data", [b"", b"- a list\n", b"\xff\xfe binary", b"a: &a [*a]\n", b"[" * 3000])
def test_a_file_that_is_no_configuration(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    call("plan", tmp_path / "c.yaml").expect(2).says("c.yaml")


def test_a_population_has_its_delta_checked_against_its_clients(tmp_path: Path) -> None:
    text = federation(
        rounds=1,
        who="task: digits\npopulation: {dataset: digits, clients: 3}",
        privacy="{kind: local, epsilon: 1.0, delta: 0.01, clip_norm: 1.0}",
    )
    refused(tmp_path, text, 2, "c.yaml:", ": privacy.delta 0.01 is not below 1/n", "Write a smaller one: 0.001.")


def test_a_budget_that_no_noise_pays(tmp_path: Path) -> None:
    text = GOOD.replace("epsilon: 1.0", "epsilon: 1.0e-7")
    refused(tmp_path, text, 1, "refused: budget", "do not fit", "whatever the noise", "Plan fewer steps")
    call("plan", tmp_path / "c.yaml").expect(1).says("refused: budget", "whatever the noise")


def test_more_rounds_than_the_budget_pays_are_refused_before_training(tmp_path: Path) -> None:
    """With the noise fixed by hand the partners' own gates refuse, each in its ledger; no data was read for training."""
    text = GOOD.replace("rounds: 1", "rounds: 500").replace("clip_norm: 1.0", "clip_norm: 1.0, noise_multiplier: 26.0")
    config, out = write(tmp_path / "c.yaml", text), tmp_path / "out"
    call("plan", config).expect(1).says(
        "does not fit", "28 such rounds fit", "Fewer rounds, more noise, or a larger cap"
    )
    done = call("simulate", config, "--out", out).expect(1)
    done.says(
        "cleveland, hungary, switzerland, va-long-beach refused: budget: spent and held so far epsilon 0.000, with this run",
        "cap 1",
        "nothing was trained",
    )
    done.says(f"fewer rounds or more noise. What fits: hansa plan {config}")
    for name in HOSPITALS:
        book = ledgers(out)[name]
        assert [r["reason"] for r in of_type(book, "refuse")] == ["budget"]
        assert not of_type(book, "hold")
        assert not of_type(book, "debit")
    assert not (out / "model.safetensors").exists()
    call("audit", out).expect(0)
    # Asked again it is refused again, and no ledger grows.
    before = {n: whole_lines(p) for n, p in ledgers(out).items()}
    call("simulate", config, "--out", out, "--resume").expect(1).says("nothing was trained")
    assert {n: whole_lines(p) for n, p in ledgers(out).items()} == before
    refusals = json.loads((out / "result.json").read_text())["refusals"]
    assert sorted(r["partner"] for r in refusals) == sorted(HOSPITALS)
    assert all("cap 1" in r["detail"] for r in refusals)
    call("simulate", config, "--out", tmp_path / "two", "--seeds", "2").expect(1).says("nothing was trained")


# -- data ------------------------------------------------------------------------------------------------------------


def cell(column: str, value: str) -> Callable[[Rows], Any]:
    return lambda rows: rows[4].update({column: value})


def without(column: str) -> Callable[[Rows], Any]:
    return lambda rows: [row.pop(column) for row in rows]


def every(column: str, value: str) -> Callable[[Rows], Any]:
    return lambda rows: [row.update({column: value}) for row in rows]


SCHEMA = ["hungary.csv: 1 value outside the schema; nothing was loaded", "Correct the file, or widen the schema"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (cell("age", "fifty"), 2, [*SCHEMA, "6 age fifty a number from 0 to 120 years; required"]),
        (cell("chol", "nan"), 2, [*SCHEMA, "6 chol nan a number from 80 to 620 mg/dl"]),
        (cell("chol", "inf"), 2, [*SCHEMA, "6 chol inf a number from 80 to 620"]),
        (cell("trestbps", "-Infinity"), 2, [*SCHEMA, "6 trestbps -Infinity"]),
        (cell("thalach", "1e999"), 2, [*SCHEMA, "6 thalach 1e999"]),
        (cell("age", "121"), 2, [*SCHEMA, "6 age 121"]),
        (cell("age", ""), 2, [*SCHEMA, "6 age", "required"]),
        (cell("sex", "male"), 2, [*SCHEMA, "6 sex male one of Male, Female"]),
        (cell("num", "5"), 2, [*SCHEMA, "6 num 5"]),
        (without("chol"), 2, [*SCHEMA, "1 chol this column in the header"]),
        (every("num", "0"), 2, ["hungary: all labels are of one class, 'healthy'", "Check the label's column"]),
        (lambda rows: rows.clear(), 2, ["hungary.csv", "at least one row of data"]),
        (lambda rows: rows.__delitem__(slice(0, 60)), 1, [
            "hungary: the dataset's size is not within 10% of the declared 235 records",
            "Declare the size that the training part really has, rounded",
        ]),
        (lambda rows: rows.extend(rows[:60]), 1, ["hungary: the dataset's size is not within 10%"]),
    ],
    ids=["type", "NaN", "Inf", "-Inf", "overflow", "range", "required", "category", "label", "column", "one class",
         "empty", "too few", "too many"],
)  # fmt: skip
def test_data(change: Callable[[Rows], Any], code: int, words: list[str], tmp_path: Path) -> None:
    good = rows_of(DATA / "hungary.csv")
    rows = [dict(row) for row in good]
    change(rows)
    file = tmp_path / "hungary.csv"
    write_rows(file, rows) if rows else file.write_text(",".join(good[0]) + "\n")
    text = GOOD.replace("package:heart-disease/hungary.csv", "hungary.csv")
    refused(tmp_path, text, code, *words)
    if "outside the schema" in words[0]:
        call("task", "check", "heart-disease", file).expect(2).says(*words)


def test_a_size_outside_the_tolerance_does_not_tell_the_real_one(tmp_path: Path) -> None:
    text = GOOD.replace("declared_records: 235", "declared_records: 400")
    refused(tmp_path, text, 1, "hungary: the dataset's size is not within 10% of the declared 400 records")
    assert "235" not in call("simulate", tmp_path / "c.yaml", "--out", tmp_path / "out").text


def test_missing_data_files(tmp_path: Path) -> None:
    refused(tmp_path, GOOD.replace("package:heart-disease/hungary.csv", "nowhere.csv"), 2,
            "hungary", "no data file", "nowhere.csv", "relative to that file")  # fmt: skip
    refused(tmp_path, GOOD.replace("package:heart-disease/hungary.csv", "package:heart-disease/rome.csv"), 2,
            "no data file 'package:heart-disease/rome.csv' is shipped", "package:heart-disease/hungary.csv")  # fmt: skip
    text = federation(rounds=1, who="task: digits\npopulation: {dataset: dogs, clients: 3}")
    refused(tmp_path, text, 2, "no data set 'dogs'", "Allowed are digits")


def test_bad_input_can_be_corrected_in_place(tmp_path: Path) -> None:
    """The corrected command is the same command: nothing of the failed one is in its way."""
    config, out = write(tmp_path / "c.yaml", GOOD.replace("235", "400")), tmp_path / "out"
    call("simulate", config, "--out", out).expect(1)
    write(config, GOOD)
    call("simulate", config, "--out", out).expect(0).says("VERIFIED")


def test_data_that_changed_under_a_run_stop_it(forked: Forked, tmp_path: Path) -> None:
    """Its budget belongs to the rows that were registered."""
    data = tmp_path / "hungary.csv"
    shutil.copy(DATA / "hungary.csv", data)
    config = write(tmp_path / "c.yaml", GOOD.replace("package:heart-disease/hungary.csv", "hungary.csv"))
    out = tmp_path / "out"
    forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", 62)).expect(-9)
    before = {n: whole_lines(p) for n, p in ledgers(out).items()}
    good = data.read_text()
    data.write_text(good.replace("\n28,", "\n29,", 1))
    call("simulate", config, "--out", out, "--resume").expect(2).says(
        "hungary: the data differ from what", "Restore them"
    )
    data.unlink()
    call("simulate", config, "--out", out, "--resume").expect(2).says("hungary", "no data file")
    assert {n: whole_lines(p) for n, p in ledgers(out).items()} == before
    data.write_text(good)
    call("simulate", config, "--out", out, "--resume").expect(0).says("VERIFIED")


# -- output ----------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_holds_another_run(tmp_path: Path) -> None:
    config, out = write(tmp_path / "c.yaml", GOOD), tmp_path / "out"
    call("simulate", config, "--out", out).expect(0)
    files = {p: p.read_bytes() for root in (out, tmp_path / "out.private") for p in root.rglob("*") if p.is_file()}
    call("simulate", config, "--out", out).expect(2).says(
        "out: holds another run, which is finished", "give another --out"
    )
    other = write(tmp_path / "other.yaml", federation(rounds=2))
    call("simulate", other, "--out", out, "--resume").expect(2).says("holds a run of another configuration")
    call("demo", "--out", out).expect(2).says("not an earlier demo", "Give another --out")
    bad = write(tmp_path / "bad.yaml", GOOD.replace("235", "400"))
    call("simulate", bad, "--out", out).expect(2).says("holds a run of another configuration")
    assert {
        p: p.read_bytes() for root in (out, tmp_path / "out.private") for p in root.rglob("*") if p.is_file()
    } == files


def test_an_output_folder_with_something_of_the_users(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", GOOD)
    mine = write(tmp_path / "out" / "thesis.txt", "three years")
    call("simulate", config, "--out", mine.parent).expect(2).says(
        "out: not empty, and not a run of ours", "Give another --out"
    )
    bad = write(tmp_path / "bad.yaml", GOOD.replace("235", "400"))
    call("simulate", bad, "--out", mine.parent, "--resume").expect(2)
    assert mine.read_text() == "three years"
    call("simulate", config, "--out", mine).expect(2).says("thesis.txt", "Give another --out")
    call("simulate", config, "--out", "/").expect(2).says("a folder of its own", "Give another --out")
    assert mine.read_text() == "three years"


def test_two_processes_cannot_write_one_run(tmp_path: Path, forked: Forked) -> None:
    import fcntl

    config, out = write(tmp_path / "c.yaml", GOOD), tmp_path / "out"
    forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", 62)).expect(-9)
    with open(ledgers(out)["hungary"], "ab") as book:
        fcntl.flock(book, fcntl.LOCK_EX)
        call("simulate", config, "--out", out, "--resume").expect(2).says(
            "hungary/ledger.jsonl: another process is writing this ledger", "Wait for it to finish"
        )
    call("simulate", config, "--out", out, "--resume").expect(0)


# -- a full disk -----------------------------------------------------------------------------------------------------


WRITTEN = ("run.json", "charter.json", "dataset", "coordinator/ledger.jsonl", "partners/switzerland/ledger.jsonl", "outbox",
           "checkpoint", "closing", "model.safetensors", "result.json", "report.html")  # fmt: skip


def test_a_full_disk_at_any_write(tmp_path: Path, forked: Forked) -> None:
    """From some write on nothing fits; with room again the run goes on."""
    config = write(tmp_path / "c.yaml", GOOD)
    syncs = forked.syncs("simulate", config, "--out", tmp_path / "whole", folder=tmp_path)

    for word in WRITTEN:
        number = next(i for i, path in enumerate(syncs, start=1) if word in path)
        out = tmp_path / word
        done = forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("full", number)).expect(2)
        done.says(word)
        assert "the disk is full" in done.text or "No space left" in done.text
        before = {n: whole_lines(p) for n, p in ledgers(out).items()}
        forked.run("simulate", config, "--out", out, "--resume", folder=tmp_path).expect(0).says("VERIFIED")
        for name, lines in before.items():
            assert whole_lines(ledgers(out)[name])[: len(lines)] == lines, (word, name)
        for name in HOSPITALS:
            assert len(of_type(ledgers(out)[name], "debit")) == 1
        call("audit", out).expect(0)


@pytest.mark.parametrize("kilobytes", [8, 56, 76, 104, 124, 148])
def test_a_small_disk(kilobytes: int, tmp_path: Path) -> None:
    """A real file system without room, then with room."""
    config = write(tmp_path / "c.yaml", GOOD)
    try:
        with small_disk(tmp_path / "disk", kilobytes) as disk:
            done = call("simulate", config, "--out", disk / "out").expect(2)
            assert "the disk is full" in done.text or "No space left" in done.text
            before = {n: whole_lines(p) for n, p in ledgers(disk / "out").items()}
            call("simulate", config, "--out", disk / "out", "--resume").expect(2)  # still full
            for name, lines in before.items():
                assert whole_lines(ledgers(disk / "out")[name])[: len(lines)] == lines
            resize_disk(disk, 4096)
            call("simulate", config, "--out", disk / "out", "--resume").expect(0).says("VERIFIED")
            for name, lines in before.items():
                assert whole_lines(ledgers(disk / "out")[name])[: len(lines)] == lines
            call("audit", disk / "out").expect(0)
    except OSError as err:
        pytest.skip(f"this user may not mount a small disk: {err}")


# -- charters --------------------------------------------------------------------------------------------------------


def people(demo: Path) -> dict[str, Identity]:
    private = demo.with_name(demo.name + ".private")
    return {name: Identity.load(name, private / name / "identity.key") for name in (*HOSPITALS, "coordinator")}


def resigned(signed: SignedCharter, who: dict[str, Identity], **changes: Any) -> bytes:
    """A charter with other terms, properly signed by these."""
    again = SignedCharter.unsigned(signed.charter.model_copy(update=changes))
    for identity in who.values():
        again = again.sign(identity)
    return again.to_bytes()


def edited(signed: SignedCharter) -> bytes:
    payload = signed.payload.replace(b'"epsilon":"1.0"', b'"epsilon":"9.0"')
    assert payload != signed.payload
    return write_envelope(Envelope(CHARTER_TYPE, payload, signed.signatures)) + b"\n"


def foreign(signed: SignedCharter) -> bytes:
    stranger = Identity.generate("stranger")
    made = (stranger.key, stranger.sign(CHARTER_TYPE, signed.payload))
    return write_envelope(Envelope(CHARTER_TYPE, signed.payload, (*signed.signatures[1:], made))) + b"\n"


def missing(signed: SignedCharter) -> bytes:
    return write_envelope(Envelope(CHARTER_TYPE, signed.payload, signed.signatures[1:])) + b"\n"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (missing, ["not signed by cleveland", "hansa charter sign CHARTER.json --home HOME"]),
        (edited, ["the charter was edited after signing", "Ask for the file that was signed"]),
        (foreign, ["signed by a key that is not a partner's", "Refuse this charter"]),
    ],
)
def test_a_charter_that_is_not_what_everyone_signed(
    break_it: Callable[[SignedCharter], bytes], words: list[str], bundle: Path
) -> None:
    file = bundle / "charter.json"
    file.write_bytes(break_it(SignedCharter.load(file)))
    call("charter", "verify", file).expect(1).says("charter.json", *words)
    told = call("charter", "verify", file, "--format", "json").expect(1).json()
    assert not told["valid"]
    assert words[0] in told["problem"]
    assert call("audit", bundle).expect(1).says("NOT VERIFIED", "charter.json")


def test_an_expired_charter(demo_run: tuple[Path, Result], tmp_path: Path) -> None:
    signed = SignedCharter.load(demo_run[0] / "charter.json")
    before = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
    old = tmp_path / "old.json"
    old.write_bytes(resigned(signed, people(demo_run[0]), created=before, expires=before + timedelta(days=1)))
    call("charter", "verify", old).expect(1).says("old.json: expired on", "Draft and sign a new charter")
    call("charter", "show", old).expect(0).says("signed by everyone")


def test_a_run_does_not_go_on_under_an_expired_charter(
    forked: Forked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write(tmp_path / "c.yaml", GOOD), tmp_path / "out"
    forked.run("simulate", config, "--out", out, folder=tmp_path, fault=Fault("before", 62)).expect(-9)
    before = {n: whole_lines(p) for n, p in ledgers(out).items()}

    class NextYear(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=366)

    with monkeypatch.context() as later:
        later.setattr("hansa.clients.gate.datetime", NextYear)
        done = call("simulate", config, "--out", out, "--resume").says("expired")
        assert done.expect(done.code).code in (1, 2)
    for name, lines in before.items():
        assert whole_lines(ledgers(out)[name])[: len(lines)] == lines
    assert not any(of_type(book, "debit") for book in ledgers(out).values())


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]\n", b"\x00\xff", b'{"payload":"","payloadType":"","signatures":[]}\n', b"[" * 100_000],
    ids=["empty", "object", "list", "binary", "envelope", "deep"],
)
def test_a_file_that_is_no_charter(data: bytes, bundle: Path) -> None:
    file = bundle / "charter.json"
    file.write_bytes(data)
    for command in ("show", "verify"):
        call("charter", command, file).expect(2).says("charter.json: not a charter", "Ask the coordinator")
    assert call("audit", bundle).says("charter.json").code in (1, 2)


def test_a_charter_payload_with_other_fields_is_malformed(bundle: Path) -> None:
    file = bundle / "charter.json"
    envelope = json.loads(file.read_bytes())
    payload = json.loads(base64.b64decode(envelope["payload"]))
    for change in ({"quorum": 0}, {"extra": 1}, {"privacy": {}}, {"partners": []}, {"format": "hansa-charter/2"}):
        text = json.dumps({**payload, **change}, sort_keys=True, separators=(",", ":")).encode()
        bad = {**envelope, "payload": base64.b64encode(text).decode()}
        file.write_bytes(json.dumps(bad, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        # Of an unknown format nobody knows what its epsilon is about: that is a no, not only malformed.
        done = call("charter", "verify", file).says("charter.json", "malformed")
        assert done.code == (1 if "format" in change else 2), done.out
        assert call("audit", bundle).says("charter.json").code in (1, 2)
