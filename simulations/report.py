"""The report of a run: one self-contained HTML page for a data steward and a regulator.

The page only renders what `result.json` and the audit's verdict say. Where both give a figure it shows the
audit's, recomputed from the ledgers, and lists every disagreement under the verdict. It loads nothing: style
and charts (SVG) are inline, and a content security policy forbids the rest. This module computes words,
places and rows; `templates/report.html.j2` draws them, autoescaped: names come from other organisations.
"""

from __future__ import annotations

import bisect
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.audit_report import BECAUSE
from ..common.identity import write_whole
from ..common.page import Axis, environment, exact, finite, number, short, spread, thin
from .realism import LIMITS, duration, in_words, volume
from .timelines import FATES

_EACH = 30  # partners drawn and listed one by one; above this, their distribution
_ALONE = 12  # "one partner alone" lines in the score chart; above this, a band
_ROWS = 100  # longest table by round
_POINTS = 400  # longest curve
_METRICS = {"auc": "AUC", "accuracy": "Accuracy", "brier": "Brier score"}


def write_report(path: Path, result: Mapping[str, Any], verdict: Mapping[str, Any], charter_words: str) -> None:
    """Write the report of a run as one HTML page that needs no network.

    Args:
        path: the file; replaced atomically, so a reader sees the old page or the new one.
        result: the content of `result.json`. Values may be missing, None or NaN; the page then says so.
        verdict: the verifier's verdict on the same bundle.
        charter_words: the charter as `hansa charter show` prints it.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full. Nothing is left behind.
    """
    made = environment("hansa.simulations")
    made.filters |= {"duration": duration, "volume": volume}
    page = made.get_template("report.html.j2").render(_view(result, verdict, charter_words))
    write_whole(path, page.encode())


# Values to words.


