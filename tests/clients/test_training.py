from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hansa.clients import training
from hansa.clients.datasets import Rows
from hansa.clients.training import Descent, LocalSettings, check_records_apart, train_locally
from hansa.common.errors import ConfigError, MessageError, Refusal, Refused, TaskError
from hansa.common.noise import SecureNoise
from hansa.common.tasks import Task, check_layers, check_model
from hansa.common.tasks.schema import ArraySchema


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels, reduction="none")


def mlp(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *extra, nn.Linear(8, 3))


def rows(n: int, seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g))


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad}


def plain(**changes: object) -> LocalSettings:
    return LocalSettings(**{"steps": 1, "sampling_rate": 1.0, "optimizer": "sgd", "lr": 0.1} | changes)


def private(**changes: object) -> LocalSettings:
    return plain(**{"clip_norm": 1.0, "noise_multiplier": 1.0} | changes)


def flat(update: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in update.values()]).astype(np.float64)


def run(settings: LocalSettings, data: Rows, declared: int = 20, model: nn.Module | None = None, **more: object):
    model = model or mlp()
    start = more.pop("weights", None) or weights_of(model)
    return flat(train_locally(model, loss, start, data, settings, declared, **{"seed": 1} | more))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, float]]:
    """Noise of zero, with the calls that asked for it; sampling stays real."""
    calls: list[tuple[object, float]] = []

    class Silent(SecureNoise):
        def gaussian(self, shape, std):
            calls.append((shape, std))
            return np.zeros(shape)

    monkeypatch.setattr(training, "SecureNoise", Silent)
    return calls


def gradients_by_hand(data: Rows, model: nn.Module) -> np.ndarray:
    """One backward pass a record: [n, parameters], float64."""
    model = model.double()
    out = []
    for x, y in zip(data.x.double(), data.y, strict=True):
        grads = torch.autograd.grad(loss(model(x[None]), y[None]).sum(), list(model.parameters()))
        out.append(torch.cat([g.flatten() for g in grads]).numpy())
    return np.array(out)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": 0.5, "optimizer": "adam"}, "momentum"),
        ({"proximal_mu": -1.0}, "proximal_mu"),
        ({"clip_norm": 0.0, "noise_multiplier": 1.0}, "clip_norm"),
        ({"clip_norm": 1.0}, "noise_multiplier"),
        ({"noise_multiplier": 1.0}, "noise_multiplier"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, word):
    with pytest.raises(ConfigError, match=f"^{word} is "):
        plain(**changes)


def test_event_is_made_of_the_settings_that_train():
    event = private(steps=7, sampling_rate=0.25, noise_multiplier=1.5).event
    assert event is not None
    assert (event.sampling_rate, event.noise_multiplier, event.steps) == (0.25, 1.5, 7)
    assert plain().event is None


def test_too_little_noise_is_refused_before_data_are_read():
    class Unreadable:
        def __getattr__(self, name: str) -> object:
            pytest.fail(f"data were read: {name}")

    with pytest.raises(Refused) as refusal:
        run(private(noise_multiplier=0.29), Unreadable())  # type: ignore[arg-type]
    assert refusal.value.reason is Refusal.NOISE


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("adam", 0.0)])
def test_steps_taken_noise_drawn_and_event_agree(silent, monkeypatch, optimizer, momentum):
    settings = private(
        steps=5,
        sampling_rate=0.4,
        noise_multiplier=0.7,
        clip_norm=2.0,
        optimizer=optimizer,
        momentum=momentum,
    )
    taken = []
    step = Descent.step
    monkeypatch.setattr(Descent, "step", lambda self, *given: (taken.append(1), step(self, *given))[1])
    run(settings, rows(20))
    event = settings.event
    assert event is not None
    assert len(taken) == event.steps == 5
    assert silent == [(sum(p.numel() for p in mlp().parameters()), 0.7 * 2.0)] * event.steps


