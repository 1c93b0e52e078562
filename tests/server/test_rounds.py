"""The round loop against partners that are slow, absent, broken or lying."""

from __future__ import annotations

import base64
import json
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hansa.common import messages
from hansa.common.charter import SignedCharter
from hansa.common.closing import CLOSING_TYPE, read_closing, sign_closing
from hansa.common.config import Strategy
from hansa.common.errors import MessageError, RunFailed
from hansa.common.flower import ClientApp, Context, Message, RecordDict
from hansa.common.identity import read_envelope, strict_json
from hansa.common.ledger import Ledger
from hansa.common.messages import Manifest, SignedWire
from hansa.common.model import checked_manifest, model_sha256, zeros_like
from hansa.server import rounds
from hansa.server.app import make_server_app
from hansa.server.checkpoint import Checkpoint
from hansa.server.records import LedgerRecords
from hansa.server.rounds import Coordinator, Outcome
from hansa.server.strategies import ServerOptimizer
from hansa.simulations.grid import InProcessGrid
from support import NO_PRIVACY, charter, digest, identity, same_arrays, tiny_task, weights

NAMES = ("ada", "ben", "cy")
HEAD = {"length": 7, "root": "a" * 64}
Reply = tuple[str, dict[str, Any], dict[str, Any]]  # kind, tensors, fields


class Partner:
    """A partner that does as told: `answers[kind]` overrides what an honest one would say."""

    def __init__(self, name: str, value: float, sha: str) -> None:
        self.name, self.value = name, value
        self.wire = SignedWire(identity(name), {"coordinator": identity("coordinator").key}, sha)
        self.asked: list[Manifest] = []
        self.models: list[dict[str, Any]] = []
        self.answers: dict[str, Callable[[Manifest, str], Reply]] = {}
        self.tamper: Callable[[RecordDict, Manifest], RecordDict] = lambda records, _: records

    def honest(self, ask: Manifest) -> Reply:
        match ask.kind:
            case "open":
                return "accepted", {}, {}
            case "train":
                return "update", weights(self.value), {}
            case "evaluate":
                return "scores", {"scores": np.full((2, 2), 0.5, np.float32), "labels": np.array([0, 1])}, {}
            case "close":
                return "head", {}, HEAD
            case "deliver":
                return "kept", {}, {}
            case _:
                payload = base64.b64decode(ask.fields["closing"])
                me, sha = identity(self.name), ask.charter_sha256
                owners = [item["owner"] for item in json.loads(payload)["ledgers"]]
                made = sign_closing(me, payload, ask.run_id, sha, owners, HEAD)
                return "signature", {}, {"signature": base64.b64encode(made).decode()}

    def handle(self, message: Message) -> Message:
        ask, tensors, sha = self.wire.decode(message.content, "coordinator")
        self.asked.append(ask)
        self.models.append({k: v.copy() for k, v in tensors.items()})
        kind, made, fields = self.answers[ask.kind](ask, sha) if ask.kind in self.answers else self.honest(ask)
        records = self.wire.encode(ask.reply(kind, sha, **fields), self.wire.pack(made))[0]
        return Message(self.tamper(records, ask), reply_to=message)


class Table:
    """A coordinator and its partners around one in-process Grid; `run` can be called again, as after a crash."""

    def __init__(self, folder: Path, signed: SignedCharter) -> None:
        self.folder, self.signed = folder, signed
        self.partners = {
            m.name: Partner(m.name, float(i), signed.sha256) for i, m in enumerate(signed.charter.partners, start=1)
        }
        self.ledger: Ledger | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.notify: Callable[..., None] = lambda name, **facts: self.events.append((name, facts))

    def coordinator(self) -> Coordinator:
        if self.ledger is not None:
            self.ledger.close()
        me = identity("coordinator")
        self.ledger = Ledger(self.folder / "ledger.jsonl", me, {"owner": "coordinator"})
        if not self.ledger.of("charter"):
            self.ledger.append("charter", {"name": "c"}, charter=self.signed.sha256)
        return Coordinator(
            self.signed,
            me,
            tiny_task(),
            SignedWire(me, {m.name: m.key for m in self.signed.charter.partners}, self.signed.sha256),
            {name: i for i, name in enumerate(self.partners, start=1)},
            LedgerRecords(self.ledger, self.signed.sha256),
            weights,
            self.folder / "private",
            self.folder / "closing",
            lambda name, **facts: self.notify(name, **facts),
        )

    def run(self, run_id: str = "run-1", only: list[str] | None = None) -> Outcome:
        app, partners = ClientApp(), list(self.partners.values())
        for register in (
            app.train(),
            app.evaluate(),
            app.query("open"),
            app.query("close"),
            app.query("sign"),
            app.query("deliver"),
        ):
            register(lambda message, context: partners[context.node_id - 1].handle(message))
        grid = InProcessGrid(app, len(partners), context)
        return self.coordinator().run(grid, run_id, only)

    def bodies(self, kind: str) -> list[Any]:
        assert self.ledger is not None
        return [e.body for e in self.ledger.of(kind)]

    def outcomes(self, purpose: str, number: int) -> dict[str, str]:
        found = [b for b in self.bodies("answers") if (b["purpose"], b["round"]) == (purpose, number)]
        return {name: reply["outcome"] for name, reply in found[-1]["replies"].items()}

    def checkpoint(self) -> Checkpoint | None:
        return Checkpoint.load(self.folder / "private" / "run-1.checkpoint")


