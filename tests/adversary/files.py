"""What a steward can do to a node's files, between stopping and starting it: copies put back, edits, restores from backups."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hansa.clients import custody
from hansa.clients.law import Control
from hansa.common.errors import HansaError

from .disk import Crash, Image, use
from .world import World, words

UNSEEN = ("whole disk", "ledger and counter", "counter forged")
"""What the node cannot see by itself."""


@dataclass
class Steward:
    """Who has the node's disk.

    Attributes:
        copies: of everything, from earlier.
        backups: archives of `hansa node backup`.
        closings: (length, path) of checkpoints that everybody signed.
        true: what was on the disk before it was last tampered with.
        undetectable: how often the node was given what it cannot see by itself.
    """

    w: World
    rng: random.Random
    regime: str
    copies: list[Image] = field(default_factory=list)
    backups: list[Path] = field(default_factory=list)
    closings: list[tuple[int, Path]] = field(default_factory=list)
    rollbacks: Counter[str] = field(default_factory=Counter)
    undetectable: int = 0
    true: Image = field(default_factory=dict)

    def go_on(self) -> None:
        """What the node is asked meanwhile."""
        raise NotImplementedError

    def trap(self) -> None:
        """A fault at one of the next operations."""
        rng = self.rng
        kind = rng.choice(("kill", "power", "power", "power", "error"))
        self.w.disk.arm(rng.randint(1, 12), kind, rng.choice(("before", "within", "after")))

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

    def older(self, image: Image) -> Image | None:
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
