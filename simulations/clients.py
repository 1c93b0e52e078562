"""A population's clients: whose rows are whose, and each client's rows when they are asked for, never all at once.

The data set is in memory once (or mapped from a file); a client is the places of its rows in it. Where there are more clients than a
deal could serve, each draws its rows from (seed, number), so a million clients are no more than two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..clients.datasets import Rows, Split, held_out, split_rows
from ..common.config import Federation, Population
from ..common.errors import ConfigError, counted
from ..common.tasks import Task
from . import partitions, sources
from .population import client_name, client_number

EVALUATED = 1000
"""Public test rows of a data set go to so many clients at most: asking a million for their scores would take longer than training."""


class Clients(Protocol):
    """Every client's rows, produced when they are asked for. Clients are numbered from 0."""

    def __len__(self) -> int:
        """How many there are."""

    @property
    def declared_records(self) -> int:
        """What a client declares, the mean over all of them."""

    @property
    def largest(self) -> int:
        """What any of them declares at most."""

    @property
    def evaluated(self) -> int:
        """How many of them, the first ones, hold rows that the model is measured on."""

    def open(self, number: int) -> Split:
        """One client's rows."""


class ClientDatasets(Mapping[str, "OneClient"]):
    """Clients' data sets by name, made when they are asked for."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def __getitem__(self, name: str) -> OneClient:
        return OneClient(self._clients, client_number(name))

    def __iter__(self) -> Iterator[str]:
        return (client_name(number, len(self)) for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._clients)


@dataclass(frozen=True)
class OneClient:
    """One client's data set, as a node opens it."""

    clients: Clients
    number: int

    def open(self) -> Split:
        """Its rows."""
        return self.clients.open(self.number)


