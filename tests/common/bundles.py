"""Honest bundles, made from docs/ledger-format.md, and the means to make dishonest ones that are properly signed.

A `Draft` holds every ledger as a list of items. `write` seals, chains and countersigns whatever stands there, so a test changes
an item's data first and gets a bundle in which everything fits but that: headers say what the data say, unless an item has a
header of its own. `write_for_real` writes the same with the ledgers, heads and checkpoints that nodes and coordinators use.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hansa.common.accounting import Budget, PrivacyEvent
from hansa.common.charter import SignedCharter, SimulatedClients, draft
from hansa.common.closing import closing_payload, sign_closing
from hansa.common.config import Federation
from hansa.common.heads import HEAD_TYPE, Head, KeptHeads, sign_head
from hansa.common.identity import Envelope, Identity, canonical, public_pem, real, sha256, write_envelope
from hansa.common.ledger import ENTRY_TYPE, Ledger, redacted
from hansa.common.merkle import EMPTY, Tree, leaf_hash
from hansa.common.plan import event_from
from hansa.common.shared_noise import SharedGaussian, grid_for

CLOSING_TYPE = "application/vnd.hansa.closing+json"
EPOCH = datetime(2026, 11, 22, 1, 50, tzinfo=UTC)
MODEL = b"not really a model"
COORDINATOR = "coordinator"
OF_NO_CHARTER = ("genesis", "dataset", "recovered", "restored")
NONE = {"mechanism": "none/1"}


def identity(name: str, seed: int = 0) -> Identity:
    """The same name and seed give the same key: never use one outside tests."""
    return Identity(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()))


def digest(*parts: object) -> str:
    """Some hash."""
    return sha256(repr(parts).encode())


def short(*parts: object) -> str:
    """Some identifier of 32 hex digits."""
    return digest(*parts)[:32]


OTHER = digest("another charter")
DERIVED = "derived"
"""A header's privacy event that follows from the data."""


@dataclass
class Item:
    """An entry before it is signed."""

    kind: str
    data: dict[str, Any]
    charter: str | None = None
    privacy: Any = DERIVED
    shown: bool | None = None  # None: as the format says

    @property
    def of_no_charter(self) -> bool:
        """Whether entries of this type are about no charter."""
        return self.kind in OF_NO_CHARTER


@dataclass
class Kept:
    """A signed head in somebody's file."""

    holder: str
    owner: str
    length: int
    signers: tuple[str, ...]  # the owner first


