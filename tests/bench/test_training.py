"""Measured figures; one thread, so that they do not depend on the machine's cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hansa.clients.datasets import Rows
from hansa.clients.training import LocalSettings, train_locally
from hansa.common.noise import SecureNoise

pytestmark = pytest.mark.bench


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best(work: Callable[[], object], repeats: int = 10) -> float:
    """CPU seconds of the fastest run: what the code costs (one thread), not what else the machine was doing."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_noise():
    noise = SecureNoise()
    value_ns = best(lambda: noise.gaussian(1_000_000, 1.0)) / 1e6 * 1e9
    coin_ns = best(lambda: noise.bernoulli(1_000_000, 0.01)) / 1e6 * 1e9
    print(f"\nnoise: {value_ns:.0f} ns a value, {value_ns / 4:.1f} ns a draw (4 draws a value); coin {coin_ns:.1f} ns")
    assert value_ns / 4 < 50  # 32 on a quiet machine


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels, reduction="none")


@pytest.mark.parametrize(
    ("name", "clients", "protection", "limit_s"),
    [
        ("unprotected", 100, {}, 1.0),
        ("protected", 10, {"clip_norm": 1.0, "noise_multiplier": 1.0}, 60.0),
    ],
)
def test_a_thousand_clients_of_100k_parameters_one_step_of_20_rows(name, clients, protection, limit_s):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    size = sum(p.numel() for p in model.parameters())
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    data = Rows(torch.randn(20, 30), torch.randint(0, 2, (20,)))
    settings = LocalSettings(1, 1.0, "sgd", 0.1, **protection)

    def work() -> None:
        for seed in range(clients):
            train_locally(model, loss, weights, data, settings, 20, seed=seed)

    parameters = list(model.parameters())

    def bare() -> None:
        for _ in range(clients):
            torch.autograd.grad(loss(model(data.x), data.y).sum(), parameters)

    seconds, floor = best(work) * 1000 / clients, best(bare) * 1000 / clients
    print(
        f"\n1,000 clients x {size:,} parameters, {name}: {seconds:.2f} s; of these forward and backward {floor:.2f} s"
    )
    assert seconds < limit_s
