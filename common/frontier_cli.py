"""The frontier of `hansa plan --simulate`: its options, what it shows, and its files. The points are a simulator's."""

from __future__ import annotations

import csv
import io
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from .cli import Format, out, plain, progress
from .config import Federation
from .errors import ConfigError, counted
from .identity import check_writable, write_whole
from .page import up
from .placements import placed

EPSILONS = "0.25,0.5,1,2,4,8"
SIMULATORS = "hansa.simulators"
"""Entry points of what can simulate a plan; this floor imports no higher one, so it looks them up by name."""


class Simulator(Protocol):
    """What the entry point's class makes."""

    def run(
        self, config: Federation, base: Path, epsilons: list[float], rounds: list[int], seeds: int, told: Any
    ) -> dict[str, Any]:
        """The points, from real simulated runs; `told(done, total, what)` is called after each."""

    def draw(self, report: dict[str, Any], to: Path) -> None:
        """Plot the points to a file."""


def check_options(
    federation: Federation, simulate: bool, ledger: Path | None, epsilons: str, rounds: str | None, to: Path | None
) -> tuple[list[float], list[int]]:
    """The caps and numbers of rounds to simulate, checked before anything is computed."""
    if not simulate:
        if to is not None or rounds is not None or epsilons != EPSILONS:
            raise ConfigError("--out, --epsilons and --rounds are about the frontier", "Add --simulate.")
        return [], []
    if ledger is not None:
        raise ConfigError(
            "--simulate starts from an unspent budget; --ledger counts a spent one", "Run them one after the other."
        )
    if federation.privacy.kind == "none":
        raise ConfigError("privacy: none has no frontier: epsilon is unbounded", "Give privacy kind local or shared.")
    if to is not None and to.suffix.lower() not in (*_PLOTS, ".csv"):
        raise ConfigError(f"{to}: written are {', '.join(_PLOTS)} and .csv", "Give --out such an ending.")
    if to is not None and not to.parent.is_dir():
        raise ConfigError(f"{to.parent}: no such folder", "Make it, or give another --out.")
    if to is not None:
        check_writable(to)  # now, and not when minutes of simulation are done
    caps = sorted({_listed(text, "--epsilons", float) for text in epsilons.split(",")})
    if federation.secure_aggregation is not None and epsilons == EPSILONS:
        caps = sorted({*caps, federation.privacy.epsilon or 0.0})  # at which both placements are compared
    if any(not 0 < cap <= 100 for cap in caps):
        raise ConfigError(f"--epsilons {epsilons}: each is above 0 and at most 100", f"The default is {EPSILONS}.")
    counts = sorted({_listed(text, "--rounds", int) for text in rounds.split(",")}) if rounds else []
    if any(not 1 <= count <= 1_000_000 for count in counts):
        raise ConfigError(f"--rounds {rounds}: each is a whole number from 1", "For example: --rounds 5,10,20")
    return caps, counts or [federation.algorithm.rounds]


_PLOTS = (".png", ".svg", ".pdf")


def _listed(text: str, option: str, kind: Any) -> Any:
    try:
        return kind(text.strip())
    except ValueError:
        raise ConfigError(f"{option}: {text.strip()!r} is no number", "Give numbers with commas: 0.5,1,2") from None


def find_simulator() -> Simulator:
    """The installed one.

    Raises:
        ConfigError: there is none.
    """
    for entry in entry_points(group=SIMULATORS):
        made: Simulator = entry.load()()  # torch is imported here, and only here
        return made
    raise ConfigError("no simulator is installed", "Install Hansa whole: pip install 'hansa[train]'")


def simulated(
    simulator: Simulator,
    federation: Federation,
    base: Path,
    epsilons: list[float],
    rounds: list[int],
    seeds: int,
    form: Format,
) -> dict[str, Any]:
    """The simulator's points, with its progress shown on the error stream."""
    console = Console(stderr=True, highlight=False)
    if form is Format.TEXT and not console.is_terminal:
        points = len(placed(federation)[0]) * len(epsilons) * len(rounds)
        console.print(f"simulating {points} points x {seeds} seeds ...")
    with progress("simulating") as told:
        return simulator.run(federation, base, epsilons, rounds, seeds, told)


