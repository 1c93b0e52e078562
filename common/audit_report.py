"""The report of an audit: one page that a regulator can read, print and check without us.

It renders a verdict of `verifier.verify_bundle` and recomputes nothing. What the verdict lacks the page says is missing;
partners with the same history (simulated clients) are one row. This module finds words, rows and coordinates, and
`templates/audit.html.j2` draws them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from . import page
from .charter import ADVERSARY
from .errors import Refusal
from .identity import write_whole

Fields = Mapping[str, Any]

MANY = 30  # partners with a section of their own; above this, histories
FEW = 6  # histories with a section of their own
LISTED = 20  # histories in the table
POINTS = 400  # longest curve
ROWS = 14  # longest table of a curve
EVENTS = 40  # longest table of events
PLACES = 25  # findings that are listed of each code
CODES = 60  # codes that are listed
HEADS = 200  # longest table of heads
SLACK = 1e-9  # relative, as the verifier's

UNIT = "one record of one partner"
UNITS = {"record": UNIT, "client": "one client, with all that it holds"}
ADJACENCY = "add-or-remove-one"
NOISE = {
    "local": "local (the partner adds it before anything leaves)",
    "shared": "shared (each partner adds a share before anything leaves; only the masked sum of all has enough)",
    "central": "central (the coordinator adds it once to the sum of all clipped updates; it is trusted with each of them)",
    "local and shared": "local or shared (the partner adds it, or a share of it, before anything leaves)",
}
UNPROTECTED = "none for what left unprotected"

BECAUSE = {
    Refusal.BUDGET: "its remaining privacy budget cannot pay for it",
    Refusal.NOT_HELD: "it is not in the plan that the partner accepted",
    Refusal.CHARTER_EXPIRED: "the charter has expired",
    Refusal.CHARTER_UNKNOWN: "it does not know the charter",
    Refusal.NOT_A_PARTNER: "the request does not come from, or go to, a partner of this charter",
    Refusal.TASK_CODE: "the task's code is not the code that the charter names",
    Refusal.UNPROTECTED: "its own policy does not allow training without privacy",
    Refusal.NOISE: "the noise asked for is too small (a noise multiplier below 0.3)",
    Refusal.DATA: "its dataset is not usable under this charter",
    Refusal.REPLAY: "a request id was used again with another content",
    Refusal.ROUND: "the round or run was out of order",
    Refusal.SIMULATED: "a simulated charter may not touch a real dataset",
    Refusal.NUMERIC: "the model it was sent is not finite or has another shape",
    Refusal.TASK: "its site does not allow this task",
    Refusal.COORDINATOR: "its site does not allow this coordinator",
    Refusal.HOURS: "it was outside its site's hours",
    Refusal.NOT_APPROVED: "nobody at the site approved the run",
    Refusal.PAUSED: "the site has paused its node",
    Refusal.WITHDRAWN: "it withdrew from the federation",
    Refusal.COHORT: "fewer partners take part than its site asks for",
    Refusal.RESTORED: "it was restored from a backup, and what was spent is not proved",
    Refusal.ROLLED_BACK: "its ledger is older than a head that it signed: it lost entries, or was set back",
    Refusal.SECAGG_KEY: "a key for secure aggregation was not signed by its partner for this run",
    Refusal.SECAGG_ROSTER: "those to be summed over were not partners of this charter, or not itself among them",
    Refusal.SECAGG_TERMS: "the threshold, the quorum or the ring of secure aggregation was another than agreed",
    Refusal.SECAGG_SURVIVORS: "it was asked to open a sum of too few, of others than took part, or a second sum",
    Refusal.SECAGG_SHARE: "a share of a mask was not one, or from another attempt",
}

_CHECKED = {
    "ledgers": "ledgers",
    "entries": "entries",
    "signatures": "signatures",
    "heads": "signed heads",
    "proofs": "comparisons of a ledger with what its owner had signed",
}
_MECHANISMS = {
    "poisson-gaussian/1": "Gaussian noise",
    "shared-gaussian/1": "shared Gaussian noise",
    "none/1": "NO PROTECTION",
}


def write_audit_report(
    path: Path,
    verdict: Fields,
    *,
    made: datetime,
    against: Sequence[str] = (),
    verifier_sha256: str | None = None,
    charter_words: str | None = None,
) -> None:
    """Write the report of a verdict as one HTML page that needs no network.

    Args:
        path: the file; replaced atomically.
        verdict: what `verifier.verify_bundle` returned. Optional keys may be missing; the page then says less.
        made: when the audit was made.
        against: what else the bundle was compared with, as it was given.
        verifier_sha256: of the verifier's file, so that a reader can run the same one.
        charter_words: the charter that was audited, as `hansa charter show` prints it.

    Raises:
        OutputError: the folder is not writable, or the disk is full. Nothing is left behind.
    """
    text = render(verdict, made=made, against=against, verifier_sha256=verifier_sha256, charter_words=charter_words)
    write_whole(path, text.encode())


def render(
    verdict: Fields,
    *,
    made: datetime,
    against: Sequence[str] = (),
    verifier_sha256: str | None = None,
    charter_words: str | None = None,
) -> str:
    """The page of `write_audit_report`."""
    view = _view(verdict, made, [path[:4096] for path in against[:100]]) | {
        "verifier_sha256": verifier_sha256,
        "charter_words": charter_words,
    }
    return page.environment("hansa.common").get_template("audit.html.j2").render(view)


def histories(partners: Mapping[str, Fields]) -> list[tuple[list[str], Fields]]:
    """Partners whose figures are all equal, together: (names, figures), the largest ε first, then by name.

    1,000 simulated clients of 40 histories are 40 items.
    """
    keys: dict[int, str] = {}
    found: dict[str, tuple[list[str], Fields]] = {}
    for name, figures in partners.items():
        key = keys.setdefault(id(figures), json.dumps(figures, sort_keys=True, default=str))
        found.setdefault(key, ([], figures))[0].append(name)
    return sorted(found.values(), key=lambda item: -_spent(item[1]))


def size_of(names: Sequence[str], figures: Fields) -> int:
    """How many partners these are: of a large population a name stands for all clients with one history."""
    return len(names) * max(1, int(page.number(figures.get("clients")) or 1))


def by_code(found: Iterable[Fields]) -> list[tuple[str | None, str | None, list[Fields]]]:
    """Violations or warnings as (code, what it means, places), in the order in which codes first occur."""
    codes: dict[Any, list[Fields]] = {}
    for item in found:
        codes.setdefault(item.get("code"), []).append(item)
    return [(code, next((i["means"] for i in items if i.get("means")), None), items) for code, items in codes.items()]


def place(item: Fields) -> str:
    """Where a violation or warning is: file and line."""
    return f"{item.get('file') or 'bundle'}" + ("" if item.get("line") is None else f":{item['line']}")


def state(figures: Fields) -> tuple[str, str]:
    """How a partner stands: a kind ("bad", "good" or "plain") and the words."""
    spent, cap = page.number(figures.get("epsilon_filter")), page.number(figures.get("epsilon_cap"))
    if unbounded(figures):
        return "bad", "UNBOUNDED"
    if partly(figures):
        unread, missing = (page.number(figures.get(key)) or 0 for key in ("unread", "missing"))
        if "witnessed" not in figures:  # a client, whose ledger is the coordinator's
            return "bad", "LEDGER NOT READ TO ITS END"
        if not figures.get("entries"):
            return "bad", "NOT THERE" if not unread else "NOT READ"
        return "bad", f"READ TO LINE {figures['entries']}, " + (
            f"{unread:g} MORE UNREAD" if unread else f"{missing:g} MISSING" if missing else "NOT TO ITS END"
        )
    if spent is None or cap is None:
        return "plain", "no figures"
    if spent > cap * (1 + SLACK):
        return "bad", "OVER CAP"
    return "good", "within cap" if spent else "nothing spent"


def unbounded(figures: Fields) -> bool:
    """Whether no finite ε holds for a partner."""
    return bool(figures.get("unbounded")) or page.number(figures.get("epsilon_filter")) in (None, math.inf)


def partly(figures: Fields) -> bool:
    """Whether the ledger was not there, or not read, to its end: what was charged may be more."""
    return figures.get("whole") is False or bool(page.number(figures.get("missing")))


def placements(partners: Mapping[str, Fields]) -> dict[tuple[str, str], list[str]]:
    """Where the noise is, and against whom it protects, of all that each partner's ε is about -> the partners of whom that is so."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, figures in partners.items():
        found.setdefault(_placement(figures), []).append(name)
    return found