def _score(value: object) -> float | None:
    """A score: a finite number or None (an infinite AUC means nothing)."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


# The sections.


def _view(result: Mapping[str, Any], verdict: Mapping[str, Any], charter_words: str) -> dict[str, Any]:
    privacy = result.get("privacy") or {}
    private = bool(privacy) and privacy.get("kind") != "none"
    partners, differences = _partners(result, verdict, private)
    violations, warnings = (_pick(verdict.get(k), "file", "line", "what") for k in ("violations", "warnings"))
    mine, audited = result.get("charter_sha256"), verdict.get("charter_sha256")
    if mine != audited:
        # The verdict is then about another run: nothing on this page is verified.
        what = f"names charter {mine}; the audit checked charter {audited}"
        violations.insert(0, {"file": "result.json", "line": None, "what": what})
    checked = verdict.get("checked") or {}
    verified = verdict.get("verified") is True and not violations
    refusals = _pick(result.get("refusals"), "partner", "run_id", "reason", "detail", "round")
    return {
        "run": {k: result.get(k) for k in ("run_id", "name", "task", "created")},
        "total_s": number((result.get("timings") or {}).get("total_s")),
        "charter_sha256": audited or mine,
        "charter_words": charter_words,
        "verified": verified,
        "simulated": bool(verdict.get("simulated") or result.get("simulated")),
        "private": private,
        "kind": privacy.get("kind"),
        "unit": privacy.get("unit"),
        "claim": _claim(privacy) if private else None,
        # The sentence speaks of each partner: it stands only if the audit found each within it.
        "confirmed": verified and bool(partners) and all(p["confirmed"] and not p["over"] for p in partners),
        "mechanism": {k: number(privacy.get(k)) for k in ("noise_multiplier", "clip_norm")},
        "evaluation": _pick([result.get("evaluation") or {}], "kind", "rows")[0],
        "scores": _scores(result),
        "system": _system(result),
        "budget": _budget(partners) if private else None,
        "trajectory": _trajectory(partners) if private else None,
        "partners": partners,
        "total": _total(partners),
        "listed": sorted(partners, key=_share, reverse=True)[:20] if _total(partners) > _EACH else partners,
        "differences": differences,
        "refusals": [(r, BECAUSE.get(r["reason"], r["reason"] or "of a reason not given")) for r in refusals],
        "ledger_refusals": sum((p["refusals"] or 0) * p["clients"] for p in partners),
        "checked": [(k, checked.get(k)) for k in ("ledgers", "entries", "signatures")],
        "violations": violations,
        "warnings": warnings,
        "limits": list(verdict.get("limits") or []),
        "bundle": str(verdict.get("bundle") or ""),
        "command": shlex.join(["hansa", "audit", str(verdict.get("bundle") or "DIR")]),
    }


def _pick(items: Iterable[Mapping[str, Any]] | None, *keys: str) -> list[dict[str, Any]]:
    """The items with just these keys, None where one is missing."""
    return [{key: item.get(key) for key in keys} for item in items or []]


def _claim(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """The guarantee in one sentence, or what is missing to call anything differentially private."""
    epsilon, delta = number(privacy.get("epsilon")), number(privacy.get("delta"))
    stated: dict[str, Any] = {
        "unit": privacy.get("unit"),
        "adjacency": privacy.get("adjacency"),
        "ε": epsilon if epsilon is not None and math.isfinite(epsilon) else None,
        "δ": delta,
        "noise placement": privacy.get("noise"),
        "adversary": privacy.get("adversary"),
    }
    missing = [name for name, value in stated.items() if value is None or value == ""]
    if missing or epsilon is None or delta is None:
        return {"sentence": None, "missing": missing}
    noise = stated["noise placement"]
    placed = _PLACED.get(str(noise), f"noise placement “{noise}”")
    what = _WHAT.get(str(noise), "Each partner's updates")
    sentence = (
        f"{what} are {stated['unit']}-level (ε = {exact(epsilon)}, δ = {exact(delta)})-"
        f"differentially private under {stated['adjacency']} adjacency, with {placed}; "
        f"adversary: {str(stated['adversary']).rstrip('.')}."
    )
    return {"sentence": sentence, "missing": []}


_WHAT = {
    "shared": "The sums of all partners' updates",
    "central": "The models of all rounds, together,",
}
_PLACED = {
    "central": "noise added by the coordinator to the sum of clipped updates of a secret sample",
    "local": "noise added locally before anything leaves",
    "shared": "noise of which each partner adds a share before its update is masked",
}


def _partners(
    result: Mapping[str, Any], verdict: Mapping[str, Any], private: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a partner (of a large population a history, which `clients` have), the audit's figures first; and where both disagree."""
    reported, audited = result.get("partners") or {}, verdict.get("partners") or {}
    privacy = result.get("privacy") or {}
    rows, differences = [], []
    for name in dict.fromkeys([*reported, *audited]):
        mine, theirs = reported.get(name) or {}, audited.get(name) or {}
        called = short(name, 60)
        if name not in audited:
            differences.append(f"{called} is in result.json, but the audit found no ledger of it.")
        if name not in reported:
            differences.append(f"{called} has a ledger, but is not in result.json.")
        row: dict[str, Any] = {"name": str(name), "unaudited": []}
        row["clients"] = max(1, int(number(theirs.get("clients") or mine.get("clients")) or 1))
        # The odometer may be recomputed on another grid (1 % is its stated accuracy); the rest are sums.
        for key, words, tolerance in (
            ("epsilon", "ε by the odometer", 1e-2),
            ("epsilon_filter", "ε by the filter", 1e-6),
            ("epsilon_cap", "ε cap", 1e-9),
            ("delta", "δ", 1e-9),
        ):
            a, b = number(mine.get(key)), number(theirs.get(key))
            row[key] = a if b is None else b
            if b is None and a is not None:
                row["unaudited"].append(key)
            if a is not None and b is not None and not math.isclose(a, b, rel_tol=tolerance):
                differences.append(
                    f"{called}: {words} is {exact(a)} in result.json and {exact(b)} by the audit; "
                    "this page shows the audit's."
                )
        spent, cap = row["epsilon_filter"], row["epsilon_cap"]
        row["over"] = spent is not None and cap is not None and spent > cap
        row["confirmed"] = True
        for key, symbol in (("epsilon_filter", "ε"), ("delta", "δ")):
            value, stated = number(theirs.get(key)), number(privacy.get(key.removesuffix("_filter")))
            if value is None or stated is None:
                row["confirmed"] = False
            elif value > stated * (1 + 1e-9) and private:
                row["confirmed"] = False
                differences.append(
                    f"{called}: its ledger stands at {symbol} = {exact(value)} (by the filter), above the "
                    f"{symbol} = {exact(stated)} stated for this run: the ledger covers more than this run, "
                    "or the statement is wrong."
                )
        for key in ("declared_records", "rounds"):
            row[key] = number(mine.get(key))
        for key in ("entries", "debits", "uncommitted_debits", "refusals"):
            row[key] = number(theirs.get(key))
        curve: dict[int, float] = {}
        for point in theirs.get("trajectory") or []:
            at, charged = finite([point.get("round")]), finite([point.get("epsilon_filter")])
            if at and charged:
                # A round that was retried has two entries; what it cost in all is the larger, the later.
                curve[int(at[0])] = max(charged[0], curve.get(int(at[0]), 0.0))
        row["trajectory"] = sorted(curve.items())
        rows.append(row)
    return rows, differences


