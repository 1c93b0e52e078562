"""How good a model is: from scores where they may be seen, from noisy histograms where they may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import RunFailed, TaskError
from . import Task

__all__ = ["evaluate", "histogram_metrics", "score_histogram", "scores_of"]

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]


def scores_of(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """Class probabilities float32 [n, k] of logits [n, k]."""
    scores: npt.NDArray[np.float32] = torch.softmax(logits.detach().float(), dim=1).cpu().numpy()
    return scores


def evaluate(task: Task, scores: Floats, labels: Labels) -> dict[str, float]:
    """Metrics of scores [n, k] against labels [n]; for data whose scores may be seen.

    Returns:
        `accuracy` (largest score; a tie goes to the lower class), `brier` (binary: squared error of the
        second class's probability; otherwise summed over classes; Brier 1950), and `auc` (binary: of the
        second class; otherwise the mean over classes of one against the rest). `auc` is absent where it is
        undefined, because no class is both present and absent; nothing is returned for no rows.

    Raises:
        RunFailed: a score is not finite, so the model has diverged.
        TaskError: shapes do not fit the task.
    """
    k = len(task.classes)
    if scores.shape != (len(labels), k):
        raise TaskError(f"scores of shape {list(scores.shape)} for {len(labels)} rows and {k} classes")
    if not np.isfinite(scores).all():
        raise RunFailed("the model's scores are not finite", "It diverged: lower the learning rate.")
    if not len(labels):
        return {}
    truth = np.asarray(labels)[:, None] == np.arange(k)
    squares = (scores.astype(np.float64) - truth) ** 2
    metrics = {
        "accuracy": float((scores.argmax(axis=1) == labels).mean()),
        "brier": float((squares[:, 1] if k == 2 else squares.sum(axis=1)).mean()),
    }
    counted = [1] if k == 2 else range(k)
    aucs = [_auc(scores[:, c], truth[:, c]) for c in counted if 0 < truth[:, c].sum() < len(labels)]
    return {"auc": float(np.mean(aucs)), **metrics} if aucs else metrics


def _auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic; a tie counts half (Hanley & McNeil 1982)."""
    _, level = np.unique(scores, return_inverse=True)
    return _auc_of_levels(np.bincount(level, ~positive).astype(float), np.bincount(level, positive).astype(float))


def _auc_of_levels(negative: Floats, positive: Floats) -> float:
    """AUC from how many (or how much weight of) negatives and positives lie at each ascending level."""
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (negative.sum() * positive.sum()))


def score_histogram(scores: Floats, labels: Labels, bins: int = 20, binary: bool = True) -> npt.NDArray[np.float64]:
    """Counts float64 [2, bins], to be given noise before it leaves.

    Binary: row is the label, column the bin of P(class 1). Otherwise: row is whether the largest score is
    right, column the bin of that score. Bins divide (0, 1] and are closed above, so that 0.5 counts as
    class 0 there as it does in `evaluate`.

    *Formal guarantee.* Whatever its values, a record adds 1 to exactly one cell (a score that is not finite
    counts as 0, and nothing is raised because of one), so under add-or-remove-one the sensitivity is 1 in
    L1 and L2.

    Raises:
        TaskError: fewer than two bins, or scores that are not [n, k], k = 2 for a binary task.
    """
    if bins < 2:
        raise TaskError(f"a score histogram needs at least 2 bins; it has {bins}")
    if scores.ndim != 2 or (binary and scores.shape[1] != 2):
        raise TaskError(f"scores of shape {list(scores.shape)} do not fit a histogram with binary={binary}")
    scores = np.clip(np.nan_to_num(scores.astype(np.float64), posinf=0.0, neginf=0.0), 0.0, 1.0)
    if binary:
        row, value = (labels == 1).astype(np.int64), scores[:, 1]
    else:
        row, value = (scores.argmax(axis=1) == labels).astype(np.int64), scores.max(axis=1, initial=0.0)
    column = np.maximum(np.ceil(value * bins).astype(np.int64) - 1, 0)
    counts = np.bincount(row * bins + column, minlength=2 * bins)
    return counts.reshape(2, bins).astype(np.float64)


def histogram_metrics(hist: Floats, binary: bool = True) -> dict[str, float]:
    """Metrics from a (noisy) `score_histogram` [2, bins]; negative counts are taken as 0.

    Returns:
        `accuracy` and `calibration_error` (expected calibration error, Guo et al. 2017, a bin's centre
        standing for its scores, so it is only good to half a bin's width); for binary also `auc` (pairs in
        one bin count half) and `brier` (from bin centres). `auc` is absent when a class has no weight,
        everything when nothing is left. Clipping noise at 0 biases them all, the more the fewer records a
        bin holds.
    """
    if hist.ndim != 2 or hist.shape[0] != 2:
        raise TaskError(f"a score histogram has shape [2, bins]; this one {list(hist.shape)}")
    low, high = np.maximum(hist.astype(np.float64), 0.0)
    bins, total = len(low), float((low + high).sum())
    if not total > 0:
        return {}
    centre = (np.arange(bins) + 0.5) / bins
    positive = (np.sign(centre - 0.5) + 1) / 2  # the middle one of an odd number of bins counts half
    right = (low * (1 - positive) + high * positive).sum() if binary else high.sum()
    metrics = {
        "accuracy": float(right / total),
        "calibration_error": float(np.abs(high - centre * (low + high)).sum() / total),
    }
    if binary:
        metrics["brier"] = float((high * (1 - centre) ** 2 + low * centre**2).sum() / total)
        if low.sum() > 0 and high.sum() > 0:
            metrics["auc"] = _auc_of_levels(low, high)
    return metrics
