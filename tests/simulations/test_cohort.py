"""A cohort is its clients one by one: same batches, same optimiser, same update; and with noise, the same mechanism."""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hansa.clients.datasets import Rows
from hansa.clients.training import LocalSettings, train_locally
from hansa.common.tasks import cross_entropy
from hansa.simulations.cohort import Cohort, Member
from hansa.simulations.layers import Unsupported

SETTINGS = settings(deadline=None, max_examples=4, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class Residual(nn.Module):
    """Code of its own: adds what went round, and uses functions for layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + F.gelu(self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


class Words(nn.Module):
    """Tokens: an embedding, layer normalisation, attention without parameters, a linear layer at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 18)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x.long()))
        mixed = self.mix(x)
        q, k, v = mixed[:, :, :6], mixed[:, :, 6:12], mixed[:, :, 12:]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.ELU(), nn.Linear(4, 3)), (5,)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        ),
        (1, 9, 7),
    ),
    "large conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 16, 5, dilation=2, bias=False), nn.MaxPool2d(3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 5), nn.Sigmoid(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 3),
        ),
        (2, 24, 24),
    ),
    "one channel, strides": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 24, (5, 3), stride=(2, 3), dilation=(1, 2), padding=(2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(3456, 3)
        ),
        (1, 24, 37),
    ),
    "grouped conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)), (4, 5, 5)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(12, 3)),
        (2, 10),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(36, 6), nn.LayerNorm(6), nn.Softplus(),
            nn.Linear(6, 3),
        ),
        (1, 5, 5),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3)), (5,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Hardswish(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(12, 3)), (6, 4)),
    "own code": (Residual, (1, 6, 6)),
    "tokens": (Words, (5,)),
}  # fmt: skip


def smooth_l1(output: Tensor, labels: Tensor) -> Tensor:
    """A loss that has no code of its own here."""
    return F.smooth_l1_loss(output, F.one_hot(labels, 3).to(output.dtype), reduction="none").mean(1)


