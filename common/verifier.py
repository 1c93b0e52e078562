"""Ledgers, charter and keys -> verdict. One file that imports nothing of ours: read it, copy it, run it.

    python verifier.py BUNDLE        prints the verdict as JSON; exit 0 verified, 1 a violation, 2 unreadable

It needs `cryptography` (Ed25519) and `dp-accounting` (privacy loss distributions). The format is docs/ledger-format.md.
What is checked, in this order; whatever fails is a violation that names file and line:

 1. Envelopes (DSSE). What was parsed is written again and must give the same bytes. Signatures cover the exact payload.
 2. `charter.json` is signed by everyone it names and by nobody else; its SHA-256 is on every run, hold and debit.
 3. `keys/` holds the charter's keys, byte for byte, and nothing else.
 4. A ledger line is signed by its owner's key in the charter, has the next sequence number and the hash of the line
    before. The file ends with a whole line. Genesis names owner, role, key and simulation as the charter does.
 5. Unknown event types, fields, versions and mechanisms are violations, and so is a value of the wrong kind.
 6. Partner: one budget, fixed; a hold is the charter's plan and the filter admits it together with everything debited
    and held; a debit lies within the open hold of its run, on the charter's terms, once for one request; a commit or
    public answer follows its request; nothing is debited after the release. What was debited stays charged for ever.
    All debits under the charter cost at most its epsilon at its delta, whatever budget the ledger has.
 7. Coordinator: asks, answers and rounds that stand twice (a crash) agree; a round counts the quorum's ok answers; a
    run closes with its last round's model.
 8. Both: every ok or failed answer has the partner's commit, public answer or hold, and every refused one its refusal, of the
    same request; every hold, debit, commit and public answer was asked for, and answered unless none was seen.
 9. `closing/`: every run of the coordinator's ledger was closed by a checkpoint of every ledger, signed by all; one
    that is shorter or differs there is a violation, entries after the newest checkpoint are a warning.
10. `model.safetensors` is the model of the newest completed run; `result.json` says what was recomputed here, and of
    its run, rounds, refusals and terms what the ledgers and the charter say.

Population bundles (above 100 simulated partners) have one ledger, the coordinator's, with every client's accounting.

Input is hostile: any bytes give a violation or `Unreadable`; work is linear in the size of the files, and memory is
bounded by the longest line allowed plus what must be remembered of each entry.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_LINE = 8 * 2**20
MAX_FILE = 64 * 2**20  # of a file that is read whole
MAX_FOUND = 1000  # violations and warnings that are listed
MAX_EVENTS = 2000  # different (q, sigma) in one ledger: each costs some milliseconds
SLACK = 1e-9  # relative: what two honest implementations of the same formulas may differ by
LIMITS = [
    "What was declared and agreed was recorded, in this order, by the holders of these keys, and adds up to this bill.",
    "It cannot prove that noise was really drawn, nor that no other copy of the data was used outside these nodes.",
    "The keys are those in this charter: whether they are the partners' own, only the partners can say (fingerprints).",
    "Metrics (AUC and the like) are the coordinator's word.",
    "Not checked: what else result.json says (baselines, timings, descriptions), and report.html.",
    "epsilon takes the history as fixed in advance; epsilon_filter also holds when it was chosen adaptively.",
]


def _printable(text: str, limit: int) -> str:
    """Safe on a terminal: a name or a value of a hostile bundle may hold escape sequences or turn the text around."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


class Unreadable(Exception):
    """Nothing can be judged: a required file is missing or is not what its name says."""

    def __init__(self, file: str, line: int | None, what: str) -> None:
        super().__init__(f"{file}{f':{line}' if line else ''}: {_printable(what, 500)}")
        self.file, self.line, self.what = file, line, _printable(what, 500)


class Bad(Exception):
    """What is wrong at the place that is being read."""


class Report:
    """Violations and warnings as they are found, and what was counted."""

    def __init__(self) -> None:
        self.violations: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []
        self.checked = Counter({"ledgers": 0, "entries": 0, "signatures": 0})

    def wrong(self, file: str, line: int | None, what: str) -> None:
        """One violation."""
        self._add(self.violations, file, line, what)

    def warn(self, file: str, line: int | None, what: str) -> None:
        """Something that an honest crash also leaves behind."""
        self._add(self.warnings, file, line, what)

    @staticmethod
    def _add(where: list[dict[str, Any]], file: str, line: int | None, what: str) -> None:
        if len(where) < MAX_FOUND:
            where.append({"file": _printable(file, 300), "line": line, "what": _printable(what, 500)})
        elif len(where) == MAX_FOUND:
            where.append({"file": file, "line": line, "what": "... and more; the rest is left out"})


# -- bytes ---------------------------------------------------------------------------------------------------


def _open(root: Path, file: str) -> IO[bytes]:
    """A regular file inside the bundle, reached through no link. Opening never blocks (a FIFO would)."""
    path = root / file
    if any(p.is_symlink() for p in [path, *path.parents[: file.count("/")]]):
        raise Bad("is a link, or in a linked folder: a bundle holds plain files")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise Bad(f"cannot be read: {err.strerror}") from err
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Bad("is not a regular file")
    return os.fdopen(handle, "rb")


def _read(root: Path, file: str, limit: int = MAX_FILE) -> bytes:
    with _open(root, file) as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise Bad(f"is larger than {limit} bytes")
    return data


def _hash_of(root: Path, file: str) -> str:
    with _open(root, file) as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _listing(root: Path, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(root / folder)) if not (root / folder).is_symlink() else []
    except OSError:
        return []


def _json(data: bytes, floats: bool = False) -> Any:
    """JSON without duplicate keys, NaN or (unless asked for) floats, at most 16 levels deep."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in items}) != len(items):
            raise ValueError("a key is given twice")
        return dict(items)

    def never(text: str) -> float:
        raise ValueError(f"the number {text[:40]} has no place here")

    outside = b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])  # not within strings
    brackets = re.sub(rb"[^\[\]{}]", b"", outside)
    for _ in range(16):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    try:
        if brackets:
            raise ValueError("nested too deeply, or brackets that do not match")
        real = (lambda t: float(t)) if floats else never
        return json.loads(data.decode(), object_pairs_hook=pairs, parse_float=real, parse_constant=never)
    except (ValueError, RecursionError) as err:
        raise Bad(f"not valid JSON: {str(err)[:100]}") from err


def _bytes(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except ValueError as err:  # a lone surrogate
        raise Bad("text that is not Unicode") from err


def _envelope(data: bytes, kind: str) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Payload and (keyid, signature) pairs of the one layout; no signature is checked here."""
    parsed = _json(data)
    try:
        payload = base64.b64decode(parsed["payload"], validate=True)
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in parsed["signatures"]]
    except (LookupError, TypeError, ValueError) as err:
        raise Bad("not a signed envelope") from err
    made = [{"keyid": key, "sig": base64.b64encode(sig).decode()} for key, sig in signatures]
    again = {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": made}
    if _bytes(again) != data:
        raise Bad(f"an envelope of another type than {kind}, or in an unusual layout (edited?)")
    return payload, signatures


def _check_signature(report: Report, key: str, kind: str, payload: bytes, signature: bytes) -> None:
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, signed)
    except (InvalidSignature, ValueError) as err:
        raise Bad(f"bad signature by the key {key[:16]}...") from err
    report.checked["signatures"] += 1


def _show(value: Any) -> str:
    return ascii(value)[:80]


# -- kinds of values -----------------------------------------------------------------------------------------

Check = Callable[[Any], Any]  # falsy, or raising Bad, for a value of the wrong kind
Event = tuple[float, float, int] | None  # (q, sigma, steps); None is no protection


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}", value) is not None


def _hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(value: Any, low: int = 0, high: int = 10**9) -> bool:
    return type(value) is int and low <= value <= high


