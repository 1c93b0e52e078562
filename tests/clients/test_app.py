"""A node's order of things: what is refused reads nothing, what is spent is on disk first, what leaves is listed."""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from hansa.clients.app import Node, local_settings, make_client_app, round_seed
from hansa.clients.outbox import Outbox
from hansa.common import identity as identity_module
from hansa.common.charter import SignedCharter
from hansa.common.closing import CLOSING_TYPE, closing_payload
from hansa.common.errors import DataError, LedgerError, MessageError, OutputError, Refusal, SchemaViolation
from hansa.common.flower import Context, Message, RecordDict, addressed
from hansa.common.heads import Head, sign_head
from hansa.common.identity import Envelope, Identity, verify, write_envelope
from hansa.common.ledger import Ledger
from hansa.common.messages import Manifest, SignedWire, to_bytes
from hansa.common.model import model_manifest, model_sha256
from hansa.common.witness import asking, told, with_signatures
from support import NO_PRIVACY, Site, Source, charter, forbidden, identity, request, same_arrays, unwrapped, weights

MAY_LEAVE = {"update", "failed", "scores", "histogram", "head", "signature", "accepted", "refused", "kept"}
TYPES = {"train": "train", "evaluate": "evaluate"} | {k: f"query.{k}" for k in ("open", "close", "sign", "deliver")}
PUBLIC = {"kind": "public"}
PRIVATE = {"kind": "private", "noise_multiplier": 8.0}


class Desk:
    """The coordinator's end of the wire to one node."""

    def __init__(self, site: Site, signed: SignedCharter) -> None:
        self.site, self.signed = site, signed
        self.wire = SignedWire(identity("coordinator"), {"ada": identity("ada").key}, signed.sha256)
        self.restart()

    def restart(self) -> None:
        self.node: Node = self.site.node(self.signed)

    def message(self, ask: Manifest, tensors: Any = None, wire: SignedWire | None = None) -> Message:
        wire = wire or self.wire
        records = wire.encode(ask, wire.pack(tensors or {}))[0]
        return addressed(records, TYPES.get(ask.kind, "train"), 1, "g", 60.0, "m1")

    def send(self, kind: str, number: int, tensors: Any = None, **changes: Any) -> tuple[Manifest, Any, RecordDict]:
        ask = request(self.signed, kind, number, **changes)
        answer = self.node.handle(kind, self.message(ask, tensors))
        reply, got, _ = self.wire.decode(answer.content, "ada")
        assert reply.kind in MAY_LEAVE
        assert reply.in_reply_to == self.wire.encode(ask, self.wire.pack(tensors or {}))[1]
        return reply, got, answer.content

    def open(self) -> None:
        assert self.send("open", 0)[0].kind == "accepted"

    def open_another(self) -> None:
        """Whatever comes of it, the ledger grows."""
        assert self.send("open", 0, run="run-2")[0].kind in ("accepted", "refused")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site("ada", tmp_path, Source())
    yield made
    if made.ledger is not None:
        made.ledger.close()


# -- order -----------------------------------------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch, site: Site) -> list[str]:
    """What happens, in order: every fsync by the file it is on, entries when `append` returns, reads of the data."""
    log: list[str] = []
    sync, append, put = os.fsync, Ledger.append, Outbox.put

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        sync(handle)
        if path.endswith("ledger.jsonl"):
            log.append("fsync ledger")
        elif "/outbox/" in path and not os.path.isdir(path):
            log.append("fsync reply")

    def appended(self: Ledger, kind: str, body: Any, **more: Any) -> Any:
        entry = append(self, kind, body, **more)
        log.append(f"entry {kind}")
        return entry

    def stored(self: Outbox, *args: Any) -> None:
        put(self, *args)
        log.append("stored")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Ledger, "append", appended)
    monkeypatch.setattr(Outbox, "put", stored)
    monkeypatch.setattr(identity_module.os, "fsync", fsync)
    site.source.hook = lambda: log.append("data read")
    return log


