"""Many clients' local work at once: what `clients.training.train_locally` does for one, for all clients of a chunk.

Sampling, clipping, noise and the optimiser are the functions of `clients/training.py`; only forward and backward passes are others
(`program.py`). Without noise the updates are the same up to rounding. With noise each client draws its own.

Simulation only: clipping and noise are in float32 here, and in float64 at a node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..clients.datasets import Rows
from ..clients.training import Batch, Descent, LocalSettings, clip_factors, plain_batches
from ..common.noise import SecureNoise
from ..common.tasks import cross_entropy
from .layers import Groups, Pass, StackedConv
from .program import Program, compiled

_PIECE_ROWS = 1024
_PIECE_BYTES = 128 * 2**20
_PASSES = 8
"""Kept at most: a pass of many clients may keep ten thousand views."""
_MINUS_ONE = torch.tensor(-1.0)
_CALL_S, _FLOPS = 15e-6, 5e10
"""What three products of a layer cost for being asked for, and how many operations a second products are worth: both roughly."""


@dataclass(frozen=True)
class Member:
    """One client's round.

    Attributes:
        settings: of all members of a chunk the same but for steps and sampling rate.
        seed, batches: as `train_locally` has them.
    """

    rows: Rows
    settings: LocalSettings
    declared_records: int
    seed: int | None
    batches: Sequence[NDArray[np.int64]] | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps of this round."""
        return self.settings.steps if self.batches is None else len(self.batches)


class _NotFinite(Exception):
    def __init__(self, finite: Tensor) -> None:
        self.finite = finite


class Cohort:
    """Clients of one task, trained many at a time. One at a time will do, too.

    Args:
        model: passes `tasks.check_layers`.
        records: some [n, ...], as they will be.
        private: records are clipped.

    Raises:
        Unsupported: the model cannot be computed for many clients at once.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], records: Tensor, *, private: bool
    ) -> None:
        model.train()
        self._loss = loss
        self.program: Program = compiled(model, loss, records, private)
        self._apart = private and any(isinstance(layer, StackedConv) for layer in self.program.layers.values())
        self._noise = SecureNoise()
        self._private = private
        self._params = self._grads = torch.empty(0, self.program.size, dtype=self.program.dtype)
        self._passes: dict[int, Pass] = {}

    @torch.no_grad()
    def train(self, weights: Tensor, members: Sequence[Member], out: Tensor) -> None:
        """Write each member's update, w_after − w_before.

        Args:
            weights: [parameters], what everybody starts from.
            out: [members, parameters]; an update that is not finite is written as it is.
        """
        order = sorted(range(len(members)), key=lambda i: -members[i].steps)
        params, grads = self._room(len(members))
        params[:] = weights
        self._steps([members[i] for i in order], params, grads, weights)
        if order == list(range(len(members))):
            torch.sub(params, weights, out=out)
        else:
            out[order] = params.sub_(weights)

    def forget(self) -> None:
        """Let go of the memory of the last chunk."""
        self._params = self._grads = torch.empty(0, self.program.size, dtype=self.program.dtype)
        self._passes.clear()

    def _room(self, members: int) -> tuple[Tensor, Tensor]:
        """Parameters and gradients of so many, where those of the last chunk were: views of them are worth keeping."""
        if self._params.shape[0] < members:
            self._params = torch.empty(members, self.program.size, dtype=self.program.dtype)
            self._grads = torch.empty_like(self._params)
            self._passes.clear()
        return self._params[:members], self._grads[:members]

    def _pass(self, members: int) -> Pass:
        """Of the first `members` in the room."""
        if members not in self._passes:
            if len(self._passes) == _PASSES:
                self._passes.clear()
            self._passes[members] = Pass(*self._room(members), self._private)
        return self._passes[members]

    def _steps(self, members: list[Member], params: Tensor, grads: Tensor, weights: Tensor) -> None:
        settings = members[0].settings
        start = weights.expand_as(params)
        x, y = (
            torch.cat(parts) if len(parts) > 1 else parts[0]
            for parts in zip(*((m.rows.x, m.rows.y) for m in members), strict=True)
        )
        records = [len(m.rows) for m in members]
        first = np.cumsum([0, *records]).tolist()
        generators = [_generator(m.seed) for m in members] if self.program.dropout else []
        descent = Descent(settings)
        draws = _private_draws(members, self._noise) if settings.event else _plain_draws(members)
        for drawn in draws:
            if (active := len(drawn)) < params.shape[0]:
                params, grads, start = params[:active], grads[:active], start[:active]
            run = self._pass(active)
            run.generators = generators[:active]
            counts = [n if rows is None else len(rows) for n, (rows, _) in zip(records, drawn, strict=False)]
            divisors = [divisor for _, divisor in drawn]
            taken = [
                (np.arange(begin, begin + n) if rows is None else rows + begin)
                for (rows, _), begin, n in zip(drawn, first, counts, strict=False)
            ]
            grads.zero_()
            for part in self._pieces(counts):
                self._add(run, x, y, taken if part is None else [t[part] for t in taken], divisors, settings)
            if settings.event is not None and settings.clip_norm is not None:
                std = settings.event.noise_multiplier * settings.clip_norm
                grads += torch.from_numpy(self._noise.quick_gaussian(tuple(grads.shape), std))
                grads /= torch.from_numpy(np.asarray(divisors)).to(grads.dtype).unsqueeze(1)
            descent.step([params], [grads], [start])

    def _pieces(self, counts: Sequence[int]) -> Iterator[slice | None]:
        """A step's rows, so many of each client's at a time that they fit; None: all at once."""
        most = max(counts, default=0)
        by_record = 4 * self.program.size if self._apart else 4096
        rows = max(1, min(_PIECE_ROWS, _PIECE_BYTES // (by_record * len(counts))))
        # Dropout is drawn layer by layer, for a client's whole batch: that is not cut.
        if most and (most <= rows or self.program.dropout):
            yield None
            return
        for begin in range(0, most, rows):
            yield slice(begin, begin + rows)

    def _add(
        self,
        run: Pass,
        x: Tensor,
        y: Tensor,
        rows: list[NDArray[np.int64]],
        divisors: Sequence[float],
        settings: LocalSettings,
    ) -> None:
        """Add the gradient of these rows (the sum of the clipped ones; without protection, the sum over the divisor)."""
        clip_norm, dtype = settings.clip_norm, self.program.dtype
        sizes = [len(r) for r in rows]
        if not (most := max(sizes)):
            return
        counted: Tensor | None = None
        nobody: list[int] = []
        each: Tensor | None = None
        if len(sizes) > 1 and self._padded(sizes, most):
            index, real = _filled_up(rows, sizes, most)
            groups, chosen = Groups([most] * len(rows)), torch.from_numpy(index.reshape(-1))
            if min(sizes) < most:
                nobody = [i for i, size in enumerate(sizes) if not size]
                counted = torch.from_numpy(real).to(dtype)
        else:
            groups, chosen = Groups(sizes), torch.from_numpy(np.concatenate(rows))
        if not run.private:
            shares = 1 / torch.tensor(divisors, dtype=torch.float64)
            if groups.each is None:
                each = torch.repeat_interleave(shares, torch.tensor(sizes)).to(dtype)
            else:
                each = shares.to(dtype).unsqueeze(1)
                each = (each.expand(-1, most) if counted is None else each * counted).reshape(-1)
        if counted is not None:
            counted = counted.view(-1)
        labels = y.index_select(0, chosen)

        def factors(norms: Tensor) -> Tensor:
            assert clip_norm is not None
            if not math.isfinite(float(norms.sum())):
                finite = norms.isfinite() if counted is None else norms.isfinite() | (counted == 0)
                if not bool(finite.all()):
                    raise _NotFinite(finite)
            found = clip_factors(norms, clip_norm)
            return found if counted is None else found * counted

        run.groups, run.real = groups, sizes
        before = run.gradient[nobody] if nobody else None
        try:
            self.program.gradients(run, x.index_select(0, chosen), self._seed(labels, each), factors)
        except _NotFinite as found:
            # What is not finite contributes zero, and is left out. Nothing was added yet: again without it.
            parts = np.split(found.finite.numpy(), np.cumsum(groups.sizes)[:-1])
            run.late.clear()
            self._add(run, x, y, [r[good[: len(r)]] for r, good in zip(rows, parts, strict=True)], divisors, settings)
            return
        if before is not None:  # whoever has no rows in this pass was filled up with somebody else's
            run.gradient[nobody] = before

    def _seed(self, labels: Tensor, each: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The gradient of the summed losses with respect to the model's output."""

        def seed(output: Tensor) -> Tensor:
            if self._loss is cross_entropy and output.dim() == 2:
                found = torch.softmax(output, 1)
                found.scatter_add_(1, labels.unsqueeze(1), _MINUS_ONE.to(found.dtype).expand(labels.shape[0], 1))
                return found if each is None else found.mul_(each.unsqueeze(1))
            with torch.enable_grad():
                output = output.detach().requires_grad_()
                return torch.autograd.grad(
                    self._loss(output, labels),
                    output,
                    torch.ones(len(labels), dtype=output.dtype) if each is None else each,
                )[0]

        return seed

    def _padded(self, sizes: Sequence[int], most: int) -> bool:
        """Whether one product over all clients, with rows that count nothing, is cheaper than a product a client."""
        idle = len(sizes) * most - sum(sizes)
        if not idle:
            return True
        return idle * self.program.work * 6 / _FLOPS < len(sizes) * len(self.program.layers) * _CALL_S


