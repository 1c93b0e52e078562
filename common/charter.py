"""The agreement: who trains what together, at which privacy, signed by every partner and the coordinator.

A charter file is one DSSE envelope over the exact bytes of a `Charter` in JSON; its SHA-256 (of those payload bytes) is
on every message and ledger entry. Nobody's word counts but the signatures: threshold = everyone who is named in it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from .config import (
    Algorithm,
    Evaluation,
    Federation,
    Line,
    Name,
    NonNegative,
    Positive,
    Privacy,
    Section,
    SecureAggregation,
    check_central,
    check_delta,
    check_secure,
    threshold_of,
)
from .errors import CharterError, MessageError, counted
from .identity import (
    Envelope,
    Identity,
    canonical,
    fingerprint,
    read_envelope,
    real,
    sha256,
    strict_json,
    verify,
    write_envelope,
    write_whole,
)

CHARTER_TYPE = "application/vnd.hansa.charter+json"
ADVERSARY = "everyone but the partner itself: the coordinator, the other partners and whoever receives the model"
"""Of local noise."""
CENTRAL_ADVERSARY = (
    "whoever sees the models, of every round, and what is made from them; not the coordinator, who is trusted with each client's update "
    "and knows who was asked"
)
"""Of central noise."""

_SECTIONS = re.compile(rb"^[ \t]*\"?(task|algorithm|privacy|partners|population)\"?[ \t]*:", re.MULTILINE)
"""Two of these, and an unreadable charter is a configuration."""

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Member(Section):
    """A partner as the charter names it; `declared_records` is rounded, agreed and public."""

    name: Name
    key: Hex32
    declared_records: Annotated[int, Field(ge=1)]


class Coordinator(Section):
    """The coordinator as the charter names it."""

    name: Name
    key: Hex32


class SimulatedClients(Section):
    """A population without identities: only a simulation above 100 partners has one."""

    clients: Annotated[int, Field(ge=1)]
    declared_records: Annotated[int, Field(ge=1)]


class TaskPin(Section):
    """The task and the hash of its code: a node refuses another."""

    name: Name
    code_sha256: Hex32


class Charter(Section):
    """What was agreed."""

    format: Literal["hansa-charter/1"] = "hansa-charter/1"
    name: Name
    purpose: Line
    task: TaskPin
    coordinator: Coordinator
    partners: tuple[Member, ...]
    population: SimulatedClients | None = None
    algorithm: Algorithm
    privacy: Privacy
    evaluation: Evaluation
    secure_aggregation: SecureAggregation | None = None
    quorum: Annotated[int, Field(ge=0)]
    round_deadline_s: Positive
    declared_tolerance: NonNegative
    benefit: Line
    model_seed: int
    created: datetime
    expires: datetime
    simulated: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [p.name for p in self.partners] + [self.coordinator.name]
        keys = [p.key for p in self.partners] + [self.coordinator.key]
        if len(set(names)) < len(names) or len(set(keys)) < len(keys):
            raise ValueError("a name or a key stands in it twice")
        if bool(self.partners) == (self.population is not None):
            raise ValueError("either partners or a simulated population")
        if self.population is not None and not self.simulated:
            raise ValueError("a population exists only in a simulation")
        if self.privacy.kind != "none" and self.privacy.noise_multiplier is None:
            raise ValueError("the noise multiplier is missing")
        check_secure(
            self.secure_aggregation,
            len(self.partners),  # none in a population
            self.quorum,
            self.algorithm,
            self.privacy,
        )
        check_central(
            self.population.clients if self.population is not None else None,
            self.quorum,
            self.algorithm,
            self.privacy,
            self.evaluation,
            self.secure_aggregation,
        )
        if self.secure_aggregation is not None and self.secure_aggregation.dimension is None:
            raise ValueError("secure_aggregation.dimension is missing: how many numbers are summed")
        for member in self.partners:
            check_delta(self.privacy.delta, member.declared_records)
        if self.created.tzinfo is None or self.expires.tzinfo is None or self.expires <= self.created:
            raise ValueError("expires must be after created, both with a time zone")
        return self

    def member(self, name: str) -> Member | None:
        """The partner of that name, if it is one."""
        return next((p for p in self.partners if p.name == name), None)

    @property
    def adversary(self) -> str:
        """Against whom the epsilons under this charter hold, in words."""
        return adversary_of(self)

    def keys(self) -> dict[str, str]:
        """Name -> public key, of everyone who must sign."""
        return {p.name: p.key for p in self.partners} | {self.coordinator.name: self.coordinator.key}


def adversary_of(terms: Charter | Federation) -> str:
    """Against whom the epsilons under these terms hold, in words."""
    secure = terms.secure_aggregation
    if terms.privacy.kind == "central":
        return CENTRAL_ADVERSARY
    return adversary(secure.colluding if secure is not None and terms.privacy.kind == "shared" else None)


def adversary(colluding: int | None) -> str:
    """Against whom an epsilon holds, in words.

    Args:
        colluding: t of shared noise; None: local noise.
    """
    if colluding is None:
        return ADVERSARY
    if colluding == 0:
        return (
            "the coordinator alone, and whoever receives the model but is no partner: a partner knows its own share of the noise, "
            "and without that share less is left than what was charged"
        )
    some = "one partner" if colluding == 1 else f"at most {colluding} partners"
    return f"the coordinator and {some}, together, and whoever receives the model"


def draft(
    config: Federation,
    *,
    task_sha256: str,
    coordinator_key: str,
    partner_keys: dict[str, str],
    noise_multiplier: float | None,
    simulated: bool,
    population: SimulatedClients | None = None,
    declared: dict[str, int] | None = None,
) -> Charter:
    """A charter from a configuration and the keys of those who will sign it.

    Args:
        noise_multiplier: what the filter calibrated; None with privacy kind none.
        declared: declared sizes by partner, when the configuration describes a population.

    Raises:
        CharterError: the parts do not fit together.
    """
    sizes = declared or {name: p.declared_records for name, p in (config.partners or {}).items()}
    created = datetime.now(UTC).replace(microsecond=0)
    try:
        return Charter(
            name=config.name,
            purpose=config.purpose,
            task=TaskPin(name=config.task, code_sha256=task_sha256),
            coordinator=Coordinator(name="coordinator", key=coordinator_key),
            partners=tuple(
                Member(name=name, key=key, declared_records=sizes[name]) for name, key in partner_keys.items()
            ),
            population=population,
            algorithm=config.algorithm,
            privacy=config.privacy.model_copy(update={"noise_multiplier": noise_multiplier}),
            evaluation=config.evaluation,
            secure_aggregation=config.secure_aggregation,
            quorum=config.quorum,
            round_deadline_s=config.round_deadline_s,
            declared_tolerance=config.declared_tolerance,
            benefit=config.benefit,
            model_seed=config.seed,
            created=created,
            expires=created + timedelta(days=config.expires_days),
            simulated=simulated,
        )
    except ValidationError as err:
        raise CharterError(f"cannot draft the charter: {_first(err)}") from err


class SignedCharter:
    """Charter bytes with the signatures collected so far.

    Attributes:
        charter: what the bytes say.
        payload: the exact bytes that are signed.
        sha256: their SHA-256; the name of this charter everywhere.
    """

    def __init__(self, payload: bytes, signatures: tuple[tuple[str, bytes], ...] = ()) -> None:
        try:
            self.charter = Charter.model_validate(strict_json(payload))
        except MessageError as err:
            raise CharterError(f"the charter is {err.message}") from err
        except ValidationError as err:
            raise CharterError(f"the charter is malformed: {_first(err)}") from err
        if _payload(self.charter) != payload:  # one reading for every reader: no "10" for 10, nothing left out
            raise CharterError("the charter is not in the layout that Hansa writes", "Draft it with Hansa.")
        self.payload = payload
        self.signatures = signatures
        self.sha256 = sha256(payload)

    @classmethod
    def unsigned(cls, charter: Charter) -> SignedCharter:
        """A charter that nobody has signed yet."""
        return cls(_payload(charter))

    @classmethod
    def load(cls, path: Path) -> SignedCharter:
        """Read a charter file; signatures are not checked here.

        Raises:
            CharterError: missing or malformed.
        """
        try:
            data = path.read_bytes()
        except OSError as err:
            raise CharterError(f"{path}: {err.strerror}", "Give the path of a charter file.") from err
        try:
            return cls.parse(data)
        except CharterError as err:
            raise CharterError(f"{path}: {err.message}", err.hint) from err

    @classmethod
    def parse(cls, data: bytes) -> SignedCharter:
        """Read the bytes of a charter file.

        Raises:
            CharterError: malformed.
        """
        try:
            envelope = read_envelope(data.removesuffix(b"\n"), CHARTER_TYPE)
        except MessageError as err:
            if len(set(_SECTIONS.findall(data[:1_000_000]))) > 1:
                raise CharterError(
                    "a configuration, and no charter yet",
                    "`hansa plan FILE` reads a configuration; `hansa charter new FILE --keys KEYS` makes the charter from it.",
                ) from err
            raise CharterError(
                f"not a charter: {err.message}",
                "Ask the coordinator for the file again: the one that `hansa charter new` wrote.",
            ) from err
        return cls(envelope.payload, envelope.signatures)

    def to_bytes(self) -> bytes:
        """The bytes of the charter file."""
        return write_envelope(Envelope(CHARTER_TYPE, self.payload, self.signatures)) + b"\n"

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_whole(path, self.to_bytes())

    def sign(self, identity: Identity) -> SignedCharter:
        """The same charter with one more signature; order follows the charter, so files compare equal.

        Raises:
            CharterError: this key does not stand in the charter.
        """
        order = list(self.charter.keys().values())
        if identity.key not in order:
            raise CharterError(
                f"{identity.name}'s key ({fingerprint(identity.key)}) does not stand in this charter",
                "Ask the coordinator for a charter that names your key.",
            )
        made = dict(self.signatures) | {identity.key: identity.sign(CHARTER_TYPE, self.payload)}
        known = [key for key in order if key in made]
        return SignedCharter(self.payload, tuple((key, made[key]) for key in known))

    def missing(self) -> list[str]:
        """Names of those who have not signed."""
        made = {key for key, _ in self.signatures}
        return [name for name, key in self.charter.keys().items() if key not in made]

    def verify(self, now: datetime | None = None) -> Charter:
        """The charter, if everyone who is named in it signed exactly these bytes and it has not expired.

        Args:
            now: for expiry; None leaves expiry out (an audit of the past).

        Raises:
            CharterError: what is wrong and with whom.
        """
        keys = self.charter.keys()
        names = {key: name for name, key in keys.items()}
        for key, signature in self.signatures:
            if key not in names:
                raise CharterError(
                    f"signed by a key that is not a partner's: {fingerprint(key)}",
                    "Refuse this charter: somebody who is not named in it signed it.",
                )
            try:
                verify(key, CHARTER_TYPE, self.payload, signature)
            except MessageError as err:
                raise CharterError(
                    f"the signature of {names[key]} does not fit: the charter was edited after signing",
                    "Ask for the file that was signed, or have everyone sign this one.",
                ) from err
        if absent := self.missing():
            raise CharterError(
                f"not signed by {', '.join(absent)}",
                "They sign with: hansa charter sign CHARTER.json --home HOME",
            )
        if len(self.signatures) != len(keys):
            raise CharterError("a signature stands in it twice")
        if now is not None and now >= self.charter.expires:
            raise CharterError(f"expired on {self.charter.expires:%Y-%m-%d %H:%M} UTC", "Draft and sign a new charter.")
        return self.charter


def in_words(signed: SignedCharter) -> str:
    """What is being agreed to, for the people who sign it."""
    c = signed.charter
    a, p, e, s = c.algorithm, c.privacy, c.evaluation, c.secure_aggregation
    lines = [f"CHARTER  {c.name}", f"  sha-256  {signed.sha256}"]
    if c.purpose:
        lines.append(f"  purpose  {c.purpose}")
    if c.simulated:
        lines.append("  SIMULATED: all keys and data are on one machine; this charter can never debit a real dataset")
    lines += ["", "Who"]
    if c.population:
        lines.append(
            f"  {c.population.clients} simulated clients of about {c.population.declared_records} records each, no keys"
        )
    for m in c.partners:
        lines.append(f"  {m.name:<20} about {m.declared_records} records   key {fingerprint(m.key)}")
    lines.append(f"  {c.coordinator.name:<20} coordinates, holds no records   key {fingerprint(c.coordinator.key)}")
    lines += ["", "What"]
    lines.append(f"  task {c.task.name}, code {c.task.code_sha256[:16]}...; a node runs only the code it installed")
    lines.append(
        f"  {counted(a.rounds, 'round')} of {a.strategy.name}, {counted(a.local.steps, 'local step')} of {a.local.optimizer.name} "
        f"(lr {a.local.optimizer.lr:g}), each over "
        + ("all records" if a.local.sampling_rate == 1 else f"a Poisson sample of rate {a.local.sampling_rate:g}")
    )
    if p.kind == "central":
        lines.append(
            f"  in each round every client takes part with probability {a.participation:g}, drawn in secret; the round counts "
            f"however few there are, and is thrown away when it takes longer than {c.round_deadline_s:g} s"
        )
    else:
        lines.append(f"  a round counts when at least {c.quorum} answer within {c.round_deadline_s:g} s")
    lines += ["", "Privacy"]
    if p.kind == "none":
        lines.append("  NONE. Updates leave unprotected and can reveal records. Each budget becomes unbounded.")
    else:
        lines.append(
            f"  each {'client' if p.unit == 'client' else 'partner'} spends at most epsilon = {p.epsilon:g} at delta = {p.delta:g} "
            "of its dataset's budget"
        )
        unit = "one client, with all it holds" if p.unit == "client" else "one record of one partner"
        lines.append(f"  unit: {unit}; adjacency: add or remove one {p.unit}")
        times = f"{p.noise_multiplier:g} x the clipping norm {p.clip_norm:g}"
        if p.kind == "local":
            lines.append(f"  noise: local, Gaussian, {times}, added to every step before anything leaves")
        elif p.kind == "central":
            lines.append(f"  noise: central, Gaussian, {times}, added once a round by the coordinator to the sum of")
            lines.append(
                "         all updates, each clipped to that norm; the sum is divided by how many are expected, not by how"
            )
            lines.append(
                "         many came. Nothing protects an update on its way to the coordinator, who must be trusted"
            )
        else:
            assert s is not None
            sure = c.quorum - s.colluding
            lines.append(
                f"  noise: shared, discrete Gaussian, {times} in every sum; each partner adds 1/sqrt({sure}) of it"
            )
            lines.append(f"         to the sum of its clipped gradients, so that {sure} of them together are enough")
        lines.append(f"  adversary: {c.adversary}")
    if s is not None:
        lines += ["", "Secure aggregation"]
        lines.append(
            f"  of what is trained the coordinator learns sums over {c.quorum} partners or more, and nothing else"
        )
        if p.kind == "none":
            lines.append(
                "  two sums of different partners can be subtracted: without noise that leaves one partner's update"
            )
        together = (
            "no partner works with it"
            if s.colluding == 0
            else "at most one partner works with it"
            if s.colluding == 1
            else f"at most {s.colluding} partners work with it"
        )
        lines.append(
            f"  this holds while {together}; {threshold_of(len(c.partners), s.colluding)} partners' shares open a sum"
        )
        lines.append(
            f"  a run may ask for {counted(s.retries, 'round')} again, each of which is paid for"
            if s.retries
            else "  no round may be asked again"
        )
    often = "every round" if e.every == 1 else f"every {e.every} rounds"
    lines += ["", "Evaluation"]
    match e.kind:
        case "none":
            lines.append("  none")
        case "public":
            lines.append(f"  {often} on the {e.test_fraction:.0%} of rows that each owner registered as PUBLIC before")
            lines.append("  training: their scores and labels leave the node and are outside the privacy budget")
        case "private":
            lines.append(
                f"  {often}, per-class score histograms with Gaussian noise {e.noise_multiplier:g} x sensitivity 1,"
            )
            lines.append("  charged to the same budget")
    lines += ["", "Benefit", f"  {c.benefit}", "", "Validity"]
    lines.append(f"  from {c.created:%Y-%m-%d} to {c.expires:%Y-%m-%d %H:%M} UTC")
    missing = signed.missing()
    lines.append("  signed by everyone" if not missing else f"  not yet signed by: {', '.join(missing)}")
    return "\n".join(lines)


def _payload(charter: Charter) -> bytes:
    said = charter.model_dump(mode="json")
    # What came later is left out where nothing is said of it: a charter from before keeps its bytes.
    for section, key in ((said, "secure_aggregation"), (said["algorithm"], "average_last")):
        if section[key] is None:
            del section[key]
    return canonical(_decimal(said))


def _decimal(value: Any) -> Any:
    """Floats as decimal strings, for canonical bytes; pydantic reads them back as the same floats."""
    if isinstance(value, float):
        return real(value)
    if isinstance(value, dict):
        return {k: _decimal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_decimal(v) for v in value]
    return value


def _first(err: ValidationError) -> str:
    item = err.errors()[0]
    where = ".".join(str(part) for part in item["loc"]) or "whole"
    return f"{where}: {str(item['msg']).removeprefix('Value error, ')}"