def test_training_spends_before_it_reads_and_records_before_it_answers(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(site, charter())
    desk.open()
    log = recorded(monkeypatch, site)
    reply, update, _ = desk.send("train", 1, weights())
    assert reply.kind == "update"
    assert log == [
        "fsync ledger",
        "entry debit",
        "data read",
        "fsync reply",
        "stored",
        "fsync ledger",
        "entry commit",
    ]
    assert {k: v.shape for k, v in update.items()} == {"weight": (2, 3), "bias": (2,)}


@pytest.mark.parametrize(("evaluation", "first", "last"), [(PUBLIC, [], "public"), (PRIVATE, ["debit"], "commit")])
def test_evaluation_records_before_it_answers(
    site: Site, monkeypatch: pytest.MonkeyPatch, evaluation: Any, first: list[str], last: str
) -> None:
    desk = Desk(site, charter(evaluation=evaluation))
    desk.open()
    log = recorded(monkeypatch, site)
    desk.send("evaluate", 1, weights())
    debit = ["fsync ledger", "entry debit"] if first else []
    assert log == [*debit, "data read", "fsync reply", "stored", "fsync ledger", f"entry {last}"]


def test_opening_and_closing_read_nothing(site: Site) -> None:
    desk = Desk(site, charter())
    site.source.hook = forbidden
    desk.open()
    reply = desk.send("close", 4)[0]
    assert site.ledger is not None
    assert reply.fields == {"length": site.ledger.length, "root": site.ledger.root}
    heads = dict.fromkeys(desk.signed.charter.keys(), reply.fields)
    payload = closing_payload("run-1", desk.signed.sha256, None, heads)
    reply = desk.send("sign", 4, fields={"closing": base64.b64encode(payload).decode()})[0]
    verify(identity("ada").key, CLOSING_TYPE, payload, base64.b64decode(reply.fields["signature"]))


# -- heads -----------------------------------------------------------------------------------------------------------


def others_head(name: str, folder: Path, entries: int = 3) -> tuple[Head, Ledger]:
    ledger = Ledger(folder / f"{name}.jsonl", identity(name), {"owner": name, "ledger_id": f"{name}'s"})
    for number in range(entries):
        ledger.append("debit", {"n": number})
    return sign_head(identity(name), ledger), ledger


def test_a_reply_tells_the_ledgers_head_and_signs_what_it_was_asked_to(site: Site, tmp_path: Path) -> None:
    desk = Desk(site, charter())
    keys = desk.signed.charter.keys()
    desk.open()
    assert site.ledger is not None
    first = sign_head(identity("ada"), site.ledger)
    bens, ledger = others_head("ben", tmp_path)
    fields = {"witness": asking(first, [first.length], [(bens, [])])}
    reply = desk.send("train", 1, weights(), fields=fields)[0]
    assert site.heads is not None
    assert site.kinds()[-2:] == ["debit", "commit"]
    head, proofs = told(reply.fields["head"], keys, "ada")
    assert head.length == site.ledger.length - 1, "with the debit; the commit states this very reply"
    assert site.ledger.states(head.length, head.root)
    head.extends(first, proofs[first.length])
    signed = with_signatures(reply.fields["witnessed"], {"ben": bens}, identity("ada").key)
    assert site.heads.newest("ben") == signed["ben"], "on disk before it left"
    assert signed["ben"].sealed in (site.folder / "heads.jsonl").read_bytes().splitlines()
    # The same ledger cut and written anew: kept as evidence, and not signed.
    ledger.close()
    path = tmp_path / "ben.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    forked = Ledger(path, identity("ben"), {})
    for number in range(9):
        forked.append("debit", {"other": number})
    fork = sign_head(identity("ben"), forked)
    fields = {"witness": asking(None, [], [(fork, forked.consistency(2))])}
    reply = desk.send("train", 2, weights(), fields=fields)[0]
    assert (reply.kind, reply.fields["witnessed"]) == ("update", {})
    assert reply.fields["stands"] == {"ben": bens.length}
    assert fork.sealed in (site.folder / "heads.jsonl").read_bytes().splitlines()


def test_a_ledger_put_back_to_an_older_copy_is_refused_before_anything_is_spent(site: Site) -> None:
    desk = Desk(site, charter())
    desk.open()
    old, counted = (site.folder / "ledger.jsonl").read_bytes(), (site.folder / "counter").read_bytes()
    reply = desk.send("train", 1, weights(), fields={"witness": asking(None, [], [])})[0]
    signed, _ = told(reply.fields["head"], desk.signed.charter.keys(), "ada")
    assert site.ledger is not None
    site.ledger.close()
    # The whole disk, so that nothing at the node itself can know.
    (site.folder / "ledger.jsonl").write_bytes(old)
    (site.folder / "counter").write_bytes(counted)
    shutil.rmtree(site.folder / "outbox")
    desk.restart()
    site.source.hook = forbidden
    reply = desk.send("train", 1, weights(), fields={"witness": asking(signed, [], [])})[0]
    assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.ROLLED_BACK.value)
    assert site.kinds()[-1] == "refuse"
    # And nobody else either, until it is proved what is missing.
    for _ in range(2):
        reply = desk.send("train", 1, weights(), fields={"witness": asking(None, [], [])}, request_id="another")[0]
        assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.RESTORED.value)
        desk.restart()


