"""Attacks on a federation, each refused with its reason, logged by who refuses, and paid for by nobody.

Real gRPC on loopback, real certificates, nodes as `hansa node run` makes them (tests/attack_support.py). After each attack an
honest run of everybody must go through: the fixture sees to it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attack_support import (
    NAMES,
    PAYLOADS,
    ROUNDS,
    Touch,
    Town,
    edited,
    enveloped,
    flipped,
    linked,
    payload_of,
    resealed,
    with_arrays,
    with_sealed,
)
from hansa.clients import app as app_module
from hansa.clients import link as node_link
from hansa.clients.app import local_settings
from hansa.clients.datasets import RegisteredDataset
from hansa.clients.models import load_kept, predict
from hansa.clients.node import assemble
from hansa.common.charter import SignedCharter
from hansa.common.errors import CharterError, MessageError, Refusal, TaskError
from hansa.common.flower import (
    Array,
    ArrayRecord,
    Message,
    RecordDict,
)
from hansa.common.identity import Identity, canonical, read_envelope, sha256
from hansa.common.ledger import read_ledger
from hansa.common.messages import MESSAGE_TYPE, SignedWire, from_bytes, to_bytes
from hansa.common.plan import event_fields, plan_of
from hansa.server.link import State
from hansa.server.service import Service
from link_support import until


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_link, "LONGEST_PAUSE_S", 0.3)
        made = Town(tmp_path_factory.mktemp("town"))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def town(standing: Town) -> Iterator[Town]:
    """Everybody is up and honest at first; after the attack an honest run of everybody goes through."""
    standing.begin()
    yield standing
    standing.twists.clear()
    standing.goes_on()


# -- certificates ----------------------------------------------------------------------------------------------------

ENDORSED = [
    (False, "a valid certificate in {}'s name, but its TLS key is not endorsed by {}'s identity key"),
    (True, "the certificate of {} carries an endorsement for another TLS key"),
]


@pytest.mark.parametrize(("stolen", "words"), ENDORSED, ids=["own endorsement", "stolen endorsement"])
def test_a_certificate_in_a_partners_name_with_another_key(town: Town, stolen: bool, words: str) -> None:
    """By whoever runs the CA. The coordinator's server refuses it; the real node stays where it is."""
    words, theirs = words.format("ada", "ada"), io.StringIO()
    thief = town.link_to(town.grid.port, theirs)
    thief._home = town.thief("ada", stolen)
    before = town.grid.connected()["ada"]
    with town.nothing_recorded(), linked(thief):
        town.logged("coordinator", words, "refused")
        until(lambda: f"PERMISSION_DENIED: {words}" in theirs.getvalue())
        assert town.grid.connected()["ada"] == before
    assert '"connected"' not in theirs.getvalue()
    assert not town.said("ada", "disconnected")


@pytest.mark.parametrize(("stolen", "words"), ENDORSED, ids=["own endorsement", "stolen endorsement"])
def test_a_certificate_in_the_coordinators_name_with_another_key(town: Town, stolen: bool, words: str) -> None:
    """By whoever runs the CA. The node refuses the server before it says who it is; the server sees it hang up."""
    theirs, mine = io.StringIO(), io.StringIO()
    grid = town.impostor(town.thief("coordinator", stolen), theirs)
    grid.start()
    try:
        with town.nothing_recorded(), linked(town.link_to(grid.port, mine)):
            until(lambda: words.format("coordinator", "coordinator") in mine.getvalue())
    finally:
        grid.stop()
    assert {json.loads(line)["event"] for line in mine.getvalue().splitlines()} == {"disconnected"}
    assert '"connected"' not in theirs.getvalue()
    assert "ada" not in theirs.getvalue()


