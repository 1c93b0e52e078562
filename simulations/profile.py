"""Where a round's time goes, measured from outside: nothing in the round loop, the nodes or the Grid knows of it.

While a `Profile` measures, some functions are replaced by ones that say which phase begins and ends; afterwards they are as they
were, so that a run without a profile costs nothing more. At every moment one phase is running, the innermost: what a round took
is the sum of its phases, and "other" is what no function below is about.

A Grid whose clients work in other processes can have a method `profile() -> dict[str, float]`: seconds by phase ("forward and backward",
"sampling", "noise", ...) that its workers spent since it was last asked, of all workers together. It is asked when a round
begins and when it ends, and the time for which the round loop waited for updates is divided by its words.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from rich.table import Table

from ..clients import app as node_app
from ..common.cli import plain
from ..common.errors import counted
from ..common.flower import Message
from ..common.heads import KeptHeads
from ..common.ledger import Ledger
from ..common.noise import SecureNoise
from ..server.central import ClippedSum
from ..server.checkpoint import Checkpoint
from ..server.rounds import Coordinator
from ..server.strategies import ServerOptimizer
from .federation import Notify, Simulation

RECORD = "select and record"
SEND = "send"
TRAIN = "train: "
WAIT = TRAIN + "messages, outboxes, waiting"
FOLD = "fold"
MASKS = "open the sum"
NOISE = "central noise"
STEP = "server step"
EVALUATE = "evaluate"
CHECKPOINT = "checkpoint"
OTHER = "other"
_ORDER = [RECORD, SEND, TRAIN, FOLD, MASKS, NOISE, STEP, EVALUATE, CHECKPOINT, OTHER]

_TAPS: list[tuple[Any, str, str]] = [
    (Coordinator, "_cohort", RECORD),
    (Coordinator, "_witness", RECORD),
    (Coordinator, "_record", RECORD),
    (Ledger, "append", RECORD),  # a node's own, too
    (KeptHeads, "keep", RECORD),
    (KeptHeads, "witness", RECORD),
    (Coordinator, "_encoded", SEND),
    (node_app, "train_locally", TRAIN + "forward and backward"),
    (node_app, "shared_gradient", TRAIN + "forward and backward"),
    (SecureNoise, "bernoulli", TRAIN + "sampling"),
    (SecureNoise, "gaussian", TRAIN + "noise"),
    (SecureNoise, "discrete_gaussian", TRAIN + "noise"),
    (Coordinator, "_train", FOLD),
    (Coordinator, "_train_masked", FOLD),
    (Coordinator, "_train_central", FOLD),
    (Coordinator, "_receive", FOLD),
    (ClippedSum, "noised", NOISE),
    (ServerOptimizer, "step", STEP),
    (ServerOptimizer, "state", STEP),
    (Checkpoint, "average_in", STEP),
    (Coordinator, "_evaluate", EVALUATE),
    (Checkpoint, "save", CHECKPOINT),
]
"""What begins a phase, by the name under which it is called."""
_RECORDS = ("asked", "answered", "round", "attempts")
_WITHIN: dict[str, set[str]] = {EVALUATE: {RECORD, CHECKPOINT, OTHER}, NOISE: set()}
"""Phases to which all that happens within them belongs, but for these."""


class Profile:
    """Seconds by phase of every round that was measured. Pass `notify` to the simulation, and run it within `measuring`."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._open: list[str] = []
        self._since = 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.get_ident()
        self._pulled = WAIT
        self._grid: Any = None

    def notify(self, to: Notify) -> Notify:
        """A listener to a run's events that measures rounds, and hands everything on."""

        def heard(event: str, **facts: Any) -> None:
            if event == "done":
                self._end()
            with self._in(OTHER):
                to(event, **facts)
            if event == "round":
                self._begin()

        return heard

    @contextmanager
    def measuring(self, simulation: Simulation) -> Iterator[None]:
        """Measure the rounds that are run within."""
        with ExitStack() as stack:
            records = simulation.coordinator._records
            for owner, name, phase in [*_TAPS, *((records, name, RECORD) for name in _RECORDS)]:
                stack.enter_context(_replaced(owner, name, self._timed(getattr(owner, name), phase)))
            self._grid = simulation.grid
            push, pull = simulation.grid.push_messages, simulation.grid.pull_messages
            stack.enter_context(_replaced(self._grid, "push_messages", self._pushing(push)))
            stack.enter_context(_replaced(self._grid, "pull_messages", self._pulling(pull)))
            yield

    def fields(self) -> dict[str, Any]:
        """For `result.json`: the mean seconds a round of each phase, and its share of the time.

        Means, because some phases are not in every round, and because they add up. The first round starts things up (imports,
        first calls), so of several rounds it is in neither, and told by itself.
        """
        took = [sum(one.values()) for one in self.rounds]
        usual = self.rounds[1:] or self.rounds
        total = sum(sum(one.values()) for one in usual)
        return {
            "rounds": len(took),
            "total_s": sum(took),
            "first_s": took[0] if took else None,
            "round_s": total / len(usual) if took else None,
            "phases": {
                phase: {
                    "mean_s": sum(one.get(phase, 0.0) for one in usual) / len(usual),
                    "share": sum(one.get(phase, 0.0) for one in usual) / total,
                }
                for phase in sorted({phase for one in usual for phase in one}, key=_place)
            },
        }

    # -- the clock ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._of_workers()  # what was before the round
        self._spent.clear()
        self._open, self._since = [OTHER], time.perf_counter()

    def _end(self) -> None:
        if not self._open:
            return
        self._switch()
        self._open = []
        self._divide(self._of_workers())
        self.rounds.append({phase: seconds for phase, seconds in self._spent.items() if seconds})

    def _switch(self) -> None:
        """Charge the time since the last switch to the innermost phase."""
        now = time.perf_counter()
        self._spent[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        # Outside of rounds, and in threads of which the round loop knows nothing, nothing is measured.
        if not self._open or threading.get_ident() != self._thread:
            yield
            return
        self._switch()
        outer = next((one for one in self._open if one in _WITHIN and phase not in _WITHIN[one]), phase)
        self._open.append(outer)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _of_workers(self) -> dict[str, float]:
        told = getattr(self._grid, "profile", None)
        return {str(k): float(v) for k, v in told().items() if v > 0} if callable(told) else {}

    def _divide(self, told: dict[str, float]) -> None:
        """Divide the time spent on updates as the workers say; of more seconds than there were, by their proportions."""
        if not told:
            return
        here = [phase for phase in self._spent if phase.startswith(TRAIN)]
        there_was = sum(self._spent.pop(phase) for phase in here)
        scale = min(1.0, there_was / sum(told.values()))
        for phase, seconds in told.items():
            self._spent[TRAIN + phase] += seconds * scale
        self._spent[WAIT] += max(0.0, there_was - scale * sum(told.values()))

    # -- what is measured --------------------------------------------------------------------------------------------

    def _timed(self, work: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(work)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self._in(phase):
                return work(*arguments, **named)

        return timed

    def _pushing(self, push: Callable[[Iterable[Message]], Iterable[str]]) -> Callable[[Iterable[Message]], list[str]]:
        def seen(messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                self._pulled = WAIT if message.metadata.message_type == "train" else MASKS
                yield message

        def pushed(messages: Iterable[Message]) -> list[str]:
            with self._in(SEND):
                return list(push(seen(messages)))

        return pushed

    def _pulling(self, pull: Callable[[Iterable[str]], Iterable[Message]]) -> Callable[..., Iterator[Message]]:
        def pulled(message_ids: Iterable[str]) -> Iterator[Message]:
            with self._in(self._pulled):
                replies = iter(pull(message_ids))
            while True:
                with self._in(self._pulled):
                    reply = next(replies, None)
                if reply is None:
                    return
                yield reply
                del reply  # before the next one is there

        return pulled


@contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """Give a module, class or object another attribute for a while."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _place(phase: str) -> tuple[int, str]:
    group = next((one for one in _ORDER if phase.startswith(one)), OTHER)
    return _ORDER.index(group), phase


def over_runs(profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs' profiles as one: of each figure the mean over runs."""
    several = [one for one in profiles if one["rounds"]]
    round_s = statistics.fmean(one["round_s"] for one in several) if several else None
    named = sorted({phase for one in several for phase in one["phases"]}, key=_place)
    means = {
        phase: statistics.fmean(one["phases"].get(phase, {"mean_s": 0.0})["mean_s"] for one in several)
        for phase in named
    }
    return {
        "runs": len(several),
        "rounds": sum(one["rounds"] for one in several),
        "total_s": sum(one["total_s"] for one in several),
        "first_s": statistics.fmean(one["first_s"] for one in several) if several else None,
        "round_s": round_s,
        "phases": {phase: {"mean_s": mean, "share": mean / (round_s or 1.0)} for phase, mean in means.items()},
    }


def profile_table(fields: Mapping[str, Any]) -> Table:
    """A profile for a terminal."""
    first, usual = fields["first_s"] or 0.0, fields["round_s"] or 0.0
    of = f" of {counted(fields['runs'], 'run')}" if "runs" in fields else ""
    title = f"where the time of a round went: {usual:.4f} s, the mean of {fields['rounds']} rounds{of}; the first took {first:.2f} s"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in ("phase", "seconds (mean)", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, spent in fields["phases"].items():
        table.add_row(plain(phase), f"{spent['mean_s']:.4f}", f"{spent['share']:.1%}")
    return table
