"""The Flower ClientApp: one handler a request, each in the same order.

verify the message -> ask the gate -> read data and work -> outbox -> commit -> reply. What the gate refuses is answered
with a signed refusal and reads nothing.

What may leave a node, and nothing else: `update` (a round's model update), `masked` (a masked vector, with shares of its masks that only
their recipients can read), `survivors` (a signature under the list of those whose vectors are to be summed), `shares` (what opens that
sum, and no other), `scores` (scores and labels of rows registered
as public), `histogram` (noisy score histogram, charged), `failed` (that, and nothing else, when the work failed after it was
paid for), `accepted` (with this run's public key), `refused`, `kept`, `head` and `signature` (of its ledger). Whatever a round is answered with, the same is told
of ledgers beside it: its own head, and its signatures under heads of others'.

What is logged holds no record value: of an exception its class and where in the code it was raised, never its words.
"""

from __future__ import annotations

import base64
import logging
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..common.charter import Charter
from ..common.closing import sign_closing
from ..common.errors import ConfigError, DataError, LedgerError, MessageError, OutputError, Refusal, Refused, counted
from ..common.flower import ClientApp, Context, Message, RecordDict
from ..common.heads import Head, KeptHeads
from ..common.identity import Identity, sha256
from ..common.ledger import Ledger
from ..common.masking import Told, bytes_by_name, fixed_point, revealed_fields, sent_fields, weights_of
from ..common.messages import Manifest, Tensors, Wire, is_finite, manifest_sha256
from ..common.model import model_sha256
from ..common.noise import SecureNoise
from ..common.plan import training_of
from ..common.secagg import Agreement, agree, mask, read_keys, reveal, signed_key, to_ring
from ..common.shared_noise import SharedGaussian
from ..common.tasks import Task
from ..common.tasks.metrics import score_histogram, scores_of
from ..common.witness import Asked, signatures, telling
from .datasets import Rows, Split
from .models import verified
from .outbox import Outbox
from .run_keys import RunKeys
from .training import LocalSettings, shared_gradient, train_locally

_log = logging.getLogger("hansa.node")

Fields = dict[str, Any]
"""Of a reply's manifest."""


class Doorkeeper(Protocol):
    """What the handlers need of a gate; see `gate.Gate`."""

    name: str
    ledger: Ledger

    def charter(self, sha256_hex: str) -> Charter | None:
        """An accepted charter."""

    def open_run(self, request: Manifest, request_sha256: str) -> None:
        """Hold a run's plan or raise Refused."""

    def open_runs(self) -> list[tuple[str, str]]:
        """(charter, run) of every run that may still be debited."""

    def debit(
        self, request: Manifest, request_sha256: str, purpose: str, masked: Agreement | None = None
    ) -> str | None:
        """Spend, or raise Refused; the SHA-256 of its reply when that was committed before."""

    def survivors(self, request: Manifest, request_sha256: str, agreement: str) -> list[str] | None:
        """Let an exchange after a masked vector through, or raise Refused; the list that was signed before."""

    def list_survivors(self, request: Manifest, request_sha256: str, agreed: Agreement, survivors: list[str]) -> None:
        """Record the list before its signature leaves."""

    def admit_public(self, request: Manifest, request_sha256: str) -> str | None:
        """Let a public evaluation through, or raise Refused; the SHA-256 of its reply when that was committed before."""

    def check_head(self, head: Head) -> None:
        """Raise Refused when this ledger is not what a head that this node signed states."""

    def commit(self, request: Manifest, request_sha256: str, reply_sha256: str, *, public: bool) -> None:
        """Record the reply before it leaves."""

    def refuse(self, request: Manifest, request_sha256: str, refused: Refused) -> None:
        """Record a refusal."""

    def close_run(self, run_id: str, charter_sha256: str) -> dict[str, Any]:
        """Release a run's hold; the ledger's length and head."""


