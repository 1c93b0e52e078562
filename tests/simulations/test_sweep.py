"""Sweeps before and beside their runs: what is planned and refused, names of folders, statistics, tables and axes."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from e2e_support import federation, write
from hansa.common.errors import ConfigError, RunFailed
from hansa.simulations import sweep
from hansa.simulations.sweep import csv_of, planned, summarised

FIXED = "{kind: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0, noise_multiplier: 20.0}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "c.yaml", federation())


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_summary_is_numpys(values: list[float]) -> None:
    found = summarised(values)
    assert found["n"] == len(values)
    close = {"rtol": 1e-9, "atol": 1e-6}
    np.testing.assert_allclose(found["median"], np.median(values), **close)
    np.testing.assert_allclose(found["mean"], np.mean(values), **close)
    if len(values) == 1:
        assert (found["low"], found["high"], found["sd"]) == (None, None, None)
        return
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile(values, [10, 90]), **close)
    np.testing.assert_allclose(found["sd"], np.std(values, ddof=1), rtol=1e-6, atol=1e-6)


def test_nothing_has_no_summary() -> None:
    assert summarised([]) == {"n": 0, **dict.fromkeys(("median", "low", "high", "mean", "sd"))}


def test_a_grid_in_the_order_given(config: Path) -> None:
    plan = planned(config, ["privacy.epsilon=2,0.5", "algorithm.rounds=1,3"], 2)
    assert plan.keys == ["privacy.epsilon", "algorithm.rounds"]
    told = [(r.point, r.values["privacy.epsilon"], r.values["algorithm.rounds"], r.config.seed) for r in plan.runs]
    assert told == [
        (0, 2.0, 1, 3), (0, 2.0, 1, 4), (1, 2.0, 3, 3), (1, 2.0, 3, 4),
        (2, 0.5, 1, 3), (2, 0.5, 1, 4), (3, 0.5, 3, 3), (3, 0.5, 3, 4),
    ]  # fmt: skip
    for run in plan.runs:
        values = (run.config.privacy.epsilon, run.config.algorithm.rounds)
        assert values == (run.values["privacy.epsilon"], run.values["algorithm.rounds"])
    assert plan.runs[2].name == "epsilon-2_rounds-3_seed-3"
    assert len({run.name for run in plan.runs}) == 8


def test_several_seeds_are_a_sweep_of_nothing(config: Path) -> None:
    plan = planned(config, [], 3)
    assert [(r.name, r.config.seed, dict(r.values), r.point) for r in plan.runs] == [
        (f"seed-{n}", n, {}, 0) for n in (3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        (["privacy.eps=1"], ["privacy.eps: unknown key", "kind, unit, epsilon, delta", "is here: epsilon"]),
        (["nothing=1"], ["nothing: unknown key", "name, purpose, task, partners"]),
        (["algorithm.rounds.more=1"], ["algorithm.rounds has no keys of its own"]),
        (["partners.lyon.data=x.csv"], ["partners.lyon: unknown key", "cleveland, hungary"]),
        (["privacy.epsilon"], ["no values", "KEY=VALUE"]),
        (["privacy.epsilon="], ["no values"]),
        (["privacy.epsilon=1,,2"], ["not values with commas between them"]),
        (["privacy.epsilon=0.5,-1"], ["with privacy.epsilon=-1, seed=3", "c.yaml:", "greater than 0"]),
        (["privacy.epsilon=one"], ["privacy.epsilon", "valid number", "'one'"]),
        (["algorithm.rounds=1,2.5"], ["algorithm.rounds", "2.5"]),
        (["quorum=2,9"], ["with quorum=9", "quorum 9 is more than the 4 partners"]),
        (["privacy.epsilon=1,1.0"], ["epsilon=1 is there twice"]),
        (["privacy.epsilon=1", "privacy.epsilon=2"], ["privacy.epsilon is swept, too"]),
        (["privacy.kind=local", "privacy.noise=local"], ["privacy.kind is swept, too"]),
        (["privacy={kind: none}", "privacy.epsilon=2"], ["privacy is swept, too"]),
        (["seed=1,2"], ["seeds are not swept", "--seeds N"]),
        (["algorithm.rounds=" + ",".join(map(str, range(1, 6000)))], ["more than 10000 runs"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else None,
)
def test_what_cannot_be_run_is_refused(given_: list[str], words: list[str], config: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(config, given_, 2)
    for word in words:
        assert word in str(refused.value)
    assert "--sweep" in str(refused.value)


def test_every_seed_is_checked(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", federation().replace("seed: 3", f"seed: {2**63 - 2}"))
    planned(config, [], 2)
    with pytest.raises(ConfigError, match=f"seed={2**63}"):
        planned(config, [], 3)


def test_both_an_epsilon_and_the_noise(tmp_path: Path) -> None:
    """Noise is calibrated for each epsilon, unless it is fixed: then a note says what epsilon is."""
    free, fixed = write(tmp_path / "a.yaml", federation()), write(tmp_path / "b.yaml", federation(privacy=FIXED))
    assert planned(free, ["privacy.epsilon=1,2"], 5).notes == []
    (note,) = planned(fixed, ["privacy.epsilon=1,2"], 5).notes
    assert "noise_multiplier is 20" in note
    assert "no more than the cap" in note
    (note,) = planned(free, ["privacy.epsilon=1,2", "privacy.noise_multiplier=20,30"], 5).notes
    assert "noise_multiplier is swept, too" in note
    assert planned(fixed, ["algorithm.rounds=1,2"], 5).notes == []
    assert all(run.config.privacy.noise_multiplier == 20 for run in planned(fixed, ["privacy.epsilon=1,2"], 5).runs)


def test_sections_texts_and_nothing_as_values(config: Path) -> None:
    sections = ["privacy={kind: none},{kind: local, epsilon: 1.0, delta: 1e-4, clip_norm: 1.0}"]
    first, second = planned(config, sections, 1).runs
    assert first.config.privacy.kind == "none"
    assert second.config.privacy.delta == 1e-4
    assert first.values == {"privacy": "{kind: none}"}
    assert first.name.startswith("privacy-kind_none-")
    plan = planned(config, ["algorithm.average_last=null,0.5"], 1)
    assert [run.values["algorithm.average_last"] for run in plan.runs] == [None, 0.5]
    plan = planned(config, ["algorithm.strategy.name=fedavg,fedadam"], 1)
    assert [run.name for run in plan.runs] == ["strategy.name-fedavg_seed-3", "strategy.name-fedadam_seed-3"]


@given(st.dictionaries(st.sampled_from(["a.b", "c.b", "d"]), st.text(max_size=300), min_size=1))
def test_a_folder_is_one_folder(values: dict[str, str]) -> None:
    name = sweep._folder(values, 3)
    assert name == Path(name).name
    assert len(name.encode()) < 200
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_")
    for key, value in values.items():
        assert sweep._folder({**values, key: value + "x"}, 3) != name
    assert sweep._folder(values, 4) != name


def test_the_words_of_a_file_and_of_a_sweep_may_differ(tmp_path: Path) -> None:
    """`privacy.noise` is `privacy.kind`; both in one file would be refused."""
    config = write(
        tmp_path / "c.yaml", federation(privacy="{noise: local, epsilon: 1.0, delta: 1.0e-4, clip_norm: 1.0}")
    )
    for key in ("privacy.kind", "privacy.noise"):
        (run,) = planned(config, [f"{key}=local"], 1).runs
        assert (run.config.privacy.kind, run.values) == ("local", {key: "local"})


def test_a_row_has_the_largest_epsilon_of_any_partner(config: Path) -> None:
    (run,) = planned(config, [], 1).runs
    privacy = {"kind": "local", "noise": "local", "epsilon": 2.0, "delta": 1e-4, "unit": "record", "adjacency": "one"}
    privacy |= {"adversary": "all", "noise_multiplier": 3.0}
    partners = {n: {"epsilon": e, "epsilon_filter": f} for n, e, f in (("a", 0.1, 0.9), ("b", 0.5, 0.7))}
    result: dict[str, Any] = {"privacy": privacy, "partners": partners, "rounds": [1], "final": {}, "refusals": []}
    result["sweep"] = {"verified": True, "folder": "x"}
    row = sweep._row(run, result, 1.0)
    assert (row["epsilon_odometer"], row["epsilon_filter"], row["unbounded"]) == (0.5, 0.9, False)
    partners["a"]["epsilon"] = None
    row = sweep._row(run, result, 1.0)
    assert (row["epsilon_odometer"], row["unbounded"]) == (None, True)


def test_without_a_screen_a_line_every_ten_seconds_says_where_a_sweep_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: now)

    def one(config: Any, out: Path, private: Path, told: sweep.Told) -> Any:
        nonlocal now
        for done in range(1, 31):
            now += 1
            told(done, 30)
        raise RunFailed("that is enough")

    def lines(terminal: bool) -> list[str]:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, record=True)
        plan = planned(config, ["algorithm.rounds=30,20"], 1)
        sweep.Sweep(plan, tmp_path, tmp_path, one, False, "", console).run()
        return [line for line in console.export_text().splitlines() if ", round" in line]

    assert lines(False) == [
        "run 1 of 2, round 10 of 30, about 40 s left",
        "run 1 of 2, round 20 of 30, about 30 s left",
        "run 1 of 2, round 30 of 30, about 20 s left",
        "run 2 of 2, round 10 of 30, about 20 s left",
        "run 2 of 2, round 20 of 30, about 10 s left",
        "run 2 of 2, round 30 of 30, under 1 s left",
    ]
    assert not [line for line in lines(True) if "about 40 s" in line]


@pytest.mark.parametrize(("values", "joined"), [([1, 2], True), (["{name: fedavg}", "{name: fedprox}"], False)])
def test_no_line_joins_words(values: list[Any], joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    spread = {"n": 2, "median": 0.5, "low": 0.4, "high": 0.6}
    report = {
        "swept": ["a.b"], "metrics": ["auc"], "seeds": 2, "privacy": [],
        "points": [{"values": {"a.b": v}, "metrics": {"auc": spread}} for v in values],
        "runs": [{"a.b": v, "metrics": {"auc": 0.5}} for v in values],
    }  # fmt: skip
    sweep.draw(report, tmp_path / "x.png")
    (line,) = figures[0].axes[0].lines
    assert (line.get_linestyle() != "None") is joined
    assert len(line.get_xdata()) == 2


def test_axes() -> None:
    assert sweep._axis([0.5, 8]) == ({0.5: 0.5, 8: 8.0}, True, False)
    assert sweep._axis([1, 10]) == ({1: 1.0, 10: 10.0}, False, False)
    assert sweep._axis([0, 100])[1] is False
    assert sweep._axis(["b", "a"]) == ({"b": 0.0, "a": 1.0}, False, True)
    assert sweep._axis([True, 2]) == ({True: 0.0, 2: 1.0}, False, True)
    assert sweep._axis([None, 0.5]) == ({None: 0.0, 0.5: 1.0}, False, True)


def test_labels_are_legible_and_none_is_like_another() -> None:
    assert sweep._labels([0.5, 8, None, "a$b"]) == {0.5: "0.5", 8: "8", None: "null", "a$b": r"a\$b"}
    start = "{kind: local, epsilon: 1.0, delta: 0.0001, clip_norm: 1.0, noise_multiplier: "
    values = ["{kind: none}", start + "20.0}", start + "30.0}"]
    assert list(sweep._labels(values).values()) == ["{kind: none}", "…20.0}", "…30.0}"]
    far = ["x" * 90 + n for n in "abc"]
    assert len(set(sweep._labels([*far, "{a: " + far[0], "{b: " + far[0], "{a: " + far[1]]).values())) == 6
    assert all(len(label) < 50 for label in sweep._labels(far).values())


def test_a_row_without_privacy_says_inf() -> None:
    row: dict[str, Any] = {"x.y": None, "seed": 1, "metrics": {"auc": 0.1 + 0.2}, "unbounded": True, "verified": False}
    (read,) = csv.DictReader(io.StringIO(csv_of([row], ["x.y"], ["auc", "brier"])))
    assert (float(read["epsilon_odometer"]), float(read["auc"])) == (math.inf, 0.1 + 0.2)
    assert (read["x.y"], read["brier"], read["delta"], read["verified"]) == ("null", "", "", "false")
