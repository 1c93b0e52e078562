"""Data that simulations can use without downloading anything."""

from __future__ import annotations

import gzip
import math
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..clients.datasets import Rows
from ..common.errors import DataError, counted

__all__ = ["arrays", "packaged", "population", "synthetic"]

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


def arrays(folder: Path) -> tuple[Rows, Rows | None, Owners | None]:
    """A folder of one's own as a data set: rows, public test rows if it has any, and whose each row is if it says so.

    `x.npy` float32 [n, ...], `y.npy` integers [n], and, if they are there, `x_test.npy`, `y_test.npy` and `client.npy` (integers [n],
    from 0). x is mapped, not read: of a large file only what a client asks for comes into memory.

    Raises:
        DataError: a file is missing, or is other than described.
    """
    rows = _mapped(folder / "x.npy", folder / "y.npy")
    test = _mapped(folder / "x_test.npy", folder / "y_test.npy") if (folder / "x_test.npy").exists() else None
    if test is not None and test.x.shape[1:] != rows.x.shape[1:]:
        raise DataError(f"{folder}/x_test.npy: rows of another shape than those of x.npy", _ARRAYS)
    if not (folder / "client.npy").exists():
        return rows, test, None
    owners = _integers(folder / "client.npy", len(rows), "client number")
    if owners.min(initial=0) < 0:
        raise DataError(f"{folder}/client.npy: {owners.min()} is no client", "Clients are numbered from 0.")
    return rows, test, owners


_ARRAYS = "docs/configuration.md says which arrays a population's folder has."


def _mapped(x: Path, y: Path) -> Rows:
    features = _array(x)
    if features.dtype != np.float32 or features.ndim < 2:
        raise DataError(
            f"{x}: {features.dtype} with {counted(features.ndim, 'dimension')}, not float32 [n, ...]", _ARRAYS
        )
    return Rows(torch.from_numpy(features), torch.from_numpy(_integers(y, len(features), "label")))


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