@pytest.mark.parametrize("witness", [[], {}, {"yours": "x", "since": [], "heads": []}], ids=str)
def test_malformed_heads_spend_nothing(site: Site, witness: Any) -> None:
    desk = Desk(site, charter())
    desk.open()
    before = site.kinds()
    with pytest.raises(MessageError):
        desk.send("train", 1, weights(), fields={"witness": witness})
    assert site.kinds() == before


# -- again -----------------------------------------------------------------------------------------------------------


def test_a_committed_request_is_answered_from_the_outbox(site: Site) -> None:
    desk = Desk(site, charter())
    desk.open()
    first = to_bytes(desk.send("train", 1, weights())[2])
    reads = site.source.reads
    for _ in range(2):
        assert to_bytes(desk.send("train", 1, weights())[2]) == first, "fresh noise under an old debit"
        desk.restart()
        reads += 1  # registering reads
    assert site.source.reads == reads
    assert site.kinds().count("debit") == site.kinds().count("commit") == 1


@pytest.mark.parametrize("where", ["read", "put", "commit"])
def test_a_crash_after_the_debit_is_run_again_with_fresh_noise(
    site: Site, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    desk = Desk(site, charter())
    desk.open()

    class Died(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        if where == "read":
            site.source.hook = die
        else:
            patch.setattr(*((Outbox, "put", die) if where == "put" else (type(desk.node._gate), "commit", die)))
        with pytest.raises(Died):
            desk.send("train", 1, weights())
    site.source.hook = lambda: None
    stored = [p.read_bytes() for p in (site.folder / "outbox").rglob("*") if p.is_file()]
    assert len(stored) == (where == "commit")
    desk.restart()
    _, _, again = desk.send("train", 1, weights())
    assert to_bytes(again) not in stored, "the same noise twice"
    assert site.kinds().count("debit") == site.kinds().count("commit") == 1


@pytest.mark.parametrize("error", [ValueError("canary-4711-canary"), RuntimeError("canary-4711-canary")])
def test_work_that_fails_is_answered_once_and_for_all(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """It saw data: another attempt would be a second release under one debit, and its words may tell of a record."""
    from hansa.clients import app

    desk = Desk(site, charter())
    desk.open()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(app, "train_locally", fail)
        reply, tensors, records = desk.send("train", 1, weights())
    assert (reply.kind, tensors, set(reply.fields)) == ("failed", {}, {"head", "witnessed", "stands"})
    assert b"canary-4711-canary" not in unwrapped(to_bytes(records))
    assert "canary-4711-canary" not in caplog.text
    assert f"round 1 failed: {type(error).__name__} at clients/test_app.py:" in caplog.text
    for _ in range(2):
        assert to_bytes(desk.send("train", 1, weights())[2]) == to_bytes(records)
        desk.restart()
    assert site.kinds().count("debit") == site.kinds().count("commit") == 1


def test_after_the_close_nothing_is_answered_again(site: Site) -> None:
    desk = Desk(site, charter())
    desk.open()
    desk.send("train", 1, weights())
    desk.send("close", 4)
    with pytest.raises(MessageError, match="no longer in the outbox"):
        desk.send("train", 1, weights())
    assert desk.send("train", 2, weights())[0].fields["reason"] == Refusal.NOT_HELD.value


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(desk: Desk, kind: str, number: int, tensors: Any, reason: Refusal, **changes: Any) -> Manifest:
    """The signed refusal to a request that reads nothing and spends nothing."""
    before = desk.site.kinds()
    desk.site.source.hook = forbidden
    reply, got, _ = desk.send(kind, number, tensors, **changes)
    assert (reply.kind, reply.fields["reason"], got) == ("refused", reason.value, {})
    assert set(reply.fields) == {"reason", "detail"}
    assert desk.site.kinds() == [*before, "refuse"]
    return reply


BAD_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("missing", {"weight": weights()["weight"]}),
    ("extra", {**weights(), "more": np.zeros(1, np.float32)}),
    ("renamed", {"w": weights()["weight"], "bias": weights()["bias"]}),
    ("shape", {**weights(), "bias": np.zeros(3, np.float32)}),
    ("transposed", {**weights(), "weight": np.zeros((3, 2), np.float32)}),
    ("float64", {**weights(), "bias": np.zeros(2, np.float64)}),
    ("integer", {**weights(), "bias": np.zeros(2, np.int64)}),
    ("nan", {**weights(), "bias": np.array([0, np.nan], np.float32)}),
    ("inf", {**weights(), "bias": np.array([np.inf, 0], np.float32)}),
    ("minus inf", {**weights(), "bias": np.array([-np.inf, 0], np.float32)}),
]


@pytest.mark.parametrize("model", [m for _, m in BAD_MODELS], ids=[n for n, _ in BAD_MODELS])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_malformed_model_is_refused_before_anything_is_spent(site: Site, kind: str, model: Any) -> None:
    desk = Desk(site, charter(evaluation=PRIVATE))
    desk.open()
    refusal(desk, kind, 1, model, Refusal.NUMERIC)


def test_refusals_of_the_gate_are_signed_and_recorded(site: Site) -> None:
    desk = Desk(site, charter())
    refusal(desk, "train", 1, weights(), Refusal.NOT_HELD)
    desk.open()
    refusal(desk, "train", 9, weights(), Refusal.ROUND)
    refusal(desk, "evaluate", 1, weights(), Refusal.NOT_HELD)
    assert site.ledger is not None
    bodies = [e.body for e in site.ledger.of("refuse")]
    assert [b["round"] for b in bodies] == [1, 9, 1]


@pytest.mark.parametrize(
    "error",
    [DataError("secret canary-4711-canary"), SchemaViolation("f.csv", [(7, "age", "canary-4711-canary", "0 to 9")])],
)
def test_data_that_cannot_be_read_is_refused_without_its_words(
    site: Site, caplog: pytest.LogCaptureFixture, error: DataError
) -> None:
    desk = Desk(site, charter())
    desk.open()

    def broken() -> None:
        raise error

    site.source.hook = broken
    with caplog.at_level(logging.ERROR, "hansa.node"):
        reply, _, records = desk.send("train", 1, weights())
    assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.DATA.value)
    kept = b"".join(unwrapped(p.read_bytes()) for p in site.folder.rglob("*") if p.is_file())
    for written in (unwrapped(to_bytes(records)), kept):
        assert Refusal.DATA.value.encode() in written, "the search looks into envelopes"
        assert b"canary-4711-canary" not in written
    assert "canary-4711-canary" not in caplog.text, "logs are shipped and kept: no record value in them either"
    assert f"ada: the registered dataset cannot be read: {type(error).__name__} at clients/test_app.py:" in caplog.text
    site.source.hook = lambda: None
    assert desk.send("train", 1, weights())[0].kind == "update", "mended, the same debit pays"
    assert site.kinds().count("debit") == 1


# -- requests that are not the coordinator's -------------------------------------------------------------------------


def nothing_happens(desk: Desk, kind: str, message: Message, words: str) -> None:
    before = desk.site.kinds()
    desk.site.source.hook = forbidden
    with pytest.raises(MessageError, match=words):
        desk.node.handle(kind, message)
    assert desk.site.kinds() == before


def test_strangers_and_partners_cannot_ask(site: Site) -> None:
    desk = Desk(site, charter())
    for who in ("ben", "eve", "ada"):
        wire = SignedWire(identity(who), {}, desk.signed.sha256)
        for sender in (who, "coordinator"):
            ask = request(desk.signed, "open", 0, sender=sender)
            nothing_happens(desk, "open", desk.message(ask, wire=wire), "not signed by|delivered as")
    nothing_happens(desk, "open", desk.message(request(desk.signed, "open", 0, to="ben")), "for ben")
    other = request(desk.signed, "open", 0, charter_sha256="e" * 64)
    nothing_happens(desk, "open", desk.message(other), "under another charter")


@pytest.mark.parametrize("said", list(TYPES))
@pytest.mark.parametrize("delivered", list(TYPES))
def test_a_relay_cannot_turn_one_request_into_another(site: Site, said: str, delivered: str) -> None:
    """The kind is signed; the type that a Grid routes by is not."""
    if said != delivered:
        desk = Desk(site, charter(evaluation=PRIVATE))
        desk.open()
        message = desk.message(request(desk.signed, said, 1), weights())
        nothing_happens(desk, delivered, message, f"a request to {said}, delivered as one to {delivered}")


def test_malformed_closings_are_not_signed(site: Site) -> None:
    desk = Desk(site, charter())
    desk.open()
    desk.send("close", 4)
    for closing in ("not base64!", "", base64.b64encode(b"{}").decode(), base64.b64encode(b"[" * 99).decode()):
        ask = request(desk.signed, "sign", 4, fields={"closing": closing})
        nothing_happens(desk, "sign", desk.message(ask), "closing checkpoint|JSON")
    assert site.ledger is not None
    head = {"length": 1, "root": site.ledger.root}
    wrong = closing_payload("run-1", desk.signed.sha256, None, dict.fromkeys(desk.signed.charter.keys(), head))
    ask = request(desk.signed, "sign", 4, fields={"closing": base64.b64encode(wrong).decode()})
    nothing_happens(desk, "sign", desk.message(ask), "does not state this ledger")


@pytest.mark.parametrize("error", [OutputError("the disk is full"), LedgerError("locked")])
def test_a_node_that_cannot_record_does_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: OutputError
) -> None:
    desk = Desk(site, charter())
    desk.open()
    site.source.hook = forbidden

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(type(error)):
        desk.send("train", 1, weights())


