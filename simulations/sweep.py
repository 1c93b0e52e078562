"""Sweeps: one federation at every combination of some values and with several seeds; several seeds alone are a sweep of nothing.

Every run is a bundle of its own in a folder of its own. Finished is what has a `sweep` section in its `result.json`, the last thing
that is written of a run; it says which configuration it is of. So a sweep that was killed anywhere goes on with `resume`, no run
is counted twice, and `sweep.csv` can be made again from the runs alone.

    OUT/sweep.csv    a row a run, rewritten whole after each
    OUT/sweep.json   the rows, and a summary of each point
    OUT/sweep.png    metrics over the first swept key
    OUT/NAME/        a run; its private folder is OUT.private/NAME
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ..common.cli import clean, plain
from ..common.config import Federation, canonical_key, load_config, load_variations, value_at, values_in
from ..common.errors import ConfigError, HansaError, OutputError, Refused, counted
from ..common.identity import TEMPORARY, sha256, write_whole
from ..common.page import short as cut
from ..common.page import up

MAX_RUNS = 10_000
INTERVAL = "10th to 90th percentile of the runs"
"""What `low` and `high` are, with linear interpolation: how far runs differ, not how well the median is known."""

_APART_S = 10
"""Between lines within a run, where no status is shown."""

Told = Callable[[int, int], None]
"""Called with a run's round and its number of rounds."""
One = Callable[[Federation, Path, Path, Told], tuple[dict[str, Any], bool]]
"""Runs (or goes on with) one run in a folder and a private folder: the content of its `result.json`, and whether its audit verified."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        point: which combination of values, from 0.
        values: dotted key -> value, as the validated configuration has it; a section as its YAML in one line.
        name: of its folder.
    """

    point: int
    values: Mapping[str, Any]
    config: Federation
    name: str


@dataclass(frozen=True)
class Plan:
    """What a sweep will run.

    Attributes:
        keys: swept, in the order given.
        notes: what somebody who reads its result should know.
    """

    source: Path
    keys: list[str]
    runs: list[Run]
    seeds: int
    notes: list[str] = field(default_factory=list)


