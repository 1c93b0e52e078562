"""The layers that are known, of many clients at once: each computes with every client's own parameters, rows of the matrix
[clients, parameters]. Forward and backward are written by hand.

Rows of all clients stand one behind the other, each client's together (`Groups`). Two ways of multiplying: clients with the same number
of rows in one batched product, which is what small layers need; or client by client, which wastes nothing where large layers have rows
of unequal numbers.

Clipping needs each record's norm before gradients are summed. It is computed from what a layer gets and what flows back into it
(Goodfellow 1510.01799; Li et al. 2110.05679, section 4); only large convolutions and normalisations make gradients by record.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

aten = torch.ops.aten

Fast = tuple[Tensor, Callable[[Tensor], Tensor]]
"""What comes out of something without parameters, and what flows back through it."""


class Unsupported(Exception):
    """The model cannot be stacked; the text says why."""


class Groups:
    """Whose rows they are: `sizes[i]` rows of client i, one client behind the other.

    Attributes:
        sizes: rows by client.
        each: the number of rows of every client, where all have the same; else None.
        client: int64 [rows], the client of each row.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.rows = sum(self.sizes)
        self.each = self.sizes[0] if len(set(self.sizes)) == 1 else None
        self._client: Tensor | None = None

    @property
    def client(self) -> Tensor:
        """See the class."""
        if self._client is None:
            self._client = torch.from_numpy(np.repeat(np.arange(len(self.sizes)), self.sizes))
        return self._client

    def slices(self, of: int = 1) -> list[tuple[int, int, int]]:
        """(client, begin, end) of every client that has rows; in units of `of` a row."""
        found, at = [], 0
        for client, size in enumerate(self.sizes):
            if size:
                found.append((client, at * of, (at + size) * of))
            at += size
        return found

    def sums(self, values: Tensor) -> Tensor:
        """[rows, ...] -> [clients, ...], added up by client."""
        if self.each is not None:
            return values.view(len(self.sizes), self.each, *values.shape[1:]).sum(1)
        return values.new_zeros(len(self.sizes), *values.shape[1:]).index_add_(0, self.client, values)

    def spread(self, values: Tensor) -> Tensor:
        """[clients, k] -> [rows, k], each client's to its rows."""
        if len(self.sizes) == 1:
            return values.expand(self.rows, -1)
        return values.index_select(0, self.client)


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in a row of the matrix."""

    at: int
    shape: tuple[int, ...]


class Pass:
    """Forward and backward passes of some clients.

    Args:
        params: [clients, parameters].
        grads: the same, of the gradient; added to.
        private: gradients wait until every record's norm is known.

    Attributes:
        params, gradient: the two matrices.
        generators: of each client's dropout.
        groups: whose rows are in the pass.
        real: how many rows of each client are records; those behind them only fill up.
        late: of each layer: squared norms of its part of each record's gradient, and what adds the gradient of records that count so much.
    """

    def __init__(self, params: Tensor, grads: Tensor, private: bool) -> None:
        self.private = private
        self.generators: Sequence[torch.Generator] = ()
        self.groups, self.real = Groups([0] * len(params)), [0] * len(params)
        self.late: list[tuple[Callable[[], Tensor], Callable[[Tensor | None], None]]] = []
        self.params, self.gradient = params, grads
        self._views = dict[tuple[int, str], Any]()  # making one takes 5 µs, a step needs dozens

    def values(self, place: Place) -> Tensor:
        """A parameter of all clients, [clients, *shape]."""
        made: Tensor = self._kept(place, "values", lambda: _view(self.params, place))
        return made

    def transposed(self, place: Place) -> Tensor:
        """A matrix of all clients, [clients, k, m] of an [m, k]."""
        made: Tensor = self._kept(place, "transposed", lambda: self.values(place).transpose(1, 2))
        return made

    def row(self, place: Place) -> Tensor:
        """A vector of all clients, [clients, 1, m]."""
        made: Tensor = self._kept(place, "row", lambda: self.values(place).unsqueeze(1))
        return made

    def value(self, place: Place) -> tuple[Tensor, ...]:
        """A parameter of each client, [*shape]."""
        made: tuple[Tensor, ...] = self._kept(place, "value", lambda: self.values(place).unbind())
        return made

    def grads(self, place: Place) -> Tensor:
        """The gradient of a parameter of all clients, [clients, *shape]."""
        made: Tensor = self._kept(place, "grads", lambda: _view(self.gradient, place))
        return made

    def grad(self, place: Place) -> tuple[Tensor, ...]:
        """The gradient of a parameter of each client, [*shape]."""
        made: tuple[Tensor, ...] = self._kept(place, "grad", lambda: self.grads(place).unbind())
        return made

    def _kept(self, place: Place, what: str, make: Callable[[], Any]) -> Any:
        key = place.at, what
        if (found := self._views.get(key)) is None:
            found = self._views[key] = make()
        return found


def _view(matrix: Tensor, place: Place) -> Tensor:
    return matrix[:, place.at : place.at + math.prod(place.shape)].view(-1, *place.shape)


class Layer(ABC):
    """One layer with parameters.

    Attributes:
        weight, bias: where they stand.
        places: how often a record uses them, as it was last seen.
    """

    def __init__(self, name: str, module: nn.Module, places: dict[str, Place]) -> None:
        self.name, self.module = name, module
        if (weight := places.get("weight")) is None:
            raise Unsupported(f"layer '{name}' has no weight of its own")
        self.weight, self.bias = weight, places.get("bias")
        self.places = 1

    @property
    def products(self) -> int:
        """Multiplications of a record."""
        return math.prod(self.weight.shape) * self.places

    @abstractmethod
    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """[rows, ...] in, [rows, ...] out, and what `backward` needs."""

    @abstractmethod
    def backward(self, run: Pass, kept: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """The gradient with respect to x, when it is wanted; those of parameters go to run.grads, now or late."""

    def finish(self, run: Pass, norms: Callable[[], Tensor], add: Callable[[Tensor | None], None]) -> None:
        """Add the gradient now, or when it is known how much each record counts."""
        if run.private:
            run.late.append((norms, add))
        else:
            add(None)


def _times(groups: Groups, x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each client's places times its own matrix: [places, k] and [clients, k, m] (and [clients, 1, m]) -> [places, m].

    Every row has equally many places.
    """
    clients = len(groups.sizes)
    if groups.each is not None:
        by_client = x.view(clients, -1, x.shape[1])
        y = torch.bmm(by_client, weights) if bias is None else torch.baddbmm(bias, by_client, weights)
        return y.view(-1, y.shape[2])
    y = x.new_empty(x.shape[0], weights.shape[2])
    for c, begin, end in groups.slices(x.shape[0] // max(1, groups.rows)):
        if bias is None:
            torch.mm(x[begin:end], weights[c], out=y[begin:end])
        else:
            torch.addmm(bias[c], x[begin:end], weights[c], out=y[begin:end])
    return y


def _add_products(groups: Groups, dy: Tensor, x: Tensor, into: Tensor) -> None:
    """Added up over each client's places: [places, m] and [places, k] -> into [clients, m, k]."""
    if groups.each is not None:
        clients = len(groups.sizes)
        back = dy.view(clients, -1, dy.shape[1]).transpose(1, 2)
        into.baddbmm_(back, x.view(clients, -1, x.shape[1]))
        return
    for c, begin, end in groups.slices(x.shape[0] // max(1, groups.rows)):
        into[c].addmm_(dy[begin:end].t(), x[begin:end])


def _by_record(places: Tensor, factors: Tensor | None) -> Tensor:
    """What flows back into a record's places, by what the record counts: [places, m] and [rows] -> [places, m]."""
    if factors is None:
        return places
    rows, (n, m) = factors.shape[0], places.shape
    if rows == n:
        return places * factors.unsqueeze(1)
    return (places.view(rows, -1, m) * factors.view(-1, 1, 1)).view(n, m)


def _add_sums(groups: Groups, dy: Tensor, into: Tensor) -> None:
    """Added up over each client's places: [places, m] -> into [clients, m]."""
    if groups.each is not None:
        into.add_(dy.view(len(groups.sizes), -1, dy.shape[1]).sum(1))
    else:
        into.add_(groups.sums(dy.view(groups.rows, -1, dy.shape[1]).sum(1)))


def _squared_norms(rows: int, dy: Tensor, x: Tensor, biased: bool) -> Tensor:
    """Of each record's gradient of a matrix (and of its bias), squared: [places, m] and [places, k] -> [rows]."""
    k, m = x.shape[1], dy.shape[1]
    if x.shape[0] == rows:
        found: Tensor = torch.linalg.vector_norm(x, dim=1).square_()
        return (found.add_(1) if biased else found).mul_(torch.linalg.vector_norm(dy, dim=1).square_())
    x, dy = x.view(rows, -1, k), dy.view(rows, -1, m)
    if x.shape[1] * (k + m) < 2 * k * m:
        # Products that nearly cancel: in float32 a norm may come out as a fraction of itself.
        a, b = x.double(), dy.double()
        gram = torch.bmm(a, a.transpose(1, 2)) + int(biased)
        return (gram * torch.bmm(b, b.transpose(1, 2))).sum((1, 2)).clamp_min_(0).to(dy.dtype)
    found = torch.linalg.vector_norm(torch.bmm(dy.transpose(1, 2), x), dim=(1, 2)).square_()
    return found + dy.sum(1).square().sum(1) if biased else found


class StackedLinear(Layer):
    """nn.Linear."""

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """See `Layer`."""
        out, into = self.weight.shape
        seen = x.reshape(-1, into)
        self.places = seen.shape[0] // max(1, x.shape[0])
        if len(run.groups.sizes) == 1:
            y = F.linear(seen, run.value(self.weight)[0], None if self.bias is None else run.value(self.bias)[0])
        else:
            bias = None if self.bias is None else run.row(self.bias)
            y = _times(run.groups, seen, run.transposed(self.weight), bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out), seen

    def backward(self, run: Pass, kept: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """See `Layer`."""
        out, into = self.weight.shape
        seen, back = kept, dy.reshape(-1, out)

        def add(factors: Tensor | None) -> None:
            used = _by_record(back, factors)
            _add_products(run.groups, used, seen, run.grads(self.weight))
            if self.bias is not None:
                _add_sums(run.groups, used, run.grads(self.bias))

        self.finish(run, lambda: _squared_norms(dy.shape[0], back, seen, self.bias is not None), add)
        if not wanted:
            return None
        dx = _times(run.groups, back, run.values(self.weight))
        return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], into)


class StackedConv(Layer):
    """nn.Conv1d and nn.Conv2d.

    A small one is a product of what each place sees with each client's matrix, all clients at once. A large one is computed client by
    client: the library's convolutions are faster than any product, and what follows them finds their answer in the cache.

    Attributes:
        tail: what has no parameters and follows: pooling, ReLU.
    """

    def __init__(self, name: str, module: nn.Conv1d | nn.Conv2d, places: dict[str, Place]) -> None:
        super().__init__(name, module, places)
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise Unsupported(f"layer '{name}' pads by {module.padding_mode!r} or {module.padding!r}")
        self.stride, self.padding = list(module.stride), list(module.padding)
        self.dilation, self.group = list(module.dilation), module.groups
        if isinstance(module, nn.Conv1d):  # as an image one pixel high
            self.stride, self.padding, self.dilation = [1, *self.stride], [0, *self.padding], [1, *self.dilation]
            self.weight = Place(self.weight.at, (*self.weight.shape[:2], 1, self.weight.shape[2]))
        self.lines = isinstance(module, nn.Conv1d)
        self.tail: list[Callable[[Tensor], Fast]] = []

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """See `Layer`."""
        if self.lines:
            x = x.unsqueeze(2)
        x = _channels_last(x)
        out = self._out(x)
        self.places = out[0] * out[1]
        clients = len(run.groups.sizes)
        small = clients > 1 and self.group == 1 and len(x) * self.products < _SMALL * clients
        y, kept = self._at_once(run, x, out) if small else self._client_by_client(run, x)
        return y.squeeze(2) if self.lines else y, (small, x, kept)

    def backward(self, run: Pass, kept: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """See `Layer`."""
        small, x, seen = kept
        if self.lines:
            dy = dy.unsqueeze(2)
        dx = (self._at_once_back if small else self._client_by_client_back)(run, x, seen, dy, wanted)
        return dx.squeeze(2) if dx is not None and self.lines else dx

    def _through(self, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The answer after the tail, and what flows back through it, channels last."""
        backs = []
        for step in self.tail:
            y, back = step(y)
            backs.append(back)

        def pull(dy: Tensor) -> Tensor:
            for back in reversed(backs):
                dy = back(dy)
            return _channels_last(dy)

        return y, pull

    def _out(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        kernel = self.weight.shape[2:]
        high, wide = (
            (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for size, pad, dilation, k, stride in zip(
                x.shape[2:], self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )
        return high, wide

    # -- all clients at once

    def _matrix(self, run: Pass) -> Tensor:
        """[clients, out, height * width * channels], as patches lie."""
        return run.values(self.weight).permute(0, 1, 3, 4, 2).flatten(2)

    def _at_once(self, run: Pass, x: Tensor, out: tuple[int, int]) -> tuple[Tensor, Any]:
        patches = self._patches(x, out)[:, 0].flatten(0, 1)
        bias = None if self.bias is None else run.row(self.bias)
        y = _times(run.groups, patches, self._matrix(run).transpose(1, 2), bias)
        y, pull = self._through(y.view(len(x), *out, -1).permute(0, 3, 1, 2))
        return y, (patches, pull)

    def _at_once_back(self, run: Pass, x: Tensor, seen: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        patches, pull = seen
        dy = pull(dy)
        out, into, high, wide = self.weight.shape
        back = dy.permute(0, 2, 3, 1).reshape(-1, out)

        def add(factors: Tensor | None) -> None:
            used = _by_record(back, factors)
            made = patches.new_zeros(len(run.groups.sizes), out, high * wide * into)
            _add_products(run.groups, used, patches, made)
            run.grads(self.weight).add_(made.view(-1, out, high, wide, into).permute(0, 1, 4, 2, 3))
            if self.bias is not None:
                _add_sums(run.groups, used, run.grads(self.bias))

        self.finish(run, lambda: _squared_norms(len(dy), back, patches, self.bias is not None), add)
        if not wanted:
            return None
        spread = _times(run.groups, back, self._matrix(run)).view(len(dy), *dy.shape[2:], high, wide, into)
        rows, channels, *size = x.shape
        (up, left), (down, right) = self.padding, dy.shape[2:]
        dx = x.new_zeros(rows, size[0] + 2 * up, size[1] + 2 * left, channels)
        for i in range(high):
            for j in range(wide):
                at, by = (i * self.dilation[0], j * self.dilation[1]), self.stride
                dx[:, at[0] : at[0] + by[0] * down : by[0], at[1] : at[1] + by[1] * right : by[1]] += spread[
                    :, :, :, i, j
                ]
        return dx[:, up : up + size[0], left : left + size[1]].permute(0, 3, 1, 2)

    def _patches(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """What each place of the output saw: [rows, group, places, height * width * channels of the group]."""
        if any(self.padding):
            x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        x = x.permute(0, 2, 3, 1).contiguous()
        rows, _, _, channels = x.shape
        r, h, w, c = x.stride()
        _, into, high, wide = self.weight.shape
        if channels == 1:  # places together, for they lie together: seven times faster than five numbers at a time
            across = r, h * self.dilation[0], w * self.dilation[1], h * self.stride[0], w * self.stride[1]
            return x.as_strided((rows, high, wide, *places), across).reshape(rows, 1, high * wide, -1).transpose(2, 3)
        shape = (rows, *places, high, wide, channels)
        stride = (r, h * self.stride[0], w * self.stride[1], h * self.dilation[0], w * self.dilation[1], c)
        seen = x.as_strided(shape, stride).reshape(rows, places[0] * places[1], high * wide, self.group, into)
        return seen.permute(0, 3, 1, 2, 4).reshape(rows, self.group, places[0] * places[1], -1)

    # -- client by client

    def _client_by_client(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        weight, bias = run.value(self.weight), None if self.bias is None else run.value(self.bias)
        how = self.stride, self.padding, self.dilation, self.group
        made, pulls = [], []
        for c, begin, end in run.groups.slices():
            y, pull = self._through(F.conv2d(x[begin:end], weight[c], None if bias is None else bias[c], *how))
            made.append(y)
            pulls.append(pull)
        return made[0] if len(made) == 1 else torch.cat(made), pulls

    def _client_by_client_back(self, run: Pass, x: Tensor, pulls: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        weight, grads = run.value(self.weight), run.grad(self.weight)
        bias = None if self.bias is None else run.grad(self.bias)
        biases = None if self.bias is None else list(self.bias.shape)
        slices = run.groups.slices()
        asked = [wanted, not run.private, not run.private and bias is not None]
        parts, records = [], []
        for (c, begin, end), pull in zip(slices, pulls, strict=True):
            back, seen = pull(dy[begin:end]), x[begin:end]
            if run.private:
                records.append(self._by_record(seen, back))
            if asked[0] or asked[1]:
                dx, dw, db = aten.convolution_backward(
                    back, seen, weight[c], biases, self.stride, self.padding, self.dilation, False, [0, 0], self.group, asked
                )  # fmt: skip
                parts.append(dx)
            if not run.private:
                grads[c].add_(dw)
                if bias is not None:
                    bias[c].add_(db)
        if run.private:
            run.late.append(self._late(slices, records, grads, bias))
        if not wanted:
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_record(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each record's own gradient: cheaper here than to find its norm by another way and to multiply again.

        Returns:
            [rows, out * height * width * channels of the group]; of the bias [rows, out].
        """
        rows, out = dy.shape[:2]
        places = dy.permute(0, 2, 3, 1).reshape(rows, -1, self.group, out // self.group)
        patches = self._patches(x, dy.shape[2:])
        made = torch.matmul(places.permute(0, 2, 3, 1), patches).view(rows, -1)
        return made, None if self.bias is None else places.sum(1).view(rows, -1)

    def _late(
        self,
        slices: list[tuple[int, int, int]],
        records: list[tuple[Tensor, Tensor | None]],
        grads: Sequence[Tensor],
        bias: Sequence[Tensor] | None,
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor | None], None]]:
        """See `Pass.late`."""
        out, into, high, wide = self.weight.shape
        found = []
        for made, biases in records:
            squared = torch.linalg.vector_norm(made, dim=1).square_()
            found.append(squared if biases is None else squared.add_(biases.square().sum(1)))

        def add(factors: Tensor | None) -> None:
            assert factors is not None
            for (c, begin, end), (made, biases) in zip(slices, records, strict=True):
                counted = factors[begin:end]
                grads[c].add_((counted @ made).view(out, high, wide, into).permute(0, 3, 1, 2))
                if bias is not None and biases is not None:
                    bias[c].add_(counted @ biases)

        return lambda: torch.cat(found), add


_SMALL = 1_000_000
"""Multiplications of a client's step in a convolution, below which asking for it takes longer than computing it."""


def _channels_last(x: Tensor) -> Tensor:
    """[rows, channels, height, width] with the channels of a place together, which pooling is several times faster on."""
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] > 1 or x.stride(1) == 1:
        return x
    # One channel lies the same either way; only strides tell the library which way its answer is to lie.
    _, _, high, wide = x.shape
    return x.as_strided(x.shape, (high * wide, 1, wide, 1))


class StackedNorm(Layer):
    """nn.GroupNorm and nn.LayerNorm: the library normalises, scale and shift are each client's own."""

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """See `Layer`."""
        x = x.contiguous()
        module = self.module
        if isinstance(module, nn.GroupNorm):
            rows, channels = x.shape[:2]
            plain, mean, rstd = aten.native_group_norm(
                x, None, None, rows, channels, x[0, 0].numel(), module.num_groups, module.eps
            )
        else:
            assert isinstance(module, nn.LayerNorm)
            plain, mean, rstd = aten.native_layer_norm(x, list(module.normalized_shape), None, None, module.eps)
        y = plain * self._spread(run, self.weight, x)
        return y if self.bias is None else y + self._spread(run, self.bias, x), (x, plain, mean, rstd)

    def backward(self, run: Pass, kept: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """See `Layer`."""
        x, plain, mean, rstd = kept
        dy, groups = dy.contiguous(), run.groups
        scales, shifts = self._gather(dy * plain), None if self.bias is None else self._gather(dy)

        def norms() -> Tensor:
            found = scales.square().sum(1)
            return found if shifts is None else found + shifts.square().sum(1)

        def add(factors: Tensor | None) -> None:
            for place, values in ((self.weight, scales), (self.bias, shifts)):
                if place is not None and values is not None:
                    used = values if factors is None else values * factors[:, None]
                    run.grads(place).add_(groups.sums(used).view(-1, *place.shape))

        self.finish(run, norms, add)
        if not wanted:
            return None
        inner, module = dy * self._spread(run, self.weight, x), self.module
        if isinstance(module, nn.GroupNorm):
            rows, channels = x.shape[:2]
            size = x[0, 0].numel()
            made = aten.native_group_norm_backward(
                inner, x, mean, rstd, None, rows, channels, size, module.num_groups, [True, False, False]
            )
        else:
            assert isinstance(module, nn.LayerNorm)
            shape = list(module.normalized_shape)
            made = aten.native_layer_norm_backward(inner, x, shape, mean, rstd, None, None, [True, False, False])
        dx: Tensor = made[0]
        return dx

    def _spread(self, run: Pass, place: Place, x: Tensor) -> Tensor:
        """A parameter as it applies to x: its values lie along the channels (GroupNorm) or the last dimensions (LayerNorm)."""
        values = run.groups.spread(run.values(place).flatten(1))
        if isinstance(self.module, nn.GroupNorm):
            return values.view(*values.shape, *[1] * (x.dim() - 2))
        return values.view(len(values), *[1] * (x.dim() - 1 - len(place.shape)), *place.shape)

    def _gather(self, values: Tensor) -> Tensor:
        """[rows, ...] summed over everything that shares a parameter: [rows, parameters]."""
        if isinstance(self.module, nn.GroupNorm):
            return values.flatten(2).sum(2)
        size = math.prod(self.weight.shape)
        return values.reshape(len(values), -1, size).sum(1)


class StackedEmbedding(Layer):
    """nn.Embedding."""

    def forward(self, run: Pass, x: Tensor) -> tuple[Tensor, Any]:
        """See `Layer`."""
        if len(x) != run.groups.rows:
            raise Unsupported(f"layer '{self.name}' looks up something else than records")
        client = run.groups.client.view(-1, *[1] * (x.dim() - 1))
        return run.values(self.weight)[client, x], (x, client)

    def backward(self, run: Pass, kept: Any, dy: Tensor, wanted: bool) -> Tensor | None:
        """See `Layer`."""
        x, client = kept
        size = self.weight.shape[1]

        def norms() -> Tensor:
            words, flat = x.reshape(len(x), -1), dy.reshape(len(x), -1, size).double()
            same = (words[:, :, None] == words[:, None, :]).double()
            found: Tensor = (same * torch.bmm(flat, flat.transpose(1, 2))).sum((1, 2))
            return found.clamp_min_(0).to(dy.dtype)

        def add(factors: Tensor | None) -> None:
            used = dy if factors is None else dy * factors.view(-1, *[1] * (dy.dim() - 1))
            run.grads(self.weight).index_put_((client.expand_as(x), x), used, accumulate=True)

        self.finish(run, norms, add)
        return None


LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: StackedLinear,
    nn.Conv1d: StackedConv,
    nn.Conv2d: StackedConv,
    nn.GroupNorm: StackedNorm,
    nn.LayerNorm: StackedNorm,
    nn.Embedding: StackedEmbedding,
}
