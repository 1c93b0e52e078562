"""A round of local work: DP-SGD on one partner's records, and the update that leaves.

Abadi et al. (1607.00133), adjacency add-or-remove-one record. Opacus gives per-record gradients and nothing
else: its optimiser draws noise from torch's generator, sums in float32 and divides by the real size, each of
which is replaced here. Rules of the house that this file keeps:

- a record whose gradient is not finite contributes exactly zero, in the same time as any other;
- noise comes from `SecureNoise`, once per step, also when nobody was sampled;
- the divisor is sampling rate times *declared* size; batches are Poisson or full;
- the event that is accounted and the noise that is drawn come from one object, `LocalSettings`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.accounting import PrivacyEvent
from ..common.errors import ConfigError, HansaError, MessageError, Refusal, Refused, TaskError, counted
from ..common.noise import SecureNoise
from ..common.shared_noise import SharedGaussian
from ..common.tasks import Task, check_layers, check_model, initial_model, made_up_records
from .datasets import Rows

Loss = Callable[[Tensor, Tensor], Tensor]
_Parameters = dict[str, nn.Parameter]

NOT_FINITE = "the update is not finite"
"""Why an update is refused."""
_CHUNK_BYTES = 256 * 2**20
_CHUNK_ROWS = 1024  # activations grow with rows, whatever the number of parameters


@dataclass(frozen=True)
class LocalSettings:
    """What one round of local work is.

    Args:
        steps: optimiser steps, at least 1. Steps, not epochs.
        sampling_rate: probability q that a record takes part in a step, in (0, 1]; 1 is the full batch.
        optimizer: "sgd" or "adam". Its state starts empty every round.
        lr: learning rate.
        momentum: of SGD; starts at zero every round.
        proximal_mu: μ of FedProx (Li et al. 1812.06127); 0 for FedAvg.
        clip_norm: C, L2 bound of one record's gradient; None, as `noise_multiplier`, for unprotected
            baselines.
        noise_multiplier: σ; the noise on a step's sum of gradients has standard deviation σ·C.

    Raises:
        ConfigError: a value is out of range, or only one of clip_norm and noise_multiplier is given.
    """

    steps: int
    sampling_rate: float
    optimizer: str
    lr: float
    momentum: float = 0.0
    proximal_mu: float = 0.0
    clip_norm: float | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        allowed = {
            "steps": (self.steps >= 1, "1 or more"),
            "sampling_rate": (0 < self.sampling_rate <= 1, "above 0, at most 1"),
            "optimizer": (self.optimizer in ("sgd", "adam"), "sgd or adam"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "momentum": (
                self.momentum == 0 or (self.optimizer == "sgd" and 0 < self.momentum < 1),
                "0; with sgd also more, below 1",
            ),
            "proximal_mu": (0 <= self.proximal_mu < math.inf, "0 or more"),
            "clip_norm": (self.clip_norm is None or 0 < self.clip_norm < math.inf, "above 0"),
            "noise_multiplier": (
                (self.noise_multiplier is None) == (self.clip_norm is None),
                "a number together with clip_norm, or neither",
            ),
        }
        for name, (fine, words) in allowed.items():
            if not fine:
                raise ConfigError(f"{name} is {getattr(self, name)!r}", f"Allowed: {words}.")

    @property
    def event(self) -> PrivacyEvent | None:
        """What this work costs each record, for the accountant; None when unprotected.

        Raises:
            Whatever `PrivacyEvent` raises for σ < 0.3.
        """
        if self.noise_multiplier is None:
            return None
        return PrivacyEvent(self.sampling_rate, self.noise_multiplier, self.steps)


def train_locally(
    model: nn.Module,
    loss: Loss,
    weights: Mapping[str, NDArray[np.float32]],
    data: Rows,
    settings: LocalSettings,
    declared_records: int,
    *,
    seed: int | None,
    batches: Sequence[NDArray[np.int64]] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Train from `weights` on `data`; return w_after − w_before.

    *Formal guarantees.* With σ and C given, the update is (as a random variable over the noise and the
    batches) the result of `settings.event` on `data`, then post-processing: a step's sum over sampled records
    of gradients of norm at most C, plus N(0, σ²C²) on each coordinate, divided by sampling_rate ·
    declared_records. Optimiser, momentum and the proximal term μ(w − w_before) come after the noise. Nothing
    else of `data` leaves, neither its size nor the loss.

    Rounding: clipping, sum and noise are in float64, so that a record's share is at most C(1 + 1e-9) up to
    10⁷ parameters. Not covered: that a batch of another size may round *other* records' float32 gradients
    differently (about 1e-7 of each), and that float64 noise is not exactly normal (see `SecureNoise`).

    | case                               | what happens                                              |
    | ---------------------------------- | --------------------------------------------------------- |
    | nobody is sampled, or no records   | no forward pass; the step is noise alone                  |
    | a record's gradient is NaN or ±Inf | it contributes zero                                       |
    | more rows than fit                 | chunks; their clipped sums add up; noise once             |
    | the update is not finite           | refused: noise is finite, so only lr can do this, and     |
    |                                    | what depends on noised values alone is post-processing    |

    Args:
        model: float32 (or float64), on the CPU; passes `tasks.check_layers`. Its trainable parameters are overwritten, it is left
            in train mode, and keeps nothing else of the call, so that one model serves many clients.
        loss: (model output, labels [n]) -> losses by record [n].
        weights: exactly the parameters that require grad, by name, of the same shapes.
        data: the records.
        settings: see there. Optimiser state starts empty at each call.
        declared_records: the charter's size of this dataset, not `len(data.y)`.
        seed: unprotected work repeats bit by bit for a seed (batches and dropout) and needs one. Protected
            work ignores it: its noise and batches cannot be repeated.
        batches: of unprotected work, the rows of each step, whose mean gradient is its step; `settings.steps` and the sampling
            rate then say nothing. For comparisons with other frameworks.
        on_step: (step from 1, mean loss of the batch, NaN if empty) -> None, for the owner's own screen. The
            loss is not accounted: it must not leave the node, in a message, log or file.

    Returns:
        Of the model's type by parameter name, in the order of `model.named_parameters()`.

    Raises:
        ConfigError: declared_records below 1, no seed for unprotected work, or batches for protected.
        MessageError: `weights` has other names or shapes than the model.
        TaskError: the model or loss does not keep records apart (protected only), or loss is not [n].
        Refused: the update is not finite.
    """
    event = settings.event  # refuses σ < 0.3 before a record is read
    if declared_records < 1:
        raise ConfigError(f"declared_records is {declared_records}", "It is the agreed size of the dataset: 1 or more.")
    if event is not None and batches is not None:
        raise ConfigError("protected work on given batches", "Its records must be drawn by chance and in secret.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    arrays = _matching(parameters, weights)
    divisor = settings.sampling_rate * declared_records
    shown: list[Tensor] = []

    def watched(output: Tensor, labels: Tensor) -> Tensor:
        losses = loss(output, labels)
        shown.append(losses.detach())
        return losses

    used_loss = loss if on_step is None else watched
    if not all(layer.training for layer in model.modules()):
        model.train()
    try:
        if event is not None:
            check_layers(model)
            check_records_apart(model, loss, data.x.shape[1:], data.x.dtype)
        with (
            _plain_gradients(
                model, used_loss, parameters, data, plain_batches(settings, len(data), divisor, seed, batches), seed
            )
            if event is None or settings.clip_norm is None
            else _private_gradients(model, used_loss, parameters, data, event, settings.clip_norm, divisor)
        ) as gradients:
            for p, array in zip(parameters.values(), arrays, strict=True):
                p.detach().numpy()[...] = array
            descent, moved = Descent(settings), [p.detach() for p in parameters.values()]
            start = [p.clone() for p in moved] if settings.proximal_mu else moved
            for step in range(1, (settings.steps if batches is None else len(batches)) + 1):
                descent.step(moved, gradients(), start)
                if on_step is not None:
                    on_step(step, float(torch.cat(shown).mean()) if shown else math.nan)
                    shown.clear()
    finally:
        for p in parameters.values():
            p.grad = None
    update = {name: p.detach().numpy() - array for (name, p), array in zip(parameters.items(), arrays, strict=True)}
    if not all(np.isfinite(array).all() for array in update.values()):
        raise Refused(Refusal.NUMERIC, NOT_FINITE, "Lower the learning rate or the number of steps.")
    return update


def shared_gradient(
    model: nn.Module,
    loss: Loss,
    weights: Mapping[str, NDArray[np.float32]],
    data: Rows,
    event: SharedGaussian,
) -> NDArray[np.int64]:
    """One partner's part of one step of shared noise: the sum of its clipped gradients, with its share of the noise.

    *Formal guarantees.* The sum over N_min or more partners costs each record what `event` says, against a coordinator that sees
    nothing but that sum and learns the noise of at most t of them. **By itself this vector is not private enough**: it must
    leave under a mask only. Sampling and clipping as in `train_locally`, but exact: each record's clipped gradient is a vector of whole
    numbers of norm at most C, and so is its share of the sum, whoever else is in it. Not covered: that a batch of another size may
    round *other* records' float32 gradients differently (about 1e-7 of each).

    Args:
        model, loss, weights, data: as `train_locally`.

    Returns:
        int64 [event.dimension], in steps of event.grid, in the order of `model.named_parameters()`.

    Raises:
        ConfigError: the model has another number of parameters than the event.
        MessageError, TaskError: as `train_locally`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    arrays = _matching(parameters, weights)
    if (size := sum(p.numel() for p in parameters.values())) != event.dimension:
        raise ConfigError(
            f"the model has {size} parameters, agreed are {event.dimension}", "Install the task that was agreed."
        )
    if not all(layer.training for layer in model.modules()):
        model.train()
    try:
        check_layers(model)
        check_records_apart(model, loss, data.x.shape[1:], data.x.dtype)
        with _clipped_sums(
            model,
            loss,
            parameters,
            data,
            event.sampling_rate,
            lambda by_record: _whole_sum(by_record, event.clip_norm, event.grid / FINER),
        ) as clipped_sum:
            for p, array in zip(parameters.values(), arrays, strict=True):
                p.detach().numpy()[...] = array
            total = clipped_sum().numpy()
    finally:
        for p in parameters.values():
            p.grad = None
    on_grid = np.rint(total / FINER).astype(np.int64)
    return on_grid + SecureNoise().discrete_gaussian(event.dimension, event.share_std)


class Descent:
    """The optimiser of one round of local work, from an empty state. It works number by number, so that a tensor may hold the
    parameters of one client, or a row of each of many.

    SGD with momentum and Adam (Kingma & Ba 1412.6980) exactly as torch.optim has them by default, at a third of its time: that counts
    for 1,000 small clients.
    """

    def __init__(self, settings: LocalSettings) -> None:
        self._settings = settings
        self._steps = 0
        self._first: list[Tensor] = []
        self._second: list[Tensor] = []

    @torch.no_grad()
    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], start: Sequence[Tensor]) -> None:
        """Move `parameters` by one step; `gradients` are overwritten.

        Args:
            start: what the round began with, for the proximal term.
        """
        s = self._settings
        self._steps += 1
        if self._steps == 1 and (s.momentum or s.optimizer == "adam"):
            self._first = [torch.zeros_like(g) for g in gradients]
            self._second = [torch.zeros_like(g) for g in gradients] if s.optimizer == "adam" else []
        for i, (p, g, w) in enumerate(zip(parameters, gradients, start, strict=True)):
            if s.proximal_mu:
                g.add_(p - w, alpha=s.proximal_mu)
            if s.optimizer == "adam":
                first, second = _rows(self._first[i], g), _rows(self._second[i], g)
                first.lerp_(g, 1 - _BETA_1)
                second.mul_(_BETA_2).addcmul_(g, g, value=1 - _BETA_2)
                spread = (second.sqrt() / math.sqrt(1 - _BETA_2**self._steps)).add_(_ADAM_EPSILON)
                p.addcdiv_(first, spread, value=-s.lr / (1 - _BETA_1**self._steps))
                continue
            if s.momentum:
                g = _rows(self._first[i], g).mul_(s.momentum).add_(g)
            p.add_(g, alpha=-s.lr)


_BETA_1, _BETA_2, _ADAM_EPSILON = 0.9, 0.999, 1e-8


def _rows(state: Tensor, gradient: Tensor) -> Tensor:
    """The state of those clients that still have steps to take: the first ones."""
    return state if state.shape == gradient.shape else state[: len(gradient)]


Batch = tuple[NDArray[np.int64] | None, float]
"""The rows of a step (None: all), and what their summed gradient is divided by."""


def plain_batches(
    settings: LocalSettings,
    records: int,
    divisor: float,
    seed: int | None,
    batches: Sequence[NDArray[np.int64]] | None = None,
) -> Iterator[Batch]:
    """The batches of unprotected work, which repeat for a seed; see `train_locally`.

    Raises:
        ConfigError: no seed.
    """
    if seed is None:
        raise ConfigError("unprotected training without a seed", "Give one: baselines must be repeatable.")
    if batches is not None:
        yield from ((rows, float(max(1, len(rows)))) for rows in batches)
        return
    coins = np.random.default_rng(seed) if settings.sampling_rate < 1 else None  # building one takes 10 µs
    for _ in range(settings.steps):
        taken = None if coins is None else np.flatnonzero(coins.random(records) < settings.sampling_rate)
        yield taken, divisor


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """What each record's gradient is multiplied by: min(1, C/‖g‖), and 0 where the norm is not finite."""
    return torch.where(norms.isfinite(), (clip_norm / norms).clamp(max=1.0), 0.0)


def _matching(parameters: _Parameters, weights: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The arrays in the parameters' order. Raises MessageError unless names and shapes are the same."""
    if not parameters:
        raise TaskError("the model has no trainable parameters", "Set requires_grad on those that are to be trained.")
    if odd := sorted(parameters.keys() ^ weights.keys()):
        raise MessageError(
            f"the message and the model differ in parameter '{odd[0]}' ({counted(len(odd), 'name')} in all)",
            "Both sides must run the task that the charter names.",
        )
    for name, p in parameters.items():
        if weights[name].shape != p.shape:
            raise MessageError(
                f"parameter '{name}' has shape {weights[name].shape}; the model has {tuple(p.shape)}",
                "Both sides must run the task that the charter names.",
            )
    # Copied only where the caller hands over the model's own memory: the arrays must outlive the training.
    return [
        np.array(
            weights[name],
            dtype=p.detach().numpy().dtype,
            copy=np.may_share_memory(weights[name], p.detach().numpy()) or None,
        )
        for name, p in parameters.items()
    ]


def _losses(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    losses = loss(model(x), y)
    if losses.shape != y.shape[:1]:
        raise TaskError(
            f"the loss has shape {tuple(losses.shape)} for {len(y)} records",
            "Return one loss a record: reduction='none', and a mean over everything but the first dimension.",
        )
    return losses


@contextmanager
def _plain_gradients(
    model: nn.Module,
    loss: Loss,
    parameters: _Parameters,
    data: Rows,
    batches: Iterator[Batch],
    seed: int | None,
) -> Iterator[Callable[[], list[Tensor]]]:
    """Baselines only. A function that takes the next batch and returns its gradient, in `parameters`' order."""
    if seed is None:
        raise ConfigError("unprotected training without a seed", "Give one: baselines must be repeatable.")
    targets = list(parameters.values())

    def gradients() -> list[Tensor]:
        (rows, divisor), x, y = next(batches), data.x, data.y
        if rows is not None:
            taken = torch.from_numpy(rows)
            x, y = x[taken], y[taken]
        if not len(y):
            return [torch.zeros_like(p) for p in targets]
        each = torch.full((len(y),), 1 / divisor, dtype=targets[0].dtype)
        return list(torch.autograd.grad(_losses(model, loss, x, y), targets, each, materialize_grads=True))

    with _torch_seed(seed):
        yield gradients


@contextmanager
def _private_gradients(
    model: nn.Module,
    loss: Loss,
    parameters: _Parameters,
    data: Rows,
    event: PrivacyEvent,
    clip_norm: float,
    divisor: float,
) -> Iterator[Callable[[], list[Tensor]]]:
    """A function that draws a Poisson batch and returns its noised gradient, in the order of `parameters`."""
    noise = SecureNoise()
    sizes = [p.numel() for p in parameters.values()]
    with _clipped_sums(
        model, loss, parameters, data, event.sampling_rate, lambda by_record: _clipped_sum(by_record, clip_norm)
    ) as clipped_sum:

        def gradients() -> list[Tensor]:
            total = clipped_sum()
            total += torch.from_numpy(noise.gaussian(sum(sizes), event.noise_multiplier * clip_norm))
            total /= divisor
            parts = zip(torch.split(total, sizes), parameters.values(), strict=True)
            return [part.view(p.shape).to(p.dtype) for part, p in parts]

        yield gradients


@contextmanager
def _clipped_sums(
    model: nn.Module,
    loss: Loss,
    parameters: _Parameters,
    data: Rows,
    sampling_rate: float,
    add: Callable[[list[Tensor]], Tensor],
) -> Iterator[Callable[[], Tensor]]:
    """A function that draws a Poisson batch and returns the sum of its clipped gradients, float64 [number of parameters].

    Args:
        add: gradients by record -> the sum of the clipped ones, or of whole numbers made of them.
    """
    noise = SecureNoise()
    size = sum(p.numel() for p in parameters.values())
    # A row costs 4 bytes a parameter as Opacus gives it and 8 in float64.
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (12 * size)))

    def clipped_sum() -> Tensor:
        x, y = data.x, data.y
        if sampling_rate < 1:
            taken = torch.from_numpy(noise.bernoulli(len(y), sampling_rate))
            x, y = x[taken], y[taken]
        total = torch.zeros(size, dtype=torch.float64)
        if len(y):
            for some_x, some_y in zip(torch.split(x, rows), torch.split(y, rows), strict=True):
                total += add(_by_record(wrapped, loss, parameters, some_x, some_y))
        return total

    with _opacus(model) as wrapped:
        yield clipped_sum


def _clipped_sum(by_record: list[Tensor], clip_norm: float) -> Tensor:
    """Sum over records of min(1, C/‖g‖)·g, zero for a record that is not finite.

    Args:
        by_record: float32 [n, ...] for each parameter.
        clip_norm: C.

    Returns:
        float64 [number of parameters], flat. In float64 the norm of finite float32 values cannot overflow, so
        it is finite exactly when all of them are. There is no branch on values: time does not tell of them.
    """
    wide = [g.flatten(1).double() for g in by_record]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in wide]).norm(dim=0)
    factors = clip_factors(norms, clip_norm)
    return torch.cat([factors @ g.nan_to_num_(0.0, 0.0, 0.0) for g in wide])


