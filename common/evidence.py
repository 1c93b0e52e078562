"""Published examples that under-count, recomputed: what was claimed beside what is true. `hansa evidence accounting` shows it.

Nothing here is a stored result. Each example is the published *settings*; both figures are computed from them when the
command runs. What is claimed is computed the way the source computes it; what is true by `accounting.odometer` (never below
the truth, at most 1 % or 0.001 above), or, for shuffled batches, for which nobody has a tight answer, by a lower bound.
A figure that the source prints is kept beside the recomputed one, so that a reader sees whether they agree.

Unless a row says otherwise: record level, add-or-remove-one, noise added by the client to every step, and an adversary
who sees what leaves after every step (which is what DP-SGD's accountants assume, and more than a coordinator sees).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import log_ndtr

from .accounting import PrivacyEvent, odometer
from .page import Axis, environment

__all__ = [
    "LIMITS",
    "MISTAKES",
    "Example",
    "Mistake",
    "as_fields",
    "clt_epsilon",
    "examples",
    "page",
    "shuffle_lower_bound",
]


@dataclass(frozen=True)
class Mistake:
    """One way to under-count, in plain words."""

    title: str
    what: str
    instead: str


MISTAKES = {
    "fresh-accountant": Mistake(
        "A new accountant every round",
        "The client makes a new accountant in every round and reports what that one has seen: one round. Everything it spent "
        "in the rounds before is forgotten, and the reported epsilon stays the same however long the training runs.",
        "The count belongs to the dataset and is kept on disk, across rounds, runs, restarts and coordinators.",
    ),
    "rounds-as-epochs": Mistake(
        "Rounds passed as epochs",
        "The noise is calibrated for as many epochs as there are rounds, but a round is not an epoch: it is a fixed number of "
        "steps. Small sites go over their data many times in one round; each pass costs, and none is counted.",
        "Count steps. The event that is charged and the noise that is drawn come from one object.",
    ),
    "shuffled-batches": Mistake(
        "Shuffled batches under a Poisson accountant",
        "The accountant assumes that every record joins every step by a coin of its own. The data loader shuffles and deals "
        "out batches of fixed size instead: then each record is in exactly one batch an epoch, and hides less.",
        "Draw Poisson batches (empty ones still add noise) at the rate that is charged, or charge every step in full.",
    ),
    "clt": Mistake(
        "The central-limit approximation of Gaussian DP",
        "The composition is replaced by the Gaussian mechanism that it approaches when steps become many. Before that limit "
        "the approximation is no bound, in either direction; with few steps or little noise it is far too low.",
        "Compose numerically with an upper bound (privacy loss distributions), or use Rényi DP.",
    ),
}  # fmt: skip

LIMITS = (
    "What is recomputed is accounting: the epsilon of the mechanism that the settings describe. Whether a program really ran "
    "with these settings, and drew its noise well, is not examined.",
    "The sources were read in the versions named; they may have changed since. A source that under-counts in one place may "
    "be excellent in all others.",
    "The lower bound for shuffling holds for some data set, model and order of queries (the worst case that an epsilon is "
    "about). It does not say that every training leaks that much.",
)


@dataclass(frozen=True)
class Example:
    """One published setting, claimed beside true.

    Attributes:
        mistake: a key of `MISTAKES`.
        where: whose setting it is.
        published: the setting is the source's own; False: its code, at another size.
        stated: the epsilon that the source prints, if it prints one.
        claimed: the same, recomputed as the source computes it.
        true: what holds; `bound` says which way.
        steps: noisy steps in truth, each at `sampling_rate` and `noise_multiplier`.
    """

    mistake: str
    where: str
    published: bool
    stated: float | None
    claimed: float
    true: float
    bound: Literal["tight", "at least"]
    sampling_rate: float
    noise_multiplier: float
    claimed_steps: int
    steps: int
    delta: float
    note: str
    source: str
    unit: str = "record"
    adjacency: str = "add-or-remove-one"
    noise: str = "local, Gaussian, every step"
    adversary: str = "whoever sees what leaves after every step"

    @property
    def basis(self) -> float:
        """The claim to compare with: as stated, else as recomputed."""
        return self.claimed if self.stated is None else self.stated

    @property
    def factor(self) -> float:
        """True over claimed."""
        return self.true / self.basis


def examples(told: Callable[[int, int, str], None] = lambda *_: None) -> list[Example]:
    """Everything, recomputed now (a few seconds).

    Args:
        told: called before each kind of mistake with how many are done, of how many, and its title.
    """
    kinds = {
        "fresh-accountant": _fresh_accountant,
        "rounds-as-epochs": _rounds_as_epochs,
        "shuffled-batches": _shuffled,
        "clt": _clt,
    }
    found: list[Example] = []
    for done, (mistake, recomputed) in enumerate(kinds.items()):
        told(done, len(kinds), MISTAKES[mistake].title)
        found += recomputed()
    return found


def as_fields(found: Iterable[Example]) -> list[dict[str, Any]]:
    """For programs."""
    return [{**asdict(e), "factor": e.factor, "too_low": 1 - e.basis / e.true} for e in found]


def _epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    return odometer([PrivacyEvent(q, sigma, steps)], delta)


# -- a new accountant every round ----------------------------------------------------------------------------------------

_FLOWER = (
    "Flower, examples/opacus (opacus_fl/client_app.py makes PrivacyEngine() in the training handler and reports its "
    "get_epsilon; task.py, pyproject.toml), as of fdef7afb, March 2026"
)


def _fresh_accountant() -> list[Example]:
    # CIFAR-10's 50,000 training images over 2 clients, 80 % of them to train on, batches of 32, one epoch a round,
    # 3 rounds, delta 1e-5, noise 1.0 or 1.5 by client. Opacus takes 1/len(loader) as the rate.
    batches = math.ceil(0.8 * 25_000 / 32)
    settings = [(1.0, batches, 3, True, "the example, client 0"), (1.5, batches, 3, True, "the example, client 1")]
    # The same code where 240 records are the whole partner (Cleveland in configs/heart.yaml) and a run has 10 rounds.
    settings.append((1.0, math.ceil(240 / 32), 10, False, "the same code, a hospital of 240 records, 10 rounds"))
    return [
        Example(
            mistake="fresh-accountant",
            where=where,
            published=published,
            stated=None,
            claimed=_epsilon(1 / length, sigma, length, 1e-5),
            true=_epsilon(1 / length, sigma, length * rounds, 1e-5),
            bound="tight",
            sampling_rate=1 / length,
            noise_multiplier=sigma,
            claimed_steps=length,
            steps=length * rounds,
            delta=1e-5,
            note=f"{rounds} rounds of {length} steps; one round is counted",
            source=_FLOWER,
        )
        for sigma, length, rounds, published, where in settings
    ]


# -- rounds passed as epochs ---------------------------------------------------------------------------------------------

_FLAMBY = (
    "FLamby (Ogier du Terrail et al. 2210.04620), flamby/strategies/utils.py: make_private_with_epsilon(epochs=nrounds); "
    "flamby/dp_example/create_fed_heart_disease_dp_results.py, as of edacf54d, June 2024"
)
# Centre: records to train on (FLamby's README of Fed-Heart-Disease), and the noise multiplier that Opacus 1.6 finds for
# epsilon 1 at delta 1e-4 over 15 epochs. tests/common/test_evidence.py asks Opacus for them again.
FLAMBY_CENTRES = {
    "Cleveland": (199, 1.953125),
    "Hungary": (172, 2.080078125),
    "Switzerland": (30, 4.5703125),
    "Long Beach": (85, 2.83203125),
}
FLAMBY_BATCH, FLAMBY_UPDATES, FLAMBY_EPSILON, FLAMBY_DELTA = 4, 100, 1.0, 1e-4
FLAMBY_ROUNDS = (486 // 4 // FLAMBY_BATCH) * 50 // FLAMBY_UPDATES  # its get_nb_max_rounds: 15


def _rounds_as_epochs() -> list[Example]:
    made = []
    for centre, (records, sigma) in FLAMBY_CENTRES.items():
        length = math.ceil(records / FLAMBY_BATCH)
        counted, steps = FLAMBY_ROUNDS * length, FLAMBY_ROUNDS * FLAMBY_UPDATES
        made.append(
            Example(
                mistake="rounds-as-epochs",
                where=f"Fed-Heart-Disease, {centre}",
                published=True,
                stated=FLAMBY_EPSILON,
                claimed=_epsilon(1 / length, sigma, counted, FLAMBY_DELTA),
                true=_epsilon(1 / length, sigma, steps, FLAMBY_DELTA),
                bound="tight",
                sampling_rate=1 / length,
                noise_multiplier=sigma,
                claimed_steps=counted,
                steps=steps,
                delta=FLAMBY_DELTA,
                note=f"{FLAMBY_ROUNDS} rounds of {FLAMBY_UPDATES} steps; {FLAMBY_ROUNDS} epochs of {length} are counted. Computed for "
                "Poisson batches; the code deals them from a shuffled loader",
                source=_FLAMBY,
            )
        )
    return made


# -- shuffled batches ----------------------------------------------------------------------------------------------------


def shuffle_lower_bound(sigma: float, batches: int, delta: float) -> float:
    """A lower bound for ε of one epoch of DP-SGD over shuffled batches, zero-out adjacency.

    All records but one have clipped gradient −1 at every query and the one has +1, or is zeroed out. Up to a shift the
    epoch's outputs are then P = 1/T·Σ_t N(2e_t, σ²I) and Q = 1/T·Σ_t N(e_t, σ²I) in T dimensions, one a batch (Chua et al.
    2403.17673; google-research, dpsgd_batch_sampler_accounting, class ShuffleAccountant). (ε, δ)-DP means
    P(E) ≤ e^ε·Q(E) + δ for every event E, so each E gives ε ≥ ln((P(E) − δ)/Q(E)). Taken are E = {max_t x_t > C}, with
    P(E) = 1 − Φ((C − 2)/σ)·Φ(C/σ)^(T−1), and Q(E) with 1 for the 2; the best C of a grid, as any C is valid.
    """
    caps = np.linspace(0.0, 2.0 + 40.0 * sigma, 200_001)

    def above(mean: float) -> Any:
        return -np.expm1(log_ndtr((caps - mean) / sigma) + (batches - 1) * log_ndtr(caps / sigma))

    upper, lower = above(2.0), above(1.0)
    kept = (upper > 1.001 * delta) & (lower > 1e-12)  # far from where floats have no digits left
    if not kept.any():
        return 0.0
    return max(0.0, float(np.max(np.log((upper[kept] - delta) / lower[kept]))))


_ZERO_OUT = "zero-out one record (for Poisson batches the same as add-or-remove-one)"
_CHUA = (
    "the bound is of Chua et al., How Private are DP-SGD Implementations? (ICML 2024), 2403.17673; that it shows in trained "
    "models: Annamalai et al., To Shuffle or not to Shuffle (NDSS 2026), 2411.10614. That the practice is common: both"
)


def _shuffled() -> list[Example]:
    settings = [
        (0.5, 10_000, 1e-6, "one epoch of 10,000 batches"),
        (0.5, 1_000, 1e-5, "one epoch of 1,000 batches"),
        (1.0, 625, 1e-5, "one epoch of Flower's example, if its batches were shuffled (Opacus draws Poisson)"),
    ]
    return [
        Example(
            mistake="shuffled-batches",
            where=where,
            published=False,
            stated=None,
            claimed=_epsilon(1 / batches, sigma, batches, delta),
            true=shuffle_lower_bound(sigma, batches, delta),
            bound="at least",
            sampling_rate=1 / batches,
            noise_multiplier=sigma,
            claimed_steps=batches,
            steps=batches,
            delta=delta,
            note="claimed: Poisson sampling; true: a lower bound for shuffled batches, so the truth may be worse",
            source=_CHUA,
            adjacency=_ZERO_OUT,
        )
        for sigma, batches, delta, where in settings
    ]


# -- the central limit ---------------------------------------------------------------------------------------------------


def clt_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """ε by the central-limit approximation, μ = q·√(T·(e^(1/σ²) − 1)) (Bu et al. 1911.11607), never to be used.

    As TensorFlow Privacy's and Opacus's gdp accountants compute it for Poisson batches. No bound in either direction.
    """
    mu = q * math.sqrt(steps * math.expm1(sigma**-2))
    return odometer([PrivacyEvent(1.0, 1 / mu, 1)], delta)  # that of one Gaussian mechanism of sensitivity μ


_BU = "Bu, Dong, Long & Su, Deep Learning with Gaussian Differential Privacy (HDSR 2020), 1911.11607, Fig. 4"
_GDP = (
    "Opacus, accountants/gdp.py (which warns that it can underestimate, and cites Gopi et al. 2106.02848); settings of "
    "Flower's examples/opacus and of our own"
)


def _clt() -> list[Example]:
    mnist = 256 / 60_000
    settings = [
        (mnist, 1.06, round(20 / mnist), 1.34, "MNIST, 20 epochs at the noise that the approximation allows", _BU, True),
        (mnist, 0.638, round(70 / mnist), 8.68, "MNIST, 70 epochs at the noise that the approximation allows", _BU, True),
        (1 / 625, 1.0, 625, None, "one round of Flower's example, accountant gdp", _GDP, False),
        (1 / 8, 1.0, 8, None, "one round at a hospital of 240 records, accountant gdp", _GDP, False),
        (1 / 1000, 0.6, 3000, None, "3 epochs of 1,000 batches, little noise", _GDP, False),
        (1 / 1000, 0.5, 1000, None, "one epoch of 1,000 batches, less noise", _GDP, False),
    ]  # fmt: skip
    return [
        Example(
            mistake="clt",
            where=where,
            published=published,
            stated=stated,
            claimed=clt_epsilon(q, sigma, steps, 1e-5),
            true=_epsilon(q, sigma, steps, 1e-5),
            bound="tight",
            sampling_rate=q,
            noise_multiplier=sigma,
            claimed_steps=steps,
            steps=steps,
            delta=1e-5,
            note=f"mu = {q * math.sqrt(steps * math.expm1(sigma**-2)):.3f} in the limit",
            source=source,
        )
        for q, sigma, steps, stated, where, source, published in settings
    ]


# -- page ----------------------------------------------------------------------------------------------------------------


def page(found: list[Example], made: str, software: str) -> str:
    """Everything as one HTML page that loads nothing: for reading and printing.

    Args:
        made: when, as text.
        software: what computed it.
    """
    groups = []
    for key, mistake in MISTAKES.items():
        mine = [e for e in found if e.mistake == key]
        groups.append(
            {
                "mistake": mistake,
                "rows": mine,
                "chart": _chart(mine),
                "sources": list(dict.fromkeys(e.source for e in mine)),
            }
        )
    view = {"groups": groups, "limits": LIMITS, "made": made, "software": software, "pick": _pick(found)}
    return environment("hansa.common").get_template("evidence.html.j2").render(view)


def _pick(found: list[Example]) -> list[dict[str, Any]]:
    """The widest of each kind, for the top of the page."""
    return [
        {
            "title": MISTAKES[key].title,
            "row": max((e for e in found if e.mistake == key), key=lambda e: e.true - e.basis),
        }
        for key in MISTAKES
        if any(e.mistake == key for e in found)
    ]


def _chart(rows: list[Example]) -> dict[str, Any]:
    """Places of the bars: claimed above true, one pair a row."""
    left, right, top, height = 10, 610, 6, 56
    x = Axis(0.0, 1.1 * max(max(e.true, e.basis) for e in rows), left, right, 6)
    bars = [
        {
            "y": top + number * height,
            "name": e.where,
            "claimed": x(e.basis) - left,
            "true": x(e.true) - left,
            "claimed_text": f"{e.basis:.2f}" if e.stated is None else f"{e.stated:g}",
            "true_text": ("≥ " if e.bound == "at least" else "") + f"{e.true:.2f}",
        }
        for number, e in enumerate(rows)
    ]
    return {"x": x, "bars": bars, "left": left, "bottom": top + height * len(rows), "width": 720}
