"""The frontier of `hansa plan --simulate`: what each epsilon buys, from real runs under the charter that would enforce it.

A point is a cap and a number of rounds. Its noise is calibrated by the filter exactly as drafting a charter does it; it is
run in process, with keys, charter, gates and ledgers, and what it spent is read back from the partners' own ledgers. Under secure
aggregation noise can be in two places, and each point is one of them.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.accounting import odometer
from ..common.charter import adversary_of
from ..common.config import Federation
from ..common.errors import ConfigError, OutputError, Refusal, Refused, RunFailed, counted
from ..common.identity import write_whole
from ..common.placements import placed
from ..common.plan import budget_of, calibrated, events_of, plan_of
from ..common.tasks import load_task
from .baselines import baselines
from .federation import Simulation

__all__ = ["Frontier"]

Told = Callable[[int, int, str], None]


class Frontier:
    """The simulator that `hansa plan --simulate` finds through its entry point."""

    def run(
        self, config: Federation, base: Path, epsilons: list[float], rounds: list[int], seeds: int, told: Told
    ) -> dict[str, Any]:
        """Every cap at every number of rounds with the noise in every place that it can be in, `seeds` runs each, and without privacy.

        Seeds are config.seed, config.seed + 1, ...: other splits, initial models, and fresh noise. The same seeds stand
        behind every point, so points differ by less than their standard deviations suggest.

        Raises:
            ConfigError: nothing would be measured.
            RunFailed: a run did not finish all its rounds; a mean over what did would flatter.
        """
        if config.evaluation.kind == "none":
            raise ConfigError(
                "evaluation: none: a simulation would measure nothing", "Give evaluation kind public or private."
            )
        placements, _ = placed(config)
        plans = [(terms, count, cap) for terms in placements.values() for count in rounds for cap in epsilons]
        total = len(plans) * seeds + len(rounds) * seeds
        done = 0
        metric = ""
        points: list[dict[str, Any]] = []
        for terms, count, cap in plans:
            agreed = _agreed(terms, cap, count)
            point, sigma = _costs(agreed)
            scores: list[dict[str, float]] = []
            for number in range(seeds if sigma is not None else 0):
                told(
                    done,
                    total,
                    f"{terms.privacy.kind} noise, epsilon {cap:g}, {count} rounds, seed {config.seed + number}",
                )
                scores.append(_one(agreed.model_copy(update={"seed": config.seed + number}), base, sigma))
                done += 1
            done += 0 if sigma is not None else seeds
            metric = metric or next((m for m in ("auc", "accuracy") if scores and m in scores[0]), "")
            points.append({**point, **_spread([s[metric] for s in scores if metric in s])})
        without: dict[str, dict[str, Any]] = {}
        for count in rounds:
            found: dict[str, list[float]] = {}
            for number in range(seeds):
                told(done, total, f"no privacy, {count} rounds, seed {config.seed + number}")
                seeded = _agreed(config, None, count).model_copy(update={"seed": config.seed + number})
                told_by = baselines(seeded, base, load_task(config.task), alone=False)
                done += 1
                for key, name in _NAMES.items():
                    if (metric or "auc") in told_by.get(key, {}):
                        found.setdefault(name, []).append(told_by[key][metric or "auc"])
            for name, values in found.items():
                label = name if len(rounds) == 1 else f"{name}, {count} rounds"
                without[label] = {"rounds": count, **_spread(values)}
        return {
            "unit": config.privacy.unit, "adjacency": "add-or-remove-one", "noise_placement": config.privacy.kind,
            "adversary": adversary_of(config),
            "delta": config.privacy.delta, "metric": metric or "auc", "seeds": seeds, "first_seed": config.seed,
            "measured_on": _MEASURED[config.evaluation.kind], "points": points, "without_privacy": without,
        }  # fmt: skip

    def draw(self, report: dict[str, Any], to: Path) -> None:
        """Score over epsilon with intervals of one standard deviation, and lines for no privacy.

        Raises:
            OutputError: the file cannot be written.
        """
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "hansa"  # equal figures, equal files
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7.2, 5.2), layout="constrained")
        measured = [p for p in report["points"] if p["mean"] is not None]
        without = {name: s for name, s in report["without_privacy"].items() if s["mean"] is not None}
        # A number of rounds has one colour and marker for each place of the noise, of which the first is also that without privacy; what
        # is trained has one kind of line.
        counts = sorted({one["rounds"] for one in (*measured, *without.values())})
        adversaries = {p["noise_placement"]: p["adversary"] for p in report["points"]}
        series = [(place, count) for place in adversaries for count in counts]
        legend: list[Any] = []
        for number, (place, count) in enumerate(series):
            colour = f"C{number % 10}"
            mine = [p for p in measured if (p["noise_placement"], p["rounds"]) == (place, count)]
            if mine:
                beside = 1.025 ** (number - (len(series) - 1) / 2)  # so that no bar hides another
                bars = axes.errorbar(
                    [p["epsilon_cap"] * beside for p in mine],
                    [p["mean"] for p in mine],
                    yerr=[p["sd"] or 0.0 for p in mine],
                    marker="osD^vP"[number % 6],
                    capsize=3,
                    color=colour,
                    label=f"{place} noise, {count} rounds",
                )
                legend.append(bars)
            if number >= len(counts):
                continue
            for trained, dashes in zip(_NAMES.values(), (":", "--"), strict=True):
                for name, spread in without.items():
                    if spread["rounds"] == count and name.startswith(trained):
                        label = name.removeprefix("all data ")  # three columns must fit
                        legend.append(axes.axhline(spread["mean"], linestyle=dashes, color=colour, label=label))
        axes.set_xscale("log")
        caps = sorted({p["epsilon_cap"] for p in measured})
        axes.set_xticks(caps, [f"{cap:g}" for cap in caps])
        axes.minorticks_off()
        axes.set_xlabel(
            f"epsilon: cap enforced by the filter (delta {report['delta']:g}, {report.get('unit', 'record')} level, add-or-remove-one, {' or '.join(adversaries)} noise)",
            fontsize=8,
        )
        axes.set_ylabel(f"{report['metric'].upper()}, mean ± sd of {counted(report['seeds'], 'simulated run')}")
        told = "\n".join(
            textwrap.fill(f"{place} noise: against {who}", _TITLE_WIDTH) for place, who in adversaries.items()
        )
        axes.set_title(told, fontsize=8, loc="left")
        axes.grid(alpha=0.25)
        # Below the axes: inside them there is no place that no point, bar or line may need.
        figure.legend(handles=legend, loc="outside lower center", ncols=min(3, len(series)), frameon=False, fontsize=8)
        drawn = io.BytesIO()
        kind = to.suffix.lower().removeprefix(".")
        try:
            figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None, dpi=150)
        except ValueError as err:
            raise OutputError(f"{to}: {err}", "Give --out an ending of .png, .svg or .pdf.") from err
        finally:
            pyplot.close(figure)
        write_whole(to, drawn.getvalue())


_TITLE_WIDTH = 105
_NAMES = {"pooled": "all data pooled, no privacy", "federated_without_privacy": "federated, no privacy"}
_MEASURED = {
    "public": "measured on all partners' public test rows",
    "private": "measured by noisy private histograms, charged to the same budget",
}


def _agreed(config: Federation, cap: float | None, rounds: int) -> Federation:
    """The configuration of one point; with its noise still to be calibrated."""
    evaluation = config.evaluation
    if evaluation.kind == "public":  # costs nothing, so only the last round's score is taken
        evaluation = evaluation.model_copy(update={"every": rounds})
    privacy = config.privacy
    if cap is not None:
        privacy = privacy.model_copy(update={"epsilon": cap, "noise_multiplier": None})
    algorithm = config.algorithm.model_copy(update={"rounds": rounds})
    # Noise is compared with noise: nobody is missing by the chances of a simulated system.
    changed = {"evaluation": evaluation, "privacy": privacy, "algorithm": algorithm, "system": None}
    return config.model_copy(update=changed)


def _costs(agreed: Federation) -> tuple[dict[str, Any], float | None]:
    """What the point costs by filter and odometer, and its noise; a refusal when no noise is enough."""
    privacy = agreed.privacy
    point = {"noise_placement": privacy.kind, "adversary": adversary_of(agreed), "epsilon_cap": privacy.epsilon}
    point |= {"rounds": agreed.algorithm.rounds, "refused": ""}
    try:
        sigma = calibrated(agreed)
    except Refused as err:
        if err.reason is not Refusal.BUDGET:
            raise
        nothing = {"epsilon_filter": None, "epsilon_odometer": None, "noise_multiplier": None}
        return {**point, **nothing, "refused": "no noise is enough"}, None
    assert sigma is not None
    assert privacy.delta is not None
    events = events_of(plan_of(agreed.with_noise(sigma)))
    costs = {
        "epsilon_filter": budget_of(agreed).spent(events),
        "epsilon_odometer": odometer(events, privacy.delta),
        "noise_multiplier": sigma,
    }
    return {**point, **costs}, sigma


def _one(config: Federation, base: Path, sigma: float | None) -> dict[str, float]:
    """Run one point once, in a folder that is thrown away; the scores after its last round."""
    with tempfile.TemporaryDirectory(prefix="hansa-frontier-") as folder:
        simulation = Simulation(config, base, Path(folder) / "run")
        try:
            outcome = simulation.run()
            signed = simulation.signed.charter.privacy.noise_multiplier
            spent = [gate.spent_epsilon() for gate in simulation.gates.values()]
        finally:
            simulation.close()
    last = outcome.history[-1] if outcome.history else None
    if last is None or last["round"] != config.algorithm.rounds or outcome.refusals:
        why = f": {outcome.refusals[0].reason}: {outcome.refusals[0].detail}" if outcome.refusals else ""
        raise RunFailed(
            f"a simulated run at epsilon {config.privacy.epsilon:g} did not finish{why}",
            "Look at one run: hansa simulate CONFIG.yaml",
        )
    cap = config.privacy.epsilon or 0.0
    if signed != sigma or any(e is None or e > cap for e in spent):
        raise RunFailed("a simulated run spent something else than planned", "This is a fault in Hansa.")
    return dict(last["metrics"])


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (None for one run: unknown, not zero) and number of runs."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }
