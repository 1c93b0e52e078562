"""Every single tampering with a bundle of 60 entries, by everyone who has a key: each is detected, and the verdict names the entry.

The attacker holds its own key and makes the bundle: it rewrites its own ledger in one place, chains and signs it anew, and takes
every statement about it out. What it does not hold is one copy, one countersigned head or one closing checkpoint.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hansa.common import verifier
from hansa.common.identity import canonical, sha256
from hansa.common.ledger import ENTRY_TYPE
from hansa.common.merkle import EMPTY, Tree, leaf_hash
from hansa.common.verifier import verify_bundle

sys.path.insert(0, str(Path(__file__).parent))
from bundles import COORDINATOR, Draft, Shape, digest, honest

SHAPE = Shape(partners=3, rounds=2, sigma=40.0, others=0.3, seed=4)
OWNERS = ["hospital-0", "hospital-1", "hospital-2", COORDINATOR]
Line = dict[str, Any]  # header (a dict) and body (a dict or None)
Tampered = tuple[str, int, list[bytes]]  # what was done, the first entry (from 1) that differs, the lines


class Case:
    """One honest bundle on disk, and what others kept of it."""

    def __init__(self, folder: Path) -> None:
        self.made = honest(SHAPE)
        self.files = self.made.files()
        self.bundle = folder / "bundle"
        self.kept = folder / "kept"
        for name, data in self.files.items():
            (self.bundle / name).parent.mkdir(parents=True, exist_ok=True)
            (self.bundle / name).write_bytes(data)
        self.kept.mkdir()
        for owner in OWNERS:
            lines, roots = self.made.lines(owner, full=True)
            (self.kept / f"{owner}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
            witness = OWNERS[OWNERS.index(owner) - 1]
            head = self.made.head(owner, len(lines), roots[-1], (owner, witness))
            (self.kept / f"{owner}.head").write_bytes(head + b"\n")
        (self.kept / "closing.json").write_bytes(self.files["closing/run-1.json"])

    def path(self, owner: str) -> Path:
        return self.bundle / self.made.file(owner)

    def drop_statements(self, owner: str) -> None:
        """What speaks of the owner's ledger is taken out of the bundle."""
        (self.bundle / "closing/run-1.json").unlink()
        for holder in OWNERS:
            path = self.bundle / f"heads/{holder}.jsonl"
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if payload_of(json.loads(line))["owner"] != owner]
            path.write_bytes(b"".join(kept))

    def restore(self) -> None:
        for name, data in self.files.items():
            (self.bundle / name).write_bytes(data)


