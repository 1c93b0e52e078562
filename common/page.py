"""What our self-contained HTML pages share: hostile text made safe to show, numbers in words, axes of inline SVG.

A page loads nothing and runs nothing: style and charts are inline, templates escape everything, and what could disguise
text (control, bidirectional and invisible characters, towers of accents) is replaced before it is escaped.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cache
from numbers import Real
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_T = TypeVar("_T")


@cache
def environment(package: str) -> Environment:
    """Templates of a package's `templates` folder: autoescaped, every string cleaned, a missing name an error."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"fixed": fixed, "exact": exact, "short": short, "up": up}
    return made


def clean(value: object) -> object:
    """Replace what could disguise text. Line breaks and tabs stay; what is not a string, or is markup, is returned as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    if value.isascii() and value.isprintable():
        return value
    kept, marks = [], 0
    for c in value:
        category = unicodedata.category(c)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        hidden = (category[0] == "C" and c not in "\n\t") or category in ("Zl", "Zp") or marks > 2
        kept.append("\ufffd" if hidden else c)
    return "".join(kept)


def number(value: object) -> float | None:
    """A real number, infinity included; None for what is missing, NaN or no number."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        return None
    return float(value)


def finite(values: Iterable[object]) -> list[float]:
    """The finite numbers among the values."""
    return [x for x in map(number, values) if x is not None and math.isfinite(x)]


def fixed(value: float, digits: int) -> str:
    """`digits` decimals; small values as 1e-4, infinity in words (missing and unbounded differ)."""
    if math.isinf(value):
        return "unbounded"
    if digits > 2 and value and abs(value) < 10.0 ** (1 - digits):
        return f"{Decimal(f'{value:.3g}').normalize():e}"
    return f"{value:,.{digits}f}"


def up(value: float, digits: int = 4) -> str:
    """`digits` decimals, rounded up: an ε is never shown smaller than it is (but for the last bits of a float)."""
    if math.isinf(value):
        return "unbounded"
    near = Decimal(f"{value:.12g}")
    return f"{near.quantize(Decimal(1).scaleb(-digits), ROUND_CEILING):,f}" if abs(value) < 1e12 else f"{value:.4g}"


def down(value: float, digits: int = 4) -> str:
    """`digits` decimals, rounded down: what is left of an ε is never shown larger than it is."""
    near = Decimal(f"{value:.12g}")
    return f"{near.quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR):,f}" if abs(value) < 1e12 else f"{value:.4g}"


def exact(value: float) -> str:
    """Every digit: for what was agreed, which must not be rounded."""
    if math.isinf(value):
        return "unbounded"
    digits = Decimal(repr(float(value))).normalize()
    return f"{digits:e}" if value and not 1e-3 <= abs(value) < 1e15 else f"{digits:f}"


def short(text: object, cells: int) -> str:
    """At most `cells` columns wide, an East Asian wide character counted as two."""
    kept, width = "", 0
    for c in str(text):
        width += 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if width > cells:
            return kept[:-1] + "…"
        kept += c
    return kept


def thin(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` (from 2) of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class Axis:
    """A linear scale from values to pixels, with its ticks as (pixel, label)."""

    def __init__(self, low: float, high: float, start: float, end: float, ticks: int, whole: bool = False) -> None:
        if high <= low:
            low, high = low - 0.5, low + 0.5
        self.low, self.high, self.start, self.end = low, high, start, end
        values = [t for t in _ticks(low, high, ticks) if not whole or t == int(t)]
        self.ticks = [(self(t), f"{t:,.10g}") for t in values]

    def __call__(self, value: float) -> float:
        """The pixel of a value; one outside the scale is put at its end."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def spread(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Positions near the wanted ones (ascending), at least `gap` apart, inside [low, high] where they fit."""
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + gap if placed else low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed
