"""The ServerApp that a stock `flower-superlink` runs: the coordinator's round loop over Flower's own Grid.

The bundle that `flwr run` sends only names this module. Which coordinator this is says HANSA_SERVER in the SuperLink's
environment, or else the run's configuration (`hansa-server`): the path of a server.yaml on this machine.

Flower's Grid knows node ids and not partners, takes no iterators, stops for one slow reply, and raises what a malformed
one makes it raise. `StockGrid` stands between: partners have the node ids that they have on our own link, and are found by
asking every node who it is.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..common.errors import ConfigError, MessageError, RunFailed
from ..common.events import EventLog
from ..common.flower import (
    CLIENT_APP_FAILED,
    DEFAULT_TTL,
    HELLO_TYPE,
    NODE_UNAVAILABLE,
    ConfigRecord,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    Run,
    ServerApp,
    addressed,
    flowers_own,
)
from ..common.identity import PASSPHRASE, read_envelope, strict_json
from ..common.model import write_model
from .rounds import Outcome
from .service import Service
from .settings import load_settings
from .status import WAITING

if TYPE_CHECKING:
    from .link import GrpcGrid

HELLO_S = 60.0
"""So long nodes have to say who they are; one that does, does it in about five seconds."""
MEET_PART = 0.25
"""Of a request's time, so much goes at most into finding the partner that it is for."""
BACK_S = 20.0
"""So long a node that went away is looked for again: a SuperLink lets one that was started anew in when it gives the old one up."""
POLL_S = 0.25
"""Between two times that Flower's Grid is asked for one reply."""
AGAIN_S = 5.0
"""Between two rounds of asking nodes who they are."""


@dataclass
class _Sent:
    """A message that was pushed. `like` has what its reply refers to, without the content."""

    like: Message
    node: int
    deadline: float  # time.monotonic
    reply: Message | None = None