@dataclass
class Draft:
    """A bundle before it is signed; change anything in it, then `write` it."""

    signed: SignedCharter
    people: dict[str, Identity]
    books: dict[str, list[Item]]  # owner -> entries
    closings: list[tuple[str, str | None, dict[str, int]]] = field(default_factory=list)  # run, model, lengths
    heads: list[Kept] = field(default_factory=list)
    result: dict[str, Any] | None = None
    model: bytes | None = MODEL
    start: datetime = EPOCH

    def __deepcopy__(self, memo: dict[int, Any]) -> Draft:
        """Keys and charter cannot be copied, and need not be."""
        parts = (copy.deepcopy(part, memo) for part in (self.books, self.closings, self.heads, self.result))
        return Draft(self.signed, dict(self.people), *parts, self.model, self.start)

    def item(self, owner: str, kind: str, nth: int = 0) -> Item:
        """The nth entry of that type under this charter, or under none."""
        return self.books[owner][self.index(owner, kind, nth)]

    def entry(self, owner: str, kind: str, nth: int = 0) -> dict[str, Any]:
        """Its data."""
        return self.item(owner, kind, nth).data

    def index(self, owner: str, kind: str, nth: int = 0) -> int:
        """Its place in the ledger."""
        mine = (None, self.signed.sha256)
        return [i for i, item in enumerate(self.books[owner]) if item.kind == kind and item.charter in mine][nth]

    def add(self, owner: str, kind: str, charter: str | None = None, at: int | None = None, /, **data: Any) -> Item:
        """One more entry at the end, or at some place; every statement after it is of the longer ledger.

        Args:
            charter: None: this one, where entries of that type are about one.
        """
        item = Item(kind, data, charter)
        if not (charter or item.of_no_charter):
            item.charter = self.signed.sha256
        place = len(self.books[owner]) if at is None else at
        self.books[owner].insert(place, item)
        if at is not None:
            self._moved(owner, place, 1)
        return item

    def drop(self, owner: str, at: int) -> None:
        """One entry less, as if it had never been."""
        del self.books[owner][at]
        self._moved(owner, at, -1)

    def _moved(self, owner: str, at: int, by: int) -> None:
        for _, _, lengths in self.closings:
            lengths[owner] += by * (lengths[owner] > at)
        for kept in self.heads:
            kept.length += by * (kept.owner == owner and kept.length > at)

    def close_later(self, owner: str) -> None:
        """The last checkpoint is of the whole ledger."""
        self.closings[-1][2][owner] = len(self.books[owner])

    def file(self, owner: str) -> str:
        """Where a ledger stands."""
        return "coordinator/ledger.jsonl" if owner == COORDINATOR else f"partners/{owner}/ledger.jsonl"

    # writing

    def write(self, folder: Path) -> Path:
        """The bundle in a new folder (an old one is replaced)."""
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in self.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def files(self) -> dict[str, bytes]:
        """The bundle: path -> bytes."""
        made = {owner: self.lines(owner) for owner in self.books}
        files = {"charter.json": self.signed.to_bytes()}
        files |= {f"keys/{name}.pem": public_pem(person.key) for name, person in self.people.items()}
        files |= {self.file(owner): b"".join(line + b"\n" for line in lines) for owner, (lines, _) in made.items()}
        for run_id, model, lengths in self.closings:
            stated = [{"owner": o, "length": n, "root": made[o][1][n]} for o, n in lengths.items()]
            files[f"closing/{run_id}.json"] = self.closing(run_id, model, stated)
        for kept in self.heads:
            sealed = self.head(kept.owner, kept.length, made[kept.owner][1][kept.length], kept.signers)
            files[f"heads/{kept.holder}.jsonl"] = files.get(f"heads/{kept.holder}.jsonl", b"") + sealed + b"\n"
        if self.model is not None:
            files["model.safetensors"] = self.model
        if self.result is not None:
            files["result.json"] = json.dumps(self.result).encode()
        return files

    def closing(self, run_id: str, model: str | None, stated: list[dict[str, Any]], signers: Any = None) -> bytes:
        """A checkpoint, signed by all."""
        body = {
            "v": 2,
            "run_id": run_id,
            "charter_sha256": self.signed.sha256,
            "model_sha256": model,
            "ledgers": stated,
        }
        payload = canonical(body)
        people = self.people.values() if signers is None else signers
        made = tuple((person.key, person.sign(CLOSING_TYPE, payload)) for person in people)
        return write_envelope(Envelope(CLOSING_TYPE, payload, made)) + b"\n"

    def head(self, owner: str, length: int, root: str, signers: tuple[str, ...], /, **other: Any) -> bytes:
        """A signed head, without a line break."""
        ledger_id = self.books[owner][0].data.get("ledger_id", "x")
        payload = canonical({"v": 1, "owner": owner, "ledger_id": ledger_id, "length": length, "root": root} | other)
        made = tuple((self.people[name].key, self.people[name].sign(HEAD_TYPE, payload)) for name in signers)
        return write_envelope(Envelope(HEAD_TYPE, payload, made))

    def lines(self, owner: str, full: bool = False) -> tuple[list[bytes], list[str]]:
        """A ledger's lines, and its roots by length.

        Args:
            full: as its owner has it, with everything shown.
        """
        lines, roots, tree = [], [EMPTY.hex()], Tree()
        charges = self.charges(owner)
        for seq, (item, privacy) in enumerate(zip(self.books[owner], charges, strict=True)):
            time = (self.start + timedelta(seconds=seq)).strftime("%Y-%m-%dT%H:%M:%SZ")
            body = {"salt": short(owner, seq), "time": time, "type": item.kind, "charter": item.charter}
            whole = canonical(body | {"data": item.data})
            header = {"v": 2, "seq": seq, "root": roots[-1], "body_sha256": sha256(whole), "privacy": privacy}
            payload = canonical(header)
            sealed = self.people[owner].seal(ENTRY_TYPE, payload)
            shown = full or self.shown(owner, item)
            lines.append((b'{"body":' + whole + b"," if shown else b"{") + b'"envelope":' + sealed + b"}")
            tree.append(leaf_hash(payload))
            roots.append(tree.root().hex())
        return lines, roots

    def shown(self, owner: str, item: Item) -> bool:
        """Whether an auditor of this charter gets the body."""
        if item.shown is not None:
            return item.shown
        if item.kind == "dataset" and owner != COORDINATOR:
            try:
                return item.data.get("lineage") in self.held_lineages(owner)
            except TypeError:  # nonsense that a test wrote
                return True
        return item.charter in (None, self.signed.sha256)

    def held_lineages(self, owner: str) -> set[Any]:
        """Those of the data sets that this charter's holds name."""
        of = {i.data.get("dataset"): i.data.get("lineage") for i in self.books[owner] if i.kind == "dataset"}
        holds = [i for i in self.books[owner] if i.kind == "hold" and i.charter == self.signed.sha256]
        return {of.get(hold.data.get("dataset")) for hold in holds} or set(list(of.values())[:1])

    def charges(self, owner: str) -> list[Any]:
        """Each entry's privacy event, by its data and those before it."""
        of: dict[Any, Any] = {}
        left: dict[Any, tuple[Any, dict[Any, list[Any]]]] = {}  # of a run: lineage, purpose -> [event, count]
        found = []
        for item in self.books[owner]:
            try:
                derived = None if owner == COORDINATOR else _charge(item, of, left)
            except (AttributeError, LookupError, TypeError):  # nonsense that a test wrote
                derived = None
            found.append(derived if item.privacy == DERIVED else item.privacy)
        return found

    def write_for_real(self, folder: Path) -> Path:
        """The same bundle by our own writers: ledgers, heads that are witnessed, checkpoints, redacted copies."""
        shutil.rmtree(folder, ignore_errors=True)
        own = folder.with_name(folder.name + "-own")
        shutil.rmtree(own, ignore_errors=True)
        keys = {name: person.key for name, person in self.people.items()}
        ledgers, heads = {}, dict[tuple[str, int], Head]()
        wanted = {(kept.owner, kept.length) for kept in self.heads}
        for owner, book in self.books.items():
            ledger = Ledger(own / f"{owner}.jsonl", self.people[owner], book[0].data)
            for item, privacy in list(zip(book, self.charges(owner), strict=True))[1:]:
                data = dict(item.data)
                if item.kind == "dataset" and data["declared"]["cutoff"]:  # of a day of which the real clock knows
                    data["declared"] = data["declared"] | {"cutoff": datetime.now(UTC).date().isoformat()}
                ledger.append(item.kind, data, charter=item.charter, privacy=privacy)
                if (owner, ledger.length) in wanted:
                    heads[owner, ledger.length] = sign_head(self.people[owner], ledger)
            ledger.close()
            ledgers[owner] = ledger
        for name, data in self.files().items():
            if name.startswith(("charter", "keys", "model", "result")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        for owner in self.books:
            shown = {n for n, item in enumerate(self.books[owner]) if self.shown(owner, item)}
            data = redacted((own / f"{owner}.jsonl").read_bytes(), lambda e, s=shown: e.seq in s, keys[owner])
            (folder / self.file(owner)).parent.mkdir(parents=True)
            (folder / self.file(owner)).write_bytes(data)
        for holder in {kept.holder for kept in self.heads}:
            store = KeptHeads(folder / "heads" / f"{holder}.jsonl", self.people[holder], keys)
            for kept in (kept for kept in self.heads if kept.holder == holder):
                head, before = heads[kept.owner, kept.length], store.newest(kept.owner)
                leaves = [entry.leaf for entry in ledgers[kept.owner].entries[: kept.length]]
                proof = [step.hex() for step in Tree(leaves).consistency(before.length)] if before else []
                assert kept.owner == holder or kept.owner in store.witness([(head, proof)])
                for name in kept.signers:
                    head = head.countersigned(self.people[name])
                store.keep([head])
            store.close()
        (folder / "closing").mkdir()
        for run_id, model, lengths in self.closings:
            ends = {o: {"length": n, "root": ledgers[o].entries[n - 1].root} for o, n in lengths.items()}
            payload = closing_payload(run_id, self.signed.sha256, model, ends)
            made = tuple(
                (p.key, sign_closing(p, payload, run_id, self.signed.sha256, list(ends), ends[name]))
                for name, p in self.people.items()
            )
            (folder / f"closing/{run_id}.json").write_bytes(
                write_envelope(Envelope(CLOSING_TYPE, payload, made)) + b"\n"
            )
        shutil.rmtree(own)
        return folder


def _charge(item: Item, of: dict[Any, Any], left: dict[Any, Any]) -> Any:
    data, run = item.data, (item.charter, item.data.get("run_id"))
    match item.kind:
        case "dataset":
            of[data["dataset"]] = data["lineage"]
            kind = data["declared"]["kind"]
            return {"lineage": data["lineage"], "open": kind} if kind in ("first", "disjoint") else None
        case "budget":
            return {"lineage": data["lineage"], "budget": data["budget"]}
        case "hold":
            lineage = of.get(data["dataset"])
            left[run] = (lineage, {i["purpose"]: [i["event"], i["count"]] for i in data["plan"]})
            return {"lineage": lineage, "hold": [[i["event"], i["count"]] for i in data["plan"]]}
        case "debit":
            if run in left and data["purpose"] in left[run][1]:
                left[run][1][data["purpose"]][1] -= 1
            return {"lineage": of.get(data["dataset"]), "debit": data["event"]}
        case "release":
            lineage, plan = left[run]
            return {"lineage": lineage, "release": [[event, count] for event, count in plan.values() if count > 0]}
    return None


@dataclass
class Shape:
    """What an honest bundle looks like."""

    partners: int = 3
    rounds: int = 2
    q: float = 1.0
    steps: int = 2
    kind: str = "local"
    evaluation: str = "public"
    refused_run: bool = False
    crashes: int | None = None  # seed of crashes at random places
    others: float = 0.0  # how often something happens under another charter, or a data set is registered
    runs: int = 1  # completed ones
    unfinished: bool = False  # the last run stops in its middle
    sigma: float | None = None  # else calibrated: the run spends the whole budget
    clients: int = 0  # a population
    participation: float = 1.0
    heads: bool = True
    careless: bool = False  # no gate refuses what is too dear
    golden: bool = False  # budgets of fixed shares: the bytes do not change when the choice of shares gets better
    seed: int = 0
    quorum: int = 1
    secure: int | None = None  # secure aggregation, with so many who may collude
    retries: int = 1
    silent: tuple[tuple[int, int, str, str], ...] = ()  # round, attempt, purpose, partner: who never hears of it
    again: tuple[int, ...] = ()  # rounds of which the first attempt is lost


def signed_charter(shape: Shape) -> tuple[SignedCharter, dict[str, Identity]]:
    """A charter that everyone signed, and everyone's keys (partners in order, then the coordinator)."""
    names = [] if shape.clients else [f"hospital-{i}" for i in range(shape.partners)]
    people = {name: identity(name, shape.seed) for name in [*names, COORDINATOR]}
    numbers = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 0.5}
    privacy: dict[str, Any] = {"kind": "none"} if shape.kind == "none" else {"kind": shape.kind, **numbers}
    central = shape.kind == "central"
    config: dict[str, Any] = {
        "name": "test",
        "task": "heart-disease",
        "algorithm": {
            "rounds": shape.rounds,
            "local": {"steps": shape.steps, "sampling_rate": shape.q, "optimizer": {"lr": 0.1}},
        },
        "privacy": privacy,
        "evaluation": {"kind": shape.evaluation}
        | ({"noise_multiplier": 50.0, "every": 2} if shape.evaluation == "private" else {}),
        "quorum": shape.quorum,
    }
    if central:
        config["privacy"]["unit"], config["quorum"] = "client", 0
        config["algorithm"] |= {"participation": shape.participation, "weighting": "uniform"}
    if shape.secure is not None:
        config["secure_aggregation"] = {"colluding": shape.secure, "retries": shape.retries, "dimension": 72}
    if shape.clients:
        config["population"] = {"dataset": "digits", "clients": shape.clients}
    else:
        config["partners"] = {n: {"data": f"{n}.csv", "declared_records": 200 + 10 * i} for i, n in enumerate(names)}
    sigma = shape.sigma
    if sigma is None and shape.kind != "none":
        steps = shape.steps * (shape.rounds + (shape.retries if shape.secure is not None else 0))
        if shape.evaluation == "private":
            steps += 1
        more = 1.1 if shape.evaluation == "private" or shape.kind == "shared" else 1
        q, steps = (shape.participation, shape.rounds) if central else (shape.q, steps)
        sigma = Budget.create(1.0, 1e-4).calibrate(q, steps) * more
    charter = draft(
        Federation.model_validate(config),
        task_sha256=digest("task"),
        coordinator_key=people[COORDINATOR].key,
        partner_keys={name: people[name].key for name in names},
        noise_multiplier=sigma,
        simulated=True,
        population=SimulatedClients(clients=shape.clients, declared_records=100) if shape.clients else None,
    ).model_copy(update={"created": EPOCH, "expires": EPOCH + timedelta(days=36500)})
    signed = SignedCharter.unsigned(charter)
    for person in people.values():
        signed = signed.sign(person)
    return signed, people