def context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def agreed(**changes: Any) -> SignedCharter:
    sizes = {"ada": 40, "ben": 10, "cy": 50}
    partners = [{"name": n, "key": identity(n).key, "declared_records": sizes[n]} for n in NAMES]
    return charter(**{"privacy": NO_PRIVACY, "algorithm__rounds": 2, "partners": partners, **changes})


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    made = Table(tmp_path, agreed())
    yield made
    if made.ledger is not None:
        made.ledger.close()


def mean(table: Table, sizes: dict[str, float]) -> float:
    return sum(n * table.partners[name].value for name, n in sizes.items()) / sum(sizes.values())


# -- a good run ------------------------------------------------------------------------------------------------------


def test_weights_are_declared_sizes(table: Table) -> None:
    """By hand: (40·1 + 10·2 + 50·3) / 100 = 2.1 a round."""
    outcome = table.run()
    assert (outcome.why, [h["round"] for h in outcome.history]) == ("completed", [1, 2])
    assert outcome.model is not None
    one = np.float32(0.0 + 2.1)
    np.testing.assert_array_equal(outcome.model["bias"], np.full(2, np.float32(np.float64(one) + 2.1)))
    np.testing.assert_array_equal(table.partners["cy"].models[2]["bias"], np.full(2, one)), "the model of round 2"


def test_uniform_weights(tmp_path: Path) -> None:
    table = Table(tmp_path, agreed(algorithm__weighting="uniform", algorithm__rounds=1))
    outcome = table.run()
    assert outcome.model is not None
    np.testing.assert_array_equal(outcome.model["bias"], np.full(2, np.float32(2.0)))


def test_the_ledger_tells_the_run(table: Table) -> None:
    outcome = table.run()
    assert table.ledger is not None
    assert outcome.model is not None
    exchange = ["ask", "answers"]
    kinds = [e.type for e in table.ledger.entries]
    assert kinds == ["genesis", "charter", "run", *exchange, *exchange, "round", *exchange, "round", "close"]
    assert [b["round"] for b in table.bodies("ask")] == [0, 1, 2]
    first = table.bodies("ask")[1]["requests"]
    assert first["ada"]["request_id"] == "run-1.1.train.ada"
    assert len({r["request_sha256"] for r in first.values()}) == 3
    assert (
        table.bodies("round")[-1]["model_sha256"]
        == model_sha256(outcome.model)
        == table.bodies("close")[0]["model_sha256"]
    )
    assert [b["partners"] for b in table.bodies("round")] == [list(NAMES)] * 2


def test_requests_are_on_the_ledger_before_they_are_sent(table: Table) -> None:
    def check(ask: Manifest, _: str) -> Reply:
        known = table.bodies("ask")[-1]["requests"]["ada"]["request_id"]
        assert known == ask.request_id
        return table.partners["ada"].honest(ask)

    table.partners["ada"].answers = {"open": check, "train": check}
    assert table.run().why == "completed"
    assert set(table.outcomes("train", 1).values()) == {"ok"}


def test_the_closing_checkpoint_is_signed_by_all(table: Table) -> None:
    outcome = table.run()
    data = (table.folder / "closing" / "run-1.json").read_bytes()
    envelope = read_envelope(data.removesuffix(b"\n"), CLOSING_TYPE)
    for key in table.signed.charter.keys().values():
        envelope.signed_by(key)
    body = strict_json(envelope.payload)
    assert outcome.model is not None
    assert body["model_sha256"] == model_sha256(outcome.model)
    assert table.ledger is not None
    heads = {item["owner"]: item for item in body["ledgers"]}
    assert heads["coordinator"] == {"owner": "coordinator", "length": table.ledger.length, "root": table.ledger.root}
    assert {n: heads[n]["length"] for n in NAMES} == dict.fromkeys(NAMES, 7)


