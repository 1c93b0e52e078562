"""A short run of every fuzz target with a fixed seed, and every input that ever was a finding. `make fuzz` is the long one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from fuzz.engine import Session, bounded, pool
from fuzz.targets import TARGETS

REGRESSIONS = sorted(Path(__file__).parent.joinpath("regressions").glob("*/*"))
INPUTS = 100
MORE = 300
"""In `make soak`."""
SECONDS = 10.0
LEAST = 20


@pytest.mark.parametrize("name", TARGETS)
def test_examples_are_taken(name: str) -> None:
    """A target whose examples are refused would prove nothing."""
    outcomes = [TARGETS[name].feed(data) for data in TARGETS[name].examples()]
    assert "taken" in outcomes or name in REFUSED
    assert "skipped" not in outcomes


REFUSED = {"records-built"}
"""Nothing that it builds is signed."""


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(MORE, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", list(TARGETS))
def test_nothing_but_a_refusal(name: str, inputs: int) -> None:
    """Some hundred hostile inputs: taken or refused in our own words, within bounds of time and memory."""
    session = Session(TARGETS[name])
    until = time.monotonic() + SECONDS
    with bounded():
        pool(
            session, random.Random(name), lambda count: count >= inputs or (count >= LEAST and time.monotonic() > until)
        )
    assert not session.findings, "\n\n".join(f"{place}\n{words}" for place, (words, _) in session.findings.items())
    assert sum(session.outcomes.values()) >= LEAST
    assert session.outcomes["refused"] + session.outcomes["taken"] > session.outcomes["skipped"] / 3


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}/{path.name}",
        )
        for path in REGRESSIONS
    ],
)
def test_what_was_found_once(path: Path) -> None:
    session = Session(TARGETS[path.parent.name])
    with bounded():
        session.feed(path.read_bytes())
    assert not session.findings, next(iter(session.findings.values()))[0]