def rows(n: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    if shape == MODELS["tokens"][1] and dtype == torch.int64:
        x = torch.randint(0, 7, (n, *shape), generator=generator)
    else:
        x = torch.randn(n, *shape, generator=generator, dtype=dtype)
    return Rows(x, torch.randint(0, 3, (n,), generator=generator))


def made(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, tuple[int, ...], torch.dtype]:
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    return build().to(dtype), shape, torch.int64 if name == "tokens" else dtype


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def flat(arrays: dict[str, Any]) -> Tensor:
    return torch.cat([torch.from_numpy(a).reshape(-1) for a in arrays.values()])


def updates(cohort: Cohort, weights: dict[str, Any], members: list[Member]) -> list[dict[str, Any]]:
    start = flat(weights)
    out = torch.empty(len(members), len(start), dtype=start.dtype)
    cohort.train(start, members, out)
    found = []
    for row in out:
        parts = torch.split(row, [w.size for w in weights.values()])
        found.append({n: p.view(w.shape).numpy() for (n, w), p in zip(weights.items(), parts, strict=True)})
    return found


def off(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@given(data=st.data())
@SETTINGS
def test_ten_rounds_of_a_cohort_are_ten_rounds_of_its_clients(name, dtype, bound, data):
    """Every layer, every optimiser, ragged sizes (also empty clients), Poisson and given batches."""
    model, shape, kind = made(name, dtype, data.draw(st.integers(0, 99), "model"))
    optimizer, momentum, lr = data.draw(
        st.sampled_from([("sgd", 0.0, 0.1), ("sgd", 0.9, 0.05), ("adam", 0.0, 0.01)]), "optimizer"
    )
    mu = data.draw(st.sampled_from([0.0, 0.3]), "mu")
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6), "sizes")
    loss = data.draw(st.sampled_from([cross_entropy, smooth_l1]), "loss")
    given_batches = data.draw(st.booleans(), "given batches")
    rate = data.draw(st.sampled_from([1.0, 0.5]), "rate")
    clients = [rows(n, shape, 100 + i, kind) for i, n in enumerate(sizes)]
    # Of Adam in float32 the first step alone: in the next ones other gradients may be rounding alone (see below). float64 has them all.
    most = 1 if optimizer == "adam" and dtype == torch.float32 else 4
    local = LocalSettings(min(2, most), rate, optimizer, lr, momentum=momentum, proximal_mu=mu)
    cohort = Cohort(model, loss, clients[0].x.new_zeros(1, *shape), private=False)
    weights = ours = weights_of(model)
    for number in range(10):
        members = [
            Member(r, local, max(1, len(r)), 1000 * number + i, batches(len(r))[:most] if given_batches else None)
            for i, r in enumerate(clients)
        ]
        # SGD goes its own way for ten rounds. But max-pooling and ReLU amplify what rounding does from round to round, in float32 past
        # the bound also where nothing differs but the order of a sum (tests/bench/simulation measures that).
        if optimizer == "adam" or (name == "large conv2d" and dtype == torch.float32):
            ours = weights
        together = updates(cohort, ours, members)
        apart = [
            train_locally(model, loss, weights, m.rows, local, m.declared_records, seed=m.seed, batches=m.batches)
            for m in members
        ]
        for i, (one, other) in enumerate(zip(together, apart, strict=True)):
            for tensor, expected in other.items():
                assert one[tensor].dtype == expected.dtype
                clear = np.ones(expected.shape, bool)
                if optimizer == "adam":
                    # It divides a gradient by its own size: where that is rounding alone, so is the step, of either.
                    g = gradient(model, loss, weights, members[i])[tensor]
                    clear = np.abs(g) > (1e-2 if dtype == torch.float32 else 1e-3) * np.abs(g).max(initial=0)
                if np.linalg.norm(expected[clear]) > 1e-6:
                    assert off((ours[tensor] + one[tensor])[clear], (weights[tensor] + expected)[clear]) < bound
        ours = {n: ours[n] + sum(u[n] for u in together) / len(together) for n in ours}
        weights = {n: weights[n] + sum(u[n] for u in apart) / len(apart) for n in weights}


def gradient(model: nn.Module, loss: Any, weights: dict[str, Any], member: Member) -> dict[str, Any]:
    """Of the first step, by the sequential path."""
    first = None if member.batches is None else member.batches[:1]
    one = LocalSettings(1, member.settings.sampling_rate, "sgd", 1.0)
    return train_locally(
        model, loss, weights, member.rows, one, member.declared_records, seed=member.seed, batches=first
    )


def batches(n: int) -> list[Any]:
    return [np.arange(at, min(at + 4, n)) for at in range(0, n, 4)]


def test_the_comparison_notices_an_optimiser_that_is_not_the_same(monkeypatch):
    """Negative control: with a momentum of 0.9 taken for 0.8 the updates are off by far more than the bound."""
    model, shape, kind = made("mlp", torch.float32)
    clients = [rows(8, shape, i, kind) for i in range(3)]
    weights = weights_of(model)
    cohort = Cohort(model, cross_entropy, clients[0].x, private=False)
    wrong = LocalSettings(3, 1.0, "sgd", 0.1, momentum=0.8)
    right = LocalSettings(3, 1.0, "sgd", 0.1, momentum=0.9)
    made_ones = updates(cohort, weights, [Member(r, wrong, 8, 0) for r in clients])
    expected = train_locally(model, cross_entropy, weights, clients[0], right, 8, seed=0)
    assert off(flat(made_ones[0]).numpy(), flat(expected).numpy()) > 1e-2


# -- protected work ------------------------------------------------------------------------------------------------------


class Silence:
    """No noise, everybody sampled."""

    def quick_gaussian(self, shape: Any, std: float) -> Any:
        return np.zeros(shape, np.float32)

    def bernoulli(self, n: int, q: float) -> Any:
        return np.ones(n, bool)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "dropout"])