def test_a_server_app_runs_it(table: Table) -> None:
    done: list[Outcome] = []
    app = ClientApp()
    partners = list(table.partners.values())
    for register in (app.train(), app.query("open"), app.query("close"), app.query("sign"), app.query("deliver")):
        register(lambda message, c: partners[c.node_id - 1].handle(message))
    make_server_app(table.coordinator(), "run-1", done.append)(InProcessGrid(app, 3, context), context(1))
    assert [o.why for o in done] == ["completed"]


def test_partial_participation_takes_the_same_cohort_again(tmp_path: Path) -> None:
    signed = agreed(algorithm__participation=0.7, algorithm__rounds=6)
    cohorts = []
    for number in range(2):
        table = Table(tmp_path / str(number), signed)
        table.run()
        cohorts.append([b["partners"] for b in table.bodies("round")])
    assert cohorts[0] == cohorts[1]
    assert all(len(c) == 2 for c in cohorts[0])
    assert len({tuple(c) for c in cohorts[0]}) > 1, "always the same two"


# -- too few ---------------------------------------------------------------------------------------------------------


def _refuse(_: Manifest, __: str) -> Reply:
    return "refused", {}, {"reason": "budget", "detail": "spent"}


def _fail(_: Manifest, __: str) -> Reply:
    raise ValueError("secret record 4711")


def test_one_refusal_is_shown_and_the_others_go_on(table: Table) -> None:
    table.partners["ben"].answers["open"] = _refuse
    outcome = table.run()
    assert outcome.why == "completed"
    assert [(r.partner, r.round, r.reason, r.detail) for r in outcome.refusals] == [("ben", None, "budget", "spent")]
    assert table.outcomes("open", 0)["ben"] == "refused: budget"
    assert table.outcomes("train", 1) == {"ada": "ok", "cy": "ok"}
    assert ("refused", {"refusal": outcome.refusals[0]}) in table.events