def _is(*allowed: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _fields(value: Any, what: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """`value` if it is an object with exactly these fields, each of its kind."""
    if not isinstance(value, dict) or set(value) != set(checks):
        raise Bad(f"{what} does not have exactly the fields {', '.join(checks)}")
    for name, check in checks.items():
        if not check(value[name]):
            raise Bad(f"{what}: {name} is {_show(value[name])}")
    return value


def _real(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?", value):
        number = float(value)
        if math.isfinite(number):
            return number
    raise Bad(f"{_show(value)} is not a finite decimal string")


def _is_real(value: Any) -> bool:
    return math.isfinite(_real(value))


def _event(value: Any) -> Event:
    if value == {"mechanism": "none/1"}:
        return None
    checks = {"mechanism": _is("poisson-gaussian/1"), "q": _is_real, "sigma": _is_real, "steps": lambda v: _whole(v, 1)}
    _fields(value, "event", checks)
    q, sigma = _real(value["q"]), _real(value["sigma"])
    if not (0 < q <= 1 and sigma >= 0.3):
        raise Bad(f"an event with q = {q:g}, sigma = {sigma:g}; allowed are 0 < q <= 1 and sigma from 0.3")
    return q, min(sigma, 1e9), value["steps"]


def _plan(value: Any) -> dict[str, tuple[int, Event]]:
    """purpose -> (count, event)."""
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise Bad("a plan is a list of one or two items")
    checks = {"purpose": _is("train", "evaluate"), "count": _whole, "event": lambda v: _event(v) or True}
    items = [_fields(item, "plan", checks) for item in value]
    if len({item["purpose"] for item in items}) != len(items):
        raise Bad("a plan with one purpose twice")
    return {item["purpose"]: (item["count"], _event(item["event"])) for item in items}


def _metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_real(v) for v in value.values())


# -- accounting: one record of one dataset, add-or-remove-one ------------------------------------------------

History = tuple[tuple[tuple[float, float], int], ...]  # ((q, sigma), steps), sorted


@dataclass(frozen=True)
class Budget:
    """The filter: branches (order, share of delta) and one exact Gaussian branch."""

    epsilon: float
    delta: float
    orders: tuple[tuple[int, float], ...]
    gaussian_delta: float

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """From a ledger's fields; the shares must sum to at most delta."""
        checks: dict[str, Check] = dict.fromkeys(("epsilon", "delta", "gaussian_delta"), _is_real)
        _fields(value, "budget", checks | {"orders": lambda v: isinstance(v, list) and 1 <= len(v) <= 16})
        if not all(isinstance(o, list) and len(o) == 2 and _whole(o[0], 2, 4096) for o in value["orders"]):
            raise Bad("budget: orders are pairs of a whole number from 2 to 4096 and a share of delta")
        orders = tuple((order, _real(share)) for order, share in value["orders"])
        made = cls(_real(value["epsilon"]), _real(value["delta"]), orders, _real(value["gaussian_delta"]))
        shares = [share for _, share in orders] + [made.gaussian_delta]
        if not (made.epsilon > 0 and 0 < made.delta < 1 and min(shares) > 0):
            raise Bad("budget: epsilon, delta and its shares must be positive and delta below 1")
        if sum(map(Fraction, shares)) > Fraction(made.delta):
            raise Bad(f"budget: the shares of delta sum to more than {made.delta!r}")
        return made

    def at(self, epsilon: float, delta: float) -> Budget:
        """The same orders and parts of delta for another cap."""
        parts = [
            max(share / self.delta * delta, 1e-300) for share in (*dict(self.orders).values(), self.gaussian_delta)
        ]
        return Budget(epsilon, delta, tuple(zip(dict(self.orders), parts, strict=False)), parts[-1])


@lru_cache(maxsize=100_000)
def _renyi(q: float, sigma: float, order: int) -> float:
    """Renyi divergence of one step at a whole order (Mironov, Talwar & Zhang 1908.10530, Sec. 3.3).

    (a-1) rho = ln sum_k C(a,k) (1-q)^(a-k) q^k e^x with x = k(k-1)/(2 sigma^2). The weights sum to 1, so it is
    ln(1 + sum_{k>=2} weight (e^x - 1)): only positive terms, nothing cancels however small q is.
    """
    if q == 1:
        return order / (2 * sigma**2)
    logs, whole = [], math.lgamma(order + 1)
    for k in range(2, order + 1):
        x = k * (k - 1) / (2 * sigma**2)
        weight = (
            whole - math.lgamma(k + 1) - math.lgamma(order - k + 1) + (order - k) * math.log1p(-q) + k * math.log(q)
        )
        logs.append(weight + x + math.log(-math.expm1(-x)))
    top = max(logs)
    excess = top + math.log(math.fsum(math.exp(value - top) for value in logs))  # ln(A - 1)
    return (math.log1p(math.exp(excess)) if excess < 0 else excess + math.log1p(math.exp(-excess))) / (order - 1)


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Least epsilon with Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) <= delta (Balle & Wang 1805.06530, Thm 8)."""
    mu = max(mu, 1e-6)

    def exceeds(epsilon: float) -> bool:
        a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        # exp(e) Phi(-b) = phi(a) * Phi(-b)/phi(b); far out the ratio is Mills' 1/b (1 - 1/b^2 + 3/b^4 - 15/b^6)
        ratio = math.erfc(b / math.sqrt(2)) / 2 * math.sqrt(2 * math.pi) * math.exp(b * b / 2) if b < 25 else None
        ratio = ratio if ratio is not None else (1 - 1 / b**2 + 3 / b**4 - 15 / b**6) / b
        return math.erfc(a / math.sqrt(2)) / 2 - math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * ratio > delta

    low, high = 0.0, mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))  # the Gaussian tail: never exceeds there
    if not exceeds(low):
        return 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high


@lru_cache(maxsize=1000)
def filter_epsilon(budget: Budget, history: History) -> float:
    """The least epsilon at which any branch admits it (Feldman & Zrnic 2008.11193; Smith & Thakurta 2210.17520)."""
    total = Total(budget)
    for (q, sigma), steps in history:
        total.add((q, sigma, steps))
    return total.epsilon()


class Total:
    """A filter's running sums: one event more costs the same however long the history is."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.mu2 = 0.0
        self.rho = [0.0] * len(budget.orders)

    def add(self, event: Event, times: int = 1) -> None:
        """Events that come, or (times below 0) that are given back."""
        if event is not None and times:
            q, sigma, steps = event
            self.mu2 += times * steps / sigma**2
            self.rho = [
                r + times * steps * _renyi(q, sigma, a) for r, (a, _) in zip(self.rho, self.budget.orders, strict=True)
            ]

    def epsilon(self) -> float:
        """As `filter_epsilon`."""
        if self.mu2 <= 0:
            return 0.0
        found = _gaussian_epsilon(math.sqrt(self.mu2), self.budget.gaussian_delta)
        return min([found, *(_converted(r, *o) for r, o in zip(self.rho, self.budget.orders, strict=True))])


def _mu(history: History) -> float:
    return math.sqrt(math.fsum(steps / sigma**2 for (_, sigma), steps in history))


def _renyi_epsilon(history: History, order: int, delta: float) -> float:
    return _converted(math.fsum(steps * _renyi(q, sigma, order) for (q, sigma), steps in history), order, delta)


def _converted(rho: float, order: int, delta: float) -> float:
    """From Renyi divergence to epsilon at delta (Canonne, Kamath & Steinke 2004.00010, Prop. 12)."""
    return max(0.0, rho + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def _fixed_epsilon(history: History, delta: float) -> float:
    """The least of many plain bounds, each valid for a history fixed in advance: never above any filter at delta."""
    orders = (*range(2, 64), *(round(2 ** (k / 4)) for k in range(24, 49)))
    return min(_gaussian_epsilon(_mu(history), delta), *(_renyi_epsilon(history, a, delta) for a in orders))


class Odometer:
    """The tight epsilon of a history taken as fixed: privacy loss distributions, rounded against the history.

    q = 1 throughout is exact. Otherwise Connect the Dots (2207.04380), composed by FFT; the interval is halved until
    epsilon moves by less than 0.5 %. Hostile histories are cheap: beyond 16 different events, 10^6 steps, epsilon 200
    or 10 s in all, the answer is the filter's epsilon (larger, still a bound), with a warning.
    """

    seconds = 10.0
    cells = 2**18

    def __init__(self) -> None:
        self._until: float | None = None
        self._known: dict[tuple[History, float], float | None] = {}

    def epsilon(self, history: History, delta: float) -> float | None:
        """Epsilon at delta; None when it would take too long or nothing finite comes out."""
        if not history:
            return 0.0
        if all(q == 1 for (q, _), _ in history):
            return _gaussian_epsilon(_mu(history), delta)
        if (history, delta) not in self._known:
            try:
                self._known[history, delta] = self._compose(history, delta)
            except (ArithmeticError, ValueError, MemoryError):  # losses beyond what a float holds
                self._known[history, delta] = None
        return self._known[history, delta]

    def _compose(self, history: History, delta: float) -> float | None:
        events = {kind: steps for kind, steps in history if kind[0] < 1}
        if unsampled := tuple(item for item in history if item[0][0] == 1):
            events[1.0, 1 / _mu(unsampled)] = 1  # unsampled steps are together one Gaussian mechanism
        count = sum(events.values())
        # epsilon is 0 when a record that joins is noticed at all with probability at most delta
        if math.fsum(n * q * math.erf(1 / (math.sqrt(8) * sigma)) for (q, sigma), n in history) < delta:
            return 0.0
        if len(events) > 16:
            return None
        bound = _fixed_epsilon(history, delta)
        if bound <= 1e-3:
            return bound
        if count > 10**6 or bound > 200:
            return None
        tail = math.log(1e-4 * delta / count)  # noise this improbable is charged as certain loss
        least = sum(self._span(q, sigma, tail) for q, sigma in events) / self.cells
        spread = math.fsum(n * _renyi(q, sigma, 2) for (q, sigma), n in events.items())
        interval = max(0.5 * math.sqrt(spread / count), least)
        self._until = self._until or time.monotonic() + self.seconds
        coarse, found = math.inf, self._at(events, delta, interval, tail)
        while interval / 2 >= least and coarse - found > 0.5 * max(0.01 * found, 1e-3):
            if time.monotonic() > self._until:
                return None
            interval /= 2
            coarse, found = found, self._at(events, delta, interval, tail)
        return min(found, bound)

    @staticmethod
    def _at(events: Mapping[tuple[float, float], int], delta: float, interval: float, tail: float) -> float:
        # Imported where it is needed: it takes a second and 50 MB, and unsampled histories do without.
        from dp_accounting.pld import privacy_loss_distribution as pld

        total = pld.identity(interval)
        for (q, sigma), steps in events.items():
            step = pld.from_gaussian_mechanism(
                sigma, sampling_prob=q, value_discretization_interval=interval, log_mass_truncation_bound=tail
            )
            total = total.compose(step.self_compose(steps))
        delta -= 2e-16 * (1000 + sum(events.values()))  # the FFT's rounding
        return float(total.get_epsilon_for_delta(delta)) if delta > 0 else math.inf

    @staticmethod
    def _span(q: float, sigma: float, tail: float) -> float:
        """Width of one step's losses that are put on the grid."""
        reach = math.sqrt(-2 * tail) * sigma
        top = (0.5 + reach) / sigma**2
        if q == 1:
            return 2 * top
        high = top + math.log(q + (1 - q) * math.exp(-top))
        return high - math.log1p(-q)


# -- the charter ---------------------------------------------------------------------------------------------

CHARTER_TYPE = "application/vnd.hansa.charter+json"
ENTRY_TYPE = "application/vnd.hansa.entry+json"
CLOSING_TYPE = "application/vnd.hansa.closing+json"


@dataclass
class Terms:
    """What an auditor needs of a charter."""

    sha256: str
    name: str
    coordinator: str
    keys: dict[str, str]  # partners in order, then the coordinator
    declared: dict[str, int]  # of each partner; of a population's clients under ""
    clients: int | None  # of a population
    kind: str
    epsilon: float | None
    delta: float | None
    clip_norm: float | None
    noise_multiplier: float | None
    rounds: int
    quorum: int
    evaluation: str
    plan: dict[str, Event] = field(default_factory=dict)  # purpose -> event
    expires: str = ""
    simulated: bool = False

    @classmethod
    def parse(cls, payload: bytes) -> Terms:
        """From the signed bytes.

        Raises:
            Bad: malformed.
        """
        c = _json(payload)
        try:
            if _bytes(c) != payload or c["format"] != "hansa-charter/1":
                raise Bad("a charter of an unknown version or layout")
            privacy, local, evaluation = c["privacy"], c["algorithm"]["local"], c["evaluation"]
            members, population = c["partners"], c["population"]
            named = [*members, c["coordinator"]]
            keys = {m["name"]: m["key"] for m in named}
            sizes = [m["declared_records"] for m in members] + ([population["declared_records"]] if population else [])
            numbers = ("epsilon", "delta", "clip_norm", "noise_multiplier")
            real = {k: None if privacy[k] is None else _real(privacy[k]) for k in numbers}
            good = (
                isinstance(members, list)
                and all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", n) for n in keys)
                and all(map(_hex, keys.values()))
                and len(set(keys.values())) == len(keys) == len(named)
                and bool(members) == (population is None)
                and all(_whole(size, 1) for size in sizes)
                and (population is None or (_whole(population["clients"], 1, 10**6) and c["simulated"] is True))
                and _is("local", "none")(privacy["kind"])
                and _is("none", "public", "private")(evaluation["kind"])
                and _is("record")(privacy["unit"])
                and all(_whole(n, 1) for n in (c["algorithm"]["rounds"], local["steps"], c["quorum"]))
                and all(map(_text, (c["name"], c["expires"])))
                and _flag(c["simulated"])
                and all((n is None) == (privacy["kind"] == "none") for n in real.values())
                and datetime.fromisoformat(c["expires"]).tzinfo is not None
            )
            if not good:
                raise Bad("a charter whose fields are malformed or do not fit together")
            plan: dict[str, Event] = {"train": None}
            if privacy["kind"] == "local":
                made = {"mechanism": "poisson-gaussian/1", "q": local["sampling_rate"], "steps": local["steps"]}
                plan["train"] = _event(made | {"sigma": privacy["noise_multiplier"]})
            if evaluation["kind"] == "private":
                plan["evaluate"] = (1.0, _real(evaluation["noise_multiplier"]), 1)
            return cls(
                sha256=hashlib.sha256(payload).hexdigest(),
                name=c["name"],
                coordinator=c["coordinator"]["name"],
                keys=keys,
                declared=({"": sizes[0]} if population else {m["name"]: m["declared_records"] for m in members}),
                clients=population["clients"] if population else None,
                kind=privacy["kind"],
                rounds=c["algorithm"]["rounds"],
                quorum=c["quorum"],
                evaluation=evaluation["kind"],
                plan=plan,
                expires=c["expires"],
                simulated=c["simulated"],
                **real,
            )
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            raise Bad(f"a charter that lacks something or has it in another form: {_show(str(err))}") from err

    def check_plan(self, plan: Mapping[str, tuple[int, Event]]) -> None:
        """Return when this is the plan that was agreed."""
        if {purpose: event for purpose, (_, event) in plan.items()} != self.plan:
            raise Bad("the plan's events are not the charter's")
        if plan["train"][0] != self.rounds or any(count > self.rounds for count, _ in plan.values()):
            raise Bad(f"the plan's counts do not fit the charter's {self.rounds} round(s)")

    def check_clip(self, purpose: str, clip_norm: str | None) -> None:
        """Return when a debit names the charter's clipping norm (evaluation has sensitivity 1, hence none)."""
        wanted = self.clip_norm if purpose == "train" else None
        if (None if clip_norm is None else _real(clip_norm)) != wanted:
            raise Bad(f"clip_norm {_show(clip_norm)}, the charter has {wanted}")


def _load_charter(root: Path, report: Report) -> Terms:
    file = "charter.json"
    try:
        data = _read(root, file)
        if not data.endswith(b"\n"):
            raise Bad("does not end in a newline (edited?)")
        payload, signatures = _envelope(data[:-1], CHARTER_TYPE)
        terms = Terms.parse(payload)
    except Bad as bad:
        raise Unreadable(file, 1, str(bad)) from bad
    _everyone_signed(report, file, CHARTER_TYPE, payload, signatures, list(terms.keys.items()))
    if [key for key, _ in signatures] != list(terms.keys.values()):
        report.wrong(file, 1, "the signatures are not everyone's, once each, in the order of the charter")
    return terms


def _everyone_signed(
    report: Report, file: str, kind: str, payload: bytes, made: list[tuple[str, bytes]], wanted: list[tuple[str, str]]
) -> None:
    names = {key: name for name, key in wanted}
    for key, signature in made[: 2 * len(wanted)]:
        try:
            if key not in names:
                raise Bad(f"signed by a key that does not stand in the charter: {_show(key)}")
            _check_signature(report, key, kind, payload, signature)
        except (Bad, TypeError) as bad:
            report.wrong(file, 1, str(bad))
    if absent := [name for name, key in wanted if key not in [k for k, _ in made]]:
        report.wrong(file, 1, f"not signed by {', '.join(absent)}")
    if len(made) > len(wanted):
        report.wrong(file, 1, "more signatures than signers")


def _check_keys(root: Path, report: Report, terms: Terms) -> None:
    wanted = {f"{name}.pem": key for name, key in terms.keys.items()}
    for name in sorted({*wanted, *_listing(root, "keys")}):
        file = f"keys/{name}"
        if name not in wanted:
            report.wrong(file, None, "not a key of this charter")
            continue
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(wanted[name]))
            pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            if _read(root, file, 10_000) != pem:
                raise Bad("not the key that stands in the charter")
        except Bad as bad:
            report.wrong(file, 1, str(bad))


# -- ledgers -------------------------------------------------------------------------------------------------


def _held_out(value: Any) -> bool:
    kinds = {"kind": _is("public", "private", "none"), "commitment": _or_null(_hex)}
    _fields(value, "held_out", kinds)
    return bool((value["kind"] == "none") == (value["commitment"] is None))


REQUEST: dict[str, Check] = {"request_id": _id, "request_sha256": _hex, "run_id": _id}
COHORT: dict[str, Check] = {"run_id": _id, "round": lambda v: _whole(v, 1), "purpose": _is("train", "evaluate")}


@dataclass(frozen=True)
class Entry:
    """One verified line."""

    line: int
    time: str
    type: str
    body: dict[str, Any]


class Book:
    """A ledger that is read line by line; a subclass gives meaning to each event."""

    role = ""
    events: ClassVar[dict[str, dict[str, Check]]] = {}
    common: ClassVar[dict[str, dict[str, Check]]] = {
        "genesis": {
            "owner": _text,
            "role": _text,
            "key": _hex,
            "ledger_id": _text,
            "simulated": _flag,
            "software": lambda v: _text(v) or isinstance(v, dict),
            "dataset": _or_null(
                lambda v: _fields(v, "dataset", {"id": _text, "commitment": _hex, "held_out": _held_out})
            ),
        },
        "charter": {"charter_sha256": _hex, "name": _text, "expires": _text},
        "recovered": {"torn_bytes": lambda v: _whole(v, 1, 2**63), "torn_sha256": _hex},
    }

    def __init__(self, report: Report, terms: Terms, owner: str, file: str) -> None:
        self.report, self.terms, self.owner, self.file = report, terms, owner, file
        self.hashes: list[str] = []  # of every line
        self.whole = False  # read to its end
        self.dataset: str | None = None
        self.held_out: str | None = None
        self.charters: set[str] = set()

    def wrong(self, line: int | None, what: str) -> None:
        """A violation in this ledger."""
        self.report.wrong(self.file, line, what)

    def read(self, root: Path) -> None:
        """Every line; reading stops at the first that is not the owner's next one."""
        line = 0
        try:
            with _open(root, self.file) as handle:
                while data := handle.readline(MAX_LINE + 1):
                    line += 1
                    entry = self._entry(line, data)
                    try:
                        self._apply(entry)
                    except Bad as bad:
                        self.wrong(line, f"{entry.type[:40]}: {bad}")
                    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as err:
                        self.wrong(line, f"{entry.type[:40]}: malformed ({_show(str(err))})")
            if not line:
                raise Bad("is empty: its genesis entry is missing")
            self.whole = True
        except Bad as bad:
            self.wrong(line or None, str(bad))
        self.report.checked["ledgers"] += 1
        self.report.checked["entries"] += len(self.hashes)

    def _entry(self, line: int, data: bytes) -> Entry:
        if not data.endswith(b"\n"):
            raise Bad("longer than any entry" if len(data) > MAX_LINE else "a torn last line: not what was closed")
        data = data[:-1]
        payload, signatures = _envelope(data, ENTRY_TYPE)
        key = self.terms.keys[self.owner]
        if [k for k, _ in signatures] != [key]:
            raise Bad(f"not signed by {self.owner}'s key alone")
        _check_signature(self.report, key, ENTRY_TYPE, payload, signatures[0][1])
        p = _json(payload)
        checks = {
            "v": _is(1),
            "seq": _whole,
            "prev": _hex,
            "time": lambda v: isinstance(v, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", v, re.ASCII),
            "type": _text,
            "body": lambda v: isinstance(v, dict),
        }
        _fields(p, "entry", checks)
        if p["seq"] != line - 1:
            raise Bad(f"sequence number {_show(p['seq'])}, wanted {line - 1}: entries are missing or out of order")
        if p["prev"] != (self.hashes[-1] if self.hashes else "0" * 64):
            raise Bad("does not follow the line above it: entries were edited, dropped or reordered")
        if _bytes(p) != payload:
            raise Bad("a payload in an unusual layout")
        self.hashes.append(hashlib.sha256(data).hexdigest())
        return Entry(line, p["time"], p["type"], p["body"])

    def _apply(self, entry: Entry) -> None:
        known = self.common | self.events
        if entry.type not in known:
            raise Bad("an event of an unknown type")
        body = _fields(entry.body, "body", known[entry.type])
        if (entry.line == 1) != (entry.type == "genesis"):
            raise Bad("the first entry, and only the first, is genesis")
        getattr(self, "_" + entry.type.replace("-", "_"))(entry, body)

    def _genesis(self, _: Entry, b: dict[str, Any]) -> None:
        if b["dataset"]:
            self.dataset, self.held_out = b["dataset"]["id"], b["dataset"]["held_out"]["kind"]
        wanted = (self.owner, self.role, self.terms.keys[self.owner], self.terms.simulated)
        if (b["owner"], b["role"], b["key"], b["simulated"]) != wanted:
            raise Bad(f"owner, role, key and simulated are not {self.owner}'s in this charter")
        if (self.dataset is None) != (self.role != "partner"):
            raise Bad("a partner's ledger names its dataset, another's names none")

    def _charter(self, _: Entry, b: dict[str, Any]) -> None:
        self.charters.add(b["charter_sha256"])
        if b["charter_sha256"] == self.terms.sha256 and b["name"] != self.terms.name:
            raise Bad("another name than the charter's")

    def _recovered(self, entry: Entry, b: dict[str, Any]) -> None:
        self.report.warn(
            self.file, entry.line, f"a torn last line of {b['torn_bytes']} bytes was cut off after a crash"
        )

    def _own(self, charter_sha256: str) -> bool:
        if charter_sha256 not in self.charters:
            raise Bad("under a charter that this ledger did not record before")
        return charter_sha256 == self.terms.sha256

    def _new_budget(self, entry: Entry, b: dict[str, Any], before: Budget | None) -> Budget:
        budget = Budget.parse(b["budget"])
        if before is not None:
            raise Bad("a second budget: it is fixed when it is created")
        if b["dataset"] != self.dataset:
            raise Bad("the budget of another dataset")
        if not self._own(b["charter_sha256"]):
            what = f"the budget of another charter, {b['charter_sha256']}: epsilon {budget.epsilon!r} at delta "
            self.report.warn(self.file, entry.line, what + repr(budget.delta))
        elif (budget.epsilon, budget.delta) != (self.terms.epsilon, self.terms.delta):
            raise Bad(f"not the charter's epsilon {self.terms.epsilon} and delta {self.terms.delta}")
        return budget

    def _cost(self, odometer: Odometer, budget: Budget | None, history: History) -> float:
        """Least epsilon known for what the charter fixed in advance, at its delta; 0 when it agrees to no bound.

        The plain bounds stand in where the odometer gives up, so that what a gate's filter admits is never above.
        """
        if self.terms.epsilon is None or self.terms.delta is None or not history:
            return 0.0
        cost = filter_epsilon(budget.at(self.terms.epsilon, self.terms.delta), history) if budget else math.inf
        if cost > self.terms.epsilon and len(history) <= 16:
            cost = min(cost, _fixed_epsilon(history, self.terms.delta))
        if cost > self.terms.epsilon and (tight := odometer.epsilon(history, self.terms.delta)) is not None:
            cost = min(cost, tight)
        return cost

    def _too_dear(self, cost: float) -> bool:
        return self.terms.epsilon is not None and cost > self.terms.epsilon * (1 + SLACK)

    def _not_expired(self, entry: Entry) -> None:
        if datetime.fromisoformat(entry.time) >= datetime.fromisoformat(self.terms.expires):
            raise Bad("after the charter expired")


BUDGET: dict[str, Check] = {
    "dataset": _or_null(_text),
    "charter_sha256": _hex,
    "unit": _is("record"),
    "adjacency": _is("add-or-remove-one"),
    "budget": lambda v: isinstance(v, dict),
}
DEBIT: dict[str, Check] = {
    "event": lambda v: isinstance(v, dict),
    "clip_norm": _or_null(_is_real),
    "declared_records": lambda v: _whole(v, 1),
}


@dataclass
class Hold:
    """A run's reservation."""

    own: bool  # under this bundle's charter
    charter_sha256: str
    plan_sha256: str
    left: dict[str, tuple[int, Event]]  # purpose -> (count, event)
    open: bool = True


@dataclass
class Act:
    """Something a partner did for a request."""

    line: int
    body: dict[str, Any]
    own: bool


def _charge(spent: Counter[tuple[float, float]], event: Event, times: int = 1) -> None:
    if event is not None and times:
        spent[event[0], event[1]] += event[2] * times


def _history(spent: Mapping[tuple[float, float], int]) -> History:
    return tuple(sorted(spent.items()))


class Partner(Book):
    """A partner's ledger: hold, debit, commit."""

    role = "partner"
    events: ClassVar[dict[str, dict[str, Check]]] = {
        "budget": BUDGET,
        "hold": REQUEST
        | {"charter_sha256": _hex, "dataset": _text, "plan": lambda v: isinstance(v, list), "plan_sha256": _hex}
        | {"software": _text},
        "debit": REQUEST | COHORT | DEBIT | {"charter_sha256": _hex, "dataset": _text, "plan_sha256": _hex},
        "commit": REQUEST | {"round": _whole, "reply_sha256": _hex},
        "public": REQUEST | {"round": _whole, "reply_sha256": _hex},
        "refuse": REQUEST | {"round": _or_null(lambda v: type(v) is int), "reason": _text, "detail": _text},
        "release": {"run_id": _id, "why": _is("closed", "expired", "cancelled")},
    }

    def __init__(self, report: Report, terms: Terms, owner: str) -> None:
        super().__init__(report, terms, owner, f"partners/{owner}/ledger.jsonl")
        self.budget: Budget | None = None
        self.holds: dict[str, Hold] = {}
        self.spent: Counter[tuple[float, float]] = Counter()
        self.known: set[tuple[float, float]] = set()  # different events, held or debited
        self.own_debits: list[tuple[int, tuple[float, float, int]]] = []  # under this bundle's charter: line, event
        self.debited: Total | None = None  # with the budget: running sums of what was debited,
        self.charged: Total | None = None  # and of what was debited or is held
        self.unbounded: int | None = None  # line of the first unprotected debit
        self.foreign: set[str] = set()
        self.acts: dict[str, dict[str, Act]] = {t: {} for t in ("hold", "debit", "commit", "public")}  # by request
        self.refusals: list[Act] = []
        self.refused: set[tuple[str, str, str, str]] = set()
        self.rounds: set[tuple[str, int]] = set()
        self.trajectory: list[tuple[str, int, float | None]] = []  # run, round, the filter's epsilon

    def _budget(self, entry: Entry, b: dict[str, Any]) -> None:
        self.budget = self._new_budget(entry, b, self.budget)
        self.debited, self.charged = Total(self.budget), Total(self.budget)
        for (q, sigma), steps in self.spent.items():  # debits before a budget: wrong, but charged
            self.debited.add((q, sigma, steps))
            self.charged.add((q, sigma, steps))

    def _remember(self, event: Event) -> None:
        if event is not None:
            if event[:2] not in self.known and len(self.known) >= MAX_EVENTS:
                raise Bad(f"more than {MAX_EVENTS} different events in one ledger")
            self.known.add(event[:2])

    def _act(self, entry: Entry, own: bool) -> None:
        if entry.body["request_id"] in self.acts[entry.type]:
            raise Bad("the same request twice")
        self.acts[entry.type][entry.body["request_id"]] = Act(entry.line, entry.body, own)

    def _hold(self, entry: Entry, b: dict[str, Any]) -> None:
        plan = _plan(b["plan"])
        own = self._own(b["charter_sha256"])
        if b["run_id"] in self.holds:
            raise Bad("this run was held before")
        for _, event in plan.values():
            self._remember(event)
        self.holds[b["run_id"]] = Hold(own, b["charter_sha256"], b["plan_sha256"], plan)
        if self.charged:
            for count, event in plan.values():
                self.charged.add(event, count)
        self._act(entry, own)
        if b["dataset"] != self.dataset:
            raise Bad("another dataset than this ledger's")
        if own:
            self.terms.check_plan(plan)
            self._not_expired(entry)
        elif b["charter_sha256"] not in self.foreign:
            self.foreign.add(b["charter_sha256"])
            self.report.warn(self.file, entry.line, "a run under another charter: charged, its terms were not checked")
        if b["plan_sha256"] != hashlib.sha256(_bytes(b["plan"])).hexdigest():
            raise Bad("plan_sha256 is not that of its plan")
        if any(event is None for _, event in plan.values()):
            return  # no protection, by the charter's word: epsilon is unbounded and no filter admits or refuses it
        if self.budget is None or self.charged is None or self.unbounded:
            raise Bad(
                "no budget can pay for it: " + ("an unprotected round came before" if self.unbounded else "none set")
            )
        needed = self.charged.epsilon()
        if needed > self.budget.epsilon * (1 + SLACK):
            raise Bad(f"the filter does not admit it: epsilon {needed:.6g} with all held, cap {self.budget.epsilon:g}")

    def _debit(self, entry: Entry, b: dict[str, Any]) -> None:
        event = _event(b["event"])
        self._remember(event)
        _charge(self.spent, event)
        if self.debited:
            self.debited.add(event)
        if event is None:
            self.unbounded = self.unbounded or entry.line
        elif b["charter_sha256"] == self.terms.sha256:
            self.own_debits.append((entry.line, event))
        if b["purpose"] == "train":
            at = (b["run_id"], b["round"], self.debited.epsilon() if self.debited and not self.unbounded else None)
            if self.trajectory and self.trajectory[-1][:2] == at[:2]:
                self.trajectory.pop()  # debited again for the same round: the later state counts
            self.trajectory.append(at)
        hold = self.holds.get(b["run_id"])
        count, planned = hold.left.get(b["purpose"], (0, None)) if hold else (0, None)
        within = hold is not None and hold.open and count > 0 and planned == event
        if self.charged and not within:
            self.charged.add(event)  # what was held for it stands in the sums already
        if hold is None:
            raise Bad("no hold for its run")
        if within:
            hold.left[b["purpose"]] = (count - 1, planned)
        self._act(entry, hold.own)
        if not hold.open:
            raise Bad("after its run was released")
        if (b["charter_sha256"], b["plan_sha256"], b["dataset"]) != (
            hold.charter_sha256,
            hold.plan_sha256,
            self.dataset,
        ):
            raise Bad("another charter, plan or dataset than its hold's")
        if not within:
            raise Bad("not in its hold: another event than planned, or more of them")
        if hold.own:
            self._not_expired(entry)
            self.terms.check_clip(b["purpose"], b["clip_norm"])
            if b["round"] > self.terms.rounds:
                raise Bad(f"round {b['round']}, the charter has {self.terms.rounds}")
            if b["declared_records"] != self.terms.declared[self.owner]:
                raise Bad("declared_records is not the charter's")

    def _commit(self, entry: Entry, b: dict[str, Any]) -> None:
        debit = self.acts["debit"].get(b["request_id"])
        if debit is None or any(debit.body[k] != b[k] for k in ("request_sha256", "run_id", "round")):
            raise Bad("no debit of the same request, run and round")
        self._act(entry, debit.own)
        if debit.own and debit.body["purpose"] == "train":
            self.rounds.add((b["run_id"], b["round"]))

    def _public(self, entry: Entry, b: dict[str, Any]) -> None:
        hold = self.holds.get(b["run_id"])
        if hold is None or not hold.open:
            raise Bad("no open hold for its run")
        self._act(entry, hold.own)
        if hold.own and (self.terms.evaluation != "public" or not 1 <= b["round"] <= self.terms.rounds):
            raise Bad("the charter agrees to no public evaluation of this round")
        if self.held_out != "public":
            raise Bad(f"this ledger's held-out rows are not public: {self.held_out}")

    def _refuse(self, entry: Entry, b: dict[str, Any]) -> None:
        self.refusals.append(Act(entry.line, b, own=True))
        self.refused.add((b["request_id"], b["request_sha256"], b["run_id"], b["reason"]))

    def _release(self, _: Entry, b: dict[str, Any]) -> None:
        hold = self.holds.get(b["run_id"])
        if hold is None or not hold.open:
            raise Bad("no open hold of that run")
        hold.open = False
        if self.charged:
            for count, event in hold.left.values():
                self.charged.add(event, -count)

    def finish(self) -> None:
        """What only the end shows."""
        for request, debit in self.acts["debit"].items():
            if request not in self.acts["commit"]:
                self.report.warn(self.file, debit.line, "a debit without a commit: nothing left, it stays charged")
        for run_id, hold in self.holds.items():
            if hold.open:
                self.report.warn(self.file, None, f"the hold of run {run_id} was never released")
        if self.budget and not self.unbounded:
            spent = filter_epsilon(self.budget, _history(self.spent))
            if spent > self.budget.epsilon * (1 + SLACK):
                self.wrong(None, f"spent epsilon {spent:.6g}, more than the cap {self.budget.epsilon:g}")
        self._finish_charter()

    def _finish_charter(self) -> None:
        odometer = Odometer()

        def cost(debits: int) -> float:
            spent: Counter[tuple[float, float]] = Counter()
            for _, event in self.own_debits[:debits]:
                _charge(spent, event)
            return self._cost(odometer, self.budget, _history(spent))

        total = cost(len(self.own_debits))
        if not self._too_dear(total):
            return
        fits, exceeds = 0, len(self.own_debits)  # how many debits fit, and how many do not: cost only grows
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            fits, exceeds = (fits, middle) if self._too_dear(cost(middle)) else (middle, exceeds)
        what = f"with this debit, epsilon under the charter is above its {self.terms.epsilon:g} at delta "
        self.wrong(self.own_debits[exceeds - 1][0], f"{what}{self.terms.delta:g}; all its debits cost {total:.6g}")


@dataclass
class Run:
    """A run as the coordinator recorded it."""

    line: int
    asks: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[tuple[int, str], dict[str, dict[str, str | None]]] = field(
        default_factory=dict
    )  # partner -> outcome
    rounds: list[dict[str, Any]] = field(default_factory=list)
    close: dict[str, Any] | None = None
    closed_at: int = 0


class Runs(Book):
    """What a coordinator's and a population's ledger share: runs, their rounds and their ends."""

    def __init__(self, report: Report, terms: Terms) -> None:
        super().__init__(report, terms, terms.coordinator, "coordinator/ledger.jsonl")
        self.runs: dict[str, Run] = {}

    running: ClassVar[dict[str, dict[str, Check]]] = {
        "run": {"run_id": _id, "charter_sha256": _hex},
        "round": {
            "run_id": _id,
            "round": lambda v: _whole(v, 1),
            "model_sha256": _hex,
            "partners": _or_null(lambda v: isinstance(v, list) and all(map(_text, v))),
            "metrics": _metrics,
        },
        "close": {
            "run_id": _id,
            "rounds": _whole,
            "model_sha256": _or_null(_hex),
            "why": _is("completed", "refused"),
        },
    }

    def _open(self, b: dict[str, Any]) -> Run:
        run = self.runs.get(b["run_id"])
        if run is None or run.close is not None:
            raise Bad("no open run of that name")
        if "round" in b and b["round"] > self.terms.rounds:
            raise Bad(f"round {b['round']}, the charter has {self.terms.rounds}")
        return run

    def _run(self, entry: Entry, b: dict[str, Any]) -> None:
        if not self._own(b["charter_sha256"]):
            raise Bad("under another charter")
        if b["run_id"] in self.runs:
            raise Bad("a run of that name exists")
        self.runs[b["run_id"]] = Run(entry.line)

    def _round(self, _: Entry, b: dict[str, Any]) -> None:
        run = self._open(b)
        if b in run.rounds[-1:]:
            return  # the same again, after a crash
        if b["round"] != len(run.rounds) + 1:
            raise Bad("not the next round, nor the same again")
        run.rounds.append(b)
        self._folded(run, b)

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        raise NotImplementedError

    def _close(self, entry: Entry, b: dict[str, Any]) -> None:
        run = self._open(b)
        run.close, run.closed_at = b, entry.line
        if (b["rounds"], b["model_sha256"]) != (
            len(run.rounds),
            run.rounds[-1]["model_sha256"] if run.rounds else None,
        ):
            raise Bad("not the number of rounds and the model of the last one")
        if (b["why"] == "completed") != (b["rounds"] == self.terms.rounds):
            raise Bad(f"{b['why']} after {b['rounds']} of {self.terms.rounds} round(s)")


DONE = ("ok", "failed")  # outcomes of work that the partner did and committed a reply to


class Coordinator(Runs):
    """The coordinator's ledger: what was asked and what came back."""

    role = "coordinator"
    events: ClassVar[dict[str, dict[str, Check]]] = Runs.running | {
        "ask": COHORT
        | {
            "round": _whole,
            "purpose": _is("open", "train", "evaluate"),
            "requests": lambda v: isinstance(v, dict) and v,
        },
        "answers": COHORT
        | {"round": _whole, "purpose": _is("open", "train", "evaluate"), "replies": lambda v: isinstance(v, dict)},
    }

    def _ask(self, _: Entry, b: dict[str, Any]) -> None:
        run, at = self._open(b), (b["round"], b["purpose"])
        if (b["round"] == 0) != (b["purpose"] == "open"):
            raise Bad("round 0, and only round 0, opens the run")
        if b["purpose"] == "evaluate" and self.terms.evaluation == "none":
            raise Bad("the charter agrees to no evaluation")
        if unknown := set(b["requests"]) - set(self.terms.declared):
            raise Bad(f"asked of {_show(min(unknown))}, who is no partner")
        for request in b["requests"].values():
            _fields(request, "request", {"request_id": _id, "request_sha256": _hex})
        if run.asks.setdefault(at, b["requests"]) != b["requests"]:
            raise Bad("asked again with other requests")

    def _answers(self, _: Entry, b: dict[str, Any]) -> None:
        run, at = self._open(b), (b["round"], b["purpose"])
        asked = run.asks.get(at)
        if asked is None:
            raise Bad("answers to what was not asked")
        for name, reply in b["replies"].items():
            _fields(reply, "reply", {"request_id": _id, "outcome": _text, "reply_sha256": _or_null(_hex)})
            outcome = reply["outcome"]
            if reply["request_id"] != asked.get(name, {}).get("request_id"):
                raise Bad(f"an answer of {_show(name)} to another request than was asked")
            if outcome not in ("ok", "failed", "timeout", "invalid") and not outcome.startswith("refused: "):
                raise Bad(f"outcome {_show(outcome)}")
            if (outcome, b["purpose"]) == ("failed", "open"):
                raise Bad("a run that is opened is held or refused: no work can fail")
            if (reply["reply_sha256"] is None) != (outcome in ("timeout", "invalid")):
                raise Bad(f"outcome {_show(outcome)} with reply {_show(reply['reply_sha256'])}")
            seen = run.outcomes.setdefault(at, {}).setdefault(name, {})
            if seen.setdefault(outcome, reply["reply_sha256"]) != reply["reply_sha256"] and outcome in DONE:
                raise Bad(f"{name} answered the same request twice, differently")

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        partners = b["partners"]
        if partners is None or len(set(partners)) != len(partners) or len(partners) < self.terms.quorum:
            raise Bad(f"a round counts with {self.terms.quorum} different partners or more")
        outcomes = run.outcomes.get((b["round"], "train"), {})
        if strangers := [name for name in partners if "ok" not in outcomes.get(name, {})]:
            raise Bad(f"folds an update of {_show(strangers[0])}, who gave no ok answer")
        if failed := [name for name in partners if "failed" in outcomes[name]]:
            raise Bad(f"folds an update of {_show(failed[0])}, whose answer was that it failed")


def _cross_check(report: Report, coordinator: Coordinator, partners: dict[str, Partner]) -> None:
    """The coordinator's and each partner's ledger name the same requests and replies, both ways."""
    private = coordinator.terms.evaluation == "private"
    kinds = {"open": "hold", "train": "commit", "evaluate": "commit" if private else "public"}
    asked: dict[tuple[str, str], tuple[str, int, str, str]] = {}  # (partner, request) -> run, round, purpose, hash
    for run_id, run in coordinator.runs.items():
        for (number, purpose), requests in run.asks.items():
            where, kind = f"{purpose} of round {number}, run {run_id}", kinds[purpose]
            for name, request in requests.items():
                partner, request_id, digest = partners[name], request["request_id"], request["request_sha256"]
                if asked.setdefault((name, request_id), mine := (run_id, number, purpose, digest)) != mine:
                    report.wrong(coordinator.file, run.line, f"one request id of {name} for two requests: {where}")
                for outcome, reply in run.outcomes.get((number, purpose), {}).get(name, {}).items():
                    if not partner.whole or outcome in ("timeout", "invalid"):
                        continue
                    if outcome not in DONE:
                        if (request_id, digest, run_id, outcome.removeprefix("refused: ")) not in partner.refused:
                            report.wrong(partner.file, None, f"no refusal for '{_show(outcome)}' to {where}")
                    elif (act := partner.acts[kind].get(request_id)) is None:
                        report.wrong(partner.file, None, f"no {kind} for the {outcome} answer to {where}")
                    elif kind != "hold" and act.body["reply_sha256"] != reply:
                        report.wrong(partner.file, act.line, f"another reply than the {outcome} answer to {where}")
    if not coordinator.whole:
        return  # what it asked is not known to the end
    for name, partner in partners.items():
        for kind, act in ((kind, act) for kind, acts in partner.acts.items() for act in acts.values() if act.own):
            ask = asked.get((name, act.body["request_id"]))
            purposes = [p for p in kinds if kinds[p] == kind or (kind == "debit" and p == act.body["purpose"])]
            said = [(act.body["run_id"], act.body.get("round", 0), p, act.body["request_sha256"]) for p in purposes]
            if ask is None or ask not in said:
                report.wrong(partner.file, act.line, f"a {kind} that the coordinator's ledger did not ask for")
            elif kind != "debit":
                seen = coordinator.runs[ask[0]].outcomes.get((ask[1], ask[2]), {}).get(name, {})
                if set(seen) <= {"timeout", "invalid"}:
                    report.warn(partner.file, act.line, f"a {kind} whose answer the coordinator did not record")
                elif not set(seen) & set(DONE):
                    report.wrong(partner.file, act.line, f"a {kind}, but the coordinator recorded a refusal")
        for act in partner.refusals:
            if act.body["run_id"] in coordinator.runs and (name, act.body["request_id"]) not in asked:
                report.wrong(partner.file, act.line, "refuses what the coordinator's ledger did not ask for")


# -- a population: one ledger for every client ---------------------------------------------------------------

Ranges = list[list[int]]


class Population(Runs):
    """The run ledger of a simulation above 100 partners; clients with equal histories are accounted once."""

    role = "population"
    events: ClassVar[dict[str, dict[str, Check]]] = Runs.running | {
        "budget": BUDGET | {"clients": lambda v: _whole(v, 1)},
        "cohort-hold": {"run_id": _id, "plan": lambda v: isinstance(v, list)},
        "cohort-debit": COHORT | DEBIT | {"clients": lambda v: isinstance(v, list)},
        "cohort-commit": COHORT | {"clients": lambda v: isinstance(v, list)},
    }

    def __init__(self, report: Report, terms: Terms) -> None:
        super().__init__(report, terms)
        self.clients = terms.clients or 0
        self.budget: Budget | None = None
        self.unbounded: int | None = None
        self.plans: dict[str, dict[str, tuple[int, Event]]] = {}
        # How often each client stands in (kind, run, purpose), as differences between neighbours.
        self.steps: dict[tuple[str, str, str], Counter[int]] = {}
        self.seen: dict[tuple[str, str, int, str], str] = {}  # hash of each debit and commit: a repeat is the same
        self.cohort: dict[tuple[str, str], tuple[int, Ranges]] = {}  # the latest debit of (run, purpose)
        self.committed: Counter[tuple[str, int]] = Counter()  # clients folded in a round
        self.last_debit: int | None = None  # its line

    def _budget(self, entry: Entry, b: dict[str, Any]) -> None:
        self.budget = self._new_budget(entry, b, self.budget)
        if b["clients"] != self.clients:
            raise Bad(f"for {b['clients']} clients, the charter has {self.clients}")

    def _cohort_hold(self, entry: Entry, b: dict[str, Any]) -> None:
        self._open(b)
        plan = _plan(b["plan"])
        if b["run_id"] in self.plans or len(self.plans) >= 100:
            raise Bad("this run was held before, or more than 100 runs in one population's ledger")
        earlier = {_history(self.spent(counts)) for counts in self.groups()}
        self.plans[b["run_id"]] = plan
        self.terms.check_plan(plan)
        self._not_expired(entry)
        if any(event is None for _, event in plan.values()):
            return
        if self.budget is None or self.unbounded:
            raise Bad("no budget can pay for it")
        for history in earlier:
            total = Counter(dict(history))
            for count, event in plan.values():
                _charge(total, event, count)
            if filter_epsilon(self.budget, _history(total)) > self.budget.epsilon * (1 + SLACK):
                raise Bad(f"the filter does not admit it, cap {self.budget.epsilon:g}")

    def _ranges(self, value: Any) -> Ranges:
        last = -1
        for pair in value:
            if not (isinstance(pair, list) and len(pair) == 2 and all(_whole(n, 0, self.clients - 1) for n in pair)):
                raise Bad("clients are ranges [first, last] of client numbers")
            if not last < pair[0] <= pair[1]:
                raise Bad("ranges of clients that overlap or are not in order")
            last = pair[1]
        ranges: Ranges = value
        return ranges

    def _count(self, kind: str, b: dict[str, Any]) -> bool:
        """Count a cohort once; False when it stands there again after a crash."""
        at, digest = (kind, b["run_id"], b["round"], b["purpose"]), hashlib.sha256(_bytes(b)).hexdigest()
        if at in self.seen:
            if self.seen[at] != digest:
                raise Bad("stands there before for the same run, round and purpose, but differs")
            return False
        self.seen[at] = digest
        steps = self.steps.setdefault((kind, b["run_id"], b["purpose"]), Counter())
        for first, last in b["clients"]:
            steps[first] += 1
            steps[last + 1] -= 1
        return True

    def _cohort_debit(self, entry: Entry, b: dict[str, Any]) -> None:
        event, ranges = _event(b["event"]), self._ranges(b["clients"])
        if event is None:
            self.unbounded = self.unbounded or entry.line
        self._open(b)
        count, planned = self.plans.get(b["run_id"], {}).get(b["purpose"], (0, None))
        if count < 1 or planned != event:
            raise Bad("not in the plan that was held")
        self.cohort[b["run_id"], b["purpose"]] = (b["round"], ranges)
        self._count("debit", b)
        self.last_debit = entry.line
        self._not_expired(entry)
        self.terms.check_clip(b["purpose"], b["clip_norm"])
        if b["declared_records"] != self.terms.declared[""]:
            raise Bad("declared_records is not the charter's")

    def _cohort_commit(self, _: Entry, b: dict[str, Any]) -> None:
        self._open(b)
        ranges = self._ranges(b["clients"])
        number, debited = self.cohort.get((b["run_id"], b["purpose"]), (0, []))
        if number != b["round"]:
            raise Bad("no debit of the same run, round and purpose before it")
        at = 0
        for first, last in ranges:
            while at < len(debited) and debited[at][1] < last:
                at += 1
            if at == len(debited) or first < debited[at][0]:
                raise Bad(f"names clients {first} to {last}, who were not all debited")
        if self._count("commit", b) and b["purpose"] == "train":
            self.committed[b["run_id"], b["round"]] = sum(last - first + 1 for first, last in ranges)

    def _folded(self, run: Run, b: dict[str, Any]) -> None:
        if b["partners"] is not None or self.committed[b["run_id"], b["round"]] < self.terms.quorum:
            raise Bad(f"a round counts with {self.terms.quorum} committed clients or more")

    def groups(self) -> dict[tuple[int, ...], Ranges]:
        """Clients by how often they stand in each of `steps`, in its order."""
        found: dict[tuple[int, ...], Ranges] = {}
        now = [0] * len(self.steps)
        for first, after in itertools.pairwise(sorted({0, self.clients}.union(*self.steps.values()))):
            now = [n + steps[first] for n, steps in zip(now, self.steps.values(), strict=True)]
            found.setdefault(tuple(now), []).append([first, after - 1])
        return found

    def spent(self, counts: tuple[int, ...]) -> Counter[tuple[float, float]]:
        """What a client with these counts has spent."""
        spent: Counter[tuple[float, float]] = Counter()
        for (kind, run_id, purpose), n in zip(self.steps, counts, strict=True):
            if kind == "debit":
                _charge(spent, self.plans[run_id][purpose][1], n)
        return spent

    def finish(self) -> None:
        """What only the end shows."""
        odometer, costs = Odometer(), dict[History, float]()
        for counts, ranges in self.groups().items():
            for (kind, run_id, purpose), n in zip(self.steps, counts, strict=True):
                if kind == "debit" and n > self.plans[run_id][purpose][0]:
                    self.wrong(None, f"client {ranges[0][0]}: {n} debits for {purpose} in run {run_id}, more than held")
            if self.budget and not self.unbounded:
                spent = filter_epsilon(self.budget, _history(self.spent(counts)))
                if spent > self.budget.epsilon * (1 + SLACK):
                    self.wrong(None, f"client {ranges[0][0]} spent epsilon {spent:.6g}, cap {self.budget.epsilon:g}")
            history = _history(self.spent(counts))
            if history not in costs:
                costs[history] = self._cost(odometer, self.budget, history)
            if self._too_dear(costs[history]):
                what = f"client {ranges[0][0]}: all debits cost epsilon {costs[history]:.6g}, the charter's is "
                self.wrong(self.last_debit, f"{what}{self.terms.epsilon:g} at delta {self.terms.delta:g}")


# -- what closes a bundle ------------------------------------------------------------------------------------


def _check_closings(
    root: Path, report: Report, terms: Terms, books: dict[str, Book], runs: dict[str, Run]
) -> str | None:
    """The run of the newest good checkpoint, if there is one."""
    latest: tuple[int, str | None] = (0, None)
    newest: dict[str, int] = {}  # owner -> the longest length that was countersigned
    closed: set[str] = set()
    for name in _listing(root, "closing"):
        file = f"closing/{name}"
        try:
            data = _read(root, file)
            payload, signatures = _envelope(data.removesuffix(b"\n"), CLOSING_TYPE)
            if not data.endswith(b"\n"):
                raise Bad("does not end in a newline (edited?)")
            before = len(report.violations)
            _everyone_signed(report, file, CLOSING_TYPE, payload, signatures, list(terms.keys.items()))
            if len(report.violations) > before:
                continue
            p = _json(payload)
            checks = {"v": _is(1), "run_id": _id, "charter_sha256": _is(terms.sha256), "model_sha256": _or_null(_hex)}
            _fields(p, "checkpoint", checks | {"ledgers": lambda v: isinstance(v, list)})
            if _bytes(p) != payload or name != f"{p['run_id']}.json":
                raise Bad("in an unusual layout, or named after another run")
            heads = {"owner": _text, "length": lambda v: _whole(v, 1), "head": _hex}
            lengths = {_fields(item, "ledger", heads)["owner"]: item for item in p["ledgers"]}
            if set(lengths) != set(books) or len(p["ledgers"]) != len(books):
                raise Bad("does not name every ledger of this bundle, once")
            for owner, item in lengths.items():
                book, length = books[owner], item["length"]
                newest[owner] = max(newest.get(owner, 0), length)
                if length <= len(book.hashes) and book.hashes[length - 1] != item["head"]:
                    book.wrong(length, f"not the entry that everyone countersigned in {file}")
                elif length > len(book.hashes) and book.whole:
                    book.wrong(len(book.hashes) + 1, f"entries are missing: {length} were countersigned in {file}")
            run = runs.get(p["run_id"])
            if run is None or run.close is None or run.closed_at > lengths[terms.coordinator]["length"]:
                if books[terms.coordinator].whole:
                    raise Bad("of a run that the coordinator's ledger does not close before it")
            elif run.close["model_sha256"] != p["model_sha256"]:
                raise Bad("names another model than the coordinator's ledger")
            closed.add(p["run_id"])
            latest = max(latest, (lengths[terms.coordinator]["length"], p["run_id"]), key=lambda item: item[0])
        except Bad as bad:
            report.wrong(file, 1, str(bad))
    for run_id in runs:
        if run_id not in closed:
            report.wrong(f"closing/{run_id}.json", None, "the run was not closed (resume it)")
    if not runs and not closed:
        report.wrong("closing", None, "the run was not closed (resume it)")
    for owner, length in newest.items():
        if len(books[owner].hashes) > length:
            report.warn(books[owner].file, length + 1, "entries after the newest checkpoint: nobody countersigned them")
    return latest[1]


def _last(runs: dict[str, Run]) -> dict[str, Any] | None:
    """The last round of the newest completed run."""
    done = [run for run in runs.values() if run.close and run.close["why"] == "completed" and run.rounds]
    return done[-1].rounds[-1] if done else None


def _check_model(root: Path, report: Report, last: dict[str, Any] | None) -> None:
    file = "model.safetensors"
    try:
        if last and _hash_of(root, file) != last["model_sha256"]:
            raise Bad("not the model that the newest completed run ended with")
        if not last and os.path.lexists(root / file):
            raise Bad("a model, but no run was completed")
    except Bad as bad:
        report.wrong(file, None, str(bad))


def _same(a: Any, b: Any) -> bool:
    """Two numbers (or two nulls) that agree to 1e-6."""
    if a is None or b is None:
        return a is b
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300 for n in (a, b))
    return numbers and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6 if a > 1e-3 else 0)


