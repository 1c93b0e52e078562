"""Claims are linted: what a configuration or charter says about privacy and is not differential privacy, with the reason.

Two kinds of input. What Hansa's own models hold (`Federation`, `Charter`) cannot say most of this: an unknown key is an
error there, noise without a clip too. A *raw* mapping can: a file of another tool, or one that was edited by hand. Both
go through the same rules, so that `hansa plan` and `hansa charter verify` can tell a steward why, and not only where.

A finding of severity `refuse` means: the ε in this file is not what it says, or says nothing. `flag` means: it can be
right, and somebody should look. Every code is explained in docs/claims.md.

The rules look at what is *written*. That noise is drawn, or batches sampled, as written is for the audit and the meters.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from .charter import CHARTER_TYPE
from .errors import MessageError
from .identity import read_envelope, strict_json

__all__ = ["CODES", "Finding", "Severity", "lint", "lint_file", "refused"]

Place = tuple[str, ...]


class Severity(StrEnum):
    """What follows from a finding."""

    REFUSE = "refuse"
    FLAG = "flag"


@dataclass(frozen=True)
class Code:
    """One kind of wrong claim: why it is not differential privacy, who showed it, what to do instead."""

    why: str
    source: str
    do: str


CODES: Mapping[str, Code] = {
    "noise-without-clipping": Code(
        "Noise protects in proportion to what one record can change. Without a bound on that, no amount of noise gives a "
        "finite epsilon.",
        "Dwork & Roth, Algorithmic Foundations of Differential Privacy (2014), Def. 3.8 and Thm A.1; Abadi et al. "
        "1607.00133, Alg. 1",
        "Give clip_norm: each record's gradient is scaled down to that length before anything is summed.",
    ),
    "sensitivity-not-the-clip": Code(
        "The noise was scaled to another sensitivity than what clipping enforces, or to a clip that the data chose; the "
        "epsilon is then that of a mechanism that did not run. Noise that is not stated relative to the clip hides which.",
        "Abadi et al. 1607.00133, Alg. 1 (noise is sigma times C, the clip); Andrew et al. 1905.03871 (a clip taken from "
        "data must itself be paid for)",
        "Leave sensitivity and absolute noise out: give noise_multiplier, the noise's standard deviation divided by clip_norm "
        "(or leave that out, too: it is calibrated), and clip_norm, both agreed beforehand.",
    ),
    "unaccounted-metrics": Code(
        "A loss, a score or a count of private rows is a release of those rows. What leaves without noise that is charged "
        "to the budget has no epsilon at all.",
        "Ponomareva et al. 2303.00654 (everything that leaves is part of the mechanism)",
        "evaluation: public on rows that were public before, or evaluation: private with a noise_multiplier; never "
        "training loss.",
    ),
    "shuffled-batches": Code(
        "The accountant's epsilon is for Poisson sampling, where each record joins each step by its own coin. For shuffled "
        "or fixed-size batches it can be several times too low.",
        "Chua et al. 2403.17673; Annamalai et al. 2411.10614. See: hansa evidence accounting",
        "Give local.sampling_rate (the probability that is really used) and no batch size; 1.0 takes every record.",
    ),
    "sizes-from-data": Code(
        "Under add-or-remove-one adjacency the number of records is private. A rate, divisor, weight or step count "
        "computed from it leaves with the update, and differs between the two neighbouring data sets.",
        "Ponomareva et al. 2303.00654 on what a report must state; docs/claims.md, sizes-from-data",
        "Declare a rounded size for each partner (declared_records), agreed and public; everything is computed from that.",
    ),
    "delta-not-below-1/n": Code(
        "A delta of 1/n allows a mechanism that publishes one whole record at random; without a delta a Gaussian epsilon "
        "says nothing.",
        "Dwork & Roth (2014), Sec. 2.3",
        "Take delta well below 1/n of the largest partner, for example 1e-5.",
    ),
    "bare-epsilon": Code(
        "An epsilon is a number about two neighbouring data sets and somebody who looks. Which records differ, and who sees "
        "what, decides whether 1 is strong or empty.",
        "NIST SP 800-226 (2025); Ponomareva et al. 2303.00654, Sec. 5.3",
        "State unit, adjacency, delta, where noise is added, and the adversary. A Hansa charter states all of them by its "
        "format.",
    ),
    "epochs-not-steps": Code(
        "What costs is each noisy step. How many steps an epoch (or a round) has depends on batch and data size, and "
        "whoever passes rounds as epochs is charged for the wrong number.",
        "FLamby, flamby/strategies/utils.py passes epochs=nrounds for 100 steps a round. See: hansa evidence accounting",
        "Give rounds and local.steps: the event that is charged and the noise that is drawn come from the same numbers.",
    ),
    "no-noise": Code(
        "An epsilon is claimed and no noise is added. Clipping, averaging and secure aggregation alone are not "
        "differential privacy.",
        "Dwork & Roth (2014), Sec. 2.3 (a deterministic release has no finite epsilon)",
        "Leave noise_multiplier out (it is calibrated with the filter that enforces the cap), or claim no epsilon.",
    ),
    "shared-noise-unmasked": Code(
        "Each partner adds only its share of the noise. Whoever sees a partner's own vector, and not only the sum of all, sees it with "
        "that share alone; the epsilon holds for the sum under secure aggregation and for nothing else.",
        "Kairouz, Liu & Steinke 2102.06387 (the distributed discrete Gaussian mechanism, with secure aggregation)",
        "Give secure_aggregation with colluding, how many partners may work with the coordinator; or privacy kind local.",
    ),
    "unprotected": Code(
        "Updates leave as they are and can reveal records; the datasets' budgets become unbounded for good. Nothing is "
        "claimed, so nothing is wrong; nobody should read it as private.",
        "Zhu et al. 1906.08935 (records recovered from gradients)",
        "Only for baselines. Otherwise: privacy kind local.",
    ),
}  # fmt: skip
"""Every finding's code; docs/claims.md explains them to a steward."""


