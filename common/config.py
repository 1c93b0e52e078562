"""YAML -> validated, frozen models; unknown keys are refused with their place in the file.

The sections that partners must agree on (`Algorithm`, `Privacy`, `Evaluation`) are the ones a charter carries, so a
configuration and a charter cannot mean different things by the same word.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .errors import ConfigError, counted

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
# Text that people sign is shown to them on one line: no line breaks, terminal codes or text-direction marks.
Line = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500, pattern=r"^\P{C}*$")]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=0, le=3)]
"""σ of ln x; at 3 one client in forty is 350 times as slow as the median."""

SIGNED_PARTNERS_MAX = 100
"""Above this many partners a simulation keeps one run ledger instead of an identity and a ledger each."""


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimizer(Section):
    """The optimiser of local steps; its state starts fresh every round."""

    name: Literal["sgd", "adam"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _momentum_of_sgd(self) -> Optimizer:
        if self.name != "sgd" and self.momentum:
            raise ValueError("momentum goes with sgd")
        return self


class Local(Section):
    """What one partner does in one round: `steps` steps, each over a Poisson sample of rate `sampling_rate`."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    sampling_rate: Fraction = 1.0
    optimizer: Optimizer


class Strategy(Section):
    """A Flower server strategy by name, with the parameters it takes."""

    name: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    proximal_mu: NonNegative | None = None
    server_learning_rate: Positive | None = None
    server_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta: Positive | None = None
    beta_1: Annotated[float, Field(ge=0, lt=1)] | None = None
    beta_2: Annotated[float, Field(ge=0, lt=1)] | None = None
    tau: Positive | None = None

    def parameters(self) -> dict[str, float]:
        """The parameters that were set, by Flower's names."""
        return {k: v for k, v in self.model_dump().items() if k != "name" and v is not None}

    @model_validator(mode="after")
    def _only_its_own(self) -> Strategy:
        own = {
            "fedavg": set[str](),
            "fedprox": {"proximal_mu"},
            "fedavgm": {"server_learning_rate", "server_momentum"},
            "fedadam": {"eta", "beta_1", "beta_2", "tau"},
            "fedyogi": {"eta", "beta_1", "beta_2", "tau"},
            "fedadagrad": {"eta", "tau"},
        }[self.name]
        if foreign := sorted(set(self.parameters()) - own):
            allowed = ", ".join(sorted(own)) or "no parameters"
            raise ValueError(f"strategy {self.name} does not take {', '.join(foreign)}; it takes {allowed}")
        if self.name == "fedprox" and not self.proximal_mu:
            raise ValueError("fedprox needs proximal_mu above 0 (with 0 it is fedavg)")
        return self


class Algorithm(Section):
    """How the model is trained."""

    strategy: Strategy = Strategy()
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    participation: Fraction = 1.0
    weighting: Literal["declared", "uniform"] = "declared"
    average_last: Fraction | None = None
    """The result is the mean of the models after this share of the rounds, the last ones: what comes after the noise costs nothing."""
    local: Local


