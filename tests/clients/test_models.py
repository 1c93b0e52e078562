"""What a closing message delivered: kept by every partner, checked when it is read, used on new rows, never run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from e2e_support import rows_of, write_rows
from hansa.clients import models
from hansa.clients.models import CLOSING, MANIFEST, MODEL, Kept, load_kept, model_of, predict
from hansa.common.charter import SignedCharter
from hansa.common.errors import CharterError, ConfigError, DataError, MessageError, SchemaViolation, TaskError
from hansa.common.identity import canonical
from hansa.common.model import file_sha256
from hansa.common.tasks import Task, load_task
from hansa.common.tasks.metrics import scores_of
from hansa.common.tasks.schema import ArraySchema, TableSchema, parse_table
from hansa.simulations import sources
from support import config, run, same_arrays

HUNGARY = sources.packaged("package:heart-disease/hungary.csv")
LOCAL = {"kind": "local", "epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    outcome, _ = run(
        config(privacy=LOCAL, algorithm={"rounds": 1, "local": {"steps": 2, "optimizer": {"lr": 0.2}}}), out
    )
    assert outcome.undelivered == []
    return out


@pytest.fixture
def kept(bundle: Path, tmp_path: Path) -> Path:
    """Hungary's copy, to be spoilt."""
    (folder,) = (bundle.with_name("out.private") / "hungary" / "models").iterdir()
    return Path(shutil.copytree(folder, tmp_path / "kept"))


# -- kept ------------------------------------------------------------------------------------------------------------


def test_every_partner_keeps_the_model_of_the_bundle(bundle: Path) -> None:
    private = bundle.with_name("out.private")
    folders = sorted(private.glob("*/models/*"))
    assert [f.parts[-3] for f in folders] == ["cleveland", "hungary", "switzerland", "va-long-beach"]
    signed = SignedCharter.load(bundle / "charter.json")
    (closing,) = (bundle / "closing").iterdir()
    result = json.loads((bundle / "result.json").read_bytes())
    for folder in folders:
        assert folder.name == result["run_id"]
        assert (folder / MODEL).read_bytes() == (bundle / MODEL).read_bytes()
        assert (folder / CLOSING).read_bytes() == closing.read_bytes()
        made = load_kept(folder)
        made.verify(signed)
        assert made.manifest is not None
        assert made.manifest["privacy"]["epsilon"] == "1.0"
        assert {n: float(v) for n, v in made.manifest["metrics"].items()} == result["final"]


def test_a_bare_file_is_a_model_of_the_task_that_is_named(bundle: Path) -> None:
    made = load_kept(bundle / MODEL, "heart-disease")
    assert (made.manifest, made.sealed, made.sha256) == (None, None, file_sha256(bundle / MODEL))
    same_arrays(made.arrays, load_file(bundle / MODEL))
    with pytest.raises(ConfigError, match="--task"):
        load_kept(bundle / MODEL)
    with pytest.raises(MessageError, match="bare file"):
        made.verify(SignedCharter.load(bundle / "charter.json"))


