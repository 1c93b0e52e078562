"""How a population's rows are dealt out to simulated clients. Every row goes to exactly one client."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import ConfigError

__all__ = ["dirichlet", "iid", "quantity_skew"]

Index = npt.NDArray[np.intp]
Labels = npt.NDArray[np.integer[Any]]

_TRIES = 100


def iid(labels: Labels, clients: int, rng: np.random.Generator) -> list[Index]:
    """Shuffled and dealt out evenly; returns each client's sorted row indices.

    Raises:
        ConfigError: no clients, or more clients than rows.
    """
    _feasible(len(labels), clients, 1)
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]


def dirichlet(labels: Labels, clients: int, alpha: float, rng: np.random.Generator, min_records: int) -> list[Index]:
    """Each class is divided among the clients by its own draw from Dirichlet(alpha).

    As Yurochkin et al. 1905.12022, section 4, drawn again until every client holds `min_records`. With a
    small alpha a client sees few classes. Where 100 draws do not do, clients below are filled up in the last one: each gets rows
    of whoever holds the most. Returns each client's sorted row indices.

    Raises:
        ConfigError: there are fewer rows than clients x `min_records`; alpha or clients not positive.
    """

    def draw() -> list[Index]:
        shares = [_deal(np.flatnonzero(labels == label), clients, alpha, rng) for label in np.unique(labels)]
        return [np.sort(np.concatenate([share[client] for share in shares])) for client in range(clients)]

    return _until(draw, len(labels), clients, alpha, rng, min_records)


def quantity_skew(
    labels: Labels, clients: int, alpha: float, rng: np.random.Generator, min_records: int
) -> list[Index]:
    """Sizes by one draw from Dirichlet(alpha), classes mixed alike everywhere (Li et al. 2102.02079).

    Drawn again and filled up as `dirichlet`. Returns each client's sorted row indices.

    Raises:
        ConfigError: as `dirichlet`.
    """
    return _until(
        lambda: [np.sort(part) for part in _deal(np.arange(len(labels)), clients, alpha, rng)],
        len(labels),
        clients,
        alpha,
        rng,
        min_records,
    )


def _deal(rows: Index, clients: int, alpha: float, rng: np.random.Generator) -> list[Index]:
    shares = rng.dirichlet(np.full(clients, alpha))
    cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.intp)
    return list(np.split(rng.permutation(rows), cuts))


def _until(
    draw: Callable[[], list[Index]], rows: int, clients: int, alpha: float, rng: np.random.Generator, min_records: int
) -> list[Index]:
    _feasible(rows, clients, min_records)
    if not (0 < alpha < float("inf")):
        raise ConfigError(
            f"alpha is {alpha}", "Allowed is a finite number above 0; 0.1 is very uneven, 100 nearly even."
        )
    for _ in range(_TRIES):
        parts = draw()
        if min(map(len, parts)) >= min_records:
            return parts
    return _filled_up(parts, rng, min_records)


def _filled_up(parts: list[Index], rng: np.random.Generator, min_records: int) -> list[Index]:
    """Rows one by one from whoever holds the most, chance ones, until everybody holds `min_records`."""
    held = [list(rng.permutation(part)) for part in parts]
    largest = [(-len(rows), client) for client, rows in enumerate(held)]
    heapq.heapify(largest)
    for rows in [rows for rows in held if len(rows) < min_records]:
        while len(rows) < min_records:
            size, giver = largest[0]  # above min_records: there are rows for everybody, and somebody is below
            rows.append(held[giver].pop())
            heapq.heapreplace(largest, (size + 1, giver))
    return [np.sort(np.array(rows, np.intp)) for rows in held]


def _feasible(rows: int, clients: int, min_records: int) -> None:
    if clients < 1 or min_records < 0:
        raise ConfigError(
            f"clients is {clients}, min_records {min_records}", "Allowed: clients >= 1, min_records >= 0."
        )
    if clients * min_records > rows:
        raise ConfigError(
            f"{rows} records cannot give each of {clients} clients {min_records}",
            "Use fewer clients or a smaller min_records.",
        )