def payload_of(envelope: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return found


def parsed(lines: list[bytes]) -> list[Line]:
    whole = [json.loads(line) for line in lines]
    return [{"header": payload_of(line["envelope"]), "body": line.get("body")} for line in whole]


def chained(made: Draft, owner: str, lines: list[Line], keep: list[bytes]) -> list[bytes]:
    """Numbered, chained and signed again; those that are as before keep their bytes."""
    tree, root, found = Tree(), EMPTY.hex(), []
    for seq, line in enumerate(lines):
        header = line["header"] | {"seq": seq, "root": root}
        if line["body"] is not None:
            header["body_sha256"] = sha256(canonical(line["body"]))
        payload = canonical(header)
        if seq < len(keep) and parsed(keep[seq : seq + 1]) == [{"header": header, "body": line["body"]}]:
            found.append(keep[seq])
        else:
            sealed = made.people[owner].seal(ENTRY_TYPE, payload)
            body = b"" if line["body"] is None else b'"body":' + canonical(line["body"]) + b","
            found.append(b"{" + body + b'"envelope":' + sealed + b"}")
        tree.append(leaf_hash(payload))
        root = tree.root().hex()
    return found


def other_value(value: Any) -> Any:
    """Of the same kind."""
    match value:
        case None:
            return digest("something")
        case bool():
            return not value
        case int():
            return value + 1
        case str() if value[:1].isdigit() and "T" in value:
            return "2026-11-23T00:00:00Z"
        case str() if len(value) in (32, 64):
            return digest(value)[: len(value)]
        case str():
            return value + "x"
        case list():
            return [*value[:-1], other_value(value[-1])] if value else [1]
        case dict():
            key = sorted(value)[-1]
            return {**value, key: other_value(value[key])}
    raise AssertionError(value)


def edits(line: Line) -> Iterator[tuple[str, Line]]:
    """Each field of header, body and data, to another value of its kind."""
    privacy = line["header"]["privacy"]
    event = {"mechanism": "none/1"}
    yield (
        "privacy",
        copy.deepcopy(line) | {"header": line["header"] | {"privacy": other_value(privacy or {"debit": event})}},
    )
    yield "privacy gone", copy.deepcopy(line) | {"header": line["header"] | {"privacy": None if privacy else {}}}
    yield "version", copy.deepcopy(line) | {"header": line["header"] | {"v": 3}}
    if line["body"] is None:
        yield "body_sha256", copy.deepcopy(line) | {"header": line["header"] | {"body_sha256": digest("x")}}
        return
    for name, value in line["body"].items():
        if name != "data":
            yield name, {"header": line["header"], "body": line["body"] | {name: other_value(value)}}
    for name, value in line["body"]["data"].items():
        data = line["body"]["data"] | {name: other_value(value)}
        yield f"data.{name}", {"header": line["header"], "body": line["body"] | {"data": data}}


def resigned(case: Case, owner: str) -> Iterator[Tampered]:
    """By whoever holds the owner's key."""
    before = case.path(owner).read_bytes().splitlines()
    lines = parsed(before)
    end = len(lines)

    def again(changed: list[Line]) -> list[bytes]:
        return chained(case.made, owner, changed, before)

    for k in range(end):
        rest = lines[k + 1 :]
        yield f"deleted {k + 1}", k + 1, again(lines[:k] + rest)
        yield f"twice {k + 1}", k + 2, again([*lines[: k + 1], *lines[k:]])
        yield f"cut at {k}", k + 1, again(lines[:k])
        for what, line in edits(lines[k]):
            yield f"edited {k + 1}: {what}", k + 1, again([*lines[:k], line, *rest])
        for other in {k + 1, (k * 7 + 5) % end}:
            if k < other < end:
                changed = list(lines)
                changed[k], changed[other] = changed[other], changed[k]
                yield f"swapped {k + 1} and {other + 1}", k + 1, again(changed)
        crash = {"salt": digest(k)[:32], "time": "2026-11-22T02:00:00Z", "type": "recovered", "charter": None}
        body = crash | {"data": {"torn_bytes": 1, "torn_sha256": digest("torn")}}
        fork = {"header": {"v": 2, "privacy": None}, "body": body}
        yield f"forked after {k}", k + 1, again([*lines[:k], fork])
        yield f"forked after {k}, as long", k + 1, again([*lines[:k], fork, *rest])
        yield f"forked after {k}, longer", k + 1, again([*lines[:k], fork, fork, *rest])


def unsigned(case: Case, owner: str) -> Iterator[Tampered]:
    """By somebody without the owner's key: lines moved, parts of lines exchanged, single bytes."""
    rng = random.Random(owner)
    lines = case.path(owner).read_bytes().splitlines()
    whole = [json.loads(line) for line in lines]
    for k, line in enumerate(lines):
        rest = lines[k + 1 :]
        if rest:  # without the last one it is a cut
            yield f"dropped {k + 1}", k + 1, lines[:k] + rest
            yield f"moved {k + 1}", k + 1, [*lines[:k], rest[0], line, *rest[1:]]
        yield f"repeated {k + 1}", k + 2, [*lines[: k + 1], *lines[k:]]
        envelope = whole[k]["envelope"]
        changed: list[tuple[str, dict[str, Any]]] = []
        for name, value in payload_of(envelope).items():
            payload = canonical(payload_of(envelope) | {name: other_value(value)})
            changed.append((f"header {name}", {"envelope": envelope | {"payload": base64.b64encode(payload).decode()}}))
        signature = base64.b64decode(envelope["signatures"][0]["sig"])
        flipped = base64.b64encode(bytes([signature[0] ^ 1]) + signature[1:]).decode()
        for one in ({"sig": flipped}, {"keyid": digest("x")}):
            changed.append(
                (f"signature {one}", {"envelope": envelope | {"signatures": [envelope["signatures"][0] | one]}})
            )
        changed.append(("no signature", {"envelope": envelope | {"signatures": []}}))
        changed.append(("type", {"envelope": envelope | {"payloadType": "x"}}))
        for name, value in (whole[k].get("body") or {}).items():
            changed.append((f"body {name}", {"body": whole[k]["body"] | {name: other_value(value)}}))
        if "body" not in whole[k]:
            changed.append(("a body", {"body": {"salt": "0" * 32}}))
        for what, parts in changed:
            yield f"{what} of {k + 1}", k + 1, [*lines[:k], canonical(whole[k] | parts), *rest]
        at = rng.randrange(len(line))
        byte = bytes([line[at] ^ 1 << rng.randrange(7)])
        if byte != b"\n":
            yield f"byte {at} of {k + 1}", k + 1, [*lines[:k], line[:at] + byte + line[at + 1 :], *rest]


def named(verdict: dict[str, Any], file: str, place: int, codes: set[str] | None = None) -> list[dict[str, Any]]:
    """The violations that name the entry, or one before it from which on the ledger is in doubt."""
    return [
        v
        for v in verdict["violations"]
        if v["file"] == file and v["line"] is not None and v["line"] <= place and (codes is None or v["code"] in codes)
    ]


_key_of = verifier._public


class Remembers:
    """A public key that looks at each signature once: thousands of bundles here differ from one another in a line. A bad one it looks at
    every time."""

    good: ClassVar[set[tuple[str, bytes, bytes]]] = set()

    def __init__(self, key: str) -> None:
        self.name, self.key = key, _key_of(key)

    def verify(self, signature: bytes, data: bytes) -> None:
        if (self.name, signature, data) not in self.good:
            self.key.verify(signature, data)
            self.good.add((self.name, signature, data))

    def public_bytes(self, *how: Any) -> bytes:
        return self.key.public_bytes(*how)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_public", lru_cache(Remembers))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """The bundle; a signature that was found good once is not computed again."""
    made = Case(tmp_path_factory.mktemp("tampering"))
    shared: set[bytes] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "_check_signature", checked_once(shared))
        patch.setattr(verifier.Odometer, "read", lambda *_: verifier.Reading(0.0))  # not what is tested here, and slow
        yield made


def checked_once(known: set[bytes]) -> Any:
    check = verifier._check_signature

    def cheap(report: verifier.Report, *arguments: Any) -> None:
        report.known = known
        check(report, *arguments)

    return cheap


def test_the_bundle(case: Case) -> None:
    """60 entries, some of them another charter's; honest as it is, also beside everything that was kept."""
    verdict = verify_bundle(case.bundle)
    assert verdict["violations"] == []
    assert verdict["checked"]["entries"] == 60
    assert sum(p["undisclosed"] for p in verdict["partners"].values()) > 5
    assert {head["owner"] for head in verdict["heads"]} == set(OWNERS)
    assert verify_bundle(case.bundle, case.kept.iterdir())["violations"] == []


EVIDENCE = {"copy": "{owner}.jsonl", "head": "{owner}.head", "closing": "closing.json"}


def undetected(case: Case, owner: str, tampered: Tampered, evidence: str) -> str | None:
    """What was done, if the verdict does not name it."""
    what, place, lines = tampered
    case.path(owner).write_bytes(b"".join(line + b"\n" for line in lines))
    verdict = verify_bundle(case.bundle, [case.kept / EVIDENCE[evidence].format(owner=owner)])
    codes = {"copy": {"fork", "entries_missing"}}.get(evidence, {"entry_differs", "entries_missing"})
    length = len(case.made.books[owner])
    if place > length:  # more than was there: no statement speaks of it, its meaning must be wrong
        return None if named(verdict, case.made.file(owner), place) else what
    found = named(verdict, case.made.file(owner), place, codes)
    if evidence == "copy":
        found = [v for v in found if v["line"] == place]  # a copy shows the very entry
    # An entry that cannot be read is named itself, and reading ends there.
    unread = {"layout", "unknown", "genesis"}
    found = found or [v for v in named(verdict, case.made.file(owner), place, unread) if v["line"] == place]
    return None if found else what


@pytest.mark.soak
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("owner", OWNERS)
def test_every_tampering_by_the_owner_against_each_kind_of_evidence(case: Case, owner: str, evidence: str) -> None:
    tampered_by_owner(case, owner, [evidence])


@pytest.mark.parametrize("owner", OWNERS)
def test_every_second_tampering_by_the_owner(case: Case, owner: str) -> None:
    """Each against one kind of evidence, by turns: a copy, a head, a checkpoint. `make soak` has all against each."""
    tampered_by_owner(case, owner, list(EVIDENCE), 2)


def tampered_by_owner(case: Case, owner: str, evidence: list[str], step: int = 1) -> None:
    found = list(resigned(case, owner))
    length = len(case.made.books[owner])
    assert len(found) > 12 * length
    found = found[OWNERS.index(owner) % step :: step]
    case.drop_statements(owner)
    try:
        turns = zip(found, itertools.cycle(evidence), strict=False)
        missed = [what for tampered, kind in turns if (what := undetected(case, owner, tampered, kind))]
        assert not missed
        case.path(owner).write_bytes(case.files[case.made.file(owner)])
        assert all(v["code"] == "closing_missing" for v in verify_bundle(case.bundle)["violations"])
    finally:
        case.restore()


@pytest.mark.parametrize("owner", OWNERS)
def test_every_tampering_with_what_others_hold_in_the_bundle(case: Case, owner: str) -> None:
    """Heads and checkpoint are in the bundle: nothing else need be given. The entry is named from the last head before it on."""
    try:
        for what, place, lines in list(resigned(case, owner))[::4]:
            case.path(owner).write_bytes(b"".join(line + b"\n" for line in lines))
            assert named(verify_bundle(case.bundle), case.made.file(owner), place), what
    finally:
        case.restore()


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("owner", OWNERS)
def test_every_tampering_without_a_key(case: Case, owner: str, step: int) -> None:
    """Nothing beside the ledger is needed: the verdict names the very line. Every second; in `make soak` every one."""
    case_lines = list(unsigned(case, owner))[OWNERS.index(owner) % step :: step]
    case.drop_statements(owner)
    try:
        for what, place, lines in case_lines:
            case.path(owner).write_bytes(b"".join(line + b"\n" for line in lines))
            verdict = verify_bundle(case.bundle)
            first = min(v["line"] for v in named(verdict, case.made.file(owner), 10**9))
            assert first == place, (what, verdict["violations"])
    finally:
        case.restore()


def test_without_the_comparison_they_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what finds them is the comparison with heads, checkpoints and copies, not something else."""
    owner = "hospital-0"
    found = list(resigned(case, owner))[::5]
    case.drop_statements(owner)
    monkeypatch.setattr(verifier.Witnesses, "compare", lambda _: None)
    monkeypatch.setattr(verifier.Witnesses, "_ledger", lambda self, *_: setattr(self, "used", 1))
    try:
        for evidence in EVIDENCE:
            missed = [what for tampered in found if (what := undetected(case, owner, tampered, evidence))]
            assert len(missed) > 0.5 * len(found)
    finally:
        case.restore()