def _manifest(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        (folder / MANIFEST).write_bytes(canonical({**manifest, **changes}))

    return spoil


def _flip(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(data)

    return spoil


SPOILT: dict[str, Callable[[Path], Any]] = {
    "an edited model": _flip(MODEL),
    "an edited closing checkpoint": _flip(CLOSING),
    "no model": lambda f: (f / MODEL).unlink(),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "no closing checkpoint": lambda f: (f / CLOSING).unlink(),
    "nothing": lambda f: [p.unlink() for p in f.iterdir()],
    "a manifest of another run": _manifest(run_id="other"),
    "a manifest of another model": _manifest(model_sha256="b" * 64),
    "a manifest of another charter": _manifest(charter_sha256="b" * 64),
    "a manifest without privacy": _manifest(privacy=None),
    "a manifest of no task": _manifest(task=7),
    "a manifest that is a list": lambda f: (f / MANIFEST).write_bytes(b"[]"),
    "a manifest that is no JSON": lambda f: (f / MANIFEST).write_bytes(b"\xff"),
    "an empty closing checkpoint": lambda f: (f / CLOSING).write_bytes(b""),
}


@pytest.mark.parametrize("how", list(SPOILT))
def test_a_folder_that_does_not_fit_together_is_not_read(kept: Path, how: str) -> None:
    load_kept(kept)
    SPOILT[how](kept)
    with pytest.raises(DataError, match="kept"):
        load_kept(kept)


def test_a_folder_of_another_task(kept: Path) -> None:
    with pytest.raises(ConfigError, match="a model of task heart-disease, not of digits"):
        load_kept(kept, "digits")


def test_a_refused_run_has_no_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    privacy = {**LOCAL, "noise_multiplier": 0.5}
    outcome, _ = run(config(privacy=privacy), out)
    assert (outcome.why, outcome.undelivered) == ("refused", [])
    (folder,) = (tmp_path / "out.private" / "hungary" / "models").iterdir()
    with pytest.raises(DataError, match=r"(?s)no model: run .* was refused"):
        load_kept(folder)


FORGED: dict[str, dict[str, Any]] = {
    "less epsilon": {"privacy": {**LOCAL, "epsilon": "0.1"}},
    "another code": {"task_code_sha256": "c" * 64},
    "proved metrics": {"metrics_are": "proved"},
}


@pytest.mark.parametrize("how", list(FORGED))
def test_a_forged_manifest_does_not_verify(bundle: Path, kept: Path, how: str) -> None:
    made = load_kept(kept)
    changed = {**made.manifest, **FORGED[how]}  # type: ignore[dict-item]
    with pytest.raises(MessageError, match="manifest"):
        replace(made, manifest=changed).verify(SignedCharter.load(bundle / "charter.json"))


def test_another_charter_does_not_verify(bundle: Path, kept: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(config(privacy=LOCAL, algorithm={"rounds": 1, "local": {"steps": 1, "optimizer": {"lr": 0.2}}}), other)
    with pytest.raises(MessageError, match="not signed by"):
        load_kept(kept).verify(SignedCharter.load(other / "charter.json"))
    signed = SignedCharter.load(bundle / "charter.json")
    with pytest.raises(CharterError, match="not signed by"):
        load_kept(kept).verify(SignedCharter(signed.payload, signed.signatures[1:]))


# -- never run ---------------------------------------------------------------------------------------------------------


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("a model file ran code",)


def test_a_pickle_is_never_read(tmp_path: Path, kept: Path) -> None:
    torch.save({"weight": _Evil()}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(_Evil()))
    np.save(tmp_path / "numpy.npy", np.array([_Evil()], object), allow_pickle=True)
    for name in ("torch", "pickle", "numpy.npy"):
        with pytest.raises(DataError, match="not a file of tensors"):
            load_kept(tmp_path / name, "heart-disease")
    for data in (b"", b"\xff" * 8, (2**63).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"{}garbage"):
        (tmp_path / "odd").write_bytes(data)
        with pytest.raises(DataError):
            predict(load_kept(tmp_path / "odd", "heart-disease"), HUNGARY)


# -- used ------------------------------------------------------------------------------------------------------------


def test_predictions_are_the_models(kept: Path) -> None:
    task = load_task("heart-disease")
    assert isinstance(task.schema, TableSchema)
    made = load_kept(kept)
    found = predict(made, HUNGARY)
    x = parse_table(HUNGARY, task.schema).x
    logits = x.astype(np.float64) @ made.arrays["weight"].T.astype(np.float64) + made.arrays["bias"]
    by_hand = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, by_hand, atol=1e-6)
    assert found.classes == task.classes
    assert found.scores.std() > 0.01, "a model that was trained"
    bare = predict(load_kept(kept / MODEL, "heart-disease"), HUNGARY)
    np.testing.assert_array_equal(bare.scores, found.scores)


def test_the_label_may_be_missing_or_odd(kept: Path, tmp_path: Path) -> None:
    task = load_task("heart-disease")
    assert isinstance(task.schema, TableSchema)
    label = task.schema.label.column
    rows = rows_of(HUNGARY)
    made = load_kept(kept)
    whole = predict(made, HUNGARY)
    assert label in whole.ignored
    odd = write_rows(tmp_path / "odd.csv", [{**row, label: "not known"} for row in rows])
    absent = write_rows(tmp_path / "absent.csv", [{k: v for k, v in row.items() if k != label} for row in rows])
    for file in (odd, absent):
        np.testing.assert_array_equal(predict(made, file).scores, whole.scores)
    assert label not in predict(made, absent).ignored
    with pytest.raises(SchemaViolation, match="age"):
        predict(made, write_rows(tmp_path / "bad.csv", [{**rows[0], "age": "many"}]))
    with pytest.raises(SchemaViolation):
        predict(made, write_rows(tmp_path / "less.csv", [{k: v for k, v in rows[0].items() if k != "age"}]))


def test_other_code_than_was_agreed_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_kept(kept)
    monkeypatch.setattr(models, "code_sha256", lambda _: "d" * 64)
    monkeypatch.setattr(models, "parse_table", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(TaskError, match="not the code that the model was trained with"):
        predict(made, HUNGARY)


def test_a_task_that_is_not_installed(kept: Path) -> None:
    with pytest.raises(TaskError, match="no task 'gone' is installed"):
        predict(replace(load_kept(kept), task="gone"), HUNGARY)


def test_a_task_of_arrays_reads_no_csv(tmp_path: Path) -> None:
    model = load_task("digits").build_model()
    save_file({n: p.detach().numpy() for n, p in model.named_parameters()}, tmp_path / "m")
    with pytest.raises(ConfigError, match="takes arrays"):
        predict(load_kept(tmp_path / "m", "digits"), HUNGARY)


GOOD = {"weight": np.zeros((2, 35), np.float32), "bias": np.zeros(2, np.float32)}
BAD: dict[str, dict[str, Any]] = {
    "none": {},
    "missing": {"weight": GOOD["weight"]},
    "extra": {**GOOD, "more": np.zeros(1, np.float32)},
    "shape": {**GOOD, "bias": np.zeros((2, 1), np.float32)},
    "float64": {**GOOD, "bias": np.zeros(2)},
    "nan": {**GOOD, "bias": np.array([np.nan, 0], np.float32)},
    "inf": {**GOOD, "bias": np.array([np.inf, 0], np.float32)},
}


@pytest.mark.parametrize("how", list(BAD))
def test_a_model_of_another_shape_is_refused(tmp_path: Path, how: str) -> None:
    save_file(BAD[how], tmp_path / "m")
    with pytest.raises(DataError, match="tensors are not those of task heart-disease"):
        predict(load_kept(tmp_path / "m", "heart-disease"), HUNGARY)
    model_of(load_task("heart-disease"), GOOD, 0)


def test_what_was_not_trained_is_as_it_was_at_the_start() -> None:
    """Parameters that are frozen come from the charter's seed, as they did for everyone who trained; dropout is off."""

    def build() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
        model[0].requires_grad_(False)
        return model

    task = Task("tiny", "tiny", ArraySchema(shape=(3,), value_range=(-1, 1)), ("a", "b"), build)
    arrays = {"2.weight": np.array([[5] * 4, [0] * 4], np.float32), "2.bias": np.zeros(2, np.float32)}
    one, same, other = (model_of(task, arrays, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    x = torch.ones(20, 3)
    np.testing.assert_array_equal(scores_of(one(x)), scores_of(one(x)))


def test_the_seed_is_the_charters(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_kept(kept)
    seeds: list[int] = []
    monkeypatch.setattr(
        models, "model_of", lambda task, arrays, seed: seeds.append(seed) or model_of(task, arrays, seed)
    )
    assert made.manifest is not None
    predict(replace(made, manifest={**made.manifest, "model_seed": 7}), HUNGARY)
    predict(replace(made, manifest=None), HUNGARY)
    assert seeds == [7, 0]


def test_torchs_generator_is_left_alone(kept: Path) -> None:
    before = torch.get_rng_state()
    predict(load_kept(kept), HUNGARY)
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_that_are_not_finite(kept: Path) -> None:
    made = load_kept(kept)
    huge: Kept = replace(made, arrays={n: np.full_like(v, 3e38) for n, v in made.arrays.items()})
    with pytest.raises(DataError, match="not finite"):
        predict(huge, HUNGARY)
