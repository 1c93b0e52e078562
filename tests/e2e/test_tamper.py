"""Change a real bundle in any way: `hansa audit` never says verified, and names the file, of a ledger also the line."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from e2e_support import HOSPITALS, Result, call, federation, write

LEDGERS = [f"partners/{name}/ledger.jsonl" for name in HOSPITALS] + ["coordinator/ledger.jsonl"]
KEYS = [f"keys/{name}.pem" for name in (*HOSPITALS, "coordinator")]


def rejected(bundle: Path, *words: str, codes: tuple[int, ...] = (1, 2)) -> Result:
    done = call("audit", bundle)
    assert done.expect(done.code).code in codes, f"exit code {done.code}\n{done.text}"
    return done.says(*words)


def test_an_untouched_copy_verifies(bundle: Path) -> None:
    call("audit", bundle).expect(0).says("VERIFIED")


def flip(data: bytes, at: int, rng: random.Random) -> bytes:
    """One byte changed to any other."""
    return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]


def files_of(bundle: Path) -> list[str]:
    closings = [p.relative_to(bundle).as_posix() for p in sorted(bundle.glob("closing/*.json"))]
    heads = [p.relative_to(bundle).as_posix() for p in sorted(bundle.glob("heads/*.jsonl"))]
    return [*LEDGERS, "charter.json", *KEYS, *closings, *heads, "model.safetensors"]


def spoil(bundle: Path, file: str, at: int, rng: random.Random) -> None:
    """Change one byte, look at the verdict, put it back."""
    path = bundle / file
    good = path.read_bytes()
    bad = flip(good, at, rng)
    path.write_bytes(bad)
    try:
        place = file
        if (
            file.endswith(".jsonl") and bad[at] != 10
        ):  # a line break in the middle makes two lines: the first is then wrong
            place += f":{good[:at].count(10) + 1}"
        done = call("audit", bundle)
        assert done.expect(done.code).code in (1, 2), f"byte {at} of {file}: {good[at]} -> {bad[at]}\n{done.text}"
        assert re.search(rf"{re.escape(place)}\b", done.text), f"byte {at}: {place} is not named in\n{done.text}"
    finally:
        path.write_bytes(good)


def test_any_byte_of_any_file(bundle: Path) -> None:
    """Two random bytes of each file, and the ends of it."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for file in files_of(bundle):
        size = (bundle / file).stat().st_size
        for at in [0, size - 1, *(rng.randrange(size) for _ in range(2))]:
            try:
                spoil(bundle, file, at, rng)
            except AssertionError as err:
                raise AssertionError(f"seed {seed}: {err}") from err
    call("audit", bundle).expect(0)