# -- what leaves -----------------------------------------------------------------------------------------------------


def test_scores_of_public_rows(site: Site) -> None:
    desk = Desk(site, charter(evaluation=PUBLIC))
    desk.open()
    reply, got, _ = desk.send("evaluate", 1, weights())
    assert reply.kind == "scores"
    np.testing.assert_array_equal(got["scores"], np.full((8, 2), 0.5, np.float32))
    np.testing.assert_array_equal(got["labels"], site.source.split.held_out.y.numpy())


def test_a_private_histogram_is_noisy(site: Site) -> None:
    desk = Desk(site, charter(evaluation={**PRIVATE, "bins": 10}))
    desk.open()
    reply, got, _ = desk.send("evaluate", 1, weights())
    assert reply.kind == "histogram"
    assert (got["histogram"].shape, set(got)) == ((2, 10), {"histogram"})
    # Eight rows and σ = 8 on each of 20 cells: without noise the values were whole numbers.
    assert not np.any(got["histogram"] == np.round(got["histogram"]))
    assert np.abs(got["histogram"]).max() < 8 * 8


def test_unprotected_rounds_repeat_and_protected_ones_do_not(site: Site, tmp_path: Path) -> None:
    site.allow_unprotected = True
    updates = []
    for number, privacy in enumerate((NO_PRIVACY, NO_PRIVACY, None, None)):
        again = Site("ada", tmp_path / str(number), Source(), allow_unprotected=True)
        desk = Desk(again, charter(**({"privacy": privacy} if privacy else {})))
        desk.open()
        updates.append(desk.send("train", 1, weights())[1]["weight"].tobytes())
    assert updates[0] == updates[1]
    assert len(set(updates)) == 3