# ------------------------------------------------------------------------------------- clipping, sanitising


@pytest.mark.parametrize("clip", [0.01, 0.5, 5.0])
def test_update_is_the_clipped_sum_over_the_declared_size(silent, clip):
    data = rows(12)
    each = gradients_by_hand(data, mlp())
    norms = np.linalg.norm(each, axis=1)
    expected = (each * np.minimum(1, clip / norms)[:, None]).sum(0)
    update = run(private(clip_norm=clip, lr=1.0), data, declared=100)
    np.testing.assert_allclose(update, -expected / 100, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e18, 1e30])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(silent, scale):
    data, clip, declared = rows(9), 0.5, 10
    x = data.x.clone()
    x[4] *= scale
    all_in = run(private(clip_norm=clip, lr=1.0), Rows(x, data.y), declared)
    keep = torch.arange(9) != 4
    without = run(private(clip_norm=clip, lr=1.0), Rows(x[keep], data.y[keep]), declared)
    moved = np.linalg.norm((all_in - without) * declared)
    # float32 weights of size ~0.4 round the update to 3e-8, times 10, over ~9 of 75 coordinates
    assert moved <= clip + 1e-5


def test_clip_bound_holds_to_rounding_of_float64():
    g = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1.0, 1e12, 1e30):
        gradient = [torch.randn(1, 300, 300, generator=g) * scale, torch.randn(1, 7, generator=g) * scale]
        norm = float(training._clipped_sum(gradient, 0.7).norm())
        assert norm <= 0.7 * (1 + 1e-12)
        if scale > 1e-3:  # clipped, not merely shrunk
            assert norm == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_with_nonfinite_gradient_contributes_exactly_zero(silent, bad):
    data = rows(10)
    x = data.x.clone()
    x[6] = bad
    x[6, 0] = -bad  # inf − inf inside the first layer
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    start = weights_of(model)
    keep = torch.arange(10) != 6
    with_bad = run(private(), Rows(x, data.y), model=model, weights=start)
    without = run(private(), Rows(x[keep], data.y[keep]), model=model, weights=start)
    assert np.isfinite(with_bad).all()
    np.testing.assert_allclose(with_bad, without, atol=1e-7)
    assert np.abs(without).max() > 1e-3


def test_a_gradient_that_is_partly_nan_is_dropped_whole():
    g = [torch.ones(3, 4), torch.ones(3, 2)]
    g[0][1, 2] = math.nan
    g[1][2, 0] = math.inf
    assert torch.equal(training._clipped_sum(g, 100.0), torch.ones(6, dtype=torch.float64))
    huge = [torch.full((2, 4), 3e38)]  # finite; its float32 norm is not
    assert float(training._clipped_sum(huge, 1.0).norm()) == pytest.approx(2.0, rel=1e-12)


def test_divisor_is_the_declared_size_whatever_the_real_one(silent):
    few, many = rows(6), rows(6)
    twice = Rows(torch.cat([many.x, many.x]), torch.cat([many.y, many.y]))
    once = run(private(clip_norm=1e3), few, declared=10)
    doubled = run(private(clip_norm=1e3), twice, declared=10)
    np.testing.assert_allclose(doubled, 2 * once, atol=1e-7)
    np.testing.assert_allclose(run(private(clip_norm=1e3), few, declared=5), 2 * once, atol=1e-7)
    doubled_plain, once_plain = run(plain(), twice, declared=10), run(plain(), few, declared=10)
    np.testing.assert_allclose(doubled_plain, 2 * once_plain, atol=1e-7)


