"""Partitions deal out every row once, as unevenly as asked; sources give checked rows."""

import gzip
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hansa.common.errors import ConfigError, DataError
from hansa.common.tasks import load_task
from hansa.simulations import sources
from hansa.simulations.partitions import dirichlet, iid, quantity_skew
from hansa.simulations.sources import packaged, population, synthetic

LABELS = np.random.default_rng(0).integers(0, 10, 5000)
KINDS = {
    "iid": lambda labels, clients, rng: iid(labels, clients, rng),
    "dirichlet": lambda labels, clients, rng: dirichlet(labels, clients, 0.3, rng, 0),
    "quantity": lambda labels, clients, rng: quantity_skew(labels, clients, 0.3, rng, 0),
}


@pytest.mark.parametrize("kind", KINDS)
@given(labels=st.lists(st.integers(0, 3), min_size=8, max_size=80), clients=st.integers(1, 8), seed=st.integers(0, 99))
def test_every_row_goes_to_exactly_one_client(kind, labels, clients, seed):
    parts = KINDS[kind](np.array(labels), clients, np.random.default_rng(seed))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(np.issubdtype(part.dtype, np.integer) for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides(kind):
    first, again, other = (KINDS[kind](LABELS, 10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def label_skew(parts, labels=LABELS):
    """Mean over clients of the largest class's share: about 0.1 when the ten classes are mixed, 1 when apart."""
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def size_skew(parts):
    sizes = np.array([len(part) for part in parts])
    return float(sizes.std() / sizes.mean())


def test_each_kind_skews_what_it_says_and_nothing_else():
    def draw(kind, alpha):
        return kind(LABELS, 10, alpha, np.random.default_rng(5), 20)

    even = iid(LABELS, 10, np.random.default_rng(5))
    assert label_skew(even) < 0.15
    assert size_skew(even) == 0
    assert label_skew(draw(dirichlet, 0.1)) > 0.5 > label_skew(draw(dirichlet, 1)) > label_skew(even)
    assert label_skew(draw(dirichlet, 1000)) < 0.16
    assert size_skew(draw(quantity_skew, 0.5)) > 0.5 > size_skew(draw(quantity_skew, 100))
    assert label_skew(draw(quantity_skew, 0.5)) < 0.2
    in_order = np.sort(LABELS)  # a population that comes class by class must be shuffled first
    assert label_skew(quantity_skew(in_order, 10, 0.5, np.random.default_rng(5), 20), in_order) < 0.2


@pytest.mark.parametrize(("kind", "alpha"), [(dirichlet, 0.1), (quantity_skew, 0.5)])
def test_min_records_is_met(kind, alpha):
    parts = kind(LABELS, 20, alpha, np.random.default_rng(0), 20)
    assert min(map(len, parts)) >= 20
    assert min(map(len, kind(LABELS, 20, alpha, np.random.default_rng(0), 0))) < 20  # negative control
    with pytest.raises(ConfigError, match="5000 records cannot give each of 20 clients 251"):
        kind(LABELS, 20, 0.5, np.random.default_rng(0), 251)


@pytest.mark.parametrize("kind", [dirichlet, quantity_skew])
@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=120),
    clients=st.integers(1, 12),
    spare=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_whatever_the_draw_everybody_gets_as_many_as_must_be(kind, labels, clients, spare, seed):
    """At an alpha at which one draw gives nearly all to one: only filling up does it."""
    least = max(0, len(labels) // clients - spare)
    parts = kind(np.array(labels), clients, 0.02, np.random.default_rng(seed), least)
    assert len(parts) == clients
    assert min(map(len, parts)) >= least
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    with pytest.raises(ConfigError, match="cannot give each"):
        kind(np.array(labels), clients, 0.02, np.random.default_rng(seed), len(labels) // clients + 1)


@pytest.mark.parametrize(("kind", "alpha", "least"), [(quantity_skew, 1.0, 10), (dirichlet, 0.3, 5)])
def test_filling_up_takes_from_the_largest_and_leaves_who_has_enough(kind, alpha, least):
    labels = np.random.default_rng(0).integers(0, 10, 6000)
    parts = kind(labels, 200, alpha, np.random.default_rng(0), least)
    sizes = np.sort([len(part) for part in parts])
    assert sizes[0] == least
    assert size_skew(parts) > 0.5  # still as uneven as asked
    assert (sizes == least).sum() < 100
    assert np.array_equal(
        np.concatenate(kind(labels, 200, alpha, np.random.default_rng(0), least)), np.concatenate(parts)
    )


@pytest.mark.parametrize(
    ("kind", "seed", "sha"), [(dirichlet, 1, "1cd70d664388b627"), (quantity_skew, 1, "16a9a6837c5d9d7c")]
)
def test_what_a_draw_can_do_is_as_it_was(kind, seed, sha):
    """Results of configurations that need no filling up: their bytes, from before there was any."""
    parts = kind(LABELS, 10, 0.5, np.random.default_rng(seed), 20)
    found = hashlib.sha256(b"".join(part.astype("<i8").tobytes() + b"|" for part in parts)).hexdigest()
    assert found[:16] == sha


@pytest.mark.parametrize("kind", [dirichlet, quantity_skew])
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_must_be_positive(kind, alpha):
    with pytest.raises(ConfigError, match=f"alpha is {alpha}"):
        kind(LABELS, 3, alpha, np.random.default_rng(0), 1)


def test_clients_must_be_possible():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="clients is 0"):
        iid(LABELS, 0, rng)
    with pytest.raises(ConfigError, match="2 records cannot give each of 3 clients 1"):
        iid(LABELS[:2], 3, rng)
    with pytest.raises(ConfigError, match="min_records -1"):
        dirichlet(LABELS, 3, 1.0, rng, -1)


# --- sources --------------------------------------------------------------------------------------------------------


def fits(rows, task):
    low, high = task.schema.value_range
    assert rows.x.shape == (len(rows), *task.schema.shape)
    assert (rows.x.dtype, rows.y.dtype) == (torch.float32, torch.int64)
    assert (rows.x.min(), rows.x.max()) == (low, high)
    assert set(rows.y.tolist()) == set(range(len(task.classes)))


def test_digits():
    rows, test = population("digits")
    assert (len(rows), test) == (1797, None)
    fits(rows, load_task("digits"))


def test_fashion_mnist():
    if not sources.FASHION_MNIST.exists():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    rows, test = population("fashion-mnist")
    assert (len(rows), len(test)) == (60_000, 10_000)
    for part in (rows, test):
        fits(part, load_task("fashion-mnist"))
        assert set(part.y.bincount().tolist()) == {len(part) // 10}


def test_synthetic_can_be_learned_and_is_repeatable():
    rows, _ = population("synthetic")
    assert rows.x.shape == (1000, 20)
    plane = np.linalg.lstsq(rows.x.numpy(), rows.y.numpy() * 2.0 - 1, rcond=None)[0]
    assert np.mean((rows.x.numpy() @ plane > 0) == rows.y.numpy()) > 0.9
    assert torch.equal(synthetic(1000, 20, seed=0).x, rows.x)
    assert not torch.equal(synthetic(1000, 20, seed=1).x, rows.x)


def test_unknown_names():
    with pytest.raises(DataError, match=r"(?s)no data set 'mnist'.*digits, fashion-mnist, synthetic"):
        population("mnist")
    for path in ("package:heart-disease/paris.csv", "package:../sources.py", "package:/etc/passwd", "package:"):
        with pytest.raises(DataError, match=r"(?s)is shipped.*package:heart-disease/cleveland.csv"):
            packaged(path)
    assert packaged("package:heart-disease/hungary.csv").read_text().startswith("age,sex,cp")


def idx(values, *shape, kind=8):
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    return gzip.compress(bytes([0, 0, kind, len(shape)]) + sizes + bytes(values), mtime=0)


IMAGES, CLASSES = idx([0, 255] * 784, 2, 28, 28), idx([0, 9], 2)


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (None, CLASSES, r"(?s)not installed: there is no .*train-images.*apt-get install dataset-fashion-mnist"),
        (b"not gzip", CLASSES, "cannot be read"),
        (IMAGES[:-9], CLASSES, "cannot be read"),
        (IMAGES[:40] + b"\xff" * 9 + IMAGES[49:], CLASSES, "cannot be read|holds"),
        (idx([0] * 1567, 2, 28, 28), CLASSES, "holds 1567 values; its header says 1568"),
        (idx([0] * 1569, 2, 28, 28), CLASSES, "holds 1569 values"),
        (idx([0] * 1568, 2, 28, 28, kind=9), CLASSES, "is not an IDX file of bytes in 3"),
        (CLASSES, CLASSES, "is not an IDX file of bytes in 3"),
        (gzip.compress(b"\0\0\x08\x03\0", mtime=0), CLASSES, "is not an IDX file"),
        (idx([0] * 2 * 729, 2, 27, 27), CLASSES, "do not fit together"),
        (IMAGES, idx([0, 1, 2], 3), "do not fit together"),
        (IMAGES, idx([0, 10], 2), "do not fit together"),
    ],
)
def test_damaged_or_missing_fashion_mnist(tmp_path, monkeypatch, images, classes, message):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)

    def put(images, classes):
        for part in ("train", "t10k"):
            (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
            (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(classes)

    put(IMAGES, CLASSES)
    rows, _ = population("fashion-mnist")
    assert rows.x[0, 0, 0, :2].tolist() == [0, 1]
    assert rows.y.tolist() == [0, 9]
    if images is None:
        (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    else:
        put(images, classes)
    with pytest.raises(DataError, match=message):
        population("fashion-mnist")