@dataclass(frozen=True)
class Finding:
    """One wrong or doubtful claim.

    Attributes:
        code: a key of `CODES`.
        path: dotted place in the file; "" for the whole of it.
        line: counted from 1; None where the file has no lines of its own (a signed charter).
        what: what is wrong, in one sentence.
    """

    code: str
    severity: Severity
    path: str
    line: int | None
    what: str

    def to_fields(self) -> dict[str, Any]:
        """For programs: with why, source and what to do."""
        return {**asdict(self), **asdict(CODES[self.code])}


def refused(findings: Iterable[Finding]) -> bool:
    """Whether any of them is more than a flag."""
    return any(f.severity is Severity.REFUSE for f in findings)


def lint(subject: Mapping[str, Any] | BaseModel, lines: Mapping[Place, int] | None = None) -> tuple[Finding, ...]:
    """What is claimed in a configuration or charter and is not differential privacy.

    Args:
        subject: a `Federation`, a `Charter`, or the raw mapping of a file, of any tool.
        lines: place -> line, where the mapping was read from lines.

    Returns:
        Refusals first, then in the order of the file. Empty: nothing that these rules know.
    """
    raw = subject.model_dump(mode="json", exclude_none=True) if isinstance(subject, BaseModel) else subject
    file = _File(raw, lines or {})
    found = [finding for rule in _RULES for finding in rule(file)]
    order = {place: number for number, place in enumerate(file.places)}
    found.sort(key=lambda f: (f.severity is not Severity.REFUSE, order.get(tuple(f.path.split(".")), -1)))
    return tuple(dict.fromkeys(found))


def lint_file(path: Path) -> tuple[Finding, ...]:
    """`lint` of a YAML, JSON or TOML file, or of a charter's envelope. Empty for what cannot be read: its reader says why."""
    try:
        data = path.read_bytes()
        if len(data) > _BYTES:
            return ()
        if data.lstrip().startswith(b"{"):
            try:
                payload = strict_json(read_envelope(data.removesuffix(b"\n"), CHARTER_TYPE).payload)
                return lint(payload) if isinstance(payload, dict) else ()
            except MessageError:
                pass  # no envelope: perhaps another tool's JSON
        text = data.decode("utf-8")
        if path.suffix.lower() == ".toml":  # as Flower's pyproject.toml
            if any(line.count(".") > _DOTS for line in text.splitlines()):
                return ()  # each dot of a key is a level, and takes the parser time that grows with their square
            return lint(tomllib.loads(text), _toml_lines(text))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        value = _plain(node, (), lines, [_NODES])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return ()
    return lint(value, lines) if isinstance(value, dict) else ()


