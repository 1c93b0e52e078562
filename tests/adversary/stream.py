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

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hansa.clients import custody
from hansa.clients.law import Control
from hansa.clients.registry import Relation
from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import SignedCharter
from hansa.common.closing import CLOSING_TYPE, closing_payload
from hansa.common.errors import HansaError
from hansa.common.flower import RecordDict
from hansa.common.heads import read_head
from hansa.common.identity import Envelope, write_envelope
from hansa.common.ledger import read_ledger
from hansa.common.messages import Manifest
from hansa.common.witness import asking

from . import oracle
from .disk import Crash, Image, use
from .world import (
    BEYOND,
    CAP_CHANGED,
    COORDINATORS,
    NODE,
    PEER,
    World,
    charter,
    encoded,
    identity,
    message,
    words,
    world,
)

REGIMES = ("node", "heads", "withheld")
CAPS = [(e, d) for e in (0.5, 1.0, 2.0, 4.0, 8.0) for d in (1e-3, 1e-4, 1e-5)]
RATES = (1.0, 1.0, 0.3, 0.1, 0.03)
SIGMAS = tuple(float(f"{s:.3g}") for s in np.geomspace(0.8, 60.0, 22))
UNSEEN = ("whole disk", "ledger and counter", "counter forged")
"""What the node cannot see by itself."""
MODEL = {"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
BENT = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
BROKEN = {"weight": np.full((2, 3), np.nan, np.float32), "bias": np.zeros(2, np.float32)}


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


@dataclass
class Stream:
    """The adversary of one stream."""

    w: World
    rng: random.Random
    regime: str
    sent: list[tuple[int, RecordDict, str]] = field(default_factory=list)
    copies: list[Image] = field(default_factory=list)
    backups: list[Path] = field(default_factory=list)
    closings: list[tuple[int, Path]] = field(default_factory=list)
    rollbacks: Counter[str] = field(default_factory=Counter)
    undetectable: int = 0
    number: int = 0
    pressed: float = 0.0
    full: set[int] = field(default_factory=set)
    patience: float = 0.85
    true: Image = field(default_factory=dict)

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

    def trap(self) -> None:
        """A fault at one of the next operations."""
        rng = self.rng
        kind = rng.choice(("kill", "power", "power", "power", "error"))
        self.w.disk.arm(rng.randint(1, 12), kind, rng.choice(("before", "within", "after")))

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

    # -- files -------------------------------------------------------------------------------------------------------

    def restart(self) -> bool:
        """Stop and start; the start may be what crashes."""
        if self.rng.random() < 0.3:
            self.trap()
        started = self.w.start()
        self.w.disk.trap = None
        return started

    def repair(self) -> None:
        """The node does not start: the steward looks again, and again without faults."""
        if not self.w.start() and self.copies:
            # It is stuck with what a disk that lost power made of it. Its newest whole copy is an older one.
            self.files()

    def keep(self) -> None:
        """A copy of everything, or a backup."""
        if self.rng.random() < 0.6 or not (self.w.folder / "state" / "ledger.jsonl").exists():
            self.copies.append(self.w.disk.live())
        else:
            self.backup()

    def backup(self) -> None:
        """As `hansa node backup` does."""
        path = self.w.folder / f"backup-{len(self.backups)}.tar"
        try:
            custody.backup(self.w.settings, path)
        except HansaError as err:
            self.w.stopped[f"backup, {type(err).__name__}: {words(err.message)}"] += 1
        else:
            self.backups.append(path)

    def files(self) -> None:
        """Stop the node, change its files, start it. Where that is seen, put back what was there."""
        rng = self.rng
        self.w.stop()
        self.true = true = self.w.disk.live()
        if not true.get("ledger.jsonl"):
            return
        ways: list[Callable[[Image], str | None]] = [
            self.older_ledger,
            self.older_ledger,
            self.older_all_but_counter,
            self.cut_ledger,
            self.edited_ledger,
            self.no_counter,
            self.spoilt_counter,
            self.edited_registration,
            self.begun_again,
            self.no_outbox,
            self.withdrawn_and_back,
        ]
        if rng.random() < 0.25 and self.backups:
            self.restore(true)
            return
        if self.regime != "node" and rng.random() < 0.6:
            ways = [self.whole_disk, self.whole_disk, self.ledger_and_counter, self.forged_counter]
        image = dict(true)
        what = rng.choice(ways)(image)
        if what is None:
            return
        shown = what in UNSEEN and self.regime == "heads"
        lines = (image.get("ledger.jsonl") or b"").count(b"\n")
        if shown and (self.w.newest is None or lines >= self.w.newest[0]):
            self.w.start()  # no head covers what would be lost
            return
        self.undetectable += what in UNSEEN
        self.rollbacks[what] += 1
        self.w.disk.put(image)
        started = self.restart()
        if not started:
            self.rollbacks[f"{what}: refused"] += 1
            started = self.w.start()  # was it a fault that stopped it, or what it saw?
        if shown:
            self.behind()
        elif not started:
            self.w.disk.put(self.true)
            self.w.start()

    def behind(self) -> None:
        """Go on for a while on an older disk; then the true one comes back, with nothing lost if nothing left."""
        for _ in range(self.rng.randint(1, 6)):
            if self.w.site is not None or self.w.start():
                self.go_on()
        self.w.stop()
        self.w.disk.put(self.true)
        self.w.start()

    def older(self, image: Image, longest: int | None = None) -> Image | None:
        """A copy from when the ledger was shorter."""
        ledger = image["ledger.jsonl"] or b""
        found = [
            copy
            for copy in self.copies
            if (old := copy.get("ledger.jsonl")) and len(old) < len(ledger) and ledger.startswith(old)
        ]
        return self.rng.choice(found) if found else None

    def older_ledger(self, image: Image) -> str | None:
        """The ledger alone is put back."""
        if (copy := self.older(image)) is None:
            return None
        image["ledger.jsonl"] = copy["ledger.jsonl"]
        return "older ledger"

    def older_all_but_counter(self, image: Image) -> str | None:
        """Ledger, outbox, heads, registrations, what commands said: everything but the counter."""
        if (copy := self.older(image)) is None:
            return None
        counter = image.get("counter")
        image.clear()
        image.update(copy)
        if counter is None:
            image.pop("counter", None)
        else:
            image["counter"] = counter
        return "older everything but the counter"

    def cut_ledger(self, image: Image) -> str | None:
        """Its last lines are gone, perhaps with a torn one in their place."""
        lines = (image["ledger.jsonl"] or b"").splitlines(keepends=True)
        keep = self.rng.randrange(len(lines)) if self.rng.random() < 0.3 else len(lines) - 1
        torn = lines[keep][: self.rng.randrange(len(lines[keep]))] if self.rng.random() < 0.5 else b""
        image["ledger.jsonl"] = b"".join(lines[:keep]) + torn
        return "cut ledger"

    def edited_ledger(self, image: Image) -> str:
        """A line is changed, dropped, repeated, or in another place."""
        rng = self.rng
        lines = (image["ledger.jsonl"] or b"").splitlines(keepends=True)
        at = rng.randrange(len(lines))
        way = rng.choice(("edit", "drop", "repeat", "swap", "digit"))
        if way == "drop" and at < len(lines) - 1:
            del lines[at]
        elif way == "repeat":
            lines.insert(at, lines[at])
        elif way == "swap" and at < len(lines) - 1:
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        else:
            line = bytearray(lines[at])
            place = rng.randrange(len(line) - 1)
            line[place] = (line[place] + 1) % 256 if way == "edit" else ord(str(rng.randrange(10)))
            if bytes(line) == lines[at]:
                line[place] ^= 1
            lines[at] = bytes(line)
        image["ledger.jsonl"] = b"".join(lines)
        return "edited ledger"

    def no_counter(self, image: Image) -> str:
        """The counter is deleted, and perhaps the ledger put back with that."""
        image.pop("counter", None)
        if (copy := self.older(image)) is not None and self.rng.random() < 0.6:
            image["ledger.jsonl"] = copy["ledger.jsonl"]
        elif self.rng.random() < 0.3:
            image["ledger.jsonl"] = b""
        elif self.rng.random() < 0.3:
            del image["ledger.jsonl"]
        return "counter deleted"

    def spoilt_counter(self, image: Image) -> str | None:
        """The counter is cut, its slots swapped, or bytes of it changed; the ledger is as it was, or older where both slots stay."""
        rng = self.rng
        data = bytearray(image.get("counter") or b"")
        if not data:
            return None
        way = rng.choice(("cut", "swap", "edit", "empty"))
        if way == "swap":
            data = data[256:].ljust(256) + data[:256]
            if (copy := self.older(image)) is not None:
                image["ledger.jsonl"] = copy["ledger.jsonl"]
        elif way == "cut":
            del data[rng.randrange(len(data)) :]
        elif way == "empty":
            data.clear()
        else:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        image["counter"] = bytes(data)
        return "counter spoilt"

    def edited_registration(self, image: Image) -> str | None:
        """Another lineage, another data set, another ledger, other rows, a registration missing, or two exchanged."""
        rng = self.rng
        found = [name for name in image if name.endswith("/dataset.json")]
        if not found:
            return None
        name = rng.choice(found)
        try:
            said = json.loads(image[name] or b"")
        except ValueError:  # a disk that flushes nothing made this of it
            return None
        way = rng.choice(("lineage", "dataset_id", "ledger_id", "declared", "key", "rows", "gone", "exchange", "older"))
        if way in ("lineage", "dataset_id"):
            said[way] = f"{rng.getrandbits(128):032x}"
        elif way == "ledger_id":
            said[way] = rng.choice((None, "0" * 32))
            if said[way] is None and rng.random() < 0.5:  # and the ledger is emptied; the counter stays
                image["ledger.jsonl"] = b""
        elif way == "declared":
            said[way] = {"kind": rng.choice(("first", "disjoint", "version")), "of": None, "cutoff": None}
        elif way == "key":
            said[way] = f"{rng.getrandbits(256):064x}"
        image[name] = json.dumps(said, indent=1).encode()
        source = name.replace("dataset.json", "source.json")
        if way == "rows":
            other = rng.choice(("rows-0.csv", "rows-1.csv", "rows-7.csv"))
            image[source] = json.dumps({"task": "tiny", "data": other, "held_out": None}).encode()
        elif way == "gone":
            del image[name]
        elif way == "exchange" and len(found) > 1:
            for part in ("dataset.json", "source.json"):
                one, two = f"datasets/a/{part}", f"datasets/b/{part}"
                image[one], image[two] = image.get(two), image.get(one)
        return f"registration: {way}"

    def begun_again(self, image: Image) -> str:
        """Ledger and counter are gone; the registrations stay."""
        image.pop("counter", None)
        del image["ledger.jsonl"]
        return "ledger and counter deleted"

    def no_outbox(self, image: Image) -> str:
        """Finished replies are lost, or are those of an older day."""
        copy = self.older(image)
        old = {n: d for n, d in (copy or {}).items() if n.startswith("outbox/")}
        for name in [n for n in image if n.startswith("outbox/")]:
            del image[name]
        image.update(old)
        return "older outbox"

    def withdrawn_and_back(self, image: Image) -> str | None:
        """A charter is withdrawn, which frees its holds; then the file that says so is deleted."""
        control = Control(self.w.settings.control)
        control.withdraw(self.rng.choice(self.w.charters).sha256)
        self.w.disk.settle()
        if self.w.start():
            self.go_on()
        self.w.stop()
        self.true = made = self.w.disk.live()
        image.clear()
        image.update({n: d for n, d in made.items() if not n.startswith("control/withdrawn/")})
        return "withdrawal undone"

    # What the node cannot see by itself.

    def whole_disk(self, image: Image) -> str | None:
        """Everything as it was on an earlier day."""
        if (copy := self.older(image)) is None:
            return None
        image.clear()
        image.update(copy)
        return "whole disk"

    def ledger_and_counter(self, image: Image) -> str | None:
        """The ledger, and the counter with it."""
        if (copy := self.older(image)) is None or "counter" not in copy:
            return None
        for name in ("ledger.jsonl", "counter"):
            image[name] = copy[name]
        return "ledger and counter"

    def forged_counter(self, image: Image) -> str | None:
        """The newest of the counter's slots is wiped, and the ledger's last line cut."""
        lines = (image["ledger.jsonl"] or b"").splitlines(keepends=True)
        data = bytearray((image.get("counter") or b"").ljust(512))
        if len(lines) < 3:
            return None
        at = (len(lines) - 1) % 2 * 256
        data[at : at + 256] = b" " * 256
        image["ledger.jsonl"], image["counter"] = b"".join(lines[:-1]), bytes(data)
        return "counter forged"

    # -- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, true: Image) -> None:
        """Put a backup back, over the state or without its ledger, and prove what can be proved. The counter stays, but where
        everything may be lost."""
        rng, lost = self.rng, False
        image = dict(true)
        if rng.random() < 0.7:
            image.pop("ledger.jsonl", None)
        if self.regime != "node" and rng.random() < 0.5:
            image.clear()
            self.undetectable += 1
            lost = True
        self.w.disk.put(image)
        given = [path for _, path in self.closings if rng.random() < 0.7]
        if self.regime == "heads":
            given = [path for _, path in self.closings]  # honest peers give all that they have
        if rng.random() < 0.3:
            self.trap()
        result = "?"
        try:
            with use(self.w.disk):
                doubt = custody.restore(self.w.settings, rng.choice(self.backups), given if rng.random() < 0.7 else [])
                if doubt is not None and rng.random() < 0.5:
                    doubt = custody.prove(self.w.settings, given)
            result = "proved" if doubt is None else "in doubt"
        except Crash:
            self.w.fall()
            result = "crashed"
        except HansaError as err:
            result = f"refused, {type(err).__name__}"
        except OSError:
            result = "failed"
        self.w.disk.trap = None
        self.rollbacks[f"restore: {result}"] += 1
        if result == "in doubt" and self.w.start():  # whatever is asked now must be refused
            for _ in range(rng.randrange(1, 5)):
                if self.w.site is not None:
                    self.go_on()
            self.w.stop()
        elif lost and self.regime == "withheld" and rng.random() < 0.5 and self.w.start():
            return
        if result == "proved" or (result == "in doubt" and rng.random() < 0.05):
            self.w.start()
            return
        # The disk was not lost after all. Nothing left the node since it was taken out.
        self.w.disk.put(true)
        self.w.start()


@lru_cache(maxsize=8192)
def _most_steps(budget: Budget, q: float, sigma: float) -> int:
    return min(budget.most_steps(q, sigma), 4000)


# -- the judge -----------------------------------------------------------------------------------------------------------


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


def judge(stream: Stream, seed: int, seconds: float) -> Result:
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
