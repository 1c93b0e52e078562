"""No epsilon on a screen without what it is about: noise placement and adversary are the charter's own."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hansa.clients.training import NOT_FINITE
from hansa.common.charter import SignedCharter, adversary
from hansa.server.records import Answer
from hansa.server.rounds import Refusing
from hansa.simulations import display as display_module
from hansa.simulations.display import Display, time_left
from hansa.simulations.result import score_rows
from support import NO_PRIVACY, charter

PRIVACY = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 8.0}
SECURE = {"colluding": 1, "dimension": 8}


def shown(signed: SignedCharter, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, record=True)
    simulation: Any = SimpleNamespace(
        roster=(), nodes=dict[str, Any](), gates=dict[str, Any](), signed=signed, records=None
    )
    display = Display(console)
    with display:
        display.show(simulation)
    return " ".join(console.export_text().split())


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("kind", "colluding"), [("local", None), ("shared", 1)])
def test_epsilons_say_what_they_are_of(kind: str, colluding: int | None, terminal: bool) -> None:
    signed = charter(privacy={**PRIVACY, "kind": kind}, secure_aggregation=SECURE, quorum=3)
    about = f"filter, delta 0.001, record level, add-or-remove-one, {kind} noise, against {adversary(colluding)}"
    assert about in shown(signed, terminal)


@pytest.mark.parametrize("terminal", [False, True])
def test_without_privacy_there_is_no_epsilon_to_explain(terminal: bool) -> None:
    assert "add-or-remove-one" not in shown(charter(privacy=NO_PRIVACY), terminal)


def test_the_table_of_scores_says_where_the_noise_is() -> None:
    for noise in ("local", "shared"):
        privacy = {"kind": noise, "noise": noise, "epsilon": 1.0, "delta": 1e-4}
        (name,) = score_rows({"privacy": privacy, "final": {"auc": 0.9}})
        assert name == f"federated, epsilon 1, delta 0.0001, record level, {noise} noise"


# -- the time left -----------------------------------------------------------------------------------------------------


def told(
    rounds: list[tuple[int, float]], *, apart: float, monkeypatch: pytest.MonkeyPatch, of: int = 20, every: int = 1000
) -> list[str]:
    """The lines of a run without a screen: (round, seconds) each, `apart` seconds one after the other; some are evaluated."""
    console = Console(file=io.StringIO(), width=200, record=True)
    signed = charter(privacy=NO_PRIVACY, algorithm={"rounds": of, "local": {"steps": 1, "optimizer": {"lr": 0.1}}})
    simulation: Any = SimpleNamespace(
        roster=(), nodes=dict[str, Any](), gates=dict[str, Any](), signed=signed, records=None
    )
    now = 0.0
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now)
    display = Display(console)
    with display:
        display.show(simulation)
        for number, seconds in rounds:
            display.notify("round", round=number)
            now += apart
            display.notify("done", round=number, metrics={} if number % every else {"auc": 0.5}, seconds=seconds)
    return [line for line in console.export_text().splitlines() if line]


def test_fast_rounds_have_two_lines_a_second_with_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told([(n, 0.1) for n in range(1, 21)], apart=0.125, monkeypatch=monkeypatch)
    assert [int(line.split()[1]) for line in lines] == [1, 5, 9, 13, 17, 20]
    slow = told([(n, 1.0) for n in range(1, 21)], apart=1.0, monkeypatch=monkeypatch)
    assert len(slow) == 20


def test_no_scores_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told([(n, 0.1) for n in range(1, 21)], apart=0.01, monkeypatch=monkeypatch, every=5)
    assert [int(line.split()[1]) for line in lines] == [1, 5, 10, 15, 20]


def test_a_run_that_stops_shows_its_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told([(n, 0.1) for n in range(1, 4)], apart=0.01, monkeypatch=monkeypatch)
    assert [int(line.split()[1]) for line in lines] == [1, 3]


def test_the_time_left_is_by_the_median_of_the_last_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow start and one slow round count little; a resumed run begins where it is."""
    rounds = [(11, 90.0), (12, 3.0), (13, 2.0), (14, 50.0), (15, 2.0), (16, 2.0), (20, 1.0)]
    lines = told(rounds, apart=1.0, monkeypatch=monkeypatch)
    medians = [(9, 90.0), (8, 46.5), (7, 3.0), (6, 26.5), (5, 3.0), (4, 2.0)]
    assert [line.split(" s, ")[-1] for line in lines[:-1]] == [time_left(left * median) for left, median in medians]
    assert lines[0].startswith("round   11 of 20")
    assert lines[-1].endswith("1.00 s")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_populations_epsilon_is_that_of_no_client_more(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, record=True)
    records: Any = SimpleNamespace(most_spent=lambda: 1.25)
    simulation: Any = SimpleNamespace(roster=(), gates={}, signed=charter(privacy=NO_PRIVACY), records=records)
    with (display := Display(console)):
        display.show(simulation)
        display.notify("done", round=1, metrics={}, seconds=2.0)
    assert ("epsilon spent 1.250 (filter, no client more)", "epsilon spent (filter): 1.250, no client more")[
        terminal
    ] in console.export_text()


def test_the_screen_has_the_time_left_too() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True)
    signed = charter(privacy=NO_PRIVACY, algorithm={"rounds": 9, "local": {"steps": 1, "optimizer": {"lr": 0.1}}})
    simulation: Any = SimpleNamespace(
        roster=(), nodes=dict[str, Any](), gates=dict[str, Any](), signed=signed, records=None
    )
    with (display := Display(console)):
        display.show(simulation)
        for number in (1, 2):
            display.notify("done", round=number, metrics={}, seconds=2.0)
    assert "round 2 of 9   2.00 s a round   about 14 s left" in console.export_text()


def test_what_went_wrong_with_many_is_one_line() -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    simulation: Any = SimpleNamespace(roster=(), nodes=dict[str, Any](), gates=dict[str, Any](), signed=charter())
    display = Display(console, quiet=True)
    display.show(simulation)

    def exchange(kind: str, refused: int, failed: int) -> None:
        for n in range(9):
            if n < refused:  # in whatever way: at the client, or where its update is read
                wrong = ("refused: model", NOT_FINITE) if n else ("invalid", f"{NOT_FINITE}, or its norm is too large")
            else:
                wrong = ("failed", "why") if n < refused + failed else ("ok", "")
            answer = Answer("", wrong[0], None, wrong[1])
            display.notify("answer", partner=f"client-{n}", round=1, kind=kind, answer=answer)
        for n in range(1, refused):
            display.notify("refused", refusal=Refusing(f"client-{n}", "r", 1, "model", NOT_FINITE))

    with display:
        display.notify("round", round=1)
        exchange("train", 9, 0)
        exchange("evaluate", 0, 2)
        display.notify("done", round=1, metrics={}, seconds=1.0)
        display.notify("round", round=2)
        exchange("train", 0, 6)  # and the run ends there
    assert console.export_text().splitlines() == [
        "9 of 9 clients: their updates are not finite: the training diverges; lower the learning rate or the number of steps",
        "client-0, client-1: failed: why",
        "6 of 9 clients: failed: why",
    ]


def test_times_in_words() -> None:
    assert [time_left(s) for s in (0.2, 45.4, 99, 100, 5990, 7200)] == [
        "under 1 s left", "about 45 s left", "about 99 s left", "about 2 min left", "about 100 min left", "about 2.0 h left",
    ]  # fmt: skip