def test_too_few_accept(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["open"] = _refuse
    outcome = table.run()
    assert (outcome.why, outcome.model, outcome.history) == ("refused", None, [])
    assert len(outcome.refusals) == 2
    assert table.bodies("close") == [{"run_id": "run-1", "rounds": 0, "model_sha256": None, "why": "refused"}]
    assert (table.folder / "closing" / "run-1.json").exists()
    assert not table.partners["cy"].models[-1], "no model was sent"


def test_quorum_not_met(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["train"] = _refuse
    with pytest.raises(
        RunFailed,
        match=r"(?s)round 1: 1 of 3 partners answered, the quorum is 2 \(ada, ben: refused.*--resume --give-up",
    ):
        table.run()
    assert table.checkpoint().round == 0
    assert table.bodies("round") == table.bodies("close") == []
    assert not (table.folder / "closing").exists()


def test_everybody_failed(table: Table) -> None:
    for partner in table.partners.values():
        partner.answers["train"] = _fail
    with pytest.raises(RunFailed, match="round 1: 0 of 3") as caught:
        table.run()
    assert "4711" not in str(caught.value)
    assert set(table.outcomes("train", 1).values()) == {"invalid"}


def test_a_run_goes_on_after_its_quorum_comes_back(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["train"] = lambda ask, sha, n=name: (
            table.partners[n].honest(ask) if ask.round == 1 else _refuse(ask, sha)
        )
    with pytest.raises(RunFailed, match="round 2"):
        table.run()
    saved = table.checkpoint()
    assert saved is not None
    assert saved.round == 1
    for partner in table.partners.values():
        partner.answers.clear()
    outcome = table.run()
    assert [h["round"] for h in outcome.history] == [1, 2]
    assert [b["round"] for b in table.bodies("round")] == [1, 2]
    asks = [b for b in table.bodies("ask") if b["round"] == 2]
    assert len(asks) == 2
    assert asks[0] == asks[1], "the same requests, byte for byte"


def test_a_resumed_run_does_not_end_because_partners_stay_away(table: Table) -> None:
    """Closing it as refused would throw its finished rounds away."""

    def second(ask: Manifest, sha: str) -> Reply:
        return table.partners["ada"].honest(ask) if ask.round == 1 else _refuse(ask, sha)

    table.partners["ada"].answers["train"] = table.partners["ben"].answers["train"] = second
    with pytest.raises(RunFailed):
        table.run()
    table.partners["ada"].answers = {"train": _fail}
    table.partners["ben"].answers = {"train": _fail}
    with pytest.raises(RunFailed, match="quorum is 2"):
        table.run()
    assert table.bodies("close") == []
    table.partners["ada"].answers.clear()
    assert table.run().why == "completed"


def test_who_does_not_answer_at_first_has_not_refused(table: Table) -> None:
    """A run that nobody said no to is not closed for good because two nodes were down."""
    for name in ("ada", "ben"):
        table.partners[name].answers["open"] = _fail
    with pytest.raises(RunFailed, match=r"(?s)ada, ben did not answer, and without them the quorum of 2.*--resume"):
        table.run()
    assert table.bodies("close") == []
    for partner in table.partners.values():
        partner.answers.clear()
    assert table.run().why == "completed"


def test_who_accepted_once_is_not_asked_to_open_again(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["train"] = _refuse
    with pytest.raises(RunFailed):
        table.run()
    for partner in table.partners.values():
        partner.answers = {"open": _refuse}
    assert table.run().why == "completed"
    assert len([b for b in table.bodies("ask") if b["purpose"] == "open"]) == 1


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_a_reply_after_the_deadline_does_not_count(tmp_path: Path) -> None:
    table = Table(tmp_path, agreed(round_deadline_s=0.2, algorithm__rounds=1))

    def slow(ask: Manifest, _: str) -> Reply:
        time.sleep(0.3)
        return table.partners["cy"].honest(ask)

    table.partners["cy"].answers["train"] = slow
    outcome = table.run()
    assert table.outcomes("train", 1) == {"ada": "ok", "ben": "ok", "cy": "timeout"}
    assert outcome.model is not None
    np.testing.assert_allclose(outcome.model["bias"], mean(table, {"ada": 40, "ben": 10}), rtol=1e-6)
    (answers,) = (b for b in table.bodies("answers") if b["purpose"] == "train")
    assert answers["replies"]["cy"]["reply_sha256"] is None


def test_who_never_answers_times_out(tmp_path: Path) -> None:
    """A Grid that loses one partner's replies, as a network does."""
    table = Table(tmp_path, agreed(round_deadline_s=0.2, algorithm__rounds=1))

    class Lossy(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                if reply.metadata.src_node_id != 1 or reply.metadata.message_type != "train":
                    yield reply

    app = ClientApp()
    partners = list(table.partners.values())
    for register in (app.train(), app.query("open"), app.query("close"), app.query("sign"), app.query("deliver")):
        register(lambda message, c: partners[c.node_id - 1].handle(message))
    began = time.monotonic()
    outcome = table.coordinator().run(Lossy(app, 3, context), "run-1")
    assert time.monotonic() - began < 2
    assert outcome.why == "completed"
    assert table.outcomes("train", 1) == {"ada": "timeout", "ben": "ok", "cy": "ok"}


# -- lies ------------------------------------------------------------------------------------------------------------


def _nan() -> dict[str, Any]:
    return {**weights(), "bias": np.array([np.nan, 0], np.float32)}


UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "nan": ("update", _nan()),
    "inf": ("update", {**weights(), "bias": np.array([np.inf, 0], np.float32)}),
    "nothing": ("update", {}),
    "missing": ("update", {"bias": weights()["bias"]}),
    "extra": ("update", {**weights(), "more": np.zeros(1, np.float32)}),
    "shape": ("update", {**weights(), "bias": np.zeros((2, 1), np.float32)}),
    "scalar": ("update", {**weights(), "bias": np.zeros((), np.float32)}),
    "float64": ("update", {**weights(), "bias": np.zeros(2, np.float64)}),
    "kind scores": ("scores", weights(9)),
    "kind accepted": ("accepted", weights(9)),
    "kind none": ("", weights(9)),
}


@pytest.mark.parametrize("lie", list(UPDATES))
def test_an_invalid_update_is_counted_and_the_others_go_on(table: Table, lie: str) -> None:
    table.partners["ben"].answers["train"] = lambda *_: (*UPDATES[lie], {})
    outcome = table.run()
    assert table.outcomes("train", 1) == {"ada": "ok", "ben": "invalid", "cy": "ok"}
    assert outcome.model is not None
    once = mean(table, {"ada": 40, "cy": 50})
    np.testing.assert_allclose(outcome.model["bias"], 2 * once, rtol=1e-6)
    assert table.bodies("round")[0]["partners"] == ["ada", "cy"]


def _flip(records: RecordDict, _: Manifest) -> RecordDict:
    sealed = bytearray(records["manifest"]["sealed"])
    sealed[40] ^= 1
    records["manifest"]["sealed"] = bytes(sealed)
    return records


def _empty(_: RecordDict, __: Manifest) -> RecordDict:
    return RecordDict()


def _as_ada(records: RecordDict, ask: Manifest) -> RecordDict:
    """ben answers in ada's name, with his own key."""
    wire = SignedWire(identity("ben"), {}, ask.charter_sha256)
    made = Manifest(**{**ask.reply("update", "").__dict__, "sender": "ada"})
    return wire.encode(made, wire.pack(weights(9)))[0]


def _replayed(field: str, value: Any) -> Callable[[RecordDict, Manifest], RecordDict]:
    def tamper(_: RecordDict, ask: Manifest) -> RecordDict:
        wire = SignedWire(identity("ben"), {}, ask.charter_sha256)
        made = Manifest(**{**ask.reply("update", digest("x")).__dict__, field: value})
        return wire.encode(made, wire.pack(weights(9)))[0]

    return tamper


TAMPERS = {
    "flipped byte": _flip,
    "no records": _empty,
    "in another's name": _as_ada,
    "another run": _replayed("run_id", "run-0"),
    "another round": _replayed("round", 9),
    "another request": _replayed("request_id", "run-1.0.open.ben"),
    "another charter": _replayed("charter_sha256", "e" * 64),
    "another question": _replayed("fields", {}),
    "to another": _replayed("recipient", "ada"),
}


@pytest.mark.parametrize("how", list(TAMPERS))
def test_a_forged_or_replayed_reply_is_counted_and_the_others_go_on(table: Table, how: str) -> None:
    table.partners["ben"].tamper = lambda records, ask: TAMPERS[how](records, ask) if ask.kind == "train" else records
    outcome = table.run()
    assert table.outcomes("train", 1) == {"ada": "ok", "ben": "invalid", "cy": "ok"}
    assert outcome.model is not None
    np.testing.assert_allclose(outcome.model["bias"], 2 * mean(table, {"ada": 40, "cy": 50}), rtol=1e-6)


def _scores(s: Any, y: Any) -> tuple[str, dict[str, Any]]:
    return "scores", {"scores": s, "labels": y}


def good_scores() -> Any:
    return np.full((2, 2), 0.5, np.float32)


LABELS = np.array([0, 1])
EVALUATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "histogram in a public round": ("histogram", {"histogram": np.zeros((2, 20))}),
    "nothing": ("scores", {}),
    "no labels": ("scores", {"scores": good_scores()}),
    "scalar labels": _scores(good_scores(), np.array(1)),
    "matrix labels": _scores(good_scores(), LABELS.reshape(2, 1)),
    "fewer labels": _scores(good_scores(), LABELS[:1]),
    "float labels": _scores(good_scores(), LABELS.astype(np.float64)),
    "unknown class": _scores(good_scores(), np.array([0, 2])),
    "negative class": _scores(good_scores(), np.array([-1, 0])),
    "nan": _scores(np.full((2, 2), np.nan, np.float32), LABELS),
    "float64": _scores(np.full((2, 2), 0.5), LABELS),
    "three classes": _scores(np.full((2, 3), 0.5, np.float32), LABELS),
    "an update": ("update", weights()),
    "more rows than a partner can have": _scores(
        np.full((rounds.MAX_ROWS + 1, 2), 0.5, np.float32), np.zeros(rounds.MAX_ROWS + 1, np.int64)
    ),
}


@pytest.mark.parametrize("lie", list(EVALUATIONS))
def test_malformed_scores_are_counted_and_the_others_go_on(tmp_path: Path, lie: str) -> None:
    table = Table(tmp_path, agreed(evaluation={"kind": "public"}, algorithm__rounds=1))
    table.partners["ben"].answers["evaluate"] = lambda *_: (*EVALUATIONS[lie], {})
    outcome = table.run()
    assert table.outcomes("evaluate", 1) == {"ada": "ok", "ben": "invalid", "cy": "ok"}
    assert outcome.history[0]["metrics"]["accuracy"] == 0.5


HISTOGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "scores": _scores(good_scores(), LABELS),
    "shape": ("histogram", {"histogram": np.zeros((2, 18))}),
    "nan": ("histogram", {"histogram": np.full((2, 20), np.nan)}),
    "inf": ("histogram", {"histogram": np.full((2, 20), np.inf)}),
    "huge": ("histogram", {"histogram": np.full((2, 20), 1e307)}),
    "hugely negative": ("histogram", {"histogram": np.full((2, 20), -1e307)}),
    "float32": ("histogram", {"histogram": np.zeros((2, 20), np.float32)}),
    "nothing": ("histogram", {}),
}


@pytest.mark.parametrize("lie", list(HISTOGRAMS))
def test_malformed_histograms_are_counted_and_the_others_go_on(tmp_path: Path, lie: str) -> None:
    table = Table(tmp_path, agreed(evaluation={"kind": "private", "noise_multiplier": 8.0}, algorithm__rounds=1))
    good = np.zeros((2, 20))
    good[0, 0] = good[1, 19] = 5.0
    for name, partner in table.partners.items():
        partner.answers["evaluate"] = lambda *_, n=name: (
            (*HISTOGRAMS[lie], {}) if n == "ben" else ("histogram", {"histogram": good}, {})
        )
    outcome = table.run()
    assert table.outcomes("evaluate", 1) == {"ada": "ok", "ben": "invalid", "cy": "ok"}
    assert outcome.history[0]["metrics"]["auc"] == 1.0
    assert outcome.history[0]["metrics"]["accuracy"] == 1.0


def test_rows_are_bounded_by_what_the_partner_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "MAX_ROWS", 1)
    table = Table(tmp_path, agreed(evaluation={"kind": "public"}, algorithm__rounds=1))
    for member in table.signed.charter.partners:
        rows = rounds.ROWS_PER_RECORD * member.declared_records + (member.name == "ben")
        answer = _scores(np.full((rows, 2), 0.5, np.float32), np.arange(rows) % 2)
        table.partners[member.name].answers["evaluate"] = lambda *_, answer=answer: (*answer, {})
    table.run()
    assert table.outcomes("evaluate", 1) == {"ada": "ok", "ben": "invalid", "cy": "ok"}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_metrics_that_are_not_finite_are_not_recorded(tmp_path: Path) -> None:
    """Counts so tiny that their product is 0: the AUC is 0/0."""
    table = Table(tmp_path, agreed(evaluation={"kind": "private", "noise_multiplier": 8.0}, algorithm__rounds=1))
    for partner in table.partners.values():
        partner.answers["evaluate"] = lambda *_: ("histogram", {"histogram": np.full((2, 20), 1e-200)}, {})
    assert set(table.run().history[0]["metrics"]) == {"accuracy", "calibration_error", "brier"}


def test_nobody_can_be_evaluated(tmp_path: Path) -> None:
    table = Table(tmp_path, agreed(evaluation={"kind": "public"}, algorithm__rounds=1))
    for partner in table.partners.values():
        partner.answers["evaluate"] = _fail
    assert table.run().history[0]["metrics"] == {}


def test_a_words_only_refusal_cannot_flood_the_ledger(table: Table) -> None:
    table.partners["ben"].answers["open"] = lambda *_: ("refused", {}, {"reason": "x" * 10_000, "detail": ["?"] * 999})
    table.run()
    assert len(table.outcomes("open", 0)["ben"]) < 100


# -- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("close", ("head", {}, {})),
        ("close", ("head", {}, {"length": True, "root": "a"})),
        ("close", ("head", {}, {"length": 1, "root": 7})),
        ("sign", ("signature", {}, {})),
        ("sign", ("signature", {}, {"signature": "not base64!"})),
        ("sign", ("signature", {}, {"signature": base64.b64encode(b"\0" * 64).decode()})),
        ("sign", ("refused", {}, {"reason": "no"})),
    ],
)
def test_a_run_that_cannot_be_closed_can_be_closed_later(table: Table, kind: str, reply: Reply) -> None:
    table.partners["ben"].answers[kind] = lambda *_: reply
    with pytest.raises(RunFailed, match=r"(?s)cannot be closed: ben: .*All rounds are done.*--resume"):
        table.run()
    assert not (table.folder / "closing").exists()
    trained = sum(ask.kind == "train" for ask in table.partners["ada"].asked)
    table.partners["ben"].answers.clear()
    outcome = table.run()
    assert outcome.why == "completed"
    assert outcome.model is not None
    assert sum(ask.kind == "train" for ask in table.partners["ada"].asked) == trained
    assert len(table.bodies("close")) == len(table.bodies("run")) == 1
    assert (table.folder / "closing" / "run-1.json").exists()


