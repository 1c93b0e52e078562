"""How long a real federation's rounds would last, and what would cross its wires, without waiting for it: a virtual clock.

`VirtualGrid` is a Grid around another Grid. Of each client that a round asks its timeline is drawn: is it there, how long does it
download, compute and upload, does it drop out. With that it is known who answers before the round is over, and only they are asked in
earnest; the others' replies are errors that say why. The clock is put forward to when the round would have ended.

    train              as above: who is not there, drops out, is too late or not needed any more has no part in the round
    evaluate           timed the same, but everybody's answer counts: it is the model that is measured, not the system
    agree, reveal      timed; who sent a masked vector is still there
    all others         of a run's opening and closing; neither timed nor counted

Nothing is kept for each registered client: a client's draws are made again, from (seed, client, round), whenever it is asked. What an
exchange came to is a line of a file on disk before its first client trains, so a resumed run goes on with the same clock.

Sources. Completion time as (bytes / bandwidth) + (time a record) x records, each client with a speed of its own, lognormal over
clients, and over-commitment: FedScale (2105.11367; `get_completion_time` and `get_completion_time_lognormal` there). Asking 30 % more
than are needed, closing a round on the target or a deadline, 6 to 10 % drop-outs, four times as many clients by night as by day: Bonawitz
et al. (1902.01046). Availability apart from drop-out, and above 10 % failing: Yang et al. (FLASH, 2006.06983).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.charter import Charter
from ..common.config import Federation, System
from ..common.errors import MessageError, OutputError
from ..common.flower import MESSAGE_UNAVAILABLE, Error, Grid, Message, RecordDict, Run
from ..common.identity import output_error, read_envelope
from ..common.messages import MESSAGE_TYPE
from .timelines import ANSWERED, FATES, Draws, Timeline, settle
from .traffic import Traffic

TIMED = ("train", "evaluate", "query.agree", "query.reveal")
VIRTUAL = " (virtual clock)"
"""How the reason of every error reply of ours ends."""
LIMITS = "an estimate of the configured system, not a measurement; docs/simulation-realism.md says what it leaves out"


class Clock:
    """What every exchange of a run came to, a JSON line each; the virtual clock stands at the sum of their seconds.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        OutputError: it cannot be read or written, or is damaged before its last line.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, Any]] = {}
        self._begun: Counter[int] = Counter()
        if path is None or not path.exists():
            return
        try:
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:  # a killed process had not finished it, so nobody had trained for it
                os.truncate(path, len(whole) + 1 if whole else 0)
            for text in whole.splitlines():
                self._take(json.loads(text))
        except OSError as err:
            raise output_error(path, err) from err
        except (ValueError, KeyError, TypeError) as err:
            raise OutputError(f"{path}: not what a run wrote", "Give another --out.") from err

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return float(self.lines[-1]["began_s"] + self.lines[-1]["seconds"]) if self.lines else 0.0

    def last(self, exchange: str) -> dict[str, Any] | None:
        """The last line of this name."""
        return self._last.get(exchange)

    def attempts(self, number: int) -> int:
        """How often a round's training was begun."""
        return self._begun[number]

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, on disk before this returns."""
        if self._path is not None:
            try:
                with open(self._path, "ab") as file:
                    file.write(json.dumps(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as err:
                raise output_error(self._path, err) from err
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if not line["seconds"] >= 0:
            raise ValueError(line)
        self.lines.append(line)
        self._last[line["exchange"]] = line
        self._begun[line["round"]] += line["kind"] == "train"


class VirtualGrid(Grid):
    """Another Grid, of whose clients only those are asked that would answer in time.

    Args:
        work: by node id, how many records it computes with in a round (records x rate x steps), and how many it has.
        deadline_s: of an exchange, in virtual seconds.
        wanted: how many answers a round of training waits for; None: for all that were asked.
        least: a round with fewer answers counts for nothing; asked again it is another attempt, of which other draws are made.
    """

    def __init__(
        self,
        inner: Grid,
        system: System,
        seed: int,
        traffic: Traffic | None = None,
        work: Callable[[int], tuple[float, float]] = lambda _: (0.0, 0.0),
        deadline_s: float = 600.0,
        wanted: int | None = None,
        least: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self._inner, self.system, self._traffic = inner, system, traffic
        self._draws = Draws(system, seed)
        self._work, self._deadline_s = work, deadline_s
        self._wanted, self._least = wanted, least
        self.clock = clock or Clock()
        self._errors: dict[str, Message] = {}
        self._pushes: dict[tuple[str, str], int] = {}

    # -- Flower's Grid -----------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The inner Grid's: a client that is away is registered all the same."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Settle who answers; the inner Grid gets their messages, in order."""
        pushed, through, exchanges = [], [], dict[tuple[str, str], list[Message]]()
        registered = self._inner.get_node_ids()
        nodes = registered if isinstance(registered, range) else frozenset(registered)
        for message in messages:
            meta = message.metadata
            if not meta.message_id:  # made by a strategy, not by create_message
                message = self.create_message(
                    message.content, meta.message_type, meta.dst_node_id, meta.group_id, meta.ttl
                )
            meta = message.metadata
            pushed.append(str(meta.message_id))
            through.append(message)
            if meta.message_type in TIMED and meta.dst_node_id in nodes:
                exchanges.setdefault((meta.message_type, meta.group_id), []).append(message)
        for (kind, group), asked in exchanges.items():
            for message, fate in zip(asked, self._exchange(kind, group, asked), strict=True):
                if fate != ANSWERED:
                    error = Error(MESSAGE_UNAVAILABLE, fate + VIRTUAL)
                    self._errors[str(message.metadata.message_id)] = Message(error, reply_to=message)
        here = [m for m in through if m.metadata.message_id not in self._errors]
        through.clear()
        exchanges.clear()
        self._inner.push_messages(here)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """First the errors, then what the inner Grid has."""
        wanted = list(message_ids)
        for identifier in wanted:
            if (error := self._errors.pop(identifier, None)) is not None:
                yield error
        yield from self._inner.pull_messages(wanted)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then take what comes until all is there or this machine's time is over."""
        missing = dict.fromkeys(self.push_messages(messages))
        end = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while missing and time.monotonic() < end:
            came = False
            for reply in self.pull_messages(list(missing)):
                if time.monotonic() >= end:
                    return replies
                came = missing.pop(str(reply.metadata.reply_to_message_id), 0) is None
                replies.append(reply)
            if not came:
                time.sleep(0.01)
        return replies

    def profile(self) -> dict[str, float]:
        """What the inner Grid's workers say of their time."""
        told = getattr(self._inner, "profile", dict)
        return dict(told())

    # -- an exchange -------------------------------------------------------------------------------------------------

    def _exchange(self, kind: str, group: str, asked: Sequence[Message]) -> list[str]:
        """Everybody's fate; the clock is put forward unless that was done before a crash."""
        number = int(group) if group.isdecimal() else 0
        nth = self._pushes[kind, group] = self._pushes.get((kind, group), 0) + 1
        name = _name_of(asked[0].content) or f"{kind}.{group}.{nth}"
        before = self.clock.last(name)
        again = before is not None and (kind != "train" or before[ANSWERED] >= self._least)
        if before is not None and again:
            began_s, attempt = float(before["began_s"]), int(before["attempt"])
        else:
            began_s = self.clock.now_s
            attempt = self.clock.attempts(number) - (kind != "train")
        down = self._traffic.request(kind) if self._traffic is not None else 0
        nodes = (message.metadata.dst_node_id for message in asked)
        timelines = [self._timeline(node, kind, number, max(attempt, 0), began_s, down) for node in nodes]
        wanted = self._wanted if kind == "train" and self._wanted is not None else len(asked)
        settled = settle(timelines, wanted, self._deadline_s)
        if not again:
            line = {"exchange": name, "kind": kind, "round": number, "attempt": attempt, "began_s": began_s}
            line |= {
                "seconds": settled.seconds,
                "asked": len(asked),
                "down": round(settled.down),
                "up": round(settled.up),
            }
            self.clock.append({**line, **{fate: settled.fates.count(fate) for fate in FATES}})
        return settled.fates if kind == "train" else [ANSWERED] * len(asked)

    def _timeline(self, node: int, kind: str, number: int, attempt: int, began_s: float, down: int) -> Timeline:
        there, drops, slowdown = self._draws.moment(node, number, attempt, began_s)
        slow, line = self._draws.traits(node)
        computed, records = self._work(node)
        up = self._traffic.reply(kind, records) if self._traffic is not None else 0
        compute, network = self.system.compute, self.system.network
        work_s = compute.overhead_s + (compute.seconds_per_record * computed if kind == "train" else 0.0)
        latency_s = network.latency_ms / 1000
        return Timeline(
            down,
            up,
            latency_s + line * _transfer_s(down, network.down_mbps),
            slow * slowdown * work_s,
            latency_s + line * _transfer_s(up, network.up_mbps),
            there or kind in ("query.agree", "query.reveal"),
            not (drops and kind == "train"),
        )