def _check_result(
    root: Path,
    report: Report,
    terms: Terms,
    runs: dict[str, Run],
    refusals: Counter[tuple[Any, ...]],
    partners: dict[str, Any],
    coarse: set[str],
) -> None:
    """Compare `result.json` with what was recomputed; `refusals` counts (partner, run_id, round, reason)."""
    file = "result.json"
    if not os.path.lexists(root / file):
        return
    try:
        result = _json(_read(root, file), floats=True)
        if not isinstance(result, dict) or result.get("charter_sha256") != terms.sha256:
            raise Bad("names another charter")
        privacy = result.get("privacy")
        if not isinstance(privacy, dict) or privacy.get("kind") != terms.kind:
            raise Bad(f"privacy is not the charter's, {terms.kind}")
        for key in ("epsilon", "delta", "noise_multiplier", "clip_norm"):
            _compare(report, f"privacy: {key}", privacy.get(key, ""), getattr(terms, key))
        said = result.get("partners")
        if not isinstance(said, dict) or set(said) != set(partners):
            raise Bad("does not name the partners of this bundle")
        for name, claims in said.items():
            for key in ("declared_records", "epsilon", "epsilon_filter", "epsilon_cap", "delta", "rounds"):
                if not isinstance(claims, dict) or (key not in claims and key != "epsilon_filter"):
                    raise Bad(f"{name}: {key} is missing")
                wanted = partners[name].get(key, terms.declared.get("" if terms.clients else name))
                if key in claims and not (key == "epsilon" and name in coarse):
                    _compare(report, f"{name}: {key}", claims[key], wanted)
        _check_rounds(result, runs)
        listed = result.get("refusals")
        keys = ("partner", "run_id", "round", "reason")
        if not isinstance(listed, list) or Counter(tuple(r[key] for key in keys) for r in listed) != refusals:
            raise Bad("refusals are not those in the partners' ledgers")
    except Bad as bad:
        report.wrong(file, None, str(bad))
    except (ArithmeticError, LookupError, TypeError, ValueError) as err:
        report.wrong(file, None, f"malformed ({_show(str(err))})")