def filter_of(shape: Shape, epsilon: float, delta: float) -> Budget:
    """The budget that a charter of this epsilon and delta creates."""
    if not shape.golden:
        return Budget.create(epsilon, delta)
    return Budget(epsilon, delta, ((8, delta / 8), (16, delta / 8), (32, delta / 4)), delta / 2)


def honest(shape: Shape | None = None) -> Draft:
    """A whole run by honest parties, with the crashes that were asked for."""
    shape = shape or Shape()
    signed, people = signed_charter(shape)
    made = Draft(signed, people, {name: [] for name in people})
    agreed = {"name": "test", "expires": signed.charter.expires.isoformat()}
    for name, person in people.items():
        role = "partner" if name != COORDINATOR else "population" if shape.clients else "coordinator"
        genesis = {"owner": name, "role": role, "key": person.key, "ledger_id": short(name), "simulated": True}
        made.add(name, "genesis", **genesis, software="hansa 0.1.0")
        if role == "partner":
            made.add(name, "dataset", **dataset(name, shape))
        made.add(name, "charter", **agreed)
    if shape.clients:
        _population(made, shape)
    else:
        _Honest(made, shape).play()
    if not any(item.kind == "close" and item.data["why"] == "completed" for item in made.books[COORDINATOR]):
        made.model = None
    return made


