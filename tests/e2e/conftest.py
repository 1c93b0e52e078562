"""One demo and one fork server for all end-to-end tests of a session."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from e2e_support import Forked, Result, process
from network_support import Zygote


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> tuple[Path, Result]:
    """`hansa demo` as a user starts it, once for all workers: the bundle and what stood on the screen. Change nothing in it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    told = root / "demo.json"
    with open(root / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            cwd = root / "demo-cwd"
            cwd.mkdir()
            result = process("demo", "--out", "demo", cwd=cwd)
            told.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return root / "demo-cwd" / "demo", Result(**json.loads(told.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def worker_id(request: pytest.FixtureRequest) -> str:
    """The xdist worker's name, or "master" without xdist."""
    return str(getattr(request.config, "workerinput", {}).get("workerid", "master"))


@pytest.fixture
def bundle(demo_run: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the demo's bundle, to do with as a test likes."""
    copy = tmp_path / "bundle"
    shutil.copytree(demo_run[0], copy)
    return copy


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """The fork server."""
    server = Forked()
    yield server
    server.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The fork server of networks."""
    server = Zygote()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in a folder of its own, and none of them meets a fault of ours."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("hansa-fault.log")), (tmp_path / "hansa-fault.log").read_text()


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What every payload tries to make; also the module `hansa_evil` does, when it is imported."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    assert "hansa_evil" not in sys.modules


@pytest.fixture
def evil(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported, and should not be."""
    (tmp_path / "hansa_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\ntask = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "hansa_evil"