FINER = 1024.0
"""Each record's gradient is rounded to the grid over this; the sum is then exact, and only it is rounded to the grid."""


def _whole_sum(by_record: list[Tensor], clip_norm: float, step: float) -> Tensor:
    """As `_clipped_sum`, of gradients that are whole numbers of `step`, rounded towards zero, which makes no norm larger.

    Floats add whole numbers exactly, up to 2⁵³ (`masking.fixed_point_of` sees to that): no order, chunk or other record moves a
    record's share. The slack of 10⁻⁷ is more than what floats may be off in a norm of up to 10⁹ numbers.
    """
    wide = [g.flatten(1).double() for g in by_record]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in wide]).norm(dim=0)
    factors = clip_factors(norms, clip_norm * (1 - 1e-7)) / step
    return torch.cat([g.nan_to_num_(0.0, 0.0, 0.0).mul_(factors[:, None]).trunc_().sum(dim=0) for g in wide])


def _by_record(wrapped: nn.Module, loss: Loss, parameters: _Parameters, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients by record, float32 [n, ...] for each parameter; `p.grad` is left with the batch's own."""
    for p in parameters.values():
        p.grad = None
    _losses(wrapped, loss, x, y).sum().backward()  # type: ignore[no-untyped-call]
    by_record = []
    for name, p in parameters.items():
        g = p.grad_sample  # type: ignore[attr-defined]
        if not isinstance(g, Tensor) or len(g) != len(y):
            rows = "no gradient" if g is None else "a gradient with another first dimension"
            raise TaskError(
                f"parameter '{name}' gets {rows} for a batch of records",
                "Every layer must see [records, ...] first and be used; freeze parameters that are not.",
            )
        by_record.append(g)
        p.grad_sample = None  # type: ignore[attr-defined]
    return by_record


def check_task(task: Task, *, protected: bool) -> None:
    """Refuse a task that a round would fail on, before one is charged: its model, and where records are protected their gradients.

    In a round nothing but "failed" leaves; here the words may be shown, for no record was read.

    Raises:
        TaskError: as `tasks.check_model` and `check_records_apart`.
    """
    check_model(task)
    if protected:
        check_records_apart(initial_model(task, 0), task.loss, task.schema.shape)


def check_records_apart(model: nn.Module, loss: Loss, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Try the model on made-up records: clipping bounds an influence only if gradients keep records apart.

    What layers alone do not show: code that mixes a batch (x − x.mean(0)), a layer that sees another first
    dimension than the records (an embedding of positions), a parameter used outside its own layer, a buffer
    that training changes. Only the shape of real records is used, so a refusal says nothing of them, and may be shown.
    Overwrites the parameters. Imports Opacus.

    Args:
        model: left in train mode; passes `tasks.check_layers`.
        loss: by record.
        shape: of one record.
        dtype: of records.

    Raises:
        TaskError: naming the parameter or layer.
    """
    if not all(layer.training for layer in model.modules()):
        model.train()
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    try:
        _check_apart(model, loss, trainable, torch.Size(shape), dtype)
    finally:
        for p in model.parameters():
            p.grad = None


@lru_cache(maxsize=1)  # one model serves many clients
def _check_apart(
    model: nn.Module, loss: Loss, trainable: tuple[str, ...], shape: torch.Size, dtype: torch.dtype
) -> None:
    parameters = {name: model.get_parameter(name) for name in trainable}
    buffers = [b.clone() for b in model.buffers()]
    with _torch_seed(0), _opacus(model) as wrapped:
        for p in parameters.values():
            nn.init.normal_(p, std=0.3)

        def attempt(records: list[Tensor], labels: list[int]) -> list[tuple[Tensor, Tensor | None]]:
            torch.default_generator.manual_seed(0)  # the same dropout for every attempt
            try:
                by_record = _by_record(wrapped, loss, parameters, torch.stack(records), torch.tensor(labels))
            except HansaError:
                raise
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                if (layer := _without_rule(model)) is not None:
                    raise TaskError(
                        f"{layer} has no per-record gradients: {said}",
                        "Use layers that Opacus supports (docs/your-own-task.md), or one made of them.",
                    ) from error
                raise TaskError(
                    f"model or loss fails on made-up records of shape {tuple(shape)}: {said}",
                    "Likely cause: in-place operations.",
                ) from error
            return [(g, p.grad) for g, p in zip(by_record, parameters.values(), strict=True)]

        (record, other, another), *sizes = made_up_records(shape, dtype)
        attempt([record, other, record], [0, 0, 0])  # 3 rows, then 2: no other dimension agrees with both by chance
        tried = [(attempt([record, other], [0, 0]), attempt([record, another], [0, 1]))]
        with contextlib.suppress(TaskError):  # where 0 and 1 alone are valid
            tried += [(attempt([one, small], [1, 0]), attempt([one, large], [1, 1])) for one, small, large in sizes]
    for with_other, with_another in tried:
        _refuse_mixed(parameters, with_other, with_another)
    if any(not torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True)):
        raise TaskError("training changes a buffer of the model", "What is learned from records must be a parameter.")


def _without_rule(model: nn.Module) -> str | None:
    """The first layer with parameters for which Opacus has no rule of its own; it then tries a general one, which may fail."""
    from opacus import GradSampleModule

    for name, layer in model.named_modules():
        if (
            type(layer) not in GradSampleModule.GRAD_SAMPLERS
            and next(layer.parameters(recurse=False), None) is not None
        ):
            return f"layer '{name}' ({type(layer).__name__})"
    return None


def _refuse_mixed(
    parameters: _Parameters,
    with_other: list[tuple[Tensor, Tensor | None]],
    with_another: list[tuple[Tensor, Tensor | None]],
) -> None:
    """The first record's gradient must be the same beside another; gradients must add up."""
    for name, (a, total), (b, _) in zip(parameters, with_other, with_another, strict=True):
        if not _close(a[0], b[0]):
            raise TaskError(
                f"the gradient of one record depends on the others of its batch (parameter '{name}')",
                "The model or the loss mixes records; normalise within one (nn.LayerNorm, nn.GroupNorm).",
            )
        if total is None or not _close(a.sum(0), total):
            raise TaskError(
                f"the gradients by record of parameter '{name}' do not add up to its gradient",
                "Use the parameter only through its own layer, and nn.Embedding without padding_idx.",
            )


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(torch.nan_to_num(a, 0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


@contextmanager
def _opacus(model: nn.Module) -> Iterator[nn.Module]:
    """The model with Opacus' hooks, which are gone afterwards."""
    # Imported here: it takes 1.5 s, which unprotected work need not wait for.
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    if problems := [*ModuleValidator.validate(model), *GradSampleModule.validate(model)]:
        raise TaskError(f"Opacus does not support the model: {problems[0]}", "Replace the layer.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the first layer's; it is meant to
        wrapped = GradSampleModule(model, loss_reduction="sum")
        try:
            yield wrapped
        finally:
            wrapped.to_standard_module()
            for layer in model.modules():
                for left_over in ("activations", "max_batch_len"):
                    layer.__dict__.pop(left_over, None)


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a while (torch.random.fork_rng takes 150 µs for it; this, 5)."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
