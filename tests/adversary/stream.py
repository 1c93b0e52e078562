"""One stream: an adversary who sees everything chooses what comes next, and a judge says what left.

The adversary is both coordinators, the network, the power supply and a steward who edits files. It reads the ledger, each
reply and each refusal, and mostly does what brings the budget nearer to its end, and then what might pass it: replays, other
content under a known name, rounds out of order, runs of equal names, crashes within each step, copies put back, edited files.

Three regimes, by what is in the node's power:

  node      whatever is done to ledger, outbox, kept heads and registrations, as long as the counter is not put back with them; restores
            on the machine. Coordinators withhold all heads. Nothing may be overspent
  heads     the whole disk may be put back; each request to train shows the newest head that left. Nothing may be overspent
  withheld  the whole disk may be put back, and nobody shows the node a head. It cannot know; but of each such stream a head or an
            answer that others hold must contradict the ledger that it ends with
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from hansa.clients.registry import Relation
from hansa.common.accounting import Budget
from hansa.common.charter import SignedCharter
from hansa.common.closing import CLOSING_TYPE, closing_payload
from hansa.common.flower import RecordDict
from hansa.common.heads import read_head
from hansa.common.identity import Envelope, write_envelope
from hansa.common.messages import Manifest
from hansa.common.witness import asking

from .files import Steward
from .judge import Result, judge
from .world import BEYOND, COORDINATORS, NODE, PEER, charter, encoded, identity, message, world

REGIMES = ("node", "heads", "withheld")
CAPS = [(e, d) for e in (0.5, 1.0, 2.0, 4.0, 8.0) for d in (1e-3, 1e-4, 1e-5)]
RATES = (1.0, 1.0, 0.3, 0.1, 0.03)
SIGMAS = tuple(float(f"{s:.3g}") for s in np.geomspace(0.8, 60.0, 22))
MODEL = {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
BENT = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
BROKEN = {"weight": np.full((2, 3), np.nan, np.float32), "bias": np.zeros(2, np.float32)}


@dataclass
class Stream(Steward):
    """The adversary of one stream.

    Attributes:
        sent: every message, with the charter it was under and its kind.
        pressed: the largest share of a lineage's cap that the filter counted as spent.
        full: charters that were refused for the budget.
        patience: how likely a run goes on before another one is opened.
    """

    sent: list[tuple[int, RecordDict, str]] = field(default_factory=list)
    number: int = 0
    pressed: float = 0.0
    full: set[int] = field(default_factory=set)
    patience: float = 0.85

    # -- terms -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Data sets, and a charter of each coordinator."""
        rng = self.rng
        self.patience = rng.choice((0.9, 0.9, 0.4))  # one run to its end, or many at once
        self.w.register("a")
        relation = rng.choice(("alone", "version", "overlap", "overlap", "disjoint"))
        if relation == "version":
            self.w.register("b", Relation(version_of="a"))
        elif relation == "overlap":
            self.w.register("b", Relation(overlaps=("a",)))
        elif relation == "disjoint":
            self.w.register("b", Relation(collected_from="2026-01-01"))
        names = ["a"] if relation == "alone" else ["a", "b"]
        cap = rng.choice(CAPS)
        for index, who in enumerate(COORDINATORS):
            # The second coordinator's cap is another half of the time.
            self.w.join(
                self.terms(f"charter-{index}", who, cap if rng.random() < 0.5 else rng.choice(CAPS)), rng.choice(names)
            )
        self.names = names
        self.w.disk.settle()

    def terms(self, name: str, who: str, cap: tuple[float, float], whole: float | None = None) -> SignedCharter:
        """A plan that takes some share of the cap."""
        rng = self.rng
        budget = Budget.create(*cap)
        q = rng.choice(RATES)
        share = whole or rng.choice((0.15, 0.3, 0.5, 0.95))
        rounds = rng.randint(1, 3)
        most = 0
        for sigma in SIGMAS[rng.randrange(10) :]:
            most = _most_steps(budget, q, sigma)
            if most * share >= rounds:
                break
        steps = max(1, int(most * share) // rounds)
        evaluation: dict[str, Any] = {"kind": "none"}
        if rng.random() < 0.4:
            evaluation = {
                "kind": "private",
                "noise_multiplier": sigma * rng.choice((1.0, 2.0, 4.0)),
                "every": rng.randint(1, 2),
            }
        return self.signed(name, who, cap, q, sigma, steps, rounds, evaluation)

    def signed(
        self,
        name: str,
        who: str,
        cap: tuple[float, float],
        q: float,
        sigma: float,
        steps: int,
        rounds: int,
        evaluation: Any,
    ) -> SignedCharter:
        """A charter of these terms."""
        return charter(
            name,
            who,
            algorithm={"rounds": rounds, "local": {"steps": steps, "sampling_rate": q, "optimizer": {"lr": 0.1}}},
            privacy={"epsilon": cap[0], "delta": cap[1], "clip_norm": 1.0, "noise_multiplier": sigma},
            evaluation=evaluation,
        )

    # -- seeing ------------------------------------------------------------------------------------------------------

    def standing(self) -> Any:
        """The gate's own state; a hostile steward can read it."""
        return None if self.w.site is None else self.w.site.gate._standing

    def look(self) -> None:
        """How near a lineage is to its cap."""
        standing = self.standing()
        if standing is None:
            return
        for name, account in standing.accounts.items():
            if account.budget is not None:
                # A run may be held up to its cap; what was debited of it counts here.
                self.pressed = max(self.pressed, account.budget.spent(standing.spent(name)) / account.budget.epsilon)

    # -- what may be done --------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One action."""
        rng = self.rng
        if self.w.site is None and not self.w.start():
            self.repair()
            return
        kind = rng.choices(("on", "odd", "fault", "stop", "files", "keep"), (56, 14, 14, 2, 8, 6))[0]
        if kind == "on":
            self.go_on()
        elif kind == "odd":
            self.odd()
        elif kind == "fault":
            self.trap()
            self.go_on()
            self.w.disk.trap = None
        elif kind == "stop":
            self.restart()
        elif kind == "files":
            self.files()
        else:
            self.keep()

    def go_on(self) -> None:
        """What brings the budget nearer to its end."""
        rng, standing = self.rng, self.standing()
        open_runs = []
        for (sha, run), hold in standing.holds.items():
            number = self.index(sha)
            if hold.open and number is not None and any(n > 0 for n in hold.left.values()):
                open_runs.append((number, run, hold))
        if open_runs and rng.random() < self.patience:
            number, run, hold = rng.choice(open_runs)
            self.next_round(number, run, hold)
            return
        closable = [n for n in range(len(self.w.charters)) if n not in self.full]
        if closable:
            number = rng.choice(closable)
            reply = self.open(number, f"run-{rng.randrange(5)}" if rng.random() < 0.5 else f"run-{self.tick()}")
            if reply is not None and reply.fields.get("reason") == "budget":
                self.full.add(number)
            return
        if len(self.w.charters) < 5:
            self.fill()
        else:
            self.odd()

    def next_round(self, number: int, run: str, hold: Any) -> None:
        """A round that is planned and not taken."""
        rng, signed = self.rng, self.w.charters[number]
        purposes = sorted({purpose for (purpose, _), n in hold.left.items() if n > 0})
        purpose = rng.choice(purposes)
        rounds = [r for r in range(1, signed.charter.algorithm.rounds + 1) if (purpose, r) not in hold.rounds]
        waiting = [  # debited and not answered: the same request again
            one for one in self.sent[-8:] if one[0] == number and one[2] == purpose
        ]
        if waiting and rng.random() < 0.2:
            self.again(rng.choice(waiting))
            return
        chosen = rng.choice(rounds) if rounds and rng.random() < 0.9 else rng.randint(0, 5)
        self.ask(number, purpose, run, chosen)

    def fill(self) -> None:
        """A new charter whose plan is exactly what is left."""
        rng, standing = self.rng, self.standing()
        name = rng.choice(self.names)
        lineage = self.w.lineage_of[{"a": "rows-0.csv", "b": "rows-1.csv"}[name]]
        account = standing.accounts.get(lineage)
        if account is None or account.budget is None:
            return
        for key, hold in standing.holds.items():  # first, let go of what is only held
            number = self.index(key[0])
            if hold.open and number is not None and rng.random() < 0.7:
                self.request(number, "close", key[1], 9, f"close-{self.tick()}", {}, {})
                if self.w.site is None:
                    return
                standing = self.standing()
        taken = [*standing.spent(lineage), *standing.held(lineage)]
        q = rng.choice((1.0, 1.0, 0.1))
        for sigma in SIGMAS[rng.randrange(6, 14) :: 2]:
            if most := standing.accounts[lineage].budget.most_steps(q, sigma, taken):
                break
        else:
            return
        rounds = rng.choice((1, 2))
        if most < rounds:
            return
        cap = rng.choice(((account.budget.epsilon, account.budget.delta), (8.0, 1e-3)))
        who = rng.choice(COORDINATORS)
        made = self.signed(f"fill-{self.tick()}", who, cap, q, sigma, most // rounds, rounds, {"kind": "none"})
        self.w.join(made, name)
        self.full.clear()
        if self.restart():
            self.open(len(self.w.charters) - 1, "fill")

    def odd(self) -> None:
        """What no honest coordinator does."""
        rng = self.rng
        number = rng.randrange(len(self.w.charters))
        run = rng.choice(self.runs() or ["run-0"])
        way = rng.randrange(10)
        if way <= 2 and self.sent:
            self.again(rng.choice(self.sent))
        elif way == 3 and self.sent:  # a known name, another content
            standing = self.standing()
            known = [(sha, name) for (sha, name) in standing.exchanges if self.index(sha) is not None]
            if known:
                sha, name = rng.choice(known)
                self.request(
                    self.index(sha) or 0,
                    rng.choice(("train", "evaluate", "open")),
                    run,
                    rng.randint(0, 4),
                    name,
                    {"x": self.tick()},
                    BENT,
                )
        elif way == 4:
            self.ask(number, rng.choice(("train", "evaluate")), run, rng.randint(0, 6))
        elif way == 5:
            self.open(number, run)
        elif way == 6:
            self.close_run(number, run)
        elif way == 7 and self.sent:  # one coordinator's message at the other's link
            _, records, kind = rng.choice(self.sent)
            self.w.send(number, records, kind)
        elif way == 8:
            self.w.mood = rng.choice(("fails", "memory", "dies"))
            self.go_on()
            self.w.mood = "good"
        elif rng.random() < 0.5:
            self.request(
                number,
                "train",
                run,
                1,
                f"broken-{self.tick()}",
                {},
                rng.choice((BROKEN, {}, {"weight": MODEL["weight"]})),
            )
        else:
            self.other_day()

    def other_day(self) -> None:
        """The clock jumps behind the charters' end, and back."""
        self.w.clock_days = self.rng.choice((0, BEYOND))
        self.go_on()
        if self.rng.random() < 0.5:
            self.restart()
        self.w.clock_days = 0

    def index(self, sha: str) -> int | None:
        """Which charter this is."""
        return next((n for n, signed in enumerate(self.w.charters) if signed.sha256 == sha), None)

    def runs(self) -> list[str]:
        """Every name that was ever given to a run."""
        standing = self.standing()
        return [] if standing is None else sorted({run for _, run in standing.holds})

    def tick(self) -> int:
        """A new number."""
        self.number += 1
        return self.number

    # -- messages ----------------------------------------------------------------------------------------------------

    def open(self, number: int, run: str) -> Manifest | None:
        """Ask for a whole run."""
        name = f"{run}.open" if self.rng.random() < 0.8 else f"{run}.open.{self.tick()}"
        return self.request(number, "open", run, 0, name, {}, {})

    def ask(self, number: int, purpose: str, run: str, round_number: int) -> Manifest | None:
        """Ask for one round."""
        name = f"{run}.{round_number}.{purpose}"
        if self.rng.random() < 0.15:
            name += f".{self.tick()}"
        sha = self.w.charters[number].sha256
        if self.regime == "heads" and any(
            (one.charter, one.request) == (sha, name) for one in self.w.releases.values()
        ):
            name += f".{self.tick()}"
        newest = self.w.newest if self.regime == "heads" else None
        keys = self.w.charters[number].charter.keys()
        yours = None if newest is None else read_head(self.w.kept[newest], keys)
        fields = {"witness": asking(yours, [], [])}
        return self.request(number, purpose, run, round_number, name, fields, MODEL)

    def close_run(self, number: int, run: str) -> None:
        """End a run; perhaps have its closing checkpoint signed by everybody."""
        signed = self.w.charters[number]
        reply = self.request(number, "close", run, 9, f"{run}.close", {}, {})
        if reply is None or reply.kind != "head" or self.rng.random() < 0.3:
            return
        other = {"length": 1, "root": "0" * 64}
        heads = {NODE: dict(reply.fields), PEER: other, signed.charter.coordinator.name: other}
        payload = closing_payload(run, signed.sha256, None, heads)
        answer = self.request(number, "sign", run, 9, f"{run}.sign.{self.tick()}", {"closing": encoded(payload)}, {})
        if answer is None or answer.kind != "signature":
            return
        everyone = [
            (identity(n).key, identity(n).sign(CLOSING_TYPE, payload))
            for n in (NODE, PEER, signed.charter.coordinator.name)
        ]
        path = self.w.folder / f"closing-{len(self.closings)}.json"
        path.write_bytes(write_envelope(Envelope(CLOSING_TYPE, payload, tuple(everyone))) + b"\n")
        self.closings.append((reply.fields["length"], path))
        if self.rng.random() < 0.4:
            self.backup()

    def request(
        self, number: int, kind: str, run: str, round_number: int, name: str, fields: Any, tensors: Any
    ) -> Manifest | None:
        """Send one message, and remember it."""
        records = message(self.w.charters[number], kind, run, round_number, name, fields, tensors)
        self.sent.append((number, records, kind))
        return self.w.send(number, records, kind)

    def again(self, one: tuple[int, RecordDict, str]) -> None:
        """The same bytes once more. An honest coordinator has no need to: what was answered it has, and the rest shows a newer head."""
        if self.regime != "heads":
            self.w.send(*one)


@lru_cache(maxsize=8192)
def _most_steps(budget: Budget, q: float, sigma: float) -> int:
    return min(budget.most_steps(q, sigma), 4000)


def run(seed: int, regime: str = "node", actions: int = 45, lies: bool = False) -> Result:
    """One stream from its seed."""
    begun = time.perf_counter()
    rng = random.Random(f"{regime} {seed}")
    with world(rng) as w:
        w.disk.lies = lies
        adversary = Stream(w, rng, regime)
        adversary.begin()
        w.start()
        adversary.look()
        while w.actions < actions and w.starts < actions:
            adversary.step()
            adversary.look()
        if w.site is None:
            w.start()
        return judge(adversary, seed, time.perf_counter() - begun)