class StockGrid(Grid):
    """Flower's own Grid, as the round loop needs one.

    Whatever is wrong with a reply, or with the way to a node, is an error reply *of that partner* and nobody else's matter.
    Replies are fetched as they come by one thread a message, so that one which comes by drops holds up no other; of those
    that are there `receiving` at most are held in memory.

    Args:
        grid: of a SuperLink.
        keys: partner -> identity key (hex), as the charter has them.
        roster: partner -> the node id that the round loop knows it by.
        where: partner -> the SuperLink's node id, as far as known; `meet` finds the others.
    """

    def __init__(
        self,
        grid: Grid,
        keys: Mapping[str, str],
        roster: Mapping[str, int],
        receiving: int,
        where: Mapping[str, int] | None = None,
    ) -> None:
        self._grid = grid
        self._keys = dict(keys)
        self._names = {node: name for name, node in roster.items()}
        self._roster = dict(roster)
        self._where = dict(where or {})
        self._gone: dict[str, float] = {}  # partner -> when its node went away (time.monotonic)
        self._sent: dict[str, _Sent] = {}
        self._wanted: set[str] = set()
        self._changed = threading.Condition()
        self._slots = threading.Semaphore(receiving)
        self._count = 0

    # -- who is where ------------------------------------------------------------------------------------------------

    def connected(self) -> dict[str, dict[str, str]]:
        """Partner -> where it was met, as `server.status` has it."""
        told = {"since": "", "version": "", "tls": ""}
        with self._changed:
            return {name: {**told, "address": f"SuperLink node {node}"} for name, node in self._where.items()}

    def missing(self) -> list[str]:
        """Partners that were not met, or whose node went away."""
        return [name for name in self._roster if name not in self._where]

    def meet(self, timeout_s: float = HELLO_S) -> None:
        """Ask all nodes that are no known partner's who they are, until no partner is missing or the time is over."""
        taken = set(self._where.values())
        nonce = secrets.token_hex(32)
        hello = RecordDict({"hello": ConfigRecord({"nonce": nonce})})
        asked = {
            self._push(addressed(hello, "query.hello", node, "", timeout_s, self._name()), node): node
            for node in self._grid.get_node_ids()
            if node not in taken
        }
        deadline = time.monotonic() + timeout_s
        while asked and self.missing() and (left_s := deadline - time.monotonic()) > 0:
            came = False
            for reply in self.pull_messages(list(asked)):
                came = True
                node = asked.pop(reply.metadata.reply_to_message_id)
                name = self._introduced(reply, node, nonce)
                if name is not None:
                    with self._changed:
                        self._where.setdefault(name, node)
            if not came:
                self.wait(left_s)

    def _look(self, timeout_s: float) -> None:
        """Ask once, and again while a partner that just went away may come back."""
        deadline = time.monotonic() + timeout_s
        self.meet(timeout_s)
        while (now := time.monotonic()) < deadline and any(
            now - self._gone.get(name, -math.inf) < BACK_S for name in self.missing()
        ):
            time.sleep(POLL_S)
            self.meet(deadline - now)

    def _introduced(self, reply: Message, node: int, nonce: str) -> str | None:
        """The partner that signed this hello for this node and this question; None where nobody did."""
        try:
            sealed = reply.content["hello"]["sealed"]
            envelope = read_envelope(sealed if isinstance(sealed, bytes) else b"", HELLO_TYPE)
            said = strict_json(envelope.payload)
            name = str(said["name"])
            envelope.signed_by(self._keys[name])
        except (MessageError, ValueError, KeyError, TypeError):  # an error reply, another's app, or a lie
            return None
        return name if said == {"v": 1, "name": name, "node": str(node), "nonce": nonce} else None

    # -- the Grid ----------------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one partner."""
        return addressed(content, message_type, dst_node_id, group_id, ttl or DEFAULT_TTL, self._name())

    def get_node_ids(self) -> Iterable[int]:
        """Partners that were met."""
        return [self._roster[name] for name in self._roster if name in self._where]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, one by one as they come; those to who has no node (any more) last.

        Such partners are looked for, for a part of the time that their messages have: the others work meanwhile. Who is
        not found is an error reply.
        """
        pushed: list[str] = []
        left: list[tuple[int, Message]] = []
        for message in messages:
            name = self._names.get(message.metadata.dst_node_id)
            if name is not None and name not in self._where:
                left.append((len(pushed), message))
                pushed.append("")
            else:
                pushed.append(self._push(message, self._where.get(name or "")))
        if left:
            self._look(min(HELLO_S, MEET_PART * min(message.metadata.ttl for _, message in left)))
        for place, message in left:
            pushed[place] = self._push(message, self._where.get(self._names[message.metadata.dst_node_id]))
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, each once and as it is taken; the others of these are fetched from now on."""
        wanted = list(message_ids)
        with self._changed:
            self._wanted = set(wanted)
        for name in wanted:
            with self._changed:
                sent = self._sent.get(name)
                if sent is None or sent.reply is None:
                    continue
                del self._sent[name]
                self._changed.notify_all()  # its thread lets go of its slot
            yield sent.reply
            del sent

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull until all are there or the time is over."""
        pending = set(self.push_messages(messages))
        deadline = time.monotonic() + (DEFAULT_TTL if timeout is None else timeout)
        replies: list[Message] = []
        while pending and (left_s := deadline - time.monotonic()) > 0:
            found = list(self.pull_messages(list(pending)))
            replies += found
            pending -= {reply.metadata.reply_to_message_id for reply in found}
            if not found:
                self.wait(left_s)
        return replies

    def wait(self, timeout_s: float) -> None:
        """Return when a reply is there of those that were asked for last, or the time is over."""

        def there() -> bool:
            return any(sent.reply is not None for name, sent in self._sent.items() if name in self._wanted)

        with self._changed:
            self._changed.wait_for(there, timeout_s)

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more; what a node has begun it finishes, and nobody fetches it."""
        with self._changed:
            for name in message_ids:
                self._sent.pop(name, None)
            self._changed.notify_all()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        self._count += 1
        return f"m{self._count}"

    def _push(self, message: Message, node: int | None) -> str:
        """Send one message to a node of the SuperLink; its id, which is ours."""
        meta = message.metadata
        name = meta.message_id or self._name()
        like = addressed(
            RecordDict(), meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl, name, created_at=time.time()
        )
        sent = _Sent(like, node or 0, time.monotonic() + meta.ttl)
        with self._changed:
            for late in [other for other, one in self._sent.items() if one.deadline < time.monotonic()]:
                del self._sent[late]  # nobody came for it
            self._sent[name] = sent
        theirs = ""
        if node is not None:
            outgoing = Message(
                flowers_own(message.content),
                dst_node_id=node,
                message_type=meta.message_type,
                ttl=meta.ttl,
                group_id=meta.group_id,
            )
            theirs = next(iter(self._grid.push_messages([outgoing])), "")
        if theirs:
            threading.Thread(target=self._collect, args=(name, sent, theirs), daemon=True).start()
        else:
            self._answered(sent, Message(Error(NODE_UNAVAILABLE, "no node of this partner is there"), reply_to=like))
        return name

    def _collect(self, name: str, sent: _Sent, theirs: str) -> None:
        """Fetch one reply once it is asked for, and keep its slot until it is taken or too late."""
        while name in self._sent and (left_s := sent.deadline - time.monotonic()) > 0:
            if name in self._wanted:
                with self._slots:
                    reply = self._fetch(sent, theirs)
                    if reply is not None:
                        self._answered(sent, reply)
                        with self._changed:
                            self._changed.wait_for(lambda: name not in self._sent, left_s)
                        break
            time.sleep(POLL_S)
        with self._changed:
            self._sent.pop(name, None)

    def _fetch(self, sent: _Sent, theirs: str) -> Message | None:
        """The reply as that of the partner who was asked, if it is there."""
        try:
            found = next(iter(self._grid.pull_messages([theirs])), None)
            if found is None:
                return None
            if found.has_content():
                return Message(found.content, reply_to=sent.like)
            error = found.error
        except Exception as err:  # whatever the bytes of a peer make Flower's parsers raise
            error = Error(CLIENT_APP_FAILED, f"a reply that cannot be read: {type(err).__name__}")
        if error.code == NODE_UNAVAILABLE:  # it may come back as another node
            with self._changed:
                for name in [n for n, node in self._where.items() if node == sent.node]:
                    del self._where[name]
                    self._gone[name] = time.monotonic()
        return Message(Error(error.code, (error.reason or "the node failed")[:200]), reply_to=sent.like)

    def _answered(self, sent: _Sent, reply: Message) -> None:
        with self._changed:
            sent.reply = reply
            self._changed.notify_all()