@pytest.mark.parametrize("each", [6, None])
def test_without_its_noise_protected_work_is_clipped_record_by_record(name, each):
    """Against autograd, one record at a time, in float64."""
    model, shape, kind = made(name, torch.float64)
    sizes = [each] * 4 if each else [5, 0, 9, 1]
    clients = [rows(n, shape, 7 + i, kind) for i, n in enumerate(sizes)]
    clip = 0.4
    local = LocalSettings(1, 1.0, "sgd", 1.0, clip_norm=clip, noise_multiplier=1.0)
    cohort = Cohort(model, cross_entropy, clients[0].x.new_zeros(1, *shape), private=True)
    cohort._noise = Silence()
    weights = weights_of(model)
    found = updates(cohort, weights, [Member(r, local, 10, None) for r in clients])
    clipped = 0
    for r, update in zip(clients, found, strict=True):
        total = torch.zeros_like(flat(weights))
        for x, y in zip(r.x, r.y, strict=True):
            parts = torch.autograd.grad(cross_entropy(model(x[None]), y[None]).sum(), list(model.parameters()))
            g = torch.cat([p.reshape(-1) for p in parts])
            clipped += bool(g.norm() > clip)
            total += g * min(1.0, clip / float(g.norm()))
        np.testing.assert_allclose(-10 * flat(update).numpy(), total.numpy(), rtol=1e-9, atol=1e-12)
    assert clipped, "the clip must bind, or nothing is tested"


def test_one_record_moves_a_sum_by_no_more_than_the_clip():
    model, shape, kind = made("conv2d", torch.float32)
    r = rows(9, shape, 1, kind)
    far = 1e6 * r.x[:1]
    huge = Rows(torch.cat([r.x, far]), torch.cat([r.y, model(far).argmin(1)]))  # as wrong as can be
    cohort = Cohort(model, cross_entropy, r.x, private=True)
    cohort._noise = Silence()
    local = LocalSettings(1, 1.0, "sgd", 1.0, clip_norm=0.7, noise_multiplier=1.0)
    weights = weights_of(model)
    without, with_it = (
        flat(u) for u in updates(cohort, weights, [Member(r, local, 1, None), Member(huge, local, 1, None)])
    )
    assert 0.5 < float((with_it - without).norm()) <= 0.7 * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("sizes", [[6, 6], [7, 3]])
def test_a_record_that_is_not_finite_contributes_zero_and_no_other_is_touched(bad, sizes):
    model, shape, kind = made("mlp", torch.float32)
    clients = [rows(n, shape, i, kind) for i, n in enumerate(sizes)]
    cohort = Cohort(model, cross_entropy, clients[0].x, private=True)
    cohort._noise = Silence()
    local = LocalSettings(1, 1.0, "sgd", 1.0, clip_norm=0.7, noise_multiplier=1.0)
    weights = weights_of(model)
    good = updates(cohort, weights, [Member(r, local, 5, None) for r in clients])
    clients[0].x[2] = bad
    without = Rows(
        clients[0].x[[i for i in range(sizes[0]) if i != 2]], clients[0].y[[i for i in range(sizes[0]) if i != 2]]
    )
    expected = updates(cohort, weights, [Member(without, local, 5, None), Member(clients[1], local, 5, None)])
    found = updates(cohort, weights, [Member(r, local, 5, None) for r in clients])
    assert off(flat(found[1]).numpy(), flat(good[1]).numpy()) < 1e-6
    if bad != 1e30:  # finite: it is clipped, not dropped
        assert off(flat(found[0]).numpy(), flat(expected[0]).numpy()) < 1e-6


def noises(cohort: Cohort, members: list[Member], weights: dict[str, Any]) -> Tensor:
    """What is added to each member's sum, in standard deviations."""
    found = torch.stack([flat(u) for u in updates(cohort, weights, members)])
    s = members[0].settings
    assert s.clip_norm is not None
    assert s.noise_multiplier is not None
    return found * -members[0].declared_records * s.sampling_rate / (s.lr * s.noise_multiplier * s.clip_norm)