class Dataset(Protocol):
    """What the handlers need of a registered data set; see `datasets.RegisteredDataset`."""

    def open(self) -> Split:
        """The rows.

        Raises:
            DataError: they cannot be read, or are not those that were registered.
        """


class Node:
    """A partner's side of a run.

    Args:
        model: an instance of the task's model, used as scratch; one process may share it between its nodes.
        outbox: where finished replies are kept; None in simulations of more than 100 clients.
        identity: signs closing checkpoints; None there as well.
        keep: where models that closing messages deliver are kept, one folder a run; None there as well.
        heads: where heads of others' ledgers that this node countersigned are kept; None there as well.
        keys: of secure aggregation; None there as well.
    """

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        dataset: Dataset,
        gate: Doorkeeper,
        wire: Wire,
        *,
        coordinator: str = "coordinator",
        outbox: Outbox | None = None,
        identity: Identity | None = None,
        keep: Path | None = None,
        heads: KeptHeads | None = None,
        keys: RunKeys | None = None,
    ) -> None:
        self._task = task
        self._model = model
        self._dataset = dataset
        self._gate = gate
        self._wire = wire
        self._coordinator = coordinator
        self._outbox = outbox
        self._identity = identity
        self._keep = keep
        self._heads = heads
        self._keys = keys
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}

    # -- requests ----------------------------------------------------------------------------------------------------

    def open(self, request: Manifest, digest: str, _: Tensors) -> RecordDict:
        """Accept or refuse a whole run."""
        charter = self._agreed(request)
        if (secure := charter.secure_aggregation) is not None and secure.dimension != (size := self._dimension()):
            raise Refused(Refusal.NUMERIC, f"the model has {size} parameters, agreed are {secure.dimension}")
        if secure is None:
            self._gate.open_run(request, digest)
            return self._wire.encode(request.reply("accepted", digest), self._wire.pack({}))[0]
        try:
            fixed_point(charter)
        except ConfigError as err:  # before anything is held for rounds that could not be summed
            raise Refused(Refusal.NUMERIC, err.message) from err
        identity, keys = self._masker()
        run = request.charter_sha256, request.run_id
        # One key a run, made before the run is held: where it is held and has none, the key is lost, and no second one is signed.
        fresh = run not in self._gate.open_runs()
        private = keys.make(*run) if fresh else keys.get(*run)
        try:
            self._gate.open_run(request, digest)
            if run not in self._gate.open_runs():
                raise Refused(Refusal.NOT_HELD, "this run is over here")
        except Refused:
            self._forget_keys()
            raise
        self._forget_keys()
        key = base64.b64encode(signed_key(identity, request.charter_sha256, request.run_id, private)).decode()
        return self._wire.encode(request.reply("accepted", digest, key=key), self._wire.pack({}))[0]

    def train(self, request: Manifest, digest: str, tensors: Tensors) -> RecordDict:
        """One round of local training; answers with the update w_after − w_before."""
        self._check_model(tensors)
        asked = self._asked(request)
        charter = self._agreed(request)
        agreed = self._attempt(request, charter, tensors) if charter.secure_aggregation is not None else None
        before = self._gate.debit(request, digest, "train", agreed)
        if before is not None:
            return self._again(request, before)
        rows = self._rows().train

        def update() -> tuple[Tensors, Fields]:
            settings = local_settings(charter)
            seed = None if settings.event else round_seed(charter.model_seed, request.round, self._gate.name)
            declared = _declared(charter, self._gate.name)
            return train_locally(self._model, self._task.loss, tensors, rows, settings, declared, seed=seed), {}

        def masked() -> tuple[Tensors, Fields]:
            assert agreed is not None
            identity, keys = self._masker()
            event, fixed = training_of(charter), fixed_point(charter)
            if isinstance(event, SharedGaussian):
                values = shared_gradient(self._model, self._task.loss, tensors, rows, event)
            else:
                flat = np.concatenate([part.reshape(-1) for part in update()[0].values()]).astype(np.float64)
                values = fixed.to_grid(flat, weights_of(charter)[self._gate.name])
            private = keys.get(request.charter_sha256, request.run_id)
            vector, sent = mask(agreed, identity, private, to_ring(values, agreed.bits))
            return {"masked": vector}, {"sent": sent_fields(sent)}

        if agreed is None:
            return self._answer(request, digest, "update", update, public=False, asked=asked)
        return self._answer(request, digest, "masked", masked, public=False, asked=asked)

    def agree(self, request: Manifest, digest: str, _: Tensors) -> RecordDict:
        """Sign who the survivors of an attempt are; one list an attempt, on disk before its signature leaves."""
        charter, agreed = self._told(request)
        identity, _keys = self._masker()
        before = self._gate.survivors(request, digest, agreed.digest)
        words = bytes_by_name(request.fields.get("words"))
        signature = agree(agreed, identity, words, _identities(charter), before)
        if before is None:
            self._gate.list_survivors(request, digest, agreed, sorted(words))
        encoded = base64.b64encode(signature).decode()
        return self._wire.encode(request.reply("survivors", digest, signature=encoded), self._wire.pack({}))[0]

    def reveal(self, request: Manifest, digest: str, _: Tensors) -> RecordDict:
        """What opens the sum over the survivors that this node signed, and no other."""
        charter, agreed = self._told(request)
        _identity, keys = self._masker()
        survivors = self._gate.survivors(request, digest, agreed.digest)
        if survivors is None:
            raise Refused(Refusal.SECAGG_SURVIVORS, "this node signed no list of survivors for this attempt")
        revealed = reveal(
            agreed,
            self._gate.name,
            keys.get(request.charter_sha256, request.run_id),
            survivors,
            bytes_by_name(request.fields.get("signatures")),
            bytes_by_name(request.fields.get("shares")),
            _identities(charter),
        )
        return self._wire.encode(
            request.reply("shares", digest, revealed=revealed_fields(revealed)), self._wire.pack({})
        )[0]

    def evaluate(self, request: Manifest, digest: str, tensors: Tensors) -> RecordDict:
        """Measure the model on held-out rows, as the charter's evaluation says."""
        self._check_model(tensors)
        self._asked(request)
        evaluation = self._agreed(request).evaluation
        public = evaluation.kind == "public"
        before = self._gate.admit_public(request, digest) if public else self._gate.debit(request, digest, "evaluate")
        if before is not None:
            return self._again(request, before)
        rows = self._rows().held_out

        def scores() -> tuple[Tensors, Fields]:
            return {"scores": self._scores(tensors, rows), "labels": rows.y.numpy()}, {}

        def histogram() -> tuple[Tensors, Fields]:
            found, _ = scores()
            binary = len(self._task.classes) == 2
            counts = score_histogram(found["scores"], found["labels"], evaluation.bins, binary=binary)
            assert evaluation.noise_multiplier is not None
            # One record is one count: sensitivity 1 under add-or-remove-one: the multiplier is the standard deviation.
            return {"histogram": counts + SecureNoise().gaussian(counts.shape, evaluation.noise_multiplier)}, {}

        if public:
            return self._answer(request, digest, "scores", scores, public=True)
        return self._answer(request, digest, "histogram", histogram, public=False)

    def close(self, request: Manifest, digest: str, _: Tensors) -> RecordDict:
        """Release what the run still holds; answers with this ledger's length and head."""
        head = self._gate.close_run(request.run_id, request.charter_sha256)
        if self._outbox is not None:
            self._outbox.drop(request.run_id)
        self._forget_keys()
        return self._wire.encode(request.reply("head", digest, **head), self._wire.pack({}))[0]

    def sign(self, request: Manifest, digest: str, _: Tensors) -> RecordDict:
        """Sign a closing checkpoint that states this ledger as it is."""
        assert self._identity is not None
        payload = _closing(request)
        head = self._gate.close_run(request.run_id, request.charter_sha256)
        self._forget_keys()
        owners = self._agreed(request).keys()
        signature = sign_closing(self._identity, payload, request.run_id, request.charter_sha256, owners, head)
        encoded = base64.b64encode(signature).decode()
        return self._wire.encode(request.reply("signature", digest, signature=encoded), self._wire.pack({}))[0]

    def deliver(self, request: Manifest, digest: str, tensors: Tensors) -> RecordDict:
        """Verify what a run came to, and keep it: model, manifest and closing checkpoint, on disk before the reply.

        Nothing of this is in the ledger, which was closed and countersigned before.
        """
        if self._keep is None:
            raise MessageError("this node keeps no models")
        if tensors and not self._fits(tensors):
            raise MessageError("a model whose tensors are not those of the task, or not finite")
        delivery = verified(
            _closing(request),
            request.fields.get("about"),
            tensors,
            request.run_id,
            self._agreed(request),
            request.charter_sha256,
            self._gate.name,
            self._gate.ledger,
        )
        delivery.keep(self._keep, tensors)
        return self._wire.encode(request.reply("kept", digest), self._wire.pack({}))[0]

    # -- parts -------------------------------------------------------------------------------------------------------

    def handle(self, kind: str, message: Message) -> Message:
        """Verify, work, reply; a refusal becomes a signed reply.

        Raises:
            MessageError: the request is not the coordinator's, or of another kind than it was delivered as; nothing is
                answered in the node's name.
            OutputError, LedgerError: the node cannot record what it does, so it does nothing.
        """
        request, tensors, digest = self._wire.decode(message.content, self._coordinator)
        if request.kind != kind:
            raise MessageError(f"a request to {request.kind}, delivered as one to {kind}")
        work = {
            "open": self.open,
            "train": self.train,
            "agree": self.agree,
            "reveal": self.reveal,
            "evaluate": self.evaluate,
            "close": self.close,
            "sign": self.sign,
            "deliver": self.deliver,
        }[kind]
        try:
            reply = work(request, digest, tensors)
        except Refused as refused:
            self._gate.refuse(request, digest, refused)
            fields = {"reason": refused.reason.value, "detail": refused.detail}
            reply = self._wire.encode(request.reply("refused", digest, **fields), self._wire.pack({}))[0]
        return Message(reply, reply_to=message)

    def _answer(
        self,
        request: Manifest,
        digest: str,
        kind: str,
        work: Callable[[], tuple[Tensors, Fields]],
        *,
        public: bool,
        asked: Asked | None = None,
    ) -> RecordDict:
        """Do the work that was paid for, and commit its one answer before it leaves.

        Whatever goes wrong from here on saw data or noise, so it is answered too, by the same words every time, and a
        repeated request gets this answer again: a second attempt would be a second release under one debit.
        """
        try:
            tensors, fields = work()
        except (OutputError, LedgerError, MemoryError):
            raise  # of this machine, like a crash: nothing was answered, the debit stays good
        except Exception as err:
            _log.error("%s: round %s failed: %s", self._gate.name, request.round, without_words(err))
            kind, tensors, fields = "failed", {}, {}
        if asked is not None:
            fields = {**fields, **self._witnessed(asked)}
        reply, reply_sha256 = self._wire.encode(request.reply(kind, digest, **fields), self._wire.pack(tensors))
        if self._outbox is not None:
            self._outbox.put(request.run_id, request.request_id, reply)
        self._gate.commit(request, digest, reply_sha256, public=public)
        return reply

    def _again(self, request: Manifest, reply_sha256: str) -> RecordDict:
        """The committed reply and no other: what an attempt before a crash left in an older outbox is a second draw."""
        if self._outbox is None:
            raise MessageError(f"{request.request_id} was answered before")
        reply = self._outbox.get(request.run_id, request.request_id)
        if manifest_sha256(reply) != reply_sha256:
            raise MessageError(f"the reply to {request.request_id} in the outbox is not the one that was committed")
        return reply

    def _asked(self, request: Manifest) -> Asked | None:
        """What the request asks about heads; checked before anything is spent.

        Raises:
            MessageError: malformed.
            Refused: this ledger is not what this node itself signed before: it was put back to an older copy.
        """
        if self._heads is None:
            return None
        asked = Asked.parse(request.fields.get("witness"), self._agreed(request).keys(), self._gate.name)
        if asked.yours is not None:
            self._gate.check_head(asked.yours)
        return asked

    def _witnessed(self, asked: Asked) -> dict[str, Any]:
        """The fields that answer it: this ledger's head, and signatures under heads of others, which are on disk."""
        assert self._heads is not None
        assert self._identity is not None
        signed = self._heads.witness(asked.heads)
        stands = {}
        if behind := {head.owner for head, _ in asked.heads} - set(signed):
            stands = {o: head.length for o in sorted(behind) if (head := self._heads.newest(o)) is not None}
            _log.warning(
                "%s: heads that do not extend what was signed before: %s", self._gate.name, ", ".join(sorted(behind))
            )
        mine = telling(self._identity, self._gate.ledger, asked.since)
        return {"head": mine, "witnessed": signatures(signed, self._identity.key), "stands": stands}

    def _told(self, request: Manifest) -> tuple[Charter, Agreement]:
        """The attempt that an exchange after a masked vector is about: the model's name is told, its tensors were sent before."""
        charter, model = self._agreed(request), request.fields.get("model_sha256")
        if charter.secure_aggregation is None or not isinstance(model, str):
            raise Refused(Refusal.SECAGG_TERMS, "no attempt at secure aggregation")
        return charter, self._attempt(request, charter, model)

    def _attempt(self, request: Manifest, charter: Charter, model: Tensors | str) -> Agreement:
        """The attempt that a request is for, checked against the charter.

        Args:
            model: the tensors that came with it, or their name.

        Raises:
            MessageError: malformed.
            Refused: a key, roster, threshold, quorum or ring that is not what was agreed.
        """
        identity, keys = self._masker()
        told = Told.parse(request.fields.get("masked"))
        public = read_keys(told.envelopes, request.charter_sha256, request.run_id, _identities(charter))
        name = model if isinstance(model, str) else model_sha256(model)
        agreed = told.agreement(request.charter_sha256, request.run_id, request.round, name, public)
        private = keys.get(request.charter_sha256, request.run_id)
        secure = charter.secure_aggregation
        assert secure is not None
        agreed.check(identity.name, private, [m.name for m in charter.partners], secure.colluding, charter.quorum)
        if (agreed.length, agreed.bits) != (secure.dimension, fixed_point(charter).bits):
            raise Refused(
                Refusal.SECAGG_TERMS, f"{agreed.length} numbers of {agreed.bits} bits are not what the charter comes to"
            )
        if agreed.attempt > secure.retries:
            raise Refused(
                Refusal.SECAGG_TERMS,
                f"attempt {agreed.attempt}, and {counted(secure.retries, 'retry', 'retries')} agreed",
            )
        return agreed

    def _masker(self) -> tuple[Identity, RunKeys]:
        assert self._identity is not None
        assert self._keys is not None
        return self._identity, self._keys

    def _forget_keys(self) -> None:
        """Of every run that is over: closed, signed for, or ended (expired, left) while nobody closed it."""
        if self._keys is not None:
            self._keys.keep_only(self._gate.open_runs())

    def _dimension(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def _agreed(self, request: Manifest) -> Charter:
        charter = self._gate.charter(request.charter_sha256)
        if charter is None:
            raise Refused(Refusal.CHARTER_UNKNOWN, "this node accepted no such charter")
        return charter

    def _check_model(self, tensors: Tensors) -> None:
        """Refuse a model of another shape before anything is spent on it. Looks at the request only."""
        if not self._fits(tensors):
            raise Refused(Refusal.NUMERIC, "the model's tensors are not those of the task, or not finite")

    def _fits(self, tensors: Tensors) -> bool:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        return shapes == self._shapes and all(t.dtype == np.float32 for t in tensors.values()) and is_finite(tensors)

    def _rows(self) -> Split:
        """The registered rows. That they cannot be read says nothing of them: refused, and the debit stays good."""
        try:
            return self._dataset.open()
        except DataError as err:
            _log.error("%s: the registered dataset cannot be read: %s", self._gate.name, without_words(err))
            # Nor as its cause: whoever shows this refusal with its history would show the words.
            raise Refused(Refusal.DATA, "the registered dataset cannot be read; see the node's own log") from None

    def _scores(self, tensors: Tensors, rows: Rows) -> npt.NDArray[np.float32]:
        """Scores [n, classes] in batches, so that memory does not grow with the held-out rows."""
        model = self._model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.from_numpy(np.array(tensors[name])))
            model.eval()
            parts = [scores_of(model(x)) for x in torch.split(rows.x, 1024) if len(x)]
            model.train()
        return np.concatenate(parts) if parts else np.zeros((0, len(self._task.classes)), np.float32)


