"""The round loop over a Flower Grid: ask the cohort, fold what comes, step the strategy, checkpoint.

One round: requests are recorded, sent, and answered by a deadline; each reply is verified and folded into a running sum as
it comes; the mean is the strategy's one virtual reply; the model is measured as the charter's evaluation says; the round is
recorded and checkpointed. A killed coordinator asks the same round again with the same bytes, and gets committed replies
from the partners' outboxes. At the end everyone signs where its ledger stands, and gets the model with that.

Memory, in sizes of the model, whatever the number of partners: the model (1), which the new one overwrites, and the running
sum in float64 (2); replies are read piece by piece from their files. (So with the strategies that are no more than the mean;
the others keep more themselves.)
Requests share the model's memory and are forgotten once the Grid has them.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..common.charter import Charter, SignedCharter
from ..common.closing import CLOSING_TYPE, closing_payload, read_closing
from ..common.errors import MessageError, Refusal, Refused, RunFailed
from ..common.flower import Grid, Message, RecordDict
from ..common.identity import Envelope, Identity, real, sha256, verify, write_envelope, write_whole
from ..common.masking import fixed_point, weights_of
from ..common.messages import Manifest, Tensors, Wire, pieces, squares
from ..common.model import Arrays, model_manifest, model_sha256, zeros_like
from ..common.plan import evaluated_rounds, first_averaged
from ..common.secagg import read_keys
from ..common.tasks import Task
from ..common.tasks.metrics import evaluate, histogram_metrics
from .central import CentralNoise, ClippedSum
from .checkpoint import Checkpoint
from .masked import GIVE_UP, MaskedRounds
from .records import Answer, Records
from .roster import Roster
from .strategies import ServerOptimizer
from .witness import Witnessing

MAX_UPDATE = 1e12
"""No tensor of an update has a larger L2 norm; float32 sums of a few of them, and their squares, stay finite."""

MAX_ROWS = 100_000
ROWS_PER_RECORD = 10
"""An answer with public scores has at most MAX_ROWS rows, or ROWS_PER_RECORD for each record that its sender declared.

Scores of all partners are held in memory at once, several times over; an honest partner holds out fewer rows than it trains
on, or one of the usual shared test sets. What a partner declared, everyone signed.
"""

Trained = tuple[dict[str, npt.NDArray[np.float64]], list[str], dict[str, Answer] | None, dict[str, Mapping[str, Any]]]
"""The mean of a round's updates (float64), who is in it, what everybody answered (None: recorded on the way), and their fields."""

Sink = Callable[[str, Manifest, Mapping[str, npt.NDArray[Any]]], None]


@runtime_checkable
class Link(Protocol):
    """What our own Grid can do besides; any other one is asked again and again, and keeps what nobody waits for."""

    def wait(self, timeout_s: float) -> None:
        """Return when a reply may be there, after `timeout_s` seconds at the latest."""

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: what was not begun is not, and their content is let go of."""


@dataclass(frozen=True)
class Refusing:
    """One partner's no, as the coordinator sees it."""

    partner: str
    run_id: str
    round: int | None
    reason: str
    detail: str


@dataclass
class Outcome:
    """A run that was closed.

    Attributes:
        model: final parameters by name, None when no round was run.
        history: {"round", "metrics", "partners"} a completed round.
        why: "completed", or "refused" when too few accepted the run, or it was given up before its last round.
        undelivered: partners that did not confirm in time that they keep the model and the closing checkpoint; the same
            run again delivers again.
    """

    run_id: str
    why: str
    model: Arrays | None
    history: list[dict[str, Any]]
    refusals: list[Refusing] = field(default_factory=list)
    undelivered: list[str] = field(default_factory=list)