def _compare(report: Report, what: str, said: Any, wanted: float | None) -> None:
    if not _same(said, wanted):
        report.wrong("result.json", None, f"{what} is {_show(said)}, here it is {wanted}")


def _check_rounds(result: dict[str, Any], runs: dict[str, Run]) -> None:
    """run_id, rounds and final are those of the first completed run, or of the first."""
    done = [run_id for run_id, run in runs.items() if run.close and run.close["why"] == "completed"]
    run_id = next(iter([*done, *runs]), None)
    if result.get("run_id") != run_id:
        raise Bad(f"run_id is {_show(result.get('run_id'))}, in the coordinator's ledger it is {run_id}")
    rounds = [(b["round"], b["metrics"]) for b in runs[run_id].rounds] if run_id else []
    said = result.get("rounds")
    if not isinstance(said, list) or len(said) != len(rounds):
        raise Bad(f"rounds are not the {len(rounds)} of the coordinator's ledger")
    for one, (number, metrics) in zip(said, rounds, strict=True):
        if not isinstance(one, dict) or type(one.get("round")) is not int or one["round"] != number:
            raise Bad(f"round {number} is missing or out of order")
        if not _same_metrics(one.get("metrics"), metrics):
            raise Bad(f"round {number}: metrics are not those in the coordinator's ledger, {_show(metrics)}")
    final = rounds[-1][1] if rounds else {}
    if not _same_metrics(result.get("final"), final):
        raise Bad(f"final is not the metrics of the last round in the coordinator's ledger, {_show(final)}")