@pytest.mark.parametrize(("factor", "fine"), [(1.0, True), (0.9, False), (1.1, False)])
def test_noise_has_the_planned_variance_and_another_is_noticed(monkeypatch, factor, fine):
    """Clients without records: what comes is noise. A chi-square of 120,000 values tells 10 % from nothing."""
    model, shape, kind = made("mlp", torch.float32)
    cohort = Cohort(model, cross_entropy, torch.zeros(1, *shape), private=True)
    whole = cohort._noise.quick_gaussian
    monkeypatch.setattr(cohort._noise, "quick_gaussian", lambda shape, std: whole(shape, factor * std))
    local = LocalSettings(1, 0.5, "sgd", 0.3, clip_norm=2.0, noise_multiplier=1.3)
    members = [Member(rows(0, shape, 0, kind), local, 40, None)] * 1200
    z = noises(cohort, members, weights_of(model))
    off_by = abs(float(z.var()) - 1) * (z.numel() / 2) ** 0.5
    assert (off_by < 5) == fine


def test_every_client_and_step_draws_its_own_noise_and_the_control_fails(monkeypatch):
    model, shape, kind = made("linear", torch.float32)
    cohort = Cohort(model, cross_entropy, torch.zeros(1, *shape), private=True)
    local = LocalSettings(1, 0.5, "sgd", 0.3, clip_norm=2.0, noise_multiplier=1.3)
    members = [Member(rows(0, shape, 0, kind), local, 40, 0)] * 40

    def alike() -> float:
        z = torch.cat([noises(cohort, members, weights_of(model)) for _ in range(25)], 1)
        c = torch.corrcoef(z) - torch.eye(len(z))
        return float(c.abs().max()) * z.shape[1] ** 0.5

    assert alike() < 5.5  # the largest of 780 correlations
    same = np.random.default_rng(0).normal(size=(1, 10_000)).astype(np.float32)
    monkeypatch.setattr(
        cohort._noise,
        "quick_gaussian",
        lambda shape, std: np.broadcast_to(same[:, : shape[1]], shape) * np.float32(std),
    )
    assert alike() > 15


def test_batches_of_protected_work_are_poisson_and_no_seed_tells_them():
    model, shape, kind = made("linear", torch.float32)
    cohort = Cohort(model, cross_entropy, torch.zeros(1, *shape), private=True)
    taken: list[int] = []
    drawn = cohort._noise.bernoulli

    def watched(n: int, q: float) -> Any:
        coins = drawn(n, q)
        taken.extend(coins.reshape(20, 30).sum(1).tolist())
        return coins

    cohort._noise.bernoulli = watched
    local = LocalSettings(30, 0.2, "sgd", 0.1, clip_norm=1.0, noise_multiplier=1.0)
    members = [Member(rows(30, shape, i, kind), local, 30, 0) for i in range(20)]
    updates(cohort, weights_of(model), members)
    sizes = np.array(taken)
    assert len(sizes) == 600
    assert abs(sizes.mean() - 6) < 5 * (30 * 0.2 * 0.8 / 600) ** 0.5
    assert 3.4 < sizes.var() < 6.6  # binomial: 4.8; a fixed size would have 0


# -- what cannot be stacked ----------------------------------------------------------------------------------------------


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


class Does(nn.Module):
    """Something with the records, or with what a layer made of them, before the last layer."""

    def __init__(
        self, before: Callable[[Tensor], Any] = lambda x: x, between: Callable[[Tensor], Any] = lambda h: h
    ) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.before, self.between = before, between

    def forward(self, x: Tensor) -> Tensor:
        changed = self.before(x)
        h = self.first(x if changed is None else changed)
        changed = self.between(h)
        return self.head(h if changed is None else changed)


