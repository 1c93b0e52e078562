"""What left the node of one stream, against the caps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from hansa.clients.law import Control
from hansa.common.accounting import PrivacyEvent
from hansa.common.errors import HansaError
from hansa.common.heads import read_head
from hansa.common.ledger import read_ledger

from . import oracle
from .world import CAP_CHANGED, NODE, World, identity


class Played(Protocol):
    """A stream that is over."""

    w: World
    regime: str
    rollbacks: Counter[str]
    undetectable: int
    pressed: float


@dataclass
class Result:
    """What came of one stream.

    Attributes:
        overspent: lineages and charters for which more left than their cap allows, as the oracle has it.
        hidden_overspent: the same, counting what stood in an outbox that was read after a crash and did not leave.
        faults: answered twice, tensors where none may be, a release that no debit pays for.
        pressed: the largest share of a lineage's ε that the filter had counted as spent or held.
        histories: what left, by lineage, with its cap.
        behind: what left from a ledger that was not what a head says that an honest coordinator had.
        forked: what others hold and contradicts the ledger at the end: "head", "answer" or "".
        missed: the node went on from an older state, something left since, and nothing contradicts it.
    """

    seed: int
    regime: str
    overspent: list[str]
    hidden_overspent: bool
    faults: list[str]
    actions: int
    crashes: int
    starts: int
    rollbacks: Counter[str]
    undetectable: int
    answers: Counter[str]
    stopped: Counter[str]
    faulted: Counter[str]
    releases: int
    pressed: float
    histories: list[tuple[dict[tuple[float, float], int], float, float]]
    behind: Counter[str]
    forked: str
    missed: bool
    seconds: float


def judge(stream: Played, seed: int, seconds: float) -> Result:
    """What left, against the caps."""
    w = stream.w
    left = [(one.charter, w.draws[one.draw]) for one in w.releases.values()]
    seen = {one.draw for one in w.releases.values()}
    hidden = [w.draws[n] for n in w.hidden - seen if n < len(w.draws)]
    overspent, histories = [], []
    hidden_overspent = False
    faults = [*w.faults, *_unpaid(w)]
    for lineage in sorted(set(w.lineage_of.values())):
        mine = [(sha, draw) for sha, draw in left if w.lineage_of[draw.rows] == lineage]
        if not mine:
            continue
        cap = w.caps.get(lineage)
        history = _history(draw for _, draw in mine)
        if cap is None or history is None or oracle.verdict(history, *cap):
            overspent.append(f"lineage at {cap}")
        elif not hidden_overspent:
            more = _history([*(d for _, d in mine), *(d for d in hidden if w.lineage_of[d.rows] == lineage)])
            hidden_overspent = more is None or oracle.verdict(more, *cap)
        if history is not None and lineage in w.filters and not oracle.filter_admits(history, w.filters[lineage]):
            faults.append("more left than the filter admits")
        if cap is not None and history is not None:
            histories.append((history, *cap))
        for signed in w.charters:
            own = _history(draw for sha, draw in mine if sha == signed.sha256)
            privacy = signed.charter.privacy
            assert privacy.epsilon is not None
            assert privacy.delta is not None
            if own is None or oracle.verdict(own, privacy.epsilon, privacy.delta):
                overspent.append(f"charter at {privacy.epsilon, privacy.delta}")
    forked = _contradicted(w)
    return Result(
        seed=seed,
        regime=stream.regime,
        overspent=overspent,
        hidden_overspent=hidden_overspent,
        faults=faults,
        actions=w.actions,
        crashes=w.crashes,
        starts=w.starts,
        rollbacks=stream.rollbacks,
        undetectable=stream.undetectable,
        answers=w.answers,
        stopped=w.stopped,
        faulted=Counter(w.disk.crashes),
        releases=len(w.releases),
        pressed=stream.pressed,
        histories=histories,
        behind=w.behind,
        forked=forked,
        missed=bool(overspent or [one for one in faults if one != CAP_CHANGED]) and not forked,
        seconds=seconds,
    )


def _history(draws: Any) -> dict[tuple[float, float], int] | None:
    """None: something was not protected at all."""
    made: dict[tuple[float, float], int] = {}
    for draw in draws:
        if not draw.protected:
            return None
        made[draw.q, draw.sigma] = made.get((draw.q, draw.sigma), 0) + draw.steps
    return made


def _final(w: World) -> list[Any]:
    """The ledger that an auditor would be given."""
    try:
        return read_ledger(w.folder / "state" / "ledger.jsonl", identity(NODE).key)[0]
    except HansaError:
        return []


def _unpaid(w: World) -> list[str]:
    """Releases for which the ledger at the end has no debit of exactly that event, on that lineage, and no commit.

    A node that was restored and not proved may have lost them: it spends nothing.
    """
    if Control(w.settings.control).restored.exists():
        return []
    entries = _final(w)
    lineages = {e.body["dataset"]: e.body["lineage"] for e in entries if e.type == "dataset"}
    debits = {(e.charter, e.body["request_id"]): e.body for e in entries if e.type == "debit"}
    commits = {(e.charter, e.body["request_id"]) for e in entries if e.type == "commit"}
    found = []
    for one in w.releases.values():
        body, draw = debits.get((one.charter, one.request)), w.draws[one.draw]
        if body is None or (one.charter, one.request) not in commits:
            found.append("a release that no debit pays for")
            continue
        event = PrivacyEvent.from_fields(body["event"])
        if (event.sampling_rate, event.noise_multiplier, event.steps) != (draw.q, draw.sigma, draw.steps):
            found.append("a release of another event than was debited")
        if lineages[body["dataset"]] != w.lineage_of[draw.rows]:
            found.append("a release of other data than was debited")
    return found


def _contradicted(w: World) -> str:
    """ "head": one that left is not of the ledger at the end. "answer": one that left is not in it. "": neither."""
    entries = _final(w)
    for (length, root), sealed in w.kept.items():
        read_head(sealed, {NODE: identity(NODE).key})  # signed by the node: it cannot deny it
        if length > len(entries) or entries[length - 1].root != root:
            return "head"
    commits = {(e.charter, e.body["request_id"], e.body["reply_sha256"]) for e in entries if e.type == "commit"}
    lost = any((one.charter, one.request, name) not in commits for name, one in w.releases.items())
    return "answer" if lost else ""
