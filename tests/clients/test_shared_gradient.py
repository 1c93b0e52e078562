"""One partner's part of a step of shared noise: what it is made of, and that no record moves it by more than was charged."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hansa.clients import training
from hansa.clients.datasets import Rows
from hansa.clients.training import FINER, shared_gradient
from hansa.common.errors import ConfigError, MessageError
from hansa.common.noise import SecureNoise
from hansa.common.shared_noise import SharedGaussian, grid_for

SIZE = 5 * 8 + 8 + 8 * 3 + 3


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels, reduction="none")


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def rows(n: int, seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g))


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def event(clip: float = 0.5, **changes: object) -> SharedGaussian:
    made = SharedGaussian(1.0, 4.0, clip, grid_for(clip, SIZE), SIZE, 3, 1, 1)
    return replace(made, **changes)  # type: ignore[arg-type]


def run(data: Rows, agreed: SharedGaussian | None = None) -> np.ndarray:
    model = mlp()
    return shared_gradient(model, loss, weights_of(model), data, agreed or event())


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Noise of zero, with the calls that asked for it; sampling stays real."""
    calls: list[tuple[int, float]] = []

    class Silent(SecureNoise):
        def discrete_gaussian(self, n: int, std: float) -> np.ndarray:
            calls.append((n, std))
            return np.zeros(n, np.int64)

    monkeypatch.setattr(training, "SecureNoise", Silent)
    return calls


def by_hand(data: Rows, clip: float) -> np.ndarray:
    """The sum of clipped gradients, one record after the other, without Opacus; float64 [SIZE]."""
    model = mlp().double()
    total = np.zeros(SIZE)
    for x, y in zip(data.x, data.y, strict=True):
        model.zero_grad()
        loss(model(x[None].double()), y[None]).sum().backward()
        g = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
        total += g * min(1.0, clip / float(np.linalg.norm(g)))
    return total


@pytest.mark.parametrize("clip", [0.05, 0.5, 100.0])
def test_it_is_the_clipped_sum_on_the_grid(silent: list[tuple[int, float]], clip: float) -> None:
    agreed, data = event(clip), rows(30)
    made = run(data, agreed)
    assert made.dtype == np.int64
    # Half a step of the grid, 1/1024 of one a record, and float32's own rounding.
    within = agreed.grid * (0.5 + 30 / FINER) + 1e-6 * 30 * min(clip, 10)
    assert np.abs(made * agreed.grid - by_hand(data, clip)).max() <= within
    assert silent == [(SIZE, agreed.share_std)]


def test_noise_is_drawn_once_a_step_also_where_there_are_no_records(silent: list[tuple[int, float]]) -> None:
    assert not run(rows(0)).any()
    assert not run(rows(9), event(sampling_rate=1e-9)).any()
    assert silent == [(SIZE, event().share_std)] * 2


def test_it_is_noised_by_the_share_that_the_event_says() -> None:
    agreed = event()
    exact = by_hand(rows(6), 0.5) / agreed.grid
    noise = np.concatenate([run(rows(6), agreed) - exact for _ in range(60)])
    assert 0.93 < noise.std() / agreed.share_std < 1.07
    assert abs(noise.mean()) < 6 * agreed.share_std / math.sqrt(noise.size)
    assert not 0.93 < noise.std() / (agreed.share_std * 1.1) < 1.07  # and the test would notice a tenth


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_that_is_not_finite_adds_nothing(silent: list[tuple[int, float]], bad: float) -> None:
    data = rows(10)
    spoiled = Rows(torch.cat([data.x, torch.full((1, 5), bad)]), torch.cat([data.y, torch.tensor([1])]))
    assert (run(spoiled) == run(data)).all()


BY_RECORD = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6),
            min_size=n,
            max_size=n,
        ),
        st.permutations(range(n)),
        st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e3]),
    )
)


@settings(deadline=None, max_examples=200)
@given(BY_RECORD)
def test_a_records_share_is_exact_and_no_longer_than_the_clip(given_values: object) -> None:
    """Whatever else is in the sum, in whatever order and chunks: the same whole numbers, of norm at most C."""
    gradients, order, clip = given_values  # type: ignore[misc]
    step = grid_for(clip, 6) / FINER
    whole = torch.tensor(gradients, dtype=torch.float32)

    def total(some: Tensor) -> np.ndarray:
        made: np.ndarray = training._whole_sum([some[:, :2].clone(), some[:, 2:].clone()], clip, step).numpy()
        return made

    alone = [total(whole[i : i + 1]) for i in range(len(whole))]
    for share in alone:
        assert (share == np.rint(share)).all()
        exact = sum(int(v) ** 2 for v in share)
        assert exact * step**2 <= clip**2
    at = len(whole) // 2
    assert (total(whole) == sum(alone)).all()
    assert (total(whole[list(order)]) == sum(alone)).all()
    if at:
        assert (total(whole[:at]) + total(whole[at:]) == sum(alone)).all()


def test_floats_do_move_a_record_by_the_presence_of_others() -> None:
    """The negative control: what the sum of floats does that the sum of whole numbers does not."""
    torch.manual_seed(0)
    whole = torch.randn(4000, 6)
    one = training._clipped_sum([whole[:1].clone()], 0.3)
    moved = training._clipped_sum([whole.clone()], 0.3) - training._clipped_sum([whole[1:].clone()], 0.3)
    assert bool((one != moved).any())
    step = grid_for(0.3, 6) / FINER
    alone = training._whole_sum([whole[:1].clone()], 0.3, step)
    assert bool(
        (
            alone
            == training._whole_sum([whole.clone()], 0.3, step) - training._whole_sum([whole[1:].clone()], 0.3, step)
        ).all()
    )


def test_another_model_than_was_agreed() -> None:
    with pytest.raises(ConfigError, match=f"the model has {SIZE} parameters, agreed are {SIZE + 1}"):
        run(rows(3), event(dimension=SIZE + 1))
    model = mlp()
    with pytest.raises(MessageError, match="differ in parameter"):
        shared_gradient(model, loss, {"x": np.zeros(1, np.float32)}, rows(3), event())


def test_the_model_keeps_nothing_of_it(silent: list[tuple[int, float]]) -> None:
    model = mlp()
    shared_gradient(model, loss, weights_of(model), rows(4), event())
    assert all(p.grad is None for p in model.parameters())
    assert not [
        name for layer in model.modules() for name in layer.__dict__ if name in ("activations", "max_batch_len")
    ]