def test_a_closed_run_is_closed(table: Table) -> None:
    first = table.run()
    assert table.ledger is not None
    length, closing = table.ledger.length, (table.folder / "closing" / "run-1.json").read_bytes()
    again = table.run()
    assert table.ledger.length == length, "nothing is recorded after the end"
    assert (table.folder / "closing" / "run-1.json").read_bytes() == closing
    assert (again.why, again.history) == (first.why, first.history)
    assert first.model is not None
    assert again.model is not None
    same_arrays(first.model, again.model)


def test_a_refused_run_stays_refused(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["open"] = _refuse
    table.run()
    for partner in table.partners.values():
        partner.answers.clear()
    assert table.ledger is not None
    length = table.ledger.length
    assert table.run().why == "refused"
    assert table.ledger.length == length


class _Crash(BaseException):
    pass


def test_a_crash_anywhere_repeats_the_same_requests(tmp_path: Path) -> None:
    """Die after every single entry of the coordinator's ledger in turn, then go on: the same model, the same ledger rules."""
    signed = agreed(evaluation={"kind": "public"}, algorithm__strategy={"name": "fedavgm", "server_momentum": 0.9})
    whole = Table(tmp_path / "whole", signed)
    reference = whole.run()
    assert whole.ledger is not None
    assert reference.model is not None
    total = whole.ledger.length
    for stop in range(3, total + 1):
        table = Table(tmp_path / str(stop), signed)
        original = Ledger.append

        def append(self: Ledger, kind: str, body: Any, stop: int = stop, original: Any = original, **more: Any) -> Any:
            entry = original(self, kind, body, **more)
            if self.length == stop:
                raise _Crash
            return entry

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "append", append)
            with pytest.raises(_Crash):
                table.run()
        outcome = table.run()
        assert outcome.model is not None
        same_arrays(outcome.model, reference.model)
        assert outcome.history == reference.history
        assert len(table.bodies("run")) == len(table.bodies("close")) == 1
        assert [b["round"] for b in table.bodies("round")] == [1, 2]
        seen: dict[Any, Any] = {}
        for body in table.bodies("ask"):
            assert seen.setdefault((body["round"], body["purpose"]), body) == body