# -- the run -------------------------------------------------------------------------------------------------------------


def run(grid: Grid, settings: Path, name: str | None, *, resume: bool, give_up: bool) -> Outcome:
    """Wait for the partners' nodes, train under the charter, close with everyone's signature, and write the model.

    Raises:
        RunFailed: too few partners are there, accepted or answered; the run can go on later.
    """
    loaded = load_settings(settings)
    log = EventLog(loaded.log, sys.stdout)
    with Service(loaded, os.environ.get(PASSPHRASE)) as service:
        run_id = service.choose(name, resume)
        keys = {member.name: member.key for member in service.charter.partners}
        stock = StockGrid(grid, keys, service.roster, loaded.uploads)
        # A status asks a Grid for nothing but who is connected.
        with service.status(run_id, cast("GrpcGrid", stock)) as status:
            status.about(address="a SuperLink")
            status.phase(WAITING)
            log.log("waiting", run=run_id, seconds=loaded.wait_for_nodes_s)

            def look(left_s: float) -> list[str]:
                stock.meet(max(1.0, min(HELLO_S, left_s)))
                missing = stock.missing()
                if missing:
                    time.sleep(min(AGAIN_S, left_s))
                return missing

            hint = "Their operators look at the SuperNode's log; then run again with hansa-resume=true."
            service.gather(look, "came to this SuperLink", hint)
            status.phase("opening")

            def notify(event: str, **facts: Any) -> None:
                status.notify(event, **facts)
                _tell(log, run_id, event, facts)

            outcome = service.coordinator(service.roster, notify).run(stock, run_id, give_up=give_up)
            if outcome.model is not None:
                write_model(loaded.model(run_id), outcome.model)
            status.phase(outcome.why)
    if outcome.why != "completed":
        raise RunFailed(
            f"run {run_id} is closed after {len(outcome.history)} rounds: too few partners accepted it, or it was given up",
            f"Who refused, and why: hansa server status {settings}",
        )
    return outcome


def _tell(log: EventLog, run_id: str, event: str, facts: Mapping[str, Any]) -> None:
    """What `flwr run --stream` shows of a run."""
    match event:
        case "round":
            log.log("round", run=run_id, round=facts["round"])
        case "answer" if facts["answer"].outcome != "ok":
            answer = {"partner": facts["partner"], "round": facts["round"], "kind": facts["kind"]}
            log.log("answer", run=run_id, **answer, state=facts["answer"].outcome, reason=facts["answer"].detail)
        case "done":
            log.log("round done", run=run_id, round=facts["round"], seconds=round(facts["seconds"], 2))
        case "closed":
            log.log("closed", run=run_id, reason=facts["why"])
        case "retry":
            log.log(
                "round asked again", run=run_id, round=facts["round"], attempt=facts["attempt"], reason=facts["why"]
            )
        case "liar":
            log.log("masks do not fit", run=run_id, round=facts["round"], partner=facts["partner"])
        case "undelivered":
            log.log("undelivered", run=run_id, partner=facts["partner"], state=facts["answer"].outcome)


app = ServerApp()
"""What the bundle's `serverapp` names."""


@app.main()
def _main(grid: Grid, context: Context) -> None:
    # What the operator of this machine says goes before what came with a run.
    path = os.environ.get("HANSA_SERVER") or context.run_config.get("hansa-server")
    if not path:
        raise ConfigError(
            "this run does not say which coordinator it is",
            "Set HANSA_SERVER for the SuperLink, or: flwr run --run-config 'hansa-server=\"/path/to/server.yaml\"'",
        )
    name = str(context.run_config.get("hansa-run") or "") or None
    resume, give_up = (bool(context.run_config.get(f"hansa-{key}", False)) for key in ("resume", "give-up"))
    if give_up and not resume:
        raise ConfigError("hansa-give-up is about a run that began", "Say so: hansa-resume=true, and its hansa-run.")
    run(grid, Path(str(path)), name, resume=resume, give_up=give_up)
