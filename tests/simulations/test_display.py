"""No epsilon on a screen without what it is about: noise placement and adversary are the charter's own."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hansa.common.charter import SignedCharter, adversary
from hansa.simulations.display import Display
from hansa.simulations.result import score_rows
from support import NO_PRIVACY, charter

PRIVACY = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 8.0}
SECURE = {"colluding": 1, "dimension": 8}


def shown(signed: SignedCharter, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, record=True)
    simulation: Any = SimpleNamespace(nodes=dict[str, Any](), gates=dict[str, Any](), signed=signed)
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