_BYTES = 1_000_000
_NODES = 20_000  # a few aliases in YAML can stand for gigabytes
_DEPTH = 12
_DOTS = 200


def _toml_lines(text: str) -> dict[Place, int]:
    """Where the tables of a TOML file are, and the keys that begin a line; of an array of tables, those of the first."""
    lines: dict[Place, int] = {}
    table: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TOML_TABLE.match(line):
            table = _toml_place(header[2])
            lines.setdefault(table, number)
            table = (*table, "0") if header[1] else table
        elif key := _TOML_KEY.match(line):
            lines.setdefault((*table, *_toml_place(key[1])), number)
    return lines


_TOML_TABLE = re.compile(r"\s*\[(\[?)([^\[\]]+)\]{1,2}\s*(?:#.*)?$")
_TOML_KEY = re.compile(r"""\s*([\w."'-]+)\s*=""")


def _toml_place(dotted: str) -> Place:
    return tuple(part.strip(" \t\"'") for part in dotted.split("."))


def _plain(node: yaml.Node | None, place: Place, lines: dict[Place, int], left: list[int]) -> Any:
    """A YAML node as Python values, bounded; notes the line of every key."""
    left[0] -= 1
    if left[0] < 0 or len(place) > _DEPTH:
        raise ValueError("too large")
    if isinstance(node, yaml.MappingNode):
        made = {}
        for key, value in node.value:
            here = (*place, str(key.value))
            lines.setdefault(here, key.start_mark.line + 1)
            made[str(key.value)] = _plain(value, here, lines, left)
        return made
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            lines.setdefault((*place, str(number)), item.start_mark.line + 1)
            items.append(_plain(item, (*place, str(number)), lines, left))
        return items
    if not isinstance(node, yaml.ScalarNode):
        return None
    match node.tag.removeprefix("tag:yaml.org,2002:"):
        case "null":
            return None
        case "bool":
            return node.value.lower() in ("true", "yes", "on")
    return node.value  # numbers stay text: `_number` reads both