def dataset(name: str, shape: Shape, number: int = 0, kind: str = "first", of: Any = None) -> dict[str, Any]:
    """A registered data set, the first or a later one."""
    some = shape.evaluation != "none"
    lineage = short(name, "lineage", number) if of is None else of["lineage"]
    declared = {"kind": kind, "of": None if of is None else of["dataset"]}
    return {
        "dataset": short(name, "dataset", number),
        "lineage": lineage,
        "task": "heart-disease",
        "commitment": digest(name, number),
        "held_out": {
            "kind": shape.evaluation if some else "none",
            "commitment": digest(name, number, "held out") if some else None,
        },
        "declared": declared | {"cutoff": EPOCH.date().isoformat() if kind == "disjoint" else None},
    }


class _Site:
    """What a partner's gate knows."""

    def __init__(self, first: dict[str, Any]) -> None:
        self.datasets = [first]
        self.using = first  # for this charter
        self.budgets: dict[str, Budget] = {}
        self.taken: dict[
            str, Counter[tuple[str, PrivacyEvent]]
        ] = {}  # lineage -> (charter, event) that is spent or held
        self.unbounded: set[str] = set()
        self.runs = 0  # under the other charter
        self.open: tuple[str, dict[str, Any], list[dict[str, Any]]] | None = None  # of the other: run, data set, plan

    def admits(self, lineage: str, charter: str, plan: list[dict[str, Any]], agreed: Budget) -> bool:
        if lineage in self.unbounded:
            return False
        asked = [e for item in plan for e in self.events(item, item["count"])]
        taken = self.taken.get(lineage, Counter())
        own = [e for (of, event), n in taken.items() if of == charter for e in [event] * n]
        return self.budgets.get(lineage, agreed).admits([*_all(taken), *asked]) and agreed.admits([*own, *asked])

    def take(self, lineage: str, charter: str, item: dict[str, Any], count: int) -> None:
        for event in self.events(item, 1):
            self.taken.setdefault(lineage, Counter())[charter, event] += count

    @staticmethod
    def events(item: dict[str, Any], count: int) -> list[PrivacyEvent]:
        event = event_from(item["event"])
        return [] if event is None else [event] * count


def _all(taken: Counter[tuple[str, PrivacyEvent]]) -> list[PrivacyEvent]:
    return [event for (_, event), n in taken.items() for _ in range(n)]