def test_seeds_of_rounds_differ() -> None:
    seeds = {round_seed(s, r, n) for s in (0, 1) for r in (1, 2) for n in ("ada", "ben")}
    assert len(seeds) == 8
    assert all(0 <= s < 2**63 for s in seeds)


def test_local_settings_are_the_charters() -> None:
    made = local_settings(charter(algorithm__strategy={"name": "fedprox", "proximal_mu": 0.1}).charter)
    assert (made.steps, made.lr, made.proximal_mu, made.clip_norm, made.noise_multiplier) == (1, 0.5, 0.1, 1.0, 4.0)


def test_the_client_app_routes_by_type(site: Site) -> None:
    desk = Desk(site, charter(evaluation=PUBLIC))
    app = make_client_app(lambda _: desk.node)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    closing = {"closing": ""}
    for kind, number, tensors in (
        ("open", 0, {}),
        ("train", 1, weights()),
        ("evaluate", 1, weights()),
        ("close", 4, {}),
    ):
        answer = app(desk.message(request(desk.signed, kind, number), tensors), context)
        assert desk.wire.decode(answer.content, "ada")[0].kind in MAY_LEAVE
    with pytest.raises(MessageError):
        app(desk.message(request(desk.signed, "sign", 4, fields=closing)), context)


def test_the_key_never_leaves(site: Site) -> None:
    desk = Desk(site, charter(evaluation=PUBLIC))
    desk.open()
    key: Identity = identity("ada")
    sent = b"".join(to_bytes(desk.send(k, 1, weights())[2]) for k in ("train", "evaluate"))
    raw = key._private.private_bytes_raw()
    for form in (raw, raw.hex().encode(), base64.b64encode(raw)[:40]):
        assert form not in unwrapped(sent)