def _filled_up(
    rows: list[NDArray[np.int64]], sizes: list[int], most: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """As many rows of everybody: their places, and which of them are there, [clients, most].

    Rows that only fill up count zero, but zero times NaN is NaN: so a client's are its own first one, which counts anyhow.
    """
    real = np.arange(most) < np.asarray(sizes)[:, None]
    index = np.empty(real.shape, np.int64)
    index[:] = np.asarray([[r[0] if n else 0] for r, n in zip(rows, sizes, strict=True)])
    index[real] = np.concatenate(rows)
    return index, real


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def _plain_draws(members: Sequence[Member]) -> Iterator[list[Batch]]:
    """Each step's batches, of the members that still have one; those with more steps come first."""
    each = [
        plain_batches(m.settings, len(m.rows), m.settings.sampling_rate * m.declared_records, m.seed, m.batches)
        for m in members
    ]
    for step in range(members[0].steps):
        yield [next(batches) for m, batches in zip(members, each, strict=True) if m.steps > step]


def _private_draws(members: Sequence[Member], noise: SecureNoise) -> Iterator[list[Batch]]:
    """The same of protected work: Poisson batches that no seed tells."""
    sizes = np.asarray([len(m.rows) for m in members])
    rates = np.asarray([m.settings.sampling_rate for m in members])
    divisors = [m.settings.sampling_rate * m.declared_records for m in members]
    for step in range(members[0].steps):
        active = sum(m.steps > step for m in members)
        # One key for everybody's coins: each is as good as under a key of its own.
        coins = noise.bernoulli(int(sizes[:active].sum()), np.repeat(rates[:active], sizes[:active]))
        each = np.split(coins, np.cumsum(sizes[: active - 1]))
        yield [(np.flatnonzero(c), divisor) for c, divisor in zip(each, divisors, strict=False)]
