"""`hansa plan --simulate`: points that a charter would enforce, scores of real runs, honest about seeds."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_support import call, federation, write
from hansa.common import plan_cli
from hansa.common.charter import adversary
from hansa.common.config import Federation, load_config
from hansa.common.errors import ConfigError, RunFailed
from hansa.common.plan import calibrated
from hansa.common.tasks import initial_model, load_task
from hansa.simulations import baselines, frontier
from hansa.simulations.federation import parts_of
from hansa.simulations.frontier import Frontier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("frontier") / "c.yaml", federation(rounds=2))


@pytest.fixture(scope="module")
def report(config: Path) -> dict[str, Any]:
    done = call(
        "plan", config, "--simulate", "--epsilons", "8,0.5", "--rounds", "1,2", "--seeds", "2", "--format", "json"
    ).expect(0)
    assert done.err == ""
    return done.json()["frontier"]


def test_every_point_is_what_a_charter_would_enforce(report: dict[str, Any], config: Path) -> None:
    loaded = load_config(config)
    assert [(p["rounds"], p["epsilon_cap"]) for p in report["points"]] == [(1, 0.5), (1, 8.0), (2, 0.5), (2, 8.0)]
    for p in report["points"]:
        privacy = loaded.privacy.model_copy(update={"epsilon": p["epsilon_cap"]})
        algorithm = loaded.algorithm.model_copy(update={"rounds": p["rounds"]})
        assert p["noise_multiplier"] == calibrated(
            loaded.model_copy(update={"privacy": privacy, "algorithm": algorithm})
        )
        assert p["noise_placement"] == "local"
        assert p["epsilon_odometer"] <= p["epsilon_filter"] <= p["epsilon_cap"]
        assert 0.4 < p["mean"] < 1
        assert (p["n"], p["refused"]) == (2, "")
        assert p["sd"] > 0
    assert {"unit", "adjacency", "delta", "adversary", "noise_placement"} <= set(report)
    assert set(report["without_privacy"]) == {
        f"{who}, no privacy, {n} rounds" for who in ("all data pooled", "federated") for n in (1, 2)
    }


def test_one_run_has_no_standard_deviation() -> None:
    assert frontier._spread([0.5]) == {"mean": 0.5, "sd": None, "n": 1}
    assert frontier._spread([]) == {"mean": None, "sd": None, "n": 0}
    assert frontier._spread([0.4, 0.6])["sd"] == statistics.stdev([0.4, 0.6])


def test_a_cap_that_no_noise_meets_is_a_row_that_says_so(config: Path) -> None:
    found = Frontier().run(load_config(config), config.parent, [1e-7], [2], 1, lambda *_: None)
    assert [(p["refused"], p["mean"], p["n"]) for p in found["points"]] == [("no noise is enough", None, 0)]
    assert found["without_privacy"]


def test_a_run_that_spends_something_else_is_no_point(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "_costs", lambda agreed: ({"epsilon_cap": 1.0, "rounds": 2, "refused": ""}, 3.0))
    with pytest.raises(RunFailed, match="something else than planned"):
        Frontier().run(load_config(config), config.parent, [1.0], [2], 1, lambda *_: None)


def test_nothing_is_simulated_that_would_not_be_measured(config: Path) -> None:
    loaded = load_config(config)
    blind = loaded.model_copy(update={"evaluation": loaded.evaluation.model_copy(update={"kind": "none"})})
    with pytest.raises(ConfigError, match="measure nothing"):
        Frontier().run(blind, config.parent, [1.0], [2], 1, lambda *_: None)


@pytest.mark.parametrize("ending", ["png", "svg", "csv"])
def test_the_frontier_is_written(config: Path, ending: str, tmp_path: Path) -> None:
    to = tmp_path / f"f.{ending}"
    done = call("plan", config, "--simulate", "--epsilons", "1", "--seeds", "1", "--out", to).expect(0)
    done.says(
        "Record level, add-or-remove-one, local noise, delta 0.0001; adversary: everyone but", "fewer than 5 seeds"
    )
    data = to.read_bytes()
    if ending == "csv":
        rows = list(csv.DictReader(to.open()))
        assert [r["setting"] for r in rows] == ["federated", "all data pooled, no privacy", "federated, no privacy"]
        assert (rows[0]["unit"], rows[0]["adjacency"], rows[1]["epsilon_cap"]) == ("record", "add-or-remove-one", "inf")
    else:
        assert data.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_every_line_of_the_plot_is_told_apart_and_nothing_lies_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (seen.append(figure), save(figure, *a, **k))[1])
    counts, caps = (5, 10, 20), (0.5, 1.0, 2.0)
    point = {"noise_placement": "local", "adversary": adversary(None)}
    points = [{**point, "rounds": n, "epsilon_cap": c, "mean": 0.8 + c / 20, "sd": 0.03} for n in counts for c in caps]
    names = [f"{who}, no privacy, {n} rounds" for who in ("all data pooled", "federated") for n in counts]
    without = {name: {"rounds": int(name.split()[-2]), "mean": 0.9} for name in names}
    stated = {"delta": 1e-4, "metric": "auc", "seeds": 5}
    shown = [name.removeprefix("all data ") for name in names]
    Frontier().draw({"points": points, "without_privacy": without, **stated}, tmp_path / "f.png")
    (figure,) = seen
    (axes,), (legend,) = figure.axes, figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {*shown, *(f"local noise, {n} rounds" for n in counts)}
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in shown}
    looks = {name: (to_hex(line.get_color()), line.get_linestyle()) for name, line in lines.items()}
    assert len(set(looks.values())) == len(names) == 6
    bars = {one.get_label(): to_hex(one.lines[0].get_color()) for one in axes.containers}
    for n in counts:  # one colour a number of rounds
        assert {bars[f"local noise, {n} rounds"]} == {look[0] for name, look in looks.items() if f" {n} rounds" in name}
    assert len({x for one in axes.containers for x in one.lines[0].get_xdata()}) == len(points), "no bar hides another"
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_window_extent())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize("name", ["folder.png", "x" * 300 + ".png"])
def test_where_it_cannot_be_written_nothing_is_simulated(
    config: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(Frontier, "run", lambda *_: pytest.fail("simulated"))
    call("plan", config, "--simulate", "--out", tmp_path / name).expect(2).says("hansa: ", name)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "f.png"], "Add --simulate"),
        (["--simulate", "--out", "f.txt"], ".csv"),
        (["--simulate", "--out", "nowhere/f.png"], "no such folder"),
        (["--simulate", "--epsilons", "1,x"], "'x' is no number"),
        (["--simulate", "--epsilons", "0"], "above 0"),
        (["--simulate", "--epsilons", "nan"], "above 0"),
        (["--simulate", "--rounds", "0"], "whole number from 1"),
        (["--simulate", "--ledger", "l.jsonl"], "unspent budget"),
    ],
)
def test_options_that_make_no_sense(config: Path, options: list[str], words: str) -> None:
    call("plan", config, *options).expect(2).says(words)


def test_no_privacy_has_no_frontier(tmp_path: Path) -> None:
    bare = write(tmp_path / "c.yaml", federation(privacy=None))
    call("plan", bare, "--simulate").expect(2).says("epsilon is unbounded")


def test_without_the_training_packages_it_says_what_to_install(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(plan_cli, "find_simulator", missing)
    call("plan", config, "--simulate").expect(2).says("torch is not installed", "pip install 'hansa[train]'")
    monkeypatch.setattr(plan_cli, "find_simulator", lambda: Frontier())
    monkeypatch.setattr(Frontier, "draw", missing)
    assert json.dumps({})  # nothing else is needed for the table
    call("plan", config, "--simulate", "--epsilons", "1", "--seeds", "1", "--out", "f.png").expect(2).says(
        "hansa[train]"
    )


# -- both places of the noise ----------------------------------------------------------------------------------------------

SECURE = "secure_aggregation: {colluding: 0, retries: 1}\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = federation(
        rounds=3,
        steps=1,
        strategy="{name: fedavgm, server_momentum: 0.9}",
        privacy="{noise: shared, epsilon: 4.0, delta: 1.0e-4, clip_norm: 1.0}",
        more=SECURE,
    )
    text = text.replace("quorum: 2", "quorum: 4").replace("rounds: 3", "rounds: 3\n  average_last: 0.5")
    return write(tmp_path_factory.mktemp("shared") / "c.yaml", text)


def test_both_placements_are_simulated_and_compared(shared: Path, tmp_path: Path) -> None:
    to = tmp_path / "f.csv"
    done = call(
        "plan", shared, "--simulate", "--epsilons", "4", "--seeds", "1", "--out", to, "--format", "json"
    ).expect(0)
    told = done.json()
    points = told["frontier"]["points"]
    assert [(p["noise_placement"], p["epsilon_cap"], p["n"]) for p in points] == [("shared", 4.0, 1), ("local", 4.0, 1)]
    assert [p["adversary"] for p in points] == [adversary(0), adversary(None)]
    for point, row in zip(points, told["placements"]["rows"], strict=True):
        assert row["noise"] == point["noise_placement"]
        assert row["noise_multiplier"] == point["noise_multiplier"]
        assert row["epsilon_filter"] == point["epsilon_filter"] <= 4
        assert row["score"] == {"mean": point["mean"], "sd": None, "n": 1}
    assert set(told["frontier"]["without_privacy"]) == {"all data pooled, no privacy", "federated, no privacy"}
    rows = list(csv.DictReader(to.open()))
    assert [(r["setting"], r["noise_placement"]) for r in rows] == [
        ("federated", "shared"), ("federated", "local"), ("all data pooled, no privacy", "none"), ("federated, no privacy", "none"),
    ]  # fmt: skip
    assert [r["adversary"] for r in rows[:2]] == [adversary(0), adversary(None)]


def test_what_is_shown_of_both_placements(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, float]] = []

    def one(config: Federation, *_: object) -> dict[str, float]:
        assert config.privacy.epsilon is not None
        ran.append((config.privacy.kind, config.privacy.epsilon))
        return {"auc": 0.9 if config.privacy.kind == "shared" else 0.8}

    monkeypatch.setattr(frontier, "_one", one)
    monkeypatch.setattr(frontier, "baselines", lambda *_, **__: {})
    shown = call("plan", shared, "--simulate", "--seeds", "2").expect(0)
    shown.says(
        "simulating 12 points x 2 seeds", "shared and local noise, delta 0.0001; shared noise: the coordinator alone",
        "federated, shared", "federated, local", "local noise: everyone but the partner itself", "0.9000 ± 0.0000", "0.8000 ± 0.0000",
    )  # fmt: skip
    assert {cap for kind, cap in ran if kind == "shared"} == {cap for kind, cap in ran if kind == "local"}
    # At a cap that is not among those which were asked for, nothing is made up.
    call("plan", shared, "--simulate", "--seeds", "1", "--epsilons", "1").expect(0).says("not simulated")
    # The configuration's own cap is always among the default ones.
    own = write(shared.with_name("own.yaml"), shared.read_text().replace("epsilon: 4.0", "epsilon: 3.5"))
    call("plan", own, "--simulate", "--seeds", "1").expect(0).says("simulating 14 points")


def test_both_placements_in_one_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    seen: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (seen.append(figure), save(figure, *a, **k))[1])
    against = {"shared": adversary(0), "local": adversary(None)}
    points = [
        {"noise_placement": kind, "adversary": who, "rounds": n, "epsilon_cap": c, "mean": 0.8 + c / 20, "sd": 0.03}
        for kind, who in against.items() for n in (30, 60) for c in (0.5, 1.0, 2.0)
    ]  # fmt: skip
    without = {f"federated, no privacy, {n} rounds": {"rounds": n, "mean": 0.9} for n in (30, 60)}
    stated = {"delta": 1e-4, "metric": "auc", "seeds": 5}
    Frontier().draw({"points": points, "without_privacy": without, **stated}, tmp_path / "f.png")
    (figure,) = seen
    (axes,) = figure.axes
    bars = {one.get_label(): one.lines[0] for one in axes.containers}
    assert set(bars) == {f"{kind} noise, {n} rounds" for kind in against for n in (30, 60)}
    assert len({to_hex(line.get_color()) for line in bars.values()}) == 4
    assert len({line.get_marker() for line in bars.values()}) == 4
    assert len({x for line in bars.values() for x in line.get_xdata()}) == len(points), "no bar hides another"
    lines = {line.get_label(): to_hex(line.get_color()) for line in axes.lines if line.get_label() in without}
    assert lines == {
        f"federated, no privacy, {n} rounds": to_hex(bars[f"shared noise, {n} rounds"].get_color()) for n in (30, 60)
    }
    FigureCanvasAgg(figure).draw()  # it was saved with more dots an inch
    title = axes.get_title(loc="left")
    for kind, who in against.items():
        assert f"{kind} noise: against {who}" in " ".join(title.split())
    for part in (axes._left_title, axes.xaxis.label, *figure.legends):
        box = part.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height


def test_the_pooled_baseline_is_the_same_algorithm_in_the_clear(shared: Path) -> None:
    """One gradient step a round, the server's momentum, and the mean of the last half: by hand, in float64."""
    config = load_config(shared)
    task = load_task(config.task)
    (rows, *more) = [part.source().train for part in parts_of(config, Path(), task).values()]
    assert more
    model = initial_model(task, 3).double()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
    iterates = []
    for _ in range(3):
        wanted = {n: w.requires_grad_() for n, w in weights.items()}
        loss = task.loss(torch.func.functional_call(model, wanted, rows.x.double()), rows.y).mean()
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            momentum[name] = 0.9 * momentum[name] + 0.2 * gradient  # torch's, and Flower's
            weights[name] = (wanted[name] - momentum[name]).detach()
        iterates.append(dict(weights))
    found = baselines._trained(config, task, initial_model(task, 3), rows)
    for name, value in found.items():
        expected = (iterates[1][name] + iterates[2][name]) / 2  # of three rounds the last 1.5 are two
        assert value == pytest.approx(expected.detach().numpy(), abs=1e-5), name


def test_without_privacy_no_mask_is_needed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Federation] = []
    real = baselines.Simulation
    monkeypatch.setattr(baselines, "Simulation", lambda config, *a: (seen.append(config), real(config, *a))[1])
    config = load_config(shared)
    found = baselines.baselines(config, shared.parent, load_task(config.task), alone=False)
    (ran,) = seen
    assert (ran.privacy.kind, ran.secure_aggregation, ran.algorithm) == ("none", None, config.algorithm)
    # Every hospital's gradient has its weight, so it is what training on all of them is, up to rounded sizes.
    assert found["federated_without_privacy"]["auc"] == pytest.approx(found["pooled"]["auc"], abs=0.02)