def make_client_app(find: Callable[[Context], Node]) -> ClientApp:
    """The ClientApp. `find` gives the node that a message is for (a real process has one)."""
    app = ClientApp()

    @app.query("open")
    def _open(message: Message, context: Context) -> Message:
        return find(context).handle("open", message)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return find(context).handle("train", message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        return find(context).handle("evaluate", message)

    @app.query("agree")
    def _agree(message: Message, context: Context) -> Message:
        return find(context).handle("agree", message)

    @app.query("reveal")
    def _reveal(message: Message, context: Context) -> Message:
        return find(context).handle("reveal", message)

    @app.query("close")
    def _close(message: Message, context: Context) -> Message:
        return find(context).handle("close", message)

    @app.query("sign")
    def _sign(message: Message, context: Context) -> Message:
        return find(context).handle("sign", message)

    @app.query("deliver")
    def _deliver(message: Message, context: Context) -> Message:
        return find(context).handle("deliver", message)

    return app


def without_words(err: BaseException) -> str:
    """An exception for a log: its class and the innermost places in the code, not its words: they may hold record values."""
    frames = traceback.extract_tb(err.__traceback__)[-_PLACES:]
    places = [f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}" for f in reversed(frames)]
    return f"{type(err).__name__} at {' < '.join(places) or 'an unknown place'}"


_PLACES = 3


def local_settings(charter: Charter) -> LocalSettings:
    """A round's local work, exactly as the charter has it."""
    local, privacy = charter.algorithm.local, charter.privacy
    return LocalSettings(
        steps=local.steps,
        sampling_rate=local.sampling_rate,
        optimizer=local.optimizer.name,
        lr=local.optimizer.lr,
        momentum=local.optimizer.momentum,
        proximal_mu=charter.algorithm.strategy.proximal_mu or 0.0,
        # Central noise protects the whole update, at the coordinator: what a client does is not protected by record.
        clip_norm=privacy.clip_norm if privacy.kind != "central" else None,
        noise_multiplier=privacy.noise_multiplier if privacy.kind != "central" else None,
    )


def round_seed(model_seed: int, round_number: int, name: str) -> int:
    """Seed of the batches of one unprotected round, so that a resumed run repeats them. Never used for noise."""
    return int(sha256(f"{model_seed}:{round_number}:{name}".encode())[:15], 16)


def _identities(charter: Charter) -> dict[str, str]:
    return {member.name: member.key for member in charter.partners}


def _closing(request: Manifest) -> bytes:
    """The closing checkpoint that a request carries.

    Raises:
        MessageError: it is not base64.
    """
    try:
        return base64.b64decode(str(request.fields.get("closing", "")), validate=True)
    except ValueError as err:
        raise MessageError("a closing checkpoint that is not base64") from err


def _declared(charter: Charter, name: str) -> int:
    member = charter.member(name)
    if member is not None:
        return member.declared_records
    assert charter.population is not None
    return charter.population.declared_records