def stated(act: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """As a statement, whose value nobody uses."""

    def statement(x: Tensor) -> None:
        act(x)

    return statement


def hooked(what: str) -> nn.Module:
    model = Does()
    if what == "parameter":
        model.first.weight.register_hook(lambda g: g * 0)
    elif what == "layer":
        model.first.register_forward_hook(lambda module, x, y: y * 2)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what many models have
            torch.nn.utils.weight_norm(model.first)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Mixes(), "differ|at once"),
        # A statement leaves no trace in the values that follow; on records of 0 and 1 it may change nothing.
        (Does(stated(lambda x: x.clamp_(-1, 1))), "clamp_"),
        (Does(between=stated(lambda h: h.clamp_(max=2))), "clamp_"),
        (Does(stated(lambda x: torch.nan_to_num_(x))), "nan_to_num_"),
        (Does(between=stated(lambda h: F.relu(h, inplace=True))), "in place"),
        (Does(between=stated(lambda h: F.relu(h, True))), "in place"),
        (Does(between=stated(lambda h: torch.add(h, 1, out=h))), "in place"),
        (Does(between=stated(lambda h: operator.iadd(h, 1))), "differ"),  # traced as a sum that nobody uses
        # What mixes records shows only where they are not 0 and 1.
        (Does(lambda x: x / x.abs().max()), "differ"),
        (Does(lambda x: x * (x.abs() - 0.5).clamp(min=0.5).mean()), "differ"),
        (Does(lambda x: x + random.random()), "random"),
        (Does(lambda x: x * 2 if torch.rand(()).item() < 0.3 else x), "random"),
        (hooked("parameter"), "parameter 'first.weight' has hooks"),
        (hooked("layer"), "layer 'first' has hooks"),
        (hooked("weight norm"), "layer 'first' has hooks"),
        (Branches(), "traced"),
        (Loose(), "^parameter 'scale' is used outside of a layer"),
        (Does(lambda x: x + torch.randn_like(x)), "^it uses randn_like$"),
        (Does(lambda x: x + torch.ones(5)), "^it makes a tensor of its own$"),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), "buffers|not known"),
        (nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 3)), r"^layer '1' \(PReLU\) is not known"),
        (nn.Sequential(nn.Linear(5, 6), nn.RReLU(), nn.Linear(6, 3)), "RReLU"),
        (nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), "in place"),
    ],
)
def test_what_cannot_be_stacked_is_said(model, why):
    with pytest.raises(Unsupported, match=why):
        Cohort(model, cross_entropy, torch.zeros(1, 5), private=False)


def balanced(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="none") / torch.bincount(labels, minlength=9)[labels]


def focused(output: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(output, labels, reduction="none")
    return each * each.detach().mean()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "loss",
    [balanced, focused, lambda o, y: F.cross_entropy(o, y, reduction="none") / len(y)],
    ids=["classes", "mean", "number"],
)
def test_a_loss_that_mixes_records_is_not_for_many_at_once(loss, private):
    with pytest.raises(Unsupported, match="differ"):
        Cohort(Does(), loss, torch.zeros(1, 5), private=private)


def test_what_a_node_would_refuse_is_not_clipped():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3))
    Cohort(model, cross_entropy, torch.zeros(1, 5), private=False)
    with pytest.raises(Unsupported, match="bias"):
        Cohort(model, cross_entropy, torch.zeros(1, 5), private=True)


def test_an_own_sum_in_place_is_a_sum():
    """`out += identity`, as residual networks have it."""

    class Adds(Does):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h += x
            return self.head(h)

    torch.manual_seed(0)
    model, clients = Adds(), [rows(n, (5,), n, torch.float32) for n in (4, 6)]
    weights, local = weights_of(model), LocalSettings(2, 1.0, "sgd", 0.1)
    cohort = Cohort(model, cross_entropy, clients[0].x, private=False)
    found = updates(cohort, weights, [Member(r, local, 5, 0) for r in clients])
    expected = train_locally(model, cross_entropy, weights, clients[1], local, 5, seed=0)
    assert off(flat(found[1]).numpy(), flat(expected).numpy()) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "norms", "conv1d", "large conv2d"])