def _placement(figures: Fields) -> tuple[str, str]:
    return str(figures.get("noise") or "local"), str(figures.get("adversary") or ADVERSARY)


def budgets(names: Sequence[str], figures: Fields) -> list[tuple[list[str], Fields]]:
    """A partner's figures once for each of its lineages, where it has several: no epsilon holds for all of its records.

    What is the partner's and no lineage's (rounds, refusals) is left to the first.
    """
    lineages: Mapping[str, Fields] = figures.get("lineages") or {}
    if len(lineages) < 2:
        return [(list(names), figures)]
    of_partner = {"rounds": None, "refusals": None}
    found: list[tuple[list[str], Fields]] = []
    for lineage, one in lineages.items():
        made = {**figures, "charter_epsilon": None, **one, **(of_partner if found else {}), "lineages": {}}
        found.append(([f"{names[0]} {lineage[:8]}"], made))
    return found


def _spent(figures: Fields) -> float:
    value = page.number(figures.get("epsilon_filter"))
    return math.inf if unbounded(figures) or value is None else value


# -- the page's parts ----------------------------------------------------------------------------------------------------


def _view(verdict: Fields, made: datetime, against: Sequence[str]) -> dict[str, Any]:
    partners: Mapping[str, Fields] = verdict.get("partners") or {}
    violations, warnings = list(verdict.get("violations") or []), list(verdict.get("warnings") or [])
    total = sum(size_of([name], figures) for name, figures in partners.items())
    many = total > MANY
    groups = histories(partners) if many else [([name], figures) for name, figures in partners.items()]
    apart = [row for group in groups for row in budgets(*group)]
    told = [g for g in groups[:FEW] if g[1].get("events") or g[1].get("trajectory")] if many else groups
    verified = verdict.get("verified") is True and not violations
    open_ended = [name for names, figures in groups if unbounded(figures) for name in names]
    unbound = sum(size_of(names, figures) for names, figures in groups if unbounded(figures))
    heads = list(verdict.get("heads") or [])
    bundle = str(verdict.get("bundle") or "")[:4096]
    checked = verdict.get("checked") or {}
    return {
        "made": _when(made.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")),
        "bundle": bundle,
        "charter_sha256": verdict.get("charter_sha256"),
        "verified": verified,
        "headline": _headline(verified, unbound, total),
        "simulated": bool(verdict.get("simulated")),
        "claim": verdict.get("claim"),
        "open_ended": open_ended,
        "unbound": unbound,
        "total": total,
        "over": sum(size_of(names, figures) for names, figures in groups if state(figures)[1] == "OVER CAP"),
        "checked": [
            (words, n)
            for what, words in _CHECKED.items()
            if (n := page.number(checked.get(what))) is not None or what == "ledgers"
        ],
        "violations": _findings(violations),
        "warnings": _findings(warnings),
        "counts": (len(violations), len(warnings)),
        "period": _period(partners),
        "closings": _closings(verdict),
        "open_runs": [str(run) for run in verdict.get("open_runs") or []],
        "terms": {
            "unit": UNITS.get(str(verdict.get("unit")), UNIT),
            "adjacency": ADJACENCY,
            **_terms({name: one for name, one in partners.items() if not unbounded(one)}, bool(open_ended)),
        },
        "by_client": verdict.get("unit") == "client",
        "unprotected": UNPROTECTED,
        "many": many,
        "rows": [_row(names, figures) for names, figures in apart[: LISTED if many else None]],
        "lacking": [name for name, figures in _ledgers(partners, verdict.get("coordinator")) if partly(figures)],
        "several": [name for names, figures in groups if len(figures.get("lineages") or {}) > 1 for name in names],
        "groups": len(groups),
        "bars": _bars(apart[:LISTED] if many else apart),
        "distribution": _distribution(groups) if many else None,
        "odds": _odds(apart),
        "sections": [_section(i, *group) for i, group in enumerate(told)],
        "heads": _heads(heads),
        "covered": [] if many else _covered(partners, verdict.get("coordinator")),
        "limits": [str(limit) for limit in verdict.get("limits") or []],
        "against": against,
        "commands": _commands(bundle, against),
        "reasons": sorted({reason for f in partners.values() for reason in f.get("refusals_by_reason") or {}}),
    }


def _terms(bounded: Mapping[str, Fields], open_ended: bool) -> dict[str, str]:
    """What every ε of the page is about; where partners differ, whose is which."""
    found = placements(bounded)
    if len(found) < 2:
        noise, adversary = next(iter(found), ("local", ADVERSARY))
        return {"noise": UNPROTECTED if open_ended and not found else NOISE.get(noise, noise), "adversary": adversary}
    told: dict[str, str] = {}
    for which, key in enumerate(("noise", "adversary")):
        parts = [
            (one[which], ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) for one, names in found.items()
        ]
        told[key] = "; ".join(f"of {names}: {NOISE.get(words, words)}" for words, names in parts)
    return told


def _headline(verified: bool, open_ended: int, total: int) -> str:
    if not verified:
        return "Not verified"
    if not open_ended:
        return "Verified"
    return "Verified, but there is no privacy guarantee" if open_ended == total else "Verified, but not private for all"


def _findings(found: Sequence[Fields]) -> list[dict[str, Any]]:
    return [
        {
            "code": code,
            "means": means,
            "count": len(items),
            "files": len({item.get("file") for item in items}),
            "items": [(place(item), item.get("what") or "") for item in items[:PLACES]],
        }
        for code, means, items in by_code(found)[:CODES]
    ]


def _when(text: object, seconds: bool = False) -> str:
    """2026-11-22T01:50:00Z as people write it; what is no such time as it is."""
    try:
        at = datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return str(text)
    return f"{at.day} {at:%b %Y}, {at:%H:%M:%S}" if seconds else f"{at.day} {at:%B %Y}, {at:%H:%M} UTC"


def _period(partners: Mapping[str, Fields]) -> tuple[str, str] | None:
    """The first and the last charge whose time is known."""
    times = sorted(
        {str(point["time"]) for f in partners.values() for point in f.get("trajectory") or [] if point.get("time")}
    )
    return (_when(times[0]), _when(times[-1])) if times else None


def _row(names: Sequence[str], figures: Fields) -> dict[str, Any]:
    kind, words = state(figures)
    spent, cap = page.number(figures.get("epsilon_filter")), page.number(figures.get("epsilon_cap"))
    charter = figures.get("charter_epsilon") or {}
    witnessed = figures.get("witnessed") or {}
    return {
        "names": list(names[:3]),
        "count": size_of(names, figures),
        "kind": kind,
        "state": words,
        "unbounded": unbounded(figures),
        "partly": partly(figures),
        "noise": NOISE.get(_placement(figures)[0], _placement(figures)[0]),
        "adversary": _placement(figures)[1],
        "epsilon": page.number(figures.get("epsilon")),
        "epsilon_filter": spent,
        "cap": cap,
        "used": 100 * spent / cap if spent is not None and cap and not unbounded(figures) else None,
        "delta": page.number(figures.get("delta")),
        "charter": {key: page.number(charter.get(key)) for key in ("epsilon", "epsilon_filter", "cap")},
        "witnessed": page.number(witnessed.get("length")),
        "by": [str(name) for name in witnessed.get("by") or []],
        "beyond": [str(name) for name in figures.get("beyond") or []],
        "closing": witnessed.get("closing"),
        "tail": page.number(figures.get("tail")),
        **{
            key: page.number(figures.get(key))
            for key in (
                "debits",
                "uncommitted_debits",
                "rounds",
                "refusals",
                "entries",
                "undisclosed",
                "unread",
                "missing",
            )
        },
    }


def _odds(groups: Sequence[tuple[list[str], Fields]]) -> dict[str, float] | None:
    """The largest finite ε, by which factor it lets any outcome's probability change, and whether for anyone's eyes (local noise)."""
    found = [
        (e, page.number(f.get("delta")), _placement(f)[0] != "local")
        for _, f in groups
        for e in page.finite([f.get("epsilon_filter")])
    ]
    worst, delta, among = max(found, default=(0.0, None, False))
    if not (0 < worst <= 10 and delta):
        return None
    return {"epsilon": worst, "delta": delta, "factor": math.exp(worst), "anyone": not among}


def _section(index: int, names: Sequence[str], figures: Fields) -> dict[str, Any]:
    """What is told of one partner, or of all clients with one history."""
    curve = [point for point in figures.get("trajectory") or [] if isinstance(point, Mapping)]
    cap = page.number(figures.get("epsilon_cap"))
    lineages = figures.get("lineages") or {}
    by_lineage = {str(p.get("lineage")) for p in curve if p.get("lineage") is not None}
    parts: list[tuple[str | None, list[Fields], float | None, object]] = [(None, curve, cap, figures.get("epsilon"))]
    if len(by_lineage) > 1:
        parts = [
            (
                name,
                [p for p in curve if str(p.get("lineage")) == name],
                page.number((lineages.get(name) or {}).get("epsilon_cap")),
                (lineages.get(name) or {}).get("epsilon"),
            )
            for name in sorted(by_lineage)
        ]
    return _row(names, figures) | {
        "id": f"partner-{index + 1}",
        "curves": [made for part in parts if part[1] and (made := _curve(*part))["lines"]],
        "lineages": [
            {
                "id": str(name),
                **{k: page.number(one.get(k)) for k in ("epsilon", "epsilon_filter", "epsilon_cap", "delta")},
                "unbounded": bool(one.get("unbounded")),
                "datasets": [_declared(dataset) for dataset in one.get("datasets") or []],
            }
            for name, one in lineages.items()
        ],
        "events": [_event(event) for event in (figures.get("events") or [])[:EVENTS]],
        "events_left": max(0, len(figures.get("events") or []) - EVENTS),
        "budget": _budget(figures.get("budget")),
        "refused": [
            (str(reason), BECAUSE.get(reason, "of a reason that this report has no words for"), page.number(count))
            for reason, count in (figures.get("refusals_by_reason") or {}).items()
        ],
    }


def _declared(dataset: Fields) -> tuple[str, str]:
    """A data set's id, and what its owner declared of it, in words."""
    said = dataset.get("declared") or {}
    said = said if isinstance(said, Mapping) else {"kind": said}
    of, kind = str(said.get("of") or "")[:8], said.get("kind")
    words = {
        "first": "the first of this ledger",
        "version": f"a new version of {of}: the same budget",
        "overlap": f"shares records with {of}: the same budget",
        "disjoint": f"rows collected from {said.get('cutoff')} on, disjoint from all earlier ones: a budget of its own",
    }
    return str(dataset.get("dataset") or ""), words.get(str(kind), str(kind))


def _event(event: Fields) -> dict[str, Any]:
    steps, count = page.number(event.get("steps")), page.number(event.get("count"))
    mechanism = str(event.get("mechanism"))
    shared = event.get("shared") or {}
    certain = [page.number(shared.get(key)) for key in ("quorum", "colluding")]
    of = f" (quorum {certain[0]:g}, colluding {certain[1]:g})" if None not in certain else ""
    return {
        "mechanism": _MECHANISMS.get(mechanism, mechanism) + of,
        "q": _real(event.get("q")),
        "sigma": _real(event.get("sigma")),
        "steps": steps,
        "count": count,
        "total": None if steps is None or count is None else steps * count,
        "charter": {"this": "this charter", "other": "another charter"}.get(str(event.get("charter")), "not stated"),
    }


def _real(value: object) -> float | None:
    """A number, or a ledger's decimal string."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?", value):
        return float(value)
    return page.number(value)


def _drawn(value: object) -> float | None:
    """A number that can be put on a chart."""
    found = page.number(value)
    return found if found is not None and 0 <= found <= 1e12 else None


def _budget(budget: Fields | None) -> dict[str, Any] | None:
    if not budget:
        return None
    orders = [(_real(pair[0]), _real(pair[1])) for pair in budget.get("orders") or []]
    return {key: _real(budget.get(key)) for key in ("epsilon", "delta", "gaussian_delta")} | {"orders": orders[:16]}


# -- who vouches for what ------------------------------------------------------------------------------------------------


def _heads(heads: Sequence[Fields]) -> dict[str, Any]:
    """One row for each owner and holder: how many heads, up to which length, and who signed the newest."""

    def pair(head: Fields) -> tuple[str, str]:
        return str(head.get("owner")), str(head.get("holder"))

    rows = []
    for (owner, holder), found in groupby(sorted(heads, key=pair), key=pair):
        ordered = sorted(found, key=lambda head: page.number(head.get("length")) or 0)
        rows.append(
            {
                "owner": owner,
                "holder": holder,
                "count": len(ordered),
                "lengths": [page.number(head.get("length")) for head in [*ordered[:5], *ordered[5:][-1:]]],
                "newest": page.number(ordered[-1].get("length")),
                "signers": [str(name) for name in ordered[-1].get("signers") or []],
            }
        )
    return {"rows": rows[:HEADS], "left": max(0, len(rows) - HEADS), "total": len(heads)}


def _covered(partners: Mapping[str, Fields], coordinator: Fields | None) -> list[dict[str, Any]]:
    """Up to where each ledger is countersigned, and by whom."""
    return [_row([name], figures) for name, figures in _ledgers(partners, coordinator) if figures.get("witnessed")]


def _ledgers(partners: Mapping[str, Fields], coordinator: Fields | None) -> list[tuple[str, Fields]]:
    """Whose ledger -> what is told of it; of clients, who have none of their own, the coordinator's."""
    of_partners = [(name, figures) for name, figures in partners.items() if "witnessed" in figures]
    return [*of_partners, *([("the coordinator", coordinator)] if coordinator else [])]


def _closings(verdict: Fields) -> list[dict[str, Any]]:
    found = []
    for closing in verdict.get("closings") or []:
        ledgers = closing.get("ledgers") or []
        if isinstance(ledgers, Mapping):
            ledgers = [{"owner": owner, "length": length} for owner, length in ledgers.items()]
        named = [item if isinstance(item, Mapping) else {"owner": item} for item in ledgers]
        found.append(
            {
                "run": str(closing.get("run_id")),
                "ledgers": [(str(item.get("owner")), page.number(item.get("length"))) for item in named[:MANY]],
                "left": max(0, len(named) - MANY),
            }
        )
    return found


# -- charts --------------------------------------------------------------------------------------------------------------


def _curve(lineage: str | None, points: Sequence[Fields], cap: float | None, tight: object = None) -> dict[str, Any]:
    """ε after each charge as two step lines against the cap, and a table of it.

    A line is broken where no finite ε holds. Stretches under another charter are marked.

    Args:
        tight: the odometer's ε after all charges; the verdict may have read it at few of them, or at the end only.
    """
    count, cap = len(points), _drawn(cap)
    filters, tights = ([_drawn(point.get(key)) for point in points] for key in ("epsilon_filter", "epsilon"))
    top = max([v for v in (cap, *filters, *tights) if v is not None], default=0.0) or 1.0
    x, y = page.Axis(0, count, 58, 590, 8, whole=True), page.Axis(0.0, 1.12 * top, 214, 14, 4)
    if points and tights[-1] is None and filters[-1] is not None:
        tights[-1] = _drawn(tight)
    lines: list[dict[str, Any]] = []
    for kind, values in (("filter", filters), ("odometer", tights)):
        known = page.thin([i for i, v in enumerate(values) if v is not None], POINTS)
        if known:
            path = _steps(known, values, filters, x, y) if kind == "filter" or len(known) > 1 or count == 1 else ""
            value = values[known[-1]] or 0.0
            lines.append({"kind": kind, "path": path, "end": (x(known[-1] + 1), y(value)), "value": value})
    marks = [(y(line["value"]), line["kind"], line["value"]) for line in lines]
    if cap is not None:
        marks.append((y(cap), "cap", cap))
    marks.sort(key=lambda mark: mark[0])
    spots = page.spread([mark[0] for mark in marks], 16, 214, 17)
    others = []
    for other, run in groupby(range(count), key=lambda i: points[i].get("charter") == "other"):
        stretch = list(run)
        if other:
            others.append((x(stretch[0]), round(x(stretch[-1] + 1) - x(stretch[0]), 1)))
    read = [i for i, v in enumerate(tights) if v is not None]
    days = {str(p.get("time"))[:10] for p in points if p.get("time")}
    return {
        "lineage": lineage,
        "count": count,
        "x": x,
        "y": y,
        "cap": None if cap is None else y(cap),
        "lines": lines,
        "labels": [(*mark, round(spot, 1)) for mark, spot in zip(marks, spots, strict=True)],
        "others": others[:50],
        "dates": [
            (x(i + 1), _when(points[i]["time"]).split(",")[0] if len(days) > 1 else str(points[i]["time"])[11:19])
            for i in page.thin(range(count), 5)
            if points[i].get("time")
        ],
        "day": _when(f"{min(days)}T00:00:00Z").split(",")[0] if len(days) == 1 else None,
        "rows": [
            {
                "number": i + 1,
                "entry": page.number(points[i].get("entry")),
                "time": _when(points[i]["time"], seconds=True) if points[i].get("time") else None,
                "round": page.number(points[i].get("round")),
                "run": points[i].get("run"),
                "other": points[i].get("charter") == "other",
                "epsilon_filter": filters[i],
                "epsilon": tights[i],
            }
            for i in page.thin(read if len(read) >= ROWS else range(count), ROWS)
        ],
        "unknown": any(v is None and filters[i] is not None for i, v in enumerate(tights)),
        "beyond": any(v is None for v in filters),
    }


def _steps(
    known: Sequence[int], values: Sequence[float | None], filters: Sequence[float | None], x: page.Axis, y: page.Axis
) -> str:
    """An SVG path from ε = 0 before the first charge, in steps: a charge counts from when it is made.

    Between two readings the line stands at the later one, an upper bound since ε only grows. It is broken where no finite ε holds.
    """
    path, before = [f"M{x(0)} {y(0.0)}"], -1
    for i in known:
        level = y(values[i] or 0.0)
        if any(v is None for v in filters[before + 1 : i]):
            path.append(f"M{x(i + 1)} {level}")
        else:
            path.append(f"H{x(before + 2)}V{level}" + (f"H{x(i + 1)}" if i > before + 1 else ""))
        before = i
    return "".join(path)


def _bars(groups: Sequence[tuple[list[str], Fields]]) -> dict[str, Any] | None:
    """Two bars a partner (or history), filter and odometer, with a line at its cap."""
    drawn = [[_drawn(f.get(k)) for k in ("epsilon_filter", "epsilon", "epsilon_cap")] for _, f in groups]
    if not any(spent for spent, *_ in drawn):
        return None
    top = max(v for row in drawn for v in row if v is not None)
    x = page.Axis(0.0, 1.05 * top, 170, 560, 5)
    bars = []
    for i, (names, figures) in enumerate(groups):
        row = _row(names, figures)
        row |= {"label": names[0] if row["count"] == 1 else f"{row['count']:,} clients", "y": 24 + 44 * i}
        for key in ("epsilon_filter", "epsilon"):
            value = _drawn(row[key])
            row[f"{key}_w"] = 0 if value is None else round(x(value) - x.start, 1)
        row["cap_x"] = None if _drawn(row["cap"]) is None else x(row["cap"])
        bars.append(row)
    return {"x": x, "bars": bars}


def _distribution(groups: Sequence[tuple[list[str], Fields]]) -> list[tuple[str, list[float | None]]]:
    """Quantiles over partners (nearest rank: each figure is one partner's own)."""
    columns = []
    for key in ("epsilon_filter", "epsilon", "epsilon_cap"):
        weighted = sorted((v, size_of(names, f)) for names, f in groups for v in page.finite([f.get(key)]))
        columns.append(weighted)

    def at(weighted: Sequence[tuple[float, int]], share: float) -> float | None:
        rank, seen = round(share * (sum(n for _, n in weighted) - 1)), 0
        for value, n in weighted:
            seen += n
            if rank < seen:
                return value
        return None

    quantiles = (
        ("lowest", 0.0),
        ("a quarter below", 0.25),
        ("median", 0.5),
        ("a quarter above", 0.75),
        ("highest", 1.0),
    )
    return [(words, [at(column, share) for column in columns]) for words, share in quantiles]


def _commands(bundle: str, against: Sequence[str]) -> list[str]:
    """What a reader types to repeat the audit with the verifier's file alone."""
    where = shlex.quote(bundle or "BUNDLE")
    more = "".join(f" --against {shlex.quote(path)}" for path in against)
    return [
        "python3 -m venv audit",
        "audit/bin/pip install 'cryptography>=44' 'dp-accounting>=0.6,<0.7'",
        "sha256sum verifier.py",
        f"audit/bin/python verifier.py {where}{more} > verdict.json",
        "echo $?",
    ]
