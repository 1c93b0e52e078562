"""A model: its bytes, which are its name, and what is said of it when it leaves.

The bytes are exactly those of a safetensors file (https://github.com/huggingface/safetensors), given tensor by tensor:
a model is hashed, sent and written without a second copy of it in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .charter import Charter
from .errors import MessageError
from .identity import real, write_whole

Arrays = dict[str, npt.NDArray[Any]]

# NumPy's names -> safetensors', in the order in which it lays tensors out.
_DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ORDER = {name: place for place, name in enumerate(_DTYPES)}
_NUMPY = {theirs: ours for ours, theirs in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_BUFFER_BYTES = 2**20


def zeros_like(model: Mapping[str, npt.NDArray[Any]], dtype: npt.DTypeLike) -> Arrays:
    """Zeros by the same names, of the same shapes, in one block of memory.

    One block goes back to the operating system when it is let go of. Tensors of a few megabytes that come and go one by
    one leave holes, which the C library keeps: half a model more, measured.
    """
    block = np.zeros(sum(array.size for array in model.values()), dtype)
    made: Arrays = {}
    at = 0
    for name, array in model.items():
        made[name] = block[at : at + array.size].reshape(array.shape)
        at += array.size
    return made


# -- bytes ---------------------------------------------------------------------------------------------------------------


def tensor_bytes(tensors: Mapping[str, npt.NDArray[Any]], about: str | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of `safetensors.numpy.save`: the header, then one tensor after the other, not copied (unless its memory
    is not in C order). The same arrays give the same bytes, in whatever order they are given.

    Args:
        about: text to keep with the tensors; the only entry of the header's metadata, "hansa".
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype.name], name))
    header: dict[str, Any] = {} if about is None else {"__metadata__": {"hansa": about}}
    at = 0
    for name in names:
        tensor = tensors[name]
        span = [at, at + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": span}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].size:
            little = tensors[name].dtype.newbyteorder("<")
            yield np.ascontiguousarray(tensors[name], little).reshape(-1).data.cast("B")


def tensors_from(path: Path, start: int = 0) -> tuple[Arrays, str | None]:
    """Tensors, and the text kept with them, of a file in safetensors' layout from byte `start` on.

    For files that this process's owner wrote and whose bytes were checked; what came from somebody else is read by
    safetensors itself.

    Raises:
        OSError, ValueError, KeyError, TypeError, RecursionError: it is not such a file.
    """
    with path.open("rb") as file:
        room = os.fstat(file.fileno()).st_size - start - 8
        file.seek(start)
        size = int.from_bytes(file.read(8), "little")
        room -= size
        if size > _MAX_HEADER_BYTES or room < 0:
            raise ValueError("not a file of tensors")
        header = json.loads(file.read(size))
        if not isinstance(header, dict) or not isinstance(kept := header.pop("__metadata__", {}), dict):
            raise ValueError("a header of another kind")
        tensors: Arrays = {}
        for name, spec in header.items():
            dtype, shape, (begin, end) = np.dtype(_NUMPY[spec["dtype"]]), spec["shape"], spec["data_offsets"]
            if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, begin, end)) or end > room:
                raise ValueError(f"tensor {name}: malformed")
            if math.prod(shape) * dtype.itemsize != end - begin:  # before it is allocated
                raise ValueError(f"tensor {name}: {end - begin} bytes do not fit its shape")
            file.seek(start + 8 + size + begin)
            tensors[name] = np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
    return tensors, kept.get("hansa")


def model_sha256(model: Mapping[str, npt.NDArray[Any]]) -> str:
    """The name of a model in ledgers and closing checkpoints: the SHA-256 of its file."""
    digest = hashlib.sha256()
    for part in tensor_bytes(model):
        digest.update(part)
    return digest.hexdigest()


def write_model(path: Path, model: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a model's file, whole or not at all.

    Raises:
        OutputError: it could not be written.
    """
    write_whole(path, tensor_bytes(model))


def file_sha256(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from byte `start` on, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(_BUFFER_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# -- what is said of it ----------------------------------------------------------------------------------------------------


def model_manifest(
    charter: Charter, charter_sha256: str, run_id: str, model_sha256: str, rounds: int, metrics: Mapping[str, str]
) -> dict[str, Any]:
    """What is said of a model that leaves; without floats, so it has canonical bytes.

    All of it but `rounds` and `metrics` follows from the charter, whose reader can make it again.

    Args:
        rounds: that were completed.
        metrics: of the last round, as decimal strings.
    """
    privacy = charter.privacy

    def decimal(value: float | None) -> str | None:
        return None if value is None else real(value)

    return {
        "format": "hansa-model/1",
        "task": charter.task.name,
        "task_code_sha256": charter.task.code_sha256,
        "model_seed": charter.model_seed,
        "model_sha256": model_sha256,
        "charter": charter.name,
        "charter_sha256": charter_sha256,
        "run_id": run_id,
        "rounds": rounds,
        "simulated": charter.simulated,
        "privacy": {
            "kind": privacy.kind,
            "unit": privacy.unit,
            "adjacency": "add-or-remove-one",
            "epsilon": decimal(privacy.epsilon),
            "delta": decimal(privacy.delta),
            "noise": privacy.kind,
            "noise_multiplier": decimal(privacy.noise_multiplier),
            "clip_norm": decimal(privacy.clip_norm),
            "adversary": charter.adversary,
        },
        "evaluation": charter.evaluation.kind,
        "metrics": dict(metrics),
        "metrics_are": METRICS_ARE,
    }


METRICS_ARE = "the coordinator's word, of the last round; no ledger entry of a partner proves them"


def checked_manifest(about: object, charter: Charter, charter_sha256: str, run_id: str, model: str) -> dict[str, Any]:
    """`about`, if it says what the charter, the run and the model's hash `model` say.

    Raises:
        MessageError: it says something else, or is malformed.
    """
    if not isinstance(about, dict):
        raise MessageError("a model without a manifest")
    rounds, metrics = about.get("rounds"), about.get("metrics")
    if type(rounds) is not int or not 1 <= rounds <= charter.algorithm.rounds or not isinstance(metrics, dict):
        raise MessageError("a model's manifest with malformed rounds or metrics")
    if len(metrics) > _MAX_METRICS or not all(_is_metric(name, value) for name, value in metrics.items()):
        raise MessageError("a model's manifest with malformed metrics")
    if about != model_manifest(charter, charter_sha256, run_id, model, rounds, metrics):
        raise MessageError("a model's manifest that differs from the charter, the run or the model")
    return about


_MAX_METRICS = 50


def _is_metric(name: str, value: object) -> bool:
    if not (name.isascii() and name.isidentifier() and len(name) <= 40 and isinstance(value, str)):
        return False
    try:
        return math.isfinite(float(value)) and real(float(value)) == value
    except ValueError:
        return False
