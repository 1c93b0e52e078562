"""What mutation testing found that no other test of the verifier notices (docs/mutation-testing.md)."""

from __future__ import annotations

import math

import pytest

from hansa.common import accounting
from hansa.common.verifier import Budget, filter_epsilon


def test_a_budget_at_another_cap_keeps_the_parts_of_its_branches() -> None:
    """What a charter's own debits cost is read at its own ε and δ, with the branches of the lineage's budget."""
    budget = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6)
    assert budget.at(1.0, 1e-5) is budget
    for epsilon, delta in ((2.0, 1e-5), (1.0, 1e-3), (8.0, 1e-9)):
        made = budget.at(epsilon, delta)
        assert (made.epsilon, made.delta) == (epsilon, delta)
        assert [order for order, _ in made.orders] == [2, 8, 16]
        assert [share / delta for _, share in made.orders] == pytest.approx([0.1, 0.2, 0.3])
        assert made.gaussian_delta / delta == pytest.approx(0.4)
    tiny = budget.at(1.0, 1e-300)
    assert min(tiny.gaussian_delta, *(share for _, share in tiny.orders)) >= 1e-300


def test_each_branch_of_a_budget_at_another_cap_decides() -> None:
    """Both accountants agree on histories where an order and where the Gaussian branch is the better one."""
    budget = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6).at(3.0, 1e-4)
    other = accounting.Budget(3.0, 1e-4, budget.orders, budget.gaussian_delta)
    for q, sigma, steps in ((1.0, 5.0, 10), (1.0, 1.0, 1), (0.01, 0.8, 1000), (0.1, 1.5, 200), (0.5, 30.0, 5000)):
        spent = other.spent([accounting.PrivacyEvent(q, sigma, steps)])
        assert filter_epsilon(budget, (((q, sigma), steps),)) == pytest.approx(spent, rel=1e-6)  # the filter rounds up
        assert math.isfinite(spent)


@pytest.mark.parametrize("sigma", [1e4, 1e6, 1e9])
def test_what_hardly_differs_costs_hardly_anything(sigma: float) -> None:
    """Where δ covers all of it ε is 0, and noise beyond all measure divides nothing by 0."""
    wide = Budget(1.0, 0.5, ((2, 1e-300), (8, 1e-300)), 0.4)
    assert filter_epsilon(wide, (((1.0, sigma), 1),)) == 0.0
    narrow = Budget(1.0, 1e-5, ((2, 1e-6), (8, 2e-6), (16, 3e-6)), 4e-6)
    other = accounting.Budget(1.0, 1e-5, narrow.orders, narrow.gaussian_delta)
    spent = other.spent([accounting.PrivacyEvent(1.0, sigma, 100)])
    assert filter_epsilon(narrow, (((1.0, sigma), 100),)) == pytest.approx(spent, rel=1e-5, abs=2e-6)
