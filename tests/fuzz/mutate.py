"""Hostile changes of bytes and of JSON, drawn from a seeded generator: what a fuzzer without coverage, or a liar with a key, would try."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 16, 255, 256, 1000, 4096, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**9,
    10**9 + 1, 10**18, 10**30, 10**400, -(2**63), True, False, None, 0.5, 1e308, 1e400, -0.0,
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "0", "-0", "1", "-1", "0.0", "0.1", "1.0", "1e-320", "5e-324", "1e-9", "1e9", "1e308", "1e309", "1e400", "inf",
    "-inf", "nan", "NaN", "Infinity", "0x10", "1_000", "١", "1e", "+1", ".5", "5.", "0.30", "0.3", "0.29999999999999998", "1" * 400,
    "a" * 200, "a" * 201, "a" * 64, "0" * 64, "f" * 64, "A" * 64, "0" * 32, "\x00", "\n", "\r\n", "\u202e", "\ud800", "\U0001f600",
    "../x", "/etc/passwd", ".", "..", "a/b", "C:\\x", "%s%n", "{}", "null", "true", "ok", "failed", "none", "first", "disjoint",
    "version", "overlap", "train", "evaluate", "open", "closed", "expired", "cancelled", "genesis", "dataset", "charter", "budget",
    "hold", "debit", "commit", "public", "refuse", "release", "restored", "recovered", "undisclosed", "run", "ask", "answers",
    "round", "close", "none/1", "poisson-gaussian/1", "poisson-gaussian/2", "2026-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00Z", "2026-02-30T00:00:00Z", "10000-01-01T00:00:00Z", "2026-06-01", "ada", "ben", "cy", "eve", "coordinator",
    "partner", "population", "float32", "int64", "F32", "BOOL", "run-1",
)  # fmt: skip


def splice(data: bytes, rng: random.Random, others: Sequence[bytes] = (), most: int = 4) -> bytes:
    """Bytes changed, cut out, put in, doubled, moved, or taken from another example, in up to `most` places."""
    for _ in range(rng.randint(1, most)):
        at = rng.randint(0, len(data))
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 16, 64, 512)))
        match rng.randrange(9):
            case 0:
                data = data[:at] + data[to:]
            case 1:
                data = data[:at] + rng.randbytes(rng.choice((1, 2, 4, 8, 32))) + data[at:]
            case 2:
                data = data[:to] + data[at:]
            case 3:
                data = data[:at]
            case 4:
                data = data[to:] + data[:to]
            case 5 if others:
                other = rng.choice(others)
                cut = rng.randint(0, len(other))
                data = data[:at] + other[cut : cut + rng.choice((4, 32, 256, 4096))] + data[to:]
            case 6:
                number = rng.choice((0, 1, 127, 128, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                size = rng.choice((1, 2, 4, 8))
                data = (
                    data[:at] + (number % 256**size).to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]
                )
            case 7 if data:
                other_at = rng.randrange(len(data))
                data = data[:at] + data[other_at : other_at + 16] + data[to:]
            case _:
                if data:
                    at %= len(data)
                    data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data


def bent(value: Any) -> bytes:
    """JSON in the layout that is signed, whatever is in it: floats, lone surrogates, anything that a signer may write."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def tree(data: bytes, rng: random.Random, most: int = 3) -> bytes:
    """JSON with some of its nodes changed; bytes that are no JSON are spliced."""
    try:
        value = json.loads(data)
        for _ in range(rng.randint(1, most)):
            value = node(value, rng)
        return json.dumps(value).encode()
    except (ValueError, RecursionError, TypeError, OverflowError):
        return splice(data, rng)


def node(whole: Any, rng: random.Random) -> Any:
    """The value with one of its nodes changed: each level is as likely to be met."""
    places: list[list[Any]] = [[]]
    _places(whole, [], places)
    path = rng.choice(places)
    other = _at(whole, rng.choice(places))
    return _changed(whole, path, lambda found: _instead(found, other, rng))


def _places(value: Any, path: list[Any], found: list[list[Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append([*path, key])
        if len(path) < 40:
            _places(inner, [*path, key], found)


def _at(value: Any, path: list[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed(value: Any, path: list[Any], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    key, *rest = path
    made = list(value) if isinstance(value, list) else dict(value)
    made[key] = _changed(value[key], rest, change)
    return made


def _instead(value: Any, other: Any, rng: random.Random) -> Any:
    if rng.randrange(8) == 0:
        return other
    if rng.randrange(8) == 0:
        return rng.choice((None, True, 0, "", [], {}, [value], {"x": value}, [[]], *NUMBERS, *TEXTS))
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        match rng.randrange(4):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice(TEXTS): other}
            case 2:
                return {rng.choice(TEXTS) if k == key else k: v for k, v in value.items()}
            case _:
                return {**value, key: value[rng.choice(sorted(value))]}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        to = rng.randrange(len(value) + 1)
        match rng.randrange(7):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value[:at], value[at], *value[at:]]
            case 2:
                return value[::-1]
            case 3:
                return [*value[:at], other, *value[at:]]
            case 4:
                moved = value[:at] + value[at + 1 :]
                return [*moved[:to], value[at], *moved[to:]]
            case 5:
                return value[:at]
            case _:
                return value * rng.choice((2, 20)) if len(value) < 200 else []
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*NUMBERS, value + 1, value - 1, -value, value * 2, str(value), float(value % 2**60)))
    if isinstance(value, str):
        match rng.randrange(5):
            case 0:
                return splice(value.encode("utf-8", "surrogatepass"), rng, most=1).decode("utf-8", "replace")
            case 1:
                return value * rng.choice((2, 100)) if len(value) < 1000 else ""
            case 2:
                return rng.choice((value.upper(), value + " ", value[:-1], value + "0", "-" + value, value + "\n"))
            case _:
                return rng.choice(TEXTS)
    return rng.choice((*NUMBERS, *TEXTS))