class Privacy(Section):
    """What each partner's dataset may spend, and what for.

    The unit is one record of one partner or, of central noise, all that one client holds; adjacency is add-or-remove-one. `kind`, also
    written `noise`, says where the noise is added. local: by every partner, enough for its own update to be private by itself, against everybody else. shared: by every
    partner a share, enough for the secure sum to be private, against the coordinator and so many partners as
    `secure_aggregation.colluding` says. central: by the coordinator, once to the sum of all clients' clipped updates, against whoever
    sees the models but not against the coordinator itself; of simulated populations only. `noise_multiplier` (noise standard deviation over `clip_norm`; of shared noise that of
    quorum − colluding shares together) is calibrated with the filter that will enforce it when left out.
    """

    kind: Literal["local", "shared", "central", "none"] = Field("local", validation_alias=AliasChoices("kind", "noise"))
    unit: Literal["record", "client"] = "record"
    epsilon: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    clip_norm: Positive | None = None
    noise_multiplier: Annotated[float, Field(ge=0.3, allow_inf_nan=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _once(cls, told: Any) -> Any:
        if isinstance(told, dict) and {"kind", "noise"} <= told.keys():
            raise ValueError("noise is another name of kind: give one of them, not both")
        return told

    @model_validator(mode="after")
    def _complete(self) -> Privacy:
        numbers = ("epsilon", "delta", "clip_norm")
        if self.kind != "none" and (missing := [n for n in numbers if getattr(self, n) is None]):
            raise ValueError(f"privacy kind {self.kind} needs {', '.join(missing)}")
        if self.kind == "none" and any(getattr(self, n) is not None for n in (*numbers, "noise_multiplier")):
            raise ValueError("privacy kind none takes no epsilon, delta, clip_norm or noise_multiplier")
        if self.kind == "central" and "unit" not in self.model_fields_set:
            raise ValueError("unit is missing: central noise covers all that one client holds. Write unit: client")
        if (self.kind == "central") != (self.unit == "client"):
            raise ValueError(
                "unit client goes with kind central, and only with it: central noise covers all that one client holds"
            )
        return self


class Evaluation(Section):
    """How the model is measured.

    none: not at all. public: on rows that their owner registered as public before training; scores may leave.
    private: noisy per-class score histograms on held-out rows, charged to the dataset as their own event.
    """

    kind: Literal["none", "public", "private"] = "public"
    every: Annotated[int, Field(ge=1)] = 1
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    noise_multiplier: Annotated[float, Field(ge=0.3, allow_inf_nan=False)] | None = None
    bins: Annotated[int, Field(ge=2, le=1000, multiple_of=2)] = 20

    @model_validator(mode="after")
    def _complete(self) -> Evaluation:
        if (self.kind == "private") != (self.noise_multiplier is not None):
            raise ValueError("noise_multiplier goes with evaluation kind private, and only with it")
        return self


class SecureAggregation(Section):
    """The coordinator learns the sum over the partners of a round, and nothing else of any of them.

    Attributes:
        colluding: t, how many partners may work together with the coordinator.
        retries: how many times in a whole run a round may be asked again, of fewer, because its sum could not be opened: somebody
            lied, or a vector was lost with the coordinator's process. Each is paid for, whether it is needed or not.
        dimension: how many numbers are summed: the model's trainable parameters. Taken from the task.
    """

    colluding: Annotated[int, Field(ge=0, le=98)]
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    dimension: Annotated[int, Field(ge=1, le=10**9)] | None = None


class PartnerEntry(Section):
    """One organisation: its data file and the size it declares (rounded, public)."""

    data: str
    declared_records: Annotated[int, Field(ge=1)]
    allow_single_class: bool = False


class Partition(Section):
    """How a population's rows come to its clients: as the data set says (natural); dealt, each row to one client; or drawn, so many by
    each client, for more clients than there are rows."""

    kind: Literal["natural", "iid", "dirichlet", "quantity", "drawn"] = "iid"
    alpha: Positive | None = None
    min_records: Annotated[int, Field(ge=1)] = 10
    records: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Partition:
        if self.kind in ("dirichlet", "quantity") and self.alpha is None:
            raise ValueError(f"alpha is missing: partition kind {self.kind} needs it")
        if self.kind in ("natural", "iid") and self.alpha is not None:
            raise ValueError("alpha goes with partition kind dirichlet, quantity or drawn, and only with them")
        if self.kind == "drawn" and self.records is None:
            raise ValueError("records is missing: partition kind drawn needs to know how many each client draws")
        if self.kind != "drawn" and self.records is not None:
            raise ValueError("records goes with partition kind drawn, and only with it")
        return self


class Population(Section):
    """Simulated clients that share one data set."""

    dataset: str
    clients: Annotated[int, Field(ge=1, le=1_000_000)]
    partition: Partition = Partition()


class Compute(Section):
    """How long clients work, in virtual seconds.

    Attributes:
        seconds_per_record: of the median client, for one record in one step.
        overhead_s: of the median client, for any answer, whatever its size: checks, signatures, what is written to disk.
        spread: σ of the lognormal factor by which a client is slower or faster than the median, the same in every round.
    """

    seconds_per_record: NonNegative = 0.0
    overhead_s: NonNegative = 0.0
    spread: Spread = 0.0


class Network(Section):
    """The clients' lines.

    Attributes:
        down_mbps: megabits a second to the median client; None: no limit.
        up_mbps: from it.
        latency_ms: one way.
        spread: σ of the lognormal factor by which a client's line is slower or faster, both ways, the same in every round.
    """

    down_mbps: Positive | None = None
    up_mbps: Positive | None = None
    latency_ms: NonNegative = 0.0
    spread: Spread = 0.0


class Availability(Section):
    """With which probability a client is there: share · (1 + daily_swing · cos(2π (hour − peak_hour)/24)).

    Hours are those of the virtual clock, at which the run begins at 0. Drawn for each client and round by itself.
    """

    share: Fraction = 1.0
    daily_swing: Annotated[float, Field(ge=0, le=1)] = 0.0
    peak_hour: Annotated[float, Field(ge=0, lt=24)] = 2.0

    @model_validator(mode="after")
    def _a_probability(self) -> Availability:
        if (most := self.share * (1 + self.daily_swing)) > 1:
            raise ValueError(
                f"share {self.share:g} and daily_swing {self.daily_swing:g} come to {most:.3g} at the peak hour"
            )
        return self


class Stragglers(Section):
    """In each round this share of clients takes `slowdown` times as long to compute."""

    share: Annotated[float, Field(ge=0, le=1)]
    slowdown: Annotated[float, Field(ge=1, le=1e6)]


class System(Section):
    """What the clients of a simulation are like, and how long a round waits for them: for estimates, in no charter.

    Attributes:
        dropout: with which probability a client that was asked to train never answers.
        deadline_s: how long a round waits, in virtual seconds; None: `round_deadline_s`.
        over_sampling: so many more are asked than are needed, as a fraction; the round ends when enough have answered.
    """

    compute: Compute = Compute()
    network: Network = Network()
    availability: Availability = Availability()
    stragglers: Stragglers = Stragglers(share=0.0, slowdown=1.0)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    deadline_s: Positive | None = None
    over_sampling: Annotated[float, Field(ge=0, le=10)] = 0.0


class Federation(Section):
    """One federation: who takes part, what is trained, at which privacy, for how long."""

    name: Name
    purpose: Line = ""
    task: Name
    partners: dict[Name, PartnerEntry] | None = None
    population: Population | None = None
    algorithm: Algorithm
    privacy: Privacy
    evaluation: Evaluation = Evaluation()
    secure_aggregation: SecureAggregation | None = None
    quorum: Annotated[int, Field(ge=0)]
    round_deadline_s: Positive = 600.0
    declared_tolerance: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    expires_days: Annotated[int, Field(ge=1, le=3650)] = 365
    benefit: Line = "Every partner receives the final model."
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    system: System | None = None

    @property
    def size(self) -> int:
        """How many partners, or simulated clients, there are."""
        return self.population.clients if self.population is not None else len(self.partners or {})

    @property
    def cohort(self) -> int:
        """How many of them are asked in a round."""
        return max(1, round(self.algorithm.participation * self.size))

    def with_noise(self, noise_multiplier: float | None) -> Federation:
        """The same with this noise."""
        return self.model_copy(
            update={"privacy": self.privacy.model_copy(update={"noise_multiplier": noise_multiplier})}
        )

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        if (self.partners is None) == (self.population is None):
            raise ValueError("give either partners (organisations with a file each) or population (simulated clients)")
        size = self.size
        if self.partners is not None and not 2 <= size <= SIGNED_PARTNERS_MAX:
            raise ValueError(f"partners: {size} given, 2 to {SIGNED_PARTNERS_MAX} allowed")
        if self.partners is not None and "coordinator" in self.partners:
            raise ValueError("partners: the name coordinator is taken by the coordinator")
        cohort = self.cohort
        if self.quorum > cohort:
            raise ValueError(f"quorum {self.quorum} is more than the {counted(cohort, 'partner')} asked in a round")
        largest = max((p.declared_records for p in (self.partners or {}).values()), default=0)
        check_delta(self.privacy.delta, largest)
        if self.privacy.kind == "central" and self.system is not None:
            raise ValueError(
                "system does not go with central noise: what it tells of a round tells how many were asked, and the sample is secret"
            )
        check_central(
            self.population.clients if self.population is not None else None,
            self.quorum,
            self.algorithm,
            self.privacy,
            self.evaluation,
            self.secure_aggregation,
        )
        check_secure(
            self.secure_aggregation,
            size,
            self.quorum,
            self.algorithm,
            self.privacy,
        )
        if (more := self.system.over_sampling if self.system else 0) and self.algorithm.participation * (1 + more) > 1:
            raise ValueError(
                f"system.over_sampling {more:g}: at participation {self.algorithm.participation:g} there are not so many more "
                f"to ask; at most {1 / self.algorithm.participation - 1:.3g}"
            )
        return self


def without_system(config: Federation, source: Path) -> None:
    """Refuse a configuration of simulated clients where real ones will answer.

    Raises:
        ConfigError: it has a `system`.
    """
    if config.system is not None:
        raise ConfigError(
            f"{source}: system is about simulated clients; real ones are as they are",
            "Take the section out of the file. Only `hansa simulate` reads it, and no charter can carry it.",
        )


def threshold_of(partners: int, colluding: int) -> int:
    """The least threshold T with 2T − n > t: how many shares open a partner's own mask."""
    return (partners + colluding) // 2 + 1


def check_secure(
    secure: SecureAggregation | None, partners: int, quorum: int, algorithm: Algorithm, privacy: Privacy
) -> None:
    """Refuse secure aggregation, or noise shared under it, whose promise these terms cannot keep.

    Args:
        partners: how many there are with keys of their own; in a simulated population of up to SIGNED_PARTNERS_MAX clients each has.

    Raises:
        ValueError: with what is allowed.
    """
    if secure is None:
        if privacy.kind == "shared":
            raise ValueError(
                "secure_aggregation is missing: shared noise protects only a sum that nobody sees the parts of. "
                "State colluding: how many partners may work with the coordinator"
            )
        return
    if not 3 <= partners <= SIGNED_PARTNERS_MAX:
        raise ValueError(f"secure_aggregation is for 3 to {SIGNED_PARTNERS_MAX} partners with keys of their own")
    t, least = secure.colluding, max(secure.colluding + 2, threshold_of(partners, secure.colluding))
    if least > partners:
        raise ValueError(
            f"secure_aggregation.colluding {t} is too many of {partners} partners: no quorum would do. At most {partners - 2}, so that "
            f"two in every sum do not collude"
        )
    if not least <= quorum <= partners:
        raise ValueError(
            f"quorum {quorum} with secure_aggregation.colluding {t}: of {partners} partners at least {least} must be in every sum, so "
            f"that two of them do not collude and no two sums of one attempt can be opened"
        )
    if privacy.kind != "shared":
        return
    local, strategy = algorithm.local, algorithm.strategy.name
    wrong = {
        "algorithm.local.steps must be 1: shared noise is added to the sum of one gradient step": local.steps != 1,
        "algorithm.local.optimizer must be sgd without momentum: a round is one gradient step. Momentum belongs to the strategy: "
        "{name: fedavgm, server_momentum: 0.9}": local.optimizer.name != "sgd" or local.optimizer.momentum > 0,
        "algorithm.strategy must not be fedprox: it pulls towards the model that a round began with, which is where its one step "
        "is. fedavg does the same": strategy == "fedprox",
        "algorithm.weighting must be declared: every record weighs the same under shared noise": algorithm.weighting
        != "declared",
    }
    if told := next((words for words, is_so in wrong.items() if is_so), None):
        raise ValueError(told)


def check_central(
    clients: int | None,
    quorum: int,
    algorithm: Algorithm,
    privacy: Privacy,
    evaluation: Evaluation,
    secure: SecureAggregation | None,
) -> None:
    """Refuse central noise whose promise, one client's whole participation, these terms cannot keep.

    Args:
        clients: of a simulated population; None: partners.

    Raises:
        ValueError: with what is allowed.
    """
    if privacy.kind != "central":
        if quorum < 1:
            raise ValueError("quorum must be 1 or more: only with central noise does a round count with nobody in it")
        return
    wrong = {
        "privacy.kind central is for simulated populations only: between organisations the coordinator would have to be trusted with "
        "every update": clients is None,
        "quorum must be 0 with central noise: a cohort is a secret sample and may be empty, and giving up small ones would tell "
        "their size": quorum != 0,
        "algorithm.weighting must be uniform with central noise: no client's update may weigh more than another's": algorithm.weighting
        != "uniform",
        "evaluation.kind private charges records, and here the unit is a client: public or none": evaluation.kind
        == "private",
        "secure_aggregation hides the updates that central noise has to clip": secure is not None,
    }
    if told := next((words for words, is_so in wrong.items() if is_so), None):
        raise ValueError(told)
    check_delta(privacy.delta, clients or 0, "client")


def check_delta(delta: float | None, size: int, unit: str = "record") -> None:
    """Refuse δ ≥ 1/n: it would allow a mechanism that publishes a whole record (or client) now and then.

    Raises:
        ValueError: with the number allowed.
    """
    if delta is not None and size and delta >= 1 / size:
        raise ValueError(
            f"privacy.delta {delta:g} is not below 1/n = {1 / size:.2g} for {size} {unit}s; "
            f"such a delta allows publishing whole {unit}s"
        )


def load_config(path: Path) -> Federation:
    """Read and check a configuration.

    Raises:
        ConfigError: naming file, line, key, the value found and what is allowed.
    """
    return load_yaml(path, Federation)


Model = TypeVar("Model", bound=Section)


def load_yaml(path: Path, model: type[Model], missing: str = "Ready-made configurations are in configs/.") -> Model:
    """Read a YAML file as `model`.

    Args:
        missing: what to do when there is no such file.

    Raises:
        ConfigError: naming file, line, key, the value found and what is allowed.
    """
    if path.suffix.lower() == ".toml":
        raise ConfigError(
            f"{path}: a TOML file; what Hansa computes from is YAML",
            "Of other tools' files `hansa plan` and `hansa charter verify` check the claims (docs/claims.md), and no more. "
            "docs/configuration.md has what a configuration says.",
        )
    root = _compose(path, missing)
    if root is None:
        raise ConfigError(f"{path}: the file is empty", _WHERE if model is Federation else missing)
    try:
        return model.model_validate(_construct(path))
    except ValidationError as err:
        if isinstance(root, yaml.MappingNode) and "payloadType" in {key.value for key, _ in root.value}:
            raise ConfigError(
                f"{path}: a signed file (a charter?) and no configuration",
                "A charter is read by `hansa charter show` and `verify`; what its run would cost a node says "
                "`hansa node budget --plan CHARTER`.",
            ) from err
        raise ConfigError(_told(path, root, err), _WHERE) from err


def located(path: Path, err: ConfigError) -> ConfigError:
    """An error that data showed, with the place in the file of the key that its words begin with, if they do."""
    key = err.message.partition(" ")[0].rstrip(":").split(".")
    node, line = _find(_compose(path, ""), key)
    return err if node is None else ConfigError(f"{path}:{line}: {err.message}", err.hint or _WHERE)


_WHERE = "Every key is described in docs/configuration.md; ready-made files are in configs/."


def _told(path: Path, root: yaml.Node | None, err: ValidationError) -> str:
    """What is wrong, a line each."""
    items = err.errors()
    # That a list is too short because one of its items is wrong is no second mistake.
    places = [item["loc"] for item in items]
    told = [
        item
        for item in items
        if not item["loc"] or not any(p != item["loc"] and p[: len(item["loc"])] == item["loc"] for p in places)
    ]
    return "\n".join(_explain(path, root, dict(item)) for item in told)


# -- variations of a file ------------------------------------------------------------------------------------------------


def values_in(text: str) -> list[Any]:
    """YAML values with commas between them: `0.5,1,2`, `fedavg,fedadam`, `{name: fedavg},{name: fedprox, proximal_mu: 0.1}`.

    Raises:
        ConfigError: they are not.
    """
    try:
        found = yaml.load(f"[{text}]", Loader=_UniqueKeyLoader)  # noqa: S506  a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as err:
        raise ConfigError(
            f"{text!r}: not values with commas between them",
            "For example: 0.5,1,2. A value with commas of its own stands in quotes, brackets or braces.",
        ) from err
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{text!r}: no values", "For example: 0.5,1,2")
    return found


def load_variations(path: Path, changes: Sequence[Mapping[str, Any]]) -> list[Federation]:
    """The configuration in a file with other values at some dotted keys, once for each of `changes`; each is checked as a whole.

    Raises:
        ConfigError: as `load_config` of the file itself; a key that there is not, with those that there are; a value or a
            combination of values that is not allowed.
    """
    load_config(path)
    told, root, found = _construct(path), _compose(path, ""), []
    for change in changes:
        raw = copy.deepcopy(told)
        for key, value in change.items():
            _put(raw, key, value)
        try:
            found.append(Federation.model_validate(raw))
        except ValidationError as err:
            what = ", ".join(f"{key}={_short(value)}" for key, value in change.items())
            raise ConfigError(f"with {what}:\n{_told(path, root, err)}", _WHERE) from err
    return found


def value_at(config: Federation, key: str) -> Any:
    """What a configuration has at a dotted key; a section as a mapping of what was set in it."""
    here: Any = config
    for part in key.split("."):
        if isinstance(here, BaseModel):
            here = getattr(here, _field(type(here), part)[0])
        else:
            here = here[part] if here is not None else None
    return here.model_dump(exclude_unset=True) if isinstance(here, BaseModel) else here


def canonical_key(key: str) -> str:
    """A dotted key by the sections' own names: `privacy.noise` is `privacy.kind`.

    Raises:
        ConfigError: there is no such key; of a mapping's (`partners.NAME`) only a file can tell.
    """
    model: Any = Federation
    names: list[str] = []
    for part in key.split("."):
        if isinstance(model, type) and issubclass(model, BaseModel):
            name, field = _field(model, part, ".".join(names))
            model = _section(field.annotation)
        elif get_origin(model) is dict:
            name, model = part, get_args(model)[1]
        else:
            raise ConfigError(f"{key}: {'.'.join(names)} has no keys of its own", _WHERE)
        names.append(name)
    return ".".join(names)


def _put(raw: Any, key: str, value: Any) -> None:
    """Set a dotted key; sections on the way there that the file leaves out are made."""
    model: Any = Federation
    names = canonical_key(key).split(".")
    for at, name in enumerate(names):
        if get_origin(model) is dict:
            if not isinstance(raw, dict) or name not in raw:
                raise _unknown(name, ".".join(names[:at]), raw or ())
            model = get_args(model)[1]
        else:
            field = model.model_fields[name]
            for word in _words(name, field)[1:]:  # the word that the file uses must not stand beside this one
                if word in raw:
                    raw[name] = raw.pop(word)
            model = _section(field.annotation)
        if at == len(names) - 1:
            raw[name] = copy.deepcopy(value)
        elif raw.get(name) is None and get_origin(model) is not dict:
            raw[name] = {}
        raw = raw.get(name)


def _field(model: type[BaseModel], word: str, within: str = "") -> tuple[str, FieldInfo]:
    """A section's field by its name or another name that it has."""
    for name, field in model.model_fields.items():
        if word in _words(name, field):
            return name, field
    raise _unknown(word, within, model.model_fields)


def _unknown(word: str, within: str, known: Any) -> ConfigError:
    hint = f"Keys of {within or 'a configuration'}: {', '.join(known) or 'none'}."
    if here := _CALLED_HERE.get(word.lower().replace("-", "_")):
        hint += f" What is called {_short(word)} elsewhere is here: {here}"
    return ConfigError(f"{within + '.' if within else ''}{word}: unknown key", hint)


def _words(name: str, field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [name, *(str(c) for c in alias.choices if c != name)] if isinstance(alias, AliasChoices) else [name]


def _section(annotation: Any) -> Any:
    """The section, or the mapping of sections, in an annotation; None where it is a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        return annotation
    return next((found for one in get_args(annotation) if (found := _section(one)) is not None), None)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _compose(path: Path, missing: str) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file", missing) from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text ({err})", "Save the file as UTF-8.") from err
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}", "Give the path of a readable YAML file.") from err
    except yaml.YAMLError as err:
        raise _yaml_error(path, err) from err
    except RecursionError as err:
        raise ConfigError(f"{path}: nested too deeply", "A configuration has four levels at most.") from err


def _construct(path: Path) -> Any:
    try:
        return _UniqueKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as err:  # constructor errors: duplicate keys, odd tags
        raise _yaml_error(path, err) from err
    except RecursionError as err:
        raise ConfigError(f"{path}: nested too deeply", "A configuration has four levels at most.") from err
    except Exception as err:  # PyYAML's constructors raise whatever they meet, for a date of 2001-99-99 a ValueError
        raise ConfigError(
            f"{path}: not valid YAML: {err}", "Look for a value that is no date, number or text."
        ) from err


def _yaml_error(path: Path, err: yaml.YAMLError) -> ConfigError:
    mark = getattr(err, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    problem = getattr(err, "problem", None) or str(err)
    return ConfigError(f"{where}: not valid YAML: {problem}", "Check indentation and quotes at this place.")


def _short(found: object) -> str:
    if any(
        isinstance(one, str) and "@" in one and "//" in one for one in (found if isinstance(found, list) else [found])
    ):
        return "a URL with a user in it"  # and perhaps a password
    try:
        return reprlib.repr(found)[:200]  # bounded: a few aliases in YAML can stand for gigabytes
    except ValueError:  # an integer of more digits than Python prints
        return "a very long number"


def _explain(path: Path, root: yaml.Node | None, item: dict[str, Any]) -> str:
    """One validation error as `file:line: key: what is wrong (value found)`."""
    loc = [str(part) for part in item["loc"] if part != "[key]"]
    node, line = _find(root, loc)
    hint = ""
    match item["type"]:
        case "extra_forbidden":
            what = "unknown key"
            if here := _CALLED_HERE.get(loc[-1].lower().replace("-", "_")):
                hint = f"; here: {here}"
        case "missing":
            what = "missing; it is required"
        case "model_type" | "model_attributes_type":
            what = "must be keys with values: KEY: VALUE"
        case _:
            what = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":  # of a whole section; its words may begin with the key inside that it is about
        inside = what.split()[0].rstrip(":").split(".")
        found_node, found_line = _find(node, inside)
        if found_node is not None:
            loc, line = [*loc, *inside], found_line
    key = ".".join(loc) or "(whole file)"
    found = item.get("input")
    # Of a part that has parts of its own only the place is shown: what is in it may be nobody's business (a proxy's password).
    deep = isinstance(found, dict | BaseModel) or (
        isinstance(found, list) and any(isinstance(one, dict | list) for one in found)
    )
    shown = "" if item["type"] == "missing" or deep else f" (found {_short(found)})"
    return f"{path}:{line}: {key}: {what}{shown}{hint}"


_NOISE_HERE = (
    "noise_multiplier, the noise's standard deviation divided by clip_norm; left out, it is calibrated for epsilon"
)
_CLIP_HERE = "clip_norm, to which each record's gradient is clipped"
_RATE_HERE = "local.sampling_rate, the probability with which each record joins a step; no batch has a fixed size"
_STEPS_HERE = "algorithm.rounds and local.steps: what costs privacy is a step"
_CALLED_HERE = {
    **dict.fromkeys(("noise_std", "noise_stddev", "stddev", "sigma", "noise_scale"), _NOISE_HERE),
    **dict.fromkeys(("max_grad_norm", "clipping_norm", "l2_norm_clip", "clip", "max_norm"), _CLIP_HERE),
    **dict.fromkeys(("batch_size", "sample_rate", "q"), _RATE_HERE),
    **dict.fromkeys(("epochs", "local_epochs", "num_rounds", "num_server_rounds"), _STEPS_HERE),
    "sensitivity": "nothing: the sensitivity is clip_norm, because each record is clipped to it",
    "target_epsilon": "epsilon",
    "eps": "epsilon",
    "target_delta": "delta",
    "learning_rate": "local.optimizer.lr",
    **dict.fromkeys(("n_min", "minimum_partners", "min_partners"), "quorum, the least number of partners in a sum"),
    **dict.fromkeys(("t", "max_colluding", "collusion"), "secure_aggregation.colluding"),
}
"""What other tools call things -> what to write instead."""


def _find(node: yaml.Node | None, loc: Sequence[str]) -> tuple[yaml.Node | None, int]:
    """The node at `loc`, if it is there, and the line of the last part of `loc` that is."""
    line = 1
    for part in loc:
        line = node.start_mark.line + 1 if node is not None else line
        child = None
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    child, line = value_node, key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            child = node.value[int(part)]
            line = child.start_mark.line + 1
        node = child
        if node is None:
            break
    return node, line