@dataclass(frozen=True, eq=False)
class Dealt:
    """Every row of a data set went to one client.

    Args:
        rows: to train on and, where the data set has no test rows of its own, to hold out.
        test: public rows of the data set.
        train, held_out: by client, the places of its rows; held-out ones in `test` if that is there.
    """

    rows: Rows
    test: Rows | None
    train: list[npt.NDArray[np.intp]]
    held_out: list[npt.NDArray[np.intp]]

    def __len__(self) -> int:
        return len(self.train)

    def declared(self, number: int) -> int:
        """Two significant digits: a declared size is agreed and public, and need not be exact."""
        size = len(self.train[number])
        return round(size, 2 - len(str(size))) if size > 99 else size

    @property
    def declared_records(self) -> int:
        """See `Clients`."""
        return max(1, round(float(np.mean([self.declared(number) for number in range(len(self))]))))

    @property
    def largest(self) -> int:
        """See `Clients`."""
        return max(self.declared(number) for number in range(len(self)))

    @property
    def evaluated(self) -> int:
        """See `Clients`."""
        return next((n for n in range(len(self), 0, -1) if len(self.held_out[n - 1])), 0)

    def open(self, number: int) -> Split:
        """See `Clients`."""
        aside = self.rows if self.test is None else self.test
        return Split(
            self.rows.take(torch.from_numpy(self.train[number])), aside.take(torch.from_numpy(self.held_out[number]))
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """Each client draws `records` different rows of its own mix of classes; a row may be several clients'."""

    rows: Rows
    test: Rows | None
    clients: int
    records: int
    alpha: float | None
    fraction: float
    seed: int
    by_class: list[npt.NDArray[np.intp]]

    def __len__(self) -> int:
        return self.clients

    def declared(self, number: int) -> int:
        """As everybody."""
        return self.declared_records

    @property
    def declared_records(self) -> int:
        """See `Clients`. Without test rows of the data set's own, a share of each client's rows is held out."""
        return self.records if self.test is not None else max(1, round(self.records * (1 - self.fraction)))

    @property
    def largest(self) -> int:
        """See `Clients`."""
        return self.declared_records

    @property
    def evaluated(self) -> int:
        """See `Clients`."""
        return min(self.clients, EVALUATED) if self.fraction else 0

    def open(self, number: int) -> Split:
        """See `Clients`."""
        rng = np.random.default_rng([self.seed, number])
        if self.alpha is None:
            places = rng.choice(len(self.rows), self.records, replace=False)
        else:
            mix = rng.dirichlet(np.full(len(self.by_class), self.alpha))
            counts = _counts(self.records, mix, np.asarray([len(c) for c in self.by_class]), rng)
            chosen = zip(self.by_class, counts, strict=True)
            places = np.concatenate([rng.choice(c, n, replace=False) for c, n in chosen if n])
            rng.shuffle(places)
        mine = self.rows.take(torch.from_numpy(np.asarray(places, np.int64)))
        if self.test is None:
            return split_rows(mine, self.fraction, self.seed)
        share = len(self.test) / max(1, self.evaluated)
        begin, end = (round(share * at) if number < self.evaluated else 0 for at in (number, number + 1))
        return Split(mine, Rows(self.test.x[begin:end], self.test.y[begin:end]))


def _counts(
    records: int, mix: npt.NDArray[np.float64], there: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """How many rows of each class, by its mix; of a class no more than there are, and the rest from the others."""
    counts = np.minimum(rng.multinomial(records, mix), there)
    while missing := records - int(counts.sum()):
        room = there - counts
        left = mix * (room > 0)
        left = left if left.sum() > 0 else room.astype(np.float64)
        counts = np.minimum(counts + rng.multinomial(missing, left / left.sum()), there)
    return counts


def clients_of(config: Federation, base: Path, task: Task) -> Dealt | Drawn:
    """A population's clients.

    Raises:
        ConfigError, DataError: as `population_clients`.
    """
    assert config.population is not None
    fraction = config.evaluation.test_fraction if config.evaluation.kind != "none" else 0.0
    return population_clients(config.population, fraction, config.seed, task, base)


def population_clients(config: Population, fraction: float, seed: int, task: Task, base: Path) -> Dealt | Drawn:
    """The clients of a configuration.

    Args:
        task: what is learned; the rows must be of its shape and classes.
        base: the folder that a path of a data set starts from.
        fraction: of rows that are held out for evaluation.

    Raises:
        ConfigError, DataError: a data set that does not exist or fit, or cannot be dealt like that.
    """
    if "/" in config.dataset:
        rows, test, owners = sources.arrays(base / config.dataset, task)
    else:
        (rows, test), owners = sources.population(config.dataset), None
        for some in (rows, *([test] if test is not None else [])):
            sources.check(f"data set {config.dataset}", some, task)
    if not fraction:
        test = None if test is None else Rows(test.x[:0], test.y[:0])
    chosen, clients, labels = config.partition, config.clients, rows.y.numpy()
    if chosen.kind == "drawn":
        assert chosen.records is not None
        if chosen.records > len(rows):
            raise ConfigError(
                f"partition: records: {chosen.records}, but the data set has {len(rows)} rows",
                "A client's rows are different ones: draw fewer.",
            )
        by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)] if chosen.alpha is not None else []
        return Drawn(rows, test, clients, chosen.records, chosen.alpha, fraction, seed, by_class)
    if chosen.kind == "natural":
        if owners is None:
            raise ConfigError(
                f"data set {config.dataset} does not say whose its rows are",
                "partition kind natural needs a client.npy in the data set's folder. Others: iid, dirichlet, quantity, drawn.",
            )
        if clients != (there := int(owners.max(initial=-1)) + 1):
            raise ConfigError(f"population.clients is {clients}, client.npy has {there}", f"Write clients: {there}.")
    elif clients > len(rows):
        raise ConfigError(
            f"population.clients is {clients}, the data set has {len(rows)} rows",
            "Every client needs at least one row. With partition: {kind: drawn, records: N} clients share rows.",
        )
    rng = np.random.default_rng(seed)
    alpha = chosen.alpha or 1.0
    deal: Callable[[], list[npt.NDArray[np.intp]]] = {
        "iid": lambda: partitions.iid(labels, clients, rng),
        "dirichlet": lambda: partitions.dirichlet(labels, clients, alpha, rng, chosen.min_records),
        "natural": lambda: _natural(owners, clients),
        "quantity": lambda: partitions.quantity_skew(labels, clients, alpha, rng, chosen.min_records),
    }[chosen.kind]
    dealt = deal()
    if test is not None:
        holders = min(clients, EVALUATED)
        parts = np.array_split(rng.permutation(len(test)), holders)
        return Dealt(rows, test, dealt, [*parts, *[np.zeros(0, np.intp)] * (clients - holders)])
    split = [_split_places(rows, places, fraction, seed) for places in dealt]
    return Dealt(rows, None, [mine for mine, _ in split], [away for _, away in split])


def _natural(owners: npt.NDArray[np.int64] | None, clients: int) -> list[npt.NDArray[np.intp]]:
    assert owners is not None
    order = np.argsort(owners, kind="stable")
    dealt = np.split(order, np.cumsum(np.bincount(owners, minlength=clients))[:-1])
    if empty := sum(not len(places) for places in dealt):
        raise ConfigError(
            f"{counted(empty, 'client')} of {clients} in client.npy without rows", "Number them without gaps."
        )
    return dealt


def _split_places(
    rows: Rows, places: npt.NDArray[np.intp], fraction: float, seed: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """As `split_rows`, of the rows at these places: places instead of rows."""
    if not fraction:
        return places, places[:0]
    away = held_out(rows.take(torch.from_numpy(places)), fraction, seed)
    return places[~away], places[away]