def _same_metrics(said: Any, metrics: dict[str, Any]) -> bool:
    return (
        isinstance(said, dict)
        and set(said) == set(metrics)
        and all(_same(said[name], _real(value)) for name, value in metrics.items())
    )


# -- the verdict ---------------------------------------------------------------------------------------------


def _claim(terms: Terms) -> str:
    if terms.kind == "none":
        return (
            "There is no differential privacy guarantee: the charter says privacy none, updates left the nodes "
            "unprotected and epsilon is unbounded."
        )
    return (
        "Everything that left a partner's node is (epsilon, delta)-differentially private for one record of that "
        "partner under add-or-remove-one adjacency, with the partner's epsilon and delta below (the charter's delta "
        f"is {terms.delta!r}), by Gaussian noise that the partner itself adds before anything leaves (local noise), "
        "against everyone but the partner itself: the coordinator, the other partners and whoever receives the model"
        + ("; scores and labels of rows declared public are outside it." if terms.evaluation == "public" else ".")
    )


@dataclass
class _Bill:
    """Works out epsilons once for equal histories and remembers which are coarse."""

    terms: Terms
    report: Report
    odometer: Odometer = field(default_factory=Odometer)
    coarse: set[str] = field(default_factory=set)

    def of(
        self, file: str, names: list[str], budget: Budget | None, unbounded: bool, history: History
    ) -> dict[str, Any]:
        """epsilon, epsilon_filter, epsilon_cap and delta; None where there is no bound."""
        cap, delta = self.terms.epsilon, self.terms.delta
        if budget and cap is not None and delta is not None:
            cap = min(cap, budget.epsilon) if budget.delta == delta else cap
            budget = budget.at(cap, delta) if budget.delta != delta else budget
        elif budget:
            cap, delta = budget.epsilon, budget.delta
        spent: float | None = None if unbounded or (budget is None and (history or cap is None)) else 0.0
        tight = spent
        if spent is not None and budget:
            spent = filter_epsilon(budget, history)
            tight = self.odometer.epsilon(history, budget.delta)
            if tight is None or not math.isfinite(tight):
                self.coarse.update(names)
                self.report.warn(
                    file, None, f"{names[0]}: too long a history for the tight epsilon; the filter's is given"
                )
                tight = spent
            tight = min(tight, spent)
        return {"epsilon": tight, "epsilon_filter": spent, "epsilon_cap": cap, "delta": delta}