class _Honest:
    def __init__(self, made: Draft, shape: Shape) -> None:
        self.made, self.shape = made, shape
        self.names = [name for name in made.people if name != COORDINATOR]
        self.crash = random.Random(shape.crashes) if shape.crashes is not None else None
        self.rng = random.Random(shape.seed)
        self.chance = random.Random(f"others {shape.seed}")
        self.opened = 0  # how often a sum was asked to be opened
        self.sites = {name: _Site(made.entry(name, "dataset")) for name in self.names}

    def happens(self) -> bool:
        return self.crash is not None and self.crash.random() < 0.15

    def add(self, owner: str, kind: str, charter: str | None = None, /, **data: Any) -> None:
        self.made.add(owner, kind, charter, **data)
        if self.happens():
            self.made.add(owner, "recovered", torn_bytes=17, torn_sha256=digest("torn"))

    # other charters

    def elsewhere(self, name: str) -> None:
        """Something that is not this charter's business, perhaps."""
        while self.chance.random() < self.shape.others:
            site, book = self.sites[name], self.made.books[name]
            if self.chance.random() < 0.2 and len(site.datasets) < 4:
                kind = self.chance.choice(["version", "overlap", "disjoint"])
                of = None if kind == "disjoint" else self.chance.choice(site.datasets)
                site.datasets.append(dataset(name, self.shape, len(site.datasets), kind, of))
                self.add(name, "dataset", **site.datasets[-1])
            elif self.chance.random() < 0.05:
                self.add(name, "restored", length=len(book))
            elif not any(item.charter == OTHER for item in book):
                self.add(name, "charter", OTHER, name="other", expires="2100-01-01T00:00:00+00:00")
            elif site.open is None:
                self.other_run(name, site)
            elif self.chance.random() < 0.3:
                self.other_release(name, site)
            else:
                self.other_round(name, site)

    def other_run(self, name: str, site: _Site) -> None:
        site.runs += 1
        run, of = f"other-{site.runs}", self.chance.choice(site.datasets)
        protected = self.chance.random() < 0.9
        event = PrivacyEvent(self.chance.choice([1.0, 0.1]), self.chance.choice([15.0, 40.0, 90.0]), 2).to_fields()
        if self.shape.secure is not None and self.chance.random() < 0.5:
            event = SharedGaussian(1.0, 40.0, 1.0, 2.0**-12, 100, 5, self.chance.choice([0, 1, 2]), 2).to_fields()
        plan = [{"purpose": "train", "count": self.chance.randint(1, 3), "event": event if protected else NONE}]
        agreed = filter_of(self.shape, self.chance.choice([0.5, 2.0]), 1e-5)
        request = {"request_id": f"{run}-open", "request_sha256": digest(run), "run_id": run}
        if protected and not site.admits(of["lineage"], OTHER, plan, agreed):
            self.add(name, "refuse", OTHER, **request, round=None, reason="budget", detail="spent")
            return
        if protected:
            self.budget(name, OTHER, of["lineage"], agreed)
        self.add(
            name,
            "hold",
            OTHER,
            **request,
            dataset=of["dataset"],
            plan=plan,
            plan_sha256=sha256(canonical(plan)),
            software="hansa test",
        )
        site.take(of["lineage"], OTHER, plan[0], plan[0]["count"])
        site.open = (run, of, [dict(item) for item in plan])

    def other_round(self, name: str, site: _Site) -> None:
        assert site.open is not None
        run, of, ((item),) = site.open
        if not item["count"]:
            self.other_release(name, site)
            return
        number = len(self.made.books[name])
        request = {"request_id": f"{run}-{number}", "request_sha256": digest(run, number), "run_id": run, "round": 1}
        item["count"] -= 1
        if item["event"] == NONE:
            site.unbounded.add(of["lineage"])
        self.add(
            name,
            "debit",
            OTHER,
            **request,
            purpose="train",
            plan_sha256=digest(run),
            dataset=of["dataset"],
            event=item["event"],
            clip_norm=None if item["event"] == NONE else "1.0",
            declared_records=200,
        )
        if not self.happens():
            self.add(name, "commit", OTHER, **request, reply_sha256=digest("reply", request))

    def other_release(self, name: str, site: _Site) -> None:
        assert site.open is not None
        run, of, ((item),) = site.open
        site.take(of["lineage"], OTHER, item, -item["count"])
        self.add(name, "release", OTHER, run_id=run, why=self.chance.choice(["closed", "expired", "cancelled"]))
        site.open = None

    def budget(self, name: str, charter: str, lineage: str, agreed: Budget) -> None:
        if lineage not in self.sites[name].budgets:
            self.sites[name].budgets[lineage] = agreed
            fields = {"unit": "record", "adjacency": "add-or-remove-one", "budget": agreed.to_fields()}
            self.add(name, "budget", charter, lineage=lineage, **fields)

    # this charter

    def exchange(
        self, run: str, number: int, purpose: str, names: list[str], act: Any, attempt: int | None = None
    ) -> list[str]:
        """Ask, let each partner act, record answers; a crash asks again. Returns who answered ok."""
        what = (run, number, purpose) if attempt is None else (run, number, purpose, attempt)
        if purpose == "reveal":  # tells who signed, and so differs from one time to the next
            self.opened += 1
        of = (self.opened,) if purpose == "reveal" else ()
        requests = {
            n: {"request_id": "-".join(map(str, (*what, n))), "request_sha256": digest(*what, *of, n)} for n in names
        }
        body: dict[str, Any] = {"run_id": run, "round": number, "purpose": purpose}
        body |= {} if attempt is None else {"attempt": attempt}
        answered: dict[str, dict[str, Any]] = {}
        while True:
            self.add(COORDINATOR, "ask", **body, requests=requests)
            for name in names:
                request = {**requests[name], "run_id": run}
                self.elsewhere(name)
                deaf = (number, attempt, purpose, name) in self.shape.silent and len(names) > self.shape.quorum
                # Or its answer is lost; what it did before still stands.
                if deaf or (self.happens() and len(answered) > 1):
                    outcome, reply = "timeout", None
                else:
                    outcome, reply = act(name, request)
                if outcome == "crashed":
                    outcome, reply = "timeout", None
                answered[name] = {"request_id": request["request_id"], "outcome": outcome, "reply_sha256": reply}
            if self.happens():
                continue  # crashed before the answers were recorded
            self.add(COORDINATOR, "answers", **body, replies=answered)
            ok = [name for name in names if answered[name]["outcome"] == "ok"]
            refused = [name for name in names if answered[name]["outcome"].startswith("refused")]
            if (ok or refused) and not self.happens():
                return ok

    def known(self, name: str, kind: str, request: dict[str, Any]) -> dict[str, Any] | None:
        found = [i.data for i in self.made.books[name] if i.kind == kind and i.charter == self.made.signed.sha256]
        return next((data for data in found if data["request_id"] == request["request_id"]), None)

    def open(self, name: str, request: dict[str, Any]) -> tuple[str, str | None]:
        signed, charter, site = self.made.signed, self.made.signed.charter, self.sites[name]
        reply = digest("reply", request)
        if self.known(name, "hold", request):
            return "ok", reply
        plan, lineage = plan_fields(self.shape, signed), site.using["lineage"]
        if charter.privacy.kind != "none":
            agreed = filter_of(self.shape, charter.privacy.epsilon, charter.privacy.delta)
            if not (self.shape.careless or site.admits(lineage, signed.sha256, plan, agreed)):
                if not self.known(name, "refuse", request):
                    self.add(name, "refuse", **request, round=None, reason="budget", detail="spent")
                return "refused: budget", reply
            self.budget(name, signed.sha256, lineage, agreed)
        self.add(
            name,
            "hold",
            **request,
            dataset=site.using["dataset"],
            plan=plan,
            plan_sha256=plan_sha256(self.shape, signed),
            software="hansa test",
        )
        for item in plan:
            site.take(lineage, signed.sha256, item, item["count"])
        return "ok", reply

    def masked(self, run: str, number: int, cohort: list[str]) -> list[str]:
        """A round under secure aggregation: masked vectors, signatures under the list of who is summed, what opens the sum.

        A crash goes on with the same attempt; where somebody on the list does not come back, with another.
        """
        charter = self.made.signed.charter
        secure = charter.secure_aggregation
        assert secure is not None
        threshold = (len(charter.partners) + secure.colluding) // 2 + 1
        attempt, roster = 0, cohort
        while True:
            said = {"attempt": attempt, "agreement": digest("agreement", run, number, attempt, roster)}
            here: set[str] = set()
            while len(here) < charter.quorum:
                train = self.asking(run, number, "train", roster, said)
                here |= set(train())
            survivors = sorted(here)
            sign = self.asking(run, number, "agree", survivors, said, survivors=list(survivors))
            signed = set(sign())
            while len(signed) < threshold:
                signed |= set(sign())
            if number in self.shape.again and attempt == 0 and len(survivors) > charter.quorum:
                roster, attempt = survivors[:-1], 1
                continue
            opens = self.asking(run, number, "reveal", survivors, said)
            opened = set(opens())
            while len(opened) < threshold:
                opened |= set(opens())
            if self.happens():  # before the sum was saved
                train()
                sign()
                opens()
            return survivors

    def asking(self, run: str, number: int, purpose: str, names: list[str], said: dict[str, Any], **also: Any) -> Any:
        """An exchange of an attempt, as often as it is called."""

        def act(name: str, request: dict[str, Any]) -> tuple[str, str | None]:
            if purpose == "train":
                return self.work(name, request, number, purpose, said)
            reply = digest("reply", request)
            if purpose == "agree" and not self.known(name, "survivors", request):
                self.add(name, "survivors", **request, round=number, **copy.deepcopy(said | also))
            return ("crashed", None) if self.happens() else ("ok", reply)

        return lambda: self.exchange(run, number, purpose, names, act, said["attempt"])

    def work(
        self, name: str, request: dict[str, Any], number: int, purpose: str, masked: dict[str, Any] | None = None
    ) -> tuple[str, str | None]:
        charter, site = self.made.signed.charter, self.sites[name]
        reply = digest("reply", request)
        if purpose == "evaluate" and self.shape.evaluation == "public":
            if not self.known(name, "public", request):
                self.add(name, "public", **request, round=number, reply_sha256=reply)
            return "ok", reply
        event = {item["purpose"]: item["event"] for item in plan_fields(self.shape, self.made.signed)}[purpose]
        if not self.known(name, "debit", request):
            member = charter.member(name)
            assert member is not None
            clip = charter.privacy.clip_norm if purpose == "train" else None
            if event == NONE:
                site.unbounded.add(site.using["lineage"])
            self.add(
                name,
                "debit",
                **request,
                round=number,
                purpose=purpose,
                plan_sha256=plan_sha256(self.shape, self.made.signed),
                dataset=site.using["dataset"],
                event=event,
                clip_norm=None if clip is None else real(clip),
                declared_records=member.declared_records,
                **({} if masked is None else {"masked": dict(masked)}),
            )
            if self.happens():
                return "crashed", None
        if not self.known(name, "commit", request):
            self.add(name, "commit", **request, round=number, reply_sha256=reply)
        if self.happens():
            return "crashed", None
        return "ok", reply

    def close(self, run: str, rounds: int, why: str) -> None:
        signed = self.made.signed.sha256
        for name in self.names:
            book = self.made.books[name]
            holds = [i.data for i in book if i.kind == "hold" and i.charter == signed and i.data["run_id"] == run]
            for hold in holds:
                spent = Counter(
                    i.data["purpose"]
                    for i in book
                    if i.kind == "debit" and i.charter == signed and i.data["run_id"] == run
                )
                for item in hold["plan"]:
                    of = next(d["lineage"] for d in self.sites[name].datasets if d["dataset"] == hold["dataset"])
                    self.sites[name].take(of, signed, item, spent[item["purpose"]] - item["count"])
                self.add(name, "release", run_id=run, why="closed")
        model = sha256(MODEL) if rounds else None
        self.add(COORDINATOR, "close", run_id=run, rounds=rounds, model_sha256=model, why=why)
        self.made.closings.append((run, model, {owner: len(book) for owner, book in self.made.books.items()}))

    def witness(self) -> None:
        """Everybody's head as it is now, signed by two others and the coordinator."""
        for at, owner in enumerate([*self.names, COORDINATOR] if self.shape.heads else []):
            others = [name for name in self.names[at + 1 :] + self.names[:at] if name != owner][:2]
            signers = (owner, *([COORDINATOR] if owner != COORDINATOR else []), *others)
            for holder in signers[1:]:
                signed = signers if holder == signers[1] else (owner, *dict.fromkeys([signers[1], holder]))
                self.made.heads.append(Kept(holder, owner, len(self.made.books[owner]), signed))

    def play(self) -> None:
        for run in range(1, self.shape.runs + 1):
            if not self.run(f"run-{run}", run == self.shape.runs and self.shape.unfinished):
                return
        if self.shape.refused_run:
            run_id = f"run-{self.shape.runs + 1}"
            self.add(COORDINATOR, "run", run_id=run_id)
            self.exchange(run_id, 0, "open", self.names[:1], self.open)
            self.close(run_id, 0, "refused")

    def run(self, run: str, unfinished: bool) -> bool:
        for site in self.sites.values():  # the charter may be given to another data set between runs
            if self.shape.others and self.chance.random() < 0.3:
                site.using = self.chance.choice(site.datasets)
        self.add(COORDINATOR, "run", run_id=run)
        held = self.exchange(run, 0, "open", self.names, self.open)
        if len(held) < self.shape.quorum:
            self.close(run, 0, "refused")
            return True
        for number in range(1, self.shape.rounds + 1):
            cohort = sorted(self.rng.sample(held, max(1, round(self.shape.participation * len(held)))))
            if self.shape.secure is not None:
                ok = self.masked(run, number, cohort)
            else:
                ok = self.exchange(run, number, "train", cohort, lambda n, r, i=number: self.work(n, r, i, "train"))
            if unfinished and self.chance.random() < 0.6:
                return False
            if self.shape.evaluation == "public" or (
                self.shape.evaluation == "private" and number == self.shape.rounds
            ):
                self.exchange(run, number, "evaluate", held, lambda n, r, i=number: self.work(n, r, i, "evaluate"))
            last = number == self.shape.rounds
            body = {
                "run_id": run,
                "round": number,
                "model_sha256": sha256(MODEL) if last else digest("model", run, number),
                "partners": ok,
                "metrics": {"auc": real(0.7 + number / 100)} if self.shape.evaluation != "none" else {},
            }
            for _ in range(1 + self.happens()):
                self.add(COORDINATOR, "round", **body)
            if not last:
                self.witness()
        if unfinished:
            return False
        self.close(run, self.shape.rounds, "completed")
        return True