def test_divisor_contains_the_sampling_rate(silent, monkeypatch):
    monkeypatch.setattr(training.SecureNoise, "bernoulli", lambda self, n, q: np.arange(n) < 5)
    data = rows(10)
    half = run(private(sampling_rate=0.5), data)
    first_five = run(private(), Rows(data.x[:5], data.y[:5]))
    np.testing.assert_allclose(half, 2 * first_five, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_add_up_to_the_whole_batch_and_noise_comes_once(silent, monkeypatch, chunk):
    data = rows(17)
    whole = run(private(clip_norm=0.3), data)
    silent.clear()
    monkeypatch.setattr(training, "_CHUNK_ROWS", chunk)
    np.testing.assert_allclose(run(private(clip_norm=0.3), data), whole, atol=1e-7)
    assert len(silent) == 1


def test_chunks_respect_the_memory_bound(silent, monkeypatch):
    seen = []
    original = training._clipped_sum

    def spy(by_record, clip):
        seen.append(sum(g.numel() * 12 for g in by_record))
        return original(by_record, clip)

    monkeypatch.setattr(training, "_clipped_sum", spy)
    monkeypatch.setattr(training, "_CHUNK_BYTES", 4000)
    run(private(), rows(17))
    assert len(seen) > 3
    assert max(seen) <= 4000


# ------------------------------------------------------------------------------------------------ noise


def test_noise_has_the_stated_scale_after_division():
    model = nn.Linear(200, 100)
    nothing = Rows(torch.zeros(0, 200), torch.zeros(0, dtype=torch.int64))
    settings = private(noise_multiplier=0.8, clip_norm=2.5, lr=0.5, sampling_rate=0.25)
    update = run(settings, nothing, declared=40, model=model)
    expected = 0.5 * 0.8 * 2.5 / (0.25 * 40)
    ratio = update.std() / expected  # 20,100 values: standard error 0.005
    assert 0.97 < ratio < 1.03
    assert abs(update.mean() / expected) < 0.05


def test_empty_batches_take_noise_and_no_forward_pass():
    class Counting(nn.Linear):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.passes += 1
            return super().forward(x)

    model = Counting(5, 3)
    run(private(), rows(3), model=model)  # the trial on made-up records is over
    before = Counting.passes
    update = run(private(steps=3, sampling_rate=1e-12), rows(3), declared=10**12, model=model)
    assert Counting.passes == before
    assert (update != 0).all()


def test_nothing_that_can_be_seeded_repeats_noise_or_batches():
    def seeded(settings: LocalSettings) -> np.ndarray:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return run(settings, rows(20), seed=1)

    a, b = seeded(private()), seeded(private())
    assert (a != b).mean() > 0.9
    assert np.array_equal(seeded(plain(steps=3, sampling_rate=0.5)), seeded(plain(steps=3, sampling_rate=0.5)))


def test_batches_are_not_repeatable_even_without_noise(silent):
    def seeded() -> np.ndarray:
        torch.manual_seed(1)
        np.random.seed(1)
        return run(private(sampling_rate=0.5), rows(40), seed=1)

    assert not np.array_equal(seeded(), seeded())


def test_an_exploded_update_is_refused():
    with pytest.raises(Refused) as refusal:
        run(plain(lr=3e38, steps=4), rows(10), declared=1)
    assert refusal.value.reason is Refusal.NUMERIC
    with pytest.raises(Refused) as refusal:
        run(private(lr=3e38, steps=4), rows(10), declared=1)
    assert refusal.value.reason is Refusal.NUMERIC


# ------------------------------------------------------------------------------------ unprotected baselines


def test_unprotected_work_repeats_bit_by_bit_for_a_seed():
    model = mlp(nn.Dropout(0.5))
    start = weights_of(model)
    settings = plain(steps=4, sampling_rate=0.5, momentum=0.9)

    def again(seed: int) -> np.ndarray:
        torch.rand(7)  # the state of the global generator does not matter
        return run(settings, rows(20), model=model, weights=start, seed=seed)

    assert np.array_equal(again(5), again(5))
    assert not np.array_equal(again(5), again(6))


def test_unprotected_work_leaves_the_global_generator_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run(plain(), rows(4), model=mlp(nn.Dropout()))
    torch.manual_seed(9)
    model, start = mlp(), weights_of(mlp())
    torch.manual_seed(9)
    run(plain(), rows(4), model=model, weights=start)
    assert torch.equal(torch.rand(3), expected)


def test_unprotected_work_needs_a_seed():
    with pytest.raises(ConfigError, match="seed"):
        run(plain(), rows(4), seed=None)


def test_unprotected_work_does_not_import_opacus():
    code = """
import sys, json, torch
from torch import nn
from hansa.clients.datasets import Rows
from hansa.clients.training import *
from hansa.common.tasks import check_layers
m = nn.Linear(2, 2)
check_layers(m)
w = {n: p.detach().numpy().copy() for n, p in m.named_parameters()}
l = lambda o, y: nn.functional.cross_entropy(o, y, reduction="none")
train_locally(m, l, w, Rows(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)),
              LocalSettings(1, 1.0, "sgd", 0.1), 2, seed=0)
print(json.dumps("opacus" in sys.modules))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ".dev"}, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) is False


# ---------------------------------------------------------------------------------- against a reference


def reference(data: Rows, settings: LocalSettings, declared: int) -> np.ndarray:
    """Full-batch training written out: autograd for the gradient, the update rules by hand, float64."""
    model = mlp().double()
    x, y = data.x.double(), data.y
    w0 = [p.detach().clone() for p in model.parameters()]
    first = [torch.zeros_like(w) for w in w0]
    second = [torch.zeros_like(w) for w in w0]
    for t in range(1, settings.steps + 1):
        gradients = torch.autograd.grad(loss(model(x), y).sum() / declared, list(model.parameters()))
        for p, g, w, m, v in zip(model.parameters(), gradients, w0, first, second, strict=True):
            with torch.no_grad():
                g = g + settings.proximal_mu * (p - w)
                if settings.optimizer == "sgd":
                    m.mul_(settings.momentum).add_(g)
                    p -= settings.lr * m
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    p -= settings.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return torch.cat([(p.detach() - w).flatten() for p, w in zip(model.parameters(), w0, strict=True)]).numpy()


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9},
        {"proximal_mu": 0.7},
        {"momentum": 0.9, "proximal_mu": 0.7},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adam", "lr": 0.01, "proximal_mu": 0.7},
    ],
)
def test_optimisers_against_a_hand_written_reference(silent, changes, protected):
    data = rows(15)
    wide = {"clip_norm": 1e6, "noise_multiplier": 1.0} if protected else {}
    settings = plain(**{"steps": 6, "lr": 0.3} | changes | wide)
    np.testing.assert_allclose(run(settings, data), reference(data, settings, 20), atol=2e-6)


def test_proximal_term_and_optimiser_state_start_afresh_every_call(silent):
    model, data = mlp(), rows(15)
    start = weights_of(model)
    settings = private(steps=3, momentum=0.9, proximal_mu=0.5, clip_norm=1e6)
    first = run(settings, data, model=model, weights=start)
    assert np.array_equal(run(settings, data, model=model, weights=start), first)


def test_frozen_parameters_stay_and_are_not_in_the_update(silent):
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    for settings in (plain(), private()):
        update = train_locally(model, loss, weights_of(model), rows(5), settings, 5, seed=0)
        assert list(update) == ["2.weight", "2.bias"]
        assert torch.equal(model[0].weight, frozen)


def test_convolution_and_norms_and_embeddings_agree_with_plain_training(silent):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.norm = nn.LayerNorm(6)
            self.conv = nn.Sequential(nn.Conv1d(6, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten())
            self.out = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(self.norm(self.embed(x.long())).transpose(1, 2)))

    data = Rows(torch.randint(0, 7, (11, 5)).float(), torch.randint(0, 3, (11,)))
    model = Text()
    start = weights_of(model)
    a = run(private(clip_norm=1e6, steps=2), data, model=model, weights=start)
    b = run(plain(steps=2), data, model=model, weights=start)
    np.testing.assert_allclose(a, b, atol=1e-6)


# ------------------------------------------------------------------------------------ weights, state, screen


def test_update_is_float32_by_name_in_the_models_order_and_owns_its_memory():
    model = mlp()
    start = weights_of(model)
    for array in start.values():
        array.flags.writeable = False
    update = train_locally(model, loss, dict(reversed(start.items())), rows(5), plain(), 5, seed=0)
    assert list(update) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert update[name].dtype == np.float32
        assert update[name].shape == p.shape
        assert not np.shares_memory(update[name], p.detach().numpy())
        np.testing.assert_array_equal(p.detach().numpy() - start[name], update[name])


def test_weights_that_are_the_models_own_memory_work():
    model = mlp()
    live = {n: p.detach().numpy() for n, p in model.named_parameters()}
    start = weights_of(model)
    a = flat(train_locally(model, loss, live, rows(5), plain(), 5, seed=0))
    assert np.array_equal(a, run(plain(), rows(5), 5, model=model, weights=start, seed=0))
    assert np.abs(a).max() > 0


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "transposed"])
@pytest.mark.parametrize("settings", [plain(), private()], ids=["plain", "private"])
def test_weights_of_another_model_are_refused(spoil, settings):
    model = mlp()
    start = weights_of(model)
    if spoil == "missing":
        del start["2.bias"]
    elif spoil == "unknown":
        start["2.gain"] = np.zeros(3, np.float32)
    elif spoil == "shape":
        start["2.bias"] = np.zeros(1, np.float32)  # would broadcast
    else:
        start["2.weight"] = start["2.weight"].T
    before = weights_of(model)
    with pytest.raises(MessageError, match=r"2\."):
        train_locally(model, loss, start, rows(4), settings, 4, seed=0)
    assert all(np.array_equal(a, before[n]) for n, a in weights_of(model).items())


def traces(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, layer in model.named_modules():
        found[name] = sorted(set(layer.__dict__) - {"_is_full_backward_hook"})
        for hooks in ("_forward_hooks", "_backward_hooks", "_forward_pre_hooks", "_backward_pre_hooks"):
            found[f"{name}.{hooks}"] = len(getattr(layer, hooks))
    for name, p in model.named_parameters():
        found[f"{name}:"] = (sorted(p.__dict__), p.requires_grad, p.grad is None)
    found["buffers"] = [name for name, _ in model.named_buffers()]
    return found


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("settings", [plain(), private(sampling_rate=0.9)], ids=["plain", "private"])
def test_no_state_is_left_in_the_model(settings, failing):
    model = mlp(nn.LayerNorm(8))
    model[0].bias.requires_grad_(False)
    clean = traces(model)
    model.eval()
    calls = []

    def on_step(step: int, value: float) -> None:
        calls.append(step)
        if failing:
            raise KeyboardInterrupt

    try:
        train_locally(model, loss, weights_of(model), rows(9), settings, 9, seed=0, on_step=on_step)
    except KeyboardInterrupt:
        assert failing
    assert calls == [1]
    assert traces(model) == clean
    assert all(layer.training for layer in model.modules())


def test_one_model_serves_many_clients_in_either_mode(silent):
    model = mlp()
    start = weights_of(model)
    first = run(private(), rows(9), model=model, weights=start)
    run(plain(), rows(9, seed=5), model=model, weights=start)
    run(private(), rows(9, seed=6), model=model, weights=start)
    assert np.array_equal(run(private(), rows(9), model=model, weights=start), first)


@pytest.mark.parametrize("settings", [plain(steps=3), private(steps=3, clip_norm=1e6)], ids=["plain", "private"])
def test_on_step_tells_the_owner_the_mean_loss(silent, settings, monkeypatch):
    monkeypatch.setattr(training, "_CHUNK_ROWS", 4)
    told: list[tuple[int, float]] = []
    model, data = mlp(), rows(10)
    expected = loss(model(data.x), data.y).mean().item()
    run(settings, data, model=model, on_step=lambda step, value: told.append((step, value)))
    assert [step for step, _ in told] == [1, 2, 3]
    assert told[0][1] == pytest.approx(expected, rel=1e-5)
    assert told[2][1] < told[0][1]


def test_on_step_is_nan_for_an_empty_batch():
    told: list[float] = []
    run(private(sampling_rate=1e-12), rows(3), on_step=lambda _, value: told.append(value))
    assert math.isnan(told[0])


def test_declared_size_must_be_positive():
    with pytest.raises(ConfigError, match="declared_records"):
        run(private(), rows(3), declared=0)


@pytest.mark.parametrize("settings", [plain(), private()], ids=["plain", "private"])
def test_a_loss_that_is_not_by_record_is_refused(settings):
    model = mlp()
    with pytest.raises(TaskError, match="loss has shape"):
        train_locally(model, nn.functional.cross_entropy, weights_of(model), rows(4), settings, 4, seed=0)


# ------------------------------------------------------------------------------- models that cannot be trained


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), inner)


@pytest.mark.parametrize(
    ("layer", "instead"),
    [
        (nn.BatchNorm1d(4), "GroupNorm"),
        (nn.BatchNorm2d(4, affine=False), "GroupNorm"),  # no parameters: Opacus lets it pass
        (nn.BatchNorm1d(4).requires_grad_(False), "GroupNorm"),
        (nn.SyncBatchNorm(4), "GroupNorm"),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "track_running_stats=False"),
        (nn.LSTM(4, 4), "DPLSTM"),
        (nn.GRU(4, 4), "DPGRU"),
        (nn.RNN(4, 4), "DPRNN"),
        (nn.MultiheadAttention(4, 2), "DPMultiheadAttention"),
        (nn.ReLU(inplace=True), "inplace=False"),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), "parent"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "parent"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unsuitable_layers_are_named_with_what_to_use_instead(layer, instead):
    with pytest.raises(TaskError, match=r"layer 'body\.1") as error:
        check_layers(Wrapped(layer))
    assert instead in error.value.hint


def test_everything_opacus_refuses_is_refused():
    from opacus.validators import ModuleValidator

    made = {nn.LSTM: (4, 4), nn.GRU: (4, 4), nn.MultiheadAttention: (4, 2)}
    for kind in ModuleValidator.VALIDATORS:
        more = {"track_running_stats": True, "affine": True} if "InstanceNorm" in kind.__name__ else {}
        layer = kind(*made.get(kind, (4,)), **more)
        assert ModuleValidator.validate(layer), kind
        with pytest.raises(TaskError, match=kind.__name__):
            check_layers(Wrapped(layer))


def test_a_model_without_trainable_parameters_is_refused():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(TaskError, match="no trainable parameters"):
            check_layers(model)


def test_usual_models_pass():
    check_layers(mlp(nn.Dropout()))
    check_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
    model = Wrapped(nn.ReLU())
    model.register_buffer("positions", torch.arange(4))  # constant, and the root has no parameters of its own
    check_layers(model)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x - x.mean(0))


class Largest(Mixing):
    """Mixes, but not records of 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x / x.abs().max())


