"""Data that simulations can use without downloading anything."""

from __future__ import annotations

import gzip
import hashlib
import math
import mmap
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..clients.datasets import Rows, check_rows
from ..common.config import Federation
from ..common.errors import DataError, counted
from ..common.tasks import Task

__all__ = ["arrays", "check", "data_sha256", "packaged", "population", "synthetic"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


Owners = npt.NDArray[np.int64]


def population(name: str) -> tuple[Rows, Rows | None]:
    """Rows to deal out to clients, and public test rows where the data set has its own.

    - `digits`: 1,797 handwritten digits of scikit-learn, [n, 1, 8, 8] in [0, 1]; no test rows.
    - `fashion-mnist`: 60,000 and 10,000 pictures of clothing, [n, 1, 28, 28] in [0, 1], from Debian.
    - `synthetic`: `synthetic(1000, 20, seed=0)`; no test rows.

    Raises:
        DataError: an unknown name; Fashion-MNIST missing (names the command that installs it) or damaged.
    """
    if name == "digits":
        return _digits(), None
    if name == "fashion-mnist":
        return _fashion_mnist("train"), _fashion_mnist("t10k")
    if name == "synthetic":
        return synthetic(1000, 20, seed=0), None
    raise DataError(
        f"no data set {name!r}",
        "Allowed are digits, fashion-mnist, synthetic, and a folder of x.npy and y.npy: write its path with a /.",
    )


def check(what: str, rows: Rows, task: Task, mapped: mmap.mmap | None = None) -> None:
    """Refuse rows that are not of the task's shape, or whose values or classes are not in its range.

    Args:
        mapped: what x is a map of: no more than a piece of it stays in memory.

    Raises:
        DataError: they are not.
    """
    if tuple(rows.x.shape[1:]) != task.schema.shape:
        raise DataError(
            f"{what}: rows of shape {list(rows.x.shape[1:])}; task {task.name} takes {list(task.schema.shape)}",
            "Name the task that the data set is for.",
        )
    some = max(1, _PIECE // max(1, math.prod(task.schema.shape)))
    for at in range(0, len(rows), some):
        piece = Rows(rows.x[at : at + some], rows.y[at : at + some])
        whole = len(piece) == len(rows)
        check_rows(task, what if whole else f"{what}, rows {at} to {at + len(piece) - 1}", piece, at)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


_PIECE = 2**22
"""Values that are looked at at a time."""


def arrays(folder: Path, task: Task) -> tuple[Rows, Rows | None, Owners | None]:
    """A folder of one's own as a data set: rows, public test rows if it has any, and whose each row is if it says so.

    `x.npy` float32 [n, ...], `y.npy` integers [n], and, if they are there, `x_test.npy`, `y_test.npy` and `client.npy` (integers [n],
    from 0). x is mapped: it is read once, to look at its values, and of a large file only what a client asks for stays in memory.

    Raises:
        DataError: a file is missing, is other than described, or does not fit the task.
    """
    rows = _mapped(folder / "x.npy", folder / "y.npy", task)
    test = _mapped(folder / "x_test.npy", folder / "y_test.npy", task) if (folder / "x_test.npy").exists() else None
    if not (folder / "client.npy").exists():
        return rows, test, None
    owners = _integers(folder / "client.npy", len(rows), "client number")
    if owners.min(initial=0) < 0:
        raise DataError(f"{folder}/client.npy: {owners.min()} is no client", "Clients are numbered from 0.")
    return rows, test, owners


_ARRAYS = "docs/configuration.md says which arrays a population's folder has."


def _mapped(x: Path, y: Path, task: Task) -> Rows:
    features = _array(x)
    if features.dtype != np.float32 or features.ndim < 2:
        raise DataError(
            f"{x}: {features.dtype} with {counted(features.ndim, 'dimension')}, not float32 [n, ...]", _ARRAYS
        )
    rows = Rows(torch.from_numpy(features), torch.from_numpy(_integers(y, len(features), "label")))
    check(str(x), rows, task, getattr(features, "_mmap", None))
    return rows


def _integers(path: Path, n: int, one: str) -> npt.NDArray[np.int64]:
    found = _array(path)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise DataError(f"{path}: {found.dtype} {list(found.shape)}, not integers [{n}]", _ARRAYS)
    if len(found) != n:
        raise DataError(f"{path}: {counted(len(found), one)} for {counted(n, 'row')}", _ARRAYS)
    return np.asarray(found, np.int64)


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        # "c": pages that nobody writes stay the file's. Objects, which would be unpickled, are refused.
        found: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="c")
    except FileNotFoundError:
        raise DataError(f"no file {path}", _ARRAYS) from None
    except (OSError, ValueError, EOFError) as err:
        raise DataError(f"{path}: cannot be read as an array: {err}", _ARRAYS) from err
    return found


def data_sha256(config: Federation, base: Path) -> str:
    """A digest of the bytes of every file of one's own that a configuration names; what is shipped, or installed, is not in it.

    Raises:
        DataError: a file cannot be read.
    """
    if config.partners is not None:
        own = [base / entry.data for entry in config.partners.values() if not entry.data.startswith("package:")]
    else:
        assert config.population is not None
        name = config.population.dataset
        own = [base / name / file for file in _FILES] if "/" in name else []
    digest = hashlib.sha256()
    for path in own:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            digest.update(b"no file")
        except OSError as err:
            raise DataError(f"{path}: cannot be read: {err.strerror}") from err
    return digest.hexdigest()


_FILES = ("x.npy", "y.npy", "x_test.npy", "y_test.npy", "client.npy")


def synthetic(rows: int, features: int, seed: int) -> Rows:
    """Two classes divided by a random plane through noise: features [rows, features] uniform in [-1, 1]."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(rows, features)).astype(np.float32)
    y = x @ rng.normal(size=features) + rng.normal(scale=0.1, size=rows) > 0
    return Rows(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))


def packaged(path: str) -> Path:
    """The file of `package:heart-disease/cleveland.csv`, shipped in `simulations/data`.

    Raises:
        DataError: no such file; names those there are.
    """
    data = Path(str(files("hansa.simulations") / "data"))
    shipped = {file.relative_to(data).as_posix(): file for file in sorted(data.glob("*/*.csv"))}
    try:
        return shipped[path.removeprefix("package:")]
    except KeyError:
        raise DataError(
            f"no data file {path!r} is shipped",
            f"There are {', '.join(f'package:{name}' for name in shipped)}.",
        ) from None


def _digits() -> Rows:
    from sklearn.datasets import load_digits  # takes a second to import

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    return Rows(x, torch.from_numpy(labels.astype(np.int64)))


def _fashion_mnist(part: str) -> Rows:
    images = _read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise DataError(f"{FASHION_MNIST}: {part} images and labels do not fit together", _INSTALL)
    x = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    return Rows(x, torch.from_numpy(labels.astype(np.int64)))


_INSTALL = "Install it: apt-get install dataset-fashion-mnist"


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes (LeCun's format): 0, 0, 8, dimensions, big-endian sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"Fashion-MNIST is not installed: there is no {path}", _INSTALL) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", _INSTALL) from None
    start = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < start:
        raise DataError(f"{path} is not an IDX file of bytes in {counted(dimensions, 'dimension')}", _INSTALL)
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{path} holds {len(raw) - start} values; its header says {math.prod(shape)}", _INSTALL)
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