class _File:
    """A raw mapping, its places in order, and who can be found in it by which names."""

    def __init__(self, raw: Mapping[str, Any], lines: Mapping[Place, int]) -> None:
        self.raw = raw
        self.lines = lines
        self.leaves: list[tuple[Place, Any]] = []
        self.places: list[Place] = []
        self._walk(raw, (), [_NODES])
        # Does the format itself say unit, adjacency, noise placement and adversary? A charter of ours must spell out
        # kind and unit; a configuration of ours has record as its unit unless it says client, and local as its kind (also written noise).
        privacy = raw.get("privacy")
        known = privacy if isinstance(privacy, Mapping) else {}
        self.kind_at: Place = ("privacy", "noise" if "noise" in known and "kind" not in known else "kind")
        kind, unit = known.get(self.kind_at[1], "local"), known.get("unit", "record")
        # Of shared noise the adversary is what `colluding` says.
        secure = raw.get("secure_aggregation")
        named = kind != "shared" or secure is None or (isinstance(secure, Mapping) and "colluding" in secure)
        if raw.get("format") == "hansa-charter/1":
            form = {"kind", "unit"} <= set(known)
        else:
            form = "format" not in raw and len(_TOP & set(raw)) >= 2
        # Whom central noise does not protect against is said with it: the coordinator (charter.py).
        units = {"local": "record", "shared": "record", "none": "record", "central": "client"}
        known_kind = isinstance(kind, str) and kind in units
        self.ours = form and known_kind and units[kind] == unit and named
        # What a file of ours lacks of that, where it is not the whole of it.
        self.lacks = ""
        if form and not known_kind:
            self.lacks = f"{'.'.join(self.kind_at)} must be local, shared, central or none"
        elif form and unit == "record" and not named:
            self.lacks = "secure_aggregation.colluding is missing, which says whom shared noise holds against"
        self.unprotected = kind == "none" or privacy == "none"

    def _walk(self, value: Any, place: Place, left: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0 or len(place) > _DEPTH:
            return
        if place:
            self.places.append(place)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self._walk(inner, (*place, str(key)), left)
        elif isinstance(value, list | tuple):
            self.leaves.append((place, value))
            for number, inner in enumerate(value):
                self._walk(inner, (*place, str(number)), left)
        else:
            self.leaves.append((place, value))

    def named(self, names: frozenset[str], inside: str | None = None, outside: str = "") -> list[tuple[Place, Any]]:
        """Leaves whose key is one of these names; below a section, or anywhere but below one."""
        return [
            (place, value)
            for place, value in self.leaves
            if place
            and _word(place[-1]) in names
            and (inside is None or inside in map(_word, place[:-1]))
            and (not outside or outside not in map(_word, place[:-1]))
        ]

    def find(self, code: str, severity: Severity, place: Place, what: str) -> Finding:
        """A finding at a place, with the line of the innermost part of it that has one."""
        line = next((self.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.lines), None)
        return Finding(code, severity, ".".join(place), line, what)

    def claims(self) -> bool:
        """Whether an epsilon is claimed: by number, or by noise that is calibrated to one."""
        return any(_number(value) is not None for _, value in self.named(_EPSILON))


def _word(key: str) -> str:
    return key.lower().replace("-", "_")


def _number(value: Any) -> float | None:
    """A finite number, also as text (charters write reals as decimal strings); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _n(*names: str) -> frozenset[str]:
    return frozenset(names)


_TOP = {"task", "algorithm", "quorum", "partners", "population"}  # two of them, and it is a configuration of ours
# What other tools call the same things (Opacus, TensorFlow Privacy, JAX Privacy, Flower, FLamby).
_EPSILON = _n("epsilon", "target_epsilon", "dp_target_epsilon", "eps", "epsilon_cap")
_DELTA = _n("delta", "target_delta", "dp_target_delta")
_CLIP = _n(
    "clip_norm", "clipping_norm", "clip", "max_grad_norm", "dp_max_grad_norm", "l2_norm_clip", "max_norm", "clip_threshold"
)  # fmt: skip
_NOISE = _n("noise_multiplier", "sigma", "noise_scale", "noise_std", "noise_stddev", "stddev")
_ABSOLUTE_NOISE = _n("noise_std", "noise_stddev", "stddev")
_SENSITIVITY = _n("sensitivity", "l2_sensitivity")
_BATCH = _n("batch_size", "batchsize", "local_batch_size", "lot_size", "train_batch_size")
_SAMPLING = _n("sampling", "sampler", "batch_sampling", "batch_sampler", "batching")
_RATE = _n("sampling_rate", "sample_rate", "q")
_WEIGHTS = _n("weighting", "weights", "aggregation_weights", "weight_by", "weighted_by")
_EPOCHS = _n("epochs", "local_epochs", "num_epochs", "n_epochs", "num_train_epochs")
_METRICS = _n("report", "metrics", "report_metrics", "publish", "train_metrics", "log_metrics", "fit_metrics")
_FROM_DATA = _n(
    "data", "from_data", "auto", "dataset", "true", "num_examples", "num_samples", "samples", "examples", "real", "actual",
    "size", "sizes", "by_size", "len(dataset)", "adaptive", "median", "quantile", "fedavg",
)  # fmt: skip
_UNIT = _n("unit", "privacy_unit")
_ADJACENCY = _n("adjacency", "neighbouring", "neighboring", "neighboring_relation")
_ADVERSARY = _n("adversary", "threat_model", "trust_model")
_PLACEMENT = _n("noise", "noise_placement", "placement", "kind")
_SHARED = _n("shared", "distributed")
_SECURE = _n("secure_aggregation", "secagg", "secure_agg", "secure_sum")


# -- rules: each yields findings -----------------------------------------------------------------------------------------


def _clipping(file: _File) -> Iterator[Finding]:
    if file.unprotected:
        return
    clips = file.named(_CLIP, outside="evaluation")
    clipped = [place for place, value in clips if (_number(value) or 0) > 0 or _word(str(value)) in _FROM_DATA]
    for place, value in file.named(_NOISE, outside="evaluation"):
        # Its own section decides; a clip elsewhere counts only where this section says nothing about one.
        own = [p for p, _ in clips if p[:-1] == place[:-1]]
        if (_number(value) or 0) > 0 and not any(p in clipped for p in (own or [p for p, _ in clips])):
            where = own[0] if own else place
            yield file.find(
                "noise-without-clipping", Severity.REFUSE, where, f"{place[-1]} is {value} and nothing is clipped."
            )
    if file.claims() and not file.named(_NOISE, outside="evaluation") and not clipped:
        place = file.named(_EPSILON)[0][0]
        yield file.find(
            "noise-without-clipping", Severity.REFUSE, place, "An epsilon is claimed and no clip_norm is given."
        )


def _sensitivity(file: _File) -> Iterator[Finding]:
    clips = file.named(_CLIP, outside="evaluation")
    for place, value in clips:
        if _word(str(value)) in _FROM_DATA and not isinstance(value, bool):
            yield file.find(
                "sensitivity-not-the-clip", Severity.REFUSE, place, f"{place[-1]} is {value}: the data choose the clip."
            )
    agreed = [number for _, value in clips if (number := _number(value)) is not None]
    for place, value in file.named(_SENSITIVITY):
        given = _number(value)
        evaluation = "evaluation" in map(_word, place)
        allowed = [1.0] if evaluation else agreed
        if given is None or not any(math.isclose(given, clip) for clip in allowed):
            clip = " and ".join(f"{c:g}" for c in allowed) or "not given"
            yield file.find(
                "sensitivity-not-the-clip", Severity.REFUSE, place, f"{place[-1]} is {value}; the clip is {clip}."
            )
    ratios = [n for p, v in file.named(_NOISE - _ABSOLUTE_NOISE, outside="evaluation") if (n := _number(v)) is not None]
    for place, value in file.named(_ABSOLUTE_NOISE, outside="evaluation"):
        std = _number(value)
        if std is not None and agreed and not ratios:
            yield file.find(
                "sensitivity-not-the-clip",
                Severity.REFUSE
                if file.ours
                else Severity.FLAG,  # ours states noise relative to the clip, and nothing else
                place,
                f"{place[-1]} is {value}, and not said relative to the clip {agreed[0]:g}; as a noise_multiplier it is "
                f"{std / agreed[0]:g}."
                if agreed[0] > 0
                else f"{place[-1]} is {value}, and the clip is {agreed[0]:g}.",
            )
        if std is not None and agreed and ratios and not any(math.isclose(std, r * c) for r in ratios for c in agreed):
            yield file.find(
                "sensitivity-not-the-clip",
                Severity.REFUSE,
                place,
                f"{place[-1]} is {value}, not noise multiplier {ratios[0]:g} x clip {agreed[0]:g}.",
            )


def _noise(file: _File) -> Iterator[Finding]:
    if not file.claims():
        return
    for place, value in file.named(_NOISE, outside="evaluation"):
        if (number := _number(value)) is not None and number <= 0:
            yield file.find("no-noise", Severity.REFUSE, place, f"An epsilon is claimed with {place[-1]} {value}.")
    if file.unprotected:
        place = file.named(_EPSILON)[0][0]
        yield file.find("no-noise", Severity.REFUSE, place, "An epsilon is claimed with privacy kind none.")


def _shared(file: _File) -> Iterator[Finding]:
    off = {place for place, value in file.leaves if value is False or _word(str(value)) in ("none", "false", "off", "")}
    if not file.claims() or any(_word(place[-1]) in _SECURE and place not in off for place in file.places):
        return
    for place, value in file.named(_PLACEMENT):
        if _word(str(value)) in _SHARED:
            yield file.find(
                "shared-noise-unmasked",
                Severity.REFUSE,
                place,
                f"{place[-1]} is {value}, and without secure_aggregation each vector is seen with its share of the noise alone.",
            )


def _metrics(file: _File) -> Iterator[Finding]:
    if file.unprotected and not file.claims():
        return
    evaluation = file.raw.get("evaluation")
    kind = evaluation.get("kind") if isinstance(evaluation, Mapping) else evaluation
    noise = evaluation.get("noise_multiplier") if isinstance(evaluation, Mapping) else None
    where: Place = ("evaluation", "kind") if isinstance(evaluation, Mapping) else ("evaluation",)
    charged = kind == "public" or (kind == "private" and (_number(noise) or 0) > 0)
    for place, value in file.named(_METRICS):
        names = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        names = [n for n in names if _word(n) not in ("none", "false", "null", "")]
        training = any("train" in _word(name) for name in (*names, place[-1]))
        if names and (training or not (charged and "evaluation" in map(_word, place))):
            yield file.find(
                "unaccounted-metrics",
                Severity.REFUSE,
                place,
                f"{', '.join(names[:5])} would leave without being charged to the budget.",
            )
    if kind == "private" and not (_number(noise) or 0) > 0:
        yield file.find(
            "unaccounted-metrics",
            Severity.REFUSE,
            where,
            "Evaluation on private rows has no noise_multiplier, so it would be charged nothing.",
        )
    if isinstance(kind, str) and _word(kind) in ("train", "training", "local", "client", "validation", "test"):
        yield file.find(
            "unaccounted-metrics", Severity.REFUSE, where, f"Evaluation on {kind} rows is neither public nor charged."
        )


def _batches(file: _File) -> Iterator[Finding]:
    if not file.claims() and not file.named(_NOISE, outside="evaluation"):
        return
    poisson = any(_word(str(value)) == "poisson" for _, value in file.named(_SAMPLING))
    for place, value in file.named(_SAMPLING):
        if value is not None and _word(str(value)) not in ("poisson", "full", "full_batch", "none"):
            yield file.find(
                "shuffled-batches", Severity.REFUSE, place, f"{place[-1]} is {value}; the accountant assumes Poisson."
            )
    for place, value in file.leaves:
        if place and _word(place[-1]) == "shuffle" and value in (True, "true"):
            yield file.find("shuffled-batches", Severity.REFUSE, place, "Batches are shuffled, not Poisson-sampled.")
    for place, value in file.named(_BATCH):
        if value is None:
            continue
        if poisson:  # then q must be computed from n
            yield file.find(
                "sizes-from-data",
                Severity.REFUSE,
                place,
                f"{place[-1]} {value} makes the sampling rate {value}/n depend on the number of records.",
            )
        else:
            yield file.find(
                "shuffled-batches",
                Severity.REFUSE,
                place,
                f"{place[-1]} {value} is a fixed batch size: no sampling_rate q of independent coins has one.",
            )


def _sizes(file: _File) -> Iterator[Finding]:
    if file.unprotected:
        return
    code = "sizes-from-data"
    for place, value in [*file.named(_WEIGHTS), *file.named(_RATE)]:
        if not isinstance(value, bool) and _word(str(value)) in _FROM_DATA:
            yield file.find(code, Severity.REFUSE, place, f"{place[-1]} is {value}: it is taken from the data.")
    partners = file.raw.get("partners")
    entries: list[tuple[Place, Any]] = []
    if isinstance(partners, Mapping):
        entries = [(("partners", str(name)), entry) for name, entry in partners.items()]
    elif isinstance(partners, list | tuple):
        entries = [(("partners", str(number)), entry) for number, entry in enumerate(partners)]
    for place, entry in entries:
        if not isinstance(entry, Mapping):
            continue
        name = entry.get("name", place[-1])
        declared = entry.get("declared_records")
        size = _number(declared)
        if size is None:
            yield file.find(
                code,
                Severity.REFUSE,
                (*place, "declared_records") if "declared_records" in entry else place,
                f"{name} declares no size, so rates, weights and divisors would come from its data.",
            )
        elif size >= 100 and size % 5:
            yield file.find(
                code,
                Severity.FLAG,
                (*place, "declared_records"),
                f"{name} declares {size:g}, which is not rounded: is it a count of the data?",
            )
    if _number(file.raw.get("declared_tolerance")) == 0 and entries:
        yield file.find(
            code, Severity.FLAG, ("declared_tolerance",), "With tolerance 0 the declared size tells the exact one."
        )
    if isinstance(file.raw.get("population"), Mapping):
        yield file.find(
            code,
            Severity.FLAG,
            ("population",),
            "A population's declared sizes are counted from its data and rounded: right for a simulation only.",
        )


def _delta(file: _File) -> Iterator[Finding]:
    code = "delta-not-below-1/n"
    sizes: list[tuple[float, str]] = []
    partners = file.raw.get("partners")
    if isinstance(partners, Mapping | list | tuple):
        items = partners.items() if isinstance(partners, Mapping) else enumerate(partners)
        for name, entry in items:
            if isinstance(entry, Mapping) and (size := _number(entry.get("declared_records"))) is not None:
                sizes.append((size, str(entry.get("name", name))))
    for place, value in file.named(_n("declared_records", "num_records", "n_records", "dataset_size", "num_examples")):
        if (size := _number(value)) is not None and "partners" not in place:
            sizes.append((size, place[-1]))
    deltas = [(place, number) for place, value in file.named(_DELTA) if (number := _number(value)) is not None]
    for place, delta in deltas:
        if delta >= 1 or delta <= 0:
            yield file.find(code, Severity.REFUSE, place, f"delta is {delta:g}; it must be greater than 0 and below 1.")
            continue
        over = [(size, name) for size, name in sizes if size > 0 and delta * size >= 1]
        if over:
            size, name = max(over)
            others = f" and {len(over) - 1} more" if len(over) > 1 else ""
            yield file.find(
                code,
                Severity.REFUSE,
                place,
                f"privacy.delta {delta:g} is not below 1/n = {1 / size:.2g} for {size:g} records ({name}{others}).",
            )
    pure = any(isinstance(value, str) and "laplace" in value.lower() for _, value in file.leaves)
    if file.claims() and not deltas and not file.unprotected and not pure:
        place = file.named(_EPSILON)[0][0]
        yield file.find(code, Severity.REFUSE, place, "An epsilon of Gaussian noise is claimed and no delta.")


def _bare(file: _File) -> Iterator[Finding]:
    if file.ours:
        return
    stated = {
        "unit": bool([1 for _, v in file.named(_UNIT) if v not in (None, "")]),
        "adversary": bool([1 for _, v in file.named(_ADVERSARY) if v not in (None, "")]),
        "adjacency": bool([1 for _, v in file.named(_ADJACENCY) if v not in (None, "")]),
        "noise placement": bool([1 for _, v in file.named(_PLACEMENT) if v not in (None, "")]),
    }
    missing = [word for word, there in stated.items() if not there]
    grave = "unit" in missing or "adversary" in missing
    for place, value in file.named(_EPSILON):
        if _number(value) is not None and missing:
            severity = Severity.REFUSE if grave else Severity.FLAG
            why = file.lacks or f"no {', no '.join(missing)}"
            yield file.find("bare-epsilon", severity, place, f"epsilon {value} stands alone: {why}.")


def _epochs(file: _File) -> Iterator[Finding]:
    if not file.claims() and not file.named(_NOISE, outside="evaluation"):
        return
    for place, value in file.named(_EPOCHS):
        if value is not None:
            yield file.find(
                "epochs-not-steps",
                Severity.REFUSE,
                place,
                f"{place[-1]} {value} does not say how many noisy steps are charged.",
            )


def _unprotected(file: _File) -> Iterator[Finding]:
    if file.unprotected:
        privacy = file.raw.get("privacy")
        place = file.kind_at if isinstance(privacy, Mapping) else ("privacy",)
        yield file.find("unprotected", Severity.FLAG, place, "No protection: epsilon is unbounded for every partner.")


_RULES: tuple[Callable[[_File], Iterator[Finding]], ...] = (
    _clipping, _sensitivity, _noise, _shared, _metrics, _batches, _sizes, _delta, _bare, _epochs, _unprotected,
)  # fmt: skip