@pytest.mark.soak
def test_many_bytes(bundle: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        file = rng.choice(files_of(bundle))
        spoil(bundle, file, rng.randrange((bundle / file).stat().st_size), rng)


def test_every_fourth_byte_of_a_key(bundle: Path) -> None:
    rng = random.Random()
    for at in range(rng.randrange(4), (bundle / KEYS[0]).stat().st_size, 4):
        spoil(bundle, KEYS[0], at, rng)


def test_bytes_added_or_dropped(bundle: Path) -> None:
    for file in (f for f in files_of(bundle) if f not in KEYS[1:]):
        path = bundle / file
        good = path.read_bytes()
        for bad in (good + b"\n", good + b" ", good[:-1], b" " + good, good[1:], b""):
            if not bad and file.startswith("heads/"):
                continue  # whoever makes a bundle may leave heads out: what they covered is then a tail
            path.write_bytes(bad)
            rejected(bundle, file)
        path.write_bytes(good)


@pytest.mark.parametrize("file", LEDGERS)
def test_entries_cut_off_the_end(file: str, bundle: Path) -> None:
    path = bundle / file
    lines = path.read_bytes().splitlines(keepends=True)
    for count in (1, 2, 3, 7, len(lines) - 1, len(lines)):
        path.write_bytes(b"".join(lines[: len(lines) - count]))
        rejected(bundle, "NOT VERIFIED", file, codes=(1,))


def test_entries_cut_out_of_the_middle_or_moved(bundle: Path) -> None:
    for file in LEDGERS:
        path = bundle / file
        lines = path.read_bytes().splitlines(keepends=True)
        for changed in (
            lines[:5] + lines[6:],
            [*lines[:5], lines[6], lines[5], *lines[7:]],
            [*lines[:5], lines[5], *lines[5:]],
        ):
            path.write_bytes(b"".join(changed))
            rejected(bundle, "NOT VERIFIED", f"{file}:", codes=(1,))
        path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("file", [*LEDGERS, "charter.json", *KEYS, "model.safetensors"])
def test_a_file_deleted(file: str, bundle: Path) -> None:
    (bundle / file).unlink()
    rejected(bundle, file)


def test_closings_deleted(bundle: Path) -> None:
    one, other = sorted(bundle.glob("closing/*.json"))
    good = one.read_bytes()
    one.unlink()
    rejected(bundle, f"closing/{one.name}")
    other.unlink()
    rejected(bundle, "closing/")
    other.write_bytes(good)  # one run's closing in the name of the other
    rejected(bundle, "closing/")
    shutil.rmtree(bundle / "closing")
    rejected(bundle, "closing/")


def swap(bundle: Path, one: str, other: str) -> None:
    a, b = (bundle / one).read_bytes(), (bundle / other).read_bytes()
    (bundle / one).write_bytes(b)
    (bundle / other).write_bytes(a)


@pytest.mark.parametrize(
    ("one", "other"), [(LEDGERS[0], LEDGERS[1]), (LEDGERS[2], LEDGERS[4]), (KEYS[0], KEYS[1]), (KEYS[0], KEYS[4])]
)
def test_files_swapped(one: str, other: str, bundle: Path) -> None:
    swap(bundle, one, other)
    rejected(bundle, one, other)


def test_another_runs_files(bundle: Path, tmp_path: Path) -> None:
    """A ledger, a closing, a charter and a model of an equally good run do not fit into this one."""
    other = tmp_path / "other"
    config = write(tmp_path / "c.yaml", federation(rounds=2))
    call("simulate", config, "--out", other).expect(0)
    for file in ["charter.json", "model.safetensors", LEDGERS[0], "coordinator/ledger.jsonl", KEYS[0]]:
        good = (bundle / file).read_bytes()
        shutil.copy(other / file, bundle / file)
        rejected(bundle, file if file != "charter.json" else "keys/")
        (bundle / file).write_bytes(good)
    shutil.copy(next(other.glob("closing/*.json")), bundle / "closing")
    rejected(bundle, "closing/")


def test_the_model_replaced(bundle: Path) -> None:
    (bundle / "model.safetensors").write_bytes(b"another model")
    rejected(bundle, "model.safetensors", codes=(1,))


def test_numbers_embellished_in_the_result(bundle: Path) -> None:
    """`result.json` is nobody's signed word; what it says of the bill must still be what the ledgers add up to."""
    path = bundle / "result.json"
    good = json.loads(path.read_text())
    for change in (
        lambda r: r["partners"]["hungary"].update(epsilon=0.1),
        lambda r: r["partners"]["hungary"].update(epsilon_filter=0.1),
        lambda r: r["partners"]["hungary"].update(epsilon_cap=0.5),
        lambda r: r["partners"]["hungary"].update(delta=1e-9),
        lambda r: r["partners"]["hungary"].update(rounds=1),
        lambda r: r["partners"].pop("hungary"),
        lambda r: r.update(charter_sha256="0" * 64),
        lambda r: r["final"].update(auc=0.99),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        path.write_text(json.dumps(bad))
        rejected(bundle, "result.json")


def test_a_rollback_shows_beside_what_somebody_kept(bundle: Path, demo_run: tuple[Path, Result]) -> None:
    """Everything that speaks of a ledger is taken out of the bundle; one copy, one file of heads or one checkpoint names it."""
    file = "partners/hungary/ledger.jsonl"
    lines = (bundle / file).read_bytes().splitlines(keepends=True)
    (bundle / file).write_bytes(b"".join(lines[:-2]))
    shutil.rmtree(bundle / "closing")
    shutil.rmtree(bundle / "heads")
    missing = f"{file}:{len(lines) - 1}:"
    whole = demo_run[0]
    for kept in (whole / file, whole):
        done = call("audit", bundle, "--against", kept)
        done.expect(1).says("entries_missing", missing)
    (closing,) = whole.glob(f"closing/{json.loads((whole / 'result.json').read_text())['run_id']}.json")
    call("audit", bundle, "--against", closing).expect(1).says("entries_missing", f"{file}:")
    (bundle / file).write_bytes(b"".join(lines[:6]))  # the newest head is from some entries before the end
    call("audit", bundle, "--against", whole / "heads").expect(1).says("entries_missing", f"{file}:")
    call("audit", bundle, "--against", whole / "charter.json").expect(1).says(
        "closing_missing", "neither a ledger, nor heads"
    )
    call("audit", whole, "--against", whole / "charter.json").expect(2).says("neither a ledger, nor heads")


def test_a_head_that_others_hold(bundle: Path) -> None:
    """Heads are in the bundle: a ledger that ends before one is a violation also without any checkpoint."""
    file = "partners/hungary/ledger.jsonl"
    lines = (bundle / file).read_bytes().splitlines(keepends=True)
    (bundle / file).write_bytes(b"".join(lines[:6]))
    shutil.rmtree(bundle / "closing")
    call("audit", bundle).expect(1).says("entries_missing", f"{file}:", "heads/")


def test_something_added(bundle: Path) -> None:
    for file in ("keys/mallory.pem", "partners/mallory/ledger.jsonl", "closing/0000.json"):
        path = bundle / file
        path.parent.mkdir(exist_ok=True)
        shutil.copy(bundle / (LEDGERS[0] if "ledger" in file else KEYS[0]), path)
        rejected(bundle, file.split("/ledger")[0])
        shutil.rmtree(path.parent) if "mallory/" in file else path.unlink()
    call("audit", bundle).expect(0)


def test_links_are_not_followed(bundle: Path, demo_run: tuple[Path, Result]) -> None:
    for file in (LEDGERS[0], "charter.json", KEYS[0]):
        path = bundle / file
        path.unlink()
        path.symlink_to(demo_run[0] / file)
        rejected(bundle, file)
        path.unlink()
        shutil.copy(demo_run[0] / file, path)
