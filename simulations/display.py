"""What a run shows while it goes: each partner's round and ε spent, the evaluation, the time left. Plain lines where there is no screen."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..clients.training import NOT_FINITE
from ..common.cli import clean, plain
from .federation import Simulation
from .realism import VIRTUAL

_SHOWN = 24
_NAMED = 4
_DIVERGES = "their updates are not finite: the training diverges; lower the learning rate or the number of steps"
_LAST = 5
"""So many rounds say how long the next ones take."""
_APART_S = 0.5
"""Between two plain lines, but for the first, the last, and those with scores."""


def time_left(seconds: float) -> str:
    """A time that is left, as people say it."""
    if seconds < 1:
        return "under 1 s left"
    if seconds < 100:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 6000 else f"about {seconds / 3600:.1f} h left"


class Display:
    """A run's events as a live table, or as one line a round; of fast rounds without scores two lines a second.

    Use as a context manager around a run; pass `notify` to the simulation.

    Args:
        quiet: nothing is shown of rounds.
        told: called after each round with its number and how many there are.
    """

    def __init__(
        self, console: Console, quiet: bool = False, told: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._told = told
        self._seconds: deque[float] = deque(maxlen=_LAST)
        self._unsaid: dict[str, Any] | None = None
        self._said_at: float | None = None
        self._live: Live | None = None
        self._simulation: Simulation | None = None
        self._status: dict[str, str] = {}
        self._rounds: dict[str, int] = {}
        self._epsilon: dict[str, float] = {}
        self._most: float | None = None
        self._round = self._done = 0
        self._metrics: dict[str, float] = {}
        self._alike: dict[str, list[str]] = {}
        self._answers, self._kind = 0, ""

    def show(self, simulation: Simulation) -> None:
        """Whose run it is."""
        self._simulation = simulation
        for name in simulation.roster[:_SHOWN]:
            self._measure(name)
        if self._live is None and not self._quiet and simulation.signed.charter.privacy.kind != "none":
            self._console.print(f"epsilon below: {self._meaning()}", markup=False)

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(self._table(), console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._say_alike()
        if self._unsaid is not None:  # the run stopped before its last round
            self._line(self._unsaid)
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def notify(self, event: str, **facts: Any) -> None:
        """One event of the run."""
        match event:
            case "round":
                self._say_alike()
                self._round = facts["round"]
            case "answer":
                self._answer(facts)
            case "done":
                self._say_alike()
                self._metrics = facts["metrics"] or self._metrics
                self._done = facts["round"]
                if not self._quiet and self._simulation is not None and self._simulation.records is not None:
                    self._most = self._simulation.records.most_spent()
                self._seconds.append(facts["seconds"])
                self._told(facts["round"], self._rounds_in_all())
                if self._live is None and not self._quiet:
                    self._line_in_time(facts)
            case "refused":
                refusal = facts["refusal"]
                what = f"refused: {refusal.reason}: {refusal.detail}"
                self._alike.setdefault(_DIVERGES if NOT_FINITE in what else what, []).append(refusal.partner)
            case "contradiction":
                self._say(f"{facts['partner']}: its ledger does not extend what it signed before", "bold red")
            case "retry":
                self._say(
                    f"round {facts['round']}: {facts['why']}; asked again of {', '.join(facts['partners'])}", "yellow"
                )
            case "liar":
                self._say(f"{facts['partner']}: what it dealt or revealed does not fit", "bold red")
            case "execution":
                self._say(facts["crew"].words(), "dim")
            case "recovered":
                self._say(
                    f"{facts['ledger']}: cut off a torn last line ({facts['torn_bytes']} bytes) left by a crash",
                    "yellow",
                )
        if self._live is not None:
            self._live.update(self._table())

    def _answer(self, facts: dict[str, Any]) -> None:
        name, answer = facts["partner"], facts["answer"]
        if self._secret():  # not even that somebody failed: in which rounds tells in which of them that one was drawn
            return
        if len(self._status) < _SHOWN or name in self._status:
            virtual = answer.detail.removesuffix(VIRTUAL) if answer.detail.endswith(VIRTUAL) else answer.outcome
            self._status[name] = {"ok": "answered"}.get(answer.outcome, virtual)
            if facts["kind"] == "train" and answer.outcome == "ok":
                self._rounds[name] = facts["round"]
            if facts["kind"] in ("train", "evaluate", "open"):
                self._measure(name)
        if facts["kind"] != self._kind:
            self._say_alike()
            self._kind = facts["kind"]
        self._answers += 1
        if answer.outcome in ("invalid", "timeout", "failed") and not answer.detail.endswith(
            VIRTUAL
        ):  # those are counted, not named
            what = f"{answer.outcome}: {answer.detail}"
            self._alike.setdefault(_DIVERGES if NOT_FINITE in what else what, []).append(name)

    def _say_alike(self) -> None:
        """What went wrong with some in the last exchanges: a line for those with whom the same did."""
        for what, names in self._alike.items():
            who = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} of {self._answers} clients"
            self._say(f"{who} {what}" if what.startswith("refused") else f"{who}: {what}", "yellow")
        self._alike, self._answers = {}, 0

    def _secret(self) -> bool:
        """Whether who is asked may not be shown: clients are the unit of privacy."""
        return self._simulation is not None and self._simulation.signed.charter.privacy.unit == "client"

    def _measure(self, name: str) -> None:
        """ε spent so far by the filter that enforces the cap, from the partner's own ledger."""
        if self._quiet:
            return
        gate = self._simulation.gates.get(name) if self._simulation is not None else None
        if gate is not None and (spent := gate.spent_epsilon()) is not None:
            self._epsilon[name] = spent

    def _rounds_in_all(self) -> int:
        return self._simulation.signed.charter.algorithm.rounds if self._simulation is not None else 0

    def _left(self, number: int) -> str:
        """The time that the rounds after this one will take, in words."""
        remaining = self._rounds_in_all() - number
        if remaining <= 0 or not self._seconds:
            return ""
        return time_left(remaining * statistics.median(self._seconds))

    def _line_in_time(self, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        asked_for = facts["metrics"] or facts["round"] >= self._rounds_in_all()
        if self._said_at is None or asked_for or now - self._said_at >= _APART_S:
            self._said_at = now
            self._line(facts)
        else:
            self._unsaid = facts

    def _line(self, facts: dict[str, Any]) -> None:
        self._unsaid = None
        told = "  ".join(f"{plain(k)} {v:.4f}" for k, v in facts["metrics"].items())
        spent = max(self._epsilon.values(), default=None)
        cost = "" if spent is None else f"  epsilon spent {spent:.3f} (filter, the most of any partner)"
        cost = cost if self._most is None else f"  epsilon spent {self._most:.3f} (filter, no client more)"
        left = self._left(facts["round"])
        self._console.print(
            f"round {facts['round']:>4} of {self._rounds_in_all()}  {told}{cost}  {facts['seconds']:.2f} s"
            + (f", {left}" if left else "")
        )

    def _meaning(self) -> str:
        """What an epsilon on this screen is about."""
        assert self._simulation is not None
        charter = self._simulation.signed.charter
        delta, noise, unit = charter.privacy.delta or 0.0, charter.privacy.kind, charter.privacy.unit
        return f"filter, delta {delta:g}, {unit} level, add-or-remove-one, {noise} noise, against {charter.adversary}"

    def _say(self, text: str, style: str) -> None:
        self._console.print(Text(clean(text), style=style))

    def _table(self) -> Group:
        simulation = self._simulation
        if simulation is None:
            return Group(Text("setting up ..."))
        charter = simulation.signed.charter
        cap = charter.privacy.epsilon
        table = Table(box=None, pad_edge=False)
        for title in ("partner", "round", "epsilon spent (filter)", "cap", ""):
            table.add_column(title, justify="left" if title in ("partner", "") else "right")
        for name in simulation.roster[:_SHOWN]:
            done = f"{self._rounds.get(name, 0)}/{charter.algorithm.rounds}"
            spent = self._epsilon.get(name)
            table.add_row(
                plain(name),
                done,
                "-" if spent is None else f"{spent:.3f}",
                "none" if cap is None else f"{cap:g}",
                plain(self._status.get(name, "")),
            )
        parts: list[Any] = [table]
        if cap is not None:
            parts.append(Text(f"epsilon: {self._meaning()}", style="dim", overflow="fold", no_wrap=False))
        if len(simulation.roster) > _SHOWN:
            parts.append(Text(f"... and {len(simulation.roster) - _SHOWN:,} more clients; round {self._round}"))
        if self._most is not None:
            parts.append(Text(f"epsilon spent (filter): {self._most:.3f}, no client more"))
        if self._seconds:
            pace = (
                f"round {self._done} of {charter.algorithm.rounds}   {statistics.median(self._seconds):.2f} s a round"
            )
            left = self._left(self._done)
            parts.append(Text(pace + (f"   {left}" if left else "")))
        if self._metrics:
            rows = "public test rows" if charter.evaluation.kind == "public" else "noisy private histograms"
            told = "  ".join(f"{k} {v:.4f}" for k, v in self._metrics.items())
            parts.append(Text(clean(f"evaluation on {rows}: {told}"), style="bold"))
        return Group(*parts)