class Positions(nn.Module):
    """An embedding that never sees the records: its first dimension stays, whatever the batch."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.place, self.out = nn.Embedding(places, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.place(torch.arange(self.places)).mean(0))


class Folding(nn.Module):
    """Records folded into the first dimension: 5 rows a record."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 1)).reshape(len(x), 5, 3).mean(1)


class Tied(nn.Module):
    """A weight used outside its own layer, where Opacus does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(nn.functional.linear(self.inner(x), self.inner.weight)))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum(0)
        return self.out(x)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x, x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        z = self.out(y)
        y.zero_()
        return z


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Mixing(), "depends on the others"),
        (Positions(2), "'place.weight' gets a gradient with another first dimension"),
        (Positions(3), "'place.weight' gets a gradient with another first dimension"),
        (Positions(10), "'place.weight' gets a gradient with another first dimension"),
        (Folding(), "another first dimension"),
        (Tied(), "do not add up"),
        (Unused(), "'spare.weight' gets no gradient"),
        (Remembering(), "buffer"),
        (Squared(), r"layer 'out' \(Bilinear\) has no per-record gradients"),
        (InPlace(), "made-up records of shape"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_do_not_keep_records_apart_are_refused_before_real_records_are_used(model, words):
    check_layers(model)  # layers alone do not show it
    clean = traces(model)

    class OnlyShape:
        """Ten records, as many as one Positions has places: the check must not depend on chance."""

        x = torch.full((10, 5), math.nan)
        y = torch.zeros(10, dtype=torch.int64)

    with pytest.raises(TaskError, match=words):
        train_locally(model, loss, weights_of(model), OnlyShape(), private(), 10, seed=None)
    with pytest.raises(TaskError, match=words):
        check_records_apart(model, loss, (5,))
    assert traces(model) == clean


def test_a_model_that_mixes_by_the_largest_number_is_refused():
    model = Largest()
    with pytest.raises(TaskError, match="depends on the others"):
        train_locally(model, loss, weights_of(model), rows(5), private(), 5, seed=None)


def test_a_loss_that_mixes_by_the_labels_is_refused():
    def balanced(output: Tensor, labels: Tensor) -> Tensor:
        return loss(output, labels) / torch.bincount(labels, minlength=9)[labels]

    model = mlp()
    with pytest.raises(TaskError, match="depends on the others"):
        train_locally(model, balanced, weights_of(model), rows(5), private(), 5, seed=None)


def test_numbers_that_are_tokens_are_tried_as_tokens_alone():
    """Real-valued made-up records are no tokens: the model fails on them, and is fine."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(2, 4), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x.long()).flatten(1))

    model = Words()
    tokens = Rows(torch.randint(0, 2, (5, 5)).float(), torch.zeros(5, dtype=torch.int64))
    train_locally(model, loss, weights_of(model), tokens, private(), 5, seed=None)
    check_model(Task("t", "", ArraySchema(shape=(5,), value_range=(0, 1)), ("a", "b", "c"), Words))