class Coordinator:
    """Drives runs of one charter over any Grid.

    Args:
        roster: who can take part; or just name -> the Grid's node id, in the order in which updates are asked for.
        initial: makes the model to start from, float32 by name, the same one each time; it is not kept.
        folder: where the checkpoint is kept.
        closing: the folder of closing checkpoints.
        notify: called with an event's name and facts, for a display.
        witnessing: heads of ledgers are countersigned and kept; None in a population, which has one ledger.
    """

    def __init__(
        self,
        signed: SignedCharter,
        identity: Identity,
        task: Task,
        wire: Wire,
        roster: Roster | Mapping[str, int],
        records: Records,
        initial: Callable[[], Arrays],
        folder: Path,
        closing: Path,
        notify: Callable[..., None] = lambda *_, **__: None,
        witnessing: Witnessing | None = None,
    ) -> None:
        self._signed = signed
        self._charter: Charter = signed.charter
        self._identity = identity
        self._task = task
        self._wire = wire
        self._roster = roster if isinstance(roster, Roster) else Roster(roster)
        uniform = signed.charter.algorithm.weighting == "uniform"
        # From declared, public sizes; they apply after the noise. Clients of a population declare one size for all.
        self._weights = {} if uniform else {m.name: float(m.declared_records) for m in signed.charter.partners}
        self._records = records
        self._initial = initial
        self._folder = folder
        self._closing = closing
        self._notify = notify
        self._witnessing = witnessing
        self._refusals: list[Refusing] = []

    def run(self, grid: Grid, run_id: str, only: list[str] | None = None, *, give_up: bool = False) -> Outcome:
        """Run, or go on with, the run `run_id`, and close it.

        Args:
            only: ask these partners for the run, not the whole roster (one that is asked at all).
            give_up: begin nothing more and close it as it stands, so that what partners hold for the rest is free again.

        Raises:
            RunFailed: too few partners answered a round; what was spent is recorded, and the run can go on later.
        """
        self._refusals = []
        path = self._folder / f"{run_id}.checkpoint"
        state = self._standing(path, run_id)
        why = self._records.run(run_id)
        if why is None:
            self._record(state)  # what the checkpoint knows and a crash may have kept from the ledger
        else:  # stopped between its last entry and the countersigned checkpoint, or asked for again
            model = state.result if state.round else None
            outcome = Outcome(run_id, why, model, state.history, self._refusals)
            return self._close(grid, outcome, closed_before=True)
        to_ask = self._roster.asked and state.accepted is None
        if to_ask and give_up:
            return self._close(grid, Outcome(run_id, "refused", None, [], self._refusals))
        if to_ask:
            state.accepted, state.keys = self._open(grid, run_id, only or list(self._roster))
            if len(state.accepted) < self._charter.quorum:
                return self._close(grid, Outcome(run_id, "refused", None, [], self._refusals))
            self._witness(state, 1, {})
            state.save(path)
        optimizer = ServerOptimizer(self._charter.algorithm.strategy)
        optimizer.restore(state.strategy)
        evaluation = self._charter.evaluation
        first = first_averaged(self._charter.algorithm)
        measured = (
            evaluated_rounds(self._charter.algorithm.rounds, evaluation.every) if evaluation.kind != "none" else []
        )
        # Every step of a round is on disk before the ledger says that it is done and before the next one is asked for:
        # a resumed run repeats the same questions to the same partners, and never folds a second answer of one of them.
        for number in range(state.round + 1, self._charter.algorithm.rounds + 1):
            if give_up and not state.trained:
                model = state.result if state.round else None
                return self._close(grid, Outcome(run_id, "refused", model, state.history, self._refusals))
            began = time.perf_counter()
            self._notify("round", round=number)
            metrics: dict[str, float] = {}
            if not state.trained:
                mean, state.folded, answers, said = self._work()(grid, run_id, number, state)
                state.model = optimizer.step(number, state.model, mean)
                if (which := number - first + 1) > 0:
                    state.average_in(which)
                self._witness(state, number + 1, said)
                state.strategy, state.trained = optimizer.state(), True
                state.answers = {} if answers is None else {"train": answers}
            if number in measured:
                state.save(path)
                self._record(state)
                metrics, answers = self._evaluate(grid, run_id, number, state)
                state.answers = {"evaluate": answers}
            state.round, state.trained = number, False
            state.history.append({"round": number, "metrics": metrics, "partners": len(state.folded)})
            state.save(path)
            self._record(state)
            self._notify("done", round=number, metrics=metrics, seconds=time.perf_counter() - began)
        return self._close(grid, Outcome(run_id, "completed", state.result, state.history, self._refusals))

    def _standing(self, path: Path, run_id: str) -> Checkpoint:
        """Where the run stands: at its checkpoint, or at its beginning."""
        initial = self._initial()
        state = Checkpoint.load(path) or Checkpoint(run_id, 0, dict(initial))
        # In the order of the model: a file keeps none, and tensors in another one would make other bytes of the same
        # request. And so that the next round can overwrite it, which what was read from a file may not allow.
        state.model = {name: np.require(state.model[name], requirements=("C", "W")) for name in initial}
        return state

    def _witness(self, state: Checkpoint, number: int, said: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what the replies say of heads, and what round `number` will ask about them; the checkpoint is saved after it."""
        if self._witnessing is not None:
            self._witnessing.collect(state.witness, said)
            state.witness = self._witnessing.next_round(self._cohort(number, state), said)

    def _record(self, state: Checkpoint) -> None:
        """Write down what the checkpoint has: the answers of its last step and, at the end of a round, the round."""
        number = state.round + 1 if state.trained else state.round
        for purpose, answers in state.answers.items():
            self._records.answered(state.run_id, number, purpose, answers)
        if state.round and not state.trained:
            metrics = state.history[-1]["metrics"]
            self._records.round(state.run_id, state.round, model_sha256(state.result), state.folded, metrics)

    # -- the phases of a run -----------------------------------------------------------------------------------------

    def _open(self, grid: Grid, run_id: str, partners: list[str]) -> tuple[list[str], dict[str, str]]:
        """Who accepted the run, and their signed keys of secure aggregation, in base64."""
        keys: dict[str, str] = {}

        def key(partner: str, reply: Manifest, _: Tensors) -> None:
            if self._charter.secure_aggregation is None:
                return
            given = str(reply.fields.get("key", ""))
            identities = {m.name: m.key for m in self._charter.partners}
            try:
                read_keys({partner: base64.b64decode(given, validate=True)}, self._signed.sha256, run_id, identities)
            except Refused as refused:
                raise MessageError(refused.detail) from refused
            keys[partner] = given

        answers = self._exchange(grid, run_id, 0, "open", "query.open", partners, {}, key)
        self._records.answered(run_id, 0, "open", answers)
        accepted = [name for name, answer in answers.items() if answer.outcome == "ok"]
        silent = [name for name, answer in answers.items() if answer.outcome in ("timeout", "invalid")]
        if silent and len(accepted) < self._charter.quorum:
            raise RunFailed(
                f"{', '.join(silent)} did not answer, and without them the quorum of {self._charter.quorum} is not met",
                "Nothing was spent. Mend the cause and run again with --resume.",
            )
        if len(accepted) < self._charter.quorum and (
            later := [n for n, a in answers.items() if a.outcome.removeprefix("refused: ") in _NOT_YET]
        ):
            told = "; ".join(f"{name}: {answers[name].outcome.removeprefix('refused: ')}" for name in later)
            raise RunFailed(
                f"{len(accepted)} partners accepted the run now, the quorum is {self._charter.quorum} ({told})",
                f"Nothing was spent. When they are ready, run again with --resume: run {run_id} is then asked for again. Until "
                "then those who accepted hold their part of the budget for it; --resume --give-up closes it instead.",
            )
        return accepted, keys

    def _work(self) -> Callable[[Grid, str, int, Checkpoint], Trained]:
        """How a round's mean comes about."""
        if self._charter.privacy.kind == "central":
            return self._train_central
        return self._train if self._charter.secure_aggregation is None else self._train_masked

    def _train(self, grid: Grid, run_id: str, number: int, state: Checkpoint) -> Trained:
        """The weighted mean of the cohort's updates (float64), who is in it, what everybody answered, and their fields."""
        model, said = state.model, dict[str, Mapping[str, Any]]()
        total = zeros_like(model, np.float64)
        expected = {name: value.shape for name, value in model.items()}
        folded: list[str] = []
        mass = 0.0

        def fold(partner: str, reply: Manifest, update: Mapping[str, npt.NDArray[Any]]) -> None:
            nonlocal mass
            if {n: v.shape for n, v in update.items()} != expected or any(
                v.dtype != np.float32 for v in update.values()
            ):
                raise MessageError("the update has other tensors than the model")
            # Also what is not finite: NaN compares false. A huge value would end the run for all, at every resume.
            # The sum of squares bounds every value.
            if not all(squares(v) < MAX_UPDATE**2 for v in update.values()):
                raise MessageError(f"the update is not finite, or its norm is not below {MAX_UPDATE:g}")
            weight = self._weights.get(partner, 1.0)
            for name, value in update.items():
                _add(total[name], value, weight)
            mass += weight
            folded.append(partner)
            said[partner] = reply.fields

        cohort = self._cohort(number, state)
        fields = _about_heads(state.witness)
        answers = self._exchange(grid, run_id, number, "train", "train", cohort, model, fold, fields)
        if len(folded) < self._charter.quorum:
            self._records.answered(run_id, number, "train", answers)
            raise self._no_quorum(number, len(folded), answers)
        for value in total.values():
            value /= mass
        return total, folded, answers, said

    def _train_central(self, grid: Grid, run_id: str, number: int, state: Checkpoint) -> Trained:
        """As `_train`, of a secret sample, with noise: nothing that is written down tells who was in it, or how many.

        Before the checkpoint that follows has its result nothing has left, so that a round that was interrupted is done again
        under its debit: with a fresh sample and fresh noise.

        Raises:
            RunFailed: the deadline came first. Whose updates were in by then may depend on how slow one client was, and one client may
                change the sum by its own update only: nothing of the round is used.
        """
        terms = CentralNoise.of(self._charter)
        total = ClippedSum(terms, state.model)
        requests, records = self._encoded("train", terms.cohort(self._roster), run_id, number, {}, state.model)
        asked = {name: (manifest.request_id, digest) for name, (manifest, digest) in requests.items()}
        self._records.asked(run_id, number, "train", asked)
        answers = self._deliver(grid, "train", requests, records, lambda _, __, update: total.add(update))
        if any(answer.outcome == "timeout" for answer in answers.values()):
            raise RunFailed(
                f"round {number} was not done within {self._charter.round_deadline_s:g} s, and nothing of it is used: one slow client may "
                "not decide which others count",
                "Nothing was released. Run again with --resume: the round is done again, with another sample, under the same debit.",
            )
        return total.noised(), [], {}, {}

    def _train_masked(self, grid: Grid, run_id: str, number: int, state: Checkpoint) -> Trained:
        """As `_train`, but of the cohort only the sum is learned; its answers are recorded on the way."""

        def exchange(
            purpose: str,
            cohort: list[str],
            model: Arrays,
            sink: Sink,
            fields: Mapping[str, dict[str, Any]],
            attempt: int,
        ) -> dict[str, Answer]:
            kind = purpose if purpose == "train" else f"query.{purpose}"
            answers = self._exchange(grid, run_id, number, purpose, kind, cohort, model, sink, fields, attempt)
            self._records.answered(run_id, number, purpose, answers, attempt)
            return answers

        keys = {name: base64.b64decode(key) for name, key in state.keys.items()}
        rounds = MaskedRounds(self._charter, self._signed.sha256, run_id, keys, self._records, self._notify)
        cohort = self._cohort(number, state)
        found = rounds.sum(number, cohort, state.model, state.witness, exchange)
        values = fixed_point(self._charter).from_grid(found.total)
        if self._charter.privacy.kind == "shared":
            local = self._charter.algorithm.local
            records = sum(m.declared_records for m in self._charter.partners if m.name in found.survivors)
            values *= -local.optimizer.lr / (local.sampling_rate * records)
        else:
            values /= sum(weight for name, weight in weights_of(self._charter).items() if name in found.survivors)
        mean, at = {}, 0
        for name, value in state.model.items():
            mean[name] = values[at : at + value.size].reshape(value.shape)
            at += value.size
        return mean, found.survivors, None, found.said

    def _evaluate(
        self, grid: Grid, run_id: str, number: int, state: Checkpoint
    ) -> tuple[dict[str, float], dict[str, Answer]]:
        """Metrics over all evaluated rows, pooled in the order of the roster; private ones from the summed histogram."""
        # A node sees by its own last head that it was put back to an older copy, before it charges this either. The checkpoint
        # has what is asked here, so it is the same after a crash.
        shown = {name: {**asked, "since": [], "heads": []} for name, asked in state.witness.items()}
        classes = len(self._task.classes)
        parts: dict[str, Mapping[str, npt.NDArray[Any]]] = {}

        def take(partner: str, reply: Manifest, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
            if self._charter.evaluation.kind == "public":
                s, y = tensors["scores"], tensors["labels"]
                member = self._charter.member(partner)
                if y.size > (most := max(MAX_ROWS, ROWS_PER_RECORD * (member.declared_records if member else 0))):
                    raise MessageError(f"{partner}'s scores are of {y.size} rows; at most {most} are taken")
                good = s.dtype == np.float32 and y.dtype == np.int64 and y.ndim == 1 and s.shape == (len(y), classes)
                if not good or not np.isfinite(s).all() or (len(y) and not (y.min() >= 0 and y.max() < classes)):
                    raise MessageError(f"{partner}'s scores are malformed")
            else:
                h = tensors["histogram"]
                if h.dtype != np.float64 or h.shape != (2, self._charter.evaluation.bins):
                    raise MessageError(f"{partner}'s histogram is malformed")
                # Also what is not finite. Sums and products of larger ones need not be finite, and metrics are for ever.
                if not (np.abs(h) < MAX_UPDATE).all():
                    raise MessageError(f"{partner}'s histogram is not finite, or has counts not below {MAX_UPDATE:g}")
            parts[partner] = tensors

        taking_part = self._taking_part(state)
        asked = [name for name in self._roster.measuring if name in taking_part]
        answers = self._exchange(
            grid, run_id, number, "evaluate", "evaluate", asked, state.result, take, _about_heads(shown)
        )
        ordered = [parts[name] for name in asked if name in parts]
        if not ordered:
            return {}, answers
        if self._charter.evaluation.kind == "private":
            summed = np.sum([p["histogram"] for p in ordered], axis=0)
            found = histogram_metrics(summed, binary=classes == 2)  # of tiny counts: not finite where a product is 0
            return {name: value for name, value in found.items() if math.isfinite(value)}, answers
        scores = np.concatenate([p["scores"] for p in ordered])
        labels = np.concatenate([p["labels"] for p in ordered])
        return evaluate(self._task, scores, labels) if len(labels) else {}, answers

    def _close(self, grid: Grid, outcome: Outcome, *, closed_before: bool = False) -> Outcome:
        """Close every ledger, have everyone sign where it ends, and give everyone the model with that."""
        name = model_sha256(outcome.model) if outcome.model is not None else None
        sealed = self._sealed(outcome.run_id, name) if closed_before else None
        if sealed is None:
            sealed = self._seal(grid, outcome, name)
            write_whole(self._closing / f"{outcome.run_id}.json", sealed)
        self._notify("closed", why=outcome.why)
        if self._charter.partners:  # a population has one ledger, the coordinator's, and nobody who keeps a model
            self._hand_out(grid, outcome, name, sealed)
        return outcome

    def _sealed(self, run_id: str, name: str | None) -> bytes | None:
        """The closing checkpoint that everyone signed already: to deliver it again nobody has to close or sign again."""
        path = self._closing / f"{run_id}.json"
        try:
            sealed = path.read_bytes()
            body = read_closing(sealed, self._charter.keys(), self._signed.sha256)
        except (OSError, MessageError):
            return None
        return sealed if (body["run_id"], body["model_sha256"]) == (run_id, name) else None

    def _seal(self, grid: Grid, outcome: Outcome, name: str | None) -> bytes:
        """Every ledger closed, and everyone's signature under where it ends: the closing checkpoint's bytes."""
        run_id = outcome.run_id
        heads: dict[str, Mapping[str, Any]] = {}

        def head(partner: str, reply: Manifest, _: Tensors) -> None:
            length, root = reply.fields.get("length"), reply.fields.get("root")
            if type(length) is not int or not isinstance(root, str):
                raise MessageError(f"{partner}'s head is malformed")
            heads[partner] = {"length": length, "root": root}

        self._must(self._ask(grid, run_id, "close", {}, {}, head))
        heads[self._charter.coordinator.name] = self._records.close(run_id, len(outcome.history), name, outcome.why)
        payload = closing_payload(run_id, self._signed.sha256, name, heads)
        keys = self._charter.keys()
        signatures = {self._identity.key: self._identity.sign(CLOSING_TYPE, payload)}

        def signature(partner: str, reply: Manifest, _: Tensors) -> None:
            made = base64.b64decode(str(reply.fields.get("signature", "")))
            verify(keys[partner], CLOSING_TYPE, payload, made)
            signatures[keys[partner]] = made

        fields = {"closing": base64.b64encode(payload).decode()}
        self._must(self._ask(grid, run_id, "sign", fields, {}, signature))
        ordered = tuple((key, signatures[key]) for key in keys.values())
        return write_envelope(Envelope(CLOSING_TYPE, payload, ordered)) + b"\n"

    def _hand_out(self, grid: Grid, outcome: Outcome, name: str | None, sealed: bytes) -> None:
        """The closing message: final model, its manifest and the closing checkpoint, to be verified and kept by everyone.

        Who does not confirm in time is reported; the run is over all the same.
        """
        fields: dict[str, Any] = {"closing": base64.b64encode(sealed).decode()}
        if name is not None:
            last = outcome.history[-1]["metrics"]
            metrics = {n: real(value) for n, value in last.items() if math.isfinite(value)}
            charter, sha, rounds = self._charter, self._signed.sha256, len(outcome.history)
            fields["about"] = model_manifest(charter, sha, outcome.run_id, name, rounds, metrics)
        answers = self._ask(grid, outcome.run_id, "deliver", fields, outcome.model or {}, lambda *_: None)
        for partner, answer in answers.items():
            if answer.outcome != "ok":
                outcome.undelivered.append(partner)
                self._notify("undelivered", partner=partner, answer=answer)

    # -- exchanges ---------------------------------------------------------------------------------------------------

    def _exchange(
        self,
        grid: Grid,
        run_id: str,
        number: int,
        purpose: str,
        message_type: str,
        cohort: list[str],
        model: Arrays,
        sink: Sink,
        fields: Mapping[str, dict[str, Any]] | None = None,
        attempt: int | None = None,
    ) -> dict[str, Answer]:
        """One question to a cohort: requests on the ledger, then sent, answers folded; the caller records them.

        Args:
            fields: by partner, what its request says besides.
            attempt: at secure aggregation.
        """
        requests, records = self._encoded(purpose, cohort, run_id, number, fields or {}, model, attempt)
        asked = {name: (manifest.request_id, digest) for name, (manifest, digest) in requests.items()}
        self._records.asked(run_id, number, purpose, asked, attempt)
        answers = self._deliver(grid, message_type, requests, records, sink)
        for name, answer in answers.items():
            if answer.outcome.startswith("refused: "):
                reason = answer.outcome.removeprefix("refused: ")
                seen = Refusing(name, run_id, number or None, reason, answer.detail)
                self._refusals.append(seen)
                self._notify("refused", refusal=seen)
        return answers

    def _ask(
        self, grid: Grid, run_id: str, kind: str, fields: dict[str, Any], tensors: Arrays, sink: Sink
    ) -> dict[str, Answer]:
        """A question to every partner outside of the ledgers (closing them is what it is about)."""
        partners = [m.name for m in self._charter.partners]
        number = self._charter.algorithm.rounds + 1
        requests, records = self._encoded(kind, partners, run_id, number, dict.fromkeys(partners, fields), tensors)
        return self._deliver(grid, f"query.{kind}", requests, records, sink)

    def _must(self, answers: Mapping[str, Answer]) -> None:
        """Raise RunFailed unless everybody answered."""
        if bad := {n: a for n, a in answers.items() if a.outcome != "ok"}:
            told = "; ".join(f"{name}: {answer.outcome} {answer.detail}".strip() for name, answer in bad.items())
            raise RunFailed(
                f"the run cannot be closed: {told}",
                "All rounds are done and recorded. Run the same command with --resume to close it.",
            )

    def _encoded(
        self,
        kind: str,
        partners: list[str],
        run_id: str,
        number: int,
        fields: Mapping[str, dict[str, Any]],
        tensors: Arrays,
        attempt: int | None = None,
    ) -> tuple[dict[str, tuple[Manifest, str]], dict[str, RecordDict]]:
        """By partner: the request and its hash, and its records. All records share the tensors' bytes."""
        packed = self._wire.pack(tensors)
        requests, records = {}, {}
        for name in partners:
            manifest = self._manifest(kind, name, run_id, number, fields.get(name, {}), attempt)
            records[name], digest = self._wire.encode(manifest, packed)
            requests[name] = (manifest, digest)
        return requests, records

    def _deliver(
        self,
        grid: Grid,
        message_type: str,
        requests: Mapping[str, tuple[Manifest, str]],
        records: dict[str, RecordDict],
        sink: Sink,
    ) -> dict[str, Answer]:
        """Send, and fold replies as they come until all are in or the deadline has passed.

        Args:
            records: emptied: what was sent is the Grid's.
        """
        deadline = time.monotonic() + self._charter.round_deadline_s
        answers: dict[str, Answer] = {}
        link = grid if isinstance(grid, Link) else None  # asking takes 20 µs

        def outgoing() -> Iterator[Message]:
            for name, (manifest, _) in requests.items():
                yield grid.create_message(
                    records.pop(name),
                    message_type,
                    self._roster.node(name),
                    str(manifest.round),
                    self._charter.round_deadline_s,
                )

        pending = set(grid.push_messages(outgoing()))
        while pending and (left_s := deadline - time.monotonic()) > 0:
            came = False
            for reply in grid.pull_messages(list(pending)):
                if time.monotonic() >= deadline:
                    break  # it came too late
                came = True
                pending.discard(reply.metadata.reply_to_message_id)
                name = self._roster.name(reply.metadata.src_node_id) or ""
                # What is not signed by the partner must not keep its own answer out.
                if name in requests and (name not in answers or answers[name].outcome == "invalid"):
                    manifest, digest = requests[name]
                    answers[name] = self._receive(name, manifest, digest, reply, sink)
                    if link is not None and answers[name].outcome not in ("ok", "failed"):
                        # No work that stands: whoever goes on with this run asks again, and a cause may be mended.
                        link.withdraw([reply.metadata.reply_to_message_id])
                    self._notify("answer", partner=name, round=manifest.round, kind=manifest.kind, answer=answers[name])
                del reply  # before the next one is there
            if not came and link is not None:
                link.wait(left_s)
            elif not came:
                time.sleep(0.01)
        if link is not None:
            link.withdraw(pending)
        for name, (manifest, _) in requests.items():
            answers.setdefault(name, Answer(manifest.request_id, "timeout"))
        return answers

    def _receive(self, name: str, request: Manifest, digest: str, message: Message, sink: Sink) -> Answer:
        if message.has_error():
            return Answer(request.request_id, "invalid", None, message.error.reason or "the node failed")
        try:
            reply, tensors, reply_sha256 = self._wire.decode(message.content, name)
            bound = (reply.charter_sha256, reply.run_id, reply.round, reply.request_id, reply.in_reply_to)
            if bound != (request.charter_sha256, request.run_id, request.round, request.request_id, digest):
                raise MessageError(f"{name} answered another request")
            if reply.kind == "refused":
                reason, detail = str(reply.fields.get("reason")), str(reply.fields.get("detail"))
                return Answer(request.request_id, f"refused: {reason[:80]}", reply_sha256, detail[:400])
            if reply.kind == "failed" and request.kind in ("train", "evaluate"):
                return Answer(request.request_id, "failed", reply_sha256, "its log says where in the code")
            if reply.kind not in _REPLIES[request.kind]:
                raise MessageError(f"{name} answered a {request.kind} request with {reply.kind}")
            sink(name, reply, tensors)
        except (MessageError, KeyError, ValueError) as err:
            return Answer(request.request_id, "invalid", None, str(err))
        return Answer(request.request_id, "ok", reply_sha256)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _manifest(
        self, kind: str, partner: str, run_id: str, number: int, fields: dict[str, Any], attempt: int | None
    ) -> Manifest:
        which = kind if attempt is None else f"{kind}.{attempt}"
        # Everything here repeats after a crash, so the bytes do: the same request has the same hash.
        return Manifest(
            kind=kind,
            sender=self._charter.coordinator.name,
            recipient=partner,
            charter_sha256=self._signed.sha256,
            run_id=run_id,
            round=number,
            request_id=f"{run_id}.{number}.{which}.{partner}",
            in_reply_to="",
            fields=fields,
        )

    def _taking_part(self, state: Checkpoint) -> Sequence[str]:
        """Who accepted the run; where nobody is asked, everybody."""
        return self._roster if state.accepted is None else state.accepted

    def _cohort(self, number: int, state: Checkpoint) -> list[str]:
        """Who is asked to train in round `number`: the same after a crash."""
        taking_part = self._taking_part(state)
        size = max(1, round(self._charter.algorithm.participation * len(self._roster)))
        if size >= len(taking_part):
            return list(taking_part)
        seed = int(sha256(f"cohort:{self._charter.model_seed}:{number}".encode())[:15], 16)
        chosen = np.random.default_rng(seed).choice(len(taking_part), size, replace=False)
        return [taking_part[i] for i in sorted(chosen)]

    def _no_quorum(self, number: int, folded: int, answers: Mapping[str, Answer]) -> RunFailed:
        alike: dict[str, list[str]] = {}
        for name, answer in answers.items():
            if answer.outcome != "ok":
                alike.setdefault(f"{answer.outcome} {answer.detail}".strip(), []).append(name)
        told = "; ".join(
            f"{', '.join(names) if len(names) <= 4 else f'{len(names)} of them'}: {what}"
            for what, names in list(alike.items())[:10]
        )
        return RunFailed(
            f"round {number}: {folded} of {len(answers)} partners answered, the quorum is {self._charter.quorum} ({told})",
            "Nothing was aggregated. What was spent stays on the ledgers; mend the cause and run again with "
            f"--resume.{GIVE_UP}",
        )


def _about_heads(witness: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"witness": asked} for name, asked in witness.items()}


def _add(total: npt.NDArray[np.float64], value: npt.NDArray[Any], weight: float) -> None:
    """total += weight * value, in float64, piece by piece."""
    to = total.reshape(-1)
    for at, piece in pieces(value):
        to[at : at + len(piece)] += piece if weight == 1.0 else np.multiply(piece, weight, dtype=np.float64)


_NOT_YET = (Refusal.NOT_APPROVED, Refusal.PAUSED, Refusal.HOURS)
"""What a partner refuses today and may accept tomorrow: no reason to close a run that too few accepted."""

_REPLIES = {
    "open": ("accepted",),
    "train": ("update", "masked"),
    "agree": ("survivors",),
    "reveal": ("shares",),
    "evaluate": ("scores", "histogram"),
    "close": ("head",),
    "sign": ("signature",),
    "deliver": ("kept",),
}