def _transfer_s(size: int, mbps: float | None) -> float:
    return 8 * size / (mbps * 1e6) if mbps is not None else 0.0


def _name_of(content: RecordDict) -> str | None:
    """What an exchange is called in all of its signed requests: run, round, purpose and attempt; None for other messages."""
    sealed = content["manifest"].get("sealed") if "manifest" in content else None
    if not isinstance(sealed, bytes):
        return None
    try:
        body = json.loads(read_envelope(sealed, MESSAGE_TYPE).payload)
        return str(body["request_id"]).rpartition(".")[0]
    except (MessageError, ValueError, KeyError, TypeError):
        return None


# -- a federation's ----------------------------------------------------------------------------------------------------


def over_sampled(config: Federation) -> Federation:
    """The same, with as many partners asked in a round as `system.over_sampling` says: what its charter states, and is paid for."""
    if config.system is None or not config.system.over_sampling:
        return config
    participation = min(1.0, config.algorithm.participation * (1 + config.system.over_sampling))
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"participation": participation})})


def realistic(
    inner: Grid,
    config: Federation,
    charter: Charter,
    shapes: Mapping[str, tuple[int, ...]],
    classes: int,
    declared: Callable[[int], float],
    path: Path,
) -> Grid:
    """The Grid that a simulation runs over: `inner` itself when its configuration has no `system`.

    Args:
        config: as it was given, not `over_sampled`.
        declared: declared records by node id.
        path: of the clock's file.

    Raises:
        OutputError: the clock's file cannot be read.
    """
    if (system := config.system) is None:
        return inner
    local = config.algorithm.local
    return VirtualGrid(
        inner,
        system,
        config.seed,
        Traffic(charter, shapes, classes),
        lambda node: (declared(node) * local.sampling_rate * local.steps, declared(node)),
        system.deadline_s or config.round_deadline_s,
        max(1, round(config.algorithm.participation * config.size)),
        config.quorum,
        Clock(path),
    )


