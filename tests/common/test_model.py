"""A model's bytes are safetensors' own, its hash needs no copy of them, and its manifest is the charter's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from hansa.common.charter import ADVERSARY
from hansa.common.errors import MessageError
from hansa.common.identity import canonical, sha256
from hansa.common.model import (
    checked_manifest,
    file_sha256,
    model_manifest,
    model_sha256,
    tensor_bytes,
    tensors_from,
    write_model,
)
from support import NO_PRIVACY, charter, digest, same_arrays

DTYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
)  # fmt: skip
MODEL = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([0.1, np.pi], np.float32),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def theirs(tensors: dict[str, Any], about: str | None = None) -> bytes:
    """What safetensors makes of the same tensors, by name."""
    metadata = None if about is None else {"hansa": about}
    return save({n: np.asarray(tensors[n], order="C") for n in sorted(tensors)}, metadata=metadata)


def ours(tensors: dict[str, Any], about: str | None = None) -> bytes:
    return b"".join(tensor_bytes(tensors, about))


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda n: n != "__metadata__")
tensors = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=6)


@given(tensors, st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_the_bytes_are_those_of_safetensors(specs: dict[str, Any], about: str | None) -> None:
    made = {
        name: (np.arange(np.prod(shape, dtype=int)) % 2 + number).astype(dtype).reshape(shape)
        for number, (name, (dtype, shape)) in enumerate(specs.items())
    }
    assert ours(made, about) == theirs(made, about)
    assert ours(dict(reversed(made.items())), about) == theirs(made, about)


def test_every_layout_in_memory_has_the_same_bytes() -> None:
    assert ours(MODEL) == theirs(MODEL)
    others: list[Callable[[Any], Any]] = [
        lambda v: np.asarray(v, order="F"),
        lambda v: np.stack([v, v], -1)[..., 0],
        lambda v: np.asarray(v).astype(">f4"),
    ]
    for other in others:
        assert ours({n: other(v) for n, v in MODEL.items()}) == ours(MODEL)


def test_a_model_has_one_name() -> None:
    assert model_sha256(MODEL) == sha256(theirs(MODEL)) == model_sha256(dict(reversed(MODEL.items())))
    for name in ("weight", "bias", "scalar", "transposed"):
        changed = {**MODEL, name: np.nextafter(MODEL[name], np.float32(9))}
        assert model_sha256(changed) != model_sha256(MODEL)
    assert model_sha256({**MODEL, "weight": MODEL["weight"].reshape(3, 2)}) != model_sha256(MODEL)
    assert model_sha256({**MODEL, "scalar": MODEL["scalar"].reshape(1)}) != model_sha256(MODEL)


def test_a_model_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path, MODEL)
    same_arrays(load(path.read_bytes()), MODEL)
    same_arrays(tensors_from(path)[0], MODEL)
    assert file_sha256(path) == model_sha256(MODEL)
    path.write_bytes(b"head\n" + ours(MODEL, "text"))
    again, about = tensors_from(path, 5)
    same_arrays(again, MODEL)
    assert about == "text"
    assert file_sha256(path, 5) == sha256(ours(MODEL, "text"))


def test_nothing_is_copied_whole(tmp_path: Path) -> None:
    big = {"a": np.zeros(2_000_000, np.float32), "b": np.ones((1000, 2000), np.float32)}
    tracemalloc.start()
    try:
        name = model_sha256(big)
        write_model(tmp_path / "m", big)
        assert file_sha256(tmp_path / "m") == name
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6, "16 MB of tensors"


def test_a_tensor_that_has_no_place_in_the_format_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_model(tmp_path / "m", {"c": np.zeros(1, np.complex64)})
    assert list(tmp_path.iterdir()) == []


# -- manifest --------------------------------------------------------------------------------------------------------------

SIGNED = charter(evaluation={"kind": "public"})
METRICS = {"auc": "0.875", "brier": "0.1"}


def manifest(**changes: Any) -> dict[str, Any]:
    made = model_manifest(SIGNED.charter, SIGNED.sha256, "run-1", digest("m"), 3, METRICS)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = made
        for part in path:
            place = place[part]
        place[last] = value
    return made


def check(about: object) -> dict[str, Any]:
    return checked_manifest(about, SIGNED.charter, SIGNED.sha256, "run-1", digest("m"))


def test_the_manifest_states_everything_beside_epsilon() -> None:
    made = manifest()
    assert check(made) == made
    p = made["privacy"]
    assert (p["epsilon"], p["delta"], p["unit"], p["adjacency"]) == ("2.0", "0.001", "record", "add-or-remove-one")
    assert (p["noise"], p["adversary"]) == ("local", ADVERSARY)
    assert "coordinator's word" in made["metrics_are"]
    assert canonical(made), "no floats"
    bare = charter(privacy=NO_PRIVACY)
    p = model_manifest(bare.charter, bare.sha256, "r", digest("m"), 1, {})["privacy"]
    assert (p["kind"], p["epsilon"], p["noise"]) == ("none", None, "none")


WRONG: dict[str, Any] = {
    "epsilon": {"privacy__epsilon": "0.1"},
    "noise": {"privacy__noise": "shared"},
    "adversary": {"privacy__adversary": "nobody"},
    "another task": {"task": "other"},
    "another code": {"task_code_sha256": digest("x")},
    "another seed": {"model_seed": 7},
    "another model": {"model_sha256": digest("x")},
    "another run": {"run_id": "run-2"},
    "another charter": {"charter_sha256": digest("x")},
    "proved metrics": {"metrics_are": "proved"},
    "something more": {"note": "x"},
    "no rounds": {"rounds": 0},
    "true rounds": {"rounds": True},
    "too many rounds": {"rounds": 4},
    "metrics in a list": {"metrics": []},
    "a metric that is no number": {"metrics": {"auc": "high"}},
    "a metric that is nan": {"metrics": {"auc": "nan"}},
    "a metric in other words": {"metrics": {"auc": "0.50"}},
    "a metric with a name to steer a screen": {"metrics": {"a\x1b[2J": "0.5"}},
    "a flood of metrics": {"metrics": {f"m{i}": "0.5" for i in range(51)}},
}


@pytest.mark.parametrize("how", list(WRONG))
def test_a_manifest_that_says_something_else(how: str) -> None:
    with pytest.raises(MessageError, match="manifest"):
        check(manifest(**WRONG[how]))


@pytest.mark.parametrize("about", [None, [], "x", {}, {"rounds": 1}])
def test_what_is_no_manifest(about: object) -> None:
    with pytest.raises(MessageError, match="manifest"):
        check(about)