@pytest.mark.parametrize("alone", [True, False])
def test_records_none_of_which_is_finite_count_nothing(name, alone):
    """As if nobody had been sampled: the step is its noise, and the client does not fail."""
    model, shape, kind = made(name, torch.float32)
    clients = [rows(4, shape, i, kind) for i in range(1 if alone else 3)]
    for r in clients:
        r.x[:] = float("nan")
    cohort = Cohort(model, cross_entropy, clients[0].x, private=True)
    cohort._noise = Silence()
    local = LocalSettings(2, 1.0, "sgd", 1.0, clip_norm=1.0, noise_multiplier=1.0)
    for update in updates(cohort, weights_of(model), [Member(r, local, 4, None) for r in clients]):
        assert flat(update).norm() == 0


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_a_record_whose_places_nearly_cancel_is_clipped_like_any_other(size):
    """Differences of neighbours: the gradient is a small difference of large products."""

    class Differences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at_each, self.head = nn.Linear(32, 32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.at_each(x)
            return self.head((h[:, 1:] - h[:, :-1]).mean(1))

    torch.manual_seed(0)
    model = Differences()
    weights = weights_of(model)
    r = Rows(torch.randn(1, 4, 32) + size, torch.zeros(1, dtype=torch.int64))
    cohort = Cohort(model, cross_entropy, torch.randn(6, 4, 32), private=True)
    cohort._noise = Silence()
    for clip in (1e-3, 1e-2):
        local = LocalSettings(1, 1.0, "sgd", 1.0, clip_norm=clip, noise_multiplier=1.0)
        (update,) = updates(cohort, weights, [Member(r, local, 1, None)])
        assert abs(float(flat(update).norm()) / clip - 1) < 1e-2


def test_gradients_by_record_are_cut_into_pieces_that_fit(monkeypatch):
    """A convolution keeps each record's gradient; the pieces add up to the same."""
    from hansa.simulations import cohort as module

    model, shape, kind = made("large conv2d", torch.float32)
    clients = [rows(12, shape, i, kind) for i in range(3)]
    cohort = Cohort(model, cross_entropy, clients[0].x, private=True)
    cohort._noise = Silence()
    local = LocalSettings(1, 1.0, "sgd", 1.0, clip_norm=0.5, noise_multiplier=1.0)
    members = [Member(r, local, 12, None) for r in clients]
    whole = updates(cohort, weights_of(model), members)
    monkeypatch.setattr(module, "_PIECE_BYTES", 4 * cohort.program.size * 3 * 5)
    assert list(cohort._pieces([12, 12, 12])) == [slice(0, 5), slice(5, 10), slice(10, 15)]
    for one, other in zip(whole, updates(cohort, weights_of(model), members), strict=True):
        assert off(flat(one).numpy(), flat(other).numpy()) < 1e-5


def test_dropout_is_the_clients_own_however_many_rows_there_are(monkeypatch):
    """Two layers draw from one generator, layer by layer for the whole batch: so a batch is not cut."""
    from hansa.simulations import cohort as module

    monkeypatch.setattr(module, "_PIECE_ROWS", 3)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 3)
    )
    clients = [rows(10, (5,), i, torch.float32) for i in range(2)]
    weights, local = weights_of(model), LocalSettings(2, 1.0, "sgd", 0.1)
    cohort = Cohort(model, cross_entropy, clients[0].x, private=False)
    found = updates(cohort, weights, [Member(r, local, 10, i) for i, r in enumerate(clients)])
    for i, r in enumerate(clients):
        expected = train_locally(model, cross_entropy, weights, r, local, 10, seed=i)
        assert off(flat(found[i]).numpy(), flat(expected).numpy()) < 1e-5