# -- the closing message -----------------------------------------------------------------------------------------------


def sealed(signed: SignedCharter, payload: bytes, by: tuple[str, ...] = ("ada", "ben", "cy", "coordinator")) -> bytes:
    made = tuple((identity(n).key, identity(n).sign(CLOSING_TYPE, payload)) for n in by)
    return write_envelope(Envelope(CLOSING_TYPE, payload, made)) + b"\n"


@dataclass
class Ending:
    """A closing message as it should be; each field can be made another."""

    desk: Desk
    run: str = "run-1"
    charter: str = ""
    named: str | None = ""
    head: Any = None
    owners: tuple[str, ...] = ("ada", "ben", "cy", "coordinator")
    by: tuple[str, ...] = ("ada", "ben", "cy", "coordinator")
    rounds: int = 3
    model: Any = field(default_factory=lambda: weights(0.5))
    about: Any = "as it should be"
    closing: Any = None

    def fields(self) -> dict[str, Any]:
        signed = self.desk.signed
        named = model_sha256(self.model) if self.named == "" else self.named
        heads = {owner: {"length": 1, "root": "a" * 64} for owner in self.owners}
        if "ada" in heads:
            heads["ada"] = self.head or self.stands()
        payload = closing_payload(self.run, self.charter or signed.sha256, named, heads)
        closing = sealed(signed, payload, self.by) if self.closing is None else self.closing
        about = self.about
        if about == "as it should be":
            about = model_manifest(signed.charter, signed.sha256, "run-1", str(named), self.rounds, {"auc": "0.75"})
        made = {"closing": closing if isinstance(closing, str) else base64.b64encode(closing).decode()}
        return made if about is None else {**made, "about": about}

    def stands(self) -> dict[str, Any]:
        ledger = self.desk.site.ledger
        assert ledger is not None
        return ledger.head()

    def send(self) -> Manifest:
        return self.desk.send("deliver", 4, self.model, fields=self.fields())[0]


@pytest.fixture
def closed(site: Site) -> Desk:
    desk = Desk(site, charter())
    desk.open()
    desk.send("train", 1, weights())
    desk.send("close", 4)
    return desk


def test_what_a_run_came_to_is_kept(closed: Desk) -> None:
    ending = Ending(closed)
    before = closed.site.kinds()
    closed.site.source.hook = forbidden
    for _ in range(2):  # again is fine
        reply = ending.send()
        assert (reply.kind, dict(reply.fields)) == ("kept", {})
    folder = closed.site.folder / "models" / "run-1"
    assert sorted(os.listdir(folder)) == ["closing.json", "model.json", "model.safetensors"]
    same_arrays(load((folder / "model.safetensors").read_bytes()), ending.model)
    fields = ending.fields()
    assert (folder / "closing.json").read_bytes() == base64.b64decode(fields["closing"])
    assert json.loads((folder / "model.json").read_bytes()) == fields["about"]
    assert closed.site.kinds() == before, "the ledger was closed before"