def _partner_summary(partner: Partner, bill: _Bill) -> dict[str, Any]:
    budget, unbounded = partner.budget, partner.unbounded is not None
    summary = bill.of(partner.file, [partner.owner], budget, unbounded, _history(partner.spent))
    debits = partner.acts["debit"]
    return summary | {
        "debits": len(debits),
        "uncommitted_debits": len(set(debits) - set(partner.acts["commit"])),
        "rounds": len(partner.rounds),
        "refusals": len(partner.refusals),
        "entries": len(partner.hashes),
        "trajectory": [{"round": number, "epsilon_filter": spent} for _, number, spent in partner.trajectory],
    }


def _client_summaries(book: Population, bill: _Bill) -> dict[str, Any]:
    """By client; clients with equal histories share one object. No trajectories: they would be clients x rounds."""
    found: dict[int, dict[str, Any]] = {}
    for counts, ranges in book.groups().items():
        total = Counter[str]()
        for (kind, _, purpose), n in zip(book.steps, counts, strict=True):
            total[kind] += n
            total["rounds"] += n if (kind, purpose) == ("commit", "train") else 0
        members = [number for first, last in ranges for number in range(first, last + 1)]
        names = [f"client-{number:04d}" for number in members]
        summary = bill.of(book.file, names, book.budget, book.unbounded is not None, _history(book.spent(counts)))
        summary |= {
            "debits": total["debit"],
            "uncommitted_debits": total["debit"] - total["commit"],
            "rounds": total["rounds"],
            "refusals": 0,
            "entries": total["debit"] + total["commit"],
            "trajectory": [],
        }
        found |= dict.fromkeys(members, summary)
    if lost := sum(1 for summary in found.values() if summary["uncommitted_debits"]):
        bill.report.warn(book.file, None, f"{lost} client(s) with a debit without a commit: it stays charged")
    return {f"client-{number:04d}": found[number] for number in sorted(found)}