def test_a_layer_that_is_used_twice_is_stacked_without_clipping_only():
    torch.manual_seed(0)
    model = Twice()
    clients = [rows(n, (5,), n, torch.float32) for n in (4, 6)]
    weights, local = weights_of(model), LocalSettings(2, 1.0, "sgd", 0.1)
    found = updates(
        Cohort(model, cross_entropy, clients[0].x, private=False), weights, [Member(r, local, 5, 0) for r in clients]
    )
    expected = train_locally(model, cross_entropy, weights, clients[1], local, 5, seed=0)
    assert off(flat(found[1]).numpy(), flat(expected).numpy()) < 1e-5
    with pytest.raises(Unsupported, match="more than once"):
        Cohort(model, cross_entropy, clients[0].x, private=True)


def test_the_trial_notices_a_backward_that_is_wrong(monkeypatch):
    """Negative control of `compiled`: neither a gradient nor a norm that is off by a hundredth is given out."""
    from hansa.simulations import layers

    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    Cohort(model, cross_entropy, torch.zeros(1, 5), private=True)
    products, norms = layers._add_products, layers._squared_norms
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_add_products", lambda groups, dy, x, into: products(groups, 1.01 * dy, x, into))
        with pytest.raises(Unsupported, match="differ"):
            Cohort(model, cross_entropy, torch.zeros(1, 5), private=False)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_squared_norms", lambda *of: 1.02 * norms(*of))
        Cohort(model, cross_entropy, torch.zeros(1, 5), private=False)
        with pytest.raises(Unsupported, match="differ"):
            Cohort(model, cross_entropy, torch.zeros(1, 5), private=True)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("sizes", [[6, 4, 0, 5], [3, 9, 2, 0]])
def test_a_bad_first_record_is_its_own_clients_alone(private, sizes):
    """Where rows are filled up to equal numbers, nobody's filling is somebody else's record."""
    model, shape, kind = made("mlp", torch.float32)
    clients = [rows(n, shape, i, kind) for i, n in enumerate(sizes)]
    cohort = Cohort(model, cross_entropy, clients[0].x, private=private)
    cohort._noise = Silence()
    terms = {"clip_norm": 0.7, "noise_multiplier": 1.0} if private else {}
    local = LocalSettings(2, 1.0, "sgd", 1.0, **terms)
    weights = weights_of(model)
    good = updates(cohort, weights, [Member(r, local, 5, 0) for r in clients])
    clients[0].x[0] = float("nan")
    found = updates(cohort, weights, [Member(r, local, 5, 0) for r in clients])
    for one, other in zip(found[1:], good[1:], strict=True):
        if private:  # filled up to another number of rows, now that one is left out
            assert off(flat(one).numpy() + 1, flat(other).numpy() + 1) < 1e-6
        else:
            assert np.array_equal(flat(one).numpy(), flat(other).numpy())
    if private:  # what is not finite counts zero
        without = Rows(clients[0].x[1:], clients[0].y[1:])
        expected = updates(cohort, weights, [Member(r, local, 5, 0) for r in (without, *clients[1:])])
        assert off(flat(found[0]).numpy(), flat(expected[0]).numpy()) < 1e-5


def test_a_pass_that_an_error_ended_leaves_nothing_to_the_next(monkeypatch):
    """Views of a chunk are kept, and with them the pass: what had waited for norms in it must not be added later."""
    model, shape, kind = made("mlp", torch.float32)
    clients = [rows(6, shape, i, kind) for i in range(3)]
    cohort = Cohort(model, cross_entropy, clients[0].x, private=True)
    cohort._noise = Silence()
    local = LocalSettings(2, 1.0, "sgd", 1.0, clip_norm=0.5, noise_multiplier=1.0)
    members, weights = [Member(r, local, 6, None) for r in clients], weights_of(model)
    expected = updates(cohort, weights, members)
    first = next(iter(cohort.program.layers.values()))

    def fails(*_: Any) -> Any:
        raise MemoryError  # in the middle of the way back: two layers wait already

    with monkeypatch.context() as patch:
        patch.setattr(first, "backward", fails)
        with pytest.raises(MemoryError):
            updates(cohort, weights, members)
    for one, other in zip(expected, updates(cohort, weights, members), strict=True):
        assert np.array_equal(flat(one).numpy(), flat(other).numpy())
