"""One tree of errors, and exit codes that mean what the docstring says."""

from __future__ import annotations

import inspect

from hansa.common import errors
from hansa.common.errors import HansaError, Refusal, Refused, RunFailed, SchemaViolation, counted


def test_one_tree_and_it_is_drawn() -> None:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert all(issubclass(c, HansaError) for c in found)
    assert errors.__doc__ is not None
    assert all(c.__name__ in errors.__doc__ for c in found)


def test_exit_codes() -> None:
    assert RunFailed("x").exit_code == Refused(Refusal.BUDGET, "x").exit_code == 1
    assert {c("x").exit_code for c in HansaError.__subclasses__() if c not in (RunFailed, Refused)} == {2}


def test_a_hint_is_on_a_line_of_its_own() -> None:
    assert str(HansaError("wrong", "Do this.")) == "wrong\n  Do this."
    assert str(HansaError("wrong")) == "wrong"


def test_a_refusal_names_its_reason() -> None:
    refused = Refused(Refusal.BUDGET, "spent", "Wait.")
    assert str(refused) == "refused: budget: spent\n  Wait."
    assert len({r.value for r in Refusal}) == len(Refusal)


def test_a_schema_violation_shows_twenty_rows() -> None:
    made = SchemaViolation("f.csv", [(i, "age", str(i), "0 to 9") for i in range(25)])
    assert "25 values" in made.message
    assert "and 5 more" in made.message
    assert len(made.rows) == 25


def test_things_are_counted_in_words() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(3, "entry", "entries") == "3 entries"