def test_a_loss_that_mixes_records_is_refused():
    def centred(output: Tensor, labels: Tensor) -> Tensor:
        return loss(output, labels) * loss(output, labels).mean()

    model = mlp()
    with pytest.raises(TaskError, match="depends on the others"):
        train_locally(model, centred, weights_of(model), rows(5), private(), 5, seed=None)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "mu"), [("sgd", 0.0, 0.0), ("sgd", 0.9, 0.0), ("adam", 0.0, 0.0), ("adam", 0.0, 0.2)]
)
def test_the_optimiser_is_torchs_own(optimizer, momentum, mu):
    """Descent against torch.optim, with the proximal term added by hand, for one client and for rows of many."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    judge = kind([theirs], lr=0.1, **({"momentum": momentum} if momentum else {}))
    descent = Descent(LocalSettings(1, 1.0, optimizer, 0.1, momentum=momentum, proximal_mu=mu))
    for step in range(6):
        rows = 4 if step < 4 else 2  # two of the clients have no more steps to take
        g = torch.randn(4, 7, generator=generator, dtype=torch.float64)
        descent.step([ours[:rows]], [g[:rows].clone()], [start[:rows]])
        theirs.grad = g + mu * (theirs.detach() - start)
        judge.step()
        torch.testing.assert_close(ours[:rows], theirs.detach()[:rows], rtol=1e-12, atol=1e-14)