def test_a_crash_between_checkpoint_and_ledger(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is kept before it is named, so what was named is never trained again with other noise."""

    def die(*_: object) -> None:
        raise _Crash

    with monkeypatch.context() as patch:
        patch.setattr(LedgerRecords, "round", die)
        with pytest.raises(_Crash):
            table.run()
    saved = table.checkpoint()
    assert saved is not None
    assert saved.round == 1
    for partner in table.partners.values():
        partner.value += 1  # what a partner that forgot its outbox would send now
    table.run()
    assert table.bodies("round")[0]["model_sha256"] == model_sha256(saved.model)
    assert table.bodies("round")[0]["partners"] == list(NAMES)


# -- the closing message -----------------------------------------------------------------------------------------------


def delivered(partner: Partner) -> list[tuple[Manifest, dict[str, Any]]]:
    return [(a, m) for a, m in zip(partner.asked, partner.models, strict=True) if a.kind == "deliver"]


def test_everyone_gets_the_model_its_manifest_and_the_closing_checkpoint(tmp_path: Path) -> None:
    table = Table(tmp_path, agreed(evaluation={"kind": "public"}))
    outcome = table.run()
    assert outcome.model is not None
    assert outcome.undelivered == []
    sealed = (tmp_path / "closing" / "run-1.json").read_bytes()
    charter, sha = table.signed.charter, table.signed.sha256
    for partner in table.partners.values():
        ((ask, model),) = delivered(partner)
        same_arrays(model, outcome.model)
        assert base64.b64decode(ask.fields["closing"]) == sealed
        about = checked_manifest(ask.fields["about"], charter, sha, "run-1", model_sha256(outcome.model))
        assert (about["rounds"], float(about["metrics"]["accuracy"])) == (2, 0.5)
    assert read_closing(sealed, charter.keys(), sha)["model_sha256"] == model_sha256(outcome.model)


def test_a_refused_run_delivers_its_end_and_no_model(table: Table) -> None:
    for name in ("ada", "ben"):
        table.partners[name].answers["open"] = _refuse
    assert table.run().undelivered == []
    for partner in table.partners.values():
        ((ask, model),) = delivered(partner)
        assert (set(ask.fields), model) == ({"closing"}, {})


@pytest.mark.parametrize("how", [_refuse, _fail, lambda *_: ("head", {}, HEAD)], ids=["refuses", "fails", "misspeaks"])
def test_who_does_not_keep_it_is_reported_and_gets_it_again(
    table: Table, how: Callable[[Manifest, str], Reply]
) -> None:
    """Also when others are away by then: nobody has to close or sign a second time."""
    table.partners["ben"].answers["deliver"] = how
    outcome = table.run()
    assert (outcome.why, outcome.undelivered, outcome.refusals) == ("completed", ["ben"], [])
    (facts,) = [f for name, f in table.events if name == "undelivered"]
    assert (facts["partner"], facts["answer"].outcome == "ok") == ("ben", False)
    assert table.ledger is not None
    length = table.ledger.length
    before = {name: len(partner.asked) for name, partner in table.partners.items()}
    table.partners["ben"].answers.clear()
    table.partners["cy"].answers = dict.fromkeys(("close", "sign", "deliver"), _fail)
    again = table.run()
    assert (again.why, again.undelivered) == ("completed", ["cy"])
    for name, partner in table.partners.items():
        assert [a.kind for a in partner.asked[before[name] :]] == ["deliver"]
    first, second = delivered(table.partners["ada"])
    assert first[0] == second[0], "the same request, byte for byte"
    assert table.ledger.length == length


def test_who_is_too_slow_to_keep_it_is_reported(tmp_path: Path) -> None:
    table = Table(tmp_path, agreed(round_deadline_s=0.2, algorithm__rounds=1))

    def slow(ask: Manifest, _: str) -> Reply:
        time.sleep(0.3)
        return "kept", {}, {}

    table.partners["cy"].answers["deliver"] = slow
    assert table.run().undelivered == ["cy"]


def _other_run(path: Path) -> None:
    path.write_bytes(path.with_name("run-2.json").read_bytes())


@pytest.mark.parametrize(
    "spoil",
    [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.write_bytes(b""), _other_run],
    ids=["gone", "cut off", "empty", "of another run"],
)
def test_a_closing_checkpoint_that_is_spoilt_is_signed_again(table: Table, spoil: Callable[[Path], object]) -> None:
    table.run()
    table.run("run-2")
    path = table.folder / "closing" / "run-1.json"
    spoil(path)
    for partner in table.partners.values():
        partner.asked.clear()
        partner.models.clear()
    assert table.run().undelivered == []
    assert [a.kind for a in table.partners["ada"].asked] == ["close", "sign", "deliver"]
    assert read_closing(path.read_bytes(), table.signed.charter.keys(), table.signed.sha256)["run_id"] == "run-1"


# -- what a round holds on to --------------------------------------------------------------------------------------------


def _grid(table: Table, kind: type[InProcessGrid] = InProcessGrid) -> Any:
    app, partners = ClientApp(), list(table.partners.values())
    for register in (app.train(), *(app.query(k) for k in ("open", "close", "sign", "deliver"))):
        register(lambda message, c: partners[c.node_id - 1].handle(message))
    return kind(app, len(partners), context)


def test_requests_are_the_grids_once_they_are_sent(tmp_path: Path) -> None:
    """The coordinator keeps a hash of each, not the model that they carry."""
    table = Table(tmp_path, agreed(round_deadline_s=0.2))

    class Forgetful(InProcessGrid):
        alive: ClassVar[list[weakref.ref[RecordDict]]] = []
        looked = 0

        def push_messages(self, messages: Any) -> Any:
            def watched() -> Iterator[Message]:
                for message in messages:
                    self.alive.append(weakref.ref(message.content))
                    yield message

            pushed = super().push_messages(watched())
            if self._queue[pushed[0]].metadata.message_type == "train":
                self._queue.clear()
            return pushed

        def pull_messages(self, message_ids: Any) -> Iterator[Message]:
            if not self._queue:
                assert [r for r in self.alive if r() is not None] == []
                self.looked += 1
            yield from super().pull_messages(message_ids)

    grid = _grid(table, Forgetful)
    with pytest.raises(RunFailed, match="round 1: 0 of 3"):
        table.coordinator().run(grid, "run-1")
    assert grid.looked


def test_a_grid_that_can_wait_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path, agreed(round_deadline_s=5.0, algorithm__rounds=1))
    waits: list[float] = []
    withdrawn: list[list[str]] = []

    class Slow(InProcessGrid):
        ready = False

        def pull_messages(self, message_ids: Any) -> Iterator[Message]:
            if self.ready:
                yield from super().pull_messages(message_ids)
            self.ready = False

        def wait(self, timeout_s: float) -> None:
            waits.append(timeout_s)
            self.ready = True

        def withdraw(self, message_ids: Any) -> None:
            withdrawn.append(list(message_ids))

    monkeypatch.setattr(rounds.time, "sleep", lambda _: pytest.fail("slept"))
    assert table.coordinator().run(_grid(table, Slow), "run-1").why == "completed"
    assert len(waits) == 5, "open, train, close, sign, deliver"
    assert withdrawn == [[]] * 5, "everybody answered"
    assert all(4 < s <= 5 for s in waits)


def test_updates_are_added_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 7)
    rng = np.random.default_rng(1)
    for shape in ((), (0, 3), (7,), (3, 5), (40,)):
        for weight in (1.0, 40.0, 0.1):
            first, value = np.asarray(rng.normal(size=shape)), np.asarray(rng.normal(size=shape), np.float32)
            total = first.copy()
            rounds._add(total, value, weight)
            np.testing.assert_array_equal(total, first + value.astype(np.float64) * weight)


def test_a_round_makes_no_copy_but_the_sum() -> None:
    model = {"a": np.zeros(3_000_000, np.float32), "b": np.zeros((1000, 1000), np.float32)}  # 16 MB
    total = zeros_like(model, np.float64)
    update = {name: np.ones_like(value) for name, value in model.items()}
    optimizer = ServerOptimizer(Strategy())
    tracemalloc.start()
    try:
        for name, value in update.items():
            rounds._add(total[name], value, 3.0)
        folding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        new = optimizer.step(1, model, total)
        stepping = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (new["a"] == 3).all()
    assert folding < 4e6
    assert stepping < 6e6


def test_replies_have_a_kind_for_every_request() -> None:
    assert set(rounds._REPLIES) == {"open", "train", "agree", "reveal", "evaluate", "close", "sign", "deliver"}
    with pytest.raises(MessageError):
        SignedWire(identity("ada"), {}, "").decode(RecordDict(), "ada")