def plan_fields(shape: Shape, signed: SignedCharter) -> list[dict[str, Any]]:
    """The plan of one run as a hold has it."""
    sigma = signed.charter.privacy.noise_multiplier
    event: dict[str, Any] = dict(NONE)
    if sigma is not None:
        q, steps = (shape.participation, 1) if shape.kind == "central" else (shape.q, shape.steps)
        event = {"mechanism": "poisson-gaussian/1", "q": real(q), "sigma": real(sigma), "steps": steps}
    if shape.kind == "shared":
        assert sigma is not None
        assert shape.secure is not None
        event = SharedGaussian(shape.q, sigma, 0.5, grid_for(0.5, 72), 72, shape.quorum, shape.secure, 1).to_fields()
    attempts = shape.rounds + (shape.retries if shape.secure is not None else 0)
    plan = [{"purpose": "train", "count": attempts, "event": event}]
    if shape.evaluation == "private":
        noise = {"mechanism": "poisson-gaussian/1", "q": "1.0", "sigma": "50.0", "steps": 1}
        plan.append({"purpose": "evaluate", "count": 1, "event": noise})
    return plan


def plan_sha256(shape: Shape, signed: SignedCharter) -> str:
    """The hash that holds and debits carry."""
    return hashlib.sha256(canonical(plan_fields(shape, signed))).hexdigest()