def verify_bundle(folder: Path) -> dict[str, Any]:
    """The verdict on a bundle; `violations` is empty exactly when `verified`.

    Returns:
        `verified`, `bundle`, `charter_sha256`, `simulated`, `claim`, `checked` {ledgers, entries, signatures},
        `partners` {name: {epsilon (odometer; None: unbounded), epsilon_filter, epsilon_cap, delta, debits,
        uncommitted_debits, rounds, refusals, entries, trajectory [{round, epsilon_filter}]}}, `violations` and
        `warnings` [{file, line, what}], `limits` (sentences to show wherever a verdict is shown). JSON throughout.

    Raises:
        Unreadable: the folder or its charter is missing or is none at all, so that nothing can be judged.
    """
    report, root = Report(), Path(folder)
    if not root.is_dir():
        raise Unreadable(str(folder), None, "no such folder")
    terms = _load_charter(root, report)
    _check_keys(root, report, terms)
    bill, partners = _Bill(terms, report), dict[str, Partner]()
    book: Coordinator | Population
    if terms.clients:
        book = Population(report, terms)
        book.read(root)
        book.finish()
    else:
        book = Coordinator(report, terms)
        book.read(root)
        partners = {name: Partner(report, terms, name) for name in terms.declared}
        for partner in partners.values():
            partner.read(root)
            partner.finish()
        _cross_check(report, book, partners)
    for name in _listing(root, "partners"):
        if name not in partners:
            report.wrong(f"partners/{name}", None, "no partner of this charter")
    books: dict[str, Book] = {**partners, terms.coordinator: book}
    newest = _check_closings(root, report, terms, books, book.runs)
    _check_model(root, report, _last(book.runs))
    if isinstance(book, Population):
        bills = _client_summaries(book, bill)
    else:
        bills = {name: _partner_summary(partner, bill) for name, partner in partners.items()}
    refusals = Counter(
        (name, act.body["run_id"], act.body["round"], act.body["reason"])
        for name, partner in partners.items()
        for act in partner.refusals
    )
    _check_result(root, report, terms, book.runs, refusals, bills, bill.coarse)
    complete = (
        f"The bill is complete as of the newest closing checkpoint in this bundle, run {newest}: whoever made the bundle "
        "could withhold later runs together with everybody's later entries."
        if newest
        else "No good closing checkpoint is in this bundle: nobody vouches that any of it is complete."
    )
    simulated = ["Simulated: all keys and data were on one machine, so the signatures bind nobody."]
    return {
        "verified": not report.violations,
        "bundle": str(folder),
        "charter_sha256": terms.sha256,
        "simulated": terms.simulated,
        "claim": _claim(terms),
        "checked": dict(report.checked),
        "partners": bills,
        "violations": report.violations,
        "warnings": report.warnings,
        "limits": [*LIMITS, complete] + (simulated if terms.simulated else []),
    }


def main(arguments: list[str]) -> int:
    """`python verifier.py BUNDLE`."""
    if len(arguments) != 1:
        print("usage: python verifier.py BUNDLE", file=sys.stderr)
        return 2
    try:
        verdict = verify_bundle(Path(arguments[0]))
    except Unreadable as err:
        print(ascii(str(err))[1:-1], file=sys.stderr)
        return 2
    print(json.dumps(verdict, indent=2))
    return 0 if verdict["verified"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