def test_a_server_that_steps_in_behind_the_first_look(town: Town) -> None:
    """Somebody between lets the node look at the real certificate and then answers himself: he has no key for it."""
    theirs, mine = io.StringIO(), io.StringIO()
    grid = town.impostor(town.thief("coordinator", stolen=True), theirs)
    grid.start()
    listener = socket.create_server(("127.0.0.1", 0))
    targets: list[int] = []

    def pump(a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            targets.append(grid.port if targets else town.grid.port)
            far = socket.create_connection(("127.0.0.1", targets[-1]))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        with town.nothing_recorded(), linked(town.link_to(listener.getsockname()[1], mine)):
            until(lambda: '"disconnected"' in mine.getvalue(), 15)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        grid.stop()
    assert targets[:2] == [town.grid.port, grid.port]
    first = json.loads(mine.getvalue().splitlines()[0])
    assert (first["event"], first["reason"].partition(":")[0]) == ("disconnected", "UNAVAILABLE")
    assert '"connected"' not in mine.getvalue() + theirs.getvalue()


# -- replayed requests -----------------------------------------------------------------------------------------------


def test_a_committed_request_sent_again(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as the first time, from the outbox: no second debit, no second look at the data."""
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    first = to_bytes(town.push(records).content)
    until(lambda: town.said("ada", "sent"))  # the line comes after the bytes
    town.mark()
    reads: list[int] = []
    opened = RegisteredDataset.open
    monkeypatch.setattr(RegisteredDataset, "open", lambda self: reads.append(1) or opened(self))
    with town.nothing_recorded():
        assert to_bytes(town.push(records).content) == first
    assert reads == []
    assert town.kinds("ada", run) == ["hold", "debit", "commit"]
    until(lambda: town.said("ada", "sent"))
    assert [e["event"] for e in town.said("ada")] == ["request", "sent"], "nothing was entered"


def test_a_request_replayed_after_its_run(town: Town) -> None:
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    assert town.push(records).has_content()
    for name in NAMES:
        town.send(town.ask("close", ROUNDS + 1, run, name))
    with town.nothing_recorded():
        words = f"the reply to {run}.1.train.ada is no longer in the outbox"
        assert town.refused(town.push(records)) == f"request refused: {words}"
    town.logged("ada", words, "refused")


def test_a_request_replayed_elsewhere(town: Town) -> None:
    """To another partner, as another kind, under another charter: what a relay or a coordinator has of old signed bytes."""
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    assert town.push(records).has_content()
    other = town.charter(name="other")
    theirs = SignedWire(town.boss, {n: town.keys.home(n).key() for n in NAMES}, other.sha256)
    foreign = theirs.encode(town.ask("train", 1, run, charter_sha256=other.sha256), theirs.pack(town.model))[0]
    cases: list[tuple[str, str, RecordDict, str]] = [
        ("ben", "train", records, "a message from coordinator for ada, delivered as coordinator's"),
        ("ada", "close", records, "a request to train, delivered as one to close"),
        ("ada", "train", foreign, "a message from coordinator under another charter"),
    ]
    for to, kind, sent, words in cases:
        with town.nothing_recorded():
            assert town.refused(town.push(sent, kind, to)) == f"request refused: {words}"
        town.logged(to, words, "refused")


def test_a_round_asked_for_twice(town: Town) -> None:
    """A coordinator that signs a second request for a round: the answer to the first was its only release."""
    run = town.fresh()
    town.open(run)
    town.send(town.ask("train", 1, run), town.model)
    with town.nothing_spent():
        reply, _ = town.send(town.ask("train", 1, run, request_id="again"), town.model)
        assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.ROUND.value)
        reply, _ = town.send(town.ask("open", 0, run, request_id="again-open"))
        assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.REPLAY.value)
        reply, _ = town.send(town.ask("train", 1, town.fresh()), town.model)
        assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.NOT_HELD.value)
    for reason in (Refusal.ROUND, Refusal.REPLAY, Refusal.NOT_HELD):
        town.logged("ada", reason.value, "refuse")


@pytest.mark.parametrize("kind", ["train", "open"])
def test_the_same_request_id_with_another_content(town: Town, kind: str) -> None:
    run = town.fresh()
    town.open(run)
    number, tensors = (1, town.model) if kind == "train" else (0, {})
    ask = town.ask(kind, number, run)
    _, first = town.send(ask, tensors)
    stored = to_bytes(first)
    other = {name: value + 1 for name, value in tensors.items()}
    with town.nothing_spent():
        for changed in (town.ask(kind, number, run, fields={"more": "1"}), ask):
            if (changed, other) == (ask, {}):
                continue  # an open has no tensors to change
            reply, _ = town.send(changed, other)
            assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.REPLAY.value)
            assert town.logged("ada", Refusal.REPLAY.value, "refuse")["request"] == ask.request_id
        assert to_bytes(town.send(ask, tensors)[1]) == stored, "the request that was taken is still answered"
    assert town.kinds("ada", run).count("debit") == (kind == "train")


# -- forged and edited requests --------------------------------------------------------------------------------------


def test_requests_that_the_charters_coordinator_did_not_sign(town: Town) -> None:
    """The TLS certificate is right, the signature is a stranger's, a partner's, or only says that it is the coordinator's."""
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    payload = payload_of(records)
    stranger, ben = Identity.generate("coordinator"), town.keys.home("ben").identity()
    made = stranger.sign(MESSAGE_TYPE, payload)
    both = ((town.boss.key, town.boss.sign(MESSAGE_TYPE, payload)), (stranger.key, made))
    cases = [
        (resealed(records, stranger, payload), "not signed by"),
        (resealed(records, ben, payload), "not signed by"),
        (with_sealed(records, enveloped(payload, [(town.boss.key, made)])), "bad signature by"),
        (with_sealed(records, enveloped(payload, both)), "a message has exactly one signature"),
        (with_sealed(records, enveloped(payload, ())), "a message has exactly one signature"),
    ]
    for sent, words in cases:
        town.mark()
        with town.nothing_recorded():
            assert town.refused(town.push(sent)).startswith(f"request refused: {words}")
        town.logged("ada", words, "refused")


EDITS: dict[str, dict[str, Any]] = {
    "hyper-parameters": {"fields": {"noise_multiplier": "0", "lr": "1000"}},
    "run": {"run_id": "another"},
    "round": {"round": 2},
    "request": {"request_id": "another"},
    "kind": {"kind": "close"},
    "recipient": {"recipient": "ben"},
    "charter": {"charter_sha256": "e" * 64},
    "tensors": {"tensors": []},
}


def test_a_request_that_was_edited_after_signing(town: Town) -> None:
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    for changes in EDITS.values():
        town.mark()
        with town.nothing_recorded():
            assert town.refused(town.push(edited(records, **changes))).startswith("request refused: bad signature by")
        town.logged("ada", "bad signature by", "refused")
    assert town.push(records).has_content()  # as it was signed it is good


def test_hyper_parameters_in_a_request_are_nobodys_business(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed by the coordinator, who alone may not change what all agreed to: the node trains and pays by the charter."""
    agreed, seen = town.signed.charter, []
    real = app_module.train_locally

    def spy(*args: Any, **more: Any) -> Any:
        seen.append(args[4])
        return real(*args, **more)

    monkeypatch.setattr(app_module, "train_locally", spy)
    run = town.fresh()
    town.open(run)
    fields = {"noise_multiplier": "0", "clip_norm": "1e9", "lr": "1000", "steps": 1000}
    assert town.send(town.ask("train", 1, run, fields=fields), town.model)[0].kind == "update"
    assert seen == [local_settings(agreed)]
    debit = town.ledger("ada")[-2].body
    (item,) = plan_of(agreed)
    assert (debit["event"], float(debit["clip_norm"])) == (event_fields(item.event), agreed.privacy.clip_norm)


@pytest.mark.parametrize("which", [0, 1])
def test_one_bit_of_the_model_on_its_way_to_a_node(town: Town, which: int) -> None:
    run = town.fresh()
    town.open(run)
    records = town.records(town.ask("train", 1, run), town.model)
    words = f"array {which} is not the one that the manifest names"
    for bit in (0, 31):
        town.mark()
        with town.nothing_recorded():
            assert town.refused(town.push(flipped(records, which, bit))) == f"request refused: {words}"
        town.logged("ada", words, "refused")
    with town.nothing_recorded():
        fewer = with_arrays(records, dict(list(records["chunks"].items())[:1]))
        words = "a message with other chunks than its manifest names"
        assert town.refused(town.push(fewer)) == f"request refused: {words}"
    town.logged("ada", words, "refused")
    assert town.push(records).has_content()


# -- forged and edited answers ---------------------------------------------------------------------------------------


def invalid(town: Town, run: str, number: int, words: str) -> None:
    """An honest coordinator's run in which ada's answer to a round did not count: logged, written down, not folded."""
    line = town.logged("coordinator", words, "answer", run=run, round=number, partner="ada", kind="train")
    assert line["state"] == "invalid"
    written = [e for e in town.service.ledger.entries if (e.body.get("run_id"), e.body.get("round")) == (run, number)]
    (replies,) = [e.body["replies"] for e in written if e.type == "answers"]
    assert (replies["ada"]["outcome"], replies["ada"]["reply_sha256"]) == ("invalid", None)
    assert replies["ben"]["outcome"] == "ok"
    assert [e.body["partners"] for e in written if e.type == "round"] == [["ben"]]


def only(number: int, lie: Callable[[Message, Callable[[], Message]], RecordDict]) -> Any:
    """A node that lies in one round and is honest in all else."""

    def twist(message: Message, honest: Callable[[], Message]) -> Message:
        asked = json.loads(payload_of(message.content))
        if (asked["kind"], asked["round"]) != ("train", number):
            return honest()
        return Message(lie(message, honest), reply_to=message)

    return twist


def test_a_replayed_reply(town: Town) -> None:
    """Its own signed reply to the round before, in answer to this one: nothing was trained, and nothing counts."""
    kept: list[bytes] = []

    def twist(message: Message, honest: Callable[[], Message]) -> Message:
        asked = json.loads(payload_of(message.content))
        if asked["kind"] != "train":
            return honest()
        if not kept:
            reply = honest()
            kept.append(to_bytes(reply.content))
            return reply
        return Message(from_bytes(kept[0]), reply_to=message)

    town.twists["ada"] = twist
    run = town.fresh()
    outcome = town.run(run)
    assert [done["partners"] for done in outcome.history] == [2, 1]
    invalid(town, run, 2, "ada answered another request")
    assert town.kinds("ada", run) == ["hold", "debit", "commit", "release"]
    assert town.kinds("ben", run) == ["hold", *["debit", "commit"] * 2, "release"]


def test_a_reply_of_another_run(town: Town) -> None:
    """As before, but the reply is to the same round of another run under the same charter."""
    old = town.fresh()
    town.open(old)
    stored = to_bytes(town.send(town.ask("train", 1, old), town.model)[1])
    town.twists["ada"] = only(1, lambda *_: from_bytes(stored))
    run = town.fresh()
    town.run(run)
    invalid(town, run, 1, "ada answered another request")
    assert town.kinds("ada", run).count("debit") == 1  # of the round in which it was honest


def as_ben(town: Town, message: Message) -> RecordDict:
    """A reply of ada's that says that it is ben's."""
    ask = json.loads(payload_of(message.content))
    me = town.keys.home("ada").identity()
    wire = SignedWire(me, {}, town.signed.sha256)
    reply = town.ask("update", ask["round"], ask["run_id"], "coordinator", sender="ben", request_id=ask["request_id"])
    return wire.encode(reply, wire.pack(town.model))[0]


def test_a_reply_in_anothers_name(town: Town) -> None:
    def under_bens_key(message: Message, _: Any) -> RecordDict:
        records = as_ben(town, message)
        signature = read_envelope(records["manifest"]["sealed"], MESSAGE_TYPE).signatures[0][1]
        return with_sealed(records, enveloped(payload_of(records), [(town.keys.home("ben").key(), signature)]))

    lies: list[tuple[Any, str]] = [
        (lambda message, _: as_ben(town, message), "a message from ben for coordinator, delivered as ada's"),
        (under_bens_key, "not signed by"),
    ]
    for lie, words in lies:
        town.mark()
        town.twists["ada"] = only(1, lie)
        run = town.fresh()
        assert [done["partners"] for done in town.run(run).history] == [1, 2]
        invalid(town, run, 1, words)
        town.logged("coordinator", words, "refused", partner="ada")
        assert town.kinds("ada", run) == ["hold", "debit", "commit", "release"]


def test_a_reply_that_is_really_anothers(town: Town) -> None:
    """ada relays what ben answered in the same round. It counts once, as ben's."""
    bens: list[bytes] = []
    there = threading.Event()

    def overheard(message: Message, honest: Callable[[], Message]) -> RecordDict:
        bens.append(to_bytes(honest().content))
        there.set()
        return from_bytes(bens[0])

    def relay(message: Message, _: Any) -> RecordDict:
        assert there.wait(10)
        return from_bytes(bens[0])

    town.twists |= {"ben": only(1, overheard), "ada": only(1, relay)}
    run = town.fresh()
    assert [done["partners"] for done in town.run(run).history] == [1, 2]
    invalid(town, run, 1, "not signed by")
    town.logged("coordinator", "not signed by", "refused", partner="ada")
    assert town.kinds("ada", run).count("debit") == 1
    assert town.kinds("ben", run).count("debit") == ROUNDS


def test_one_bit_of_an_update_on_its_way_back(town: Town) -> None:
    """Whoever changes it, the stream ends with the reason, and the request stays open: what was committed is still good."""
    run = town.fresh()
    town.open(run)
    town.twists["ada"] = only(1, lambda _, honest: flipped(honest().content, 1, 9))
    message = town.message(town.records(town.ask("train", 1, run), town.model))
    (name,) = town.grid.push_messages([message])
    words = "array 1 is not the one that the manifest names"
    town.logged("coordinator", words, "disconnected", partner="ada")
    town.logged("ada", f"INVALID_ARGUMENT: {words}", "disconnected")
    assert town.grid.state(name) not in (State.REPLIED, State.FOLDED)
    town.twists.clear()
    town.start("ada")  # a link remembers its answers until they are taken: a new one asks the outbox
    (reply,) = town.grid.send_and_receive([message], timeout=15)
    assert town.wire.decode(reply.content, "ada")[0].kind == "update"
    assert town.kinds("ada", run) == ["hold", "debit", "commit"]


# -- charters --------------------------------------------------------------------------------------------------------


def joined(town: Town, signed: SignedCharter) -> str:
    """What ada's node says to a charter, in a state folder of its own; nothing is in the ledger but its beginning."""
    state = f"joining-{next(town.count)}"
    settings = town.settings("ada", signed, state, {})
    with pytest.raises(CharterError, match="no charter can be joined") as caught:
        assemble(settings, None, town.log("ada"))
    entries, _ = read_ledger(settings.ledger)
    assert [e.type for e in entries] == ["genesis", "dataset"]
    return caught.value.message


def served(town: Town, signed: SignedCharter) -> str:
    """What the coordinator's own process says to it."""
    path = town.root / f"charter-{next(town.count)}.json"
    signed.save(path)
    settings = town.service.settings.model_copy(update={"charter": path, "state": path.with_suffix("")})
    with pytest.raises(CharterError) as caught:
        Service(settings)
    assert not settings.state.exists()
    return caught.value.message


def changed(signed: SignedCharter, place: str, value: Any) -> bytes:
    """The charter's bytes with one term changed."""
    said = json.loads(signed.payload)
    *path, last = place.split(".")
    inside = said
    for part in path:
        inside = inside[int(part) if part.isdecimal() else part]
    assert inside[last] != value
    inside[last] = value
    return canonical(said)


TERMS = {
    "algorithm.rounds": 3,
    "algorithm.local.steps": 2,
    "algorithm.local.optimizer.lr": "1000.0",
    "privacy.noise_multiplier": "0.5",
    "privacy.epsilon": "99.0",
    "privacy.clip_norm": "2.0",
    "quorum": 1,
    "partners.1.declared_records": 61,
    "partners.1.key": Identity.generate("x").key,
    "coordinator.key": Identity.generate("x").key,
    "expires": "2099-01-01T00:00:00Z",
}


def test_a_charter_that_was_edited_after_signing(town: Town) -> None:
    """Hyper-parameters, noise, a downgraded quorum, a swapped key: neither the node nor the coordinator works under it."""
    signed = town.charter(quorum=2)
    for place, value in TERMS.items():
        words = "the signature of ada does not fit: the charter was edited after signing"
        swapped = SignedCharter(changed(signed, place, value), signed.signatures)
        town.mark()
        assert words in joined(town, swapped), place
        assert words in served(town, swapped), place
        town.logged("ada", words, "charter refused", charter=swapped.sha256)


def test_a_charter_with_a_partner_replaced_and_signed_by_fewer(town: Town) -> None:
    """The coordinator and somebody in ben's place sign it anew; of ada there is nothing, or her signature under the old one."""
    mallory = Identity.generate("mallory")
    payload = changed(town.signed, "partners.1.key", mallory.key)
    fewer = SignedCharter(payload).sign(town.boss).sign(mallory)
    old = dict(town.signed.signatures)[town.keys.home("ada").key()]
    moved = SignedCharter(payload, (*fewer.signatures, (town.keys.home("ada").key(), old)))
    for swapped, words in ((fewer, "not signed by ada"), (moved, "the signature of ada does not fit")):
        town.mark()
        assert words in joined(town, swapped)
        assert words in served(town, swapped)
        town.logged("ada", words, "charter refused", charter=swapped.sha256)


def test_a_threshold_below_the_sites(town: Town) -> None:
    """Signed by all, so it is the charter; but this site wants more partners in a round than its quorum."""
    town.start("ada", minimum_cohort=2)
    try:
        town.logged("ada", Refusal.COHORT.value, "runs will be refused", charter=town.signed.sha256)
        run = town.fresh()
        outcome = town.run(run)
        (no,) = outcome.refusals
        assert (no.partner, no.reason) == ("ada", Refusal.COHORT.value)
        assert no.detail == "the charter's quorum is 1, this site wants at least 2"
        town.logged("ada", Refusal.COHORT.value, "refuse", run=run)
        assert town.said("coordinator", "answer", run=run, partner="ada", state=f"refused: {Refusal.COHORT.value}")
        assert town.kinds("ada", run) == ["refuse"]
        assert [done["partners"] for done in outcome.history] == [1] * ROUNDS, "the run goes on with the others"
    finally:
        town.start("ada")


# -- nothing executes (more of it in test_nothing_executes.py) -----------------------------------------------------------


def bare(payload: bytes) -> RecordDict:
    """As Flower's own apps send arrays."""
    return RecordDict({"arrays": ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", payload)})})


def disguised(records: RecordDict, payload: bytes, stype: str) -> RecordDict:
    """Chunks of a good message, relabelled; the hashes are those of the payload."""
    keys = list(records["chunks"])
    assert b"".join(a.data for a in records["chunks"].values()) == payload
    return with_arrays(records, {keys[0]: Array("object", (1,), stype, payload)})


def declared(records: RecordDict, by: Identity, **spec: Any) -> RecordDict:
    """A signed manifest that declares its first tensor as something else."""
    said = json.loads(payload_of(records))
    said["tensors"][0] |= spec
    return resealed(records, by, canonical(said))


def test_arrays_to_a_node_do_not_execute(town: Town, marker: Path) -> None:
    run = town.fresh()
    town.open(run)
    ask = town.ask("train", 1, run)
    with town.nothing_spent():
        for make in PAYLOADS.values():
            payload = make(marker)
            records = town.records(ask, {"w": np.frombuffer(payload, np.uint8)})
            assert town.refused(town.push(bare(payload))) == "request refused: a message without manifest"
            for stype in ("numpy.ndarray", "pickle", "torch.tensor"):
                reply = town.push(disguised(records, payload, stype))
                said = town.wire.decode(reply.content, "ada")[0]
                assert (said.kind, said.fields["reason"]) == ("refused", Refusal.NUMERIC.value)
            for dtype in ("object", "O", "|O", "V8", {"__reduce__": "os.system"}):
                words = "request refused: a malformed tensor in the manifest"
                assert town.refused(town.push(declared(records, town.boss, dtype=dtype))) == words
    town.logged("ada", "a message without manifest", "refused")
    town.logged("ada", "a malformed tensor in the manifest", "refused")
    town.logged("ada", Refusal.NUMERIC.value, "refuse")


@pytest.mark.parametrize("how", PAYLOADS)
def test_arrays_to_the_coordinator_do_not_execute(town: Town, marker: Path, how: str) -> None:
    payload = PAYLOADS[how](marker)
    me = town.keys.home("ada").identity()
    mine = SignedWire(me, {"coordinator": town.boss.key}, town.signed.sha256)

    def signed(message: Message) -> RecordDict:
        ask, _, digest = mine.decode(message.content, "coordinator")
        return mine.encode(ask.reply("update", digest), mine.pack({"w": np.frombuffer(payload, np.uint8)}))[0]

    def twist(message: Message, honest: Callable[[], Message]) -> Message:
        asked = json.loads(payload_of(message.content))
        if asked["kind"] != "train":
            return honest()
        records = signed(message)
        if asked["run_id"] == third:
            return Message(declared(records, me, dtype="object"), reply_to=message)
        made = bare(payload) if asked["round"] == 1 else disguised(records, payload, "numpy.ndarray")
        return Message(made, reply_to=message)

    run, third = town.fresh(), town.fresh()
    town.twists["ada"] = twist
    assert [done["partners"] for done in town.run(run).history] == [1, 1]
    invalid(town, run, 1, "a message without manifest")
    invalid(town, run, 2, "the update has other tensors than the model")
    town.run(third)
    invalid(town, third, 1, "a malformed tensor in the manifest")
    assert "debit" not in town.kinds("ada", run) + town.kinds("ada", third)


ODD_JSON: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "not a number": b'{"v":NaN}',
    "infinity": b'{"v":1e999}',
    "a float": b'{"v":1.5}',
    "a key twice": b'{"v":1,"v":1}',
    "deep": b'{"v":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "long": b'{"v":' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"v":"\\ud800"}',
    "no UTF-8": b'{"v":"\xff"}',
    "other fields": b'{"__class__":"os.system","v":1}',
    "another version": b'{"v":2}',
    "a true version": b'{"v":true}',
}


def test_manifests_with_odd_json(town: Town, marker: Path) -> None:
    """All of them properly signed by the coordinator."""
    records = town.records(town.ask("train", 1, town.fresh()), town.model)
    good = json.loads(payload_of(records))
    call = f"touch {marker}"
    odd = [
        *ODD_JSON.values(),
        pickle.dumps(Touch(marker)),
        f"!!python/object/apply:os.system ['{call}']".encode(),
        canonical({**good, "__reduce__": ["os.system", [call]]}),
        canonical({**good, "run_id": "../../etc"}),
        canonical({**good, "request_id": f"$({call})"}),
        canonical({**good, "round": "__import__('os')"}),
        canonical({**good, "fields": [call]}),
        canonical({**good, "tensors": {"py/object": "os.system"}}),
        json.dumps(good).encode(),  # with spaces: another layout
    ]
    with town.nothing_recorded():
        for payload in odd:
            assert town.refused(town.push(resealed(records, town.boss, payload))).startswith("request refused: ")
        assert town.refused(town.push(with_sealed(records, pickle.dumps(Touch(marker))))).startswith("request refused")
    assert len({e["reason"] for e in town.said("ada", "refused")}) > 5
    assert len(town.said("ada", "refused")) == len(odd) + 1
    # What JSON has no words for is data, whatever it looks like: here it is refused because the run is not open.
    ask = town.ask("train", 1, "odd", fields={"py/object": "os.system", "py/reduce": [call], "!!python/name": "os"})
    reply, _ = town.send(ask, town.model)
    assert (reply.kind, reply.fields["reason"]) == ("refused", Refusal.NOT_HELD.value)


def test_a_delivered_models_manifest_does_not_execute(town: Town, marker: Path, tmp_path: Path, evil: str) -> None:
    """model.json over the wire, and as a file: a task's name finds what is installed here, and nothing else."""
    run = town.goes_on()
    sealed = (town.service.settings.closing / f"{run}.json").read_bytes()
    kept = town.nodes["ada"].settings.models / run
    model, about = load_kept(kept).arrays, json.loads((kept / "model.json").read_bytes())
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    names = (evil, f"{evil}:task", "os", f"!!python/object/apply:os.system ['touch {marker}']")
    for name in names:
        fields = {"closing": base64.b64encode(sealed).decode(), "about": {**about, "task": name}}
        ask = town.ask("deliver", ROUNDS + 1, run, fields=fields)
        with town.nothing_recorded():
            words = "a model's manifest that differs from the charter, the run or the model"
            assert town.refused(town.push(town.records(ask, model), "deliver")) == f"request refused: {words}"
        copy = tmp_path / sha256(name.encode())
        shutil.copytree(kept, copy)
        (copy / "model.json").write_bytes(canonical({**about, "task": name}))
        with pytest.raises(TaskError, match="no task"):
            predict(load_kept(copy), tmp_path / "data.csv")
        with pytest.raises(MessageError, match="differs from the charter"):
            load_kept(copy).verify(town.signed)
    town.logged("ada", words, "refused")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