def _ranges(numbers: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return found


def _population(made: Draft, shape: Shape) -> None:
    rng, charter = random.Random(shape.seed), made.signed.charter
    crash = random.Random(shape.crashes) if shape.crashes is not None else None
    plan = plan_fields(shape, made.signed)
    made.add(COORDINATOR, "run", run_id="run-1")
    everybody = [[0, shape.clients - 1]] if charter.privacy.unit == "client" else None
    if charter.privacy.kind != "none":
        agreed = Budget.create(charter.privacy.epsilon, charter.privacy.delta).to_fields()
        fields = {
            "clients": shape.clients,
            "unit": charter.privacy.unit,
            "adjacency": "add-or-remove-one",
            "budget": agreed,
        }
        made.add(COORDINATOR, "budget", **fields)
    made.add(COORDINATOR, "cohort-hold", run_id="run-1", plan=plan)
    for number in range(1, shape.rounds + 1):
        cohort = rng.sample(range(shape.clients), max(2, round(shape.participation * shape.clients)))
        at = {"run_id": "run-1", "round": number, "purpose": "train"}
        clip = charter.privacy.clip_norm
        debit = at | {
            "event": dict(plan[0]["event"]),
            "clip_norm": None if clip is None else real(clip),
            "declared_records": 100,
            "clients": everybody or _ranges(cohort),
        }
        for _ in range(2 if crash and crash.random() < 0.4 else 1):
            made.add(COORDINATOR, "cohort-debit", **debit)
            good = everybody or _ranges(cohort[: max(1, len(cohort) - 1)])
            made.add(COORDINATOR, "cohort-commit", **at, clients=good)
        last = number == shape.rounds
        model = sha256(MODEL) if last else digest("model", number)
        made.add(
            COORDINATOR,
            "round",
            run_id="run-1",
            round=number,
            model_sha256=model,
            partners=None,
            metrics={"auc": "0.7"},
        )
    made.add(COORDINATOR, "close", run_id="run-1", rounds=shape.rounds, model_sha256=sha256(MODEL), why="completed")
    made.closings.append(("run-1", sha256(MODEL), {COORDINATOR: len(made.books[COORDINATOR])}))


def result_for(made: Draft, verdict: dict[str, Any]) -> dict[str, Any]:
    """The part of result.json that an audit compares."""
    keys = ("epsilon", "epsilon_filter", "epsilon_cap", "delta", "rounds")
    charter = made.signed.charter
    declared = {m.name: m.declared_records for m in charter.partners}
    rounds = {i.data["round"]: i.data["metrics"] for i in made.books[COORDINATOR] if i.kind == "round"}
    listed = [
        {"round": n, "metrics": {name: float(value) for name, value in metrics.items()}}
        for n, metrics in rounds.items()
    ]
    fields = ("run_id", "round", "reason", "detail")
    return {
        "run_id": "run-1",
        "charter_sha256": made.signed.sha256,
        "privacy": {
            key: getattr(charter.privacy, key) for key in ("kind", "epsilon", "delta", "noise_multiplier", "clip_norm")
        }
        | {"noise": charter.privacy.kind, "adversary": charter.adversary}
        | (
            {"unit": charter.privacy.unit} if charter.privacy.kind in ("central", "shared") else {}
        ),  # the golden bundle's bytes stay as they are
        "partners": {
            name: {"declared_records": declared.get(name, 100), **{key: p[key] for key in keys}}
            for name, p in verdict["partners"].items()
        },
        "rounds": listed,
        "final": listed[-1]["metrics"],
        "refusals": [
            {"partner": name, **{field: item.data[field] for field in fields}}
            for name, book in made.books.items()
            for item in book
            if item.kind == "refuse"
        ],
    }


def with_many_debits(events: list[dict[str, Any]], honest_budget: bool = True) -> Draft:
    """A bundle whose first partner also debited these events under another charter, each in a run of its own (3 entries).

    Args:
        honest_budget: the lineage's budget came with the other charter and is large enough for anything.
    """
    made = honest(Shape(partners=2, rounds=1, sigma=20.0, evaluation="none"))
    owner, place = "hospital-0", made.index("hospital-0", "budget")
    data = made.entry(owner, "dataset")["dataset"]
    budget = made.item(owner, "budget")
    if honest_budget:
        budget.charter, budget.data["budget"] = OTHER, Budget.create(1e12, 1e-5).to_fields()
    new = []
    for number, event in enumerate(events):
        request = {"request_id": f"x{number}", "request_sha256": digest(number), "run_id": f"x{number}"}
        of = {"dataset": data, "plan_sha256": digest(number)}
        plan = [{"purpose": "train", "count": 1, "event": event}]
        debit = {"round": 1, "purpose": "train", "event": event, "clip_norm": "1.0", "declared_records": 200}
        new.append(Item("hold", request | of | {"plan": plan, "software": "x"}, OTHER))
        new.append(Item("debit", request | of | debit, OTHER))
        new.append(Item("commit", request | {"round": 1, "reply_sha256": digest("reply", number)}, OTHER))
    accepted = Item("charter", {"name": "other", "expires": "2100-01-01T00:00:00+00:00"}, OTHER)
    made.books[owner][place : place + 1] = [accepted, budget, *new]
    made.closings[0][2][owner] += len(new) + 1
    return made


def any_secure_shape(seed: int) -> Shape:
    """Some honest history under secure aggregation: crashes, retries, dropouts, and other charters, some of shared noise."""
    rng = random.Random(f"secure {seed}")
    partners, kind = rng.randint(3, 5), rng.choice(["shared", "shared", "shared", "local", "none"])
    colluding = rng.randint(0, partners - 2)
    least = max(colluding + 2, (partners + colluding) // 2 + 1)
    quorum, rounds, retries = rng.randint(least, partners), rng.randint(1, 3), rng.randint(0, 2)
    roomy = quorum < partners
    late = (rng.randint(1, rounds), 0, rng.choice(["train", "agree", "reveal"]), f"hospital-{rng.randrange(partners)}")
    return Shape(
        partners=partners,
        rounds=rounds,
        q=rng.choice([1.0, 1.0, 0.2]) if kind != "none" else 1.0,
        steps=1,
        evaluation=rng.choice(["none", "public", "private"]),
        kind=kind,
        sigma=rng.choice([None, 60.0]) if kind != "none" else None,
        crashes=seed if rng.random() < 0.7 else None,
        others=rng.choice([0.0, 0.4]),
        runs=rng.randint(1, 2),
        unfinished=rng.random() < 0.3,
        seed=seed,
        quorum=quorum,
        secure=colluding,
        retries=retries,
        silent=(late,) if roomy and partners - 1 >= least else (),
        again=(rng.randint(1, rounds),) if roomy and retries and rng.random() < 0.6 and partners - 2 >= quorum else (),
    )


def any_shape(seed: int) -> Shape:
    """Some honest history: crashes, refusals, dropouts, other charters, several lineages, runs that nobody finished."""
    rng = random.Random(f"shape {seed}")
    kind = rng.choice(["local", "local", "local", "none"])
    return Shape(
        partners=rng.randint(2, 4),
        rounds=rng.randint(1, 4),
        q=rng.choice([1.0, 1.0, 0.2]),
        evaluation=rng.choice(["none", "public", "private"]),
        kind=kind,
        sigma=rng.choice([None, 25.0, 60.0]) if kind == "local" else None,
        refused_run=rng.random() < 0.5,
        crashes=seed if rng.random() < 0.7 else None,
        others=rng.choice([0.0, 0.3, 0.6]),
        runs=rng.randint(1, 3),
        unfinished=rng.random() < 0.3,
        participation=rng.choice([1.0, 0.6]),
        heads=rng.random() < 0.8,
        seed=seed,
    )