def _total(partners: Sequence[Mapping[str, Any]]) -> int:
    return sum(p["clients"] for p in partners)


def _share(row: Mapping[str, Any]) -> float:
    """How much of its cap a partner has used; what has no figure comes last."""
    spent, cap = row["epsilon_filter"], row["epsilon_cap"]
    return spent / cap if spent is not None and cap else -1.0


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by round against the baselines: the chart's coordinates, and the rows of its two tables."""
    by_round = [
        (int(r["round"]), r.get("metrics") or {}) for r in result.get("rounds") or [] if finite([r.get("round")])
    ]
    rounds, by_round = (
        len(by_round),
        [(r, metrics) for r, metrics in by_round if metrics],
    )  # who was not evaluated has no row
    final = result.get("final") or (by_round[-1][1] if by_round else {})
    baselines = result.get("baselines") or {}
    pooled, free = baselines.get("pooled") or {}, baselines.get("federated_without_privacy") or {}
    alone = {str(name): scores or {} for name, scores in (baselines.get("local") or {}).items()}
    everything = [final, pooled, free, *alone.values(), *(metrics for _, metrics in by_round)]
    columns = [m for m in _METRICS if any(_score(s.get(m)) is not None for s in everything)]
    own = [final, *(metrics for _, metrics in by_round)]
    metric = next((m for m in ("auc", "accuracy") if finite(s.get(m) for s in own)), None)
    listed = list(alone.items())
    if len(alone) > _ALONE:
        ranked = sorted((x, name) for name, s in alone.items() for x in finite([s.get(metric)]))
        listed = [(ranked[i][1], alone[ranked[i][1]]) for i in (0, (len(ranked) - 1) // 2, -1) if ranked]
    summary = [
        (label, [_score(scores.get(m)) for m in columns], kind)
        for label, scores, kind in [
            ("This run", final, "run"),
            ("Federated, no privacy", free, "free"),
            ("All data pooled", pooled, "pooled"),
            *((f"{short(name, 20)} alone", scores, "alone") for name, scores in listed),
        ]
        if scores
    ]
    view: dict[str, Any] = {
        "metric": metric,
        "label": _METRICS.get(metric or ""),
        "columns": [(m, _METRICS[m]) for m in columns],
        "final": _score(final.get(metric)),
        "rounds": rounds,
        "evaluated": len(by_round),
        "summary": summary,
        "alone": len(alone),
        "alone_listed": len(listed),
        "by_round": [(r, [_score(s.get(m)) for m in columns]) for r, s in thin(by_round, _ROWS)],
        "pooled": None,
        "free": None,
        "alone_range": None,
        "chart": None,
    }
    if metric is None:
        return view
    view["pooled"], view["free"] = _score(pooled.get(metric)), _score(free.get(metric))
    alone_scores = sorted((x, name) for name, s in alone.items() for x in finite([s.get(metric)]))
    if alone_scores:
        view["alone_range"] = (alone_scores[0], alone_scores[-1])
    if any(finite([s.get(metric)]) for _, s in by_round):
        view["chart"] = _score_chart(
            [(r, _score(s.get(metric))) for r, s in thin(by_round, _POINTS)], view, alone_scores
        )
    return view


def _system(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The virtual clock: how long each round would last, and what became of whom it asked; None without one."""
    system = result.get("system") or {}
    # What is no round of ours is left out.
    rows = [
        row
        for row in system.get("rounds") or []
        if len(finite(row.get(key) for key in _ROUND_KEYS)) == len(_ROUND_KEYS)
    ]
    if not rows:
        return None
    shown = thin(rows, _BARS)
    longest, most = max(r["seconds"] for r in rows), max(r["asked"] for r in rows)
    unit, words = next(
        ((u, w) for u, w in ((86400, "days"), (3600, "hours"), (60, "minutes")) if longest > 2 * u), (1, "seconds")
    )
    x = Axis(0, len(shown), 56, 740, 10, whole=True)
    time, fates = Axis(0.0, longest / unit * 1.08, 150, 24, 4), Axis(0.0, most * 1.04, 330, 214, 4, whole=True)
    step = (x.end - x.start) / len(shown)
    bars = []
    for index, row in enumerate(shown):
        left, at = x.start + step * (index + 0.1), 0.0
        stack = []
        for fate in FATES:
            top = fates(at + row[fate])
            stack.append((fate.replace(" ", "-"), top, round(fates(at) - top, 1)))
            at += row[fate]
        height = round(time.start - time(row["seconds"] / unit), 1)
        bars.append((round(left, 1), round(step * 0.8, 1), round(time.start - height, 1), height, stack))
    every = max(1, len(shown) // 10)
    ticks = [(round(x.start + step * (i + 0.5), 1), r["round"]) for i, r in enumerate(shown) if i % every == 0]
    return {
        "words": in_words({"rounds": rows, "totals": {key: sum(r[key] for r in rows) for key in _ROUND_KEYS}}),
        "estimate": LIMITS,
        "x": x,
        "time": time,
        "unit": words,
        "fates": fates,
        "bars": bars,
        "ticks": ticks,
        "of": len(rows),
        "kinds": [(fate, fate.replace(" ", "-"), sum(r[fate] for r in rows)) for fate in FATES],
        "table": [
            (r["round"], r["seconds"], r["bytes_down"], r["bytes_up"], [r[f] for f in FATES]) for r in thin(rows, 12)
        ],
    }


_BARS = 60
_ROUND_KEYS = ("round", "seconds", "evaluate_s", "bytes_down", "bytes_up", "asked", *FATES)


def _score_chart(
    curve: Sequence[tuple[int, float | None]], view: Mapping[str, Any], alone: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    """A curve with gaps where the score is undefined; baselines as lines, labelled at the right edge."""
    lines = [(x, f"{short(name, 18)} alone", "alone") for x, name in alone] if len(alone) <= _ALONE else []
    lines += [
        (view[kind], words, kind)
        for kind, words in (("pooled", "all data pooled"), ("free", "federated, no privacy"))
        if view[kind] is not None
    ]
    drawn = [(r, y) for r, y in curve if y is not None]
    seen = [y for _, y in drawn] + [x for x, _, _ in lines] + [x for x, _ in alone]
    pad = max(0.01, 0.06 * (max(seen) - min(seen)))
    y = Axis(max(0.0, min(seen) - pad), min(1.0, max(seen) + pad), 290, 20, 5)
    x = Axis(curve[0][0], curve[-1][0], 56, 520, 10, whole=True)
    path, pen = [], "M"
    for r, value in curve:
        if value is None:
            pen = "M"
        else:
            path.append(f"{pen}{x(r)} {y(value)}")
            pen = "L"
    # Without dots a value between two gaps would not show.
    dots = [(x(r), y(v)) for r, v in drawn] if len(curve) <= 60 or len(drawn) < len(curve) else []
    labels: list[tuple[float, str, float | None, str]] = [
        (y(value), words, value, kind) for value, words, kind in lines
    ]
    labels.append((y(drawn[-1][1]), "this run", drawn[-1][1], "run"))
    band = None
    if len(alone) > _ALONE:
        band = (y(alone[-1][0]), y(alone[0][0]))
        labels.append((y((alone[-1][0] + alone[0][0]) / 2), "partners alone (range)", None, "alone"))
    labels.sort(key=lambda label: label[0])
    places = spread([label[0] for label in labels], 24, 292, 16)
    return {
        "x": x,
        "y": y,
        "path": "".join(path),
        "dots": dots,
        "lines": [(y(value), kind) for value, _, kind in lines],
        "band": band,
        "labels": [(*label, round(place, 1)) for label, place in zip(labels, places, strict=True)],
    }


def _caps(partners: Sequence[Mapping[str, Any]]) -> list[float]:
    """The distinct caps, or the lowest and the highest when there are many."""
    caps = sorted(set(finite(p["epsilon_cap"] for p in partners)))
    return caps if len(caps) <= 3 else [caps[0], caps[-1]]


def _budget(partners: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """ε against its cap: two bars a partner, or two histograms and their quantiles when there are many."""
    keys = ("epsilon_filter", "epsilon", "epsilon_cap")
    figures = {key: sorted((v, p["clients"]) for p in partners for v in finite([p[key]])) for key in keys}
    top = max((values[-1][0] for values in figures.values() if values), default=0.0)
    if top <= 0:
        return None
    known = [p for p in partners if _share(p) >= 0]
    view: dict[str, Any] = {
        "over": _total([p for p in partners if p["over"]]),
        "known": _total(known),
        "closest": max(known, key=_share, default=None),
        "unaudited": any("epsilon" in p["unaudited"] or "epsilon_filter" in p["unaudited"] for p in partners),
        "bars": None,
        "histograms": None,
        "caps": _caps(partners),
    }
    if _total(partners) <= _EACH:
        x = Axis(0.0, top * 1.04, 170, 590, 5)
        view["x"] = x
        view["bars"] = [
            {
                "name": p["name"],
                "y": 30 + 46 * i,
                "cap": None if p["epsilon_cap"] is None else x(p["epsilon_cap"]),
                "over": p["over"],
                **{key: p[key] for key in keys[:2]},
                **{f"{key}_w": 0 if p[key] is None else round(x(p[key]) - x.start, 1) for key in keys[:2]},
            }
            for i, p in enumerate(partners)
        ]
        return view
    # Bins end at the (highest) cap and include their upper edge: no bar crosses it unless an ε does.
    cap = max(view["caps"], default=top)
    x, width = Axis(0.0, top * 1.04, 56, 740, 8), max(cap, top / 5) / 20
    histograms = []
    for key, words in (("epsilon_filter", "ε by the filter"), ("epsilon", "ε by the odometer")):
        counts = Counter[int]()
        for value, n in figures[key]:
            counts[max(0, math.ceil(value / width - 1e-12) - 1)] += n
        tallest = max(counts.values(), default=1)
        bars = [
            (
                x(i * width),
                round(max(x((i + 1) * width) - x(i * width) - 1.5, 0.5), 1),
                round(80 * n / tallest, 1),
                n,
                len(view["caps"]) == 1 and (i + 0.5) * width > cap,
            )
            for i, n in sorted(counts.items())
        ]
        histograms.append((words, bars))
    view["x"], view["histograms"] = x, histograms
    # Nearest rank: every figure in the table is one partner's own.
    view["quantiles"] = [
        (words, [_quantile(figures[key], q) for key in keys])
        for words, q in (
            ("lowest", 0.0),
            ("quarter", 0.25),
            ("median", 0.5),
            ("three quarters", 0.75),
            ("highest", 1.0),
        )
    ]
    return view


def _quantile(values: Sequence[tuple[float, int]], share: float) -> float | None:
    """Of (value, how many have it) in order."""
    rank = round(share * (sum(n for _, n in values) - 1))
    upto = list(itertools.accumulate(n for _, n in values))
    return values[bisect.bisect_right(upto, rank)][0] if values else None


def _trajectory(partners: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """ε by the filter over rounds: one small panel a partner, or range and median when there are many."""
    curves = [p["trajectory"] for p in partners if p["trajectory"]]
    if not curves:
        return None
    rounds = sorted({r for curve in curves for r, _ in curve})
    caps = _caps(partners)
    top = 1.08 * (max([*caps, *(curve[-1][1] for curve in curves), *(v for c in curves for _, v in c)]) or 1.0)
    view: dict[str, Any] = {"panels": None, "first": rounds[0], "last": rounds[-1], "caps": caps}
    if len(partners) <= _EACH:
        x, y = Axis(rounds[0], rounds[-1], 34, 172, 4, whole=True), Axis(0.0, top, 112, 26, 4)
        shown = thin(rounds, 10)
        view |= {"x": x, "y": y, "shown": shown}
        view["panels"] = [
            {
                "name": p["name"],
                "left": 190 * (i % 4),
                "top": 150 * (i // 4),
                "path": _steps(thin(p["trajectory"], _POINTS), x, y),
                "end": (x(p["trajectory"][-1][0]), y(p["trajectory"][-1][1])) if p["trajectory"] else None,
                "cap": None if p["epsilon_cap"] is None else y(p["epsilon_cap"]),
                "row": [_at(p["trajectory"], r) for r in shown],
            }
            for i, p in enumerate(partners)
        ]
        return view
    x, y = Axis(rounds[0], rounds[-1], 56, 740, 10, whole=True), Axis(0.0, top, 200, 16, 5)
    spread = []
    for r in thin(rounds, 200):
        values = sorted(v for v in (_at(curve, r) for curve in curves) if v is not None)
        spread.append((r, len(values), values[0], values[(len(values) - 1) // 2], values[-1]))
    low, median, high = (_steps([(s[0], s[k]) for s in spread], x, y) for k in (2, 3, 4))
    view |= {"x": x, "y": y, "low": low, "median": median, "high": high, "table": thin(spread, 12)}
    return view


def _at(curve: Sequence[tuple[int, float]], r: int) -> float | None:
    """What had been charged by round r: a partner that sat a round out keeps its last figure."""
    i = bisect.bisect_right(curve, r, key=lambda point: point[0])
    return curve[i - 1][1] if i else None


def _steps(curve: Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    """An SVG path: ε stays where it is until the next round is charged."""
    if not curve:
        return ""
    head, *rest = curve
    return f"M{x(head[0])} {y(head[1])}" + "".join(f"H{x(r)}V{y(v)}" for r, v in rest)