def test_it_is_on_disk_before_the_reply(closed: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def fsync(handle: int) -> None:
        sync(handle)
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    Ending(closed).send()
    files = [name.removeprefix(".hansa-tmp-").rpartition(".")[0] for name in synced if name.startswith(".hansa-tmp-")]
    assert files == ["closing.json", "model.safetensors", "model.json"], "whose folder it is first, the manifest last"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        Ending(closed).send()


def test_a_refused_run_leaves_its_closing_checkpoint(site: Site) -> None:
    desk = Desk(site, charter())
    assert Ending(desk, named=None, model={}, about=None).send().kind == "kept"
    assert os.listdir(site.folder / "models" / "run-1") == ["closing.json"]


def test_a_ledger_that_went_on_is_the_one_that_was_closed(closed: Desk) -> None:
    stood = Ending(closed).stands()
    closed.open_another()
    assert Ending(closed).stands() != stood
    assert Ending(closed, head=stood).send().kind == "kept"


STRANGE: dict[str, dict[str, Any]] = {
    "not base64": {"closing": "not base64!"},
    "no closing": {"closing": ""},
    "not an envelope": {"closing": b"{}"},
    "one signature missing": {"by": ("ada", "ben", "coordinator")},
    "without the coordinator": {"by": ("ada", "ben", "cy")},
    "a stranger's instead": {"by": ("ada", "ben", "eve", "coordinator")},
    "a stranger's as well": {"by": ("ada", "ben", "cy", "coordinator", "eve")},
    "one signature twice": {"by": ("ada", "ben", "cy", "coordinator", "cy")},
    "another run": {"run": "run-0"},
    "another charter": {"charter": "e" * 64},
    "a ledger missing": {"owners": ("ada", "ben", "coordinator")},
    "my ledger missing": {"owners": ("ben", "cy", "coordinator")},
    "a ledger too many": {"owners": ("ada", "ben", "cy", "coordinator", "eve")},
    "another head of mine": {"head": {"length": 2, "root": "b" * 64}},
    "longer than mine": {"head": {"length": 10**6, "root": "b" * 64}},
    "no length": {"head": {"length": 0, "root": "LAST"}},
    "a negative length": {"head": {"length": -1, "root": "BEFORE"}},
    "a true length": {"head": {"length": True, "root": "FIRST"}},
    "a length in words": {"head": {"length": "2", "root": "b" * 64}},
    "another model": {"named": "b" * 64},
    "a model of a refused run": {"named": None},
    "words about a refused run's model": {"named": None, "model": {}},
    "no model": {"model": {}, "named": "b" * 64},
    "a nan": {"model": {**weights(), "bias": np.array([np.nan, 0], np.float32)}},
    "another shape": {"model": {**weights(), "bias": np.zeros(3, np.float32)}},
    "a tensor more": {"model": {**weights(), "more": np.zeros(3, np.float32)}},
    "float64": {"model": {**weights(), "bias": np.zeros(2)}},
    "no manifest": {"about": None},
    "another manifest": {"about": {"task": "tiny"}},
    "too many rounds": {"rounds": 4},
}


@pytest.mark.parametrize("how", list(STRANGE))
def test_what_is_not_what_was_signed_is_not_kept(closed: Desk, how: str) -> None:
    assert closed.site.ledger is not None
    entries = closed.site.ledger.entries
    ends = {"FIRST": entries[0].root, "BEFORE": entries[-2].root, "LAST": entries[-1].root}
    changes = dict(STRANGE[how])
    if "head" in changes:
        changes["head"] = {**changes["head"], "root": ends.get(changes["head"]["root"], changes["head"]["root"])}
    ending = Ending(closed, **changes)
    message = closed.message(request(closed.signed, "deliver", 4, fields=ending.fields()), ending.model)
    nothing_happens(closed, "deliver", message, "closing|envelope|JSON|signed|model|manifest|public key")
    assert not (closed.site.folder / "models").exists()


def test_a_node_that_keeps_nothing_says_so(closed: Desk) -> None:
    closed.node._keep = None
    ending = Ending(closed)
    message = closed.message(request(closed.signed, "deliver", 4, fields=ending.fields()), ending.model)
    nothing_happens(closed, "deliver", message, "keeps no models")