def told(grid: Grid) -> dict[str, Any]:
    """{"system": what `result.json` says of the virtual clock}; empty without one."""
    return {"system": summary(grid.clock, grid.system)} if isinstance(grid, VirtualGrid) else {}


def summary(clock: Clock, system: System) -> dict[str, Any]:
    """A row a round, and the totals. Seconds of a round hold those of its evaluation and of attempts that failed; fates are of training."""
    rows: dict[int, dict[str, Any]] = {}
    for line in clock.lines:
        row = rows.setdefault(
            line["round"],
            {"round": line["round"], "seconds": 0.0, "evaluate_s": 0.0, "bytes_down": 0, "bytes_up": 0, "asked": 0}
            | dict.fromkeys(FATES, 0),
        )
        row["seconds"] += line["seconds"]
        row["bytes_down"] += line["down"]
        row["bytes_up"] += line["up"]
        if line["kind"] == "evaluate":
            row["evaluate_s"] += line["seconds"]
        if line["kind"] == "train":
            for key in ("asked", *FATES):
                row[key] += line[key]
    rounds = [rows[number] for number in sorted(rows)]
    counted = ("seconds", "evaluate_s", "bytes_down", "bytes_up", "asked", *FATES)
    return {
        "estimate": LIMITS,
        "settings": system.model_dump(),
        "rounds": rounds,
        "totals": {key: sum(row[key] for row in rounds) for key in counted},
    }


def in_words(system: Mapping[str, Any]) -> str:
    """One line of `summary`."""
    rounds, totals = system["rounds"], system["totals"]
    if not rounds:
        return "virtual clock: no round was begun"
    lasted = [row["seconds"] for row in rounds]
    others = ", ".join(f"{totals[fate]:,} {fate}" for fate in FATES[1:] if totals[fate])
    return (
        f"virtual clock: {len(rounds)} round{'s' if len(rounds) != 1 else ''} in {duration(totals['seconds'])} "
        f"(median {duration(statistics.median(lasted))}, longest {duration(max(lasted))}), "
        f"{volume(totals['bytes_down'])} down, {volume(totals['bytes_up'])} up; asked to train {totals['asked']:,} times, "
        f"answered {totals[ANSWERED]:,}{': ' + others if others else ''}; an estimate"
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172800 else f"{seconds / 86400:.3g} days"


def volume(size: float) -> str:
    """Bytes in words, in powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
