"""The noise of a sum of shared rounds, as it comes out of nodes: drawn by the code that trains, masked, summed and opened.

A chi-square test of the variance that the charter planned; it must accept it, and reject a tenth less or more. Rounds, retries and
partners must not share noise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hansa.clients.datasets import Rows
from hansa.clients.training import shared_gradient
from hansa.common.identity import Identity
from hansa.common.secagg import Agreement, Sum, agree, from_ring, mask, new_key, public_key, reveal, to_ring
from hansa.common.shared_noise import SharedGaussian, grid_for

NAMES = ("ada", "ben", "cy", "dee")
SIZE = 400 * 2 + 2
ROUNDS = 40
EVENT = SharedGaussian(1.0, 3.0, 1.0, grid_for(1.0, SIZE), SIZE, 3, 1, 1)
SIGMA = 6.0
"""Of the normal approximation of the tests below: false alarms are about 2 in 10⁹."""


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels, reduction="none")


@pytest.fixture(scope="module")
def noise() -> tuple[np.ndarray, np.ndarray]:
    """Opened sums less the exact ones [ROUNDS, SIZE], and each partner's own noise [partners, ROUNDS, SIZE], in steps of the grid."""
    torch.manual_seed(0)
    model = nn.Linear(400, 2)
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    data = {n: Rows(torch.randn(5, 400) / 20, torch.randint(0, 2, (5,))) for n in NAMES}
    exact = {n: _exact(model, rows) / EVENT.grid for n, rows in data.items()}
    people = {n: Identity.generate(n) for n in NAMES}
    identities = {n: one.key for n, one in people.items()}
    private = {n: new_key() for n in NAMES}
    keys = {n: public_key(private[n]) for n in NAMES}
    sums, own = [], []
    for number in range(1, ROUNDS + 1):
        agreed = Agreement("a" * 64, "run", number, number % 2, "b" * 64, keys, 3, 3, 32, SIZE)
        total, plain = Sum(agreed), []
        for name in NAMES:
            values = shared_gradient(model, loss, weights, data[name], EVENT)
            plain.append(values - exact[name])
            total.add(name, *mask(agreed, people[name], private[name], to_ring(values, 32)), identities[name])
        words = total.words()
        signatures = {n: agree(agreed, people[n], words, identities, None) for n in NAMES}
        opened = total.open(
            {n: reveal(agreed, n, private[n], NAMES, signatures, total.shares(n), identities) for n in NAMES}
        )
        sums.append(from_ring(opened) - sum(exact.values()))
        own.append(plain)
    return np.array(sums), np.array(own).transpose(1, 0, 2)


def _exact(model: nn.Module, rows: Rows) -> np.ndarray:
    """The sum of clipped gradients, record by record."""
    total = np.zeros(SIZE)
    for x, y in zip(rows.x, rows.y, strict=True):
        model.zero_grad()
        loss(model(x[None]), y[None]).sum().backward()
        g = np.concatenate([p.grad.numpy().ravel().astype(np.float64) for p in model.parameters()])
        total += g * min(1.0, EVENT.clip_norm / float(np.linalg.norm(g)))
    model.zero_grad()
    return total


def has_variance(values: np.ndarray, variance: float) -> bool:
    """Whether the variance (about 0) is that, within SIGMA of a chi-square's."""
    ratio = float(np.mean(values**2)) / variance
    return abs(ratio - 1) < SIGMA * math.sqrt(2 / values.size)


def independent(a: np.ndarray, b: np.ndarray) -> bool:
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) < SIGMA / math.sqrt(a.size)


def test_the_sums_noise_has_the_planned_variance(noise: tuple[np.ndarray, np.ndarray]) -> None:
    """σ²C² is that of N_min − t shares; four answered, so there is √(4/2) as much."""
    sums, _ = noise
    planned = (EVENT.noise_multiplier * EVENT.clip_norm / EVENT.grid) ** 2 * EVENT.factor(len(NAMES)) ** 2
    assert planned == pytest.approx(len(NAMES) * EVENT.share_std**2)
    assert has_variance(sums, planned)
    assert not has_variance(sums, planned * 1.1)  # what a tenth less noise would look like
    assert not has_variance(sums, planned / 1.1)
    assert abs(sums.mean()) < SIGMA * math.sqrt(planned / sums.size)


def test_no_partner_lacks_its_share(noise: tuple[np.ndarray, np.ndarray]) -> None:
    _, own = noise
    for mine in own:
        assert has_variance(mine, EVENT.share_std**2)
        assert not has_variance(mine, EVENT.share_std**2 * 1.2)


def test_shares_are_independent_between_rounds_and_partners(noise: tuple[np.ndarray, np.ndarray]) -> None:
    _, own = noise
    for mine in own:
        assert independent(mine[:-1], mine[1:])
    for one, other in ((0, 1), (1, 2), (2, 3), (0, 3)):
        assert independent(own[one], own[other])
    repeated = np.where(np.random.default_rng(0).random(own[0][1:].shape) < 0.1, own[0][:-1], own[0][1:])
    assert not independent(own[0][:-1], repeated)  # the control: one value in ten of the round before
