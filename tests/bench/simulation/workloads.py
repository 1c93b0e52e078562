"""What is simulated: data and models, from seeds, without a network. Needs torch and numpy alone, so that every peer can import it.

W1 and W2 are issue 6's. W2's network is the one of two 5x5 convolutions nearest to 16 and 32 channels that has exactly 48,846
parameters: 14 and 36 channels, each followed by 2x2 pooling, then 576 -> 56 -> 62. (Without a hidden layer there is none.)
The two models at the end are those that do not pay to batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True)
class Workload:
    """One column of the table.

    Args:
        build: a model with random weights.
        data: every client's rows, in memory.
        cohort_size: clients a round; all of them when there are no more.
        repeat: rounds in one measurement, so that it takes long enough to be measured.
        private: DP-SGD: Poisson rate batch/n, ceil(n/batch) steps, clip 1, noise multiplier 1, sums divided by the batch.
            Otherwise one epoch of consecutive batches.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    data: Callable[[], list[Rows]]
    cohort_size: int
    batch: int
    lr: float
    repeat: int = 1
    private: bool = False

    def model(self) -> nn.Module:
        """The model that round 0 starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.build()

    def cohort(self, number: int, clients: int) -> list[int]:
        """Who takes part in round `number`, in ascending order."""
        if self.cohort_size >= clients:
            return list(range(clients))
        return sorted(np.random.default_rng(number).choice(clients, self.cohort_size, replace=False).tolist())

    def steps(self, rows: int) -> int:
        return math.ceil(rows / self.batch)


def loss(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of [records, classes] or, for sequences, [records, positions, classes]; "none" gives one a record."""
    losses = F.cross_entropy(output.movedim(-1, 1), y, reduction=reduction)
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def evaluate(model: nn.Module, clients: list[Rows], most: int = 2000) -> dict[str, float]:
    """Loss and accuracy on the first records of all clients: a check that a runner learned what the others learned."""
    each = max(1, most // len(clients))
    x = torch.cat([x[:each] for x, _ in clients])[:most]
    y = torch.cat([y[:each] for _, y in clients])[:most]
    with torch.no_grad():
        output = model.eval()(x)
    model.train()
    right = (output.argmax(-1) == y).float().mean()
    return {"loss": float(loss(output, y)), "accuracy": float(right)}


def _split(x: Tensor, y: Tensor, sizes: list[int]) -> list[Rows]:
    return list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))


def _sizes(clients: int, least: int, most: int) -> list[int]:
    return np.random.default_rng(3).integers(least, most + 1, clients).tolist()


def _table() -> list[Rows]:
    """569 rows of 30 features over 10 clients: shares by Dirichlet 8, at least 20 rows each."""
    rng = np.random.default_rng(8)
    while True:
        cuts = np.rint(np.cumsum(rng.dirichlet(np.full(10, 8.0)))[:-1] * 569).astype(int)
        sizes = np.diff([0, *cuts, 569])
        if sizes.min() >= 20:
            break
    y = rng.integers(0, 2, 569)
    x = rng.normal(size=(569, 30)) + 0.4 * np.where(y, 1, -1)[:, None] * (np.arange(30) % 3 == 0)
    return _split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), sizes.tolist())


def _images(clients: int, least: int, most: int, classes: int) -> list[Rows]:
    sizes = _sizes(clients, least, most)
    seeded = torch.Generator().manual_seed(5)
    prototypes = F.interpolate(torch.randn(classes, 1, 7, 7, generator=seeded), scale_factor=4, mode="bilinear")
    y = torch.randint(0, classes, (sum(sizes),), generator=seeded)
    x = torch.randn(len(y), 1, 28, 28, generator=seeded)
    x += prototypes[y]
    return _split(x, y, sizes)


WORDS, POSITIONS, WIDTH = 500, 64, 128


def _sentences() -> list[Rows]:
    """Sequences in which the next word is mostly a function of the last."""
    sizes = _sizes(10, 8, 16)
    rng = np.random.default_rng(6)
    following = rng.permutation(WORDS)
    words = np.empty((sum(sizes), POSITIONS + 1), dtype=np.int64)
    words[:, 0] = rng.integers(0, WORDS, len(words))
    for i in range(POSITIONS):
        words[:, i + 1] = np.where(
            rng.random(len(words)) < 0.8, following[words[:, i]], rng.integers(0, WORDS, len(words))
        )
    tokens = torch.from_numpy(words)
    return _split(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), sizes)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 14, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(14, 36, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 56), nn.ReLU(), nn.Linear(56, 62),
    )  # fmt: skip


def _cnn() -> nn.Module:
    """1,199,882 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.attention_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.before_mlp = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention_in(self.before_attention(x)).unflatten(-1, (3, 4, WIDTH // 4))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class _Transformer(nn.Module):
    """533,492 parameters: a vocabulary of 500, 64 positions, two blocks of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(POSITIONS, WIDTH) * 0.02)
        self.blocks = nn.Sequential(_Block(), _Block())
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.words(x) + self.positions)))


def _w2_data() -> list[Rows]:
    return _images(1000, 30, 70, 62)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("w1", "W1: 10 clients, MLP", _mlp, _table, 10, 32, 0.05, repeat=20),
        Workload("w2", "W2: 50 of 1,000, CNN 49k", _lenet, _w2_data, 50, 10, 0.05),
        Workload("w1-dp", "W1 with DP-SGD", _mlp, _table, 10, 32, 0.05, repeat=4, private=True),
        Workload("w2-dp", "W2 with DP-SGD", _lenet, _w2_data, 50, 10, 0.05, private=True),
        Workload("w2-1000", "W2, cohort of 1,000", _lenet, _w2_data, 1000, 10, 0.05),
        Workload("cnn", "CNN 1.2M, 10 clients", _cnn, lambda: _images(10, 20, 40, 10), 10, 16, 0.05),
        Workload("transformer", "transformer 533k, 10 clients", _Transformer, _sentences, 10, 8, 0.05),
    )
}