def planned(source: Path, sweeps: Sequence[str], seeds: int) -> Plan:
    """Every run of a sweep, each checked as a configuration of its own.

    Args:
        sweeps: `KEY=VALUE,VALUE,...`; every combination is a point, the last key varies fastest.

    Raises:
        ConfigError: of the file, a key, a value or a combination of values.
    """
    config = load_config(source)
    given = _given(sweeps)
    points = [dict(zip(given, chosen, strict=True)) for chosen in itertools.product(*given.values())]
    if len(points) * seeds > MAX_RUNS:
        raise ConfigError(
            f"--sweep: {counted(len(points), 'point')} x {counted(seeds, 'seed')} are more than {MAX_RUNS} runs",
            "Sweep fewer values or seeds.",
        )
    seeded = [{**point, "seed": config.seed + n} for point in points for n in range(seeds)]
    try:
        configs = load_variations(source, seeded)
    except ConfigError as err:
        raise ConfigError(err.message if not given else f"--sweep: {err.message}", err.hint) from err
    runs = []
    for number, (point, made) in enumerate(zip(seeded, configs, strict=True)):
        values = {key: _simple(value_at(made, key), point[key]) for key in given}
        runs.append(Run(number // seeds, values, made, _folder(values, made.seed)))
    seen: set[str] = set()
    for run in runs[::seeds]:
        if (what := ", ".join(f"{key}={shown(value)}" for key, value in run.values.items())) in seen:
            raise ConfigError(f"--sweep: {what} is there twice", "Give each value once.")
        seen.add(what)
    return Plan(source, list(given), runs, seeds, _notes(given, configs, seeds))


def _given(sweeps: Sequence[str]) -> dict[str, list[Any]]:
    given: dict[str, list[Any]] = {}
    names: list[list[str]] = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--sweep {text}: no values", "Give KEY=VALUE,VALUE,...: --sweep privacy.epsilon=0.5,1,2")
        try:
            name = canonical_key(key).split(".")
            given[key] = values_in(values)
        except ConfigError as err:
            raise ConfigError(f"--sweep {text}: {err.message}", err.hint) from err
        if name == ["seed"]:
            raise ConfigError(
                "--sweep seed: seeds are not swept", "--seeds N runs each point with seed, seed + 1, ... of the file."
            )
        for other in names:
            if name[: len(other)] == other[: len(name)]:
                raise ConfigError(
                    f"--sweep {key}: {'.'.join(other)} is swept, too", "Sweep a key once, or the section that it is in."
                )
        names.append(name)
    return given


def _notes(given: Mapping[str, Any], configs: Sequence[Federation], seeds: int) -> list[str]:
    notes = []
    fixed = [c.privacy.noise_multiplier for c in configs if c.privacy.noise_multiplier is not None]
    if "privacy.epsilon" in given and fixed:
        what = f"{fixed[0]:g}" if len(set(fixed)) == 1 else "swept, too"
        notes.append(
            f"privacy.noise_multiplier is {what}: noise is not calibrated for each epsilon, which is no more than the cap at which a run "
            "is refused. Leave noise_multiplier out of the file to calibrate."
        )
    if given and seeds < 5:
        notes.append("fewer than 5 seeds: the interval itself is a rough guess")
    return notes


def _simple(value: Any, given: Any) -> Any:
    """A value as a cell of a table."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def shown(value: Any) -> str:
    """A value in words: of a number the shortest that says it exactly."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key (of a name the last two) where that tells them apart."""
    keys = list(keys)
    last = [".".join(key.split(".")[-2 if key.endswith((".name", ".kind")) else -1 :]) for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def _folder(values: Mapping[str, Any], seed: int) -> str:
    """A readable folder name; what would not be a good one there is told apart by a hash."""
    parts = []
    for key, short in _short_keys(values).items():
        text = shown(values[key])
        good = re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:40].strip("_.")
        parts.append(f"{short}-{good}" if good == text else f"{short}-{good}-{sha256(text.encode())[:6]}")
    name = "_".join([*parts, f"seed-{seed}"])
    return name if len(name) <= 150 else f"{name[:120]}-{sha256(name.encode())[:12]}_seed-{seed}"


# -- running -----------------------------------------------------------------------------------------------------------


class Sweep:
    """The runs of a plan in a folder.

    Args:
        private: the private folder, which holds every run's.
        with_baselines: a run without baselines is not finished.
        engine: of every run; empty: as each run chooses.

    Raises (by run):
        OutputError: a run was finished by another engine, or with other code or data.
    """

    def __init__(
        self, plan: Plan, folder: Path, private: Path, one: One, with_baselines: bool, engine: str, console: Console
    ) -> None:
        self._plan = plan
        self._out = folder
        self._private = private
        self._one = one
        self._with_baselines = with_baselines
        self._engine = engine
        self._console = console
        self._rows: dict[int, dict[str, Any]] = {}
        self._results: dict[int, dict[str, Any]] = {}
        self._hashes: list[str] = []
        self._inputs: list[dict[str, str]] = []
        self._began = self._said_at = 0.0

    def run(self) -> dict[str, Any]:
        """Run what is not finished yet. What is refused or fails is a row that says so.

        Raises:
            OutputError: nothing can be written there, or a folder holds a run of something else; what was finished stays.
        """
        for path in self._out.glob(f"{TEMPORARY}sweep.*"):  # a killed process's: whoever is here holds the lock
            path.unlink()
        finished = self._finished()
        for number, found in finished.items():
            self._take(number, found, found["sweep"]["seconds"])
        runs = self._plan.runs
        if finished:
            self._console.print(f"{len(finished)} of {len(runs)} runs were finished before")
        self._write()
        with self._console.status("") as status:
            for number, run in enumerate(runs):
                if number in finished:
                    continue
                label = f"run {number + 1} of {len(runs)}"
                self._began = self._said_at = time.perf_counter()

                def told(done: int, of: int, label: str = label) -> None:
                    now = f"{label}, round {done} of {of}{self._left(done / max(1, of))}"
                    status.update(plain(now))
                    if not self._console.is_terminal and time.perf_counter() - self._said_at >= _APART_S:
                        self._said_at = time.perf_counter()
                        self._console.print(plain(now))

                status.update(plain(f"{label}{self._left()}"))
                self._run(number, run, told)
                self._say(label, number)
                self._write()
        report = self.report()
        if self._plan.keys:
            draw(report, self._out / PLOT)
        return report

    def report(self) -> dict[str, Any]:
        """The content of `sweep.json`: rows of what is there, and a summary of each point."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        metrics = list(dict.fromkeys(m for n in sorted(self._results) for m in self._results[n]["final"]))
        points = []
        for at in range(len(self._plan.runs) // self._plan.seeds):
            numbers = [n for n, run in enumerate(self._plan.runs) if run.point == at and n in self._rows]
            points.append(
                _point(
                    self._plan.runs[at * self._plan.seeds].values,
                    [self._rows[n] for n in numbers],
                    [self._results[n] for n in numbers if n in self._results],
                    metrics,
                )
            )
        from .result import rows_title

        report = {
            "source": str(self._plan.source),
            "swept": self._plan.keys,
            "seeds": self._plan.seeds,
            "first_seed": self._plan.runs[0].config.seed,
            "runs_planned": len(self._plan.runs),
            "finished": sum(row["status"] == "finished" for row in rows),
            "verified": sum(bool(row["verified"]) for row in rows),
            "evaluation": next((rows_title(r) for r in self._results.values()), "not measured"),
            "metrics": metrics,
            "interval": INTERVAL,
            "privacy": sorted({words for r in self._results.values() if (words := _claim(r))}),
            "notes": self._plan.notes,
            "points": points,
            "runs": rows,
        }
        if profiles := [r["timings"]["profile"] for r in self._results.values() if "profile" in r["timings"]]:
            from .profile import over_runs

            report["profile"] = over_runs(profiles)
        return report if self._plan.keys else {**report, "table": points[0]["table"]}

    def exit_code(self) -> int:
        """The largest of the runs' own."""
        return max((row["exit_code"] for row in self._rows.values()), default=0)

    def _finished(self) -> dict[int, dict[str, Any]]:
        """Number of a run -> its finished result, wherever in the sweep's folder that is."""
        from ..common.tasks import sized
        from .federation import config_sha256, inputs_of

        self._hashes = [config_sha256(sized(run.config)) for run in self._plan.runs]
        base, known = self._plan.source.parent, dict[str, dict[str, str]]()
        for run in self._plan.runs:  # most have the same task and data
            which = json.dumps(
                [run.config.task, run.config.model_dump(mode="json", include={"partners", "population"})]
            )
            self._inputs.append(known.get(which) or known.setdefault(which, inputs_of(run.config, base)))
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for path in sorted(self._out.glob("*/result.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                made = result["sweep"]["config_sha256"]
            except (OSError, ValueError, LookupError, TypeError):
                continue  # not finished, or nothing of ours
            if "baselines" in result or not self._with_baselines:
                found.setdefault(made, []).append((path.parent.name, result))
        for run, made, inputs in zip(self._plan.runs, self._hashes, self._inputs, strict=True):
            for folder, result in found.get(made, []):
                if any(result["sweep"].get(name, mine) != mine for name, mine in inputs.items()):
                    raise OutputError(
                        f"{self._out / folder}: was finished with other code of its task, or other data (run {run.name})",
                        "One table is of one code and data: restore them, or give another --out.",
                    )
                if self._engine and result.get("engine") not in (None, self._engine):
                    raise OutputError(
                        f"{self._out / folder}: was finished by the engine {result['engine']} (run {run.name})",
                        "Go on with the --engine that the sweep began with, or give another --out.",
                    )
        # Under its own name first: another sweep in this folder may have called the same run something else.
        return {
            number: {**result, "sweep": {**result["sweep"], "folder": folder}}
            for number, (run, made) in enumerate(zip(self._plan.runs, self._hashes, strict=True))
            for folder, result in sorted(found.get(made, []), key=lambda one, own=run.name: one[0] != own)[:1]  # type: ignore[misc]
        }

    def _run(self, number: int, run: Run, told: Told) -> None:
        from .result import save_result

        began = time.perf_counter()
        own = self._out / run.name
        try:
            result, verified = self._one(run.config, own, self._private / run.name, told)
        except OutputError:
            raise  # the next run would meet the same
        except HansaError as err:
            code = err.exit_code
            seconds = time.perf_counter() - began
            status = "refused" if isinstance(err, Refused) else "failed"
            self._rows[number] = {
                **_blank(run), "status": status, "reason": clean(err.message.removeprefix("refused: ")), "seconds": seconds, "exit_code": code,
            }  # fmt: skip
            return
        seconds = time.perf_counter() - began
        made = {
            "config_sha256": self._hashes[number],
            **self._inputs[number],
            "values": dict(run.values),
            "verified": verified,
        }
        result["sweep"] = {**made, "seconds": seconds}
        save_result(own, result)  # from here on it is finished
        self._take(number, {**result, "sweep": {**result["sweep"], "folder": run.name}}, seconds)

    def _take(self, number: int, result: dict[str, Any], seconds: float) -> None:
        self._results[number] = result
        self._rows[number] = _row(self._plan.runs[number], result, seconds)

    def _left(self, of_this: float = 0.0) -> str:
        """The time that what is not done will take, at the pace of the rounds that are.

        Args:
            of_this: the share of the current run that is done.
        """
        from .display import time_left

        done = [n for n, row in self._rows.items() if row["status"] == "finished" and row["seconds"]]
        rounds = {n: run.config.algorithm.rounds for n, run in enumerate(self._plan.runs)}
        missing = [n for n in rounds if n not in self._rows]
        if not missing or not (done or of_this):
            return ""
        seconds, part = sum(self._rows[n]["seconds"] for n in done), of_this * rounds[missing[0]]
        seconds += time.perf_counter() - self._began if of_this else 0
        pace = seconds / (sum(rounds[n] for n in done) + part)
        return f", {time_left(pace * (sum(rounds[n] for n in missing) - part))}"

    def _say(self, label: str, number: int) -> None:
        run, row = self._plan.runs[number], self._rows[number]
        short = _short_keys(run.values)
        what = "  ".join([*(f"{short[k]} {shown(v)}" for k, v in run.values.items()), f"seed {run.config.seed}"])
        if row["status"] == "finished":
            result = self._results[number]
            scores = "  ".join(f"{plain(k)} {v:.4f}" for k, v in result["final"].items())
            told = f"{scores}  {'verified' if row['verified'] else '[bold red]NOT VERIFIED[/]'}"
        else:
            told = f"[yellow]{row['status']}: {plain(row['reason'])}[/]"
        self._console.print(f"{label}  {plain(what)}  {told}  {row['seconds']:.1f} s{self._left()}")

    def _write(self) -> None:
        report = self.report()
        write_whole(self._out / TABLE, csv_of(report["runs"], self._plan.keys, report["metrics"]).encode())
        write_whole(self._out / SUMMARY, json.dumps(report, indent=1).encode() + b"\n")


TABLE, SUMMARY, PLOT = "sweep.csv", "sweep.json", "sweep.png"


# -- rows and points ---------------------------------------------------------------------------------------------------

_ABOUT = (
    "epsilon_odometer", "epsilon_filter", "epsilon_cap", "delta", "unit", "adjacency", "noise_placement", "adversary",
    "noise_multiplier", "rounds", "refusals", "seconds", "verified", "folder",
)  # fmt: skip


def _blank(run: Run) -> dict[str, Any]:
    """The row of a run of which nothing is known."""
    start = {**run.values, "seed": run.config.seed, "status": "", "reason": "", "metrics": {}}
    return {**start, **dict.fromkeys(_ABOUT), "folder": run.name, "unbounded": False}


def _row(run: Run, result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A finished run, of which `result.json` says everything. Each ε is the largest of any partner."""
    privacy, partners = result["privacy"], list(result["partners"].values())
    trained = bool(result["rounds"])
    private = privacy["kind"] != "none"
    largest = {
        name: None if any(p[key] is None for p in partners) else max(p[key] for p in partners)
        for name, key in (("epsilon_odometer", "epsilon"), ("epsilon_filter", "epsilon_filter"))
    }
    verified = bool(result["sweep"]["verified"])
    return {
        **_blank(run),
        "status": "finished" if trained else "refused",
        "reason": "" if trained else _why(result),
        "metrics": dict(result["final"]),
        **largest,
        "epsilon_cap": privacy["epsilon"],
        "delta": privacy["delta"],
        "unit": privacy["unit"] if private else None,
        "adjacency": privacy["adjacency"] if private else None,
        "noise_placement": privacy["noise"],
        "adversary": privacy["adversary"] if private else None,
        "noise_multiplier": privacy["noise_multiplier"],
        "rounds": len(result["rounds"]),
        "refusals": len(result["refusals"]),
        "seconds": seconds,
        "verified": verified,
        "folder": result["sweep"]["folder"],
        "unbounded": largest["epsilon_odometer"] is None,
        "exit_code": 0 if trained and verified else 1,
    }


def _why(result: Mapping[str, Any]) -> str:
    told = "; ".join(f"{r['partner']}: {r['reason']}: {r['detail']}" for r in result["refusals"][:1])
    more = len(result["refusals"]) - 1
    told += f"; and {counted(more, 'more refusal')}" if more > 0 else ""
    return clean(f"nothing was trained: too few partners accepted the run ({told})")


def _claim(result: Mapping[str, Any]) -> str:
    """What the ε of a run are about, in words."""
    p = result["privacy"]
    if p["kind"] == "none":
        return "unbounded where there is no privacy"
    return f"{p['unit']} level, {p['adjacency']}, delta {p['delta']:g}, {p['noise']} noise, against {p['adversary']}"


def summarised(values: Sequence[float]) -> dict[str, Any]:
    """Median, interval (see INTERVAL), mean and standard deviation (None for one run: unknown, not zero)."""
    several = len(values) > 1
    tenths = statistics.quantiles(values, n=10, method="inclusive") if several else []
    return {
        "n": len(values),
        "median": statistics.median(values) if values else None,
        "low": tenths[0] if several else None,
        "high": tenths[-1] if several else None,
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if several else None,
    }


def _point(
    values: Mapping[str, Any], rows: list[dict[str, Any]], results: list[dict[str, Any]], metrics: list[str]
) -> dict[str, Any]:
    from .result import score_rows

    gathered: dict[str, list[dict[str, float]]] = {}
    for result in results:
        for name, scores in score_rows(result).items():
            gathered.setdefault(name, []).append(scores)
    keys = list(dict.fromkeys(k for several in gathered.values() for scores in several for k in scores))
    largest = {
        name: max((row[name] for row in rows if row[name] is not None), default=None)
        if not any(row["unbounded"] for row in rows)
        else None
        for name in ("epsilon_odometer", "epsilon_filter")
    }
    reasons = [row["reason"] for row in rows if row["reason"]]
    return {
        "values": dict(values),
        "label": next((name for r in results for name in score_rows({**r, "baselines": None})), ""),
        "n": sum(row["status"] == "finished" for row in rows),
        "verified": sum(bool(row["verified"]) for row in rows),
        **largest,
        "unbounded": any(row["unbounded"] for row in rows),
        "delta": next((row["delta"] for row in rows if row["delta"] is not None), None),
        "metrics": {m: summarised([r["final"][m] for r in results if m in r["final"]]) for m in metrics},
        "table": {
            name: {k: summarised([s[k] for s in several if k in s]) for k in keys if any(k in s for s in several)}
            for name, several in gathered.items()
        },
        "reasons": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
    }


def csv_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """Rows as CSV: numbers in full, `inf` for an ε without bound, nothing for what is not known."""
    text = io.StringIO()
    columns = [*keys, "seed", "status", "reason", *metrics, *_ABOUT]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {**row, **row["metrics"]}
        if row["unbounded"]:
            cells |= dict.fromkeys(("epsilon_odometer", "epsilon_filter"), math.inf)
        swept = {key: "null" if row[key] is None else row[key] for key in keys}
        writer.writerow({c: _cell({**cells, **swept}.get(c)) for c in columns})
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool) else "" if value is None else value


# -- on a screen -------------------------------------------------------------------------------------------------------


def print_sweep(report: Mapping[str, Any], console: Console, folder: Path) -> None:
    """The summary for a terminal."""
    keys, metrics = report["swept"], report["metrics"]
    seeds = counted(report["seeds"], "seed")
    if not keys:
        _print_seeds(report, console)
    else:
        title = f"{report['evaluation']}; median and [{INTERVAL}] of {seeds} a point"
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        several = any(len(point["table"]) > 1 for point in report["points"])
        short = _short_keys(keys)
        for name in (*(short[k] for k in keys), *([""] if several else []), "runs", *metrics):
            table.add_column(plain(name), justify="right" if name else "left")
        for name in _SPENT_TITLES:
            table.add_column(name, justify="right")
        for point in report["points"]:
            what = [plain(shown(value)) for value in point["values"].values()]
            for name, scores in (point["table"] or {point["label"]: {}}).items():
                own = name == point["label"]
                cells = [_interval(scores[m]) if m in scores else "-" for m in metrics]
                label = [plain(name)] if several else []
                table.add_row(*what, *label, str(point["n"]) if own else "", *cells, *(_spent(point) if own else ()))
        _print_whole(table, console)
        for point in report["points"]:
            here = ", ".join(f"{short[k]} {shown(v)}" for k, v in point["values"].items())
            for reason, count in point["reasons"].items():
                console.print(f"[yellow]{plain(here)}: {counted(count, 'run')} without a result: {plain(reason)}[/]")
    for claim in report["privacy"]:
        console.print(plain(f"epsilon: the largest of any partner; {claim}"))
    if "profile" in report:
        from .profile import profile_table

        _print_whole(profile_table(report["profile"]), console)
        console.print("each run's own: timings.profile of its result.json")
    for note in report["notes"]:
        console.print(f"[yellow]{plain(note)}[/]")
    where = f"{folder}/{TABLE} (a row a run), {SUMMARY}" + (f" and {PLOT}" if keys else "")
    audited = sum(row["verified"] is not None for row in report["runs"])
    told = f"{report['finished']} of {report['runs_planned']} runs finished, {report['verified']} of {audited} audits verified"
    console.print(plain(f"{told}; every run is in a folder of its own beside {where}"))


_SPENT_TITLES = ("epsilon spent, odometer", "filter")


def _spent(point: Mapping[str, Any]) -> list[str]:
    found = (point["epsilon_odometer"], point["epsilon_filter"])
    return ["unbounded" if point["unbounded"] else "-" if one is None else up(one) for one in found]


def _print_whole(table: Table, console: Console) -> None:
    """Print a table; into a file or a pipe with lines as long as they need to be."""
    width = console.width
    if not console.is_terminal:
        console.width = max(width, console.measure(table, options=console.options.update(width=1000)).maximum)
    try:
        console.print(table)
    finally:
        console.width = width


def _print_seeds(report: Mapping[str, Any], console: Console) -> None:
    (point,) = report["points"]
    title = f"{report['evaluation']}; mean and standard deviation over {point['n']} seeds"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    keys = list(dict.fromkeys(k for spread in point["table"].values() for k in spread))
    for column in ("", *keys, *_SPENT_TITLES):
        table.add_column(plain(column), justify="right" if column else "left")
    for name, spread in point["table"].items():
        cells = (f"{spread[k]['mean']:.4f} ± {spread[k]['sd'] or 0:.4f}" if k in spread else "-" for k in keys)
        table.add_row(plain(name), *cells, *(_spent(point) if name == point["label"] else ()))
    if point["table"]:
        _print_whole(table, console)


def _interval(found: Mapping[str, Any]) -> str:
    if found["median"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['median']:.4f}"
    return f"{found['median']:.4f} \\[{found['low']:.4f}, {found['high']:.4f}]"


# -- the plot ----------------------------------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], to: Path) -> None:
    """Each metric over the first swept key: the median with its interval as a band, runs as dots, a line for each combination of the others.

    Between words there is nothing: no line joins them, and the interval is a bar.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, *others = report["swept"]
    metrics = report["metrics"][:4] or ["nothing was measured"]
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in report["points"]:
        lines.setdefault(tuple(point["values"][key] for key in others), []).append(point)
    values = list(dict.fromkeys(point["values"][first] for point in report["points"]))
    place, log, words = _axis(values)
    ticks, legends = _labels(values), {key: _labels([line[n] for line in lines]) for n, key in enumerate(others)}
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["runs"]:
        runs.setdefault(json.dumps([row[key] for key in report["swept"]]), []).append(row)
    columns = 2 if len(metrics) == 4 else len(metrics)
    lined = len(metrics) // columns
    size = (1.0 + 4.2 * columns, 1.2 + 3.4 * lined)
    figure, grid = pyplot.subplots(lined, columns, squeeze=False, figsize=size, layout="constrained")
    every = list(grid.flat)
    short = _short_keys(others)
    legend: list[Any] = []
    for axes, metric in zip(every, metrics, strict=True):
        for number, (line, points) in enumerate(lines.items()):
            colour, marker = f"C{number % 10}", "osD^vP"[number % 6]
            label = ", ".join(f"{short[k]} {legends[k][v]}" for k, v in zip(others, line, strict=True))
            here = [(place[p["values"][first]], p["metrics"].get(metric), p) for p in points]
            found = sorted(((x, m, p) for x, m, p in here if m and m["n"]), key=lambda one: one[0])
            x = [one[0] for one in found]
            median = [m["median"] for _, m, _ in found]
            style = "none" if words else "-"
            drawn = axes.plot(x, median, marker=marker, linestyle=style, color=colour, label=label)
            if axes is every[0]:
                legend += drawn
            low = [m["median"] if m["low"] is None else m["low"] for _, m, _ in found]
            high = [m["median"] if m["high"] is None else m["high"] for _, m, _ in found]
            if words:
                axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=6)
            else:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            dots = [
                (at, row["metrics"][metric])
                for at, _, p in found
                for row in runs[json.dumps(list(p["values"].values()))]
                if metric in row["metrics"]
            ]
            axes.scatter([d[0] for d in dots], [d[1] for d in dots], s=8, color=colour, alpha=0.45, linewidth=0)
        if log:
            axes.set_xscale("log")
        axes.set_xticks(
            [place[v] for v in values], [textwrap.fill(ticks[v], 16) if words else ticks[v] for v in values]
        )
        axes.minorticks_off()
        axes.set_xlabel(first)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
    told = [f"median, band: {INTERVAL}, dots: runs; {counted(report['seeds'], 'seed')} a point", *report["privacy"]]
    figure.suptitle("\n".join(textwrap.fill(words, 15 + 62 * columns) for words in told), fontsize=8, x=0.02, ha="left")
    if others:
        figure.legend(handles=legend, loc="outside lower center", ncols=min(3, len(legend)), frameon=False, fontsize=8)
    made = io.BytesIO()
    try:
        figure.savefig(made, format="png", dpi=150)
    finally:
        pyplot.close(figure)
    write_whole(to, made.getvalue())


def _axis(values: Sequence[Any]) -> tuple[dict[Any, float], bool, bool]:
    """Where each value is on the axis; whether that is logarithmic (numbers over more than a factor of ten), and whether these are words."""
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return {value: float(at) for at, value in enumerate(values)}, False, True
    return {v: float(v) for v in values}, min(values) > 0 and max(values) / min(values) > 10, False


def _labels(values: Sequence[Any]) -> dict[Any, str]:
    """Values for a plot's axis or legend, each another: of long ones that begin alike what comes after.

    Matplotlib reads mathematics between dollar signs.
    """
    texts = {value: clean(shown(value)) for value in values}
    found = {value: cut(text, 40) for value, text in texts.items()}
    for label in set(found.values()):
        alike = [v for v, other in found.items() if other == label]
        if len(alike) > 1:
            ends = zip(min(texts[v] for v in alike), max(texts[v] for v in alike), strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
            for v in alike:
                found[v] = "…" + cut(texts[v][texts[v].rfind(" ", 0, same) + 1 :], 39)
    once = Counter(found.values())
    numbered = {v: label if once[label] == 1 else f"{label} ({n})" for n, (v, label) in enumerate(found.items(), 1)}
    return {v: label.replace("$", r"\$") for v, label in numbered.items()}