def print_frontier(found: dict[str, Any]) -> None:
    """For a terminal."""
    out.print(
        f"\nWhat each epsilon buys. {found['unit'].capitalize()} level, add-or-remove-one, {placements_of(found)}.\n"
        f"  {found['metric'].upper()} of simulated runs: mean ± standard deviation over {counted(found['seeds'], 'seed')}, each with a split, an "
        f"initial model and noise of its own;\n  {found['measured_on']}. Cap, filter and odometer are epsilons; noise is the noise multiplier, which the filter calibrates for the cap. A "
        "simulation is on the data of this configuration, and no promise for others."
    )
    if found["seeds"] < 5:
        out.print("[yellow]  fewer than 5 seeds: the standard deviation itself is a rough guess[/]")
    both = len({point["noise_placement"] for point in found["points"]}) > 1
    table = Table(box=None, pad_edge=False)
    for title in ("", "cap", "filter", "odometer", "rounds", "noise", found["metric"].upper(), "runs"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for point in found["points"]:
        costs = ["-", "-"]
        if not point["refused"]:
            costs = [f"{up(point['epsilon_filter'])}", f"{up(point['epsilon_odometer'])}"]
        table.add_row(
            f"federated, {point['noise_placement']}" if both else "federated",
            f"{point['epsilon_cap']:g}",
            *costs,
            str(point["rounds"]),
            "-" if point["refused"] else f"{point['noise_multiplier']:g}",
            f"[red]{plain(point['refused'])}[/]" if point["refused"] else spread_of(point),
            str(point["n"]),
        )
    for name, spread in found["without_privacy"].items():
        told = (
            plain(name.split(",")[0].removeprefix("all data ")),
            "none",
            "-",
            "-",
            str(spread["rounds"]),
            "0",
            spread_of(spread),
            str(spread["n"]),
        )
        table.add_row(*told)
    out.print(table)


def placements_of(found: dict[str, Any]) -> str:
    """Where the noise of the points is, delta, and against whom each placement holds, in words."""
    adversaries = {point["noise_placement"]: point["adversary"] for point in found["points"]}
    against = "; ".join(f"{kind} noise: {who}" for kind, who in adversaries.items())
    if len(adversaries) == 1:
        against = f"adversary: {next(iter(adversaries.values()))}"
    return f"{' and '.join(adversaries)} noise, delta {found['delta']:g}; {against}"


def spread_of(spread: dict[str, Any]) -> str:
    """A mean with its standard deviation, in words."""
    if spread["mean"] is None:
        return "not measured"
    return f"{spread['mean']:.4f}" + (f" ± {spread['sd']:.4f}" if spread["sd"] is not None else "")


_COLUMNS = (
    "setting", "epsilon_cap", "epsilon_filter", "epsilon_odometer", "delta", "unit", "adjacency", "noise_placement", "adversary", "rounds",
    "noise_multiplier", "metric", "mean", "sd", "n", "refused",
)  # fmt: skip


def write_frontier(simulator: Simulator, found: dict[str, Any], to: Path) -> None:
    """The points as a plot or, for .csv, as a table."""
    if to.suffix.lower() != ".csv":
        simulator.draw(found, to)
        return
    stated = {k: found[k] for k in ("delta", "unit", "adjacency", "noise_placement", "adversary", "metric")}
    rows = [{"setting": "federated", **stated, **point} for point in found["points"]]
    for name, spread in found["without_privacy"].items():
        bare = {"epsilon_cap": "inf", "noise_multiplier": 0, "noise_placement": "none", "metric": found["metric"]}
        rows.append({"setting": name, **bare, **spread})
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(to, text.getvalue().encode())
